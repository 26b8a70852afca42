"""The run folder: a self-contained record that is also, at its root, a model repository in timm's format."""

import contextlib
import copy
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor, nn

import recipes
from mixers import taps
from recipes import Recipe, UserError

from . import protocols
from .checkpoint import file_hash, sync

PACKAGES = ("accelerate", "datasets", "numpy", "pillow", "safetensors", "timm", "torch", "torchvision", "transformers")
LOCKS: list[IO[str]] = []  # open as long as the process lives


# --------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk becomes one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        # a process that holds a run folder is a training run, and can be resumed
        advice = "; make room, then pass --resume_from_checkpoint auto" if LOCKS else ""
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}{advice}") from e


def write(path: Path, text: str | bytes) -> None:
    """Write a file whole or not at all. Raises ``UserError``."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            aside.write_bytes(text.encode() if isinstance(text, str) else text)
            os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()  # there only if something failed


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write(path, json.dumps(content, indent=1) + "\n")


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Raise ``UserError`` unless the folder is free, or holds this very recipe when resuming. Writes nothing."""
    saved = folder / "recipe.yaml"
    if saved.exists():
        if not resume:
            raise UserError(
                f"{folder} already holds a run; continue it with --resume_from_checkpoint auto, or choose another "
                "--output_dir"
            )
        found, _ = recipes.resolve(str(saved))
        if different := recipes.differences(found, recipe, ignore=("name",)):
            rows = "; ".join(f"{k}: {a} there, {b} now" for k, (a, b) in different.items())
            raise UserError(f"{folder} holds a run of another recipe: {rows}; choose another --output_dir")
    elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise UserError(f"{folder} is not empty and not a run; choose another --output_dir")


def check_teachers(folder: Path, step: nn.Module) -> None:
    """Raise ``UserError`` when a run that goes on, or is looked at, would ask a teacher with other weights."""
    try:
        before = dict(json.loads((folder / "env.json").read_text())["teachers"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # nothing was noted
    for source, now in taps.teachers(step).items():
        if before.get(source, now) != now:
            raise UserError(
                f"the teacher {source!r} is not what it was when {folder} was begun: its weights have changed; put "
                "the old ones back, or train anew into another folder"
            )


def check_disk(folder: Path, needed: int) -> None:
    """Raise ``UserError`` when the disk cannot take the run's checkpoints. ``needed`` in bytes."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"not enough disk for checkpoints in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "choose another --output_dir or a lower --save_total_limit"
        )


def open_folder(folder: Path, recipe: Recipe, splits_record: dict[str, Any], environment: dict[str, Any]) -> None:
    """Make the folder, remove what a killed process left half-written, and record recipe, data and environment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        for leftover in (*folder.glob("checkpoints/tmp-*"), *folder.glob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write(folder / "recipe.yaml", recipes.to_yaml(recipe))
        write_json(folder / "data.json", splits_record)
        write_json(folder / "env.json", environment)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --output_dir") from None


def lock(folder: Path) -> None:
    """Hold the folder until this process ends. Raises ``UserError`` when another run holds it."""
    import fcntl

    file = (folder / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process's own: loader workers do not inherit it
    except OSError:
        raise UserError(f"another run is writing to {folder}; wait for it, or choose another --output_dir") from None
    LOCKS.append(file)


def environment(accelerator: Any, recipe: Recipe, step: nn.Module) -> dict[str, Any]:
    """What the numbers depend on beside the recipe: versions, device, processes, commit, command, teachers' weights."""
    device = accelerator.device
    return {
        "command": [Path(sys.argv[0]).name, *without_token(sys.argv[1:])],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_type": device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": recipe.mixed_precision,
        "commit": git_commit(),
        "teachers": taps.teachers(step),
    }


def without_token(argv: list[str]) -> list[str]:
    """A command line as it may be recorded: ``--hub_token`` keeps its name only."""
    shown: list[str] = []
    for word in argv:
        name, _, value = word.partition("=")
        if value and name.replace("-", "_") == "__hub_token":
            word = f"{name}=***"
        shown.append("***" if shown and shown[-1].replace("-", "_") == "__hub_token" else word)
    return shown


def git_commit() -> str | None:
    """The commit of this source tree, with + when files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


# --------------------------------------------------------------------------------------------- log


class Log:
    """``log.jsonl``: one object a line, flushed at once. A resumed run first cuts it back to its checkpoint.

    Every value but those under ``perf`` (seconds, images/s) is reproducible to the bit.
    """

    def __init__(self, path: Path, length: int = 0):
        path.touch()
        kept = path.read_bytes()[:length]
        self.path, self.lines = path, []
        try:
            self.lines = [json.loads(line) for line in kept.decode().splitlines()]
            whole = len(kept) == length and kept[-1:] in (b"\n", b"")
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged or shorter than its checkpoint expects; choose another --output_dir")
        os.truncate(path, length)

    def write(self, **record: Any) -> None:
        """Append one record."""
        self.lines.append(record)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def length(self) -> int:
        """Bytes so far, all of them on the disk: what a checkpoint remembers."""
        sync(self.path)
        return self.path.stat().st_size

    def val(self) -> dict[int, dict[str, Any]]:
        """Evaluations by epoch."""
        return {line["epoch"]: line for line in self.lines if line["mode"] == "val"}

    def summary(self) -> str:
        """``summary.csv`` with timm's columns, one row per evaluated epoch."""
        rows = []
        for epoch, val in self.val().items():
            train = [x for x in self.lines if x["mode"] == "train" and x["epoch"] <= epoch]
            seen = [x for x in train if x["epoch"] == epoch]
            loss = sum(x["loss"] * x["images"] for x in seen) / max(1, sum(x["images"] for x in seen))
            metrics = {f"eval_{k}": v for k, v in val.items() if k not in ("mode", "epoch", "update", "perf")}
            rows.append({"epoch": epoch, "train_loss": loss, **metrics, "lr": train[-1]["lr"] if train else 0.0})
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()


class NoLog:
    """What the other processes hold instead of a log."""

    def write(self, **record: Any) -> None:
        """Nothing."""

    def length(self) -> int:
        """Nothing was written."""
        return 0


def reported(log: Log, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The run's number by its setting's protocol (``reported``), and as OpenMixup's tools would compute it."""
    number, tool = protocols.of_run(log.val().values(), recipe)
    return {
        "reported": {"protocol": number.label, "top1": number.value, "epoch": number.epoch},
        "openmixup_tool": {"protocol": tool.label, "top1": tool.value},
    }


def publish(
    folder: Path,
    nets: dict[str, nn.Module],
    columns: dict[str, dict[str, np.ndarray]],
    recipe: Recipe,
    classes: list[str],
    log: Log,
    epoch: int,
) -> None:
    """After an evaluation: bring the folder's root up to date, so that it is usable whenever the run ends.

    The exported weights are the last ones, or those of the best epoch where the protocol reports that; with them
    goes what they say of each image. ``nets``: the classifiers that were evaluated, by name; the reported one is
    exported at the root, the others under ``models/<name>`` (``raw`` beside an average that is reported).
    ``columns``: by the same names, see ``evaluation.predict``.
    """
    main = "ema" if recipe.report_ema else ""
    numbers = reported(log, recipe)
    lines = {e: {k: v for k, v in x.items() if k not in ("mode", "perf")} for e, x in log.val().items()}
    results = folder / "eval_results.json"
    exported = json.loads(results.read_text())["exported"] if results.exists() else None
    # after going back to an earlier checkpoint the folder may hold weights that the log no longer knows
    if recipe.protocol == "median" or numbers["reported"]["epoch"] == epoch or exported not in lines.values():
        for name, net in nets.items():
            place = folder if name == main else folder / "models" / (name or "raw")
            with writing(place / "model.safetensors"):
                place.mkdir(parents=True, exist_ok=True)
                export(net, place, recipe, classes)
                if place != folder:
                    write(place / "recipe.yaml", recipes.to_yaml(recipe))
        write_predictions(folder / "predictions.safetensors", columns[main])
        exported = lines[epoch]
    write(folder / "summary.csv", log.summary())
    weights = file_hash(folder / "model.safetensors")  # tells a later push that all of this belongs together
    write_json(results, {"exported": exported, **numbers, "weights_sha256": weights})


def write_predictions(path: Path, columns: dict[str, np.ndarray]) -> None:
    """What a model says of each image, whole or not at all: columns of ``evaluation.predict``, one row per image.

    ``index`` (N,), ``label`` (N,), ``top`` (N, up to 5) int32; ``confidence`` (N,), ``nll`` (N,) float32.
    """
    types = {"index": "int32", "label": "int32", "top": "int32", "confidence": "float32", "nll": "float32"}
    write(path, safetensors.numpy.save({k: np.ascontiguousarray(columns[k], dtype) for k, dtype in types.items()}))


# --------------------------------------------------------------------------------------------- export


def export(model: nn.Module, folder: Path, recipe: Recipe, classes: list[str]) -> None:
    """``config.json`` and ``model.safetensors`` that timm (``local-dir:``) and transformers load alike.

    Two traps of timm 1.0.31 are mended: the provenance of timm's own pretrained weights is not claimed for
    weights trained here, and ``num_classes`` does not stand among the model's arguments, where transformers
    would receive it twice.
    """
    from timm.models import save_for_hf

    aside = folder / ".export.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    size = (3, recipe.eval_size, recipe.eval_size)
    ours = {
        "tag": f"{recipe.mixer}_e{recipe.epochs}",
        "license": None,
        "origin_url": None,
        "paper_ids": None,
        "paper_name": None,
        "notes": None,
    }
    save_for_hf(
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),  # safetensors takes no other layout
        str(aside),
        safe_serialization=True,
        model_config={"pretrained_cfg": ours, "label_names": classes, "recipe": recipe.name},
        data_config={
            "input_size": size,
            "crop_pct": recipe.eval_size / recipe.eval_resize,
            "interpolation": recipe.interpolation,
            "mean": recipe.mean,
            "std": recipe.std,
            "crop_mode": "center",
        },
    )
    config = json.loads((aside / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if v is not None}
    write_json(aside / "config.json", config)
    shutil.copymode(aside / "config.json", aside / "model.safetensors")  # safetensors writes for the owner alone
    for name in ("model.safetensors", "config.json"):
        os.replace(aside / name, folder / name)
    shutil.rmtree(aside)


def check_png(path: Path) -> None:
    """Raise ``UserError`` unless a picture's name says what it will be."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are written as PNG; expected a name that ends in .png")


def to_pixels(images: Tensor, recipe: Recipe) -> Tensor:
    """Normalised (B, 3, H, W) to uint8 on the host."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.mean, recipe.std))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def sample_sheet(images: Tensor, targets: Tensor, recipe: Recipe, classes: list[str], path: Path) -> None:
    """Up to 8 mixed training images with their labels as a PNG. images normalised (B, 3, H, W), targets (B, K)."""
    pixels, targets = to_pixels(images[:8], recipe), targets[:8].float().cpu()
    side, line = max(160, images.shape[-1]), 13
    sheet = Image.new("RGB", (4 * side, (len(pixels) + 3) // 4 * (side + 2 * line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        x, y = i % 4 * side, i // 4 * (side + 2 * line + 4)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side - 4, side - 4), Image.Resampling.BICUBIC)
        sheet.paste(picture, (x + 2, y + 2))
        shares = target.topk(min(2, len(target)))
        for row, (share, k) in enumerate(zip(shares.values.tolist(), shares.indices.tolist(), strict=True)):
            if share > 0.005:
                draw.text((x + 4, y + side + row * line), f"{share:.2f} {classes[k]}"[: side // 6], fill="black")
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write(path, buffer.getvalue())
