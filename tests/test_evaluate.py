"""The evaluation job, and the commands that read a run's numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from resuming import Reference
from runs import Command
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def run(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, with nothing beside it."""
    return shutil.copytree(reference("--mixer", "vanilla"), tmp_path_factory.mktemp("evaluate") / "run")


def scores_of(run: Path) -> dict[str, float]:
    """What the run's own evaluation of the exported weights found."""
    return json.loads((run / "eval_results.json").read_text())["exported"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_folder_scores_what_its_log_says_on_any_number_of_processes(
    run: Path, console: Command, processes: int
) -> None:
    out = run.parent / f"scores{processes}.json"
    if processes == 1:
        status, shown, _ = console("evaluate", run, "--output", out)
    else:
        done = tiny.start("--model", run, "--output", out, script="evaluate_mixup.py", processes=processes)
        status, shown = done.returncode, done.stdout
    assert status == 0 and f"{processes} process" in shown
    scores = json.loads(out.read_text())
    assert (scores["count"], scores["bad_images"]) == (30, 0)
    for key in ("top1", "top5", "ece", "nll"):
        assert scores[key] == pytest.approx(scores_of(run)[key], rel=1e-5)


def test_predictions_are_those_that_the_run_wrote_with_its_weights(run: Path, console: Command) -> None:
    out = run.parent / "predictions.safetensors"
    assert console("evaluate", "--run", run, "--predictions", out)[0] == 0
    found, expected = load_file(out), load_file(run / "predictions.safetensors")
    assert found.keys() == expected.keys() == {"index", "label", "top", "confidence", "nll"}
    for key in ("index", "label", "top"):
        assert np.array_equal(found[key], expected[key]) and found[key].dtype == np.int32
    for key in ("confidence", "nll"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4) and found[key].dtype == np.float32
    scores = scores_of(run)
    assert 100 * (expected["top"][:, 0] == expected["label"]).mean() == pytest.approx(scores["top1"])
    assert expected["nll"].mean() == pytest.approx(scores["nll"], rel=1e-5)


def test_a_model_that_is_no_run_is_scored_with_the_numbers_of_its_configuration(
    run: Path, console: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path)
    out = tmp_path / "scores.json"
    assert console("evaluate", tmp_path)[::2] == (
        2,
        f"error: which data? {tmp_path} carries no recipe; pass --dataset or --recipe\n",
    )
    data = ("--dataset", tiny_recipe.parent / "photos", "--split", "test")
    assert console("evaluate", tmp_path, *data, "--output", out)[0] == 0
    assert json.loads(out.read_text())["top1"] == pytest.approx(scores_of(run)["top1"], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "which model"),
        (["--model", "RUN", "--predictions", "nowhere/p.safetensors"], "there is no folder nowhere"),
        (["--model", "resnet5"], "did you mean 'resnet50'"),
        (["RUN", "--dataset", "nowhere"], "neither a folder"),
        (["--model", "RUN", "--split", "tests"], "did you mean 'test'"),
        (["NOTHING"], "no config.json"),
        (["--model", "RUN", "--bacth_size", "3"], "Did you mean --batch_size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Path, console: Command, tmp_path: Path, args: list[str], words: str
) -> None:
    given = [{"RUN": str(run), "NOTHING": str(tmp_path)}.get(a, a) for a in args]
    status, _, err = console("evaluate", *given)
    assert status == 2 and words in err


def test_the_console_command_lists_explains_and_compares_recipes(console: Command) -> None:
    assert "r50_100e" in console("recipes", "list")[1]
    explained = console("recipes", "explain", "deit_s_cutmix")[1]
    assert any(line.split() == ["lr", "0.001", "deit_s.yaml"] for line in explained.splitlines())
    assert "mixer_args" in console("recipes", "diff", "deit_s_cutmix", "deit_s_deit")[1]
    status, _, err = console("recipes", "show", "deit_x_cutmix")
    assert status == 2 and "did you mean 'deit_" in err


def test_the_report_of_a_run_has_its_protocol_number(run: Path, console: Command, tmp_path: Path) -> None:
    status, shown, _ = console("report", run, "--out", tmp_path / "report")
    number = json.loads((run / "eval_results.json").read_text())["reported"]["top1"]
    assert status == 0 and f"{number:.2f}" in shown
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"table.md", "curves.png", "samples.png"}


def test_the_console_command_reads_protocols_and_compares_runs(run: Path, console: Command) -> None:
    status, shown, _ = console("protocol", run)
    results = json.loads((run / "eval_results.json").read_text())
    for key in ("reported", "openmixup_tool"):
        assert f"{results[key]['top1']:.3f}  {results[key]['protocol']}" in shown
    assert status == 0 and "3 of 3 epochs" in shown
    given = ("--protocol", "median", "--last", 2, "--epochs", 3)
    assert console("protocol", run / "summary.csv", *given)[1].count("median of the last") == 2
    other = shutil.copytree(run, run.parent / "other")
    status, shown, _ = console("compare", "--a", run, "--b", other)
    expected = "a - b of the exported weights: +0.00, 95 % interval +0.00 to +0.00 (paired bootstrap, 30 images, "
    assert status == 0 and expected in shown
    wrong = console("compare", "--a", run, other, "--b", other)
    assert wrong[0] == 2 and "error: group a has seed 0 twice" in wrong[2]
