"""HMix, GMix, RegMixup and LUMix against loops written from their definitions."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import CutMix, GMix, HMix, LUMix, Mixer, Mixup, RegMixup, ResizeMix, Switch, Vanilla, ops
from mixers.base import Plan
from mixers.testing import batch, differences, rng_of, tiny_step

SIDES = pytest.mark.parametrize(("height", "width"), [(8, 12), (13, 7), (1, 6)])


def planned(mixer: Mixer, height: int, width: int, seed: int) -> tuple[np.ndarray, float]:
    """The mask of a batch of two, which is the same for both, and the label share."""
    plan = mixer.plan(torch.zeros(2, 3, height, width), torch.eye(2), np.random.default_rng((7, seed)))
    first, second = plan["mask"].expand(2, 1, height, width)[:, 0].numpy()
    assert np.array_equal(first, second) and plan["lam"][0] == plan["lam"][1]
    return first, plan["lam"][0].item()


@SIDES
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
def test_hmix_mask_is_a_box_of_the_partner_in_a_blend_whose_mean_is_the_drawn_share(height, width, r):
    for i in range(40):
        rng = np.random.default_rng((7, i))
        lam, row, column = rng.beta(1.0, 1.0), rng.integers(height), rng.integers(width)
        half_height, half_width = (math.floor(side * math.sqrt(r * (1 - lam))) // 2 for side in (height, width))
        inside = np.zeros((height, width), bool)
        for y, x in itertools.product(range(height), range(width)):
            inside[y, x] = -half_height <= y - row < half_height and -half_width <= x - column < half_width
        mask, share = planned(HMix(1.0, r), height, width, i)
        expected = np.where(inside, 0.0, lam / (1 - inside.mean()))
        assert mask == pytest.approx(expected, abs=1e-6) and (r > 0 or not inside.any())
        assert share == pytest.approx(lam) and mask.mean() == pytest.approx(lam, abs=1e-6)


@SIDES
def test_gmix_mask_is_a_gaussian_around_the_smaller_share_and_its_mean_the_label_share(height, width):
    halves = set()
    for i in range(40):
        rng = np.random.default_rng((7, i))
        lam, row, column = rng.beta(1.0, 1.0), rng.integers(height), rng.integers(width)
        blob = np.zeros((height, width))
        for y, x in itertools.product(range(height), range(width)):
            away = (y - row) ** 2 + (x - column) ** 2
            blob[y, x] = math.exp(-math.pi * away / (min(lam, 1 - lam) * height * width))
        mask, share = planned(GMix(), height, width, i)
        expected = blob if lam < 0.5 else 1 - blob
        assert mask == pytest.approx(expected, abs=1e-6) and share == pytest.approx(expected.mean(), abs=1e-6)
        halves.add(lam < 0.5)
    assert halves == {False, True}


@pytest.mark.parametrize("covers", [False, True])
@pytest.mark.parametrize("mixer", [HMix(), HMix(r=1.0), GMix(), RegMixup()], ids=str)
def test_a_share_of_0_or_1_is_one_image_bit_for_bit(mixer, covers, monkeypatch):
    """Where a box goes over the border some of the image is around it; one that ``covers`` all leaves nothing."""
    if covers:
        monkeypatch.setattr(ops, "half_sides", lambda height, width, lam: (0, 0) if lam == 1 else (height, width))
    x, y = batch(5)
    for lam in (0.0, 1.0):
        monkeypatch.setattr(ops, "beta", lambda *_, lam=lam: lam)
        plan = mixer.plan(x, y, rng_of(0))
        kept = slice(None) if lam else plan["index"]
        assert not differences(mixer.mix(x, y, **plan), (x[kept], y[kept]))


def cross_entropy(logits: Tensor, target: Tensor) -> float:
    """The mean over samples, in Python floats, of the sum over classes."""
    losses = []
    for row, wanted in zip(logits.double().tolist(), target.double().tolist(), strict=True):
        total = math.log(sum(math.exp(z) for z in row))
        losses.append(sum(t * (total - z) for z, t in zip(row, wanted, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("size", [4, 3, 1])
@pytest.mark.parametrize(("eta", "averaged"), [(1.0, False), (0.3, False), (0.3, True), (0.0, False)])
def test_a_step_of_regmixup_is_the_loss_of_both_batches_seen_as_one(size, eta, averaged):
    step = tiny_step(lambda: RegMixup(2.0, eta, averaged))
    x, y = batch(size, 64, 64)
    y = 0.9 * y + 0.02
    twin = copy.deepcopy(step.model)
    out = step(x, y, rng_of(3))
    rng = rng_of(3)
    lam, index = rng.beta(2.0, 2.0), rng.permutation(size).tolist()
    mixed = torch.stack([lam * x[i] + (1 - lam) * x[j] for i, j in enumerate(index)])
    target = torch.stack([lam * y[i] + (1 - lam) * y[j] for i, j in enumerate(index)])
    said = twin(torch.cat([x, mixed]))
    torch.testing.assert_close((out.logits, out.target), (said[size:], target), rtol=1e-4, atol=1e-5)
    clean, of_mixed = cross_entropy(said[:size], y), cross_entropy(said[size:], target)
    divided = 1 + eta if averaged else 1
    assert out.loss.item() == pytest.approx((clean + eta * of_mixed) / divided, rel=1e-4)
    logs = {"clean": clean / divided, "mix": eta * of_mixed / divided}
    assert {name: part.item() for name, part in out.logs.items()} == pytest.approx(logs, rel=1e-4, abs=1e-7)
    seen = dict(twin.named_buffers())  # BatchNorm's statistics, of both batches, moved once
    assert all(torch.allclose(b, seen[n], rtol=1e-4, atol=1e-6) for n, b in step.model.named_buffers())


def test_regmixup_averaged_is_the_mean_over_a_batch_of_twice_the_size_as_its_code_has_it():
    step = tiny_step(lambda: RegMixup(averaged=True))
    x, y = batch()
    twin = copy.deepcopy(step.model)
    out = step(x, y, rng_of(0))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    loss = F.cross_entropy(twin(torch.cat([x, mixed])), torch.cat([y, target]))
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward(), loss.backward()
    for ours, theirs in zip(step.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert tiny_step(RegMixup)(x, y, rng_of(0)).loss.item() == pytest.approx(2 * out.loss.item(), rel=1e-5)


def inmost(plan: Plan) -> Plan:
    """That of the member that was chosen in a switch of switches."""
    return inmost(plan["inner"]) if "inner" in plan else plan


@pytest.mark.parametrize("base", [CutMix, lambda: Mixup(0.8), lambda: Switch([Mixup(), Switch([GMix()])])])
@pytest.mark.parametrize(("predicted", "noise", "alpha"), [(0.4, 0.1, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_of_lumix_perturbs_the_share_by_the_prediction_and_a_draw(base, predicted, noise, alpha, smoothing):
    x, y = batch()
    y = y * (1 - smoothing) + smoothing / y.shape[1]
    for update in range(3):
        out = tiny_step(lambda: LUMix(base(), predicted, noise, alpha))(x, y, rng_of(update))
        rng = rng_of(update)
        drawn = rng.beta(alpha, alpha)
        plan, found = (inmost(p) for p in (base().plan(x, y, rng), out.plan))
        assert torch.equal(plan["index"], found["index"]) and torch.equal(plan["mask"], found["mask"])
        for i, j in enumerate(plan["index"].tolist()):
            weights = [math.exp(z) for z in out.logits[i].double().tolist()]
            own, partner = (sum(w * t for w, t in zip(weights, y[k].tolist(), strict=True)) for k in (i, j))
            area = plan["mask"][i].double().mean().item()
            lam = (1 - predicted - noise) * area + predicted * own / (own + partner) + noise * drawn
            lam = area if area in (0, 1) else lam
            assert found["lam"][i].item() == pytest.approx(lam, abs=1e-5)
            torch.testing.assert_close(out.target[i], lam * y[i] + (1 - lam) * y[j], rtol=0, atol=1e-5)
        assert out.loss.item() == pytest.approx(cross_entropy(out.logits, out.target), rel=1e-4)


def test_lumix_without_weights_is_the_base_and_its_label_has_no_gradient():
    x, y = batch()
    rng = rng_of(0)
    rng.beta(1.0, 1.0)  # lam_r, which is drawn first
    plain = tiny_step(CutMix)(x, y, rng)
    step = tiny_step(lambda: LUMix(CutMix(), 0.0, 0.0))
    out = step(x, y, rng_of(0))
    assert out.loss.item() == plain.loss.item() and torch.equal(out.target, plain.target)
    assert not tiny_step(lambda: LUMix(CutMix(), 1.0, 0.0))(x, y, rng_of(0)).target.requires_grad


class Sure(nn.Module):
    """Says one class of every image, so surely that the others have no probability in 32 bits."""

    def __init__(self, said: int):
        super().__init__()
        self.logits = nn.Parameter(1e4 * F.one_hot(torch.tensor([said]), 5).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 5)


def test_lumix_keeps_the_share_of_the_area_where_the_model_gives_neither_class_any_probability():
    x, y = batch()  # classes 0 to 3
    mixer = LUMix(Mixup(), 1.0, 0.0)
    for said in range(5):
        out = mixer(Sure(said), nn.CrossEntropyLoss(reduction="none"), x, y, rng_of(1))
        lam, index = out.plan["mask"][:, 0, 0, 0], out.plan["index"].tolist()
        for i, j in enumerate(index):
            known = {i: 1.0, j: 0.0}.get(said, lam[i].item())
            assert out.plan["lam"][i].item() == pytest.approx(0.5 if i == j == said else known)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lumix_is_certain_of_an_image_that_is_alone(lam, monkeypatch):
    monkeypatch.setattr(ops, "beta", lambda *_: lam)
    x, y = batch()
    out = tiny_step(lambda: LUMix(Mixup(), 0.5, 0.5))(x, y, rng_of(0))
    assert torch.equal(out.target, y if lam else y[out.plan["index"]])


def test_lumix_leaves_a_batch_that_its_base_does_not_mix_and_refuses_a_base_that_moves_pixels_in_the_first_step():
    x, y = batch()
    out = tiny_step(lambda: LUMix(Switch([Vanilla()])))(x, y, rng_of(0))
    assert torch.equal(out.target, y) and out.loss.item() == tiny_step(Vanilla)(x, y, rng_of(0)).loss.item()
    with pytest.raises(ValueError, match=r"a base whose plan has index and mask, got \['index', 'box'\]; use CutMix"):
        tiny_step(lambda: LUMix(ResizeMix()))(x, y, rng_of(0))
