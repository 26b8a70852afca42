"""Mixing inside the network, against running the network piece by piece and mixing by hand; alignment against loops."""

import copy
import math
from operator import attrgetter

import numpy as np
import pytest
import timm
import torch
from small_models import BACKBONES, CRITERION, DEIT, FAMILIES, SWIN, backbone, photos
from torch import nn
from torch.testing import assert_close

from mixers import AlignMix, ManifoldMix, Mixup, Step, Switch, alignmixup, build, taps
from mixers.alignmix import align, log_sum_exp, transport_plan
from mixers.testing import batch, differences, footprint, rng_of

INDEX, LAM = torch.tensor([2, 1, 3, 0]), torch.full((4,), 0.3)

# What each network runs, one after the other: its own modules and methods, the class token, the mean over positions.
PIECES = {
    "resnet18": "conv1 bn1 act1 maxpool layer1 layer2 layer3 layer4 global_pool fc",
    "tf_efficientnet_b0": "conv_stem bn1 blocks.* conv_head bn2 global_pool classifier",
    DEIT: "patch_embed _pos_embed blocks.* norm TOKEN head",
    "pvt_tiny": "stages.* norm TOKEN head",
    SWIN: "patch_embed layers.* norm head",
    "convnext_tiny": "stem stages.* norm_pre head",
    "moganet_tiny": "stages.* MEAN head",
}
# By the beginnings of names: where ManifoldMix mixes, and the last stage, or the one before the class token reads it.
PLACES = {
    "res": ("layer1", "layer2", "layer4"),
    **dict.fromkeys(("tf_efficientnet", "mobilenet"), ("blocks.1", "blocks.2", "blocks.6")),
    "deit": ("blocks.2", "blocks.5", "blocks.10"),
    "swin": ("layers.0", "layers.1", "layers.3"),
    "pvt": ("stages.0", "stages.1", "stages.2"),
    **dict.fromkeys(("convnext", "moganet"), ("stages.0", "stages.1", "stages.3")),
    "wide": ("stages.0", "stages.1", "stages.2"),
}


def places(name, depth=4):
    """The three of a backbone; a ViT of ``depth`` blocks has them elsewhere."""
    (found,) = (value for family, value in PLACES.items() if name.startswith(family))
    return ("blocks.0", "blocks.1", "blocks.2") if name.startswith("deit") and depth == 4 else found


def by_hand(model, name, x, at=None, change=None):
    """The logits with the output of the piece ``at`` changed."""
    for piece in PIECES[name].split():
        group = piece.removesuffix(".*")
        for path in [f"{group}.{i}" for i in range(len(getattr(model, group)))] if piece != group else [piece]:
            x = x[:, 0] if path == "TOKEN" else x.mean((2, 3)) if path == "MEAN" else attrgetter(path)(model)(x)
            x = change(x) if path == at else x
    return x


def blended(h, lam=LAM):
    """``lam*h + (1-lam)*partner``, one sample at a time."""
    return torch.stack([lam[n] * h[n] + (1 - lam[n]) * h[INDEX[n]] for n in range(len(h))])


def planned(mixer, monkeypatch, **plan):
    """The mixer, with all of its decisions taken."""
    monkeypatch.setattr(mixer, "plan", lambda *_: {"index": INDEX, "lam": LAM} | plan)
    return mixer


def expect_same_step(name, mixer, expected):
    """Logits, gradients and buffers of a training step are those of ``expected(model, x)``; no trace is left.

    In float64, so that BatchNorm over four images does not blow rounding up, and without drop path.
    """
    args = {"gate_fp32": False} if name.startswith("moganet") else {}
    model = backbone(name, **args, **({} if name.startswith("tf_") else {"drop_path_rate": 0.0})).double()
    plain, (x, y) = copy.deepcopy(model), (value.double() for value in photos())
    before = footprint(model)
    out = Step(model, mixer, CRITERION)(x, y, rng_of(0))
    assert not differences(before, footprint(model))
    out.loss.backward()
    logits, target = expected(plain, x), blended(y)
    CRITERION(logits, target).mean().backward()
    assert_close(out.target, target, rtol=0, atol=1e-12)
    assert_close(out.logits, logits, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * max(scale, 1e-3))
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_published_places_are_mixed_or_aligned_or_strides_4_and_8():
    for name in BACKBONES:
        with torch.device("meta"):
            model = timm.create_model(name)
        mixer, aligning = ManifoldMix(), AlignMix()
        mixer.setup(model), aligning.setup(model)
        *mixed, aligned = places(name, depth=12)
        assert [*mixer.modules_mixed] == ["", *mixed] and aligning.module_aligned == aligned, name
        reductions = [taps.reductions(model)[module] for module in mixed]
        assert reductions == ([16, 16] if name.startswith("deit") else [1, 2] if name.endswith("cifar") else [4, 8])


def test_manifoldmix_at_the_input_is_mixup_bit_for_bit(model, monkeypatch):
    mixup, results = Mixup(), []
    monkeypatch.setattr(mixup, "plan", lambda *_: {"index": INDEX, "mask": LAM.view(-1, 1, 1, 1)})
    for mixer in (planned(ManifoldMix(), monkeypatch, layer=0), mixup):
        step = Step(copy.deepcopy(model), mixer, CRITERION)
        out = step(*batch(), rng_of(0))
        out.loss.backward()
        gradients = [p.grad for p in step.model.parameters()]
        results.append((out.logits, out.target, gradients, mixer.mix(*batch(), **out.plan)))
    assert not differences(*results)


def plan_by_loops(own, partner):
    """Sinkhorn's iterations on potentials in units of the cost, and how many there were.

    They end when the potentials of the first marginal change by less than 0.1, summed over positions, on average.
    """
    cost = (own[:, :, None] - partner[:, None, :]).double().square().sum(3)
    positions, u, v = own.shape[1], torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[:, 0])
    for steps in range(1, 101):
        before = u.clone()
        for i in range(positions):
            u[:, i] = 0.1 * (-math.log(positions) - torch.logsumexp((v - cost[:, i]) / 0.1, 1))
        for j in range(positions):
            v[:, j] = 0.1 * (-math.log(positions) - torch.logsumexp((u - cost[:, :, j]) / 0.1, 1))
        if steps == 100 or (u - before).abs().sum(1).mean() < 0.1:
            return torch.exp((u[:, :, None] + v[:, None, :] - cost) / 0.1), steps


def features(size, shape=(2, 3, 9, 5), rng=None):
    return size * torch.from_numpy((rng or np.random.default_rng(0)).standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "taken"), [(0.01, 2), (0.3, 4), (1.0, 11), (1.5, 15), (4.0, 66), (8.0, 100)])
def test_the_transport_plan_is_that_of_the_published_loop_and_stops_where_it_stops(size, taken, dtype):
    own, partner = features(size).to(dtype)
    expected, steps = plan_by_loops(own, partner)
    assert steps == taken
    rounding = 1e-2 if dtype == torch.float32 else 1e-9  # of exp(-cost/0.1) with costs of hundreds
    plan = transport_plan(own, partner).double()
    assert_close(plan, expected, rtol=rounding, atol=1e-7)
    # mass that arrives evenly
    assert (plan >= 0).all() and (plan.sum(1) - 1 / 9).abs().max() < 1e-4 and (plan.sum((1, 2)) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 40.0, 1e4])
def test_sums_without_what_underflows_are_those_of_torch_to_the_last_digit(size, dtype):
    score = -features(size, (3, 49, 49)).to(dtype).square()
    for dim in (1, 2):
        assert torch.equal(log_sum_exp(score, dim), torch.logsumexp(score, dim))


def test_the_plan_is_made_in_float32_under_autocast_and_carries_no_gradient():
    f = features(1.5).flatten(0, 1).requires_grad_()
    index, lam = torch.tensor([3, 4, 5, 0, 1, 2]), torch.full((6,), 0.3)
    for over in ("sample", "partner"):
        expected = align(f, index, lam, over)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(align(f, index, lam, over), expected)
            assert align(f.bfloat16(), index, lam, over).dtype == torch.bfloat16
    assert not transport_plan(f, f[index]).requires_grad


def align_by_loops(f, lam, over):
    """The formula, sample by sample, with the plan of the published loop."""
    rows = f.shape[1] * plan_by_loops(f.detach(), f[INDEX].detach())[0].to(f.dtype)
    pairs = [
        (own, match @ partner) if over == "partner" else (match.T @ own, partner)
        for match, own, partner in zip(rows, f, f[INDEX], strict=True)
    ]
    return torch.stack([share * own + (1 - share) * partner for share, (own, partner) in zip(lam, pairs, strict=True)])


@pytest.mark.parametrize("over", ["sample", "partner"])
@pytest.mark.parametrize(("size", "positions"), [(0.3, 6), (1.5, 6), (4.0, 1)])
def test_alignment_and_its_gradient_are_those_of_the_formula(size, positions, over):
    rng, lam = np.random.default_rng(1), torch.tensor([0.0, 0.3, 0.8, 1.0])
    f = features(size, (4, positions, 5), rng).requires_grad_()
    weight = features(1, (4, positions, 5), rng)
    found, expected = align(f, INDEX, lam, over), align_by_loops(f, lam, over)
    assert_close(found, expected, rtol=2e-3, atol=1e-4)
    if positions == 1:
        assert_close(found, blended(f, lam))
    if over == "partner":  # with lambda 1 the feature stays bit for bit
        assert torch.equal(align(f, INDEX, torch.ones(4), over), f)
    gradients = [torch.autograd.grad((weight * out).sum(), f)[0] for out in (found, expected)]
    assert_close(*gradients, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("decided", [{"layer": 0}, {"layer": 1}, {"layer": 2}, {"over": "sample"}, {"over": "partner"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_mixing_is_running_the_stages_mixing_or_aligning_and_running_the_rest(name, decided, monkeypatch):
    layer, over = decided.get("layer"), decided.get("over")

    def aligned(h):
        if name == DEIT:  # the class token is blended as it is
            return torch.cat((blended(h)[:, :1], align_by_loops(h[:, 1:], LAM, over)), dim=1)
        if name == SWIN:
            return align_by_loops(h.reshape(4, 4, -1), LAM, over).reshape(h.shape)
        return align_by_loops(h.flatten(2).transpose(1, 2), LAM, over).transpose(1, 2).reshape(h.shape)

    def expected(net, x):
        if layer == 0:
            return by_hand(net, name, blended(x))
        return by_hand(net, name, x, places(name)[2 if over else layer - 1], aligned if over else blended)

    expect_same_step(name, planned(AlignMix() if over else ManifoldMix(), monkeypatch, **decided), expected)


def test_a_network_that_does_not_do_is_refused_in_words():
    single = nn.Sequential(nn.Conv2d(3, 3, 1))
    single.feature_info, single.num_prefix_tokens = [{"module": "0", "num_chs": 3, "reduction": 1}], 1
    says = (
        "ManifoldMix needs 2 stages, Sequential publishes 1; use resnet50",
        "AlignMix needs 2 stages, Sequential has 1",
    )
    for mixer, words in zip((ManifoldMix(), AlignMix()), says, strict=True):
        with pytest.raises(ValueError, match=r"Linear does not publish its stages .*resnet50"):
            mixer.setup(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=words):
            mixer.setup(single)


def test_the_published_alignmix_switches_with_mixup_or_manifoldmix():
    for partner, made in (("mixup", Mixup(2.0)), ("manifoldmix", ManifoldMix(2.0))):
        expected = repr(Switch([made, AlignMix(2.0)]))
        assert repr(alignmixup(partner=partner)) == repr(build("alignmix", alpha=2.0, partner=partner)) == expected
    assert repr(build({"switch": {"mixers": ["cutmix", {"align": {"alpha": 1.0}}]}})).count("AlignMix(alpha=1.0)") == 1
    with pytest.raises(ValueError, match="partner must be one of 'mixup', 'manifoldmix', got 'cutmix'"):
        alignmixup(partner="cutmix")
