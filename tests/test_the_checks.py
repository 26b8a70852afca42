"""A check that cannot fail does not count: each one catches a mixer that was broken on purpose."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mixers import CutMix, Mixup, Out, ops
from mixers.testing import CHECKS, check_mixer

# The broken mixers. Each is Mixup or CutMix but for one mistake that someone has made before.


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


class PlansWithAGraph(Mixup):
    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": plan["mask"].requires_grad_()}


class PlansAFunction(Mixup):
    def plan(self, x, y, rng, *look):
        return super().plan(x, y, rng, *look) | {"again": [lambda: 0]}

    def mix(self, x, y, *, again, **plan):
        return super().mix(x, y, **plan)


class LogsInThePlan(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return out._replace(plan=out.plan | {"note": "mixup"})


class DrawsFromElsewhere(Mixup):
    def plan(self, x, y, rng, *look):
        return super().plan(x, y, np.random.default_rng(), *look)


class IgnoresTheGenerator(Mixup):
    def plan(self, x, y, rng, *look):
        return super().plan(x, y, np.random.default_rng(0), *look)


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


class MovesPython(Mixup):
    def mix(self, x, y, **plan):
        random.random()
        return super().mix(x, y, **plan)


class SeedsNumpy(Mixup):
    def plan(self, x, y, rng, *look):
        np.random.seed(0)
        return super().plan(x, y, rng, *look)


class MovesTorch(Mixup):
    def forward(self, model, criterion, x, y, rng):
        torch.rand(1)
        return super().forward(model, criterion, x, y, rng)


class WritesIntoTheBatch(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return x.copy_(mixed), target


class AsksForImageGradients(Mixup):
    def plan(self, x, y, rng, *look):
        x.requires_grad_()
        return super().plan(x, y, rng, *look)


class ReturnsAnotherPlan(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return out._replace(plan=self.plan(x, y, rng))


class DrawsInMix(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed + 1e-3 * torch.rand(1), target


class AnswersInFloat32(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed.float(), target


class DropsChannelsLast(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed.contiguous(), target


class SwapsHeightAndWidth(CutMix):
    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": plan["mask"].transpose(2, 3)}


class PairsHalves(Mixup):
    def mix(self, x, y, *, index, **plan):
        first, second = index.view(2, -1)
        return super().mix(x, y, index=torch.cat([first, second]), **plan)


class TakesAnyNumberType(Mixup):
    def mix(self, x, y, **plan):
        return super().mix(x.float(), y, **plan)


class KeepsEverything(Mixup):
    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": torch.ones_like(plan["mask"])}


class KeepsTheLabel(Mixup):
    def mix(self, x, y, **plan):
        return super().mix(x, y, **plan)[0], y.clone()


class AddsLabels(Mixup):
    def mix(self, x, y, *, index, **plan):
        mixed, _ = super().mix(x, y, index=index, **plan)
        return mixed, y + y[index]


class Extrapolates(Mixup):
    def mix(self, x, y, *, index, **plan):
        mixed, _ = super().mix(x, y, index=index, **plan)
        return mixed, 1.5 * y - 0.5 * y[index]


class DropsSmallLabels(CutMix):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed, target * (target > 0.05)


class SharpensLabels(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed, target**2 / (target**2).sum(1, keepdim=True)


class GivesThePartnersShare(Mixup):
    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"lam": 1 - plan["mask"].flatten()}


class ForgetsTheClipping(CutMix):
    def plan(self, x, y, rng, *look):
        height, width = x.shape[-2:]
        lam = ops.beta(self.alpha, self.alpha, rng)
        mask = ops.box_mask(*ops.clipped_box(height, width, lam, rng), x)
        return {"index": ops.partners(x, rng), "mask": mask, "lam": ops.per_sample(lam, x)}


class FlipsImages(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return mixed.flip(3), target


class DoublesTheLoss(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return out._replace(loss=2 * out.loss)


class LogsWithAGraph(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return out._replace(logs={"mix": out.loss})


class LosesItself(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return Out.of(out.logits, out.target, out.plan, mix=out.logits.log())


class TurnsOnTraining(Mixup):
    def plan(self, x, y, rng, model=None, *look):
        model.eval()
        plan = super().plan(x, y, rng)
        model.train()
        return plan


class LeavesGradients(Mixup):
    def plan(self, x, y, rng, model=None, criterion=None):
        look = x.clone().requires_grad_()
        was = [(m, m.training) for m in model.modules()]
        model.eval()
        criterion(model(look), y).mean().backward()
        for module, training in was:
            module.training = training
        return super().plan(x, y, rng)


class LeavesAHook(Mixup):
    def plan(self, x, y, rng, model=None, *look):
        model.register_forward_hook(lambda *_: None)
        return super().plan(x, y, rng)


class LeavesAFlag(Mixup):
    def plan(self, x, y, rng, model=None, *look):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return super().plan(x, y, rng)


class LooksInTrainingMode(Mixup):
    def plan(self, x, y, rng, model=None, *look):
        with torch.no_grad():
            model(x)
        return super().plan(x, y, rng)


class ReadsLambda(Mixup):
    def mix(self, x, y, *, index, mask):
        return super().mix(x, y, index=index, mask=torch.full_like(mask, mask[0].item()))


class IndexesWithBooleans(Mixup):
    def mix(self, x, y, *, index, mask):
        mixed, target = super().mix(x, y, index=index, mask=mask)
        mixed[index == torch.arange(len(x), device=x.device)] *= 1
        return mixed, target


class PlansOnTheHost(Mixup):
    def plan(self, x, y, rng, *look):
        return super().plan(x, y, rng, *look) | {"index": torch.from_numpy(rng.permutation(len(x)))}


class CountsInAnAttribute(Mixup):
    steps = 0

    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan | {"mask": plan["mask"] / (1 + self.steps)}

    def after_step(self, model, progress):
        self.steps += 1


class FollowsTheLogits(Mixup):
    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return out._replace(target=out.target.to(out.logits.dtype))


class IdleParameters(Mixup):
    def setup(self, model):
        self.block = nn.Linear(2, 2)


class ParametersTimesZero(Mixup):
    def setup(self, model):
        self.block = nn.Linear(2, 2)

    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return Out.of(out.logits, out.target, out.plan, mix=out.loss, block=0 * self.block(x.new_ones(1, 2)))


class KeepsATensor(Mixup):
    def setup(self, model):
        self.table = torch.ones(3)


class HidesATeacher(Mixup):
    def setup(self, model):
        self.teachers = [nn.Linear(2, 2)]


class DrawsPartnersFirst(Mixup):
    def plan(self, x, y, rng, *look):
        index = ops.partners(x, rng)
        return super().plan(x, y, rng, *look) | {"index": index}


class BranchesOnTheSize(Mixup):
    def plan(self, x, y, rng, *look):
        plan = super().plan(x, y, rng, *look)
        return plan if len(x) > 3 else plan | {"lam": plan["mask"].flatten()}


class LambdaFollowsTheImages(Mixup):
    def plan(self, x, y, rng, *look):
        lam = ops.per_sample(rng.beta(1 + float(x.var()), 1), x)
        return {"index": ops.partners(x, rng), "mask": lam.view(-1, 1, 1, 1)}


class ClearsGradients(Mixup):
    def plan(self, x, y, rng, model=None, *look):
        model.zero_grad()
        return super().plan(x, y, rng)


# Which check catches it, and a part of what the check says.
BROKEN: list[tuple[type, str, str]] = [
    (HalvesItsArgument, "constructor_stores_arguments", "stored as it was given"),
    (ForgetsItsArgument, "constructor_stores_arguments", "no attribute ['strength']"),
    (BuildsInTheConstructor, "constructor_stores_arguments", "before setup(model)"),
    (DrawsInTheConstructor, "constructor_stores_arguments", "global generator of torch"),
    (PlansWithAGraph, "plan_is_plain_detached_data", "plan['mask'] detached"),
    (PlansAFunction, "plan_is_plain_detached_data", "plan['again'][0]; found function"),
    (LogsInThePlan, "plan_keys_are_mix_keywords", "note"),
    (LooksInSilence, "needs_is_true", "without more than needs='batch'"),
    (LooksIfItMay, "needs_is_true", "another one at [\"['mask']\"]"),
    (NeedsMore, "needs_is_true", "found 'everything'"),
    (DrawsFromElsewhere, "same_rng_same_plan", "equal plans from equal generators"),
    (IgnoresTheGenerator, "other_rng_other_plan", "five equal plans"),
    (MovesPython, "global_rng_untouched", "global generator of python"),
    (SeedsNumpy, "global_rng_untouched", "global generator of numpy"),
    (MovesTorch, "global_rng_untouched", "global generator of torch"),
    (WritesIntoTheBatch, "inputs_untouched", "changes in [\"['images']\"]"),
    (AsksForImageGradients, "inputs_untouched", "one on ['images']"),
    (ReturnsAnotherPlan, "replay_rebuilds_the_step", "the target of the step"),
    (DrawsInMix, "replay_rebuilds_the_step", "another result the second time"),
    (AnswersInFloat32, "shapes_dtypes_layout_kept", "torch.bfloat16"),
    (DropsChannelsLast, "shapes_dtypes_layout_kept", "memory format kept"),
    (SwapsHeightAndWidth, "shapes_dtypes_layout_kept", "found"),
    (PairsHalves, "shapes_dtypes_layout_kept", "shape '[2, -1]' is invalid"),
    (TakesAnyNumberType, "uint8_is_a_type_error", "uint8 images in mix; found no error"),
    (KeepsEverything, "it_mixes", "a changed pixel"),
    (KeepsTheLabel, "it_mixes", "a changed label"),
    (AddsLabels, "targets_stay_distributions", "rows of one-hot targets that sum to 1"),
    (Extrapolates, "targets_stay_distributions", "targets in [0, 1]"),
    (DropsSmallLabels, "targets_stay_distributions", "rows of smoothed targets that sum to 1"),
    (SharpensLabels, "targets_stay_distributions", "linear in y"),
    (GivesThePartnersShare, "label_share_is_pixel_share", "share of the pixels"),
    (ForgetsTheClipping, "label_share_is_pixel_share", "share of the pixels"),
    (FlipsImages, "identical_images_stay", "identical images and labels unchanged"),
    (DoublesTheLoss, "loss_is_sum_of_parts", "sum of its parts"),
    (LogsWithAGraph, "loss_is_sum_of_parts", "detached scalars"),
    (LosesItself, "loss_is_sum_of_parts", "finite scalar"),
    (TurnsOnTraining, "model_left_as_found", ".training"),
    (LeavesGradients, "model_left_as_found", ".grad"),
    (LeavesAHook, "model_left_as_found", "._forward_hooks"),
    (LeavesAFlag, "model_left_as_found", ".requires_grad"),
    (LooksInTrainingMode, "model_left_as_found", "running_mean"),
    (ReadsLambda, "no_device_read", "reads nothing back"),
    (IndexesWithBooleans, "no_device_read", "reads nothing back"),
    (PlansOnTheHost, "no_device_read", "others at [\"['index']\"]"),
    (CountsInAnAttribute, "resume", "after resuming"),
    (FollowsTheLogits, "autocast_bf16", "targets in torch.float32; found torch.bfloat16"),
    (IdleParameters, "gradient_reaches_every_parameter", "none at ['mixer.block.weight'"),
    (ParametersTimesZero, "gradient_reaches_every_parameter", "only 0"),
    (KeepsATensor, "moves_with_to", "mixer['table'] moved"),
    (HidesATeacher, "moves_with_to", "mixer['teachers'][0] moved"),
    (DrawsPartnersFirst, "accumulation_invariance", "whatever the batch size"),
    (BranchesOnTheSize, "accumulation_invariance", "the same branch"),
    (LambdaFollowsTheImages, "accumulation_invariance", "whatever the images"),
    (ClearsGradients, "accumulation_invariance", "gradient of the previous micro-batch"),
]

# Mistakes that touch one promise only: every other check lets them pass.
ALONE = [HalvesItsArgument, DropsChannelsLast, KeepsATensor, ReadsLambda]


@pytest.mark.parametrize(("broken", "check", "says"), BROKEN, ids=[row[0].__name__ for row in BROKEN])
def test_check_catches_the_mistake_and_says_what_it_is(broken: type, check: str, says: str) -> None:
    with pytest.raises(AssertionError) as caught:
        CHECKS[check](broken)
    message = str(caught.value)
    assert message.startswith(f"{check}: expected ")
    assert "; found " in message
    assert says in message


@pytest.mark.parametrize("broken", ALONE)
def test_other_checks_let_the_mistake_pass(broken: type) -> None:
    meant = {check for mixer, check, _ in BROKEN if mixer is broken}
    check_mixer(broken, skip=meant)


def test_every_check_has_a_mixer_that_it_catches() -> None:
    assert {check for _, check, _ in BROKEN} == set(CHECKS)


def test_every_broken_mixer_is_in_the_table() -> None:
    written = {v for v in globals().values() if isinstance(v, type) and v.__module__ == __name__}
    assert written == {broken for broken, _, _ in BROKEN}


def test_check_mixer_reports_every_failed_check_by_name() -> None:
    class Twice(KeepsTheLabel):
        def plan(self, x: Any, y: Any, rng: Any, *look: Any) -> Any:
            np.random.seed(0)
            return super().plan(x, y, rng, *look)

    with pytest.raises(AssertionError) as caught:
        check_mixer(Twice)
    named = {line.split(":")[0] for line in str(caught.value).splitlines()}
    assert {"it_mixes", "global_rng_untouched", "label_share_is_pixel_share"} <= named
    assert "resume" not in named


def test_check_mixer_refuses_to_skip_a_check_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="its_mixes"):
        check_mixer(Mixup, skip=["its_mixes"])
