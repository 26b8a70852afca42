"""A check that cannot fail does not count: each one catches a mixer that was broken on purpose."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mixers import CutMix, Mixer, Mixup, Out, RegMixup, ops
from mixers.testing import CHECKS, check_mixer

# The broken mixers. Each is Mixup or CutMix but for one mistake that someone has made before.


def broken(base: type[Mixer] = Mixup, **verbs) -> type[Mixer]:
    return type("Broken", (base,), verbs)


def plans(change, base=Mixup):
    """Makes ``change(plan, x, rng)`` of the right plan."""
    return broken(base, plan=lambda self, x, y, rng, *look: change(base.plan(self, x, y, rng, *look), x, rng))


def draws(make, base=Mixup):
    """Plans ``make(right, x, rng)``, where ``right(rng)`` is the right plan."""
    return broken(base, plan=lambda self, x, y, rng, *look: make(lambda rng: base.plan(self, x, y, rng), x, rng))


def looks(act):
    """Does ``act(x, y, model, criterion)`` before its plan."""

    def plan(self, x, y, rng, model=None, criterion=None):
        act(x, y, model, criterion)
        return Mixup.plan(self, x, y, rng)

    return broken(plan=plan)


def mixes(change, base=Mixup):
    """Makes ``change(mixed, target, x, y, plan)`` of the right mix."""
    return broken(base, mix=lambda self, x, y, **plan: change(*base.mix(self, x, y, **plan), x, y, plan))


def takes(change, base=Mixup):
    """Mixes the images and by the plan that ``change(x, plan)`` gives."""

    def mix(self, x, y, **plan):
        images, plan = change(x, plan)
        return base.mix(self, images, y, **plan)

    return broken(base, mix=mix)


def steps(change, base=Mixup):
    """Makes ``change(out, self, *batch)`` of the right step."""

    def forward(self, model, criterion, *batch):
        return change(base.forward(self, model, criterion, *batch), self, *batch)

    return broken(base, forward=forward)


def shows(change, base=Mixup):
    """Shows the model ``change(images)`` in place of the right ones."""

    def forward(self, model, *batch):
        with model.register_forward_pre_hook(lambda _, images: change(*images), prepend=True):
            return base.forward(self, model, *batch)

    return broken(base, forward=forward)


def keeps(name, make):
    """Sets up something of its own."""
    return broken(setup=lambda self, model: setattr(self, name, make()))


def starts(act):
    """Does ``act(self)`` at the end of its constructor."""

    def __init__(self, alpha=1.0):
        Mixup.__init__(self, alpha)
        act(self)

    return broken(__init__=__init__)


class ForgetsItsArgument(Mixup):
    def __init__(self, strength=1.0):
        super().__init__(strength)


class CountsInAnAttribute(Mixup):
    steps = 0

    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": plan["mask"] / (1 + self.steps)}

    def after_step(self, model, progress):
        self.steps += 1


def looks_if_it_may(self, x, y, rng, *look):
    return Mixup.plan(self, x, y, rng) | {"mask": x.new_full((len(x), 1, 1, 1), 0.5 if look else 0.2)}


def without_clipping(_, x, rng):
    lam = ops.beta(1.0, 1.0, rng)
    mask = ops.box_mask(*ops.clipped_box(*x.shape[-2:], lam, rng), x)
    return {"index": ops.partners(x, rng), "mask": mask, "lam": ops.per_sample(lam, x)}


def by_the_images(_, x, rng):
    lam = ops.per_sample(rng.beta(1 + float(x.var()), 1), x)
    return {"index": ops.partners(x, rng), "mask": lam.view(-1, 1, 1, 1)}


HalvesItsArgument = starts(lambda self: setattr(self, "alpha", self.alpha / 2))
OwnBlock = keeps("block", lambda: nn.Linear(2, 2, bias=False))
MixesWithoutAgain = takes(lambda x, plan: (x, {key: value for key, value in plan.items() if key != "again"}))
KeepsTheLabel = mixes(lambda mixed, target, x, y, plan: (mixed, y.clone()))
DropsChannelsLast = mixes(lambda mixed, target, *_: (mixed.contiguous(), target))
KeepsATensor = keeps("table", lambda: torch.ones(3))
ReadsLambda = takes(lambda x, plan: (x, plan | {"mask": torch.full_like(plan["mask"], plan["mask"][0].item())}))


def of_the_largest_target(self, x, y, **plan):
    return Mixup.mix(self, x, torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1), **plan)


LearnsOneLabel = broken(mix=of_the_largest_target)

# By check: mixers that it catches, and a part of what it says of each.
BROKEN: dict[str, list[tuple[type[Mixer], str]]] = {
    "constructor_stores_arguments": [
        (HalvesItsArgument, "stored as it was given"),
        (ForgetsItsArgument, "no attribute ['strength']"),
        (starts(lambda self: self.register_buffer("table", torch.zeros(10))), "before setup(model)"),
        (starts(lambda self: torch.rand(1)), "global generator of torch"),
    ],
    "plan_is_plain_detached_data": [
        (plans(lambda plan, *_: plan | {"mask": plan["mask"].requires_grad_()}), "plan['mask'] detached"),
        (plans(lambda plan, *_: plan | {"again": [lambda: 0]}, MixesWithoutAgain), "plan['again'][0]; found function"),
    ],
    "plan_keys_are_mix_keywords": [(steps(lambda out, *_: out._replace(plan=out.plan | {"note": "mixup"})), "note")],
    "needs_is_true": [
        (
            broken(plan=lambda self, x, y, rng, *look: Mixup.plan(self, x, y, rng, look[1])),
            "more than needs='batch'",
        ),
        (broken(plan=looks_if_it_may), "another one at [\"['mask']\"]"),
        (broken(needs="everything"), "found 'everything'"),
    ],
    "same_rng_same_plan": [(draws(lambda right, *_: right(np.random.default_rng())), "equal plans from equal")],
    "other_rng_other_plan": [(draws(lambda right, *_: right(np.random.default_rng(0))), "five equal plans")],
    "global_rng_untouched": [
        (looks(lambda *_: random.random()), "global generator of python"),
        (looks(lambda *_: np.random.seed(0)), "global generator of numpy"),
        (looks(lambda *_: torch.rand(1)), "global generator of torch"),
    ],
    "inputs_untouched": [
        (mixes(lambda mixed, target, x, *_: (x.copy_(mixed), target)), "changes in [\"['images']\"]"),
        (looks(lambda x, *_: x.requires_grad_()), "one on ['images']"),
    ],
    "replay_rebuilds_the_step": [
        (steps(lambda out, mixer, *batch: out._replace(plan=mixer.plan(*batch))), "the target of the step"),
        (mixes(lambda mixed, target, *_: (mixed + 1e-3 * torch.rand(1), target)), "another result the second time"),
        *((shows(lambda images: images + 1e-3, base), "images that are off by 0.001") for base in (Mixup, RegMixup)),
    ],
    "shapes_dtypes_layout_kept": [
        (mixes(lambda mixed, target, *_: (mixed.float(), target)), "torch.bfloat16"),
        (DropsChannelsLast, "memory format kept"),
        (plans(lambda plan, *_: plan | {"mask": plan["mask"].mT}, CutMix), "found"),
        (takes(lambda x, plan: (x, plan | {"index": torch.cat([*plan["index"].view(2, -1)])})), "is invalid"),
    ],
    "uint8_is_a_type_error": [(takes(lambda x, plan: (x.float(), plan)), "uint8 images in mix; found no error")],
    "it_mixes": [
        (plans(lambda plan, *_: plan | {"mask": torch.ones_like(plan["mask"])}), "a changed pixel"),
        (KeepsTheLabel, "a changed label"),
    ],
    "targets_stay_distributions": [
        (mixes(lambda mixed, target, x, y, plan: (mixed, y + y[plan["index"]])), "rows of one-hot targets that sum"),
        (mixes(lambda mixed, target, x, y, plan: (mixed, 1.5 * y - 0.5 * y[plan["index"]])), "targets in [0, 1]"),
        (mixes(lambda mixed, target, *_: (mixed, target * (target > 0.05)), CutMix), "rows of smoothed targets"),
        (mixes(lambda mixed, target, *_: (mixed, target**2 / (target**2).sum(1, keepdim=True))), "linear in y"),
    ],
    "several_labels_mix_as_one": [
        (LearnsOneLabel, "the shares of its sources' labels"),
        (mixes(lambda mixed, target, x, y, plan: (mixed, y.maximum(y[plan["index"]]))), "that sum to 1"),
        (
            steps(lambda out, mixer, x, y, rng: out._replace(loss=(out.loss / y.sum(1)).mean())),
            "a finite binary cross-entropy",
        ),
    ],
    "label_share_is_pixel_share": [
        (plans(lambda plan, *_: plan | {"lam": 1 - plan["mask"].flatten()}), "share of the pixels"),
        (draws(without_clipping, CutMix), "share of the pixels"),
    ],
    "identical_images_stay": [(mixes(lambda mixed, target, *_: (mixed.flip(3), target)), "labels unchanged")],
    "loss_is_sum_of_parts": [
        (steps(lambda out, *_: out._replace(loss=2 * out.loss)), "sum of its parts"),
        (steps(lambda out, *_: out._replace(logs={"mix": out.loss})), "detached scalars"),
        (steps(lambda out, *_: Out.of(out.logits, out.target, out.plan, mix=out.logits.log())), "finite scalar"),
    ],
    "model_left_as_found": [
        (looks(lambda x, y, model, _: model.train()), ".training"),
        (looks(lambda x, y, model, criterion: criterion(model(x), y).mean().backward()), ".grad"),
        (looks(lambda x, y, model, _: model.register_forward_hook(lambda *_: None)), "._forward_hooks"),
        (looks(lambda x, y, model, _: model.requires_grad_()), ".requires_grad"),
        (looks(lambda x, y, model, _: model(x)), "running_mean"),
    ],
    "no_device_read": [
        (ReadsLambda, "reads nothing back"),
        (takes(lambda x, plan: (x[plan["index"] >= 0], plan)), "reads nothing back"),
        (plans(lambda plan, x, rng: plan | {"index": torch.from_numpy(rng.permutation(len(x)))}), "['index']"),
    ],
    "resume": [(CountsInAnAttribute, "after resuming")],
    "autocast_bf16": [(steps(lambda out, *_: out._replace(target=out.target.to(out.logits.dtype))), "torch.bfloat16")],
    "gradient_reaches_every_parameter": [
        (OwnBlock, "none at ['mixer.block.weight'"),
        (steps(lambda out, mixer, *_: out._replace(loss=out.loss + 0 * mixer.block.weight.sum()), OwnBlock), "only 0"),
    ],
    "moves_with_to": [
        (KeepsATensor, "mixer['table'] moved"),
        (keeps("teachers", lambda: [nn.Linear(2, 2)]), "mixer['teachers'][0] moved"),
    ],
    "accumulation_invariance": [
        (
            draws(lambda right, x, rng: {"index": ops.partners(x, rng), "mask": right(rng)["mask"]}),
            "the batch size",
        ),
        (plans(lambda plan, x, _: plan if len(x) > 3 else plan | {"lam": plan["mask"].flatten()}), "the same branch"),
        (draws(by_the_images), "whatever the images"),
        (looks(lambda x, y, model, _: model.zero_grad()), "gradient of the previous micro-batch"),
    ],
}
CASES = [(check, *case) for check, cases in BROKEN.items() for case in cases]


@pytest.mark.parametrize(("check", "mixer", "says"), CASES, ids=[f"{check}: {says}" for check, _, says in CASES])
def test_check_catches_the_mistake_and_says_what_it_is(check, mixer, says):
    with pytest.raises(AssertionError) as caught:
        CHECKS[check](mixer)
    message = str(caught.value)
    assert message.startswith(f"{check}: expected ") and "; found " in message and says in message


@pytest.mark.parametrize("alone", [HalvesItsArgument, DropsChannelsLast, KeepsATensor, ReadsLambda])
def test_other_checks_let_a_mistake_that_touches_one_promise_only_pass(alone):
    check_mixer(alone, skip={check for check, mixer, _ in CASES if mixer is alone})


def test_every_check_has_a_mixer_that_it_catches():
    assert set(BROKEN) == set(CHECKS) and all(BROKEN.values())


def test_check_mixer_reports_every_failed_check_by_name_and_skips_none_that_does_not_exist():
    class Twice(KeepsTheLabel):
        def plan(self, x, y, rng, *look):
            np.random.seed(0)
            return super().plan(x, y, rng, *look)

    with pytest.raises(AssertionError) as caught:
        check_mixer(Twice)
    named = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert {"it_mixes", "global_rng_untouched", "label_share_is_pixel_share"} <= named
    assert "resume" not in named
    with pytest.raises(ValueError, match="its_mixes"):
        check_mixer(Mixup, skip=["its_mixes"])
