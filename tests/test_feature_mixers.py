"""PatchUp and Catch-up Mix: blocks and channels that are swapped inside of a network, against loops and hooks."""

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from small_models import CRITERION, DEIT, FAMILIES, SWIN, backbone, photos
from test_hidden import places
from torch import Tensor, nn
from torch.testing import assert_close

from mixers import CatchUpMix, CutMix, PatchUp, Step, Switch, Vanilla, build
from mixers.catchupmix import kept
from mixers.patchup import laid_out, shape_of
from mixers.testing import batch, differences, footprint, rng_of, tiny_step

# By the beginnings of names: the convolution that sees the images.
FIRST = {"res": "conv1", "tf_": "conv_stem", "mobile": "conv_stem", "deit": "patch_embed.proj", "pvt": "stages.0.embed"}
FIRST |= {"swin": "patch_embed.proj", "convnext": "stem.0", "moganet": "stages.0.downsample.0", "wide": "stem"}


def test_the_places_are_the_images_the_first_convolution_and_the_stages():
    for name in (*FAMILIES, "resnet18_cifar", "mobilenetv2_100", "wide_resnet28_8_cifar"):
        with torch.device("meta"):
            model = timm.create_model(name)
        patchup, catchup = PatchUp(), CatchUpMix()
        patchup.setup(model), catchup.setup(model)
        (first,) = (value for family, value in FIRST.items() if name.startswith(family))
        for found in (patchup.modules_mixed, catchup.modules_mixed):
            assert found[0] == "" and found[1].removesuffix(".projection") == first
            assert isinstance(model.get_submodule(found[1]), nn.Conv2d)
        assert patchup.modules_mixed[2:] == catchup.modules_mixed[2:3] == [places(name, depth=12)[0]], name
        stages = 3 if name.startswith("wide") else 4
        assert len(catchup.modules_mixed) == 2 + stages and catchup.modules_mixed[3] == places(name, depth=12)[1]


def seed_of(layer: int, layers: int) -> int:
    """A seed whose first draw is this layer."""
    return next(seed for seed in itertools.count() if np.random.default_rng(seed).integers(layers) == layer)


def channels_first(model: nn.Module, h: Tensor, path: str) -> Tensor:
    """A feature as (B, C, positions), without the class token; a view of it."""
    if h.ndim == 3:
        return h[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
    if model.__class__.__name__.startswith("Swin") and path != "patch_embed.proj":
        return h.flatten(1, 2).transpose(1, 2)
    return h.flatten(2)


def swapped_by_hand(model: nn.Module, out, path: str) -> Callable[[Tensor], Tensor]:
    """PatchUp of a feature, channel by channel of each sample; ``out``: the plan is taken from it."""
    mask, share, index = out.plan["mask"][0].flatten(1), out.plan["share"][0].double(), out.plan["index"]

    def change(h: Tensor) -> Tensor:
        mixed, own = h.clone(), channels_first(model, h, path)
        view = channels_first(model, mixed, path)
        for n, c in itertools.product(range(len(own)), range(own.shape[1])):
            inside = share * own[n, c] + (1 - share) * own[index[n], c]
            view[n, c] = torch.where(mask[c] == 1, own[n, c], inside)
        return mixed

    return change


def caught_up_by_hand(model: nn.Module, out, path: str) -> Callable[[Tensor], Tensor]:
    """Catch-up Mix of a feature, sample by sample: the class token counts as one more position."""
    lam, index = out.plan["lam"][0].double().item(), out.plan["index"].tolist()

    def change(h: Tensor) -> Tensor:
        axis = 0 if h.ndim == 4 and (channels_first(model, h, path).shape[1] == h.shape[1]) else h.ndim - 2
        samples = [h[n].movedim(axis, 0).flatten(1) for n in range(len(h))]
        mixed = []
        for n, own in enumerate(samples):
            partner = samples[index[n]]
            norms = [[channel.square().sum().sqrt().item() for channel in each] for each in (own, partner)]
            gap = [a / sum(norms[0]) - b / sum(norms[1]) for a, b in zip(*norms, strict=True)]
            lowest = np.argsort(gap, kind="stable")[: math.floor(lam * len(gap))].tolist()
            rows = [own[c] if c in lowest else partner[c] for c in range(len(gap))]
            mixed.append(torch.stack(rows).view(h[n].movedim(axis, 0).shape).movedim(0, axis))
        return torch.stack(mixed)

    return change


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """One loss per sample, as its formula."""
    return -(target * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1)


def expect_step(name: str, mixer, layer: int, by_hand) -> None:
    """Logits, target, loss, gradients and buffers of a step are those of a plain forward with a hook of the test's."""
    args = {"gate_fp32": False} if name.startswith("moganet") else {}
    model = backbone(name, **args, **({} if name.startswith("tf_") else {"drop_path_rate": 0.0})).double()
    plain, (x, y) = copy.deepcopy(model), (value.double() for value in photos())
    step, before = Step(model, mixer, CRITERION), footprint(model)
    places = mixer.modules_mixed
    out = step(x, y, np.random.default_rng(seed_of(layer, len(places))))
    assert out.plan["layer"] == layer and not differences(before, footprint(model))
    out.loss.backward()
    images, target = mixer.mix(x, y, **out.plan)
    assert torch.equal(images, x) and torch.equal(target, out.target)
    hook = by_hand(plain, out, places[layer])

    def apply(_module: nn.Module, _args: object, h: Tensor) -> Tensor:
        return hook(h)

    plain.get_submodule(places[layer]).register_forward_hook(apply)
    logits, lam = plain(x), out.plan["lam"].double()
    partner = y[out.plan["index"]]
    assert_close(out.target, torch.stack([s * a + (1 - s) * b for s, a, b in zip(lam, y, partner, strict=True)]))
    loss = cross_entropy(logits, out.target)
    if isinstance(mixer, PatchUp):
        part, share = out.plan["mask"].double().mean(), out.plan["share"][0].double()
        blended = share * y + (1 - share) * partner
        loss = loss + part * cross_entropy(logits, y) + (1 - part) * cross_entropy(logits, blended)
        assert_close(lam, (part + (1 - part) * share).expand(len(x)), rtol=0, atol=1e-6)
    assert_close(out.loss, loss.mean(), rtol=1e-6, atol=1e-7)
    loss.mean().backward()
    assert_close(out.logits, logits, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        scale = theirs.grad.abs().max().item()
        assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * max(scale, 1e-3))
    for counted, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert_close(counted, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "alpha"),
    [(name, 1 + i % 2, None if i // 2 % 2 else 2.0) for i, name in enumerate(FAMILIES)]
    + [("resnet18", 2, None), (SWIN, 2, None), (DEIT, 2, 2.0)],
)
def test_patchup_is_a_forward_whose_feature_has_its_blocks_replaced(name, layer, alpha):
    expect_step(name, PatchUp(alpha, block_size=3), layer, swapped_by_hand)


@pytest.mark.parametrize(("name", "layer"), [(n, 1 + i % 5) for i, n in enumerate(FAMILIES)] + [(DEIT, 5), (SWIN, 4)])
def test_catchup_mix_is_a_forward_whose_feature_has_channels_replaced(name, layer):
    expect_step(name, CatchUpMix(), layer, caught_up_by_hand)


def test_at_the_images_both_are_cutmix(model):
    x, y = batch(5, 32, 48)
    for mixer, layers in ((PatchUp(), 3), (PatchUp(alpha=2.0), 3), (CatchUpMix(), 6)):
        step = Step(copy.deepcopy(model), mixer, CRITERION)
        out = step(x, y, np.random.default_rng(seed_of(0, layers)))
        mixed, target = mixer.mix(x, y, **out.plan)
        cut = CutMix().mix(x, y, index=out.plan["index"], mask=out.plan["mask"])
        assert_close((mixed, target), cut) and 0 < out.plan["lam"][0] < 1
        assert_close(out.logits, copy.deepcopy(model)(mixed))
        each = cross_entropy(out.logits, target).mean()
        assert_close(out.loss, 2 * each if layers == 3 else each)


def covered(centres: Tensor, side: int) -> Tensor:
    """1 outside of the blocks around the centres, position by position."""
    mask = torch.ones_like(centres)
    for c, i, j in centres.nonzero().tolist():
        mask[c, max(i - side // 2, 0) : i + side // 2 + 1, max(j - side // 2, 0) : j + side // 2 + 1] = 0
    return mask


@pytest.mark.parametrize(
    ("shape", "block", "side"), [((3, 9, 12), 5, 5), ((2, 4, 9), 7, 3), ((4, 1, 1), 7, 1), ((2, 7, 7), 7, 7)]
)
def test_blocks_lie_around_their_centres_and_are_no_larger_than_the_map(shape, block, side, monkeypatch):
    mixer, (x, _), drawn = PatchUp(block_size=block), batch(), []

    class Spy(np.random.Generator):
        def choice(self, size, count, **options):
            drawn.append(super().choice(size, count, **options))
            assert not options["replace"] and len(drawn[-1]) == count
            return drawn[-1]

    mask = mixer.blocks(shape, x, Spy(np.random.PCG64(3)))
    centres = torch.zeros(math.prod(shape)).index_fill(0, torch.from_numpy(drawn[0]), 1.0).view(shape)
    assert torch.equal(mask[0], covered(centres, side))


@pytest.mark.usefixtures("without_shape_checks")
def test_each_position_is_a_centre_with_the_published_probability():
    (x, _), (height, width), side = batch(), (10, 14), 3
    for gamma in (0.0, 0.3, 1.0):
        mixer, expected = PatchUp(gamma=gamma, block_size=side), gamma * height * width / (9 * 8 * 12)
        counts, places = [], np.zeros((2, height, width))

        class Spy(np.random.Generator):
            def choice(self, size, count, counts=counts, places=places, **options):
                found = super().choice(size, count, **options)
                counts.append(count), np.add.at(places.reshape(-1), found, 1)
                return found

        for seed in range(1000):
            mixer.blocks((2, height, width), x, Spy(np.random.PCG64(seed)))
        size = 2 * height * width
        assert np.mean(counts) == pytest.approx(size * expected, rel=0.02)
        if gamma:
            assert np.var(counts) == pytest.approx(size * expected * (1 - expected), rel=0.2)
            assert stats.chisquare(places.reshape(-1)).pvalue > 1e-3


def test_without_blocks_nothing_is_mixed_and_a_map_of_one_position_can_be_swapped_whole(model):
    x, y = batch()
    for gamma, side, lam in ((0.0, 7, 1.0), (1.0, 1, 0.0)):  # a probability of 0 and of 1
        step = Step(copy.deepcopy(model), PatchUp(gamma=gamma, block_size=side), CRITERION)
        out = step(x, y, np.random.default_rng(seed_of(2, 3)))
        assert out.plan["lam"].tolist() == [lam] * 4
        index = out.plan["index"] if lam == 0 else torch.arange(4)
        assert_close(out.logits, copy.deepcopy(model)(x[index]), rtol=1e-4, atol=1e-5)
        assert torch.equal(out.target, y[index])


@pytest.mark.parametrize(("name", "path"), [("resnet18", "layer1"), (SWIN, "layers.0"), (DEIT, "blocks.0")])
def test_a_mask_of_patchup_takes_the_memory_of_one_sample_in_the_type_of_the_feature(name, path):
    model, found = backbone(name), []
    model.get_submodule(path).register_forward_hook(lambda _module, _args, h: found.append(h.bfloat16()))
    x, _ = photos()
    model(x)
    (h,) = found
    weight = laid_out(model, path, torch.rand(1, *shape_of(model, path, h, x)), h)
    assert weight.shape == h.shape and weight.dtype == h.dtype
    assert weight.untyped_storage().nbytes() == h[0].nbytes


def test_catchup_mix_keeps_all_or_no_channels_at_the_ends_and_silent_channels_are_no_trouble():
    index, h = torch.tensor([1, 2, 0]), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for lam in (0.0, 0.19, 0.2, 0.5, 0.99, 1.0):
        for images in (h, torch.zeros_like(h), h.bfloat16(), h * (torch.arange(5) > 2)[None, :, None]):
            kept_ = kept(images, index, torch.full((3,), lam))
            assert kept_.sum(1).tolist() == [math.floor(np.float32(lam) * np.float32(5))] * 3
    loud = torch.ones(2, 4, 1)
    loud[0, 0], loud[1, 1] = 9.0, 9.0  # the one sample is loud in channel 0, the other one in 1
    assert kept(loud, torch.tensor([1, 0]), torch.full((2,), 0.25)).tolist() == [
        [False, True, False, False], [True, False, False, False],
    ]  # fmt: skip
    assert torch.equal(kept(loud * 5, torch.tensor([1, 0]), torch.full((2,), 0.75))[:, :2], ~torch.eye(2).bool())


@pytest.mark.usefixtures("without_shape_checks")
def test_each_place_is_drawn_as_often_and_shares_follow_their_laws():
    x, y = torch.zeros(2, 3, 8, 8), torch.ones(2, 1)
    catchup = CatchUpMix()
    catchup.setup(timm.create_model("test_resnet"))
    plans = [catchup.plan(x, y, rng_of(i)) for i in range(1500)]
    assert stats.chisquare(np.bincount([p["layer"] for p in plans], minlength=6)).pvalue > 1e-3
    hidden = [p["lam"][0].item() for p in plans if p["layer"]]
    assert stats.kstest(hidden, "uniform").pvalue > 1e-3
    for alpha in (None, 2.0):
        mixer = PatchUp(alpha)
        layers = [mixer.layer(rng_of(i)) for i in range(3000)]
        assert stats.chisquare(np.bincount(layers, minlength=3)).pvalue > 1e-3
        shares = [mixer.plan(x, y, rng_of(i), 1, (2, 9, 9))["share"][0].item() for i in range(500)]
        assert {*shares} == {0.0} if alpha is None else stats.kstest(shares, stats.beta(2, 2).cdf).pvalue > 1e-3
    hard = build("patchup")
    assert isinstance(hard, Switch) and hard.probs == [0.7, 0.3] and isinstance(hard.members()[1], Vanilla)


def test_a_plan_before_the_size_of_the_feature_is_known_is_refused_and_one_of_the_images_is_not():
    step, (x, y) = tiny_step(lambda: build("softpatchup")), batch()
    with pytest.raises(ValueError, match="this plan needs a look at the model"):
        step.mixer.plan(x, y, np.random.default_rng(seed_of(1, 3)))
    alone = step.mixer.plan(x, y, np.random.default_rng(seed_of(0, 3)))
    assert not differences(alone, step(x, y, np.random.default_rng(seed_of(0, 3))).plan)


def test_a_network_without_stages_or_a_convolution_is_refused_in_words():
    dense = nn.Sequential(nn.Linear(3, 3))
    dense.feature_info = [{"module": "0", "num_chs": 3, "reduction": 1}]
    for mixer in (PatchUp(), CatchUpMix()):
        with pytest.raises(ValueError, match=r"Linear does not publish its stages .*resnet50"):
            mixer.setup(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="Sequential has no convolution; models that have: resnet50"):
            mixer.setup(dense)
