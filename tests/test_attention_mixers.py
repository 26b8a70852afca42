"""Labels by where the model looks: TransMix, MixPro and TL-Align against loops written from their definitions."""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch
from small_models import ATTENTIVE, CRITERION, DROPOUTS, attention_unfused, backbone, photos, state, traced
from teachers import fill
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixers import CutMix, MixPro, Mixup, ResizeMix, Step, Switch, TLAlign, TransMix, Vanilla, build, ops, taps
from mixers.testing import batch, differences, rng_of
from mixers.tlalign import align

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
DEIT = "deit_tiny_patch16_224"
EVERY = {"transmix": lambda: TransMix(CutMix()), "mixpro": MixPro, "tlalign": TLAlign}


def network(name=DEIT, **args):
    """A small one without drop path, whose attention is far from uniform."""
    model = backbone(name, drop_path_rate=0.0, **args)
    nn.init.normal_(next(p for n, p in model.named_parameters() if "pos_embed" in n or "position" in n), std=1)
    if name.startswith("deit"):
        for block in model.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=0.2)
    return model


def smoothed(y: Tensor) -> Tensor:
    return 0.9 * y + 0.1 / y.shape[1]


def share(model: nn.Module, name: str, images: Tensor, mask: Tensor) -> Tensor:
    """What of the last attention falls on the first pixels of a mask's patches: the class token's, or all queries'."""
    weights = attention_unfused(model, images, DROPOUTS[name.split("_")[0]]).mean(1)
    look = weights.mean(1) if name.startswith("swin") else weights[:, 0, 1:]
    patch = mask.shape[-1] // round(look.shape[1] ** 0.5)
    return (look * mask[:, 0, ::patch, ::patch].flatten(1)).sum(1) / look.sum(1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("args", [{}, {"qk_norm": True}], ids=["plain", "normalised"])
def test_every_layer_is_looked_at_in_one_forward_and_multiplies_numbers_without_a_trace(args):
    model, (x, _), values = network(**args).eval(), photos(), torch.rand(4, 17)
    before, plain = state(model), model(x)
    with taps.attentions(model) as looks:
        logits = model(x)
    assert torch.equal(logits, plain) and not differences(before, state(model)) and len(looks) == 4
    for i, look in enumerate(looks):
        weights, product = attention_unfused(model, x, f"blocks.{i}.attn.attn_drop"), look.product(values)
        torch.testing.assert_close(look.weights(), weights, **CLOSE)
        torch.testing.assert_close(product, torch.stack([weights[n].mean(0) @ values[n] for n in range(4)]), **CLOSE)
        assert not product.requires_grad


def test_a_product_stays_between_the_least_and_the_largest_number_also_in_bfloat16():
    model, (x, _) = network(), photos()
    with torch.autocast("cpu", dtype=torch.bfloat16), taps.attentions(model) as looks:
        model(x)
    for look in looks:
        assert look.captured.dtype == torch.bfloat16
        assert torch.equal(look.product(torch.ones(4, 17)), torch.ones(4, 17))
        assert torch.equal(look.share(torch.zeros(4, 1, 1, 1)), torch.zeros(4))
        result = look.product(torch.rand(4, 17).round())
        assert result.dtype == torch.float32 and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", EVERY)
def test_a_step_trains_as_a_plain_one_with_the_same_images_and_targets(name):
    model, (x, y) = network(), photos()
    y, plain, step = smoothed(y), copy.deepcopy(model), Step(model, EVERY[name](), CRITERION)
    out = step(x, y, rng_of(1))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    assert torch.equal(target, out.target) and torch.equal(plain(mixed), out.logits)
    assert len(set(out.plan["lam"].tolist())) == 4  # a share for each sample
    out.loss.backward()
    cross_entropy(plain(mixed), target).mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_that_keeps_its_whole_image_keeps_its_whole_label_and_a_look_is_needed(name, monkeypatch):
    monkeypatch.setattr(ops, "beta", lambda *_: 1.0)
    x, y = photos()
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = Step(network(), EVERY[name](), CRITERION)(x, y, rng_of(0))
        assert torch.equal(out.plan["lam"], torch.ones(4)) and torch.equal(out.target, y)
    with pytest.raises(ValueError, match="needs a look at the model"):
        EVERY[name]().plan(x, y, rng_of(0))


def test_a_step_costs_what_its_looks_cost():
    """Next to a step without mixing, forward and backward on deit_small. On the meta device nothing is computed."""
    with torch.device("meta"):
        model, x, y = timm.create_model("deit_small_patch16_224"), torch.zeros(2, 3, 224, 224), torch.zeros(2, 1000)
    costs = {
        "attend": (1, 1.0001),
        "maskmix": (1, 1.0001),
        "tlalign": (1, 1.02),
        "smm": (1.3, 1.34),
        "token": (1.3, 1.34),
    }
    plain = 0
    for name in ("vanilla", *costs):
        step = Step(model, build(name, **({"base": "cutmix"} if name == "attend" else {})), CRITERION).to("meta")
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(x, y, rng_of(0)).loss.backward()
        plain = plain or counter.get_total_flops()
        low, high = costs.get(name, (0, 1))
        assert low < counter.get_total_flops() / plain <= high, name


@traced
@pytest.mark.parametrize("name", EVERY)
def test_compiled_stages_and_activation_checkpointing_change_nothing(name, compiler):
    (x, y), plain, compiled, checkpointed, outs = photos(), network(), network(), network(), []
    taps.compile_stages(compiled, backend="eager")
    checkpointed.set_grad_checkpointing(True)
    for model in (plain, compiled, checkpointed):
        outs.append(Step(model, EVERY[name](), CRITERION)(x, y, rng_of(1)))
        outs[-1].loss.backward()
        torch.testing.assert_close(outs[-1].target, outs[0].target)
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad)


def test_bases_models_and_cells_that_do_not_do_are_refused_in_words():
    """Families without attention, or whose tokens change from stage to stage: ``test_every_cell_trains.py``."""
    with pytest.raises(ValueError, match=r"needs a base whose plan has index and mask, got index, box; use CutMix"):
        Step(network(), TransMix(ResizeMix()), CRITERION)(*photos(), rng_of(0))
    with pytest.raises(ValueError, match="base must be a mixer that only mixes images"):
        TransMix(TransMix(CutMix()))
    with pytest.raises(ValueError, match="deit_small_patch16_224"):
        TLAlign().setup(timm.create_model("test_vit", global_pool="avg"))
    for name, cell, patch in ((DEIT, 24, 16), ("swin_tiny_patch4_window7_224", 16, 32), ("pvt_tiny", 48, 32)):
        with pytest.raises(ValueError, match=f"cell must be a multiple of {patch}, .* got {cell}"):
            MixPro(cell=cell).setup(backbone(name))
    MixPro(cell=48).setup(backbone(DEIT))


@pytest.mark.parametrize("name", ATTENTIVE)
def test_transmix_averages_the_shares_of_area_and_attention(name):
    model, (x, y) = network(name), photos()
    y = smoothed(y)
    for update in range(3):
        area = CutMix().plan(x, y, rng_of(update))
        # Where the sample itself stays, read off a mix of an image of ones with others of zeros.
        marked = torch.eye(4)[0].view(4, 1, 1, 1).expand(4, 1, 64, 64)
        mask, _ = CutMix().mix(marked, torch.ones(4, 1), **area | {"index": torch.arange(4).roll(1)})
        mixed, _ = CutMix().mix(x, y, **area)
        out = Step(model, TransMix(CutMix()), CRITERION)(x, y, rng_of(update))
        lam = (area["lam"] + share(model, name, mixed, mask[:1].expand(4, -1, -1, -1))) / 2
        torch.testing.assert_close(out.plan["lam"], lam, **CLOSE)
        torch.testing.assert_close(out.target, lam[:, None] * y + (1 - lam[:, None]) * y[area["index"]], **CLOSE)
        torch.testing.assert_close(out.loss, cross_entropy(model(mixed), out.target).mean())


@pytest.mark.parametrize("name", ATTENTIVE)
def test_numbers_are_multiplied_by_the_last_attention_of_every_family(name):
    model, (x, _) = network(name), photos()
    weights = attention_unfused(model, x, DROPOUTS[name.split("_")[0]]).mean(1)
    with taps.attention(model) as look:
        model(x)
    values = torch.rand(weights.shape[0], weights.shape[2])
    torch.testing.assert_close(look.product(values), (weights @ values[:, :, None])[:, :, 0], **CLOSE)


def test_transmix_over_mixup_which_shows_as_much_everywhere_is_mixup():
    out, plain = (Step(network(), mixer, CRITERION)(*photos(), rng_of(0)) for mixer in (TransMix(Mixup()), Mixup()))
    torch.testing.assert_close(out.target, plain.target)
    assert torch.equal(out.logits, plain.logits)


@pytest.mark.parametrize("base", [lambda: Switch([Vanilla()]), lambda: build("guidedmix", share=0.0)])
def test_transmix_leaves_a_batch_that_its_base_does_not_mix(base):
    x, y = photos()
    out, plain = (Step(network(), mixer, CRITERION)(x, y, rng_of(0)) for mixer in (TransMix(base()), Vanilla()))
    assert torch.equal(out.target, y) and torch.equal(out.loss, plain.loss)


def test_transmix_takes_a_switch_in_a_switch():
    x, y = photos()
    step, rng = Step(network(), TransMix(Switch([Switch([CutMix()])])), CRITERION), rng_of(3)
    out = step(x, y, rng_of(3))
    rng.choice(1), rng.choice(1)  # the members
    alone = Step(network(), TransMix(CutMix()), CRITERION)(x, y, rng)
    assert torch.equal(out.target, alone.target) and torch.equal(out.loss, alone.loss)
    assert not differences(step.mixer.mix(x, y, **out.plan), TransMix(CutMix()).mix(x, y, **alone.plan))


@pytest.mark.parametrize(("height", "width", "cell"), [(64, 96, 16), (50, 70, 32), (16, 8, 32)])
def test_maskmix_keeps_one_count_of_cells_in_a_uniform_subset_of_each_sample_with_their_exact_area(height, width, cell):
    x, y = batch(6, height, width)
    rows, columns = -(-height // cell), -(-width // cell)
    for update in range(10):
        plan, rng = MixPro(cell=cell).plan(x, y, rng_of(update), None), rng_of(update)
        count, index = np.ceil(rng.beta(1.0, 1.0) * rows * columns), rng.permutation(6)
        drawn = rng.permuted(np.tile(np.arange(rows * columns) < count, (6, 1)), axis=1).reshape(6, rows, columns)
        pixels = torch.from_numpy(drawn.repeat(cell, 1).repeat(cell, 2)[:, None, :height, :width])
        assert torch.equal(plan["mask"] == 1, pixels) and plan["index"].tolist() == index.tolist()
        torch.testing.assert_close(plan["lam"], plan["mask"].mean((1, 2, 3)))
        assert torch.equal(MixPro(cell=cell).mix(x, y, **plan)[0], torch.where(pixels, x, x[plan["index"]]))


@pytest.mark.parametrize("name", ATTENTIVE)
def test_mixpro_trusts_the_attention_as_far_as_the_model_is_right_with_a_gradient_only_when_asked(name):
    (x, y), gradients = photos(), []
    soft = smoothed(y)
    plan = MixPro().plan(x, soft, rng_of(2), None)
    mixed = torch.where(plan["mask"].bool(), x, x[plan["index"]])
    for smoothing, live in itertools.product((False, True), repeat=2):
        model = network(name)
        model.get_classifier().weight.data.normal_(std=0.3)
        plain, labels = copy.deepcopy(model), soft if smoothing else y
        out = Step(model, MixPro(detach=not live, smoothed=smoothing), CRITERION)(x, soft, rng_of(2))
        attention, logits, losses = share(plain, name, mixed, plan["mask"]), plain(mixed), []
        for n, (partner, area) in enumerate(zip(plan["index"].tolist(), plan["lam"], strict=True)):
            by_area, predicted = area * soft[n] + (1 - area) * soft[partner], logits[n].softmax(0)
            s = (predicted @ by_area) / (predicted.norm() * by_area.norm())
            assert 0 < s < 1
            s = s if live else s.detach()
            lam = s * attention[n] + (1 - s) * area
            torch.testing.assert_close(out.plan["lam"][n], lam.detach(), **CLOSE)
            own, other = (cross_entropy(logits[n], labels[k]) for k in (n, partner))
            losses.append(lam * own + (1 - lam) * other)
        loss = torch.stack(losses).mean()
        torch.testing.assert_close(out.loss, loss, **CLOSE)
        assert not out.target.requires_grad and not out.plan["lam"].requires_grad
        for each, network_of_it in ((loss, plain), (out.loss, model)):
            each.backward()
            gradients.append(next(p for n, p in network_of_it.named_parameters() if "mlp" in n and p.ndim == 2).grad)
        torch.testing.assert_close(gradients[-1], gradients[-2], rtol=1e-3, atol=1e-7)
    assert not torch.allclose(gradients[1], gradients[3], rtol=1e-2, atol=1e-7)


def test_tlalign_is_carrying_the_labels_of_all_tokens_through_all_layers():
    model, (x, y) = network(), photos()
    y = smoothed(y)
    for update in range(4):
        plan = TLAlign().plan(x, y, rng_of(update), model)
        mixed, by_area = TLAlign().mix(x, y, **plan)
        layers = [attention_unfused(model, mixed, f"blocks.{i}.attn.attn_drop").mean(1) for i in range(4)]
        out = Step(model, TLAlign(), CRITERION)(x, y, rng_of(update))
        for n in range(4):
            own = plan["mask"][n, 0, ::16, ::16].flatten() == 1
            carried = torch.stack([by_area[n], *(y[n] if here else y[plan["index"][n]] for here in own)])  # (17, 5)
            for weights in layers:
                carried = (weights[n] @ carried + carried) / 2
            torch.testing.assert_close(out.target[n], carried[0], **CLOSE)
        torch.testing.assert_close(out.loss, cross_entropy(model(mixed), out.target).mean())


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 48)])
def test_tlalign_cuts_cutmix_boxes_of_whole_patches(height, width):
    model, (x, y) = network(dynamic_img_size=True), batch(3, height, width)
    for update in range(30):
        plan = TLAlign(0.7).plan(x, y, rng_of(update), model)
        patches = CutMix(0.7).plan(x[:, :, ::16, ::16], y, rng_of(update))["mask"]
        assert torch.equal(plan["mask"], patches.repeat_interleave(16, 2).repeat_interleave(16, 3))
        torch.testing.assert_close(plan["lam"], plan["mask"].mean((1, 2, 3)))


def test_several_prefix_tokens_all_start_with_the_share_of_the_area(monkeypatch):
    model, (x, y) = fill(timm.create_model("test_vit", num_classes=5, dynamic_img_size=True, reg_tokens=2)), photos()
    plan, seen = TLAlign().plan(x, y, rng_of(1), model), []
    with taps.attentions(model) as looks:
        model(x)
    monkeypatch.setattr(looks[0], "product", lambda values: seen.append(values) or values)
    align(looks, plan["mask"], plan["lam"])
    assert seen[0].shape == (4, 3 + 16) and torch.equal(seen[0][:, :3], plan["lam"][:, None].expand(4, 3))
