"""Sharded training: two processes that hold pieces of a model train what two that hold copies train."""

import json
import re
import shutil
from typing import Any

import pytest
import timm
import torch
from driver import free_port
from marks import slow_unless
from pieces import ATTENTION, GROUPS, RESNET, recipe
from resuming import checkpoints, finish, log
from runs import markdown_rows
from safetensors.torch import load_file
from test_automix import NAMES as LEARNED
from test_grad_checkpointing import REFUSED
from test_mixers_that_look import INTO_THE_MODEL, LOOKING
from test_resume import AUTO, UPDATE, Case
from tiny import ROOT

from mixers import MIXERS, build
from mixup_recipes.training import sharding
from mixup_recipes.typed import UserError

PAGE = ROOT / "docs/launching.md"


@pytest.mark.parametrize("group", slow_unless(lambda name: name == "quick", GROUPS))
def test_pieces_train_what_copies_train(group, server, tmp_path):
    """Copies are those of DistributedDataParallel."""
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for rank in range(2):
        env = {k: str(v) for k, v in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        code = "import pieces; pieces.compare(*sys.argv[1:])"
        started.append(server.forks.start(code, group, tmp_path / "out", env=env))
    assert server.forks.wait_for([pid for pid, _ in started], 600) == [0, 0], started[0][1].read_text()
    assert [json.loads((tmp_path / f"out-{rank}").read_text()) for rank in range(2)] == [{}, {}]


def case(server, reference, recipe_file, out, *args):
    """A sharded run of two processes that can be killed."""
    return Case(server, reference, recipe_file, out, *args, "--shard", "true", processes=2)


def test_a_sharded_run_that_is_killed_and_resumed_equals_one_left_alone(server, reference, tiny_recipe, tmp_path):
    """An evaluation of 17 images leaves one process without a last batch."""
    own = ("--mixer", "cutmix", "--epochs", 1, "--warmup_epochs", 0, "--protocol_epochs", 1, "--max_eval_samples", 17)
    own += ("--max_train_samples", 48, "--precise_bn_samples", "none")
    c = case(server, reference, tiny_recipe, tmp_path / "run", *own, "--checkpointing_steps", 1)
    c.kill_at(UPDATE, 3, rank=1)
    assert c.finish() == ["resumed from step-00000002"]


@pytest.mark.slow
def test_a_sharded_run_is_that_of_copies_and_its_checkpoint_goes_on_without(server, reference, tiny_recipe, tmp_path):
    own = ("--model", RESNET, "--mixer", "automix", "--epochs", 2, "--protocol_epochs", 1)
    copies, pieces = reference(*own, processes=2), reference(*own, "--shard", "true", processes=2)
    assert_close(log(pieces), log(copies))
    assert (pieces / "config.json").read_bytes() == (copies / "config.json").read_bytes()
    last, other = (checkpoints(run)[-1] for run in (pieces, copies))
    for name in ("model.safetensors", "models/q/model.safetensors", f"checkpoints/{last.name}/ema.safetensors"):
        torch.testing.assert_close(load_file(pieces / name), load_file(copies / name), rtol=1e-4, atol=1e-5)
    states = [torch.load(run / "optimizer.pt", weights_only=True) for run in (last, other)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    c = case(server, reference, tiny_recipe, tmp_path / "run", *own, "--checkpointing_steps", 3)
    c.kill_at(UPDATE, 7, rank=1)
    shutil.copytree(c.out, tmp_path / "again")
    assert c.finish() == ["resumed from step-00000006"]
    finish(server, *c.with_args(*AUTO, "--shard", "false", "--output_dir", tmp_path / "again"), processes=2)
    assert_close(log(tmp_path / "again"), log(copies))


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for rounding."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.pop("mode") == other.pop("mode") and row == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "world", "says"),
    [
        ({}, 1, "shard divides a model between processes, and there is only one process; start several with torchrun"),
        ({"opt": "lion"}, 2, "shard: expected an optimiser that was tested with it (adabelief, adam, "),
        ({"mixed_precision": "fp16"}, 2, "shard was not tested with fp16; pass --mixed_precision bf16"),
    ],
)
def test_what_sharding_cannot_do_is_refused(fields, world, says):
    with pytest.raises(UserError, match=f"^{re.escape(says)}"):
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
        names = {module: name for name, module in model.named_modules()}
        found = [names[block] for block in sharding.blocks(model)]
        assert not [inner for i, inner in enumerate(found) for outer in found[:i] if inner.startswith(f"{outer}.")]
        held = {p for block in sharding.blocks(model) for p in block.parameters()} | {
            *model.get_classifier().parameters()
        }
        rest = sum(p.numel() for p in {*model.parameters()} - held)
        assert len(found) > 10 and rest < 0.2 * sum(p.numel() for p in held), name


def test_the_table_of_the_documents_says_of_each_mixer_what_its_tests_say():
    """Copies, pieces: ``pieces.ALL``. Activations: ``REFUSED``. Compiled: what only changes the batch needs none."""
    compiled = {*LOOKING, *INTO_THE_MODEL, *ATTENTION, *LEARNED} | {m for m in MIXERS if build(m).needs == "batch"}
    assert compiled >= {*MIXERS}
    expected = {}
    for mixer in MIXERS:
        refused = {name for name, mixers in REFUSED.items() if mixer in mixers}
        tried = {name for name in REFUSED if name.startswith("deit") or mixer not in ATTENTION}
        kept = "yes" if not refused else "no" if refused == tried else "on transformers"
        expected[mixer] = ["yes", kept, "yes", "yes"]
    text = PAGE.read_text().partition("## What each mixer goes together with")[2]
    _, *rows = markdown_rows(text.partition("\n## ")[0].replace("|---", "| ---"))
    found = [(mixer, cells) for names, *cells in rows for mixer in re.findall("`(.*?)`", names)]
    assert dict(found) == expected and len(found) == len(expected)
    assert ", ".join(f"`{opt}`" for opt in sharding.OPTIMIZERS) in " ".join(PAGE.read_text().split())
