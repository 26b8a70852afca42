"""The formulas against slow, obvious loops over pixels, and against timm."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target
from torch import Tensor

from mixers import CutMix, Mixup, Switch, ops

SHAPE = (5, 3, 4, 6)
INDEX = [3, 1, 0, 4, 2]

# Rounding of one blend in each type, in units of values of size 1.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def slow_blend(x: Tensor, index: list[int], mask: Tensor) -> Tensor:
    """``mask*x + (1-mask)*x[index]`` in float64, one pixel at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    mask = mask.detach().double().expand(len(x), 1, *x.shape[2:])
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    m = mask[n, 0, i, j].item()
                    out[n, c, i, j] = m * x[n, c, i, j].item() + (1 - m) * x[index[n], c, i, j].item()
    return out


def slow_targets(y: Tensor, index: list[int], lam: list[float]) -> Tensor:
    out = torch.zeros(y.shape, dtype=torch.float64)
    for n in range(y.shape[0]):
        for k in range(y.shape[1]):
            out[n, k] = lam[n] * y[n, k].item() + (1 - lam[n]) * y[index[n], k].item()
    return out


def random_batch(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, SHAPE)).to(dtype).contiguous(memory_format=layout)
    y = torch.from_numpy(rng.dirichlet(np.ones(4), SHAPE[0]).astype(np.float32))
    return x, y


def random_mask(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).random(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask_shape", [(5, 1, 1, 1), (5, 1, 4, 6)], ids=["constant", "per pixel"])
@pytest.mark.parametrize("chunk", [1, 2 * 3 * 4 * 6, 2**17], ids=["a row a chunk", "three chunks", "one chunk"])
def test_blend_is_the_formula_for_every_pixel(dtype, layout, mask_shape, chunk, monkeypatch) -> None:
    monkeypatch.setattr(ops, "CPU_CHUNK", chunk)
    x, _ = random_batch(dtype, layout)
    mask = random_mask(*mask_shape)
    mixed = ops.blend(x, torch.tensor(INDEX), mask)
    torch.testing.assert_close(mixed.double(), slow_blend(x, INDEX, mask), atol=ROUNDING[dtype], rtol=0)
    assert mixed.is_contiguous(memory_format=layout)


def test_blend_in_chunks_equals_blend_with_gradient_bit_for_bit(monkeypatch) -> None:
    monkeypatch.setattr(ops, "CPU_CHUNK", 2 * 3 * 4 * 6)
    x, _ = random_batch()
    mask = random_mask(5, 1, 4, 6)
    whole = ops.blend(x, torch.tensor(INDEX), mask.clone().requires_grad_())
    assert torch.equal(ops.blend(x, torch.tensor(INDEX), mask), whole.detach())


def test_blend_works_on_hidden_features_of_any_rank() -> None:
    tokens = torch.from_numpy(np.random.default_rng(2).random((5, 7, 8), dtype=np.float32))
    lam = random_mask(5, 1, 1)
    expected = torch.stack([lam[n] * tokens[n] + (1 - lam[n]) * tokens[INDEX[n]] for n in range(5)])
    torch.testing.assert_close(ops.blend(tokens, torch.tensor(INDEX), lam), expected)


def test_gradient_of_the_mask_is_own_pixel_minus_partner_pixel() -> None:
    x, _ = random_batch()
    mask = random_mask(5, 1, 4, 6).requires_grad_()
    ops.blend(x, torch.tensor(INDEX), mask).sum().backward()
    torch.testing.assert_close(mask.grad, (x - x[INDEX]).sum(1, keepdim=True))


def test_gradient_of_the_images_arrives_at_own_and_partner_pixels() -> None:
    x, _ = random_batch()
    x.requires_grad_()
    mask = random_mask(5, 1, 4, 6)
    ops.blend(x, torch.tensor(INDEX), mask).sum().backward()
    expected = mask.clone()
    for n, partner in enumerate(INDEX):
        expected[partner] += 1 - mask[n]
    torch.testing.assert_close(x.grad, expected.expand(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blend_targets_is_the_formula_for_every_class(dtype: torch.dtype) -> None:
    _, y = random_batch()
    y = y.to(dtype)
    lam = random_mask(5)
    mixed = ops.blend_targets(y, torch.tensor(INDEX), lam)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), slow_targets(y, INDEX, lam.tolist()), atol=ROUNDING[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [Mixup, CutMix, lambda: Switch([Mixup(), CutMix()])], ids=["mixup", "cutmix", "switch"]
)
def test_mixers_do_what_their_plan_says(make, dtype: torch.dtype) -> None:
    mixer = make()
    x, y = random_batch(dtype)
    for i in range(6):
        plan = mixer.plan(x, y, np.random.default_rng((3, i)))
        mixed, target = mixer.mix(x, y, **plan)
        index, mask = plan["index"].tolist(), plan["mask"]
        torch.testing.assert_close(mixed.double(), slow_blend(x, index, mask), atol=ROUNDING[dtype], rtol=0)
        share = mask.expand(5, 1, 4, 6).mean((1, 2, 3)).tolist()
        torch.testing.assert_close(target.double(), slow_targets(y, index, share), atol=1e-6, rtol=0)


def test_cutmix_pastes_the_partner_and_nothing_else() -> None:
    x, y = random_batch()
    for i in range(6):
        plan = CutMix().plan(x, y, np.random.default_rng((4, i)))
        mixed, _ = CutMix().mix(x, y, **plan)
        own = plan["mask"].bool().expand(SHAPE)
        assert torch.equal(mixed[own], x[own])
        assert torch.equal(mixed[~own], x[plan["index"]][~own])


def test_mask_without_lambda_gives_its_mean_as_label_share() -> None:
    x, y = random_batch()
    mask = random_mask(5, 1, 4, 6)
    _, target = Mixup().mix(x, y, index=torch.tensor(INDEX), mask=mask)
    share = [mask[n].double().mean().item() for n in range(5)]
    torch.testing.assert_close(target.double(), slow_targets(y, INDEX, share), atol=1e-6, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.85, 1.0])
def test_mixup_equals_timm_for_the_same_lambda_and_partner(lam: float, monkeypatch) -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((4, 3, 8, 8), dtype=np.float32))
    labels = torch.tensor([0, 2, 1, 2])
    timm_mixup = TimmMixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(timm_mixup, "_params_per_batch", lambda: (lam, False))
    theirs, their_target = timm_mixup(x.clone(), labels)
    smoothed = mixup_target(labels, 3, lam=1.0, smoothing=0.1)
    partner = torch.arange(4).flip(0)
    ours, target = Mixup().mix(x, smoothed, index=partner, mask=torch.full((4, 1, 1, 1), lam))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(target, their_target, atol=1e-6, rtol=1e-6)
