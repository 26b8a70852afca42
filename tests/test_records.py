"""Promise: a record says what the runs of one recipe logged, seed by seed, and a status is never better than them."""

import copy
import json
import multiprocessing
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import ENV, TOP1, Command, cell_record, dataset, edit, make_run, quick

from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.verdicts import of_cells, status
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import noise, records
from mixup_recipes.runs.recording import of_run, of_runs, save
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

MORE = [t + 1 for t in TOP1]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """A run of quickstart_cutmix by name, 7 epochs being an override."""

    def make(name: str, top1: Any = TOP1, mixer: str = "cutmix", **fields: Any) -> Run:
        return Run.open(make_run(tmp_path / name, quick(mixer, **fields), top1))

    return make


# ------------------------------------------------------------------------------------------------ what a record holds


def test_a_record_holds_each_seed_by_the_protocol_and_as_the_tool_reads_it(run: Callable[..., Run]) -> None:
    found = of_runs([run("a"), run("b", MORE, seed=3)])
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


def test_a_record_holds_the_whole_recipe_but_the_seed_and_what_was_overridden(run: Callable[..., Run]) -> None:
    found = of_run(run("a", seed=5))
    published = load_recipe("quickstart_cutmix")
    assert found["overrides"] == {"epochs": [published.epochs, 7], "warmup_epochs": [published.warmup_epochs, 0.0]}
    assert "seed" not in found["fields"] and "name" not in found["fields"]
    assert found["fields"]["lr"] == published.lr and found["fields"]["mixer_args"] == {"cutmix": {"alpha": 1.0}}
    assert json.loads(json.dumps(found)) == found


def test_a_run_from_before_a_field_of_data_json_is_of_the_same_images(run: Callable[..., Run]) -> None:
    old, new = run("old"), run("new", seed=1).folder
    assert "commit" not in json.loads((old.folder / "data.json").read_text())
    edit(new / "data.json", commit=None)
    assert list(of_runs([old, Run.open(new)])["seeds"]) == ["0", "1"]
    edit(new / "data.json", commit="0" * 40)
    with pytest.raises(UserError, match="not the same recipe but for the seed"):
        of_runs([old, Run.open(new)])


def test_a_recipe_that_is_not_of_this_package_has_no_overrides(run: Callable[..., Run]) -> None:
    recipe = run("a").folder / "recipe.yaml"
    text = recipe.read_text()
    # a setting's name is not enough to be one of its recipes
    for name in ("mine", "quickstart_mine"):
        recipe.write_text(text.replace("name: quickstart_cutmix", f"name: {name}"))
        found = of_run(Run.open(recipe.parent))
        assert found["overrides"] is None and records.file_name(found) == f"{name}.json"
    recipe.write_text(text.replace("name: quickstart_cutmix", "name: ../mine"))
    with pytest.raises(UserError, match=r"recipe name '\.\./mine' cannot name a record"):
        of_run(Run.open(recipe.parent))


def test_runs_of_different_recipes_are_refused_with_the_differing_fields(run: Callable[..., Run]) -> None:
    first, other = run("a"), run("other", seed=1)
    splits = other.data.record["splits"] | {"train": {"images": 674, "labels_sha256": "cc"}}
    edit(other.folder / "data.json", splits=splits)
    for second, says in (
        (run("b", seed=1, lr=0.4), r"not the same recipe but for the seed: lr: 0\.2 and 0\.4; "),
        (run("d", mixer="mixup", seed=1), "runs of two recipes, quickstart_cutmix and quickstart_mixup"),
        (Run.open(other.folder), "not the same recipe but for the seed: dataset: "),
        (run("h", MORE), r"seed 0 has top-1 43\.00 after 7 epochs already, and another run has 44\.00"),
    ):
        with pytest.raises(UserError, match=says):
            of_runs([first, second])


# ------------------------------------------------------------------------------------------------ files


def test_a_record_gains_seeds_and_refuses_contradictions(run: Callable[..., Run], tmp_path: Path) -> None:
    out, a, b = tmp_path / "results", run("a"), run("b", seed=1)
    path = save([b], out)
    assert save([a], out) == path and list(records.read_record(path)["seeds"]) == ["0", "1"]
    before = path.read_bytes()
    save([b, a], out)
    assert path.read_bytes() == before  # the same runs again change nothing
    with pytest.raises(UserError, match="leave one of them out"):
        save([run("c", MORE, seed=1)], out)
    assert path.read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == [".lock", path.name]


def test_an_unfinished_seed_is_recorded_as_such_and_may_go_on(run: Callable[..., Run], tmp_path: Path) -> None:
    path = save([run("a", TOP1[:3])], tmp_path)
    found = records.read_record(path)
    assert (found["seeds"]["0"]["epochs"], found["seeds"]["0"]["epochs_planned"]) == (3, 7)
    assert records.finished(found) == []
    assert save([run("b")], tmp_path) == path
    assert records.read_record(path)["seeds"]["0"]["epochs"] == 7
    with pytest.raises(UserError, match=r"has top-1 43\.00 after 7 epochs already"):
        save([run("c", TOP1[:3])], tmp_path)


def test_overrides_get_a_file_of_their_own(run: Callable[..., Run], tmp_path: Path) -> None:
    out, published = tmp_path / "results", load_recipe("quickstart_cutmix")
    first, other, again = (save([made], out).name for made in (run("a"), run("b", lr=0.4), run("c")))
    assert first.startswith("quickstart_cutmix+") and again == first != other
    plain = run("d", epochs=published.epochs, warmup_epochs=published.warmup_epochs)
    assert save([plain], out).name == "quickstart_cutmix.json"
    assert len(records.all_records(out)) == 3
    assert of_cells(out) == {}  # none of them is a published cell


def test_a_record_may_be_older_than_a_recipe_field_and_than_its_format(run: Callable[..., Run], tmp_path: Path) -> None:
    path = save([run("a")], tmp_path / "results")
    old = json.loads(path.read_text())
    del old["fields"]["sync_bn"], old["format"]
    path.write_text(json.dumps(old))
    save([run("b", seed=1)], tmp_path / "results")
    assert list(records.read_record(path)["seeds"]) == ["0", "1"]
    assert all(records.file_name(content) == f"{name}.json" for name, content in records.all_records().items())


def test_seeds_that_are_recorded_at_once_all_arrive(run: Callable[..., Run], tmp_path: Path) -> None:
    runs = [run(f"run{seed}", seed=seed) for seed in range(4)]
    of_run(runs[0])  # what is slow is done before the race
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        start = context.Barrier(len(runs))

        def record(run: Run, out: Path = tmp_path / str(turn), start: Any = start) -> None:
            start.wait()
            save([run], out)

        processes = [context.Process(target=record, args=(run,)) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        (found,) = records.all_records(tmp_path / str(turn)).values()
        assert list(found["seeds"]) == ["0", "1", "2", "3"]


def test_the_command_writes_the_record_or_says_in_a_line_why_not(
    run: Callable[..., Run], console: Command, tmp_path: Path
) -> None:
    out, runs = tmp_path / "results", [run("a").folder, run("b", seed=1).folder]
    (runs[0] / "env.json").rename(tmp_path / "env.json")
    left, shown, err = console("record", *runs, "--out", out)
    assert (left, shown) == (2, "") and re.match("error: cannot read .*env.json: No such file", err)
    assert not out.exists()
    (tmp_path / "env.json").rename(runs[0] / "env.json")
    left, shown, _ = console("record", *runs, "--out", out)
    (path,) = out.glob("*.json")
    assert left == 0 and shown == f"{path}: quickstart_cutmix, seeds 0, 1\n"
    assert console("record", "--out", out)[::2] == (2, "error: no run folders given\n")
    assert console("cells", "list", "--results", tmp_path / "none")[::2] == (
        2, f"error: no folder of run records {tmp_path / 'none'}\n",
    )  # fmt: skip
    path.write_text('{"recipe": "quickstart_cutmix"}')
    left, _, err = console("table", "--results", out)
    assert left == 2 and f"{path}: fields is missing" in err


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", 2, "format 2, but this version of Mixup Recipes reads formats 1 to 1"),
        ("recipe", None, "recipe: expected text, got None"),
        ("recipe", "r50_100e_mixup", "this record belongs into a file r50_100e_mixup.json"),
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
    ],
)
def test_a_damaged_record_is_refused_with_its_file_and_key(tmp_path: Path, key: str, value: Any, says: str) -> None:
    content, path = cell_record("r50_100e_cutmix", [77.0]), tmp_path / "r50_100e_cutmix.json"
    path.write_text(json.dumps(content))
    assert records.all_records(tmp_path) == {"r50_100e_cutmix": content}
    *outer, last = key.split(".")
    inner = content
    for name in outer:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        records.all_records(tmp_path)
    assert str(error.value) == f"{path}: {says}"


# ------------------------------------------------------------------------------------------------ status


def status_of(name: str, *args: Any, **changes: Any) -> tuple[str, str]:
    """Where a cell stands with such a record."""
    return status(cells.find(name), cell_record(name, *args, **changes))


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
def test_status_of_finished_runs(name: str, tops: list[float], expected: str, words: str) -> None:
    found, text = status_of(name, tops)
    assert found == expected and text.startswith(words)


def test_status_without_runs() -> None:
    assert status(cells.find("deit_s_samix"), None) == ("published", "not run here")
    assert status(cells.find("r34_100e_gridmix"), None) == ("not run", "no published number")
    found, text = status(cells.find("r50_100e_comixup"), None)
    assert found == "published" and "OpenMixup did not train the published number" in text


def test_a_number_that_upstream_did_not_train_is_marked_whatever_we_found() -> None:
    for tops in ([77.6], [70.0, 70.1], [70.0]):
        assert status_of("r50_100e_comixup", tops)[1].endswith("OpenMixup did not train the published number")


def test_only_finished_seeds_count() -> None:
    name = "r50_100e_cutmix"
    progress = "seed 0 at epoch 60 of 100, seed 1 at epoch 60 of 100"
    assert status_of(name, [77.1, 77.2], epochs=60) == ("too early to say", f"no run has finished: {progress}")
    mixed, gaps = cell_record(name, [77.1, 50.0]), cell_record(name, [77.1, 50.0])
    mixed["seeds"]["1"]["epochs"] = 60
    gaps["seeds"]["1"]["reading"]["missing"] = "3 of 5 epochs"
    assert all(status(cells.find(name), found)[1].startswith("77.10 (1 seed)") for found in (mixed, gaps))


def test_overrides_never_count() -> None:
    fields = records.fields_of(load_recipe("r50_100e_cutmix", epochs=90))
    content = cell_record("r50_100e_cutmix", [77.17, 77.17], fields=fields)
    assert status(cells.find("r50_100e_cutmix"), content) == (
        "published",
        "not run here; runs with epochs 90 instead of 100 do not count",
    )
    empty = copy.deepcopy(content) | {"recipe": "r34_100e_gridmix"}
    assert status(cells.find("r34_100e_gridmix"), empty)[0] == "not run"
    with pytest.raises(UserError, match="a record of r50_100e_mixup cannot speak for the cell r50_100e_cutmix"):
        status(cells.find("r50_100e_cutmix"), cell_record("r50_100e_mixup", [77.0]))


def test_show_and_list_say_what_our_runs_found(console: Command, tmp_path: Path) -> None:
    (tmp_path / "r50_100e_cutmix.json").write_text(json.dumps(cell_record("r50_100e_cutmix", [77.0])))
    left, out, _ = console("cells", "show", "r50_100e_cutmix", "--results", tmp_path)
    assert left == 0 and "status     reproduced within the band: 77.00 (1 seed), -0.17 from 77.17" in out
    out = console("cells", "list", "--setting", "r50_100e", "--results", tmp_path)[1]
    assert "r50_100e_cutmix              77.17  reproduced within the band: 77.00" in out


def test_a_local_copy_of_the_data_counts_when_its_numbers_are_those_of_the_benchmark() -> None:
    name = "r50_100e_cutmix"
    recipe = load_recipe(name, dataset="/data/imagenet", image_column="jpg", label_column="cls", eval_split="val")
    assert records.overrides(recipe) == {}
    local = {"fields": records.fields_of(recipe)}
    whole, part = (dataset(1_281_167, images, eval_split="val") for images in (50_000, 10_000))
    assert status_of(name, [77.2], **local, dataset=whole)[0] == noise.REPRODUCED
    for data in (whole, part):  # of the whole set, 40,000 images could not be read
        assert status_of(name, [77.2], **local, dataset=data, images=10_000) == (
            "published",
            "not run here; runs on 1,281,167 + 10,000 images instead of 1,281,167 + 50,000 do not count",
        )
