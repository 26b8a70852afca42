"""Mixing inside the network, against running the network piece by piece and mixing by hand; alignment against loops."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from test_taps import BACKBONES, CRITERION, FAMILIES, backbone, photos, traced
from torch import Tensor, nn

from mixers import AlignMix, ManifoldMix, Mixer, Mixup, Step, Switch, alignmixup, build, taps
from mixers.alignmix import align, transport_plan
from mixers.testing import batch, differences, footprint

INDEX = torch.tensor([2, 1, 3, 0])
LAM = torch.tensor([0.3, 0.3, 0.3, 0.3])


def pieces(model: nn.Module, name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """The model as a list of functions, one after the other, with the names of those that are stages."""
    if name.startswith("res"):
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        stages = [(f"layer{i}", getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)]
        return [("", stem), *stages, ("", nn.Sequential(model.global_pool, model.fc))]
    if name.startswith(("tf_eff", "mobile")):
        end = nn.Sequential(model.conv_head, model.bn2, model.global_pool, model.classifier)
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
        return [("", nn.Sequential(model.conv_stem, model.bn1)), *blocks, ("", end)]
    if name.startswith("deit"):
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
        begin, end = lambda x: model._pos_embed(model.patch_embed(x)), lambda h: model.head(model.norm(h)[:, 0])
        return [("", begin), *blocks, ("", end)]
    if name.startswith("pvt"):
        stages = [(f"stages.{i}", stage) for i, stage in enumerate(model.stages)]
        return [*stages, ("", lambda h: model.head(model.norm(h)[:, 0]))]
    if name.startswith("swin"):
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
        return [("", model.patch_embed), *layers, ("", nn.Sequential(model.norm, model.head))]
    stages = [(f"stages.{i}", stage) for i, stage in enumerate(model.stages)]
    if name.startswith("moganet"):
        return [*stages, ("", lambda h: model.head(h.mean((2, 3))))]
    return [("", model.stem), *stages, ("", nn.Sequential(model.norm_pre, model.head))]


def by_hand(model: nn.Module, name: str, x: Tensor, at: str | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits with the output of the piece ``at`` changed."""
    changed = at is None
    for piece, run in pieces(model, name):
        x = run(x)
        if piece == at:
            x, changed = change(x), True
    assert changed
    return x


def of_family(name: str, table: dict) -> object:
    """What a table by the beginnings of names says of a backbone."""
    (found,) = (value for family, value in table.items() if name.startswith(family))
    return found


def one_by_one(h: Tensor, lam: Tensor) -> Tensor:
    """``lam*h + (1-lam)*partner``, one sample at a time."""
    return torch.stack([lam[n] * h[n] + (1 - lam[n]) * h[INDEX[n]] for n in range(len(h))])


def planned(mixer: Mixer, monkeypatch: pytest.MonkeyPatch, **plan: object) -> Mixer:
    """The mixer, with all of its decisions taken."""
    monkeypatch.setattr(mixer, "plan", lambda *_: plan)
    return mixer


def network(name: str) -> nn.Module:
    """In float64, so that BatchNorm over four images does not blow rounding up, and without drop path."""
    args = {"gate_fp32": False} if name.startswith("moganet") else {}
    drop = {} if name.startswith(("mobile", "tf_")) else {"drop_path_rate": 0.0}
    return backbone(name, **drop, **args).double()


def assert_same_step(model: nn.Module, mixer: Mixer, expected: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Logits, gradients and buffers of a training step are those of ``expected(model, x)``; no trace is left."""
    plain, (x, y) = copy.deepcopy(model), (value.double() for value in photos())
    before = footprint(model)
    out = Step(model, mixer, CRITERION)(x, y, np.random.default_rng(0))
    assert not differences(before, footprint(model))
    out.loss.backward()
    target = one_by_one(y, LAM)
    logits = expected(plain, x)
    CRITERION(logits, target).mean().backward()
    torch.testing.assert_close(out.target, target, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.logits, logits, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * max(scale, 1e-3))
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------------- ManifoldMix

HIDDEN = {
    "res": ("layer1", "layer2"),
    "tf_efficientnet": ("blocks.1", "blocks.2"),
    "mobilenet": ("blocks.1", "blocks.2"),
    "deit": ("blocks.2", "blocks.5"),
    "swin": ("layers.0", "layers.1"),
    **dict.fromkeys(("pvt", "convnext", "moganet"), ("stages.0", "stages.1")),
}
# the last stage, or the one before the class token reads it
ALIGNED = {
    "res": "layer4",
    "tf_efficientnet": "blocks.6",
    "mobilenet": "blocks.6",
    "deit": "blocks.10",
    "swin": "layers.3",
    "pvt": "stages.2",
    "convnext": "stages.3",
    "moganet": "stages.3",
}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_published_places_are_mixed_or_aligned_or_strides_4_and_8(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    mixer, aligning = ManifoldMix(), AlignMix()
    mixer.setup(model), aligning.setup(model)
    expected = of_family(name, HIDDEN)
    assert tuple(mixer.modules_mixed) == ("", *expected)
    reductions = [taps.reductions(model)[module] for module in expected]
    assert reductions == ([16, 16] if name.startswith("deit") else [1, 2] if name.endswith("cifar") else [4, 8])
    assert aligning.module_aligned == of_family(name, ALIGNED)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_manifoldmix_is_running_the_stages_mixing_and_running_the_rest(name: str, layer: int, monkeypatch) -> None:
    model = network(name)
    places = ("blocks.0", "blocks.1") if name.startswith("deit") else of_family(name, HIDDEN)  # deit: of 4 blocks
    mixer = planned(ManifoldMix(), monkeypatch, index=INDEX, lam=LAM, layer=layer)

    def expected(net: nn.Module, x: Tensor) -> Tensor:
        if layer == 0:
            return by_hand(net, name, one_by_one(x, LAM), None, lambda h: h)
        return by_hand(net, name, x, places[layer - 1], lambda h: one_by_one(h, LAM))

    assert_same_step(model, mixer, expected)


def test_manifoldmix_at_the_input_is_mixup_bit_for_bit(model, monkeypatch) -> None:
    x, y = batch()
    mixup = planned(Mixup(), monkeypatch, index=INDEX, mask=LAM.view(-1, 1, 1, 1))
    results = []
    for mixer in (planned(ManifoldMix(), monkeypatch, index=INDEX, lam=LAM, layer=0), mixup):
        step = Step(copy.deepcopy(model), mixer, CRITERION)
        out = step(x, y, np.random.default_rng(0))
        out.loss.backward()
        gradients = [p.grad for p in step.model.parameters()]
        results.append((out.logits, out.target, gradients, mixer.mix(x, y, **out.plan)))
    assert not differences(*results)


def test_manifoldmix_refuses_activation_checkpointing_that_would_recompute_without_it(model, monkeypatch) -> None:
    model.set_grad_checkpointing(True)
    step = Step(model, planned(ManifoldMix(), monkeypatch, index=INDEX, lam=LAM, layer=2), CRITERION)
    with pytest.raises(RuntimeError, match="'layer2' of ResNet while it checkpoints activations"):
        step(*batch(), np.random.default_rng(0))


# --------------------------------------------------------------------------------------------- AlignMix


def plan_by_loops(own: Tensor, partner: Tensor) -> tuple[Tensor, int]:
    """Sinkhorn's iterations on potentials in units of the cost, and how many there were.

    They end when the potentials of the first marginal change by less than 0.1, summed over positions, on average.
    """
    samples, positions, _ = own.shape
    cost = torch.zeros(samples, positions, positions, dtype=torch.float64)
    for n in range(samples):
        for i in range(positions):
            for j in range(positions):
                cost[n, i, j] = ((own[n, i] - partner[n, j]).double() ** 2).sum()
    mass = torch.full((positions,), 1 / positions, dtype=torch.float64)
    u = torch.zeros(samples, positions, dtype=torch.float64)
    v = torch.zeros(samples, positions, dtype=torch.float64)
    steps = 0
    while steps < 100:
        before = u.clone()
        for n in range(samples):
            for i in range(positions):
                u[n, i] = 0.1 * (mass[i].log() - torch.logsumexp((v[n] - cost[n, i]) / 0.1, 0))
            for j in range(positions):
                v[n, j] = 0.1 * (mass[j].log() - torch.logsumexp((u[n] - cost[n, :, j]) / 0.1, 0))
        steps += 1
        if (u - before).abs().sum(1).mean() < 0.1:
            break
    return torch.exp((u[:, :, None] + v[:, None, :] - cost) / 0.1), steps


# Size of the features -> iterations that the published rule takes for them.
SIZES = {0.01: 2, 0.3: 4, 1.0: 11, 1.5: 15, 4.0: 66, 8.0: 100}


def features(size: float, seed: int = 0, positions: int = 9) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    both = size * torch.from_numpy(rng.standard_normal((2, 3, positions, 5), dtype=np.float32))
    return both[0], both[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_the_transport_plan_is_that_of_the_published_loop_and_stops_where_it_stops(size: float, dtype) -> None:
    own, partner = (f.to(dtype) for f in features(size))
    expected, steps = plan_by_loops(own, partner)
    assert steps == SIZES[size]
    rounding = 1e-2 if dtype == torch.float32 else 1e-9  # of exp(-cost/0.1) with costs of hundreds
    plan = transport_plan(own, partner).double()
    torch.testing.assert_close(plan, expected, rtol=rounding, atol=1e-7)
    # mass that arrives evenly
    assert (plan >= 0).all() and (plan.sum(1) - 1 / 9).abs().max() < 1e-4 and (plan.sum((1, 2)) - 1).abs().max() < 1e-4


def test_the_plan_is_made_in_float32_under_autocast_and_carries_no_gradient() -> None:
    own, partner = features(1.5)
    f = torch.cat((own, partner)).requires_grad_()
    index, lam = torch.tensor([3, 4, 5, 0, 1, 2]), torch.full((6,), 0.3)
    for over in ("sample", "partner"):
        expected = align(f, index, lam, over)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = align(f, index, lam, over)
            half = align(f.bfloat16(), index, lam, over)
        assert torch.equal(found, expected)
        assert half.dtype == torch.bfloat16
    assert not transport_plan(f, f[index]).requires_grad


def align_by_loops(f: Tensor, lam: Tensor, over: str) -> Tensor:
    """The formula, position by position, with the plan of the published loop."""
    partner = f[INDEX]
    plan, _ = plan_by_loops(f.detach(), partner.detach())
    rows = f.shape[1] * plan.to(f.dtype)
    samples = []
    for n in range(len(f)):
        positions = []
        for i in range(f.shape[1]):
            if over == "partner":
                laid = sum(rows[n, i, j] * partner[n, j] for j in range(f.shape[1]))
                positions.append(lam[n] * f[n, i] + (1 - lam[n]) * laid)
            else:
                laid = sum(rows[n, j, i] * f[n, j] for j in range(f.shape[1]))
                positions.append(lam[n] * laid + (1 - lam[n]) * partner[n, i])
        samples.append(torch.stack(positions))
    return torch.stack(samples)


@pytest.mark.parametrize("over", ["sample", "partner"])
@pytest.mark.parametrize(("size", "positions"), [(0.3, 6), (1.5, 6), (4.0, 1)])
def test_alignment_and_its_gradient_are_those_of_the_formula(size: float, positions: int, over: str) -> None:
    rng = np.random.default_rng(1)
    f = (size * torch.from_numpy(rng.standard_normal((4, positions, 5), dtype=np.float32))).requires_grad_()
    lam = torch.tensor([0.0, 0.3, 0.8, 1.0])
    weight = torch.from_numpy(rng.standard_normal((4, positions, 5), dtype=np.float32))
    expected = align_by_loops(f, lam, over)
    found = align(f, INDEX, lam, over)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    if positions == 1:  # a plain blend
        torch.testing.assert_close(found, one_by_one(f, lam))
    gradients = [torch.autograd.grad((weight * out).sum(), f)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-4)


def test_alignment_of_a_feature_with_itself_or_its_shuffled_self_gives_it_back() -> None:
    rng = np.random.default_rng(2)
    f = 3 * torch.from_numpy(rng.standard_normal((2, 9, 16), dtype=np.float32))
    order = torch.from_numpy(rng.permutation(9))
    both = torch.cat((f, f[:, order]))  # so the order of positions does not count either
    identity = transport_plan(f, f) * 9
    torch.testing.assert_close(identity, torch.eye(9).expand(2, 9, 9), rtol=0, atol=1e-4)
    lam = torch.full((4,), 0.4)
    aligned = align(both, torch.tensor([2, 3, 0, 1]), lam, "partner")
    torch.testing.assert_close(aligned, both, rtol=1e-3, atol=1e-3)


def test_with_lambda_one_and_the_partner_laid_over_the_feature_stays_bit_for_bit(model, monkeypatch) -> None:
    f, _ = features(4.0)
    assert torch.equal(align(f, torch.tensor([1, 2, 0]), torch.ones(3), "partner"), f)
    x, y = batch(4, 96, 64)
    mixer = planned(AlignMix(), monkeypatch, index=INDEX, lam=torch.ones(4), over="partner")
    out = Step(model.eval(), mixer, CRITERION).eval()(x, y, np.random.default_rng(0))
    torch.testing.assert_close(out.logits, model(x))  # another order of summation in pooling
    assert torch.equal(out.target, y)


@pytest.mark.parametrize("over", ["sample", "partner"])
@pytest.mark.parametrize("name", FAMILIES)
def test_alignmix_is_running_the_stages_aligning_and_running_the_rest(name: str, over: str, monkeypatch) -> None:
    model = network(name)
    at = "blocks.2" if name.startswith("deit") else of_family(name, ALIGNED)  # deit: of 4 blocks
    mixer = planned(AlignMix(), monkeypatch, index=INDEX, lam=LAM, over=over)

    def change(h: Tensor) -> Tensor:
        if name.startswith("deit"):  # the class token is blended as it is
            return torch.cat((one_by_one(h, LAM)[:, :1], align_by_loops(h[:, 1:], LAM, over)), dim=1)
        if name.startswith("swin"):
            return align_by_loops(h.reshape(4, 4, -1), LAM, over).reshape(h.shape)
        tokens = align_by_loops(h.reshape(4, h.shape[1], -1).transpose(1, 2), LAM, over)
        return tokens.transpose(1, 2).reshape(h.shape)

    assert_same_step(model, mixer, lambda net, x: by_hand(net, name, x, at, change))


@pytest.mark.parametrize(
    ("mixer", "says"),
    [
        (ManifoldMix(), "needs two stages, Sequential publishes 1; use resnet50"),
        (AlignMix(), "AlignMix needs 2 stages, Sequential has 1"),
    ],
)
def test_a_network_that_does_not_do_is_refused_in_words(mixer: Mixer, says: str) -> None:
    with pytest.raises(ValueError, match="Linear does not publish its stages"):
        mixer.setup(nn.Linear(2, 2))
    single = nn.Sequential(nn.Conv2d(3, 3, 1))
    single.feature_info = [{"module": "0", "num_chs": 3, "reduction": 1}]
    single.num_prefix_tokens = 1
    with pytest.raises(ValueError, match=says):
        mixer.setup(single)


@pytest.mark.parametrize(("partner", "made"), [("mixup", Mixup(2.0)), ("manifoldmix", ManifoldMix(2.0))])
def test_the_published_alignmix_switches_with_mixup_or_manifoldmix(partner: str, made: Mixer) -> None:
    assert repr(alignmixup(partner=partner)) == repr(Switch([made, AlignMix(2.0)]))
    assert repr(build("alignmix", alpha=2.0, partner=partner)) == repr(Switch([made, AlignMix(2.0)]))
    assert repr(build({"switch": {"mixers": ["cutmix", {"align": {"alpha": 1.0}}]}})).count("AlignMix(alpha=1.0)") == 1
    with pytest.raises(ValueError, match="partner must be one of 'mixup', 'manifoldmix', got 'cutmix'"):
        alignmixup(partner="cutmix")


# --------------------------------------------------------------------------------------------- both


@traced
@pytest.mark.parametrize("name", ["resnet18_cifar", "deit_tiny_patch16_224"])
def test_hidden_mixing_works_on_compiled_stages(name: str, compiler, monkeypatch) -> None:
    model, (x, y) = backbone(name, drop_path_rate=0.0), photos()
    compiled = copy.deepcopy(model)
    taps.compile_stages(compiled, backend="eager", dynamic=False)
    plans = [(ManifoldMix(), {"layer": 1}), (ManifoldMix(), {"layer": 2}), (AlignMix(), {"over": "partner"})]
    for mixer, plan in plans:
        planned(mixer, monkeypatch, index=INDEX, lam=LAM, **plan)
        found, expected = (
            Step(net, mixer, CRITERION)(x, y, np.random.default_rng(0)).logits for net in (compiled, model)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
