"""A run folder is a complete record and a model repository, and no run is written over another one."""

import csv
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from driver import Server
from PIL import Image
from resuming import LOG, Reference, checkpoints, differences, finish, log
from safetensors.torch import load_file

from mixup_recipes.data import images
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones  # noqa: F401  timm learns the models that it lacks
from mixup_recipes.training.folder import check_folder
from mixup_recipes.typed import UserError

AUTO = ("--resume_from_checkpoint", "auto")
UPDATE = "mixup_recipes.training.optimisation:set_learning_rates"


@pytest.fixture
def folder(reference: Reference) -> Path:
    """The folder of a finished run. Read it only."""
    return reference("--mixer", "deit")


@pytest.fixture
def pixels(tiny_recipe: Path) -> torch.Tensor:
    """The evaluation photos, normalised."""
    recipe = load_recipe(str(tiny_recipe))
    transform = images.EvalTransform(recipe.eval_resize, recipe.eval_size, recipe.interpolation)
    table = load_splits(recipe).eval
    batch = torch.stack([transform(images.decode(row["image"]["bytes"])) for row in table])
    return images.normalise(batch, recipe, torch.device("cpu"))


def logits_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What the exported model says, loaded by timm alone."""
    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)


def accuracy(logits: torch.Tensor) -> float:
    """Top-1 in percent on the evaluation photos, whose classes take turns."""
    return 100 * (logits.argmax(1) == torch.arange(len(logits)) % 4).float().mean().item()


def args(recipe: Path, out: Path, *more: object) -> list[object]:
    """Arguments of a run in a folder of its own."""
    return ["--recipe", recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expect_refused(server: Server, start: str, *given: object, **options: Any) -> str:
    """Status 2 and one line on stderr, which begins with ``start``; returns the output."""
    status, output = server.run(*given, **options)
    assert status == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {start}") and "Traceback" not in output, output
    return output


# ------------------------------------------------------------------------------------------------ the record


def test_the_folder_is_complete_and_says_what_ran_on_what(folder: Path, tiny_recipe: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "README.md", "checkpoints", "config.json", "data.json", "env.json", "eval_results.json", "log.jsonl",
        "model.safetensors", "models", "predictions.safetensors", "recipe.yaml", "runs", "samples", "summary.csv",
    }  # fmt: skip
    assert [p.name for p in checkpoints(folder)] == ["step-00000008", "step-00000012"]
    saved = load_recipe(str(folder / "recipe.yaml"))
    assert saved == load_recipe(str(tiny_recipe), mixer="deit")
    assert saved.name == "tiny" and saved.mixer_args["deit"]["mixup_alpha"] == 0.8
    record = json.loads((folder / "data.json").read_text())
    assert record["classes"] == tiny.CLASSES
    assert {name: split["images"] for name, split in record["splits"].items()} == {"train": 72, "test": 30}
    assert all(len(split["labels_sha256"]) == 64 for split in record["splits"].values())


def test_log_summary_and_results_agree(folder: Path) -> None:
    lines = log(folder)
    val = [line for line in lines if line["mode"] == "val"]
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    results = json.loads((folder / "eval_results.json").read_text())
    assert [v["epoch"] for v in val] == [int(r["epoch"]) for r in rows] == [1, 2, 3]
    for v, r in zip(val, rows, strict=True):
        assert v["top1"] == float(r["eval_top1"]) and v["ema_nll"] == float(r["eval_ema_nll"])
        seen = [x for x in lines if x["mode"] == "train" and x["epoch"] == v["epoch"]]
        assert sum(x["images"] for x in seen) == 64
        assert float(r["train_loss"]) == pytest.approx(sum(x["loss"] * x["images"] for x in seen) / 64)
        assert float(r["lr"]) == seen[-1]["lr"]
    assert results["exported"] == {k: v for k, v in val[-1].items() if k != "mode"}
    assert results["reported"]["top1"] == statistics.median(v["top1"] for v in val[-2:])
    assert results["reported"]["protocol"] == "median of the last 2 epochs"
    assert results["openmixup_tool"] == {
        "protocol": "OpenMixup's tool: median of the last 3 epochs",
        "top1": statistics.median(v["top1"] for v in val),
    }


def test_every_classifier_is_exported_and_scores_what_the_log_says(folder: Path, pixels: torch.Tensor) -> None:
    """The average beside the model that is reported, each loadable by timm alone."""
    assert [p.name for p in (folder / "models").iterdir()] == ["ema"]
    (final,) = [line for line in log(folder) if line["mode"] == "val" and line["epoch"] == 3]
    for place, key in ((folder, "top1"), (folder / "models" / "ema", "ema_top1")):
        assert accuracy(logits_of(place, pixels)) == pytest.approx(final[key])


def test_samples_are_sheets_of_mixed_images(folder: Path) -> None:
    sheets = sorted((folder / "samples").iterdir())
    assert [p.name for p in sheets] == ["epoch_000.png", "epoch_001.png", "epoch_002.png"]
    for path in sheets:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            corners = [(x, y) for y in (0, sheet.height // 2) for x in range(0, 640, 160)]
            tiles = {sheet.crop((x + 2, y + 2, x + 150, y + 150)).tobytes() for x, y in corners}
        assert len(tiles) == 8  # eight pictures, no two alike


def test_tensorboard_shows_what_the_log_says(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {p.parent for p in (folder / "runs").rglob("*tfevents*")}
    found = EventAccumulator(str(events)).Reload()
    for mode in ("train", "val"):
        lines = [line for line in log(folder) if line["mode"] == mode]
        key = "loss" if mode == "train" else "top1"
        scalars = [(s.step, s.value) for s in found.Scalars(f"{mode}/{key}")]
        assert scalars == [(line["update"], pytest.approx(line[key], rel=1e-6)) for line in lines]


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside transformers
def test_timm_and_transformers_load_the_model_alike(folder: Path, pixels: torch.Tensor) -> None:
    from transformers import AutoModelForImageClassification

    model, logits = timm.create_model(f"local-dir:{folder}", pretrained=True), logits_of(folder, pixels)
    other = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(pixels).logits, logits, rtol=0, atol=0)
    exported = json.loads((folder / "eval_results.json").read_text())["exported"]
    assert accuracy(logits) == pytest.approx(exported["top1"])
    assert model.pretrained_cfg["label_names"] == tiny.CLASSES
    assert [other.config.id2label[i] for i in range(4)] == tiny.CLASSES
    assert model.pretrained_cfg["tag"] == "deit_e3"
    assert model.pretrained_cfg["input_size"] == (3, 32, 32) and model.pretrained_cfg["crop_pct"] == 1
    # it does not claim to be a pretrained one
    pretrained = timm.get_pretrained_cfg("test_resnet").to_dict()
    ours = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    for key in ("url", "hf_hub_id", "license", "origin_url", "paper_ids", "tag"):
        assert ours.get(key) is None or ours[key] != pretrained.get(key)


def test_a_model_that_timm_lacks_loads_after_importing_ours(reference: Reference, pixels: torch.Tensor) -> None:
    model_args = ("--model", "resnet18_cifar", "--channels_last", "true", "--train_crop", "pad")
    found = reference(*model_args, "--epochs", 1, "--max_train_samples", 16, "--max_eval_samples", 30)
    assert accuracy(logits_of(found, pixels)) == pytest.approx(log(found)[-1]["top1"])


def test_the_average_is_exported_where_the_recipe_reports_it(reference: Reference) -> None:
    given = ("--mixer", "deit", "--precise_bn_samples", "none")
    found, folder = reference(*given, "--report_ema", "true"), reference(*given)
    weights, average = load_file(found / "model.safetensors"), load_file(checkpoints(found)[-1] / "ema.safetensors")
    assert weights.keys() == average.keys() and all(torch.equal(weights[k], average[k]) for k in weights)
    results = json.loads((found / "eval_results.json").read_text())
    assert results["reported"]["top1"] == statistics.median(
        x["ema_top1"] for x in log(found)[-4:] if x["mode"] == "val"
    )
    assert log(found) == log(folder)  # what is reported does not change what is trained


def test_the_best_epoch_is_exported_where_the_protocol_says_so(reference: Reference, pixels: torch.Tensor) -> None:
    found = reference("--protocol", "best", "--lr", 0.5, "--epochs", 6)
    scores = {line["epoch"]: line["top1"] for line in log(found) if line["mode"] == "val"}
    best = max(scores, key=lambda e: (scores[e], -e))
    assert best < 6, "choose another lr: the last epoch is the best one"
    results = json.loads((found / "eval_results.json").read_text())
    assert results["exported"]["epoch"] == results["reported"]["epoch"] == best
    assert results["reported"]["top1"] == scores[best]
    logits = logits_of(found, pixels)
    assert accuracy(logits) == pytest.approx(scores[best])
    said = load_file(found / "predictions.safetensors")
    assert torch.equal(said["index"], torch.arange(30, dtype=torch.int32))
    assert torch.equal(said["top"][:, 0].long(), logits.argmax(1))


def test_the_best_epoch_survives_a_kill(
    server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path
) -> None:
    own = ("--protocol", "best", "--lr", 0.5, "--epochs", 6)
    given = args(tiny_recipe, tmp_path / "run", *own, *AUTO)
    for call in (1, 1, 2):
        server.run(*given, faults=[["receive", "mixup_recipes.training.export:publish", call, 9]])
        server.run(*given, faults=[["receive", UPDATE, 6, 9]])
    finish(server, *given)
    assert differences(reference(*own), tmp_path / "run") == []


# ------------------------------------------------------------------------------------------------ refused


def test_a_folder_that_holds_a_run_is_not_overwritten(server: Server, folder: Path, tiny_recipe: Path) -> None:
    before = contents(folder)
    given = args(tiny_recipe, folder, "--mixer", "deit")
    expect_refused(server, f"{folder} already holds a run", *given)
    run = server.start(*given, processes=2)
    statuses = run.wait()
    assert statuses[0] == 2 and statuses[1] != 0
    assert f"error: {folder} already holds a run" in run.output()
    other = args(tiny_recipe, folder, "--mixer", "cutmix", "--lr", 0.1, *AUTO)
    output = expect_refused(server, f"{folder} holds a run of another recipe", *other)
    assert "lr: 0.05 there, 0.1 now" in output and "mixer: deit there, cutmix now" in output
    assert contents(folder) == before


def test_a_folder_of_something_else_is_left_alone(server: Server, tiny_recipe: Path, tmp_path: Path) -> None:
    letter, strange = tmp_path / "letter", tmp_path / "strange"
    letter.mkdir()
    (letter / "letter.txt").write_text("dear")
    (strange / "checkpoints/step-00000100").mkdir(parents=True)
    for folder, resume in itertools.product((letter, strange, letter / "letter.txt"), (False, True)):
        with pytest.raises(UserError, match="is not empty and not a run; choose another --output_dir"):
            check_folder(folder, load_recipe(str(tiny_recipe)), resume)
    expect_refused(server, f"{letter} is not empty", *args(tiny_recipe, letter, *AUTO))
    assert contents(tmp_path) == {"letter/letter.txt": b"dear"} and (strange / "checkpoints/step-00000100").exists()


def test_a_disk_that_is_too_small_is_found_before_training(server: Server, tiny_recipe: Path, tmp_path: Path) -> None:
    given = args(tiny_recipe, tmp_path / "run")
    output = expect_refused(server, "not enough disk for checkpoints", *given, faults=[["small_disk"]])
    assert "choose another --output_dir or a lower --save_total_limit" in output
    finish(server, *given, *AUTO)  # nothing is in the way of the next try


def test_a_disk_that_fills_up_is_one_line_and_the_run_can_go_on(
    server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = args(tiny_recipe, out, "--mixer", "deit")
    for call in (2, 6, 9):  # env.json, weights and results
        faults = [["no_space", "mixup_recipes.files:os.replace", call]]
        more = AUTO if out.exists() else ()
        output = expect_refused(server, f"cannot write {out}", *given, *more, faults=faults)
        assert "No space left on device; make room, then pass --resume_from_checkpoint auto" in output
    faults = [["no_space", "mixup_recipes.training.checkpoint:torch.save", 2]]
    output = expect_refused(
        server, f"cannot write checkpoint {out}/checkpoints/step-00000008", *given, *AUTO, faults=faults
    )
    assert "No space left on device" in output
    assert [p.name for p in checkpoints(out)] == ["step-00000004"]
    finish(server, *given, *AUTO)
    assert differences(reference("--mixer", "deit"), out) == []


def test_a_loss_that_is_not_a_number_stops_the_run(server: Server, tiny_recipe: Path, tmp_path: Path) -> None:
    status, output = server.run(*args(tiny_recipe, tmp_path / "run"), faults=[["not_a_number", 14]])
    assert status == 1
    assert "RuntimeError: loss nan at update 6: lower lr, or use bf16, not fp16" in output
    assert json.loads((tmp_path / "run/eval_results.json").read_text())["exported"]["epoch"] == 1


def test_weights_that_are_not_numbers_push_out_no_checkpoint(server: Server, tiny_recipe: Path, tmp_path: Path) -> None:
    given = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", "--checkpointing_steps", 1]
    status, output = server.run(*given, faults=[["not_a_number", 14]])
    assert status == 1
    assert "RuntimeError: loss not finite at update 6: no checkpoint is written" in output
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000005"]


# ------------------------------------------------------------------------------------------------ other recipes

TRANSFORMER = {
    "model": "test_vit", "model_args": "{img_size: 32}", "opt": "adamw", "lr": "1e-3", "weight_decay": 0.05,
    "clip_grad": 1.0, "drop_path_rate": 0.2, "loss": "bce_sum", "smoothing": 0.1, "mixer": "deit", "init": "mmcls_vit",
    "aug_repeats": 3, "remode": "pixel", "drop_last": "false", "epochs": 2,
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_transformer_recipe_resumes_to_the_bit(
    server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path, processes: int
) -> None:
    photos = load_recipe(str(tiny_recipe)).dataset
    (tmp_path / "recipe").mkdir()
    recipe = tiny.make_recipe(tmp_path / "recipe", Path(photos), **TRANSFORMER)
    expected = reference(recipe=recipe, processes=processes)
    given = args(recipe, tmp_path / "run", "--checkpointing_steps", 2, *AUTO)
    status, _ = server.run(*given, processes=processes, faults=[["receive", UPDATE, 4, 9]])
    assert status == -9
    finish(server, *given, processes=processes)
    assert differences(expected, tmp_path / "run") == []


def test_bf16_and_channels_last_train_and_resume_to_the_bit(
    server: Server, reference: Reference, tiny_recipe: Path, tmp_path: Path
) -> None:
    own = ("--mixed_precision", "bf16", "--channels_last", "true")
    expected = reference(*own)
    given = args(tiny_recipe, tmp_path / "run", *own, *AUTO)
    assert server.run(*given, faults=[["receive", UPDATE, 7, 9]])[0] == -9
    assert "bf16 mixed precision" in finish(server, *given)
    assert differences(expected, tmp_path / "run") == []
    assert all(v.dtype != torch.bfloat16 for v in load_file(expected / "model.safetensors").values())


@pytest.mark.slow
def test_a_compiled_run_gives_nearly_the_same_losses(reference: Reference, folder: Path) -> None:
    compiled = reference("--mixer", "deit", "--torch_compile", "true", "--epochs", 1)
    plain = reference("--mixer", "deit", "--epochs", 1)
    losses = [[x["loss"] for x in log(f) if x["mode"] == "train"] for f in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    keys = [load_file(f / "model.safetensors").keys() for f in (plain, compiled)]
    assert keys[0] == keys[1]
