"""Labels by where the model looks: TransMix, MixPro and TL-Align against loops written from their definitions."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from teachers import fill
from test_taps import ATTENTIVE, CRITERION, DROPOUTS, attention_unfused, backbone, photos, state, traced
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixers import CutMix, Mixer, MixPro, Mixup, ResizeMix, Step, TLAlign, TransMix, Vanilla, ops, taps
from mixers.testing import batch, differences, rng_of
from mixers.tlalign import align

LEVEL = 1e-3
DEIT = "deit_tiny_patch16_224"
EVERY = {"transmix": lambda: TransMix(CutMix()), "mixpro": MixPro, "tlalign": TLAlign}


def network(name: str = DEIT, **args: object) -> nn.Module:
    """A small one without drop path, whose attention is far from uniform."""
    model = backbone(name, drop_path_rate=0.0, **args)
    nn.init.normal_(next(p for n, p in model.named_parameters() if "pos_embed" in n or "position" in n), std=1)
    if name.startswith("deit"):
        for block in model.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return model


def smoothed(y: Tensor) -> Tensor:
    return 0.9 * y + 0.1 / y.shape[1]


def share_by_loops(weights: Tensor, mask: Tensor, class_token: bool) -> Tensor:
    """What falls on a mask: attention (B, heads, N, N), without a class token the mean over all queries."""
    prefix = int(class_token)
    side = round((weights.shape[3] - prefix) ** 0.5)
    pixels = mask.shape[-1] // side
    shares = []
    for n in range(len(weights)):
        inside = total = 0.0
        for i in range(side):
            for j in range(side):
                column = weights[n, :, :, prefix + i * side + j]
                look = column[:, 0].mean() if class_token else column.mean()
                inside += look * mask[n, 0, pixels * i, pixels * j]
                total += look
        shares.append(inside / total)
    return torch.stack(shares)


def looked_by_loops(model: nn.Module, name: str, mixed: Tensor, mask: Tensor) -> Tensor:
    """What of the model's last attention on mixed images falls on a mask."""
    weights = attention_unfused(model, mixed, DROPOUTS[name.split("_")[0]])
    return share_by_loops(weights, mask, class_token=not name.startswith("swin"))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum(1)


# --------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("args", [{}, {"qk_norm": True}], ids=["plain", "normalised"])
def test_every_layer_is_looked_at_in_one_forward_and_multiplies_numbers_without_a_trace(args: dict) -> None:
    model, (x, _) = network(**args).eval(), photos()
    values = torch.rand(4, 17)
    before, plain = state(model), model(x)
    with taps.attentions(model) as looks:
        logits = model(x)
    assert torch.equal(logits, plain) and not differences(before, state(model))
    assert len(looks) == 4
    for i, look in enumerate(looks):
        weights = attention_unfused(model, x, f"blocks.{i}.attn.attn_drop")
        torch.testing.assert_close(look.weights(), weights, rtol=1e-4, atol=1e-6)
        expected = torch.stack([weights[n].mean(0) @ values[n] for n in range(4)])
        torch.testing.assert_close(look.product(values), expected, rtol=1e-4, atol=1e-6)
        assert not look.product(values).requires_grad


@pytest.mark.parametrize("name", ATTENTIVE)
def test_the_share_of_a_mask_is_what_falls_on_the_first_pixels_of_its_patches(name: str) -> None:
    model, (x, _) = network(name).eval(), photos()
    weights = attention_unfused(model, x, DROPOUTS[name.split("_")[0]])
    with taps.attention(model) as look:
        model(x)
    mask = (torch.rand(4, 1, 64, 64) < 0.6).float()
    expected = share_by_loops(weights, mask, class_token=not name.startswith("swin"))
    torch.testing.assert_close(look.share(mask), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(look.share(torch.ones_like(mask)), torch.ones(4))
    assert torch.equal(look.share(torch.zeros(4, 1, 1, 1)), torch.zeros(4))
    values = torch.rand(weights.shape[0], weights.shape[3])
    products = torch.stack([w.mean(0) @ v for w, v in zip(weights, values, strict=True)])
    torch.testing.assert_close(look.product(values), products, rtol=1e-4, atol=1e-6)


def test_a_product_stays_between_the_least_and_the_largest_number_also_in_bfloat16() -> None:
    model, (x, _) = network(), photos()
    with torch.autocast("cpu", dtype=torch.bfloat16), taps.attentions(model) as looks:
        model(x)
    for look in looks:
        assert look.captured is not None and look.captured.dtype == torch.bfloat16
        assert torch.equal(look.product(torch.ones(4, 17)), torch.ones(4, 17))
        result = look.product(torch.rand(4, 17).round())
        assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


# --------------------------------------------------------------------------------------------- all three


@pytest.mark.parametrize("name", EVERY)
def test_a_step_trains_as_a_plain_one_with_the_same_images_and_targets(name: str) -> None:
    model, (x, y) = network(), photos()
    y = smoothed(y)
    plain = copy.deepcopy(model)
    step = Step(model, EVERY[name](), CRITERION)
    out = step(x, y, rng_of(1))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    assert torch.equal(target, out.target) and torch.equal(plain(mixed), out.logits)
    assert len(set(out.plan["lam"].tolist())) == 4  # a share for each sample
    out.loss.backward()
    cross_entropy(plain(mixed), target).mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_that_keeps_its_whole_image_keeps_its_whole_label_and_a_look_is_needed(name, monkeypatch) -> None:
    monkeypatch.setattr(ops, "beta", lambda *_: 1.0)
    x, y = photos()
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = Step(network(), EVERY[name](), CRITERION)(x, y, rng_of(0))
        assert torch.equal(out.plan["lam"], torch.ones(4)) and torch.equal(out.target, y)
    with pytest.raises(ValueError, match="needs a look at the model"):
        EVERY[name]().plan(x, y, rng_of(0))


def test_a_step_costs_at_most_a_twentieth_more_than_without_mixing() -> None:
    """Counted on deit_small: no number is computed on the meta device."""
    with torch.device("meta"):
        model, x, y = timm.create_model("deit_small_patch16_224"), torch.zeros(2, 3, 224, 224), torch.zeros(2, 1000)

    def flops(mixer: Mixer) -> int:
        step = Step(model, mixer, CRITERION)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(x, y, rng_of(0)).loss.backward()
        return counter.get_total_flops()

    plain = flops(Vanilla())
    for name, make in EVERY.items():
        assert 1 < flops(make()) / plain <= (1.02 if name == "tlalign" else 1.0001), name


@traced
@pytest.mark.parametrize("name", EVERY)
def test_compiled_stages_and_activation_checkpointing_change_nothing(name: str, compiler) -> None:
    x, y = photos()
    plain, compiled, checkpointed = network(), network(), network()
    taps.compile_stages(compiled, backend="eager")
    checkpointed.set_grad_checkpointing(True)
    outs = []
    for model in (plain, compiled, checkpointed):
        outs.append(Step(model, EVERY[name](), CRITERION)(x, y, rng_of(1)))
        outs[-1].loss.backward()
        torch.testing.assert_close(outs[-1].target, outs[0].target)
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad)


# --------------------------------------------------------------------------------------------- TransMix


@pytest.mark.parametrize("name", ATTENTIVE)
def test_transmix_averages_the_shares_of_area_and_attention(name: str) -> None:
    model, (x, y) = network(name), photos()
    y = smoothed(y)
    for update in range(3):
        area = CutMix().plan(x, y, rng_of(update))
        mixed, _ = CutMix().mix(x, y, **area)
        looked = looked_by_loops(model, name, mixed, cutmix_mask(area, x))
        out = Step(model, TransMix(CutMix()), CRITERION)(x, y, rng_of(update))
        for n in range(4):
            lam = (area["lam"][n] + looked[n]) / 2
            target = lam * y[n] + (1 - lam) * y[area["index"][n]]
            torch.testing.assert_close(out.plan["lam"][n], lam, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(out.target[n], target, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.loss, cross_entropy(model(mixed), out.target).mean())


def cutmix_mask(plan: dict, x: Tensor) -> Tensor:
    """Where the sample itself stays, read off a mix of one image of ones with others of zeros."""
    marked = torch.zeros(len(x), 1, *x.shape[-2:])
    marked[0] = 1
    mixed, _ = CutMix().mix(marked, torch.ones(len(x), 1), **plan | {"index": torch.arange(len(x)).roll(1)})
    return mixed[:1].expand(len(x), -1, -1, -1)


def test_transmix_over_mixup_is_mixup() -> None:
    model, (x, y) = network(), photos()
    out = Step(model, TransMix(Mixup()), CRITERION)(x, y, rng_of(0))
    plain = Step(model, Mixup(), CRITERION)(x, y, rng_of(0))
    torch.testing.assert_close(out.target, plain.target)
    assert torch.equal(out.logits, plain.logits)


def test_transmix_needs_a_base_with_a_mask_and_a_model_with_attention() -> None:
    model, (x, y) = network(), photos()
    with pytest.raises(ValueError, match=r"needs a base whose plan has index and mask, got index, box; use CutMix"):
        Step(model, TransMix(ResizeMix()), CRITERION)(x, y, rng_of(0))
    with pytest.raises(ValueError, match="base must be a mixer that only mixes images"):
        TransMix(TransMix(CutMix()))
    with pytest.raises(ValueError, match="deit_small_patch16_224"):
        TransMix(CutMix()).setup(timm.create_model("test_resnet"))


# --------------------------------------------------------------------------------------------- MixPro


@pytest.mark.parametrize(("height", "width", "cell"), [(64, 96, 16), (50, 70, 32), (16, 8, 32)])
def test_maskmix_keeps_the_planned_number_of_cells_and_gives_their_exact_area(height, width, cell) -> None:
    x, y = batch(6, height, width)
    rows, columns = -(-height // cell), -(-width // cell)
    for update in range(10):
        plan = MixPro(cell=cell).plan(x, y, rng_of(update), None)
        count = int(np.ceil(rng_of(update).beta(1.0, 1.0) * rows * columns))
        for n in range(6):
            kept = 0
            for i, j in itertools.product(range(rows), range(columns)):
                part = plan["mask"][n, 0, cell * i : cell * (i + 1), cell * j : cell * (j + 1)]
                assert part.unique().numel() == 1
                kept += int(part[0, 0])
            assert kept == count
        torch.testing.assert_close(plan["lam"], plan["mask"].mean((1, 2, 3)))
        mixed, _ = MixPro(cell=cell).mix(x, y, **plan)
        own = plan["mask"].bool().expand_as(x)
        assert torch.equal(mixed[own], x[own]) and torch.equal(mixed[~own], x[plan["index"]][~own])


def test_maskmix_draws_one_count_per_batch_and_each_sample_its_own_uniform_subset(without_shape_checks) -> None:
    x, y = torch.zeros(4, 3, 4, 4), torch.ones(4, 1)
    cells, pairs, counts = Counter(), 0, Counter()
    for i in range(3000):
        mask = MixPro(cell=1).plan(x, y, np.random.default_rng((32, i)), None)["mask"].flatten(1)
        (count,) = set(mask.sum(1).tolist())
        counts[int(count)] += 1
        pairs += torch.equal(mask[0], mask[1])
        cells.update(mask[0].nonzero().flatten().tolist() if count == 4 else [])
    assert stats.chisquare([counts[n] for n in range(1, 17)]).pvalue > LEVEL  # ceil of a uniform number times 16
    assert stats.chisquare([cells[n] for n in range(16)]).pvalue > LEVEL
    assert pairs < 700  # equal where all 16 cells stay, in 188 batches, and by chance in the smallest and largest


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_mixpro_trusts_the_attention_as_far_as_the_model_is_right(name: str, smoothing: bool) -> None:
    model, (x, y) = network(name), photos()
    model.get_classifier().weight.data.normal_(std=0.3)
    soft = smoothed(y)
    out = Step(model, MixPro(smoothed=smoothing), CRITERION)(x, soft, rng_of(2))
    plan = MixPro().plan(x, soft, rng_of(2), None)
    mixed = torch.where(plan["mask"].bool(), x, x[plan["index"]])
    attention = looked_by_loops(model, name, mixed, plan["mask"])
    logits, losses = model(mixed), []
    for n in range(4):
        partner, area = plan["index"][n], plan["lam"][n]
        by_area = area * soft[n] + (1 - area) * soft[partner]
        predicted = logits[n].softmax(0)
        s = (predicted @ by_area) / (predicted.norm() * by_area.norm())
        assert 0 < s < 1
        lam = (s * attention[n] + (1 - s) * area).detach()
        torch.testing.assert_close(out.plan["lam"][n], lam, rtol=1e-4, atol=1e-6)
        labels = soft if smoothing else y
        own, other = (cross_entropy(logits[[n]], labels[[k]])[0] for k in (n, int(partner)))
        losses.append(lam * own + (1 - lam) * other)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_mixpro_carries_gradient_through_the_trust_only_when_asked() -> None:
    x, y = photos()
    gradients = {}
    for live, ours in itertools.product((False, True), repeat=2):
        model = network()
        model.get_classifier().weight.data.normal_(std=0.3)
        if ours:
            out = Step(model, MixPro(detach=not live), CRITERION)(x, y, rng_of(2))
            assert not out.target.requires_grad and not out.plan["lam"].requires_grad
            out.loss.backward()
        else:
            plan = MixPro().plan(x, y, rng_of(2), None)
            with taps.attention(model) as look:
                logits = model(MixPro().mix(x, y, **plan)[0])
            area, partner = plan["lam"], y[plan["index"]]
            s = torch.cosine_similarity(logits.softmax(1), area[:, None] * y + (1 - area)[:, None] * partner)
            s = s if live else s.detach()
            lam = s * look.share(plan["mask"]) + (1 - s) * area
            (lam * cross_entropy(logits, y) + (1 - lam) * cross_entropy(logits, partner)).mean().backward()
        gradients[live, ours] = model.blocks[1].mlp.fc1.weight.grad
    for live in (False, True):
        torch.testing.assert_close(gradients[live, True], gradients[live, False], rtol=1e-3, atol=1e-7)
    assert not torch.allclose(gradients[True, True], gradients[False, True], rtol=1e-2, atol=1e-7)


def test_mixpro_refuses_cells_that_cut_a_patch() -> None:
    for name, cell, patch in ((DEIT, 24, 16), ("swin_tiny_patch4_window7_224", 16, 32), ("pvt_tiny", 48, 32)):
        with pytest.raises(ValueError, match=f"cell must be a multiple of {patch}, .* got {cell}"):
            MixPro(cell=cell).setup(backbone(name))
    MixPro(cell=48).setup(backbone(DEIT))


# --------------------------------------------------------------------------------------------- TL-Align


def test_tlalign_is_carrying_the_labels_of_all_tokens_through_all_layers() -> None:
    model, (x, y) = network(), photos()
    y = smoothed(y)
    shares = []
    for update in range(4):
        plan = TLAlign().plan(x, y, rng_of(update), model)
        mixed, by_area = TLAlign().mix(x, y, **plan)
        layers = [attention_unfused(model, mixed, f"blocks.{i}.attn.attn_drop").mean(1) for i in range(4)]
        out = Step(model, TLAlign(), CRITERION)(x, y, rng_of(update))
        for n in range(4):
            labels = [by_area[n]]
            for i, j in itertools.product(range(4), repeat=2):
                own = plan["mask"][n, 0, 16 * i, 16 * j] == 1
                labels.append(y[n] if own else y[plan["index"][n]])
            carried = torch.stack(labels)  # (17, 5)
            for weights in layers:
                carried = (weights[n] @ carried + carried) / 2
            torch.testing.assert_close(out.target[n], carried[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.loss, cross_entropy(model(mixed), out.target).mean())
        shares.append((out.plan["lam"] - plan["lam"]).abs().max().item())
    assert max(shares) > 0.01  # the attention mattered


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 48)])
def test_tlalign_cuts_cutmix_boxes_of_whole_patches(height: int, width: int) -> None:
    model, (x, y) = network(dynamic_img_size=True), batch(3, height, width)
    for update in range(30):
        plan = TLAlign(0.7).plan(x, y, rng_of(update), model)
        rng = rng_of(update)
        lam = rng.beta(0.7, 0.7)
        down, across = height // 16, width // 16
        half = [int(side * (1 - lam) ** 0.5) // 2 for side in (down, across)]
        row, column = rng.integers(down), rng.integers(across)
        for i, j in itertools.product(range(down), range(across)):
            inside = row - half[0] <= i < row + half[0] and column - half[1] <= j < column + half[1]
            patch = plan["mask"][:, 0, 16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)]
            assert (patch == (not inside)).all()
        torch.testing.assert_close(plan["lam"], plan["mask"].mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_tiny", "gap", "convnext_tiny"])
def test_tlalign_refuses_a_model_that_does_not_keep_its_tokens(name: str) -> None:
    model = timm.create_model("test_vit", global_pool="avg") if name == "gap" else backbone(name)
    with pytest.raises(ValueError, match="deit_small_patch16_224"):
        TLAlign().setup(model)


def test_several_prefix_tokens_all_start_with_the_share_of_the_area() -> None:
    model = fill(timm.create_model("test_vit", num_classes=5, dynamic_img_size=True, reg_tokens=2))
    x, y = photos()
    plan = TLAlign().plan(x, y, rng_of(1), model)
    seen: list[Tensor] = []
    with taps.attentions(model) as looks:
        model(x)
    looks[0].product = lambda values: seen.append(values) or values  # type: ignore[method-assign]
    align(looks, plan["mask"], plan["lam"])
    assert seen[0].shape == (4, 3 + 16)
    assert torch.equal(seen[0][:, :3], plan["lam"][:, None].expand(4, 3))
