"""Sharded training: two processes that hold pieces of a model train what two that hold copies train."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from driver import free_port
from marks import slow_unless
from resuming import checkpoints, finish, log
from safetensors.torch import load_file
from test_grad_checkpointing import CASES, recipe
from test_resume import AUTO, UPDATE, case  # noqa: F401  a fixture

from mixup_recipes.training import launch, optimisation, sharding
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.update import Batch, new_learner, new_step, one_hot, train_update
from mixup_recipes.typed import UserError

RESNET, DEIT = "resnet10t", "deit_tiny_patch16_224"
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "frozen": (RESNET, "cutmix", {"freeze": "layer3"}),
    "frozen body": (DEIT, "cutmix", {"freeze": "body"}),
    "layer decay": (DEIT, "mixup", {"layer_decay": 0.7}),
    "checkpointed": (RESNET, "puzzlemix", {"grad_checkpointing": True}),
    "checkpointed transformer": (DEIT, "transmix", {"grad_checkpointing": True}),
    "sometimes": (RESNET, "samix", {"mix_prob": 0.5}),
    "grafting by gradient": (RESNET, "grafting", {"mixer_args": {"grafting": {"source": "gradient"}}}),
    "guidedmix by gradient": (DEIT, "guidedmix", {"mixer_args": {"guidedmix": {"source": "gradient"}}}),
    "puzzlemix clean": (DEIT, "puzzlemix", {"mixer_args": {"puzzlemix": {"clean_lam": 0.5}}}),
    "comixup mixed alone": (RESNET, "comixup", {"mixer_args": {"comixup": {"clean_lam": 0.0}}}),
    "a loss over a look": (RESNET, "decouplemix", {"mixer_args": {"decouplemix": {"base": "puzzlemix"}}}),
} | {opt: (DEIT, "mixup", {"opt": opt}) for opt in sharding.OPTIMIZERS}
ALL = {f"{model} {mixer}": (model, mixer, {}) for model, mixer in CASES} | OPTIONS
QUICK = {f"{RESNET} comixup", f"{RESNET} snapmix", f"{DEIT} automix"}


def trained(case: str, accelerator: Any, shard: bool) -> dict[str, np.ndarray]:
    """Loss, weights, averages, statistics and the optimiser's state after two updates of two micro-batches each.

    In float64, so that what is no rounding shows.
    """
    model, mixer, fields = ALL[case]
    own = {"opt": "momentum", "lr": 0.05, "weight_decay": 0.02, "clip_grad": 1.0, "ema_decay": 0.9} | fields
    r = recipe(model, mixer, **own)
    step = launch.on_device(new_step(create_model(r), r).double(), r, accelerator)
    learner = new_learner(step, r, accelerator, shard)
    order: Any = SimpleNamespace(recipe=r, accumulation=2, updates=4, updates_per_epoch=2)
    sums: dict[str, torch.Tensor] = {}
    for update in range(2):
        batches = []
        for micro in range(2):
            torch.manual_seed(8 * update + 2 * micro + accelerator.process_index)
            y = one_hot(torch.randint(10, (4,)), r).double()
            batches.append(
                Batch(torch.randn(4, 3, 64, 64).double(), y, np.random.default_rng((0, update)), torch.zeros(4))
            )
        optimisation.set_learning_rates(learner.optimizer, r, update, 2)
        train_update(learner, iter(batches), order, update, sums, accelerator)
    state = {name: sharding.whole(module.state_dict()) for name, module in learner.modules.items()}
    state["optimizer"] = {
        f"{i}.{k}": v for i, s in sharding.whole(learner.optimizer.state_dict())["state"].items() for k, v in s.items()
    }
    tensors = {f"{part}/{k}": v for part, values in state.items() for k, v in values.items() if torch.is_tensor(v)}
    return {k: v.numpy() for k, v in (tensors | {f"sums/{k}": v for k, v in sums.items()}).items()}


def compare(case: str, out: str) -> None:
    """As one of two processes: write by how much what copies train differs from what pieces train."""
    accelerator = launch.accelerator(recipe(*ALL[case][:2]), Path("."))
    copies, pieces = (trained(case, accelerator, shard) for shard in (False, True))
    wrong = [] if copies.keys() == pieces.keys() else [f"names {copies.keys() ^ pieces.keys()}"]
    for name in copies.keys() & pieces.keys():
        size = np.abs(copies[name]).max(initial=1e-3)
        if not np.allclose(copies[name], pieces[name], rtol=0, atol=1e-6 * size):
            wrong.append(name)
    Path(f"{out}-{accelerator.process_index}").write_text(json.dumps([len(copies), sorted(wrong)]))


@pytest.mark.parametrize("case", slow_unless(lambda name: name in QUICK, ALL))
def test_pieces_train_what_copies_train(case, server, tmp_path):
    """Copies are those of DistributedDataParallel."""
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code = "import test_sharding; test_sharding.compare(*sys.argv[1:])"
    started = []
    for rank in range(2):
        env = {k: str(v) for k, v in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        started.append(server.forks.start(code, case, tmp_path / "out", env=env))
    assert server.forks.wait_for([pid for pid, _ in started]) == [0, 0], started[0][1].read_text()
    for rank in range(2):
        count, wrong = json.loads((tmp_path / f"out-{rank}").read_text())
        assert count > 20 and not wrong


OWN = ("--model", "test_resnet", "--mixer", "automix", "--epochs", 2, "--protocol_epochs", 1, "--max_eval_samples", 29)


def test_a_sharded_run_is_that_of_copies_and_its_checkpoint_goes_on_with_and_without(case, reference, tmp_path):
    """Killed within its second epoch. An evaluation of 29 images leaves one process without a last batch."""
    copies, pieces = reference(*OWN, processes=2), reference(*OWN, "--shard", "true", processes=2)
    assert_close(log(pieces), log(copies))
    assert (pieces / "config.json").read_bytes() == (copies / "config.json").read_bytes()
    last, other = (checkpoints(run)[-1] for run in (pieces, copies))
    for name in ("model.safetensors", "models/q/model.safetensors", "checkpoints/{}/ema.safetensors"):
        ours, theirs = (load_file(run / name.format(last.name)) for run in (pieces, copies))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    states = [torch.load(run / "optimizer.pt", weights_only=True) for run in (last, other)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    c = case(*OWN, "--shard", "true", "--checkpointing_steps", 3, processes=2)
    c.kill_at(UPDATE, 7, rank=1)
    shutil.copytree(c.out, tmp_path / "again")
    assert c.finish() == ["resumed from step-00000006"]
    finish(c.server, *c.with_args(*AUTO, "--shard", "false", "--output_dir", tmp_path / "again"), processes=2)
    assert_close(log(tmp_path / "again"), log(copies))


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for rounding."""
    assert rows == [{k: pytest.approx(v, rel=1e-4, abs=1e-4) for k, v in row.items()} for row in expected]


@pytest.mark.parametrize(
    ("fields", "world", "says"),
    [
        ({}, 1, "shard divides a model between processes, and there is one; start several, by torchrun"),
        ({"opt": "lion"}, 2, "shard: the optimiser 'lion' was not tried; expected one of adam, adamw, "),
        ({"mixed_precision": "fp16"}, 2, "shard: fp16 scales the loss"),
        ({"torch_compile": True}, 2, "shard: a compiled stage"),
    ],
)
def test_what_sharding_cannot_do_is_refused(fields, world, says):
    with pytest.raises(UserError, match=f"^{says}"):
        sharding.check(recipe(RESNET, "mixup", **fields), world)


def test_blocks_are_what_a_model_is_a_list_of_and_hold_nearly_all_of_it():
    for name in (
        "resnet50",
        "vit_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "mobilenetv2_100",
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        names = {id(module): name for name, module in model.named_modules()}
        found = [names[id(block)] for block in sharding.blocks(model)]
        assert not [inner for i, inner in enumerate(found) for outer in found[:i] if inner.startswith(f"{outer}.")]
        inside = {id(p): p.numel() for block in sharding.blocks(model) for p in block.parameters()}
        rest = sum(p.numel() for p in model.parameters()) - sum(inside.values()) - model.get_classifier().weight.numel()
        assert rest < 0.2 * sum(inside.values()) and len(found) > 10, name
