"""Disturb a run and resume it until it is done; say in what it differs from a run that was left alone."""

import itertools
import json
import signal
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from driver import Server

from mixers import Step, build

# Files that are equal byte for byte, samples/*.png and the newest checkpoint's tensors beside them.
SAME_BYTES = "model.safetensors predictions.safetensors config.json recipe.yaml data.json eval_results.json summary.csv"

LOG = ("--logging_steps", 3)  # does not divide the 4 updates of a tiny epoch: a checkpoint finds half-filled sums
SHORT = ("--epochs", 2, "--protocol_epochs", 1, "--precise_bn_samples", "none")


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "perf"} for line in lines]


def checkpoints(folder: Path) -> list[Path]:
    """Everything in the checkpoint folder but what was put aside, oldest first."""
    return sorted(p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("given-up-"))


def optimizer_states(checkpoint: Path) -> Any:
    """optimizer.pt with tensors as (type, shape, bytes), so that == compares them."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(torch.load(checkpoint / "optimizer.pt", weights_only=True))


def differences(expected: Path, found: Path) -> list[str]:
    """What is not the same in two run folders, to the bit; empty when all is."""
    wrong = [n for n in SAME_BYTES.split() if (expected / n).read_bytes() != (found / n).read_bytes()]
    if log(expected) != log(found):
        wrong.append("log.jsonl")
    sheets, others = ({p.name: p.read_bytes() for p in (f / "samples").iterdir()} for f in (expected, found))
    wrong += [f"samples/{n}" for n in sheets.keys() | others.keys() if sheets.get(n) != others.get(n)]
    wrong += [p.name for p in checkpoints(found) if not p.name.startswith("step-")]  # leftovers
    wrong += [p.name for p in found.glob(".*") if p.name not in (".lock", ".dataset.json", ".eval_results")]
    a, b = checkpoints(expected)[-1], checkpoints(found)[-1]
    if a.name != b.name:
        return [*wrong, f"checkpoint {b.name} instead of {a.name}"]
    tensors = {p.name for folder in (a, b) for p in folder.glob("*.safetensors")}
    wrong += [n for n in sorted(tensors) if not (b / n).exists() or (a / n).read_bytes() != (b / n).read_bytes()]
    if optimizer_states(a) != optimizer_states(b):
        wrong.append("optimizer.pt")
    state, other = (json.loads((p / "state.json").read_text()) for p in (a, b))
    ignored = {"seconds", "log_length"}  # the length depends on how many digits the seconds have
    wrong += [f"state.json {k}" for k in (state.keys() | other.keys()) - ignored if state.get(k) != other.get(k)]
    return wrong


def kill_after(server: Server, seconds: float, *args: object, processes: int = 1) -> bool:
    """Start a run and kill all its processes after a while; False when it was done before."""
    run = server.start(*args, processes=processes)
    time.sleep(seconds)
    run.send(signal.SIGKILL)
    statuses = run.wait()
    if any(statuses) and -signal.SIGKILL not in statuses:
        raise AssertionError(f"status {statuses}:\n{run.output()}")
    return any(statuses)


def finish(server: Server, *args: object, processes: int = 1) -> str:
    """Run to the end, which must be reached; returns what was printed."""
    run = server.start(*args, processes=processes)
    if any(statuses := run.wait()):
        raise AssertionError(f"status {statuses}:\n" + "\n".join(run.output(r) for r in range(processes)))
    return run.output()


def small_model_for(mixer: str) -> str:
    """A small model that the mixer supports."""
    for name in ("test_resnet", "test_vit"):
        try:
            Step(timm.create_model(name, num_classes=4), build(mixer), F.cross_entropy)
        except ValueError:
            continue
        return name
    raise AssertionError(f"no small model fits mixer {mixer!r}")


class Reference:
    """Runs that nobody disturbed, made once: ``reference("--mixer", "cutmix", processes=2)`` is a run folder."""

    def __init__(self, server: Server, recipe: Path, folder: Path):
        self.server, self.recipe, self.folder = server, recipe, folder
        self.made: dict[object, Path] = {}
        self.numbers = itertools.count()
        self.seconds: dict[Path, float] = {}

    def __call__(self, *args: object, processes: int = 1, recipe: Path | None = None) -> Path:
        key = (args, processes, recipe)
        if key not in self.made:
            out = self.folder / str(next(self.numbers))  # not again where a run failed
            run = ["--recipe", recipe or self.recipe, "--output_dir", out, "--dataloader_num_workers", 0]
            began = time.monotonic()
            finish(self.server, *run, *LOG, *args, processes=processes)
            self.made[key], self.seconds[out] = out, time.monotonic() - began
        return self.made[key]
