"""A check that cannot fail does not count: each one catches a mixer that was broken on purpose."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixers import CutMix, Mixer, Mixup, Out, ops
from mixers.testing import CHECKS, check_mixer

# The broken mixers. Each is Mixup or CutMix but for one mistake that someone has made before.


def plans(change: Callable[..., dict[str, Any]], base: type[Mixer] = Mixup) -> type[Mixer]:
    """Makes ``change(plan, x, rng)`` of the right plan."""

    class Broken(base):
        def plan(self, x, y, rng, *look):
            return change(super().plan(x, y, rng, *look), x, rng)

    return Broken


def draws(make: Callable[..., dict[str, Any]], base: type[Mixer] = Mixup) -> type[Mixer]:
    """Plans ``make(right, x, rng)``, where ``right(rng)`` is the right plan."""

    class Broken(base):
        def plan(self, x, y, rng, *look):
            right = super().plan
            return make(lambda rng: right(x, y, rng), x, rng)

    return Broken


def looks(act: Callable[..., Any]) -> type[Mixer]:
    """Does ``act(x, y, model, criterion)`` before its plan."""

    class Broken(Mixup):
        def plan(self, x, y, rng, model=None, criterion=None):
            act(x, y, model, criterion)
            return super().plan(x, y, rng)

    return Broken


def mixes(change: Callable[..., tuple[Tensor, Tensor]], base: type[Mixer] = Mixup) -> type[Mixer]:
    """Makes ``change(mixed, target, x, y, plan)`` of the right mix."""

    class Broken(base):
        def mix(self, x, y, **plan):
            return change(*super().mix(x, y, **plan), x, y, plan)

    return Broken


def takes(change: Callable[..., tuple[Tensor, dict[str, Any]]]) -> type[Mixer]:
    """Mixes the images and by the plan that ``change(x, plan)`` gives."""

    class Broken(Mixup):
        def mix(self, x, y, **plan):
            images, plan = change(x, plan)
            return super().mix(images, y, **plan)

    return Broken


def steps(change: Callable[..., Out], base: type[Mixer] = Mixup) -> type[Mixer]:
    """Makes ``change(out, self, x, y, rng)`` of the right step."""

    class Broken(base):
        def forward(self, model, criterion, x, y, rng):
            return change(super().forward(model, criterion, x, y, rng), self, x, y, rng)

    return Broken


def keeps(name: str, make: Callable[[], Any]) -> type[Mixer]:
    """Sets up something of its own."""

    class Broken(Mixup):
        def setup(self, model):
            setattr(self, name, make())

    return Broken


class HalvesItsArgument(Mixup):
    def __init__(self, alpha=1.0):
        super().__init__(alpha)
        self.alpha = alpha / 2


class ForgetsItsArgument(Mixup):
    def __init__(self, strength=1.0):
        super().__init__(strength)


class BuildsInTheConstructor(Mixup):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(10))


class DrawsInTheConstructor(Mixup):
    def __init__(self):
        super().__init__()
        torch.rand(1)


class LooksInSilence(Mixup):
    def plan(self, x, y, rng, *look):
        _model, _criterion = look
        return super().plan(x, y, rng)


class LooksIfItMay(Mixup):
    def plan(self, x, y, rng, *look):
        lam = 0.5 if look else 0.2
        return super().plan(x, y, rng) | {"mask": x.new_full((len(x), 1, 1, 1), lam)}


class NeedsMore(Mixup):
    needs = "everything"


class CountsInAnAttribute(Mixup):
    steps = 0

    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": plan["mask"] / (1 + self.steps)}

    def after_step(self, model, progress):
        self.steps += 1


def without_clipping(_, x, rng):
    height, width = x.shape[-2:]
    lam = ops.beta(1.0, 1.0, rng)
    mask = ops.box_mask(*ops.clipped_box(height, width, lam, rng), x)
    return {"index": ops.partners(x, rng), "mask": mask, "lam": ops.per_sample(lam, x)}


def by_the_images(_, x, rng):
    lam = ops.per_sample(rng.beta(1 + float(x.var()), 1), x)
    return {"index": ops.partners(x, rng), "mask": lam.view(-1, 1, 1, 1)}


def partners_first(right, x, rng):
    index = ops.partners(x, rng)
    return right(rng) | {"index": index}


def gradients_left(x, y, model, criterion):
    look = x.clone().requires_grad_()
    was = [(m, m.training) for m in model.modules()]
    criterion(model.eval()(look), y).mean().backward()
    for module, training in was:
        module.training = training


def moving_python(mixed, target, *_):
    random.random()
    return mixed, target


def moving_torch(out, *_):
    torch.rand(1)
    return out


def indexed_with_booleans(mixed, target, x, _, plan):
    mixed[plan["index"] == torch.arange(len(x), device=x.device)] *= 1
    return mixed, target


def block() -> nn.Module:
    return nn.Linear(2, 2)


def block_times_zero(out, mixer, x, *_):
    return Out.of(out.logits, out.target, out.plan, mix=out.loss, block=0 * mixer.block(x.new_ones(1, 2)))


def also(out, **parts):
    return out._replace(**parts)


KeepsTheLabel = mixes(lambda mixed, target, x, y, plan: (mixed, y.clone()))
DropsChannelsLast = mixes(lambda mixed, target, *_: (mixed.contiguous(), target))
KeepsATensor = keeps("table", lambda: torch.ones(3))
ReadsLambda = takes(lambda x, plan: (x, plan | {"mask": torch.full_like(plan["mask"], plan["mask"][0].item())}))

# The mistake, which check catches it, and a part of what the check says.
BROKEN: dict[str, tuple[type[Mixer], str, str]] = {
    "halves its argument": (HalvesItsArgument, "constructor_stores_arguments", "stored as it was given"),
    "forgets its argument": (ForgetsItsArgument, "constructor_stores_arguments", "no attribute ['strength']"),
    "builds in the constructor": (BuildsInTheConstructor, "constructor_stores_arguments", "before setup(model)"),
    "draws in the constructor": (DrawsInTheConstructor, "constructor_stores_arguments", "global generator of torch"),
    "plans with a graph": (
        plans(lambda plan, *_: plan | {"mask": plan["mask"].requires_grad_()}),
        "plan_is_plain_detached_data", "plan['mask'] detached",
    ),
    "plans a function": (
        plans(
            lambda plan, *_: plan | {"again": [lambda: 0]},
            takes(lambda x, plan: (x, {key: value for key, value in plan.items() if key != "again"})),
        ),
        "plan_is_plain_detached_data", "plan['again'][0]; found function",
    ),
    "logs in the plan": (
        steps(lambda out, *_: also(out, plan=out.plan | {"note": "mixup"})), "plan_keys_are_mix_keywords", "note",
    ),
    "looks in silence": (LooksInSilence, "needs_is_true", "without more than needs='batch'"),
    "looks if it may": (LooksIfItMay, "needs_is_true", "another one at [\"['mask']\"]"),
    "needs more": (NeedsMore, "needs_is_true", "found 'everything'"),
    "draws from elsewhere": (
        draws(lambda right, *_: right(np.random.default_rng())),
        "same_rng_same_plan", "equal plans from equal generators",
    ),
    "ignores the generator": (
        draws(lambda right, *_: right(np.random.default_rng(0))), "other_rng_other_plan", "five equal plans",
    ),
    "moves python": (mixes(moving_python), "global_rng_untouched", "global generator of python"),
    "seeds numpy": (looks(lambda *_: np.random.seed(0)), "global_rng_untouched", "global generator of numpy"),
    "moves torch": (steps(moving_torch), "global_rng_untouched", "global generator of torch"),
    "writes into the batch": (
        mixes(lambda mixed, target, x, *_: (x.copy_(mixed), target)), "inputs_untouched", "changes in [\"['images']\"]",
    ),
    "asks for image gradients": (looks(lambda x, *_: x.requires_grad_()), "inputs_untouched", "one on ['images']"),
    "returns another plan": (
        steps(lambda out, mixer, *batch: also(out, plan=mixer.plan(*batch))),
        "replay_rebuilds_the_step", "the target of the step",
    ),
    "draws in mix": (
        mixes(lambda mixed, target, *_: (mixed + 1e-3 * torch.rand(1), target)),
        "replay_rebuilds_the_step", "another result the second time",
    ),
    "answers in float32": (
        mixes(lambda mixed, target, *_: (mixed.float(), target)), "shapes_dtypes_layout_kept", "torch.bfloat16",
    ),
    "drops channels last": (DropsChannelsLast, "shapes_dtypes_layout_kept", "memory format kept"),
    "swaps height and width": (
        plans(lambda plan, *_: plan | {"mask": plan["mask"].mT}, CutMix), "shapes_dtypes_layout_kept", "found",
    ),
    "pairs halves": (
        takes(lambda x, plan: (x, plan | {"index": torch.cat([*plan["index"].view(2, -1)])})),
        "shapes_dtypes_layout_kept", "shape '[2, -1]' is invalid",
    ),
    "takes any number type": (
        takes(lambda x, plan: (x.float(), plan)), "uint8_is_a_type_error", "uint8 images in mix; found no error",
    ),
    "keeps everything": (
        plans(lambda plan, *_: plan | {"mask": torch.ones_like(plan["mask"])}), "it_mixes", "a changed pixel",
    ),
    "keeps the label": (KeepsTheLabel, "it_mixes", "a changed label"),
    "adds labels": (
        mixes(lambda mixed, target, x, y, plan: (mixed, y + y[plan["index"]])),
        "targets_stay_distributions", "rows of one-hot targets that sum to 1",
    ),
    "extrapolates": (
        mixes(lambda mixed, target, x, y, plan: (mixed, 1.5 * y - 0.5 * y[plan["index"]])),
        "targets_stay_distributions", "targets in [0, 1]",
    ),
    "drops small labels": (
        mixes(lambda mixed, target, *_: (mixed, target * (target > 0.05)), CutMix),
        "targets_stay_distributions", "rows of smoothed targets that sum to 1",
    ),
    "sharpens labels": (
        mixes(lambda mixed, target, *_: (mixed, target**2 / (target**2).sum(1, keepdim=True))),
        "targets_stay_distributions", "linear in y",
    ),
    "gives the partner's share": (
        plans(lambda plan, *_: plan | {"lam": 1 - plan["mask"].flatten()}),
        "label_share_is_pixel_share", "share of the pixels",
    ),
    "forgets the clipping": (draws(without_clipping, CutMix), "label_share_is_pixel_share", "share of the pixels"),
    "flips images": (
        mixes(lambda mixed, target, *_: (mixed.flip(3), target)),
        "identical_images_stay", "identical images and labels unchanged",
    ),
    "doubles the loss": (
        steps(lambda out, *_: also(out, loss=2 * out.loss)), "loss_is_sum_of_parts", "sum of its parts",
    ),
    "logs with a graph": (
        steps(lambda out, *_: also(out, logs={"mix": out.loss})), "loss_is_sum_of_parts", "detached scalars",
    ),
    "loses itself": (
        steps(lambda out, *_: Out.of(out.logits, out.target, out.plan, mix=out.logits.log())),
        "loss_is_sum_of_parts", "finite scalar",
    ),
    "turns on training": (looks(lambda x, y, model, _: model.train()), "model_left_as_found", ".training"),
    "leaves gradients": (looks(gradients_left), "model_left_as_found", ".grad"),
    "leaves a hook": (
        looks(lambda x, y, model, _: model.register_forward_hook(lambda *_: None)),
        "model_left_as_found", "._forward_hooks",
    ),
    "leaves a flag": (looks(lambda x, y, model, _: model.requires_grad_()), "model_left_as_found", ".requires_grad"),
    "looks in training mode": (looks(lambda x, y, model, _: model(x)), "model_left_as_found", "running_mean"),
    "reads lambda": (ReadsLambda, "no_device_read", "reads nothing back"),
    "indexes with booleans": (mixes(indexed_with_booleans), "no_device_read", "reads nothing back"),
    "plans on the host": (
        plans(lambda plan, x, rng: plan | {"index": torch.from_numpy(rng.permutation(len(x)))}),
        "no_device_read", "others at [\"['index']\"]",
    ),
    "counts in an attribute": (CountsInAnAttribute, "resume", "after resuming"),
    "follows the logits": (
        steps(lambda out, *_: also(out, target=out.target.to(out.logits.dtype))),
        "autocast_bf16", "targets in torch.float32; found torch.bfloat16",
    ),
    "idle parameters": (keeps("block", block), "gradient_reaches_every_parameter", "none at ['mixer.block.weight'"),
    "parameters times zero": (
        steps(block_times_zero, keeps("block", block)), "gradient_reaches_every_parameter", "only 0",
    ),
    "keeps a tensor": (KeepsATensor, "moves_with_to", "mixer['table'] moved"),
    "hides a teacher": (keeps("teachers", lambda: [block()]), "moves_with_to", "mixer['teachers'][0] moved"),
    "draws partners first": (draws(partners_first), "accumulation_invariance", "whatever the batch size"),
    "branches on the size": (
        plans(lambda plan, x, _: plan if len(x) > 3 else plan | {"lam": plan["mask"].flatten()}),
        "accumulation_invariance", "the same branch",
    ),
    "lambda follows the images": (draws(by_the_images), "accumulation_invariance", "whatever the images"),
    "clears gradients": (
        looks(lambda x, y, model, _: model.zero_grad()),
        "accumulation_invariance", "gradient of the previous micro-batch",
    ),
}  # fmt: skip

# Mistakes that touch one promise only: every other check lets them pass.
ALONE = ["halves its argument", "drops channels last", "keeps a tensor", "reads lambda"]


@pytest.mark.parametrize("mistake", BROKEN)
def test_check_catches_the_mistake_and_says_what_it_is(mistake: str) -> None:
    broken, check, says = BROKEN[mistake]
    with pytest.raises(AssertionError) as caught:
        CHECKS[check](broken)
    message = str(caught.value)
    assert message.startswith(f"{check}: expected ")
    assert "; found " in message
    assert says in message


@pytest.mark.parametrize("mistake", ALONE)
def test_other_checks_let_the_mistake_pass(mistake: str) -> None:
    broken, check, _ = BROKEN[mistake]
    check_mixer(broken, skip={check})


def test_every_check_has_a_mixer_that_it_catches_and_every_broken_mixer_is_in_the_table() -> None:
    assert {check for _, check, _ in BROKEN.values()} == set(CHECKS)
    written = {v for v in globals().values() if isinstance(v, type) and v.__module__ == __name__}
    assert written <= {broken for broken, _, _ in BROKEN.values()}


def test_check_mixer_reports_every_failed_check_by_name_and_skips_none_that_does_not_exist() -> None:
    class Twice(KeepsTheLabel):
        def plan(self, x: Any, y: Any, rng: Any, *look: Any) -> Any:
            np.random.seed(0)
            return super().plan(x, y, rng, *look)

    with pytest.raises(AssertionError) as caught:
        check_mixer(Twice)
    named = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert {"it_mixes", "global_rng_untouched", "label_share_is_pixel_share"} <= named
    assert "resume" not in named
    with pytest.raises(ValueError, match="its_mixes"):
        check_mixer(Mixup, skip=["its_mixes"])
