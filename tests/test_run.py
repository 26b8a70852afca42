"""Promise: a run is opened once, reads each of its files at most once, and says in a line what is wrong with one."""

import ast
import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import IMAGENET, TOP1, edit, log_of, make_run, quick, train_line, val_line, write_log
from tiny import ROOT

from mixup_recipes import fetch, resolve
from mixup_recipes.hub import verify
from mixup_recipes.pages import card_facts, plots
from mixup_recipes.pages.card import card, write_card
from mixup_recipes.pages.report import report, runs_table
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import run as runs_run
from mixup_recipes.runs.compare import compare
from mixup_recipes.runs.curves import describe
from mixup_recipes.runs.recording import of_run
from mixup_recipes.runs.run import FILES, Run
from mixup_recipes.runs.seeds import grouped
from mixup_recipes.typed import UserError

PACKAGE = ROOT / "mixup_recipes"
ROOMS = [PACKAGE / name for name in ("runs", "benchmark", "pages", "hub")]
READERS = {PACKAGE / "runs/run.py", PACKAGE / "runs/log.py"}
HELPERS = {PACKAGE / "runs/shapes.py"}


# ------------------------------------------------------------------------------------------------ each file once


class Watch:
    """Which files below a folder are opened for reading, and which file of our rooms asked for it."""

    def __init__(self) -> None:
        self.folder = ""
        self.seen: list[tuple[str, Path | None]] = []
        sys.addaudithook(self.hook)  # for good: there is no way to take it out

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Note an opening."""
        if event != "open" or not self.folder or not isinstance(args[0], str | os.PathLike):
            return
        name = os.path.abspath(os.fspath(args[0]))
        if name.startswith(self.folder) and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            self.seen.append((name.removeprefix(self.folder + "/"), self.asker()))

    def asker(self) -> Path | None:
        """The innermost file of our rooms on the stack."""
        frame = sys._getframe(2)
        while frame := frame.f_back:  # type: ignore[assignment]
            path = Path(frame.f_code.co_filename)
            if path.parent in ROOMS and path not in HELPERS:
                return path
        return None


WATCH = Watch()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Watches the test's folder."""
    WATCH.folder, WATCH.seen = os.fspath(tmp_path), []
    yield WATCH
    WATCH.folder = ""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with every file, as a real one left them."""
    run = tmp_path / "whole"
    shutil.copytree(ROOT / "tests/version_0_1/finished", run)
    (run / ".hub.json").write_text('{"repo_id": "a/b"}')
    return run


def test_whatever_is_made_of_a_run_reads_each_file_once_and_through_the_run(
    whole: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = []
    monkeypatch.setattr(runs_run, "load_recipe", lambda name: resolved.append(name) or load_recipe(name))
    run = Run.open(whole)
    other = Run.open(make_run(tmp_path / "other", right=300))
    card(run)
    runs_table([run])
    seeds_table([run])
    plots.curves_figure(grouped([run]))
    plots.machine(run)
    of_run(run)
    describe([run], None, None, None, None)
    rows = list(verify.of_files(run))
    with pytest.raises(UserError, match="differ in"):
        compare([run], [other])
    assert all(good for _, good in rows) and run.pushed == {"repo_id": "a/b"} and run.predictions
    assert resolved == [str(whole / "recipe.yaml"), str(tmp_path / "other/recipe.yaml")]
    found = Counter(name for name, _ in watch.seen if name.startswith("whole/"))
    everything = {"config.json", "model.safetensors", ".hub.json", *FILES}
    assert found == dict.fromkeys((f"whole/{name}" for name in everything), 1)
    assert {asker for _, asker in watch.seen} <= READERS


def test_a_card_and_a_report_resolve_the_recipe_of_the_package_once_and_read_each_file_once(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", load_recipe("r18_100e_cutmix"), last=100, sizes=IMAGENET)
    resolved: list[str] = []
    whole = resolve.resolve

    def counted(name: str, *args: Any) -> Any:
        resolved.append(name)
        return whole(name, *args)

    for module in (resolve, card_facts):
        monkeypatch.setattr(module, "resolve", counted)
    for make in (write_card, lambda run: report([run], tmp_path / "out")):
        resolve.shipped_recipe.cache_clear()
        resolved.clear()
        watch.seen.clear()
        make(Run.open(folder))
        counts = Counter(name for name, _ in watch.seen if name.startswith("run/"))
        assert {"run/recipe.yaml", "run/log.jsonl", "run/env.json"} <= counts.keys() and set(counts.values()) == {1}
        assert Counter(resolved) == dict.fromkeys([str(folder / "recipe.yaml"), *resolved], 1)


def below(node: ast.AST) -> set[str]:
    """Names of files that stand behind a slash in an expression: ``folder / "env.json"``."""
    found = [n.right for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
    return {n.value for n in found if isinstance(n, ast.Constant)} | {n.id for n in found if isinstance(n, ast.Name)}


READING = {"read_text", "read_bytes", "open", "read_object", "read_rows", "read_card", "load", "loads", "load_file"}
READING |= {"load_recipe", "resolve", "read_yaml", "file_hash"}


def test_nobody_else_reads_a_file_of_a_run() -> None:
    names = {*FILES, "config.json", "model.safetensors", ".hub.json", "RECIPE"}
    paths = [path for room in ROOMS for path in room.glob("*.py")] + [*(PACKAGE / "cli").glob("*.py")]
    wrong, seen = [], set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                what = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if what in READING and below(node) & names:
                    seen.add(path)
                    wrong += [] if path in READERS else [f"{path.name}:{node.lineno}: {what}"]
    assert not wrong and seen == {PACKAGE / "runs/run.py"}, "the search finds nothing any more"


def test_a_run_cannot_be_changed_and_does_not_see_what_is_written_later(tmp_path: Path) -> None:
    run = Run.open(make_run(tmp_path / "run"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.folder = tmp_path  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.summary.top1 = 100.0  # type: ignore[misc]
    write_log(run.folder, log_of([99.0] * 7))
    assert run.summary.top1 == 43.0 and Run.open(run.folder).summary.top1 == 99.0


# ------------------------------------------------------------------------------------------------ opening


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^no run folder {tmp_path}/nothing$"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"^{tmp_path} is no run folder: recipe.yaml is missing$"):
        Run.open(tmp_path)


def test_a_run_of_the_hub_is_fetched_with_all_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    folder = make_run(tmp_path / "run")
    monkeypatch.setattr(fetch, "snapshot", lambda *names: asked.append(names) or folder)
    run = Run.open("hf-hub:owner/name@0123abc")
    assert asked == [("hf-hub:owner/name@0123abc", *FILES)] and run.name == "hf-hub:owner/name@0123abc"
    assert run.folder == folder and run.summary.top1 == 43.0


@pytest.mark.parametrize("newer", [2, "1", None, True])
def test_a_format_that_is_not_known_is_refused_and_none_is_the_first(tmp_path: Path, newer: object) -> None:
    run = make_run(tmp_path / "run")
    assert "format" not in Run.open(run).environment
    edit(run / "env.json", format=1)
    assert Run.open(run).environment["format"] == 1
    edit(run / "env.json", format=newer)
    with pytest.raises(UserError) as error:
        Run.open(run)
    says = f"{run}/env.json: format {newer!r}, but this version of Mixup Recipes reads formats 1 to 1"
    assert str(error.value) == says


# ------------------------------------------------------------------------------------------------ damage

ASKED: dict[str, Callable[[Run], object]] = {
    "recipe.yaml": lambda run: run.recipe,
    "log.jsonl": lambda run: run.evaluated_log,
    "data.json": lambda run: run.data,
    "env.json": lambda run: run.environment,
    "eval_results.json": lambda run: run.results,
    "predictions.safetensors": lambda run: run.predictions,
    "config.json": lambda run: run.config,
    "model.safetensors": lambda run: run.weights_hash,
    "README.md": lambda run: run.card,
    "summary.csv": lambda run: run.summary_csv,
}


@pytest.mark.parametrize("file", ASKED)
@pytest.mark.parametrize("damage", ["absent", "a folder", "empty", "cut", "[1]", "null", "\xff"])
def test_a_missing_or_damaged_file_is_one_line_that_names_it(whole: Path, file: str, damage: str) -> None:
    path = whole / file
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "absent":
        cut = content[: len(content) // 2] + b"\n" * 2
        path.write_bytes({"empty": b"", "cut": cut}.get(damage, damage.encode("latin-1") + b"\n" * 2))
    fine = {
        "README.md": {"absent", "empty", "cut", "[1]", "null"},
        "summary.csv": {"absent", "a folder", "empty", "cut", "[1]", "null", "\xff"},
        "model.safetensors": {"empty", "cut", "[1]", "null", "\xff"},  # what they are shows in the hash
    }
    if damage in fine.get(file, ()):
        ASKED[file](Run.open(whole))
        return
    with pytest.raises(UserError) as error:
        ASKED[file](Run.open(whole))
    assert file in str(error.value) and "\n" not in str(error.value)
    if file not in ("predictions.safetensors", "config.json", "model.safetensors"):
        with pytest.raises(UserError) as of_card:
            card(Run.open(whole))
        assert str(of_card.value) == str(error.value)


SPLIT = {"images": 5, "labels_sha256": "aa"}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("eval_results.json", {"exported": {"epoch": 100}}, "exported.count is missing"),
        ("eval_results.json", {"exported": {"epoch": 1, "count": 1, "top1": "<b>", "top5": 1}}, "exported.top1: exp"),
        ("env.json", {}, "device is missing"),
        ("data.json", {"classes": 3}, "splits is missing"),
        ("data.json", {"splits": {"train": 5}}, "splits.train: expected a table, got 5"),
        ("data.json", {"splits": {"train": SPLIT, "test": SPLIT, "more": []}}, "splits.more: expected a table, got []"),
        ("data.json", {"splits": {"train": SPLIT, "test": SPLIT}, "classes": [1]}, "classes: expected a list of names"),
        (
            "data.json",
            {"splits": {"train": SPLIT, "test": SPLIT}, "classes": [], "commit": "<script>"},
            "commit: expected 40 hexadecimal digits, got '<script>'",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key(tmp_path: Path, file: str, content: object, says: str) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        card(Run.open(run))
    assert str(error.value).startswith(f"{run / file}: {says}")


# ------------------------------------------------------------------------------------------------ the log


def test_what_a_kill_left_of_the_last_line_is_left_out(tmp_path: Path) -> None:
    run, line = make_run(tmp_path / "run"), json.dumps(val_line(8, 99.0))
    for cut in (1, 20, 60):
        write_log(run, log_of(TOP1), tail=line[:cut])
        log = Run.open(run).log
        assert (len(log.train), len(log.val)) == (7, 7)
        assert Run.open(run).summary.top1 == 43.0
    write_log(run, log_of(TOP1), tail=line)  # whole, but for its end of line
    assert Run.open(run).log.val[-1].metric("top1") == 99.0
    write_log(run, log_of(TOP1), tail='{"mode": "va\n' + line + "\n")
    with pytest.raises(UserError, match=r"log.jsonl, line 15: expected a JSON object"):
        _ = Run.open(run).summary


def test_epochs_logged_again_after_a_resume_count_once(tmp_path: Path) -> None:
    # Killed after epoch 7, resumed from epoch 5; so far epoch 6 is there anew, with other numbers
    again = [train_line(6, loss=9.0), val_line(6, 48.0)]
    run = Run.open(make_run(tmp_path / "run", lines=log_of(TOP1) + again))
    assert [row.epoch for row in run.log.train] == [row.epoch for row in run.log.val] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.loss for row in run.log.train if row.epoch == 6] == [9.0]
    assert run.summary.top1 == 45.0  # of 50 45 41 48 40


def test_values_of_the_log_that_are_used_are_checked(tmp_path: Path) -> None:
    for key, value, says in (
        ("perf", {"seconds": 1.0}, "perf.img_per_s is missing"),
        ("perf", {"seconds": True, "img_per_s": 1}, "perf.seconds: expected a finite number, got True"),
        ("loss", None, "loss: expected a finite number, got None"),
    ):
        folder = make_run(tmp_path / says, quick(epochs=1), [40.0])
        run = Run.open(write_log(folder, [train_line(1, **{key: value}), val_line(1, 40.0)]))
        with pytest.raises(UserError) as error:
            _ = run.log
        assert str(error.value) == f"{run.folder}/log.jsonl, line 1: {says}"
