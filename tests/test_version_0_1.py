"""Runs of version 0.1 still open, go on, and can be evaluated, reported and verified.

``tests/version_0_1`` holds what that version wrote: 36 photos, a finished run of 9 updates, and the same run stopped by
a signal at update 6.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixup_recipes.hub.verify import verify
from mixup_recipes.pages.report import report
from mixup_recipes.runs import recording
from mixup_recipes.runs.run import Run


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The folder in which version 0.1 was started, as a copy."""
    shutil.copytree(Path(__file__).parent / "version_0_1", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def test_a_stopped_run_goes_on_to_the_weights_that_it_would_have_had(server, there):
    flags = "--recipe tiny.yaml --report_to none --dataloader_num_workers 0 --logging_steps 2 --output_dir stopped"
    status, text = server.run(*flags.split(), "--resume_from_checkpoint", "auto", cwd=there)
    assert status == 0 and "resumed from step-00000006" in text, text
    expected, found = Run.open(there / "finished"), Run.open(there / "stopped")
    for name, file in expected.weights.items():
        tensors = load_file(found.weights[name])
        for key, value in load_file(file).items():  # another processor may round otherwise
            torch.testing.assert_close(tensors[key], value, rtol=1e-3, atol=1e-4)
    assert [row.update for row in found.log.val] == [row.update for row in expected.log.val]
    assert found.finished and found.summary.scores["top1"] == pytest.approx(
        expected.summary.scores["top1"], abs=9
    )  # an image of twelve


def test_a_finished_run_opens_is_reported_and_is_verified_by_evaluating_it_again(there):
    run = Run.open("finished")
    assert run.finished and run.environment.get("format", 1) == 1 and run.pushed == {}
    assert set(run.weights) == {"", "ema"} and run.data.images == {"train": 24, "test": 12}
    logged = [json.loads(line) for line in (there / "finished/log.jsonl").read_text().splitlines()]
    assert run.summary.scores["top1"] == sum(sorted(x["top1"] for x in logged if x["mode"] == "val")[-2:]) / 2
    assert "| finished | cutmix | 3 |" in report([run], there / "report")
    assert recording.of_run(run)["seeds"]["0"]["top1"] == run.summary.scores["top1"]
    text, good = verify(run)
    assert good and "weights: top-1" in text and "differs" not in text, text
