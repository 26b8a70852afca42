"""Promise: a record says what the runs of one recipe logged, seed by seed, and a status is never better than them."""

import copy
import json
import multiprocessing
import operator
import re
import statistics
from functools import reduce

import pytest
from runs import ENV, TOP1, cell_record, dataset, edit, make_run, quick

from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.verdicts import of_cells, status
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import noise, records
from mixup_recipes.runs.recording import of_run, of_runs, save
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

MORE = [t + 1 for t in TOP1]
CUTMIX, COMIXUP, GRIDMIX = "r50_100e_cutmix", "r50_100e_comixup", "r34_100e_gridmix"


@pytest.fixture
def run(tmp_path):
    """Makes a run of quickstart_cutmix by name, 7 epochs being an override."""
    return lambda name, top1=TOP1, mixer="cutmix", **fields: Run.open(
        make_run(tmp_path / name, quick(mixer, **fields), top1)
    )


def test_a_record_holds_the_recipe_its_overrides_and_each_seed_by_the_protocol_and_as_the_tool_reads_it(run):
    found, published = of_runs([run("a"), run("b", MORE, seed=3)]), load_recipe("quickstart_cutmix")
    assert (found["recipe"], found["images"]) == ("quickstart_cutmix", 661)
    assert found["protocol"] == "median of the last 5 epochs" and list(found["seeds"]) == ["0", "3"]
    first = found["seeds"]["0"]
    # Of 50 45 41 43 40, and for the tool 30 beside them
    assert first["top1"] == statistics.median([50, 45, 41, 43, 40]) == 43.0
    assert first["tool"]["value"] == statistics.median([30, 50, 45, 41, 43, 40]) == 42.0
    assert (first["top5"], first["nll"], first["ece"]) == (83.0, 4.3, 2.5)
    assert (first["epochs"], first["epochs_planned"], first["seconds"], first["img_per_s"]) == (7, 7, 70.0, 304.0)
    assert first["env"]["commit"] == "abc" and first["env"]["packages"] == ENV["packages"]
    assert found["seeds"]["3"]["top1"] == 44.0
    sizes = {split: content["images"] for split, content in found["dataset"]["splits"].items()}
    assert sizes == {"train": 675, "test": 661} and "classes" not in found["dataset"]
    assert found["overrides"] == {"epochs": [published.epochs, 7], "warmup_epochs": [published.warmup_epochs, 0.0]}
    assert "seed" not in found["fields"] and "name" not in found["fields"]
    assert found["fields"]["lr"] == published.lr and found["fields"]["mixer_args"] == {"cutmix": {"alpha": 1.0}}
    assert json.loads(json.dumps(found)) == found


def test_runs_of_different_recipes_or_data_are_refused_and_a_run_from_before_a_field_of_data_json_is_not(run):
    first, other, new = run("a"), run("other", seed=1), run("new", seed=1).folder
    splits = other.data.identity["splits"] | {"train": {"images": 674, "labels_sha256": "cc"}}
    edit(other.folder / "data.json", splits=splits)
    assert "commit" not in json.loads((first.folder / "data.json").read_text())
    edit(new / "data.json", commit=None)
    assert list(of_runs([first, Run.open(new)])["seeds"]) == ["0", "1"]
    edit(new / "data.json", commit="0" * 40)
    for second, says in (
        (run("b", seed=1, lr=0.4), r"the recipes of these runs differ in more than the seed: lr: 0\.2 and 0\.4; "),
        (run("d", mixer="mixup", seed=1), "the runs belong to two recipes, quickstart_cutmix and quickstart_mixup"),
        (Run.open(other.folder), "the recipes of these runs differ in more than the seed: dataset: "),
        (Run.open(new), "the recipes of these runs differ in more than the seed"),
        (run("h", MORE), r"seed 0 has top-1 43\.00 after 7 epochs already, and another run has 44\.00"),
    ):
        with pytest.raises(UserError, match=says):
            of_runs([first, second])


def test_runs_by_another_version_of_a_mixer_s_law_are_recorded_apart_and_do_not_count(run):
    first, now = run("a", mixer="guidedmix"), run("b", mixer="guidedmix", seed=1)
    edit(now.folder / "env.json", laws=["guidedmix@kang-2023.2", "vanilla@1"])
    earlier, later = of_run(first), of_run(Run.open(now.folder))
    assert later["seeds"]["1"]["env"]["laws"] == ["guidedmix@kang-2023.2", "vanilla@1"]
    says = r"laws of the mixer: \[\] and \['guidedmix@kang-2023\.2'\]; record them separately"
    for one, other in ((earlier, later), (later, earlier)):
        with pytest.raises(UserError, match=says if one is earlier else "laws of the mixer"):
            records.merge(one, other, "here")
    earlier["overrides"] = later["overrides"] = None  # as if of the published length
    for content in (earlier, later):
        content["fields"] |= records.fields_of(load_recipe("quickstart_guidedmix"))
    assert records.excluded(earlier) == "runs of an earlier law than guidedmix@kang-2023.2 do not count"
    assert not records.excluded(later) and not records.earlier_law(of_run(run("c")))  # CutMix has its first law
    nested = of_run(run("d", mixer="decouplemix", mixer_args={"base": {"guidedmix": {}}}))
    assert records.earlier_law(nested) == "guidedmix@kang-2023.2"


def test_a_record_gains_seeds_goes_on_with_unfinished_ones_and_refuses_contradictions(run, tmp_path):
    out, b = tmp_path / "results", run("b", seed=1)
    path = save([run("young", TOP1[:3])], out)
    found = records.read_record(path)
    assert (found["seeds"]["0"]["epochs"], found["seeds"]["0"]["epochs_planned"]) == (3, 7)
    assert records.finished_top1(found) == []
    a = run("a")
    assert save([b], out) == save([a], out) == path
    assert {k: seed["epochs"] for k, seed in records.read_record(path)["seeds"].items()} == {"0": 7, "1": 7}
    before = path.read_bytes()
    save([b, a], out)
    assert path.read_bytes() == before  # the same runs again change nothing
    for wrong, says in (
        (run("c", MORE, seed=1), "leave one of them out"),
        (run("d", TOP1[:3]), r"has top-1 43\.00 after 7 epochs already"),
    ):
        with pytest.raises(UserError, match=says):
            save([wrong], out)
    assert path.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == [".lock", path.name]


def test_a_record_from_before_an_argument_of_its_mixer_gains_seeds_and_still_counts_as_unchanged(run):
    old, new = (of_run(run(str(seed), seed=seed, mixer="attentivemix")) for seed in (0, 1))
    assert new["fields"]["mixer_args"]["attentivemix"]["teacher_size"] == 224
    del old["fields"]["mixer_args"]["attentivemix"]["teacher_size"]
    assert "mixer_args" not in records.changes("quickstart_attentivemix", old["fields"])
    assert [*records.merge(old, new, "here")["seeds"]] == ["0", "1"]
    new["fields"]["mixer_args"]["attentivemix"]["teacher_size"] = 32
    with pytest.raises(UserError, match="differ in more than the seed: mixer_args"):
        records.merge(old, new, "here")


def test_overrides_get_a_file_of_their_own_and_records_of_former_versions_are_read(run, tmp_path):
    out, published = tmp_path / "results", load_recipe("quickstart_cutmix")
    first, other, again = (save([made], out).name for made in (run("a"), run("b", lr=0.4), run("c")))
    assert first.startswith("quickstart_cutmix+") and again == first != other
    plain = run("d", epochs=published.epochs, warmup_epochs=published.warmup_epochs)
    assert save([plain], out).name == "quickstart_cutmix.json"
    assert len(records.all_records(out)) == 3
    assert of_cells(out) == {}  # none of them is a published cell
    # a recipe that is not of this package has none, and a setting's name is not enough to be one of its recipes
    recipe = run("f").folder / "recipe.yaml"
    text = recipe.read_text()
    for name in ("mine", "quickstart_mine"):
        recipe.write_text(text.replace("name: quickstart_cutmix", f"name: {name}"))
        found = of_run(Run.open(recipe.parent))
        assert found["overrides"] is None and records.file_name(found) == f"{name}.json"
    recipe.write_text(text.replace("name: quickstart_cutmix", "name: ../mine"))
    with pytest.raises(UserError, match=r"recipe name '\.\./mine' cannot name a record"):
        of_run(Run.open(recipe.parent))
    # a record may be older than a recipe field and than its format
    old = json.loads((out / first).read_text())
    del old["fields"]["sync_bn"], old["format"]
    (out / first).write_text(json.dumps(old))
    assert save([run("e", seed=1)], out) == out / first
    assert list(records.read_record(out / first)["seeds"]) == ["0", "1"]
    assert all(records.file_name(content) == f"{name}.json" for name, content in records.all_records().items())


def test_seeds_that_are_recorded_at_once_all_arrive(run, tmp_path):
    runs, context = [run(f"run{seed}", seed=seed) for seed in range(4)], multiprocessing.get_context("fork")
    of_run(runs[0])  # what is slow is done before the race

    def record(run, out, start):
        start.wait()
        save([run], out)

    for out in (tmp_path / str(turn) for turn in range(3)):
        start = context.Barrier(len(runs))
        processes = [context.Process(target=record, args=(run, out, start)) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        (found,) = records.all_records(out).values()
        assert list(found["seeds"]) == ["0", "1", "2", "3"]


def test_the_commands_write_and_show_records_or_say_in_a_line_why_not(run, console, tmp_path):
    out, runs = tmp_path / "results", [run("a").folder, run("b", seed=1).folder]
    (runs[0] / "env.json").rename(tmp_path / "env.json")
    left, shown, err = console("record", *runs, "--out", out)
    assert (left, shown) == (2, "") and re.match("error: cannot read .*env.json: No such file", err)
    assert not out.exists()
    (tmp_path / "env.json").rename(runs[0] / "env.json")
    left, shown, _ = console("record", *runs, "--out", out)
    (path,) = out.glob("*.json")
    assert left == 0 and shown == f"{path}: quickstart_cutmix, seeds 0, 1\n"
    (out / f"{CUTMIX}.json").write_text(json.dumps(cell_record(CUTMIX, [77.0])))
    left, shown, _ = console("cells", "show", CUTMIX, "--results", out)
    assert left == 0 and "status     reproduced within the band: 77.00 (1 seed), -0.17 from 77.17" in shown
    shown = console("cells", "list", "--setting", "r50_100e", "--results", out)[1]
    assert f"{CUTMIX}              77.17  reproduced within the band: 77.00" in shown
    assert console("record", "--out", out)[::2] == (2, "error: no run folders given\n")
    nowhere = tmp_path / "none"
    says = f"error: no folder of run records {nowhere}\n"
    assert console("cells", "list", "--results", nowhere)[::2] == (2, says)
    path.write_text('{"recipe": "quickstart_cutmix"}')
    left, _, err = console("table", "--results", out)
    assert left == 2 and f"{path}: fields is missing" in err


def test_a_damaged_record_is_refused_with_its_file_and_key(tmp_path):
    whole, path = cell_record(CUTMIX, [77.0]), tmp_path / f"{CUTMIX}.json"
    path.write_text(json.dumps(whole))
    assert records.all_records(tmp_path) == {CUTMIX: whole}
    for key, value, says in (
        ("format", 2, "format 2, but this version of Mixup Recipes reads formats 1 to 1"),
        ("recipe", None, "recipe: expected text, got None"),
        ("recipe", "r50_100e_mixup", "this record belongs in a file named r50_100e_mixup.json"),
        ("fields.trials", 0, "fields.trials: expected a positive integer, got 0"),
        ("overrides", [1], "overrides: expected null, or a table of pairs, got [1]"),
        ("overrides", {"lr": 3}, "overrides: expected null, or a table of pairs, got {'lr': 3}"),
        ("images", 50_001, "images: 50001 were evaluated, but validation has 50000"),
        ("images", True, "images: expected a positive integer, got True"),
        ("dataset", {}, "dataset.splits is missing"),
        ("dataset.splits.train.images", "72", "dataset.splits.train.images: expected a positive integer, got '72'"),
        ("seeds", {}, "seeds: expected a table of seeds, got []"),
        ("seeds", {"x": {}}, "seeds: expected a table of seeds, got ['x']"),
        ("seeds.0", None, "seeds.0: expected a table, got None"),
        ("seeds.0.top1", float("nan"), "seeds.0.top1: expected a number from 0 to 100, got nan"),
        ("seeds.0.top1", 500.0, "seeds.0.top1: expected a number from 0 to 100, got 500.0"),
        ("seeds.0.reading", {}, "seeds.0.reading.name is missing"),
        ("seeds.0.epochs_planned", 7, "seeds.0: 100 of 7 epochs, but the recipe has 100"),
        ("seeds.0.epochs", 101, "seeds.0: 101 of 100 epochs, but the recipe has 100"),
    ):
        content, (*outer, last) = copy.deepcopy(whole), key.split(".")
        reduce(operator.getitem, outer, content)[last] = value
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            records.all_records(tmp_path)
        assert str(error.value) == f"{path}: {says}"


BAND, EARLY, OFFICIAL = noise.REPRODUCED, "too early to say", "OpenMixup did not train the published number"


def test_status_is_that_of_finished_runs_without_overrides_and_says_which_number_upstream_did_not_train():
    """77.17 on 50,000 images, one run: sigma = 100 sqrt(.7717 * .2283 / 50000) = .188, band 2.306 * .188 * sqrt(2)."""
    mixed, gaps = cell_record(CUTMIX, [77.1, 50.0]), cell_record(CUTMIX, [77.1, 50.0])
    mixed["seeds"]["1"]["epochs"] = 60
    gaps["seeds"]["1"]["reading"]["missing"] = "3 of 5 epochs"
    other = {"fields": records.fields_of(load_recipe(CUTMIX, epochs=90))}
    own = {"dataset": "/data/imagenet", "image_column": "jpg", "label_column": "cls", "eval_split": "val"}
    recipe = load_recipe(CUTMIX, num_classes=1000, **own)  # which a run counts
    assert records.overrides(recipe) == {}  # a local copy counts if its numbers are those of the benchmark
    whole, part = (dataset(1_281_167, images, eval_split="val") for images in (50_000, 10_000))
    local, few = {"fields": records.fields_of(recipe), "dataset": whole}, {"dataset": part, "images": 10_000}
    no, train = "not run here; runs ", "1,281,167"
    images = f"{no}on {train} \\+ 10,000 images instead of {train} \\+ 50,000 do not count$"
    progress = "no run has finished: seed 0 at epoch 60 of 100, seed 1 at epoch 60 of 100"
    for name, found, expected, words in (
        (CUTMIX, [77.00], BAND, r"77\.00 \(1 seed\), -0\.17 from 77\.17, band ±0\.61"),
        (CUTMIX, [77.7], BAND, r"77\.70 \(1 seed\), \+0\.53"),
        (CUTMIX, [76.0], EARLY, r"76\.00 \(1 seed\), -1\.17"),
        (CUTMIX, [75.9, 76.0, 76.1], "off", r"76\.00 ± 0\.10 \(3 seeds\), -1\.17"),
        (CUTMIX, cell_record(CUTMIX, [77.1, 77.2], epochs=60), EARLY, progress),
        (CUTMIX, mixed, BAND, r"77\.10 \(1 seed\)"),
        (CUTMIX, gaps, BAND, r"77\.10 \(1 seed\)"),
        (CUTMIX, cell_record(CUTMIX, [77.17] * 2, **other), "published", f"{no}with epochs 90 instead of 100 do not c"),
        (CUTMIX, cell_record(CUTMIX, [77.2], **local), BAND, ""),
        (CUTMIX, cell_record(CUTMIX, [77.2], **local | few), "published", images),
        (CUTMIX, cell_record(CUTMIX, [77.2], **local | {"images": 10_000}), "published", images),  # 40,000 unreadable
        ("deit_s_samix", [80.9, 81.0, 80.95], BAND, r"80\.95 ± 0\.05 \(3 seeds\), \+0\.01"),
        ("deit_s_samix", None, "published", "not run here$"),
        (GRIDMIX, [74.0], "run", r"74\.00 \(1 seed\), no published number to compare with"),
        (GRIDMIX, cell_record(CUTMIX, [77.17], **other) | {"recipe": GRIDMIX}, "not run", ""),
        (GRIDMIX, None, "not run", "no published number$"),
        ("deit_s_mixpro", [81.3], BAND, rf".*band ±0\.57; {OFFICIAL}, and its source states no protocol$"),  # one run
        (COMIXUP, None, "published", f".*{OFFICIAL}"),
        (COMIXUP, [77.6], "", f".*{OFFICIAL}$"),
        (COMIXUP, [70.0, 70.1], "", f".*{OFFICIAL}$"),
        (COMIXUP, [70.0], "", f".*{OFFICIAL}$"),
    ):
        result, text = status(cells.find(name), cell_record(name, found) if isinstance(found, list) else found)
        assert expected in ("", result) and re.match(words, text), (name, found, result, text)
    with pytest.raises(UserError, match=f"a record of r50_100e_mixup cannot be used for the cell {CUTMIX}"):
        status(cells.find(CUTMIX), cell_record("r50_100e_mixup", [77.0]))
