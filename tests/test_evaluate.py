"""The evaluation job, and the commands that read a run's numbers."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    """A finished tiny run, with nothing beside it."""
    return shutil.copytree(reference("--mixer", "vanilla"), tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def results(run):
    """What the run's own evaluations found."""
    return json.loads((run / "eval_results.json").read_text())


def test_a_run_folder_scores_what_its_log_says_on_any_number_of_processes(run, results, console, server, tmp_path):
    status, shown, _ = console("evaluate", run, "--output", tmp_path / "1.json")
    assert status == 0 and "1 process" in shown
    script = tmp_path / "evaluation.py"  # in place of the training job
    script.write_text("import evaluate_mixup, train_mixup\ntrain_mixup.main = evaluate_mixup.main\n")
    given = ("--model", run, "--output", tmp_path / "2.json")
    status, shown = server.run(*given, processes=2, faults=[["script", str(script)]])
    assert status == 0 and "2 process" in shown
    for processes in (1, 2):
        scores = json.loads((tmp_path / f"{processes}.json").read_text())
        assert (scores["count"], scores["bad_images"]) == (30, 0)
        for key in ("top1", "top5", "ece", "nll"):
            assert scores[key] == pytest.approx(results["exported"][key], rel=1e-5)


def test_predictions_are_those_that_the_run_wrote_with_its_weights(run, results, console, tmp_path):
    out = tmp_path / "predictions.safetensors"
    assert console("evaluate", "--run", run, "--predictions", out)[0] == 0
    found, expected = load_file(out), load_file(run / "predictions.safetensors")
    assert found.keys() == expected.keys() == {"index", "label", "top", "confidence", "nll"}
    for key in ("index", "label", "top"):
        assert np.array_equal(found[key], expected[key]) and found[key].dtype == np.int32
    for key in ("confidence", "nll"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4) and found[key].dtype == np.float32
    top1, nll = results["exported"]["top1"], results["exported"]["nll"]
    assert 100 * (expected["top"][:, 0] == expected["label"]).mean() == pytest.approx(top1)
    assert expected["nll"].mean() == pytest.approx(nll, rel=1e-5)


def test_a_model_that_is_no_run_is_scored_with_the_numbers_of_its_configuration(
    run, results, console, tiny_recipe, tmp_path
):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path)
    which = f"error: which data? {tmp_path} carries no recipe; pass --dataset or --recipe\n"
    assert console("evaluate", tmp_path)[::2] == (2, which)
    data = ("--dataset", tiny_recipe.parent / "photos", "--split", "test")
    assert console("evaluate", tmp_path, *data, "--output", tmp_path / "scores.json")[0] == 0
    top1 = json.loads((tmp_path / "scores.json").read_text())["top1"]
    assert top1 == pytest.approx(results["exported"]["top1"], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "which model"),
        ("--model RUN --predictions nowhere/p.safetensors", "there is no folder nowhere"),
        ("--model resnet5", "did you mean 'resnet50'"),
        ("RUN --dataset nowhere", "neither a folder"),
        ("--model RUN --split tests", "did you mean 'test'"),
        ("NOTHING", "no config.json"),
        ("--model RUN --bacth_size 3", "Did you mean --batch_size"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, console, tmp_path, args, words):
    status, _, err = console("evaluate", *({"RUN": run, "NOTHING": tmp_path}.get(a, a) for a in args.split()))
    assert status == 2 and words in err


def test_the_console_command_lists_explains_and_compares_recipes(console):
    assert "r50_100e" in console("recipes", "list")[1]
    explained = console("recipes", "explain", "deit_s_cutmix")[1]
    assert ["lr", "0.001", "deit_s.yaml"] in [line.split() for line in explained.splitlines()]
    assert "mixer_args" in console("recipes", "diff", "deit_s_cutmix", "deit_s_deit")[1]
    status, _, err = console("recipes", "show", "deit_x_cutmix")
    assert status == 2 and "did you mean 'deit_" in err


def test_the_console_command_reports_runs_reads_protocols_and_compares(run, results, console, tmp_path):
    status, shown, _ = console("report", run, "--out", tmp_path / "report")
    assert status == 0 and f"{results['reported']['top1']:.2f}" in shown
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"table.md", "curves.png", "samples.png"}
    status, shown, _ = console("protocol", run)
    for key in ("reported", "openmixup_tool"):
        assert f"{results[key]['top1']:.3f}  {results[key]['protocol']}" in shown
    assert status == 0 and "3 of 3 epochs" in shown
    given = ("--protocol", "median", "--last", 2, "--epochs", 3)
    assert console("protocol", run / "summary.csv", *given)[1].count("median of the last") == 2
    other = shutil.copytree(run, tmp_path / "other")
    status, shown, _ = console("compare", "--a", run, "--b", other)
    expected = "a - b of the exported weights: +0.00, 95 % interval +0.00 to +0.00 (paired bootstrap, 30 images, "
    assert status == 0 and expected in shown
    status, _, err = console("compare", "--a", run, other, "--b", other)
    assert status == 2 and "error: group a has seed 0 twice" in err
