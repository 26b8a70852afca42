"""AutoMix, SAMix and AdAutoMix: the formulas of their blocks, who learns from what, and what is reported."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from resuming import Reference, log
from test_taps import traced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixers import Out, Step, Switch, blocks, build, taps
from mixers.adautomix import AdaptiveMask, mix_many
from mixers.automix import MixBlock
from mixers.samix import SAMixBlock, curve
from mixers.testing import batch, rng_of
from mixup_recipes.pages.masks import masks
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones, launch
from mixup_recipes.typed import UserError

LEARNED = ("automix", "samix", "adautomix")
CRITERION = nn.CrossEntropyLoss(reduction="none")


def make(name: str, model: str = "test_resnet", **args: Any) -> Step:
    torch.manual_seed(0)
    return Step(timm.create_model(model, num_classes=5), build(name, **args), CRITERION)


def maps(channels: int = 6, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden maps of three samples, their partners, and a lambda for each."""
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((3, channels, size, size)))
    return z, torch.tensor([2, 0, 1]), torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)


def wake(block: nn.Module) -> nn.Module:
    """Weights of a size at which a mistake shows, in float64."""
    torch.manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    return block.double()


def slow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sample: q, k (d, P), v (P,) -> (P,), position by position."""
    out = []
    for i in range(q.shape[1]):
        scores = [math.exp(float(q[:, i] @ k[:, j]) / math.sqrt(len(q))) for j in range(k.shape[1])]
        out.append(sum(s * float(x) for s, x in zip(scores, v, strict=True)) / sum(scores))
    return torch.tensor(out, dtype=torch.float64)


def linear(layer: nn.Conv2d, z: Tensor) -> Tensor:
    """A 1x1 convolution of one flat map (C, P), as a matrix."""
    out = layer.weight[:, :, 0, 0] @ z
    return out if layer.bias is None else out + layer.bias[:, None]


# --------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("lam_concat", [True, False])
@torch.no_grad()
def test_the_block_of_automix_is_its_formula(lam_concat: bool) -> None:
    z, index, lam = maps()
    block = MixBlock(lam_concat)
    block.setup(6)
    wake(block)
    found = block(block.project(z), index, lam)
    for i in range(3):
        a, b = z[i].flatten(1), z[index[i]].flatten(1)
        if lam_concat:
            a = torch.cat((a, lam[i].expand(1, 9)))
            b = torch.cat((b, (1 - lam[i]).expand(1, 9)))
        expected = slow_attention(linear(block.query_key, a), linear(block.query_key, b), linear(block.value, b)[0])
        torch.testing.assert_close(found[i].flatten(), expected)


@pytest.mark.parametrize("k", [-1, 0.25])
@torch.no_grad()
def test_the_block_of_samix_is_its_formula(k: float) -> None:
    z, index, lam = maps()
    block = SAMixBlock(lam_mul_k=k, dropout=0.5)
    block.setup(6)
    wake(block).train()
    noise = block.noise(z, np.random.default_rng(0))
    assert noise is not None and set(noise.flatten().tolist()) == {0.0, 2.0}
    found = block(block.project(z), index, lam, noise)
    r = [float(x) if k == -1 else (4 / 3 * x**3 - 2 * x**2 + 1.25 * x) / (1.25 - 2 / 3) for x in lam.tolist()]
    b_all = [z[index[i]].flatten(1) * (1 + 1 - r[i]) for i in range(3)]
    hidden = torch.stack([linear(block.value[0], b) for b in b_all])
    norm = block.value[1]
    mean, var = hidden.mean((0, 2), keepdim=True), hidden.var((0, 2), correction=0, keepdim=True)
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    for i in range(3):
        pair = torch.cat((z[i].flatten(1) * (1 + r[i]), b_all[i]))
        value = linear(block.value[3], F.elu(hidden[i]))[0] * noise[i].flatten()
        expected = slow_attention(linear(block.query, pair), linear(block.key, pair), value)
        torch.testing.assert_close(found[i].flatten(), expected)


@pytest.mark.parametrize("samples", [2, 3])
@torch.no_grad()
def test_the_generator_of_adautomix_is_its_formula(samples: int) -> None:
    z, index, lam = maps()
    shares = torch.stack([lam, (1 - lam) / (samples - 1), (1 - lam) / 2], 1)[:, :samples]
    sources = [z, z[index], z.flip(0)][:samples]
    block = wake(AdaptiveMask(6, lam_concat=True, norm=False))
    found = block(sources, shares)
    for b in range(3):
        flat = [torch.cat((s[b].flatten(1), shares[b, i].expand(1, 9))) for i, s in enumerate(sources)]
        q, k = ([linear(layer[0], f).clamp(min=0) for f in flat] for layer in (block.query, block.key))
        for i in range(samples):
            others = sum(k[j] for j in range(samples) if j != i)
            expected = slow_attention(q[i], others, linear(block.value, flat[i])[0])
            torch.testing.assert_close(found[b, i].flatten(), expected)


def test_the_curve_of_lambda_fixes_its_ends_and_middle_and_grows() -> None:
    lam = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(curve(lam, -1), lam)
    for k in (0, 0.25, 2):
        r = curve(lam, k)
        torch.testing.assert_close(r[[0, 50, 100]], torch.tensor([0, 0.5, 1], dtype=torch.float64))
        assert (r.diff() >= -1e-12).all()


@pytest.mark.parametrize("model", ["resnet50", "deit_small_patch16_224"])
def test_a_step_costs_at_most_3_1_times_one_without_mixing(model: str, without_shape_checks: None) -> None:
    """Counted by torch on the meta device at full size; every batch of these updates is mixed by a learned mask."""
    total = []
    for mixer in (build("vanilla"), build("automix", margin=0.0), build("samix", margin=0.0)):
        with torch.device("meta"):
            step = Step(timm.create_model(model), mixer, CRITERION)
        x, y = torch.empty(4, 3, 224, 224, device="meta"), torch.empty(4, 1000, device="meta")
        with FlopCounterMode(display=False) as counter:
            step(x, y, rng_of(0)).loss.backward()
        total.append(counter.get_total_flops())
    for learned in total[1:]:
        assert 2.5 < learned / total[0] < 3.105


@pytest.mark.parametrize(
    ("make_block", "channels", "expected"),
    [
        (MixBlock, 256, 257 * 128 + 128 + 257 + 1),
        (MixBlock, 384, 385 * 192 + 192 + 385 + 1),
        (MixBlock, 1024, 1025 * 512 + 512 + 1025 + 1),
        (SAMixBlock, 256, 2 * (512 * 128 + 128) + 256 * 128 + 2 * 128 + 128),
        (SAMixBlock, 1024, 2 * (2048 * 512 + 512) + 1024 * 512 + 2 * 512 + 512),
    ],
)
def test_blocks_have_the_published_sizes(make_block: Callable[[], Any], channels: int, expected: int) -> None:
    block = make_block()
    block.setup(channels)
    assert sum(p.numel() for p in block.parameters()) == expected
    weights = torch.cat([m.weight.flatten() for m in block.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("make_block", [MixBlock, SAMixBlock])
def test_the_masks_loss_is_that_of_all_pixels_of_the_batch(make_block: Callable[[], Any]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lam = float(rng.random())
        mask = torch.from_numpy(rng.random((3, 1, 4, 5)) ** rng.uniform(0.2, 5))
        values = mask.flatten().tolist()
        mean = sum(values) / len(values)
        expected = max(0.0, abs(mean - lam) - 0.1)
        if make_block is SAMixBlock:
            expected -= 2 * sum((v - mean) ** 2 for v in values) / len(values)
        found = make_block().mask_loss(mask, torch.full((3,), lam, dtype=torch.float64))
        assert found.item() == pytest.approx(expected)
        assert found >= -0.5


def test_a_new_mask_is_close_to_one_half_whatever_lambda_is() -> None:
    step = make("automix")
    x, _ = batch(size=8)
    projected = step.mixer.look(x)
    for lam in (0.1, 0.5, 0.9):
        mask = step.mixer.mask(projected, x, torch.arange(8).flip(0), torch.full((8,), lam), None)
        assert (mask - 0.5).abs().max() < 0.05


# --------------------------------------------------------------------------------------------- the step


def reach(step: Step, *names: str) -> set[str]:
    """Which of q, k, one_hot and block a gradient reaches from the named parts of the loss alone."""
    parts: dict[str, Tensor] = {}
    original = Out.of

    def keep(_cls: type, logits: Tensor, target: Tensor, plan: dict[str, Any], **given: Tensor) -> Out:
        parts.update(given)
        return original(logits, target, plan, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Out, "of", classmethod(keep))
        step(*batch(), rng_of(0))
    step.zero_grad(set_to_none=True)
    sum(parts[name].mean() for name in names).backward()
    places = {"model.": "q", "mixer.encoder.": "k", "mixer.one_hot.": "one_hot", "mixer.block.": "block"}
    return {
        place
        for name, p in step.named_parameters()
        for start, place in places.items()
        if name.startswith(start) and p.grad is not None
    }


@pytest.mark.parametrize("name", LEARNED)
def test_each_loss_teaches_its_own_part(name: str) -> None:
    step = make(name)
    generator = ("generator",) if name == "adautomix" else ("generator", "mask")
    assert reach(step, *generator) == {"block"}
    assert reach(step, "mix") == {"q"}
    assert reach(step, "one_hot") == {"q", "one_hot"}


@pytest.mark.parametrize("name", LEARNED)
def test_masks_of_the_classifier_are_shares_and_without_pairs_nothing_changes(name: str) -> None:
    step = make(name, margin=0.0)
    x, y = batch(size=5, height=48, width=64)
    mask, mixer = step(x, y, rng_of(0)).plan["mask"], step.mixer
    assert mask.shape == (5, 1, 48, 64) and 0 < mask.min() < mask.max() < 1
    if name == "automix":  # nearest: one value for each cell of the hidden map
        cells = mask.unflatten(3, (-1, 64 // mixer.encoder.look(x).shape[3]))
        assert (cells == cells[..., :1]).all()
    if name != "adautomix":
        own, lam = torch.arange(5), torch.full((5,), 0.3)
        mask = mixer.mask(mixer.look(x), x, own, lam, None).detach()
        torch.testing.assert_close(mixer.mix(x, y, index=own, mask=mask, lam=lam)[0], x)


@pytest.mark.parametrize("name", LEARNED)
def test_near_the_ends_of_lambda_the_classifier_sees_plain_mixup(name: str) -> None:
    step = make(name, margin=0.5)
    x, y = batch()
    out = step(x, y, rng_of(3))
    lam = out.plan["lam"]
    expected = [float(lam[i]) * x[i] + (1 - float(lam[i])) * x[out.plan["index"][i]] for i in range(4)]
    torch.testing.assert_close(step.mixer.mix(x, y, **out.plan)[0], torch.stack(expected))
    assert lam.unique().numel() == 1


@pytest.mark.parametrize(("name", "margin", "expected"), [("automix", 0.08, 0.036), ("adautomix", 0.03, 0.06)])
def test_the_margin_is_met_as_often_as_its_law_says(name, margin, expected: float, without_shape_checks) -> None:
    """Beta(2, 2) lies outside 0.08 ... 0.92 in 3.6 % of the draws, Beta(1, 1) outside 0.03 ... 0.97 in 6 %."""
    mixer = make(name).mixer
    assert mixer.margin == margin
    x, y = batch(size=2, height=8, width=8)
    look = torch.zeros(2, mixer.encoder.channels, 1, 1)
    look = look if name == "adautomix" else mixer.block.project(look)
    plain = [mixer.plan(x, y, np.random.default_rng((1, i)), look)["mask"].shape[2] == 1 for i in range(4000)]
    assert abs(np.mean(plain) - expected) < 4 * math.sqrt(expected / 4000)


def test_the_generator_is_switched_off_in_its_share_of_the_steps(without_shape_checks) -> None:
    x, y = batch(size=2, height=8, width=8)
    for switch_off, expected in ((0.8, 0.8), (0.0, 1.0), (1.0, 1.0)):
        mixer = make("automix", switch_off=switch_off).mixer
        look = mixer.block.project(torch.zeros(2, mixer.encoder.channels, 1, 1))
        runs = [mixer.plan(x, y, np.random.default_rng((1, i)), look)["generator"]["run"] for i in range(1000)]
        assert abs(np.mean(runs) - expected) < 0.05
    step = make("automix", switch_off=1e-9)
    out = step(x, y, rng_of(0))
    assert set(out.logs) == {"mix", "one_hot", "mask"}
    out.loss.backward()
    assert all(p.grad is not None for p in step.mixer.block.parameters())


def test_the_step_is_the_sum_of_its_four_losses() -> None:
    """Written out on copies of the networks, each of which sees the batches in the published order."""
    step = make("automix", margin=0.0)
    q, one = copy.deepcopy(step.model), copy.deepcopy(step.mixer.one_hot)
    k = copy.deepcopy(step.mixer.encoder.model)
    block = copy.deepcopy(step.mixer.block)
    x, y = batch(size=6, height=32, width=48)
    out = step(x, y, rng_of(5))
    plan, generator = out.plan, out.plan["generator"]

    def blended(index: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([mask[i] * x[i] + (1 - mask[i]) * x[index[i]] for i in range(6)])

    def ce(logits: Tensor, index: Tensor, lam: Tensor) -> Tensor:
        own, other = CRITERION(logits, y.argmax(1)), CRITERION(logits, y.argmax(1)[index])
        return (lam * own + (1 - lam) * other).mean()

    with torch.no_grad():
        z = k.forward_intermediates(x, indices=[step.mixer.encoder.index])[1][0]
        up = F.interpolate(block(block.project(z), generator["index"], generator["lam"]), size=(32, 48))
        mask = 1 - torch.sigmoid(up)
        made = k(blended(generator["index"], mask))
        own = 1 - torch.sigmoid(F.interpolate(block(block.project(z), plan["index"], plan["lam"]), size=(32, 48)))
        torch.testing.assert_close(plan["mask"], own)  # of the classifier's own pairs and lambda
        parts = {
            "generator": ce(made, generator["index"], generator["lam"]),
            "mask": 0.1 * max(0.0, abs(mask.mean().item() - generator["lam"][0].item()) - 0.1),
            "one_hot": CRITERION(one(q.forward_head(q.forward_features(x), pre_logits=True)), y.argmax(1)).mean(),
            "mix": ce(q(blended(plan["index"], plan["mask"])), plan["index"], plan["lam"]),
        }
    assert {key: float(value) for key, value in out.logs.items()} == pytest.approx(
        {key: float(value) for key, value in parts.items()}, rel=1e-5
    )


def test_the_encoder_follows_by_its_momentum_and_keeps_statistics_of_its_own() -> None:
    step = make("automix", momentum=0.9, momentum_end=0.99, momentum_delay=0.3)
    mixer, model = step.mixer, step.model
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    for index, progress in enumerate((0.1, 0.29, 0.3, 0.8, 1.0)):
        step(*batch(seed=index), rng_of(index)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pairs = [(mixer.encoder.model, model), (mixer.encoder.one_hot, mixer.one_hot)]
        before = [[p.clone() for p in k.parameters()] for k, _ in pairs]
        mixer.after_step(model, progress)
        m = 0.9 if progress < 0.3 else 0.99 - 0.09 * (math.cos(math.pi * progress) + 1) / 2
        for old, (k, q) in zip(before, pairs, strict=True):
            for o, now, other in zip(old, k.parameters(), q.parameters(), strict=True):
                torch.testing.assert_close(now, m * o + (1 - m) * other)
    own, others = dict(mixer.encoder.model.named_buffers()), dict(model.named_buffers())
    assert all(not torch.equal(own[n], others[n]) for n in own if n.endswith("running_mean"))
    seen = [b.item() for n, b in own.items() if n.endswith("num_batches_tracked")]
    assert set(seen) == {10}  # a clean and a mixed batch in each of five steps


def test_the_schedules_are_monotone_and_end_where_they_should() -> None:
    values = [blocks.momentum_at(t / 100, 0.999, 0.99999, 0.25) for t in range(101)]
    assert values[:25] == [0.999] * 25 and values[-1] == pytest.approx(0.99999)
    assert all(a <= b for a, b in itertools.pairwise(values))
    step = make("automix")
    for progress, gamma in ((0.0, 0.1), (0.5, 0.05), (1.0, 0.0)):
        step.mixer.after_step(step.model, progress)
        assert step.mixer.gamma.item() == pytest.approx(gamma, abs=1e-8)
    constant = make("automix", mask_loss_end=0.1)
    constant.mixer.after_step(constant.model, 0.7)
    assert constant.mixer.gamma.item() == pytest.approx(0.1)


@pytest.mark.parametrize(("samples", "cos_sign"), [(2, 1), (2, -1), (3, 1)])
def test_every_second_step_of_adautomix_is_adversarial(samples: int, cos_sign: int) -> None:
    """The generator's loss from its formula, on a copy of the encoder; the first step works against the classifier."""
    step = make("adautomix", samples=samples, beta=0.3, cos_sign=cos_sign)
    x, y = batch(size=6)
    for index in range(4):
        k = copy.deepcopy(step.mixer.encoder.model)
        generator_block = copy.deepcopy(step.mixer.block)
        out = step(x, y, rng_of(index))
        plan = out.plan["generator"]
        with torch.no_grad():
            features, (z,) = k.forward_intermediates(x, indices=[step.mixer.encoder.index])
            clean = k.forward_head(features)
            sources = [torch.arange(6), *plan["index"]]
            logits = generator_block([z[source] for source in sources], plan["lam"])
            mask = F.interpolate(logits, size=(32, 32), mode="bilinear").softmax(1)
            seen = k(sum(mask[:, i, None] * x[source] for i, source in enumerate(sources)))
            loss = near = 0.0
            for b in range(6):
                for i, source in enumerate(sources):
                    lam, partner = plan["lam"][b, i].item(), int(source[b])
                    loss -= lam * seen[b].log_softmax(0)[y[partner].argmax()].item() / 6
                    near += lam * F.cosine_similarity(seen[b], clean[partner], dim=0).item() / 6
        expected = -0.3 * loss + 0.7 * cos_sign * near if index % 2 == 0 else loss
        assert out.logs["generator"].item() == pytest.approx(expected, rel=1e-4)
        step.mixer.after_step(step.model, (index + 1) / 4)


def test_three_samples_share_every_pixel_and_label_and_the_clean_classifier_also_sees_plain_mixup() -> None:
    step = make("adautomix", samples=3, mixup_share=0.3)
    x, y = batch(size=6)
    for index in range(4):
        one_hot = copy.deepcopy(blocks.with_classifier(step.model, step.mixer.one_hot))
        out = step(x, y, rng_of(index))
        plan, sources = out.plan, [torch.arange(6), *out.plan["index"]]
        assert plan["index"].shape == (2, 6) and plan["lam"].shape == (6, 3)
        torch.testing.assert_close(plan["mask"].sum(1), torch.ones(()).expand_as(plan["mask"].sum(1)))
        torch.testing.assert_close(plan["lam"].sum(1), torch.ones(6))
        images, targets = (
            torch.stack([sum(plan["lam"][b, i] * t[source[b]] for i, source in enumerate(sources)) for b in range(6)])
            for t in (x, y)
        )
        with torch.no_grad():
            clean, plain = CRITERION(one_hot(x), y).mean(), CRITERION(one_hot(images), targets).mean()
        assert set(out.logs) == {"mix", "generator", "one_hot", "mixup"}
        assert out.logs["one_hot"].item() == pytest.approx(0.7 * clean.item(), rel=1e-4)
        assert out.logs["mixup"].item() == pytest.approx(0.3 * plain.item(), rel=1e-4)
    mask, lam = torch.rand(6, 3, 32, 32), torch.rand(6, 3)
    images, targets = mix_many(x, y, plan["index"], mask, lam)
    for i in range(6):
        a, b = plan["index"][:, i]
        torch.testing.assert_close(images[i], mask[i, 0] * x[i] + mask[i, 1] * x[a] + mask[i, 2] * x[b])
        torch.testing.assert_close(targets[i], lam[i, 0] * y[i] + lam[i, 1] * y[a] + lam[i, 2] * y[b])


# --------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("model", ["resnet18", "test_vit", "test_convnext", "test_efficientnet"])
def test_each_classifier_is_a_plain_model_that_loads_into_a_new_one(model: str) -> None:
    step = make("automix", model)
    with torch.no_grad():
        step.mixer.one_hot.weight.add_(1)
        step.mixer.encoder.one_hot.weight.sub_(1)
    x, _ = batch(size=2, height=160, width=160)
    nets = step.mixer.models(step.model)
    assert list(nets) == ["", "k_one", "q", "q_one"]
    outputs = []
    for net in nets.values():
        fresh = timm.create_model(model, num_classes=5)
        fresh.load_state_dict(net.state_dict(), strict=True)
        with torch.no_grad():
            outputs.append(fresh.eval()(x))
            torch.testing.assert_close(net.eval()(x), outputs[-1])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[2], outputs[3])
    assert nets["q"] is step.model and step.model.get_classifier() is not step.mixer.one_hot


def test_where_statistics_are_kept_the_encoder_runs_to_its_end_and_stops_early_elsewhere() -> None:
    for model, early in (("test_resnet", False), ("test_vit", True), ("test_convnext", True)):
        step = make("automix", model)
        encoder = step.mixer.encoder
        assert encoder.stop_early == early
        x, _ = batch(size=2, height=160, width=160)
        expected = encoder.model.eval().forward_intermediates(x, indices=[encoder.index])[1][0]
        torch.testing.assert_close(encoder.look(x), expected)
        hidden, logits = encoder.look_and_classify(x)
        torch.testing.assert_close(hidden, expected)
        torch.testing.assert_close(logits, encoder.model(x).detach())


PLACES = {
    "resnet18": ("layer3", 256),
    "resnet50": ("layer3", 1024),
    "resnet18_cifar": ("layer3", 256),
    "deit_small_patch16_224": ("blocks.5", 384),
    "swin_tiny_patch4_window7_224": ("layers.2", 384),
    "convnext_tiny": ("stages.2", 384),
    "tf_efficientnet_b0": ("blocks.4", 112),
    "mobilenetv2_100": ("blocks.4", 96),
    "pvt_tiny": ("stages.2", 320),
    "moganet_tiny": ("stages.2", 128),
}


def test_masks_are_made_at_the_published_stage_and_a_model_without_stages_is_refused() -> None:
    assert backbones.__name__  # registers models of ours
    for model, place in PLACES.items():
        with torch.device("meta"):
            found = blocks.mixed_stage(timm.create_model(model))
        assert (found[0], found[2]) == place, model
    with pytest.raises(ValueError, match="does not publish its stages"):
        Step(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), build("automix"), CRITERION)


# --------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", LEARNED)
def test_the_block_has_a_group_of_its_own(name: str) -> None:
    step = make(name, block_lr=0.3, block_min_lr=0.1, block_momentum=0.0)
    one_hot, block = step.mixer.param_groups(1.0, 0.1)
    assert one_hot == {"params": list(step.mixer.one_hot.parameters())}
    assert {k: v for k, v in block.items() if k != "params"} == {
        "lr": 0.3, "min_lr": 0.1, "warmup_epochs": 0, "momentum": 0.0,
    }  # fmt: skip
    _, block = make(name).mixer.param_groups(0.2, 0.1)
    assert (block["lr"], block["min_lr"]) == (0.2, 0.002) and "momentum" not in block
    trained = {id(p) for group in (one_hot, block) for p in group["params"]}
    assert not trained & {id(p) for p in step.mixer.encoder.parameters()}


def test_a_member_that_is_not_chosen_has_gradients_of_zeros() -> None:
    """So that processes which wait for each gradient do not wait for ever."""
    step = make("switch", mixers=["mixup", "automix"], probs=[1.0, 0.0])
    step(*batch(), rng_of(0)).loss.backward()
    own = [p for p in step.mixer.parameters() if p.requires_grad]
    assert own and all(p.grad is not None and not p.grad.any() for p in own)


@pytest.mark.parametrize("order", [["mixup", "automix"], ["automix", "mixup"]])
def test_a_switch_reports_what_its_learned_member_does_and_has_one_of_each_name(order: list[str]) -> None:
    step = make("switch", mixers=order)
    learned = step.mixer.members()[order.index("automix")]
    nets = step.mixer.models(step.model)
    assert nets[""] is learned.encoder.model and nets["q"] is step.model and len(nets) == 4
    with pytest.raises(ValueError, match="two members bring a classifier 'k_one'; use one of them in a switch"):
        make("switch", mixers=["automix", "samix"])


# --------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["automix", "adautomix"])
def test_two_processes_train_like_one_that_accumulates_twice(reference: Reference, name: str) -> None:
    fixed = ("--mixer", name, "--model", "test_vit", "--per_device_train_batch_size", 4, "--epochs", 1)
    fixed += ("--warmup_epochs", 0)
    one, two = (
        [line["loss"] for line in log(reference(*fixed, processes=n)) if line["mode"] == "train"] for n in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-4) and one


def test_a_run_scores_and_exports_four_classifiers(reference: Reference) -> None:
    folder = reference("--mixer", "samix")
    final = [line for line in log(folder) if line["mode"] == "val"][-1]
    assert {f"{name}top1" for name in ("", "k_one_", "q_", "q_one_", "ema_")} <= final.keys()
    assert {path.name for path in (folder / "models").iterdir()} == {"k_one", "q", "q_one", "ema"}
    networks = [folder, *(folder / "models").iterdir()]
    weights = [timm.create_model(f"local-dir:{place}", pretrained=True).get_classifier().weight for place in networks]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_masks_of_a_run_are_drawn_and_measured(reference: Reference, tmp_path: Path) -> None:
    found = masks(Run.open(reference("--mixer", "samix")), 2, tmp_path / "masks.png")
    rows = [line.split("|")[1:4] for line in found.splitlines() if line.startswith("| 0.")]
    assert [float(row[0]) for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert all(0 < float(row[1]) < 1 for row in rows)
    assert found.endswith("The masks are nearly flat: so far this run mixes as Mixup does.")  # 3 epochs are few
    with Image.open(tmp_path / "masks.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 8 * 120


def test_masks_of_other_runs_are_refused(reference: Reference, tmp_path: Path) -> None:
    refused = {
        (
            reference("--mixer", "deit"),
            2,
        ): "mixer 'deit' learns no masks; expected a run of automix, samix or adautomix",
        (tmp_path, 2): "is no run folder: recipe.yaml is missing",
        (reference("--mixer", "samix"), 0): "pairs: expected 1 to 16, got 0",
    }
    for (folder, pairs), says in refused.items():
        with pytest.raises(UserError, match=says):
            masks(Run.open(folder), pairs, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", LEARNED)
@traced
def test_encoder_model_and_block_are_compiled_and_give_the_same(
    name: str, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, step = make(name), make(name)
    compiled = []

    def note(module: nn.Module, **options: Any) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", note)
    launch.compile_step(step)
    assert step.mixer.block in compiled
    for network in (step.model, step.mixer.encoder.model):
        assert all(network.get_submodule(stage) in compiled for stage in taps.stages(network))
    for index in range(3):
        ours, theirs = (s(*batch(), rng_of(index)) for s in (step, plain))
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.logits, theirs.logits)


def test_what_a_member_of_another_mixer_names_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, compiled = build("samix"), []
    step = make("switch", mixers=["mixup", Switch([inside])])
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    launch.compile_step(step)
    assert inside.block in compiled
