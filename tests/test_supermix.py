"""SuperMix against its search by loops and autograd, its law, and what its masks are for."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from teachers import fill
from timm.models import create_model, save_for_hf
from torch import Tensor, nn

from mixers import Step, SuperMix
from mixers.supermix import masks
from mixers.testing import batch, rng_of, tiny_step


def slow_masks(logits: Tensor, height: int, width: int) -> Tensor:
    """One map for each of two images, of sum 1."""
    strength = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False).sigmoid()
    return strength / strength.sum(1, keepdim=True)


def slow_smooth(g: np.ndarray, sigma: float) -> np.ndarray:
    half = int(5 * sigma) // 2
    kernel = np.exp(-(np.arange(-half, half + 1.0) ** 2) / (2 * sigma**2))
    return ndimage.convolve(g, np.outer(kernel, kernel) / kernel.sum() ** 2, mode="constant")


def slow_search(mixer: SuperMix, teacher, x: Tensor, pair: tuple[int, int], lam: float) -> Tensor:
    """The mask of one sample alone, (2, 3, H, W) with its partner."""
    target = lam * torch.eye(5, dtype=x.dtype)[pair[0]] + (1 - lam) * torch.eye(5, dtype=x.dtype)[pair[1]]
    logits = torch.zeros(1, 2, mixer.grid, mixer.grid, dtype=x.dtype)
    for _ in range(mixer.steps):
        logits.requires_grad_()
        both = slow_masks(logits, *x.shape[2:])
        seen = teacher((both[0, :, None] * x).sum(0, keepdim=True))[0]
        log_p = seen.log_softmax(0)
        kl = sum(t * (math.log(t) - log_p[k]) for k, t in enumerate(target.tolist()) if t > 0)
        value = kl + mixer.sparsity * (both * (both - 1)).abs().mean()
        gradient = torch.autograd.grad(value, logits)[0].numpy()
        logits = logits.detach()
        if set(seen.topk(2).indices.tolist()) == set(pair):
            break
        smooth = np.stack([slow_smooth(g, mixer.sigma) for g in gradient[0]])[None]
        rate = abs(value.item()) / ((gradient * smooth).sum() + 1e-10)
        logits -= min(max(rate, 1e-4), 2000) * torch.from_numpy(smooth)
    return slow_masks(logits, *x.shape[2:])[0, 0]


@pytest.mark.parametrize("args", [{}, {"alpha": 2.0, "steps": 3, "grid": 6, "sigma": 1.0, "sparsity": 2.0}])
def test_the_masks_are_those_of_the_search_of_each_sample_alone(args):
    step, (x, y) = tiny_step(lambda: SuperMix(**args)).double(), batch(6, 32, 48)
    model, mixer, x = fill(step.model.eval()), step.mixer, x.double()
    y[2], y[3] = y[1], y[0]
    for update in range(2):
        plan, lam = mixer.plan(x, y, rng_of(update), model), rng_of(update).beta(mixer.alpha, mixer.alpha, 6)
        assert plan["index"].tolist() == [1, 2, 3, 4, 5, 0]
        for i, j in enumerate(plan["index"].tolist()):
            pair = int(y[i].argmax()), int(y[j].argmax())
            if pair[0] == pair[1]:
                assert plan["lam"][i] == 1 and (plan["mask"][i] == 1).all()
                continue
            assert plan["lam"][i].item() == pytest.approx(lam[i], abs=1e-7)
            mask = slow_search(mixer, model, x[[i, j]], pair, plan["lam"][i].item())
            torch.testing.assert_close(plan["mask"][i, 0], mask, atol=1e-6, rtol=1e-4)


def test_masks_are_halves_before_a_step_and_finite_for_huge_logits_and_pixels():
    assert torch.equal(masks(torch.zeros(2, 2, 4, 4), torch.zeros(2, 3, 8, 8)), torch.full((2, 1, 8, 8), 0.5))
    logits = torch.full((1, 2, 2, 2), -1e6)
    logits[0, 0, 0, 0] = -1e3
    assert masks(logits, torch.zeros(1, 3, 2, 2)).flatten().tolist() == [1.0, 0.5, 0.5, 0.5]
    step, (x, y) = tiny_step(SuperMix), batch()
    mask = step.mixer.plan(torch.full_like(x, 1e30), y, rng_of(0), step.model)["mask"]
    assert ((mask >= 0) & (mask <= 1)).all()  # not a number is neither


def test_the_search_finds_where_each_class_is():
    """Class 0 is in the left half of the first image, class 1 in the right half of the second, class 2 in the rest."""
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.zeros(2, 3, 16, 16), torch.eye(3)[:2]
    x[0, 0, :, :8] = x[0, 2, :, 8:] = x[1, 1, :, 8:] = x[1, 2, :, :8] = 12.0
    step = tiny_step(lambda: SuperMix(steps=10, grid=8, sigma=1.0))
    plan = step.mixer.plan(x, y, rng_of(0), teacher)
    left, right = plan["mask"][..., :8].mean((1, 2, 3)), plan["mask"][..., 8:].mean((1, 2, 3))
    assert left[0] > 0.6 > 0.4 > right[0] and right[1] > 0.6 > 0.4 > left[1]
    mixed, _ = step.mixer.mix(x, y, **plan)
    assert teacher(x).mean(0).argmax() == 2  # half and half: of neither class
    assert set(teacher(mixed).argsort(1)[:, 1:].flatten().tolist()) == {0, 1}


def test_a_teacher_is_asked_instead_of_the_model_and_one_of_other_classes_or_not_loaded_is_refused(tmp_path):
    torch.manual_seed(1)
    teacher = create_model("resnet10t", num_classes=5)
    save_for_hf(teacher, str(tmp_path), safe_serialization=True)
    step, (x, y) = tiny_step(lambda: SuperMix(teacher=str(tmp_path))), batch()
    plan = step(x, y, rng_of(0)).plan
    other = tiny_step(SuperMix).mixer.plan(x, y, rng_of(0), teacher.eval())
    torch.testing.assert_close(plan["mask"], other["mask"])
    assert not torch.allclose(plan["mask"], tiny_step(SuperMix)(x, y, rng_of(0)).plan["mask"], atol=1e-3)
    assert not [k for k in step.state_dict() if k.startswith("mixer")]
    mixer = SuperMix(teacher="resnet34.tv_in1k")
    with pytest.raises(ValueError, match=r"no teacher yet: setup\(model\) loads it"):
        mixer.plan(*batch(), rng_of(0), nn.Identity())
    with pytest.raises(ValueError, match=r"'resnet34.tv_in1k' knows 1000 classes, expected 5: take one that was train"):
        Step(create_model("test_resnet", num_classes=5), mixer, nn.CrossEntropyLoss())


def test_one_class_in_all_leaves_images_as_they_are_and_masks_are_alike_without_gradients_and_under_autocast():
    step, (x, y) = tiny_step(SuperMix, classes=1), (batch()[0], torch.ones(4, 1))
    assert torch.equal(step.mixer.mix(x, y, **step(x, y, rng_of(0)).plan)[0], x)
    step, (x, y) = tiny_step(lambda: SuperMix(steps=1)), batch(4, 64, 64)
    expected = step.mixer.plan(x, y, rng_of(0), step.model)["mask"]
    with torch.no_grad():
        assert torch.equal(step.mixer.plan(x, y, rng_of(0), step.model)["mask"], expected)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = step.mixer.plan(x, y, rng_of(0), step.model)["mask"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
