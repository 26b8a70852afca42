"""GuidedMixup, Saliency Grafting and SnapMix against their formulas by loops, and images or maps without content."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy import ndimage
from small_models import CRITERION, FAMILIES, backbone, photos, state
from torch import Tensor, nn

from mixers import Grafting, GuidedMix, SnapMix, Vanilla, build, ops, taps
from mixers.guidedmix import farthest_partners, spectral_residual
from mixers.snapmix import semantic_map
from mixers.testing import batch, differences, rng_of, tiny_step


def slow_partners(vectors: np.ndarray) -> list[int]:
    """The farthest pair first, then always the farthest of those left, and back to the first."""
    size = len(vectors)
    distance = [[math.dist(a, b) for b in vectors] for a in vectors]
    _, first, second = max((distance[i][j], -i, -j) for i in range(size) for j in range(size) if i != j)
    cycle = [-first, -second]
    while len(cycle) < size:
        left = [i for i in range(size) if i not in cycle]
        cycle.append(max(left, key=lambda i: distance[cycle[-1]][i]))
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [following[i] for i in range(size)]


def test_partners_of_guidedmix_are_the_greedy_chain_of_farthest_ones():
    for size in (2, 3, 7, 16, 33):
        for seed in range(5):
            vectors = np.random.default_rng(seed).random((size, 40))
            assert farthest_partners(torch.from_numpy(vectors)).tolist() == slow_partners(vectors)
        for dull in (torch.zeros(size, 3), torch.full((size, 3), math.nan)):  # without any distance
            index, cycle = farthest_partners(dull).tolist(), [0]
            while len(cycle) < size:
                cycle.append(index[cycle[-1]])
            assert sorted(cycle) == list(range(size)) and index[cycle[-1]] == 0  # nobody is his own partner
    assert farthest_partners(torch.zeros(1, 3)).tolist() == [0]


def smoothed(saliency: np.ndarray) -> np.ndarray:
    """By the Gaussian of 7 x 7 and standard deviation 3."""
    kernel = np.exp(-(np.arange(-3, 4) ** 2) / 18)
    return ndimage.convolve(saliency, np.outer(kernel, kernel) / kernel.sum() ** 2, mode="mirror")


def slow_residual(grey: np.ndarray) -> np.ndarray:
    """Hou and Zhang: back from log amplitude less its 3 x 3 mean, and the phase; the authors of GuidedMixup smooth."""
    spectrum = np.fft.fft2(grey)
    log_amplitude = np.log(np.abs(spectrum))
    mean = ndimage.uniform_filter(log_amplitude, 3, mode="nearest")
    return smoothed(np.abs(np.fft.ifft2(np.exp(log_amplitude - mean + 1j * np.angle(spectrum)))))


def test_spectral_residual_is_the_published_one_and_large_images_are_looked_at_in_128_pixels():
    for height, width in ((32, 32), (48, 33), (16, 100)):
        x, _ = batch(3, height, width)
        grey = torch.einsum("bchw,c->bhw", x.double(), torch.tensor([0.299, 0.587, 0.114]).double()).numpy()
        expected = np.stack([slow_residual(image) for image in grey])
        np.testing.assert_allclose(spectral_residual(x).numpy(), expected, rtol=2e-3, atol=1e-6)
    x, _ = batch(2, 224, 224)
    small = spectral_residual(TF.resize(x, [128, 128]))
    torch.testing.assert_close(spectral_residual(x), TF.resize(small, [224, 224]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("source", ["spectral", "gradient"])
def test_guidedmix_mixes_pixels_by_the_saliency_of_both(source):
    model, (x, y), mixer = backbone("resnet18").eval(), batch(5, 40, 56), GuidedMix(source)
    if source == "spectral":
        maps = spectral_residual(x).double().numpy()
    else:
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(CRITERION(model(images), y).sum(), images)
        maps = gradient.double().square().mean(1).sqrt().numpy()
    maps = np.stack([smoothed(s) for s in maps])
    maps /= maps.sum((1, 2), keepdims=True)
    assert mixer.needs == ("batch" if source == "spectral" else "model")
    plan = mixer.plan(x, y, rng_of(0), *(() if source == "spectral" else (model, CRITERION)))
    index = slow_partners(maps.reshape(5, -1))
    assert plan["index"].tolist() == index
    both = maps + maps[index]
    own = torch.from_numpy(np.divide(maps, both, out=np.full_like(both, 0.5), where=both > 0)).float()[:, None]
    lam = own.mean((1, 2, 3))[:, None]
    mixed, target = mixer.mix(x, y, **plan)
    torch.testing.assert_close(plan["mask"], own, atol=1e-4, rtol=1e-7)
    torch.testing.assert_close(mixed, own * x + (1 - own) * x[index], atol=1e-3, rtol=0)
    torch.testing.assert_close(target, lam * y + (1 - lam) * y[index], atol=1e-4, rtol=0)


def test_for_guidedmix_all_is_salient_alike_without_contrast_or_gradient():
    mixer, (x, y) = GuidedMix(), batch(4)
    flat = torch.tensor([-2.0, 0.0, 0.5, 2.0])[:, None, None, None].expand(4, 3, 32, 32).contiguous()
    torch.testing.assert_close(spectral_residual(flat), torch.ones(4, 32, 32))
    torch.testing.assert_close(mixer.plan(flat, y, rng_of(0))["mask"], torch.full((4, 1, 32, 32), 0.5))
    x[0] = 0.7
    assert mixer.plan(x, y, rng_of(0))["mask"].isfinite().all()
    model, (x, y) = backbone("resnet18"), photos()
    nn.init.zeros_(model.get_classifier().weight)
    mask = GuidedMix("gradient").plan(x, y, rng_of(0), model, CRITERION)["mask"]
    torch.testing.assert_close(mask, torch.full_like(mask, 0.5))


def test_the_published_share_of_batches_is_mixed_and_small_images_or_models_without_features_are_refused():
    """By a switch, whose law ``test_laws.py`` proves."""
    for args, share in (({}, 0.5), ({"source": "gradient"}, 0.8), ({"share": 0.3}, 0.3)):
        assert build("guidedmix", **args).probs == pytest.approx([1 - share, share])
    for source in ("spectral", "gradient"):
        with pytest.raises(ValueError, match="GuidedMix needs sides of at least 4 pixels, got 3 x 8"):
            GuidedMix(source).plan(torch.rand(2, 3, 3, 8), torch.eye(2), rng_of(0))
    with pytest.raises(ValueError, match="needs a look at the model"):
        GuidedMix("gradient").plan(*batch(), rng_of(0))
    with pytest.raises(ValueError, match=r"Sequential has no forward_features.*resnet50"):
        Grafting().plan(*batch(), rng_of(0), nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), CRITERION)


@pytest.mark.parametrize("args", [{}, {"grid": 4}, {"label_norm": 1, "temperature": 0.5}, {"sigma": 1.5, "alpha": 0.7}])
@pytest.mark.parametrize("source", ["activation", "gradient"])
def test_a_plan_of_grafting_is_the_formula(source, args):
    mixer, model, (x, y) = Grafting(source=source, **args), backbone("resnet18").eval(), batch(4, 128, 192)
    images = x.clone().requires_grad_()
    feature = model.forward_features(images)
    raw = feature.detach().abs().mean(1)
    if source == "gradient":
        raw = torch.autograd.grad(CRITERION(model(images), y).sum(), images)[0].square().mean(1).sqrt()
    rows, columns = (args["grid"],) * 2 if "grid" in args else feature.shape[2:]
    maps, (height, width) = np.zeros((4, rows, columns)), raw.shape[1:]
    for r, c in np.ndindex(rows, columns):
        down = slice(r * height // rows, -(-(r + 1) * height // rows))
        along = slice(c * width // columns, -(-(c + 1) * width // columns))
        maps[:, r, c] = raw[:, down, along].double().mean((1, 2))
    maps /= maps.max((1, 2), keepdims=True)
    for update in range(3):
        plan, rng = mixer.plan(x, y, rng_of(update), model, CRITERION), rng_of(update)
        p, index = rng.beta(mixer.alpha, mixer.alpha), rng.permutation(4)
        drawn = rng.random((4, rows, columns)) < p
        assert plan["index"].tolist() == index.tolist()
        for i, j in enumerate(index):
            weight = np.exp(maps[i] / mixer.temperature)
            mask = (weight / weight.sum() >= mixer.sigma / weight.size - 1e-9) * drawn[i]
            pixels = np.kron(mask, np.ones((128 // rows, 192 // columns)))
            assert np.array_equal(plan["mask"][i, 0].numpy(), pixels)
            a, b = (np.linalg.norm((m * shown).ravel(), mixer.label_norm) / np.linalg.norm(m.ravel(), mixer.label_norm)
                    for m, shown in ((maps[i], mask), (maps[j], 1 - mask)))  # fmt: skip
            assert plan["lam"][i].item() == pytest.approx(a / (a + b), abs=1e-5)


def test_label_and_mask_of_grafting_agree_at_both_ends(monkeypatch):
    mixer, (x, y), counts = Grafting(sigma=0.0), batch(4), torch.zeros(3)
    maps = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)) + 0.01
    monkeypatch.setattr(mixer, "saliency", lambda *_: maps)
    for update in range(300):
        plan = mixer.plan(x, y, rng_of(update), nn.Identity(), CRITERION)
        share, lam = plan["mask"].mean((1, 2, 3)), plan["lam"]
        assert ((lam >= 0) & (lam <= 1)).all()
        assert torch.equal(share == 0, lam == 0) and torch.equal(share == 1, lam == 1)
        counts += torch.stack([share == 0, share == 1, (share - lam).abs() > 0.01]).sum(1)
    assert counts.min() > 20  # label share is not pixel share


def test_even_maps_and_maps_without_saliency_let_every_cell_be_grafted(monkeypatch):
    mixer, model, (x, y) = Grafting(), backbone("resnet18"), photos()
    assert all(mixer.candidates(torch.ones(2, side, side)).all() for side in (2, 7, 14, 28))
    nn.init.zeros_(model.get_classifier().weight)  # a loss without a gradient
    assert torch.equal(Grafting(source="gradient").saliency(model, CRITERION, x, y), torch.ones(4, 2, 2))
    for value in (0.0, math.nan, math.inf):
        monkeypatch.setattr(model, "forward_features", lambda x, value=value: torch.full((4, 6, 2, 2), value))
        assert torch.equal(mixer.saliency(model, CRITERION, x, y), torch.ones(4, 2, 2))
        assert mixer.plan(x, y, rng_of(0), model, CRITERION)["lam"].isfinite().all()


def slow_map(model, x: Tensor, y: Tensor) -> Tensor:
    """Of a network whose head is pooling and a linear layer with bias: a 1x1 convolution, of which one class."""
    head = model.get_classifier()
    with torch.no_grad():
        maps = F.conv2d(model.eval().forward_features(x).relu(), head.weight[:, :, None, None], head.bias)
        own = maps[range(len(x)), y.argmax(1)][:, None]
        cam = F.interpolate(own, x.shape[2:], mode="bilinear", align_corners=False)[:, 0].double()
    cam -= cam.amin((1, 2), keepdim=True)
    return cam / cam.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("name", ["resnet18", "resnext101_32x4d", "mobilenetv2_100", "resnet18_cifar"])
def test_the_map_of_snapmix_is_the_published_one_where_features_are_not_negative_and_uniform_without_contrast(name):
    model, (x, y) = backbone(name), photos()
    model.get_classifier().bias.data.copy_(torch.linspace(-3, 3, 5))
    if name == "mobilenetv2_100":
        model.bn2.bias.data.fill_(0.5)
    found = semantic_map(model, x, 0.9 * y + 0.02)
    torch.testing.assert_close(found.double(), slow_map(model, x, y), atol=1e-6, rtol=1e-3)
    nn.init.zeros_(model.get_classifier().weight)
    assert torch.equal(semantic_map(model, x, y), torch.full((4, 64, 64), 1 / 4096))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_look_leaves_no_trace_and_gives_distributions_of_the_own_class_made_as_the_model_makes_it(name):
    model, (x, y) = backbone(name), photos()
    before, maps = state(model), semantic_map(model, x, y)
    assert not differences(before, state(model))
    assert maps.shape == (4, 64, 64) and (maps >= 0).all() and not maps.requires_grad
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
    alone = torch.cat([semantic_map(model, x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, maps, atol=1e-6, rtol=1e-3)
    assert not torch.allclose(semantic_map(model, x, y.roll(1, 1)), maps, atol=1e-6)
    with torch.no_grad():  # of what the head itself pools, the classifier's input gives the logits of the model
        feature = model.eval().forward_features(x)
        vectors = feature[:, 0] if feature.ndim == 3 else taps.to_tokens(model, feature).mean(1)
        logits = model.get_classifier()(taps.before_classifier(model, vectors, feature))
        torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "twice"), [(5.0, False), (4.0, True)])
def test_a_step_of_snapmix_is_the_formula(alpha, twice):
    for index in range(4):
        step, model = tiny_step(lambda: SnapMix(alpha, same_label_twice=twice)), tiny_step(Vanilla).model
        (x, _), labels = batch(4, 32, 48, seed=index), [0, 1, 0, 3]
        y, rng = torch.eye(5)[labels] * 0.9 + 0.02, rng_of(index)
        lams = [rng.beta(alpha, alpha) for _ in range(2)]
        (top, bottom, left, right), (t, b, l, r) = (ops.clipped_box(32, 48, lam, rng) for lam in lams)  # noqa: E741
        partner, maps = rng.permutation(4).tolist(), slow_map(model, x, y)
        mixed, losses, height, width = x.clone(), [], bottom - top, right - left
        for u, v in np.ndindex(height, width):
            places = (t + u * (b - t - 1) / (height - 1), b), (l + v * (r - l - 1) / (width - 1), r)
            rows, columns = ([(int(p), 1 - p % 1), (min(int(p) + 1, end - 1), p % 1)] for p, end in places)
            pixels = sum(e * f * x[:, :, k, o] for k, e in rows for o, f in columns)
            mixed[:, :, top + u, left + v] = pixels[partner]
        z = model.train()(mixed)
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


def test_an_empty_box_of_snapmix_is_plain_training_and_a_label_nothing_is_seen_of_has_no_weight(monkeypatch):
    (x, y), some, none = batch(), (3, 9, 4, 8), (3, 9, 4, 4)
    for boxes in ([none, some], [some, none]):
        monkeypatch.setattr(ops, "clipped_box", lambda *_, boxes=boxes: boxes.pop(0))
        out = tiny_step(SnapMix)(x, y, rng_of(0))
        assert out.loss.item() == tiny_step(Vanilla)(x, y, rng_of(0)).loss.item() and torch.equal(out.target, y)
    # The box covers all of a sample's class, the source shows none of the partner's.
    boxes, maps = [(0, 16, 0, 32), (16, 32, 0, 32)], torch.zeros(4, 32, 32)
    maps[:, :16] = 1 / 512
    monkeypatch.setattr(ops, "clipped_box", lambda *_: boxes.pop(0))
    monkeypatch.setattr("mixers.snapmix.semantic_map", lambda *_: maps)
    out = tiny_step(SnapMix)(x, y, rng_of(0))
    assert (out.plan["weight"] == 0).all() and out.loss == 0 and out.target.isfinite().all()
