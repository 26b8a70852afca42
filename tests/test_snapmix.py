"""SnapMix against its formula by loops: class activation maps, the pasted box, the loss with two weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_taps import CRITERION, FAMILIES, backbone, photos, state
from torch import Tensor, nn

from mixers import SnapMix, Vanilla, ops, taps
from mixers.snapmix import semantic_map
from mixers.testing import batch, differences, rng_of, tiny_step


def slow_map(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of a network whose head is pooling and a linear layer with bias: a 1x1 convolution, of which one class."""
    head = model.get_classifier()
    with torch.no_grad():
        feature = model.eval().forward_features(x)
        maps = F.conv2d(feature.relu(), head.weight[:, :, None, None], head.bias)
        own = torch.stack([maps[i, label] for i, label in enumerate(y.argmax(1).tolist())])
        cam = F.interpolate(own[:, None], x.shape[2:], mode="bilinear", align_corners=False)[:, 0].double()
    cam -= cam.amin((1, 2), keepdim=True)
    return cam / cam.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("name", ["resnet18", "resnext101_32x4d", "mobilenetv2_100", "resnet18_cifar"])
def test_the_map_is_the_published_one_where_features_are_not_negative(name: str) -> None:
    model, (x, y) = backbone(name), photos()
    head = model.get_classifier()
    head.bias.data.copy_(torch.linspace(-3, 3, 5))
    if name == "mobilenetv2_100":
        model.bn2.bias.data.fill_(0.5)
    found = semantic_map(model, x, 0.9 * y + 0.02)
    torch.testing.assert_close(found.double(), slow_map(model, x, y), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_look_leaves_no_trace_and_gives_distributions_of_the_own_class(name: str) -> None:
    model, (x, y) = backbone(name), photos()
    before = state(model)
    maps = semantic_map(model, x, y)
    assert not differences(before, state(model))
    assert maps.shape == (4, 64, 64) and (maps >= 0).all() and not maps.requires_grad
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
    alone = torch.cat([semantic_map(model, x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, maps, atol=1e-6, rtol=1e-3)
    assert not torch.allclose(semantic_map(model, x, y.roll(1, 1)), maps, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classifier_s_input_is_made_as_the_model_makes_it(name: str) -> None:
    """Of what the head itself pools, it gives the logits of the model."""
    model, (x, _) = backbone(name).eval(), photos()
    with torch.no_grad():
        feature = model.forward_features(x)
        vectors = taps.to_tokens(model, feature).mean(1)
        if feature.ndim == 3:
            vectors = feature[:, 0]  # the class token
        logits = model.get_classifier()(taps.before_classifier(model, vectors, feature))
        torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)


def test_a_map_without_contrast_counts_as_uniform() -> None:
    model, (x, y) = backbone("resnet18"), photos()
    nn.init.zeros_(model.get_classifier().weight)
    assert torch.equal(semantic_map(model, x, y), torch.full((4, 64, 64), 1 / 4096))


@pytest.mark.parametrize(("alpha", "twice"), [(5.0, False), (4.0, True)])
def test_a_step_is_the_formula(alpha: float, twice: bool) -> None:
    for index in range(4):
        step = tiny_step(lambda: SnapMix(alpha, same_label_twice=twice))
        step.train()
        model = tiny_step(Vanilla).model
        x, _ = batch(4, 32, 48, seed=index)
        labels = [0, 1, 0, 3]
        y = torch.eye(5)[labels] * 0.9 + 0.02
        rng = rng_of(index)
        lams = [rng.beta(alpha, alpha) for _ in range(2)]
        boxes = [ops.clipped_box(32, 48, lam, rng) for lam in lams]
        partner = rng.permutation(4).tolist()
        (top, bottom, left, right), (t, b, l, r) = boxes  # noqa: E741
        maps = slow_map(model, x, y)
        model.train()
        mixed, losses, height, width = x.clone(), [], bottom - top, right - left
        for u, v in np.ndindex(height, width):
            p = t + u * (b - t - 1) / (height - 1)
            q = l + v * (r - l - 1) / (width - 1)
            rows, columns = ((int(at), min(int(at) + 1, last - 1), at % 1) for at, last in ((p, b), (q, r)))
            pairs = [((m, 1 - part), (n, part)) for m, n, part in (rows, columns)]
            pixels = sum(e * f * x[:, :, k, o] for k, e in pairs[0] for o, f in pairs[1])
            mixed[:, :, top + u, left + v] = pixels[partner]
        z = model(mixed)
        for i, j in enumerate(partner):
            own, other = 1 - maps[i, top:bottom, left:right].sum().item(), maps[j, t:b, l:r].sum().item()
            if twice and labels[i] == labels[j]:
                own, other = own + other, other + own
            losses.append(own * CRITERION(z[i], y[i]) + other * CRITERION(z[i], y[j]))
        out = step(x, y, rng_of(index))
        torch.testing.assert_close(step.mixer.mix(x, y, **out.plan)[0], mixed, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.target.sum(1), torch.ones(4))
        assert out.plan["index"].tolist() == partner


@pytest.mark.parametrize("which", [0, 1])
def test_an_empty_box_is_plain_training(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [(3, 9, 4, 8), (3, 9, 4, 8)]
    boxes[which] = (3, 9, 4, 4)
    given = iter(boxes)
    monkeypatch.setattr(ops, "clipped_box", lambda *_: next(given))
    x, y = batch()
    out = tiny_step(SnapMix)(x, y, rng_of(0))
    assert out.loss.item() == tiny_step(Vanilla)(x, y, rng_of(0)).loss.item()
    assert torch.equal(out.target, y)


def test_a_label_that_nothing_is_seen_of_has_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The box covers all of a sample's class, the source shows none of the partner's."""
    boxes = iter([(0, 16, 0, 32), (16, 32, 0, 32)])
    monkeypatch.setattr(ops, "clipped_box", lambda *_: next(boxes))
    maps = torch.zeros(4, 32, 32)
    maps[:, :16] = 1 / 512
    monkeypatch.setattr("mixers.snapmix.semantic_map", lambda *_: maps)
    out = tiny_step(SnapMix)(*batch(), rng_of(0))
    assert (out.plan["weight"] == 0).all() and out.loss == 0
    assert out.target.isfinite().all()
