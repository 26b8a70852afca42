"""Promise: a run folder is a complete record and a model repository, and no run is written over another one."""

import csv
import importlib
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
import timm
import tiny
import torch
from marks import slow_unless
from PIL import Image
from resuming import LOG, checkpoints, differences, finish, log
from safetensors.torch import load_file
from torch import nn

from mixers import build
from mixup_recipes.data import images
from mixup_recipes.data.decoding import decode
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones  # noqa: F401  timm learns the models that it lacks
from mixup_recipes.training.folder import check_folder, check_mixer, laws
from mixup_recipes.typed import UserError

AUTO = ("--resume_from_checkpoint", "auto")
UPDATE = "mixup_recipes.training.optimisation:set_learning_rates"


@pytest.fixture(scope="module")
def folder(reference):
    """The folder of a finished run. Read it only."""
    return reference("--mixer", "deit")


@pytest.fixture(scope="module")
def pixels(tiny_recipe):
    recipe = load_recipe(str(tiny_recipe))
    transform = images.EvalTransform.of(recipe)
    batch = [transform(decode(row["image"]["bytes"])) for row in load_splits(recipe).eval]
    return images.normalise(torch.stack(batch), recipe, torch.device("cpu"))


def logits_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What the exported model says, loaded by timm alone."""
    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)


def accuracy(logits: torch.Tensor) -> float:
    """Top-1 in percent on the evaluation photos, whose classes take turns."""
    return 100 * (logits.argmax(1) == torch.arange(len(logits)) % 4).float().mean().item()


def lines_of(folder, mode):
    """Lines of the log of a mode, and what ``eval_results.json`` holds."""
    return [x for x in log(folder) if x["mode"] == mode], json.loads((folder / "eval_results.json").read_text())


def args(recipe, out, *more):
    return ["--recipe", recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, *more]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expect_refused(server, start, *given, **options):
    """Status 2 and one line on stderr, which begins with ``start``; returns the output."""
    status, output = server.run(*given, **options)
    assert status == 2 and re.findall("^error: ", output, re.M) == ["error: "] and "Traceback" not in output, output
    assert f"\nerror: {start}" in f"\n{output}", output
    return output


def test_the_folder_is_complete_says_what_ran_on_what_and_shows_sheets_of_mixed_images(folder, tiny_recipe):
    assert {p.name for p in folder.iterdir()} == {
        ".dataset.json", ".lock", "README.md",
        "checkpoints", "config.json", "data.json", "env.json", "eval_results.json", "log.jsonl",
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
    sheets = sorted((folder / "samples").iterdir())
    assert [p.name for p in sheets] == ["epoch_000.png", "epoch_001.png", "epoch_002.png"]
    for path in sheets:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            corners = [(x + 2, y + 2) for y in (0, sheet.height // 2) for x in range(0, 640, 160)]
            tiles = {sheet.crop((x, y, x + 148, y + 148)).tobytes() for x, y in corners}
        assert len(tiles) == 8  # eight pictures, no two alike


def test_log_summary_results_and_tensorboard_agree(folder):
    tensorboard = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    (train, _), (val, results) = lines_of(folder, "train"), lines_of(folder, "val")
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [v["epoch"] for v in val] == [int(r["epoch"]) for r in rows] == [1, 2, 3]
    for v, r in zip(val, rows, strict=True):
        assert v["top1"] == float(r["eval_top1"]) and v["ema_nll"] == float(r["eval_ema_nll"])
        seen = [x for x in train if x["epoch"] == v["epoch"]]
        assert sum(x["images"] for x in seen) == 64 and float(r["lr"]) == seen[-1]["lr"]
        assert float(r["train_loss"]) == pytest.approx(sum(x["loss"] * x["images"] for x in seen) / 64)
    assert results["exported"] == {k: v for k, v in val[-1].items() if k != "mode"}
    assert results["reported"]["top1"] == statistics.median(v["top1"] for v in val[-2:])
    assert results["reported"]["protocol"] == "median of the last 2 epochs"
    tool = statistics.median(v["top1"] for v in val)
    assert results["openmixup_tool"] == {"protocol": "OpenMixup's tool: median of the last 3 epochs", "top1": tool}
    (events,) = {p.parent for p in (folder / "runs").rglob("*tfevents*")}
    found = tensorboard.EventAccumulator(str(events)).Reload()
    for key, lines in (("train/loss", train), ("val/top1", val)):
        expected = [(x["update"], pytest.approx(x[key.split("/")[1]], rel=1e-6)) for x in lines]
        assert [(s.step, s.value) for s in found.Scalars(key)] == expected


def test_timm_loads_the_model_and_its_average_which_score_what_the_log_says(folder, pixels):
    (*_, final), results = lines_of(folder, "val")
    assert accuracy(logits_of(folder, pixels)) == pytest.approx(final["top1"]) == results["exported"]["top1"]
    assert [p.name for p in (folder / "models").iterdir()] == ["ema"]
    assert accuracy(logits_of(folder / "models/ema", pixels)) == pytest.approx(final["ema_top1"])
    ours = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg["label_names"] == tiny.CLASSES
    assert (ours["tag"], ours["input_size"], ours["crop_pct"]) == ("deit_e3", [3, 32, 32], 1)
    pretrained = timm.get_pretrained_cfg("test_resnet").to_dict()  # it does not claim to be that one
    for key in ("url", "hf_hub_id", "license", "origin_url", "paper_ids", "tag"):
        assert ours.get(key) is None or ours[key] != pretrained.get(key)
    # a model that timm lacks loads after importing ours
    cifar = timm.create_model(f"local-dir:{tiny.ROOT}/tests/version_0_1/finished", pretrained=True)
    assert cifar.pretrained_cfg["architecture"] == "resnet18_cifar"


def test_the_average_is_exported_where_the_recipe_reports_it(reference):
    given = ("--mixer", "deit", "--precise_bn_samples", "none", "--epochs", 2)
    found = reference(*given, "--report_ema", "true")
    weights, average = load_file(found / "model.safetensors"), load_file(checkpoints(found)[-1] / "ema.safetensors")
    assert weights.keys() == average.keys() and all(torch.equal(weights[k], average[k]) for k in weights)
    val, results = lines_of(found, "val")
    assert results["reported"]["top1"] == statistics.median(x["ema_top1"] for x in val[-2:])
    assert log(found) == log(reference(*given))  # what is reported does not change what is trained


def test_the_best_epoch_is_exported_and_survives_kills(server, reference, tiny_recipe, tmp_path, pixels):
    own = ("--protocol", "best", "--lr", 0.5, "--epochs", 6)
    found = reference(*own)
    val, results = lines_of(found, "val")
    best = max(val, key=lambda x: (x["top1"], -x["epoch"]))
    assert best["epoch"] < 6, "choose another lr: the last epoch is the best one"
    assert results["exported"]["epoch"] == results["reported"]["epoch"] == best["epoch"]
    logits, said = logits_of(found, pixels), load_file(found / "predictions.safetensors")
    assert results["reported"]["top1"] == best["top1"] == pytest.approx(accuracy(logits))
    assert torch.equal(said["index"], torch.arange(30, dtype=torch.int32))
    assert torch.equal(said["top"][:, 0].long(), logits.argmax(1))
    given = args(tiny_recipe, tmp_path / "run", *own, *AUTO)
    for call in (1, 2):
        server.run(*given, faults=[["receive", "mixup_recipes.training.export:export_epoch", call, 9]])
        server.run(*given, faults=[["receive", UPDATE, 6, 9]])
    finish(server, *given)
    assert differences(found, tmp_path / "run") == []


def test_a_folder_that_holds_a_run_or_something_else_is_not_overwritten(server, folder, tiny_recipe, tmp_path):
    before, given = contents(folder), args(tiny_recipe, folder, "--mixer", "deit")
    expect_refused(server, f"{folder} already holds a run", *given)
    run = server.start(*given, processes=2)
    statuses = run.wait()
    assert statuses[0] == 2 and statuses[1] != 0 and f"error: {folder} already holds a run" in run.output()
    other = args(tiny_recipe, folder, "--mixer", "cutmix", "--lr", 0.1, *AUTO)
    output = expect_refused(server, f"{folder} holds a run of another recipe", *other)
    assert "lr: 0.05 there, 0.1 now" in output and "mixer: deit there, cutmix now" in output
    assert contents(folder) == before
    # nor is one of something else
    letter, strange = tmp_path / "letter", tmp_path / "strange"
    (strange / "checkpoints/step-00000100").mkdir(parents=True)
    letter.mkdir()
    (letter / "letter.txt").write_text("dear")
    for place, resume in itertools.product((letter, strange, letter / "letter.txt"), (False, True)):
        with pytest.raises(UserError, match="is not empty and is not a run folder; choose another --output_dir"):
            check_folder(place, load_recipe(str(tiny_recipe)), resume)
    expect_refused(server, f"{letter} is not empty", *args(tiny_recipe, letter, *AUTO))
    assert contents(tmp_path) == {"letter/letter.txt": b"dear"} and (strange / "checkpoints/step-00000100").exists()


def test_a_full_disk_is_one_line_and_the_run_can_go_on(server, reference, tiny_recipe, tmp_path):
    out = tmp_path / "run"
    given = args(tiny_recipe, out, "--mixer", "deit")
    output = expect_refused(server, "not enough disk for checkpoints", *given, faults=[["small_disk"]])
    assert "choose another --output_dir or a lower --save_total_limit" in output
    for call in (2, 6, 9):  # env.json, weights and results
        faults, more = [["no_space", "mixup_recipes.files:os.replace", call]], AUTO if out.exists() else ()
        output = expect_refused(server, f"cannot write {out}", *given, *more, faults=faults)
        assert "No space left on device; make room, then pass --resume_from_checkpoint auto" in output
    finish(server, *given, *AUTO)
    assert differences(reference("--mixer", "deit"), out) == []


def test_a_loss_that_is_not_a_number_stops_the_run_and_pushes_out_no_checkpoint(server, tiny_recipe, tmp_path):
    for out, more, says, left in (
        (tmp_path / "a", LOG, "loss nan at update 6: lower lr, or use bf16, not fp16", [4]),
        (
            tmp_path / "b",
            ("--checkpointing_steps", 1),
            "the loss is not finite at update 6; no checkpoint is written",
            [4, 5],
        ),
    ):
        given = ["--recipe", tiny_recipe, "--output_dir", out, "--dataloader_num_workers", 0, *more]
        status, output = server.run(*given, faults=[["not_a_number", 14]])
        assert status == 1 and f"RuntimeError: {says}" in output, output
        assert [p.name for p in checkpoints(out)] == [f"step-{update:08d}" for update in left]
        assert json.loads((out / "eval_results.json").read_text())["exported"]["epoch"] == 1


TRANSFORMER = {
    "model": "test_vit", "model_args": "{img_size: 32}", "opt": "adamw", "lr": "1e-3", "weight_decay": 0.05,
    "clip_grad": 1.0, "drop_path_rate": 0.2, "loss": "bce_sum", "smoothing": 0.1, "mixer": "deit", "init": "mmcls_vit",
    "aug_repeats": 3, "remode": "pixel", "drop_last": "false",
}  # fmt: skip
BF16 = {"mixed_precision": "bf16", "channels_last": "true"}


OTHERS = [(TRANSFORMER, 1), (TRANSFORMER, 2), (BF16, 1)]


@pytest.mark.parametrize(("fields", "processes"), slow_unless(lambda case: case[1] == 2, OTHERS))
def test_other_recipes_train_and_resume_to_the_bit(server, reference, tiny_recipe, tmp_path, fields, processes):
    (tmp_path / "recipe").mkdir()
    recipe = tiny.make_recipe(tmp_path / "recipe", Path(load_recipe(str(tiny_recipe)).dataset), epochs=2, **fields)
    given = args(recipe, tmp_path / "run", "--checkpointing_steps", 2, *AUTO)
    assert server.run(*given, processes=processes, faults=[["receive", UPDATE, 4, 9]])[0] == -9
    output = finish(server, *given, processes=processes)
    assert ("bf16" if fields is BF16 else "no") + " mixed precision" in output
    assert differences(reference(recipe=recipe, processes=processes), tmp_path / "run") == []
    assert all(v.dtype != torch.bfloat16 for v in load_file(tmp_path / "run/model.safetensors").values())


@pytest.mark.slow
def test_a_compiled_run_gives_nearly_the_same_losses(reference):
    own = ("--mixer", "deit", "--epochs", 1)
    plain, compiled = reference(*own), reference("--torch_compile", "true", *own)
    expected, losses = ([x["loss"] for x in lines_of(f, "train")[0]] for f in (plain, compiled))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert load_file(plain / "model.safetensors").keys() == load_file(compiled / "model.safetensors").keys()


def test_a_run_that_was_begun_by_an_earlier_law_of_its_mixer_is_neither_continued_nor_replayed(tmp_path):
    folder, step = tmp_path, nn.ModuleList([build("guidedmix"), build("decouplemix")])
    assert laws(step) == ["decouplemix@liu-2023", "guidedmix@kang-2023.2", "mixup@zhang-2018", "vanilla@1"]
    (folder / "model.safetensors").touch()
    for noted, program in (
        ({}, None),  # no environment was noted at all
        ({"laws": laws(step)}, None),
        ({"python": "3.11"}, r"\(0\.1\)"),
        ({"laws": [*{*laws(step)} - {"guidedmix@kang-2023.2"}], "commit": "abc"}, r"\(commit abc\)"),
    ):
        (folder / "env.json").write_text(json.dumps(noted))
        if program is None:
            check_mixer(folder, step)
        else:
            with pytest.raises(
                UserError, match=f"with an earlier sampling law of its mixer, which is now guided.*{program}"
            ):
                check_mixer(folder, step)
    (folder / "env.json").write_text(json.dumps({"python": "3.11"}))
    check_mixer(folder, nn.ModuleList([build("cutmix")]))  # whose law is still the first one
    check_mixer(folder, nn.ModuleList([build("adautomix")]))  # of two samples, where it is the first one too
    with pytest.raises(
        UserError, match=r"with an earlier sampling law of its mixer, which is now adautomix@qin-2024\.2"
    ):
        check_mixer(folder, nn.ModuleList([build("adautomix", samples=3)]))
