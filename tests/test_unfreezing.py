"""Gradual unfreezing: which stages learn in which epoch, that the others stay to the bit, and that a run resumes."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from pieces import RESNET, VIT
from pieces import recipe as whole_recipe
from test_resume import UPDATE, Case
from test_update import alone
from torch.nn.modules.batchnorm import _BatchNorm

from mixers.testing import batch, rng_of
from mixup_recipes.recipe import Recipe, check
from mixup_recipes.training import backbones, launch, sharding
from mixup_recipes.training.backbones import create_model, layers
from mixup_recipes.training.dryrun import describe
from mixup_recipes.training.optimisation import optimizer
from mixup_recipes.training.unfreezing import Unfreezing
from mixup_recipes.training.update import Batch, Learner, new_step, train_update
from mixup_recipes.typed import UserError

STEM = {"conv1", "bn1"}
TOKENS = {"cls_token", "pos_embed", "patch_embed"}


def recipe(model: str = RESNET, mixer: str = "cutmix", **fields: Any) -> Recipe:
    return whole_recipe(model, mixer, **{"num_classes": 5, "freeze": "body", "unfreeze_epochs": 1.0} | fields)


def learner(r: Recipe) -> Learner:
    step = new_step(create_model(r), r)
    return Learner(step, step, optimizer(step, r), None, Unfreezing(step.model, r))


def moved(made: Learner, r: Recipe, update: int) -> set[str]:
    """The parts of the model in which an update changed anything: a parameter, or what BatchNorm counts."""
    order: Any = SimpleNamespace(recipe=r, accumulation=1, updates=100, updates_per_epoch=2)
    before = {name: value.clone() for name, value in made.step.model.state_dict().items()}
    x, y = batch(4, 64, 64, seed=update)
    train_update(made, iter([Batch(x, y, rng_of(update), torch.zeros(4))]), order, update, {}, alone())
    changed = (name for name, v in made.step.model.state_dict().items() if not torch.equal(before[name], v))
    return {".".join(name.split(".")[: 1 + name.startswith("blocks")]) for name in changed}


@pytest.mark.parametrize(
    ("model", "mixer", "fields", "turns"),
    [
        (RESNET, "cutmix", {}, [{"fc"}, {"layer4"}, {"layer3"}, {"layer2"}, {"layer1"}, STEM]),
        (RESNET, "automix", {"freeze": "layer2", "unfreeze_epochs": 0.5, "layer_decay": 0.7, "head_lr": 0.1},
         [{"fc", "layer3", "layer4"}, {"layer2"}, {"layer1"}, STEM]),
        (VIT, "mixup", {"unfreeze_epochs": 2.0, "opt": "adamw"},
         [{"head"}, {"norm", "blocks.5"}, *({f"blocks.{i}"} for i in (4, 3, 2, 1, 0)), TOKENS]),
    ],
)  # fmt: skip
def test_each_epoch_moves_the_stages_that_have_thawed_and_no_bit_of_the_others(model, mixer, fields, turns):
    r = recipe(model, mixer, **fields)
    made, every, expected = learner(r), int(2 * r.unfreeze_epochs), set()
    everything = {p for group in made.optimizer.param_groups for p in group["params"]}
    assert {*made.step.model.parameters()} <= everything  # from the start
    for turn, stage in enumerate(turns):
        expected |= stage
        for within in {0, every - 1}:
            assert moved(made, r, turn * every + within) == expected
            held = {p for p in made.optimizer.state} & {*made.step.model.parameters()}
            assert held == {p for p in made.step.model.parameters() if p.requires_grad}  # no momentum before its time
    said = {1: "0.5 epochs", 2: "epoch", 4: "2 epochs"}[every]
    end = f"{len(turns) - 1} stages, one every {said}; all learn after {(len(turns) - 1) * every / 2:g}"
    assert describe(r, made.step, 1, False).endswith(end)


def test_an_update_finds_the_same_whatever_came_before_it():
    r = recipe()
    for update in (7, 0, 3, 2, 11):
        made = learner(r)
        made.step.train()
        made.unfreezing.begin(update, 2)
        stage = layers(made.step.model, stages=True)
        learns = {name for name, p in made.step.model.named_parameters() if p.requires_grad}
        assert learns == {name for name in stage if stage[name] >= 5 - update // 2}
        norms = {name: m for name, m in made.step.model.named_modules() if isinstance(m, _BatchNorm)}
        assert norms and all(m.training == (f"{name}.weight" in learns) for name, m in norms.items())


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_thaws_is_killed_and_resumed_and_equals_one_left_alone(
    processes, server, reference, tiny_recipe, tmp_path
):
    own = ("--mixer", "cutmix", "--epochs", 1, "--warmup_epochs", 0, "--protocol_epochs", 1, "--max_train_samples", 48)
    own += ("--freeze", "body", "--unfreeze_epochs", 0.3, "--precise_bn_samples", "none", "--max_eval_samples", 16)
    c = Case(server, reference, tiny_recipe, tmp_path / "run", *own, "--checkpointing_steps", 1, processes=processes)
    c.kill_at(UPDATE, 3, rank=processes - 1)
    assert c.finish() == ["resumed from step-00000002"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_model_thaws_too(compiler):
    r = recipe(unfreeze_epochs=0.5)
    made, expected = learner(r), set()
    launch.compile_step(made.step)
    for update, stage in enumerate([{"fc"}, {"layer4"}, {"layer3"}]):
        expected |= stage
        assert moved(made, r, update) == expected


def test_both_classifiers_of_a_distilled_transformer_learn_from_the_start():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert {name for name, _ in model.named_parameters()} - backbones.frozen(model, "body") == heads


def test_what_does_not_go_with_it_is_refused():
    for fields, says in (
        ({"freeze": None}, "unfreeze_epochs unfreezes what freeze froze; pass --freeze body too"),
        ({"precise_bn_samples": 8}, "precise_bn_samples recomputes the BatchNorm statistics"),
    ):
        with pytest.raises(UserError, match=says):
            check(recipe(**fields))
    with pytest.raises(UserError, match="shard cannot be combined with unfreeze_epochs"):
        sharding.check(recipe(), 2)
    with pytest.raises(UserError, match="freeze 'layer9': did you mean 'layer"):
        create_model(recipe(freeze="layer9"))
