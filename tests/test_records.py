"""Promise: a record says what the runs of one recipe logged, seed by seed, and a status is never better than them."""

import copy
import json
import multiprocessing
import re
import statistics
import sys

import pytest

import mixup_recipes
from mixup_recipes.benchmark import cells
from mixup_recipes.recipe import to_yaml
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.runs import noise, records
from mixup_recipes.typed import UserError

TOP1 = [10.0, 30.0, 50.0, 45.0, 41.0, 43.0, 40.0]
DATA = {"dataset": "groceries", "config": None, "revision": None, "classes": ["a", "b"]}
DATA |= {"splits": {"train": {"images": 675, "labels_sha256": "aa"}, "test": {"images": 661, "labels_sha256": "bb"}}}
ENV = {"command": ["train_mixup.py"], "python": "3.11.7", "packages": {"torch": "2.14.1"}, "platform": "Linux"}
ENV |= {"device": "cpu", "device_type": "cpu", "processes": 1, "threads": 2, "mixed_precision": "bf16", "commit": "abc"}


def lines(top1):
    for epoch, value in enumerate(top1, 1):
        perf = {"img_per_s": 300.0 + epoch, "seconds": 10.0 * epoch}
        yield {"mode": "train", "epoch": epoch, "update": 4 * epoch - 1, "lr": 0.1, "loss": 2.0, "perf": perf}
        scores = {"top1": value, "top5": value + 40, "nll": value / 10, "ece": epoch / 2, "count": 661}
        yield {"mode": "val", "epoch": epoch, "update": 4 * epoch, "perf": perf} | scores


@pytest.fixture
def make_run(tmp_path):
    """A run folder of quickstart_cutmix, 7 epochs being an override."""

    def make(name, top1=TOP1, recipe="quickstart_cutmix", data=DATA, **fields):
        run = tmp_path / name
        run.mkdir()
        resolved = load_recipe(recipe, **{"epochs": 7, "warmup_epochs": 0} | fields)
        (run / "recipe.yaml").write_text(to_yaml(resolved))
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(top1)))
        (run / "env.json").write_text(json.dumps(ENV))
        (run / "data.json").write_text(json.dumps(data))
        return run

    return make


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit status, output and errors of the console command."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["mixup-recipes", *map(str, argv)])
        with pytest.raises(SystemExit) as left:
            mixup_recipes.main()
        shown = capsys.readouterr()
        return left.value.code or 0, shown.out, shown.err

    return call


def cell_record(name, tops, epochs=None, **changes):
    """A record of a published cell's recipe with finished seeds of the given top-1."""
    recipe, _ = resolve(name)
    reading = {"name": "best epoch", "value": 50.0, "used": 5, "wanted": 5, "epoch": 5, "missing": ""}
    same = {"tool": reading, "top5": 90.0, "nll": 1.0, "ece": 2.0, "seconds": 9.0, "img_per_s": 300.0, "env": {}}
    same |= {"epochs": epochs or recipe.epochs, "epochs_planned": recipe.epochs}
    seeds = {str(seed): {"top1": top1, "reading": dict(reading), **same} for seed, top1 in enumerate(tops)}
    content = {"recipe": name, "fields": records.fields_of(recipe), "overrides": {}, "protocol": ""}
    train, evaluation = (100_000, 10_000) if name.startswith("tiny_") else (1_281_167, 50_000)
    content |= {"images": evaluation, "dataset": dataset(train, evaluation, recipe.train_split, recipe.eval_split)}
    return content | {"seeds": seeds} | changes


def dataset(train, evaluation, train_split="train", eval_split="validation"):
    """What a record says of its images."""
    counts = {train_split: train, eval_split: evaluation}
    return {"splits": {split: {"images": n, "labels_sha256": "aa"} for split, n in counts.items()}}


# ------------------------------------------------------------------------------------------------ what a record holds


def test_a_record_holds_each_seed_by_the_protocol_and_as_the_tool_reads_it(make_run):
    found = records.record([make_run("a"), make_run("b", [t + 1 for t in TOP1], seed=3)])
    assert (found["recipe"], found["images"], found["protocol"]) == (
        "quickstart_cutmix",
        661,
        "median of the last 5 epochs",
    )
    assert list(found["seeds"]) == ["0", "3"]
    first = found["seeds"]["0"]
    # Of 50 45 41 43 40, and for the tool 30 beside them
    assert first["top1"] == statistics.median([50, 45, 41, 43, 40]) == 43.0
    assert first["tool"]["value"] == statistics.median([30, 50, 45, 41, 43, 40]) == 42.0
    assert (first["top5"], first["nll"], first["ece"]) == (83.0, 4.3, 2.5)
    assert (first["epochs"], first["epochs_planned"], first["seconds"], first["img_per_s"]) == (7, 7, 70.0, 304.0)
    assert first["env"]["commit"] == "abc" and first["env"]["packages"] == {"torch": "2.14.1"}
    assert found["seeds"]["3"]["top1"] == 44.0
    assert found["dataset"]["splits"] == DATA["splits"] and "classes" not in found["dataset"]


def test_a_record_holds_the_whole_recipe_but_the_seed_and_what_was_overridden(make_run):
    found = records.record([make_run("a", seed=5)])
    published = load_recipe("quickstart_cutmix")
    assert found["overrides"] == {"epochs": [published.epochs, 7], "warmup_epochs": [published.warmup_epochs, 0.0]}
    assert "seed" not in found["fields"] and "name" not in found["fields"]
    assert found["fields"]["lr"] == published.lr and found["fields"]["mixer_args"] == {"cutmix": {"alpha": 1.0}}
    assert json.loads(json.dumps(found)) == found


def test_a_run_from_before_a_field_of_data_json_is_of_the_same_images(make_run, tmp_path):
    old, new = make_run("old"), make_run("new", seed=1)
    content = json.loads((new / "data.json").read_text())
    (new / "data.json").write_text(json.dumps(content | {"commit": None}))
    assert "commit" not in content
    assert list(records.record([old, new])["seeds"]) == ["0", "1"]
    (new / "data.json").write_text(json.dumps(content | {"commit": "0" * 40}))
    with pytest.raises(UserError, match="not the same recipe but for the seed"):
        records.record([old, new])


def test_an_unfinished_run_is_recorded_as_such(make_run):
    found = records.record([make_run("a", TOP1[:3])])
    assert (found["seeds"]["0"]["epochs"], found["seeds"]["0"]["epochs_planned"]) == (3, 7)
    assert records.finished(found) == []


def test_a_recipe_that_is_not_of_this_package_has_no_overrides(make_run, tmp_path):
    run = make_run("a")
    text = (run / "recipe.yaml").read_text().replace("name: quickstart_cutmix", "name: mine")
    (run / "recipe.yaml").write_text(text)
    found = records.record([run])
    assert found["overrides"] is None and records.file_name(found) == "mine.json"
    (run / "recipe.yaml").write_text(text.replace("name: mine", "name: ../mine"))
    with pytest.raises(UserError, match=r"recipe name '\.\./mine' cannot name a record"):
        records.record([run])
    # a setting's name is not enough to be one of its recipes
    (run / "recipe.yaml").write_text(text.replace("name: mine", "name: quickstart_mine"))
    assert records.record([run])["overrides"] is None


def test_runs_of_different_recipes_are_refused_with_the_differing_fields(make_run):
    with pytest.raises(UserError, match=r"not the same recipe but for the seed: lr: 0\.2 and 0\.4; "):
        records.record([make_run("a"), make_run("b", seed=1, lr=0.4)])
    with pytest.raises(UserError, match="runs of two recipes, quickstart_cutmix and quickstart_mixup"):
        records.record([make_run("c"), make_run("d", recipe="quickstart_mixup", seed=1)])
    other = DATA | {"splits": DATA["splits"] | {"train": {"images": 674, "labels_sha256": "cc"}}}
    with pytest.raises(UserError, match="not the same recipe but for the seed: dataset: "):
        records.record([make_run("e"), make_run("f", seed=1, data=other)])
    with pytest.raises(UserError, match=r"seed 0 has top-1 43\.00 after 7 epochs already, and another run has 44\.00"):
        records.record([make_run("g"), make_run("h", [t + 1 for t in TOP1])])


# ------------------------------------------------------------------------------------------------ files


def test_a_record_gains_seeds_and_refuses_contradictions(make_run, tmp_path):
    out = tmp_path / "results"
    a, b = make_run("a"), make_run("b", seed=1)
    path = records.save([b], out)
    assert records.save([a], out) == path and list(records.read(path)["seeds"]) == ["0", "1"]
    before = path.read_bytes()
    records.save([b, a], out)
    assert path.read_bytes() == before  # the same runs again change nothing
    with pytest.raises(UserError, match="leave one of them out"):
        records.save([make_run("c", [t + 1 for t in TOP1], seed=1)], out)
    assert path.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == [".lock", path.name]


def test_an_unfinished_seed_may_go_on(make_run, tmp_path):
    path = records.save([make_run("a", TOP1[:3])], tmp_path / "results")
    assert records.save([make_run("b")], tmp_path / "results") == path
    assert records.read(path)["seeds"]["0"]["epochs"] == 7
    with pytest.raises(UserError, match=r"has top-1 43\.00 after 7 epochs already"):
        records.save([make_run("c", TOP1[:3])], tmp_path / "results")


def test_overrides_get_a_file_of_their_own(make_run, tmp_path):
    name, *others = (
        records.save([run], tmp_path / "results").name for run in (make_run("a"), make_run("b", lr=0.4), make_run("c"))
    )
    assert name.startswith("quickstart_cutmix+") and others[1] == name != others[0]
    epochs = load_recipe("quickstart_cutmix").epochs
    plain = make_run("d", TOP1, epochs=epochs, warmup_epochs=load_recipe("quickstart_cutmix").warmup_epochs)
    assert records.save([plain], tmp_path / "results").name == "quickstart_cutmix.json"
    assert len(records.load(tmp_path / "results")) == 3
    assert records.of_cells(tmp_path / "results") == {}  # none of them is a published cell


def test_a_record_may_be_older_than_a_recipe_field(make_run, tmp_path):
    path = records.save([make_run("a")], tmp_path / "results")
    old = json.loads(path.read_text())
    del old["fields"]["sync_bn"]
    path.write_text(json.dumps(old))
    records.save([make_run("b", seed=1)], tmp_path / "results")
    assert list(records.read(path)["seeds"]) == ["0", "1"]


def test_the_records_of_this_package_are_whole():
    for name, content in records.load().items():
        assert records.file_name(content) == f"{name}.json"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "is no run folder: log.jsonl is missing"),
        (lambda run: (run / "env.json").unlink(), "cannot read .*env.json: No such file"),
        (lambda run: (run / "data.json").write_text("{"), "data.json is not valid JSON"),
        (lambda run: (run / "data.json").write_text("[]"), "data.json: expected a table, got \\[\\]"),
        (lambda run: (run / "data.json").write_text('{"splits": {}}'), "data.json: splits.train is missing"),
        (lambda run: (run / "env.json").write_text("3"), "env.json: expected a table, got 3"),
        (lambda run: (run / "log.jsonl").write_text(""), "log.jsonl has no trained epoch yet"),
    ],
)
def test_a_damaged_run_is_explained_and_leaves_with_2(make_run, run, tmp_path, spoil, says):
    folder = make_run("a")
    spoil(folder)
    status, out, err = run("record", folder, "--out", tmp_path / "results")
    assert (status, out) == (2, "") and err.startswith("error: ") and re.search(says, err)
    assert not (tmp_path / "results").exists()


def test_the_command_writes_the_record(make_run, run, tmp_path):
    status, out, _ = run("record", make_run("a"), make_run("b", seed=1), "--out", tmp_path / "results")
    (path,) = (tmp_path / "results").glob("*.json")
    assert status == 0 and out == f"{path}: quickstart_cutmix, seeds 0, 1\n"
    assert run("record", "--out", tmp_path / "results")[::2] == (2, "error: no run folders given\n")
    status, _, err = run("cells", "list", "--results", tmp_path / "none")
    assert (status, err) == (2, f"error: no folder of run records {tmp_path / 'none'}\n")
    path.write_text('{"recipe": "quickstart_cutmix"}')
    status, _, err = run("table", "--results", tmp_path / "results")
    assert status == 2 and f"{path}: fields is missing" in err


def test_seeds_that_are_recorded_at_once_all_arrive(make_run, tmp_path):
    runs = [make_run(f"run{seed}", seed=seed) for seed in range(4)]
    records.read_run(runs[0])  # what is slow is imported before the race
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        start = context.Barrier(len(runs))

        def save(run, out=tmp_path / str(turn), start=start):
            start.wait()
            records.save([run], out)

        processes = [context.Process(target=save, args=(run,)) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        (found,) = records.load(tmp_path / str(turn)).values()
        assert list(found["seeds"]) == ["0", "1", "2", "3"]


def put(path, value):
    """Change a record where dots lead to."""

    def change(content):
        *keys, last = path.split(".")
        for key in keys:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("recipe", None), "recipe: expected text, got None"),
        (put("recipe", "r50_100e_mixup"), "this record belongs into a file r50_100e_mixup.json"),
        (put("fields.trials", 0), "fields.trials: expected a positive integer, got 0"),
        (put("overrides", [1]), "overrides: expected null, or a table of pairs, got [1]"),
        (put("overrides", {"lr": 3}), "overrides: expected null, or a table of pairs, got {'lr': 3}"),
        (put("images", 50_001), "images: 50001 were evaluated, but validation has 50000"),
        (put("images", True), "images: expected a positive integer, got True"),
        (put("dataset", {}), "dataset.splits is missing"),
        (
            put("dataset.splits.train.images", "72"),
            "dataset.splits.train.images: expected a positive integer, got '72'",
        ),
        (put("seeds", {}), "seeds: expected a table of seeds, got []"),
        (put("seeds", {"x": {}}), "seeds: expected a table of seeds, got ['x']"),
        (put("seeds.0", None), "seeds.0: expected a table, got None"),
        (put("seeds.0.top1", float("nan")), "seeds.0.top1: expected a number from 0 to 100, got nan"),
        (put("seeds.0.top1", 500.0), "seeds.0.top1: expected a number from 0 to 100, got 500.0"),
        (put("seeds.0.reading", {}), "seeds.0.reading.name is missing"),
        (put("seeds.0.epochs_planned", 7), "seeds.0: 100 of 7 epochs, but the recipe has 100"),
        (put("seeds.0.epochs", 101), "seeds.0: 101 of 100 epochs, but the recipe has 100"),
    ],
)
def test_a_damaged_record_is_refused_with_its_file_and_key(tmp_path, change, says):
    content, path = cell_record("r50_100e_cutmix", [77.0]), tmp_path / "r50_100e_cutmix.json"
    path.write_text(json.dumps(content))
    assert records.load(tmp_path) == {"r50_100e_cutmix": content}
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        records.load(tmp_path)
    assert str(error.value) == f"{path}: {says}"


# ------------------------------------------------------------------------------------------------ status


# r50_100e_cutmix: 77.17 on 50,000 images, one run: sigma = 100 sqrt(.7717 * .2283 / 50000) = .188, and the band of one
# run is 2.306 * .188 * sqrt(2) = .61.
@pytest.mark.parametrize(
    ("name", "tops", "expected", "words"),
    [
        ("r50_100e_cutmix", [77.00], "reproduced within the band", "77.00 (1 seed), -0.17 from 77.17, band ±0.61"),
        ("r50_100e_cutmix", [77.7], "reproduced within the band", "77.70 (1 seed), +0.53"),
        ("r50_100e_cutmix", [76.0], "too early to say", "76.00 (1 seed), -1.17"),
        ("r50_100e_cutmix", [75.9, 76.0, 76.1], "off", "76.00 ± 0.10 (3 seeds), -1.17"),
        ("deit_s_samix", [80.9, 81.0, 80.95], "reproduced within the band", "80.95 ± 0.05 (3 seeds), +0.01"),
        ("r34_100e_gridmix", [74.0], "run", "74.00 (1 seed), no published number to compare with"),
    ],
)
def test_status_of_finished_runs(name, tops, expected, words):
    status, text = records.status(cells.find(name), cell_record(name, tops))
    assert status == expected and text.startswith(words)


def test_status_without_runs():
    assert records.status(cells.find("deit_s_samix"), None) == ("published", "not run here")
    assert records.status(cells.find("r34_100e_gridmix"), None) == ("not run", "no published number")
    status, text = records.status(cells.find("r50_100e_comixup"), None)
    assert status == "published" and "OpenMixup did not train the published number" in text


def test_a_number_that_upstream_did_not_train_is_marked_whatever_we_found():
    for tops in ([77.6], [70.0, 70.1], [70.0]):
        _, text = records.status(cells.find("r50_100e_comixup"), cell_record("r50_100e_comixup", tops))
        assert text.endswith("OpenMixup did not train the published number")


def test_only_finished_seeds_count():
    cell = cells.find("r50_100e_cutmix")
    status, text = records.status(cell, cell_record(cell.name, [77.1, 77.2], epochs=60))
    assert (status, text) == (
        "too early to say",
        "no run has finished: seed 0 at epoch 60 of 100, seed 1 at epoch 60 of 100",
    )
    mixed = cell_record(cell.name, [77.1, 50.0])
    mixed["seeds"]["1"]["epochs"] = 60
    assert records.status(cell, mixed)[1].startswith("77.10 (1 seed)")
    gaps = cell_record(cell.name, [77.1, 50.0])
    gaps["seeds"]["1"]["reading"]["missing"] = "3 of 5 epochs"
    assert records.status(cell, gaps)[1].startswith("77.10 (1 seed)")


def test_overrides_never_count():
    cell = cells.find("r50_100e_cutmix")
    fields = records.fields_of(load_recipe(cell.name, epochs=90))
    content = cell_record(cell.name, [77.17, 77.17], fields=fields)
    assert records.status(cell, content) == (
        "published",
        "not run here; runs with epochs 90 instead of 100 do not count",
    )
    empty = copy.deepcopy(content) | {"recipe": "r34_100e_gridmix"}
    assert records.status(cells.find("r34_100e_gridmix"), empty)[0] == "not run"


def test_a_record_speaks_for_its_own_cell_only():
    with pytest.raises(UserError, match="a record of r50_100e_mixup cannot speak for the cell r50_100e_cutmix"):
        records.status(cells.find("r50_100e_cutmix"), cell_record("r50_100e_mixup", [77.0]))


def test_show_says_what_our_runs_found(run, tmp_path):
    (tmp_path / "r50_100e_cutmix.json").write_text(json.dumps(cell_record("r50_100e_cutmix", [77.0])))
    status, out, _ = run("cells", "show", "r50_100e_cutmix", "--results", tmp_path)
    assert status == 0 and "status     reproduced within the band: 77.00 (1 seed), -0.17 from 77.17" in out
    out = run("cells", "list", "--setting", "r50_100e", "--results", tmp_path)[1]
    assert "r50_100e_cutmix              77.17  reproduced within the band: 77.00" in out


def test_a_local_copy_of_the_data_counts_when_its_numbers_are_those_of_the_benchmark():
    cell = cells.find("r50_100e_cutmix")
    recipe = load_recipe(cell.name, dataset="/data/imagenet", image_column="jpg", label_column="cls", eval_split="val")
    assert records.overrides(recipe) == {}
    local = {"fields": records.fields_of(recipe)}
    whole = dataset(1_281_167, 50_000, eval_split="val")
    assert records.status(cell, cell_record(cell.name, [77.2], **local, dataset=whole))[0] == noise.REPRODUCED
    part = dataset(1_281_167, 10_000, eval_split="val")
    for data in (whole, part):  # of the whole set, 40,000 images could not be read
        found = records.status(cell, cell_record(cell.name, [77.2], **local, dataset=data, images=10_000))
        assert found == (
            "published",
            "not run here; runs on 1,281,167 + 10,000 images instead of 1,281,167 + 50,000 do not count",
        )
