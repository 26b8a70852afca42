"""Focal and asymmetric loss: their formulas for mixed labels, what they become without their powers, every mixer."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixers import MIXERS, Step, build
from mixers.testing import batch, rng_of, tiny_step
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training.losses import asymmetric, focal
from mixup_recipes.training.update import criterion
from mixup_recipes.typed import UserError

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])


def recipe(**changes: Any) -> Recipe:
    return changed(Recipe(dataset="none", model="test_resnet", num_classes=5), **changes)


def slow_focal(z: list[float], y: list[float], w: list[float], gamma: float = 2.0) -> float:
    p = [math.exp(v) / sum(map(math.exp, z)) for v in z]
    return sum(-c * t * (1 - q) ** gamma * math.log(q) for c, t, q in zip(w, y, p, strict=True))


def slow_asymmetric(z, y, w, neg: float = 4.0, pos: float = 1.0, clip: float = 0.05) -> float:
    total = 0.0
    for c, t, v in zip(w, y, z, strict=True):
        p = 1 / (1 + math.exp(-v))
        q = max(p - clip, 0)
        total -= c * t * (1 - p) ** pos * math.log(p) + (1 - t) * q**neg * math.log(1 - q)
    return total


def mixed_and_several() -> tuple[Tensor, Tensor]:
    """Logits and targets (8, 5): one label, mixed ones, several labels, none."""
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.dirichlet(np.ones(5), 8)).float()
    target[:3] = torch.tensor([[0, 1.0, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    return torch.from_numpy(rng.normal(0, 3, (8, 5))).float(), target


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({"loss": "focal"}, slow_focal),
        ({"loss": "focal", "focal_gamma": 0.5}, lambda z, y, w: slow_focal(z, y, w, 0.5)),
        ({"loss": "asymmetric"}, slow_asymmetric),
        (
            {"loss": "asymmetric", "asl_gamma_neg": 0.5, "asl_gamma_pos": 2, "asl_clip": 0, "bce_target_thresh": 0.2},
            lambda z, y, w: slow_asymmetric(z, [float(t > 0.2) for t in y], w, 0.5, 2.0, 0.0),
        ),
    ],
)
def test_a_loss_is_its_formula_one_number_per_sample_with_and_without_weights(changes, formula):
    logits, target = mixed_and_several()
    for weights in (None, WEIGHTS):
        loss, w = criterion(recipe(**changes), weights), [1.0] * 5 if weights is None else weights.tolist()
        found = loss(logits, target)
        expected = [formula(z, y, w) for z, y in zip(logits.tolist(), target.tolist(), strict=True)]
        assert found.shape == (8,) and found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert loss(logits.bfloat16(), target).dtype == torch.float32


def test_without_powers_and_margin_they_are_cross_entropy_and_its_binary_form_and_so_are_their_slopes():
    logits, target = mixed_and_several()
    for weights in (None, WEIGHTS):
        pairs = [
            (focal(z := logits.clone().requires_grad_(), target, weights, 0.0), z, criterion(recipe(), weights)),
            (
                asymmetric(z := logits.clone().requires_grad_(), target, weights, 0.0, 0.0, 0.0),
                z,
                criterion(recipe(loss="bce_sum"), weights),
            ),
        ]
        for found, z, plain in pairs:
            expected = plain(own := logits.clone().requires_grad_(), target)
            torch.testing.assert_close(found, expected)
            found.sum().backward(), expected.sum().backward()
            torch.testing.assert_close(z.grad, own.grad)


def test_losses_and_slopes_are_finite_for_sure_predictions_whatever_the_power():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    for gamma in (0.0, 0.01, 0.5, 2.0):
        for clip in (0.0, 1e-12, 0.05, 1.0):
            logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-90.0, 0.0]], requires_grad=True)
            loss = focal(logits, target, None, gamma) + asymmetric(logits, target, None, gamma, gamma, clip)
            loss.sum().backward()
            assert loss.isfinite().all() and logits.grad.isfinite().all(), (gamma, clip)


@pytest.mark.parametrize("loss", ["focal", "asymmetric"])
def test_every_mixer_takes_a_step_with_it(loss):
    x, y = batch(4)
    for mixer in MIXERS:
        step = Step(tiny_step(lambda mixer=mixer: build(mixer)).model, build(mixer), criterion(recipe(loss=loss)))
        out = step(x, y, rng_of(0))
        out.loss.backward()
        grads = [p.grad for p in step.model.parameters() if p.grad is not None]
        assert out.loss.isfinite() and grads and all(g.isfinite().all() for g in grads), mixer


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"focal_gamma": 2.0}, "focal_gamma needs loss focal, got ce"),
        ({"loss": "focal", "asl_clip": 0.1}, "asl_clip needs loss asymmetric, got focal"),
        ({"loss": "focal", "bce_target_thresh": 0.1}, "bce_target_thresh needs loss bce_mean, bce_sum or asymmetric"),
        ({"loss": "focal", "multi_label": True}, "multi_label needs loss bce_mean, bce_sum or asymmetric, got focal"),
        ({"loss": "asymmetric", "asl_clip": 1.5}, "asl_clip: expected a number at least 0 and at most 1 or none"),
        ({"loss": "asymetric"}, "loss: .* did you mean 'asymmetric'"),
    ],
)
def test_what_belongs_to_another_loss_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        recipe(**fields)


def test_several_labels_may_have_the_asymmetric_loss_and_probabilities_stay_those_of_a_sigmoid():
    own = recipe(multi_label=True, loss="asymmetric", asl_gamma_pos=0.0)
    logits, target = mixed_and_several()
    assert criterion(own)(logits, target).shape == (8,)
    perfect = criterion(own)(torch.where(target > 0.5, 30.0, -30.0), (target > 0.5).float())
    assert perfect.max() < 1e-6 and F.binary_cross_entropy_with_logits(logits, target) > 0.1
