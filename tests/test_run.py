"""Promise: a run is opened once, reads each of its files at most once, and says in a line what is wrong with one."""

import ast
import dataclasses
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
from runs import ENV, IMAGENET, TOP1, edit, log_of, make_run, train_line, val_line, write_log
from tiny import ROOT

from mixup_recipes import fetch, resolve
from mixup_recipes.hub import verify
from mixup_recipes.pages import card_facts, plots, report
from mixup_recipes.pages.card import card, write_card
from mixup_recipes.pages.seeds import seeds_table
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import compare, curves, recording, seeds
from mixup_recipes.runs import run as runs_run
from mixup_recipes.runs.run import FILES, Run
from mixup_recipes.typed import UserError

PACKAGE = ROOT / "mixup_recipes"
ROOMS = [PACKAGE / name for name in ("runs", "benchmark", "pages", "hub")]
READERS = {PACKAGE / f"runs/{name}.py" for name in ("run", "log", "robustness_file")}
EVERYTHING = {"config.json", "model.safetensors", ".hub.json", ".trackers.json", *FILES}


class Watch:
    """Which files below a folder are opened for reading, and which file of our rooms asked for it."""

    def __init__(self):
        self.folder, self.seen = "", []
        sys.addaudithook(self.hook)  # for good: there is no way to take it out

    def hook(self, event, args):
        """Note an opening, and the innermost file of our rooms on the stack."""
        if event != "open" or not self.folder or not isinstance(args[0], str | os.PathLike):
            return
        name = os.path.abspath(os.fspath(args[0]))
        if name.startswith(self.folder) and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            stack = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_stack(sys._getframe()))
            asker = next((p for p in stack if p.parent in ROOMS and p != PACKAGE / "runs/shapes.py"), None)
            self.seen.append((name.removeprefix(self.folder + "/"), asker))


WATCH = Watch()


@pytest.fixture
def watch(tmp_path):
    """Watches the test's folder."""
    WATCH.folder, WATCH.seen = os.fspath(tmp_path), []
    yield WATCH
    WATCH.folder = ""


@pytest.fixture
def whole(tmp_path):
    """A run with every file, as a real one left them."""
    run = shutil.copytree(ROOT / "tests/version_0_1/finished", tmp_path / "whole")
    (run / ".hub.json").write_text('{"repo_id": "a/b"}')
    data = {"dataset": "a", "split": "test", "images": 4, "labels_sha256": "aa"}
    clean = {"top1": 25.0, "top5": 50.0, "ece": 1.0, "nll": 2.0, "count": 4}
    found = {"model": "whole", "data": data, "seed": 0, "budgets": {}, "clean": clean}
    (run / "robustness.json").write_text(json.dumps(found))
    return run


def test_whatever_is_made_of_a_run_reads_each_file_once_and_through_the_run(whole, tmp_path, watch, monkeypatch):
    resolved = []
    monkeypatch.setattr(
        runs_run, "resolve", lambda name, **more: resolved.append(name) or resolve.resolve(name, **more)
    )
    run, other = Run.open(whole), Run.open(make_run(tmp_path / "other", right=300))
    for make in (report.runs_table, seeds_table, lambda runs: plots.curves_figure(seeds.grouped(runs))):
        make([run])
    for make in (card, plots.machine, recording.of_run, lambda run: curves.describe([run], *[None] * 4)):
        make(run)
    rows = list(verify.of_files(run))
    with pytest.raises(UserError, match="differ in"):
        compare.compare([run], [other])
    assert all(good for _, good in rows) and sum("card and" in what for what, _ in rows) == 1
    assert run.results["reported"]["top1"] == 37.5 != run.exported["top1"]  # to each its place in the card
    assert run.pushed == {"repo_id": "a/b"} and run.predictions
    assert resolved == [str(whole / "recipe.yaml"), str(tmp_path / "other/recipe.yaml")]
    found = Counter(name for name, _ in watch.seen if name.startswith("whole/"))
    assert found == dict.fromkeys((f"whole/{name}" for name in EVERYTHING), 1)
    assert {asker for _, asker in watch.seen} <= READERS


def test_a_card_and_a_report_resolve_the_package_s_recipe_once_and_read_each_file_once(tmp_path, watch, monkeypatch):
    folder, resolved, original = tmp_path / "run", [], resolve.resolve
    make_run(folder, load_recipe("r18_100e_cutmix"), last=100, sizes=IMAGENET)
    for module in (resolve, card_facts, runs_run):
        said = lambda name, *args, **more: resolved.append(name) or original(name, *args, **more)  # noqa: E731
        monkeypatch.setattr(module, "resolve", said)
    for make in (write_card, lambda run: report.report([run], tmp_path / "out")):
        resolve.shipped_recipe.cache_clear()
        resolved.clear()
        watch.seen.clear()
        make(Run.open(folder))
        counts = Counter(name for name, _ in watch.seen if name.startswith("run/"))
        assert {"run/recipe.yaml", "run/log.jsonl", "run/env.json"} <= counts.keys() and set(counts.values()) == {1}
        assert Counter(resolved) == dict.fromkeys([str(folder / "recipe.yaml"), *resolved], 1)


READING = {"read_text", "read_bytes", "open", "read_object", "read_rows", "read_card", "load", "loads", "load_file"}
READING |= {"load_recipe", "resolve", "read_yaml", "file_hash"}


def test_nobody_else_reads_a_file_of_a_run():
    """A call that reads with a file's name behind a slash in it: ``(folder / "env.json").read_text()``."""
    found = {}
    for path in (path for room in (*ROOMS, PACKAGE / "cli") for path in room.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in READING:
                behind = [n.right for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
                if {getattr(n, "value", getattr(n, "id", "")) for n in behind} & {*EVERYTHING, "RECIPE"}:
                    found[path] = node.lineno
    assert set(found) == {PACKAGE / "runs/run.py"}, found


def test_what_is_no_run_is_said_and_one_of_the_hub_is_fetched_whole_and_never_changes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"^no run folder {tmp_path}/nothing$"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"^{tmp_path} is not a run folder: recipe.yaml is missing$"):
        Run.open(tmp_path)
    asked, folder = [], make_run(tmp_path / "run")
    monkeypatch.setattr(fetch, "snapshot", lambda *names: asked.append(names) or folder)
    run = Run.open("hf-hub:owner/name@0123abc")
    assert asked == [("hf-hub:owner/name@0123abc", *FILES)] and run.name == "hf-hub:owner/name@0123abc"
    assert run.folder == folder and run.summary.scores["top1"] == 43.0
    for owner, name in ((run, "folder"), (run.summary, "top1")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, None)
    write_log(folder, log_of([99.0] * 7))
    assert run.summary.scores["top1"] == 43.0 and Run.open(folder).summary.scores["top1"] == 99.0


ASKED = {
    "recipe.yaml": "recipe", "log.jsonl": "evaluated_log", "data.json": "data", "env.json": "environment",
    "eval_results.json": "results", "predictions.safetensors": "predictions", "config.json": "config",
    "model.safetensors": "weights_hash", "README.md": "card", "summary.csv": "summary_csv",
    "robustness.json": "robustness",
}  # fmt: skip
# What makes an error in a file that need not be there, is text or whatever it is: else everything does.
WRONG = {"README.md": {"a folder", "no text"}, "summary.csv": set(), "model.safetensors": {"absent", "a folder"}}
WRONG["robustness.json"] = {"empty", "cut", "a list", "null", "no text"}


def test_a_missing_or_damaged_file_is_one_line_that_names_it(whole, subtests):
    for file, asked in ASKED.items():
        path, content = whole / file, (whole / file).read_bytes()
        spoilt = {"absent": None, "a folder": None, "empty": b"", "cut": content[: len(content) // 2] + b"\n\n"}
        for damage, new in (spoilt | {"a list": b"[1]\n\n", "null": b"null\n\n", "no text": b"\xff\n\n"}).items():
            path.unlink()
            if new is not None:
                path.write_bytes(new)
            elif damage == "a folder":
                path.mkdir()
            with subtests.test(f"{file}: {damage}"):
                if damage not in WRONG.get(file, {damage}):
                    getattr(Run.open(whole), asked)
                else:
                    with pytest.raises(UserError) as error:
                        getattr(Run.open(whole), asked)
                    assert file in str(error.value) and "\n" not in str(error.value)
                    if file not in ("predictions.safetensors", "config.json", "model.safetensors"):
                        with pytest.raises(UserError) as of_card:
                            card(Run.open(whole))
                        assert str(of_card.value) == str(error.value)
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)


def test_a_value_that_cannot_be_is_named_with_its_key(tmp_path):
    splits = {key: {"images": 5, "labels_sha256": "aa"} for key in ("train", "test")}
    script = {"splits": splits, "classes": [], "commit": "<script>"}
    version = "this version of Mixup Recipes reads formats 1 to 1"
    newer = [("env.json", ENV | {"format": n}, f"format {n!r}, but {version}") for n in (2, "1", None, True)]
    run = make_run(tmp_path / "run")
    edit(run / "env.json", format=1)  # that of a run without one
    assert Run.open(run).environment == ENV | {"format": 1}
    for number, (file, content, says) in enumerate((
        *newer,
        ("eval_results.json", {"exported": {"epoch": 100}}, "exported.count is missing"),
        ("eval_results.json", {"exported": {"epoch": 1, "count": 1, "top1": "<b>", "top5": 1}}, "exported.top1: exp"),
        ("env.json", {}, "device is missing"),
        ("data.json", {"classes": 3}, "splits is missing"),
        ("data.json", {"splits": 3}, "splits: expected a table, got 3"),
        ("data.json", {"splits": {"train": 5}}, "splits.train: expected a table, got 5"),
        ("data.json", {"splits": splits | {"more": []}}, "splits.more: expected a table, got []"),
        ("data.json", {"splits": splits, "classes": [1]}, "classes: expected a list of names"),
        ("data.json", script, "commit: expected 40 hexadecimal digits, got '<script>'"),
    )):  # fmt: skip
        run = make_run(tmp_path / str(number))
        (run / file).write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            card(Run.open(run))
        assert str(error.value).startswith(f"{run / file}: {says}")


def test_what_a_kill_left_is_left_out_epochs_logged_again_count_once_and_values_are_checked(tmp_path):
    run, line = make_run(tmp_path / "run"), json.dumps(val_line(8, 99.0))
    for cut in (1, 20, 60):
        killed = Run.open(write_log(run, log_of(TOP1), tail=line[:cut]))
        assert (len(killed.log.train), len(killed.log.val), killed.summary.scores["top1"]) == (7, 7, 43.0)
    write_log(run, log_of(TOP1), tail=line)  # whole, but for its end of line
    assert Run.open(run).log.val[-1].metric("top1") == 99.0
    # Killed after epoch 7, resumed from epoch 5; so far epoch 6 is there anew, with other numbers
    again = Run.open(write_log(run, [*log_of(TOP1), train_line(6, loss=9.0), val_line(6, 48.0)]))
    assert [row.epoch for row in again.log.train] == [row.epoch for row in again.log.val] == [1, 2, 3, 4, 5, 6, 7]
    assert [row.loss for row in again.log.train if row.epoch == 6] == [9.0]
    assert again.summary.scores["top1"] == 45.0  # of 50 45 41 48 40
    val = json.dumps(val_line(1, 40.0))
    for lines, tail, says in (
        ([], '{"mode": "va\n' + val + "\n", "expected a JSON object"),
        ([train_line(1, perf={"seconds": 1.0})], val, "perf.img_per_s is missing"),
        ([train_line(1, perf={"seconds": True, "img_per_s": 1})], val, "perf.seconds: expected a finite number, got T"),
        ([train_line(1, loss=None)], val, "loss: expected a finite number, got None"),
    ):
        with pytest.raises(UserError) as error:
            _ = Run.open(write_log(run, lines, tail)).log
        assert str(error.value).startswith(f"{run}/log.jsonl, line 1: {says}")
