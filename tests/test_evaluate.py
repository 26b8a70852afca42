"""evaluate_mixup.py and the console command, from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("evaluate")
    recipe = tiny.make_recipe(folder, tiny.make_photos(folder / "photos"), ema_decay="null", ema_warmup_epochs=0)
    done = tiny.start("--recipe", recipe, "--output_dir", folder / "run", "--report_to", "none", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_folder_scores_what_its_log_says_on_any_number_of_processes(run: Path, processes: int) -> None:
    out = run.parent / f"scores{processes}.json"
    done = tiny.start("--model", run, "--output", out, script="evaluate_mixup.py", processes=processes)
    assert done.returncode == 0, done.stderr
    assert f"{processes} process" in done.stdout
    scores, logged = json.loads(out.read_text()), json.loads((run / "eval_results.json").read_text())["exported"]
    assert (scores["count"], scores["bad_images"]) == (30, 0)
    for key in ("top1", "top5", "ece", "nll"):
        assert scores[key] == pytest.approx(logged[key], rel=1e-5)


def test_predictions_are_those_that_the_run_wrote_with_its_weights(run: Path) -> None:
    out = run.parent / "predictions.safetensors"
    done = tiny.start("--model", run, "--predictions", out, script="evaluate_mixup.py")
    assert done.returncode == 0, done.stderr
    found, expected = load_file(out), load_file(run / "predictions.safetensors")
    assert found.keys() == expected.keys() == {"index", "label", "top", "confidence", "nll"}
    for key in ("index", "label", "top"):
        assert np.array_equal(found[key], expected[key]) and found[key].dtype == np.int32
    for key in ("confidence", "nll"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4) and found[key].dtype == np.float32
    scores = json.loads((run / "eval_results.json").read_text())["exported"]
    assert 100 * (expected["top"][:, 0] == expected["label"]).mean() == pytest.approx(scores["top1"])
    assert expected["nll"].mean() == pytest.approx(scores["nll"], rel=1e-5)


def test_a_model_that_is_no_run_is_scored_with_the_numbers_of_its_configuration(run: Path) -> None:
    plain = run.parent / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, plain)
    out = run.parent / "plain.json"
    args = ["--model", plain, "--dataset", run.parent / "photos", "--split", "test", "--output", out]
    done = tiny.start(*args, script="evaluate_mixup.py")
    assert done.returncode == 0, done.stderr
    logged = json.loads((run / "eval_results.json").read_text())["exported"]
    assert json.loads(out.read_text())["top1"] == pytest.approx(logged["top1"], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "which model"),
        (["--model", "RUN", "--predictions", "nowhere/p.safetensors"], "there is no folder nowhere"),
        (["--model", "resnet5"], "did you mean 'resnet50'"),
        (["--model", "RUN", "--dataset", "nowhere"], "neither a folder"),
        (["--model", "RUN", "--split", "tests"], "did you mean 'test'"),
        (["--model", "PHOTOS"], "no config.json"),
        (["--model", "RUN", "--bacth_size", "3"], "Did you mean --batch-size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run: Path, args: list[str], words: str) -> None:
    given = [{"RUN": str(run), "PHOTOS": str(run.parent / "photos")}.get(a, a) for a in args]
    done = tiny.start(*given, script="evaluate_mixup.py")
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_the_console_command_lists_explains_and_compares_recipes() -> None:
    script = "mixup_recipes/__main__.py"
    assert "r50_100e" in tiny.start("recipes", "list", script=script).stdout
    explained = tiny.start("recipes", "explain", "deit_s_cutmix", script=script).stdout
    assert any(line.split() == ["lr", "0.001", "deit_s.yaml"] for line in explained.splitlines())
    assert "mixer_args" in tiny.start("recipes", "diff", "deit_s_cutmix", "deit_s_deit", script=script).stdout
    wrong = tiny.start("recipes", "show", "deit_x_cutmix", script=script)
    assert wrong.returncode == 2 and "did you mean 'deit_" in wrong.stderr


def test_the_report_of_a_run_has_its_protocol_number(run: Path) -> None:
    done = tiny.start("report", run, "--out", run.parent / "report", script="mixup_recipes/__main__.py")
    assert done.returncode == 0, done.stderr
    number = json.loads((run / "eval_results.json").read_text())["reported"]["top1"]
    assert f"{number:.2f}" in done.stdout
    assert {p.name for p in (run.parent / "report").iterdir()} == {"table.md", "curves.png", "samples.png"}


def test_the_console_command_reads_protocols_and_compares_runs(run: Path) -> None:
    script = "mixup_recipes/__main__.py"
    done = tiny.start("protocol", run, script=script)
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "eval_results.json").read_text())
    for key in ("reported", "openmixup_tool"):
        assert f"{results[key]['top1']:.3f}  {results[key]['protocol']}" in done.stdout
    assert "2 of 2 epochs" in done.stdout
    given = ("--protocol", "median", "--last", 2, "--epochs", 2)
    assert tiny.start("protocol", run / "summary.csv", *given, script=script).stdout.count("median of the last") == 2
    other = shutil.copytree(run, run.parent / "other")
    done = tiny.start("compare", "--a", run, "--b", other, script=script)
    assert done.returncode == 0, done.stderr
    expected = "a - b of the exported weights: +0.00, 95 % interval +0.00 to +0.00 (paired bootstrap, 30 images, "
    assert expected in done.stdout
    wrong = tiny.start("compare", "--a", run, other, "--b", other, script=script)
    assert wrong.returncode == 2 and "error: group a has seed 0 twice" in wrong.stderr
