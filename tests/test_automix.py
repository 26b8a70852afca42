"""AutoMix, SAMix and AdAutoMix: the formulas of their blocks, who learns from what, and what is reported."""

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from marks import slow_unless
from PIL import Image
from resuming import log
from runs import make_run, quick
from small_models import traced
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mixers import Out, Step, Switch, blocks, build, taps
from mixers.adautomix import AdaptiveMask, mix_many
from mixers.automix import MixBlock
from mixers.samix import SAMixBlock
from mixers.testing import batch, rng_of
from mixup_recipes.pages.masks import masks
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones, launch
from mixup_recipes.typed import UserError

CRITERION = nn.CrossEntropyLoss(reduction="none")
NAMES = ["automix", "samix", "adautomix"]
every = pytest.mark.parametrize("name", NAMES)

# Hidden maps of three samples, their partners, and a lambda for each.
Z = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 6, 3, 3)))
INDEX, LAM = torch.tensor([2, 0, 1]), torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)


def make(name, model="test_resnet", **args):
    torch.manual_seed(0)
    return Step(timm.create_model(model, num_classes=5), build(name, **args), CRITERION)


def wake(block):
    """Weights of a size at which a mistake shows, in float64."""
    torch.manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    return block.double()


def slow_attention(q, k, v):
    """One sample: q, k (d, P), v (P,) -> (P,), position by position."""
    rows = [(q[:, i] @ k / math.sqrt(len(q))).exp() for i in range(q.shape[1])]
    return torch.stack([row @ v / row.sum() for row in rows])


def linear(layer, z):
    """A 1x1 convolution of one flat map (C, P), as a matrix."""
    return layer.weight[:, :, 0, 0] @ z + (0 if layer.bias is None else layer.bias[:, None])


def by_hand(x, y, sources, mask, lam):
    """Images and targets summed over sources, by their masks (B, n, h, w) and shares (B, n)."""
    images = sum(mask[:, i, None] * x[source] for i, source in enumerate(sources))
    return images, sum(lam[:, i, None] * y[source] for i, source in enumerate(sources))


@pytest.mark.parametrize("lam_concat", [True, False])
@torch.no_grad()
def test_the_block_of_automix_is_its_formula(lam_concat):
    block = MixBlock(lam_concat)
    block.setup(6)
    wake(block)
    found = block(block.project(Z), INDEX, LAM)
    for i in range(3):
        pair = [Z[i].flatten(1), Z[INDEX[i]].flatten(1)]
        if lam_concat:
            pair = [torch.cat((z, share.expand(1, 9))) for z, share in zip(pair, (LAM[i], 1 - LAM[i]), strict=True)]
        query, key = (linear(block.query_key, z) for z in pair)
        assert_close(found[i].flatten(), slow_attention(query, key, linear(block.value, pair[1])[0]))


@pytest.mark.parametrize("k", [-1, 0, 0.25, 2])
@torch.no_grad()
def test_the_block_of_samix_is_its_formula(k):
    block = SAMixBlock(lam_mul_k=k, dropout=0.5)
    block.setup(6)
    wake(block).train()
    noise = block.noise(Z, np.random.default_rng(0))
    assert set(noise.flatten().tolist()) == {0.0, 2.0}
    found = block(block.project(Z), INDEX, LAM, noise)
    curve = (4 / 3 * LAM**3 - 2 * LAM**2 + (k + 1) * LAM) / (k + 1 - 2 / 3)  # fixes 0, 1/2 and 1 and grows
    r = (LAM if k == -1 else curve)[:, None, None]
    own, other = Z.flatten(2) * (1 + r), Z[INDEX].flatten(2) * (1 + 1 - r)
    hidden, norm = torch.stack([linear(block.value[0], b) for b in other]), block.value[1]
    mean, var = hidden.mean((0, 2), keepdim=True), hidden.var((0, 2), correction=0, keepdim=True)
    hidden = F.elu((hidden - mean) / (var + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None])
    for i in range(3):
        pair = torch.cat((own[i], other[i]))
        value = linear(block.value[3], hidden[i])[0] * noise[i].flatten()
        assert_close(found[i].flatten(), slow_attention(linear(block.query, pair), linear(block.key, pair), value))


@pytest.mark.parametrize("samples", [2, 3])
@torch.no_grad()
def test_the_generator_of_adautomix_is_its_formula(samples):
    shares = torch.stack([LAM, (1 - LAM) / (samples - 1), (1 - LAM) / 2], 1)[:, :samples]
    sources = [Z, Z[INDEX], Z.flip(0)][:samples]
    block = wake(AdaptiveMask(6, lam_concat=True, norm=False))
    found = block(sources, shares)
    for b in range(3):
        flat = [torch.cat((s[b].flatten(1), shares[b, i].expand(1, 9))) for i, s in enumerate(sources)]
        q, k = ([linear(layer[0], f).clamp(min=0) for f in flat] for layer in (block.query, block.key))
        for i in range(samples):
            others = sum(k[j] for j in range(samples) if j != i)
            assert_close(found[b, i].flatten(), slow_attention(q[i], others, linear(block.value, flat[i])[0]))


@pytest.mark.parametrize("model", ["resnet50", "deit_small_patch16_224"])
def test_a_step_costs_at_most_3_1_times_one_without_mixing(model, without_shape_checks):
    """Counted by torch on the meta device at full size; every batch of these updates is mixed by a learned mask."""
    total, x, y = [], torch.empty(4, 3, 224, 224, device="meta"), torch.empty(4, 1000, device="meta")
    for mixer in (build("vanilla"), build("automix", margin=0.0), build("samix", margin=0.0)):
        with torch.device("meta"):
            step = Step(timm.create_model(model), mixer, CRITERION)
        with FlopCounterMode(display=False) as counter:
            step(x, y, rng_of(0)).loss.backward()
        total.append(counter.get_total_flops())
    assert all(2.5 < learned / total[0] < 3.105 for learned in total[1:])


@pytest.mark.parametrize("channels", [256, 384, 1024])
def test_blocks_have_the_published_sizes(channels):
    d = channels // 2
    automix, samix = (channels + 1) * d + d + channels + 1 + 1, 2 * (2 * channels * d + d) + channels * d + 2 * d + d
    for block, expected in ((MixBlock(), automix), (SAMixBlock(), samix)):
        block.setup(channels)
        assert sum(p.numel() for p in block.parameters()) == expected
        weights = torch.cat([m.weight.flatten() for m in block.modules() if isinstance(m, nn.Conv2d)])
        assert weights.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("make_block", "spread"), [(MixBlock, 0), (SAMixBlock, 2)])
def test_the_masks_loss_is_that_of_all_pixels_of_the_batch(make_block, spread):
    rng = np.random.default_rng(0)
    for _ in range(20):
        lam, mask = rng.random(), rng.random((3, 1, 4, 5)) ** rng.uniform(0.2, 5)
        expected = max(0.0, abs(mask.mean() - lam) - 0.1) - spread * mask.var()
        found = make_block().mask_loss(torch.from_numpy(mask), torch.full((3,), lam, dtype=torch.float64))
        assert found.item() == pytest.approx(expected) and found >= -0.5


@every
def test_each_loss_teaches_its_own_part(name, monkeypatch):
    step, original, parts = make(name), Out.of, {}
    monkeypatch.setattr(Out, "of", lambda *given, **losses: parts.update(losses) or original(*given, **losses))
    places = {"model.": "q", "mixer.encoder.": "k", "mixer.one_hot.": "one_hot", "mixer.block.": "block"}
    makes_masks = ("generator",) if name == "adautomix" else ("generator", "mask")
    for losses, expected in ((makes_masks, {"block"}), (("mix",), {"q"}), (("one_hot",), {"q", "one_hot"})):
        step(*batch(), rng_of(0))
        step.zero_grad()
        sum(parts[loss].mean() for loss in losses).backward()
        reached = [parameter for parameter, p in step.named_parameters() if p.grad is not None]
        assert {places[start] for start in places if any(p.startswith(start) for p in reached)} == expected


@every
def test_masks_are_shares_near_one_half_at_first_need_a_pair_and_are_plain_mixup_near_the_ends_of_lambda(name):
    step, (x, y) = make(name, margin=0.0), batch(size=5, height=48, width=64)
    mask, mixer = step(x, y, rng_of(0)).plan["mask"], step.mixer
    assert mask.shape == (5, 1, 48, 64) and 0 < mask.min() < mask.max() < 1
    if name == "automix":  # nearest: one value for each cell of the hidden map
        cells = mask.unflatten(3, (-1, 64 // mixer.encoder.look(x).shape[3]))
        assert (cells == cells[..., :1]).all()
    if name != "adautomix":
        for lam in (0.1, 0.5, 0.9):
            mask = mixer.masks_for(x, torch.arange(5).flip(0), torch.full((5,), lam))
            assert (mask - 0.5).abs().max() < 0.05
        own, lam = torch.arange(5), torch.full((5,), 0.3)
        mask = mixer.masks_for(x, own, lam).detach()
        assert_close(mixer.mix(x, y, index=own, mask=mask, lam=lam)[0], x)
    mixer.margin = 0.5  # all lambdas are this near to an end: plain Mixup
    plan = step(x, y, rng_of(3)).plan
    (lam,) = plan["lam"].unique()
    assert_close(mixer.mix(x, y, **plan)[0], lam * x + (1 - lam) * x[plan["index"]])


def test_the_margin_is_met_and_the_generator_switched_off_as_often_as_the_law_says(without_shape_checks):
    """Beta(2, 2) lies outside 0.08 ... 0.92 in 3.6 % of the draws, Beta(1, 1) outside 0.03 ... 0.97 in 6 %.

    Of three uniform draws the first has a share u/(u+v+w) outside of it in 3.1 %.
    """
    x, y = batch(2, 8, 8)

    def plans(number, name="automix", **args):
        mixer = make(name, **args).mixer
        mixer.mask = mixer.masks = lambda *_: torch.zeros(2, 2, 8, 8)  # when a mask is made counts here, not what it is
        look = torch.zeros(2, mixer.encoder.channels, 1, 1)
        look = look if name == "adautomix" else mixer.block.project(look)
        return [mixer.plan(x, y, np.random.default_rng((1, i)), look) for i in range(number)]

    draws = np.random.default_rng(0).random((10**6, 3))
    share = draws[:, 0] / draws.sum(1)
    three = np.mean((share <= 0.03) | (share >= 0.97))
    assert three == pytest.approx(0.031, abs=0.001)
    for name, args, expected in (
        ("automix", {}, 0.036), ("adautomix", {}, 0.06), ("adautomix", {"samples": 3}, three)
    ):  # fmt: skip
        plain = [plan["mask"].shape[2] == 1 for plan in plans(4000, name, **args)]
        assert abs(np.mean(plain) - expected) < 4 * math.sqrt(expected / 4000)
    for switch_off, expected in ((0.8, 0.8), (0.0, 1.0), (1.0, 1.0)):
        runs = [plan["generator"]["run"] for plan in plans(1000, switch_off=switch_off)]
        assert abs(np.mean(runs) - expected) < 0.05
    step = make("automix", switch_off=1e-9)
    out = step(x, y, rng_of(0))
    assert set(out.logs) == {"mix", "one_hot", "mask"}
    out.loss.backward()
    assert all(p.grad is not None for p in step.mixer.block.parameters())


def test_the_step_is_the_sum_of_its_four_losses():
    """Written out on copies of the networks, each of which sees the batches in the published order."""
    step, (x, y) = make("automix", margin=0.0), batch(size=6, height=32, width=48)
    networks = (step.model, step.mixer.one_hot, step.mixer.encoder.model, step.mixer.block)
    q, one, k, block = map(copy.deepcopy, networks)
    out = step(x, y, rng_of(5))
    plan, generator = out.plan, out.plan["generator"]

    def mask_of(given):
        return 1 - torch.sigmoid(F.interpolate(block(block.project(z), given["index"], given["lam"]), size=(32, 48)))

    def loss(network, given, mask):
        logits = network(mask * x + (1 - mask) * x[given["index"]])
        own, other = CRITERION(logits, y.argmax(1)), CRITERION(logits, y.argmax(1)[given["index"]])
        return (given["lam"] * own + (1 - given["lam"]) * other).mean()

    with torch.no_grad():
        z = k.forward_intermediates(x, indices=[step.mixer.encoder.index])[1][0]
        mask = mask_of(generator)
        assert_close(plan["mask"], mask_of(plan))  # of the classifier's own pairs and lambda
        expected = {
            "mask": 0.1 * ((mask.mean() - generator["lam"][0]).abs() - 0.1).clamp(min=0),
            "generator": loss(k, generator, mask),
            "one_hot": CRITERION(one(q.forward_head(q.forward_features(x), pre_logits=True)), y.argmax(1)).mean(),
            "mix": loss(q, plan, plan["mask"]),
        }
    assert_close(out.logs, expected, rtol=1e-5, atol=1e-12)


def test_the_encoder_follows_by_its_momentum_and_keeps_statistics_of_its_own():
    step = make("automix", momentum=0.9, momentum_end=0.99, momentum_delay=0.3)
    mixer, model = step.mixer, step.model
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.1)
    for index, progress in enumerate((0.1, 0.29, 0.3, 0.8, 1.0)):
        step(*batch(seed=index), rng_of(index)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        own = [*mixer.encoder.model.parameters(), *mixer.encoder.one_hot.parameters()]
        before = [p.clone() for p in own]
        mixer.after_step(model, progress)
        m = 0.9 if progress < 0.3 else 0.99 - 0.09 * (math.cos(math.pi * progress) + 1) / 2
        for old, now, other in zip(before, own, [*model.parameters(), *mixer.one_hot.parameters()], strict=True):
            assert_close(now, m * old + (1 - m) * other)
    buffers, others = dict(mixer.encoder.model.named_buffers()), dict(model.named_buffers())
    assert all(not torch.equal(buffers[n], others[n]) for n in buffers if n.endswith("running_mean"))
    # a clean and a mixed batch in each of five steps
    assert {b.item() for n, b in buffers.items() if n.endswith("num_batches_tracked")} == {10}


def test_the_schedules_are_monotone_and_end_where_they_should():
    values = [blocks.momentum_at(t / 100, 0.999, 0.99999, 0.25) for t in range(101)]
    assert values[:25] == [0.999] * 25 and values[-1] == pytest.approx(0.99999)
    assert all(a <= b for a, b in itertools.pairwise(values))
    for args, progress, gamma in (({}, 0.0, 0.1), ({}, 0.5, 0.05), ({}, 1.0, 0.0), ({"mask_loss_end": 0.1}, 0.7, 0.1)):
        step = make("automix", **args)
        step.mixer.after_step(step.model, progress)
        assert step.mixer.gamma.item() == pytest.approx(gamma, abs=1e-8)
    for end in (0.0, 0.02):  # OpenMixup's hook, before each update, of the value that the last one left
        step, value = make("samix", mask_loss_law="compounded", mask_loss_end=end), 0.1
        for update in range(10):
            value = end + (value - end) * (1 + math.cos(math.pi * update / 10)) / 2
            assert step.mixer.gamma.item() == pytest.approx(value, rel=1e-5)
            step.mixer.after_step(step.model, (update + 1) / 10)


@pytest.mark.parametrize(("samples", "cos_sign"), [(2, 1), (2, -1), (3, 1)])
def test_every_second_step_of_adautomix_is_adversarial_and_three_samples_share_pixels_and_labels(samples, cos_sign):
    """The losses from their formulas, on copies of the networks; the first step works against the classifier."""
    step = make("adautomix", samples=samples, beta=0.3, cos_sign=cos_sign, mixup_share=0.3)
    x, y = batch(size=6)
    for index in range(4):
        k, block = copy.deepcopy(step.mixer.encoder.model), copy.deepcopy(step.mixer.block)
        one_hot = copy.deepcopy(blocks.with_classifier(step.model, step.mixer.one_hot))
        before = copy.deepcopy(step.model)
        out = step(x, y, rng_of(index))
        plan = out.plan["generator"]
        sources = [torch.arange(6), *plan["index"]]
        shares = list(zip(plan["lam"].T, sources, strict=True))
        with torch.no_grad():
            features, (z,) = k.forward_intermediates(x, indices=[step.mixer.encoder.index])
            clean, logits = k.forward_head(features), block([z[source] for source in sources], plan["lam"])
            mask = F.interpolate(logits, size=(32, 32), mode="bilinear").softmax(1)
            seen = k(sum(mask[:, i, None] * x[source] for i, source in enumerate(sources)))
            loss = sum(lam @ CRITERION(seen, y[source]) for lam, source in shares).item() / 6
            near = sum(lam @ F.cosine_similarity(seen, clean[source]) for lam, source in shares).item() / 6
        expected = -0.3 * loss + 0.7 * cos_sign * near if index % 2 == 0 else loss
        assert out.logs["generator"].item() == pytest.approx(expected, rel=1e-4)
        step.mixer.after_step(step.model, (index + 1) / 4)
        if samples == 3:
            plan, sources = out.plan, [torch.arange(6), *out.plan["index"]]
            assert plan["index"].shape == (2, 6) and plan["lam"].shape == (6, 3)
            assert_close(plan["mask"].sum(1), torch.ones(()).expand_as(plan["mask"].sum(1)))
            assert_close(plan["lam"].sum(1), torch.ones(6))
            images, targets = by_hand(x, y, sources, plan["lam"][:, :, None, None], plan["lam"])
            with torch.no_grad():
                clean, plain = CRITERION(one_hot(x), y).mean(), CRITERION(before(images), targets).mean()
            assert torch.equal(plan["lam"], plan["generator"]["lam"])
            assert set(out.logs) == {"mix", "generator", "one_hot", "mixup"}
            assert out.logs["one_hot"].item() == pytest.approx(0.7 * clean.item(), rel=1e-4)
            assert out.logs["mixup"].item() == pytest.approx(0.3 * plain.item(), rel=1e-4)
            mask, lam = torch.rand(6, 3, 32, 32), torch.rand(6, 3)
            assert_close(mix_many(x, y, plan["index"], mask, lam), by_hand(x, y, sources, mask, lam))


@pytest.mark.parametrize("model", ["resnet18", "test_vit", "test_convnext", "test_efficientnet"])
@torch.no_grad()
def test_each_classifier_is_a_plain_model_that_loads_into_a_new_one_and_the_encoder_stops_early_where_it_can(model):
    step, (x, _) = make("automix", model), batch(size=2, height=160, width=160)
    encoder, outputs = step.mixer.encoder, []
    step.mixer.one_hot.weight.add_(1)
    encoder.one_hot.weight.sub_(1)
    nets = step.mixer.models(step.model)
    for net in nets.values():
        fresh = timm.create_model(model, num_classes=5)
        fresh.load_state_dict(net.state_dict(), strict=True)
        outputs.append(fresh.eval()(x))
        assert_close(net.eval()(x), outputs[-1])
    assert list(nets) == ["", "k_one", "q", "q_one"]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[2], outputs[3])
    assert nets["q"] is step.model and step.model.get_classifier() is not step.mixer.one_hot

    assert encoder.stop_early == (model in ("test_vit", "test_convnext"))  # later layers keep no statistics
    expected = encoder.model.forward_intermediates(x, indices=[encoder.index])[1][0]
    assert_close(encoder.look(x), expected)
    assert_close(encoder.look_and_classify(x), (expected, outputs[0]))


PLACES = {
    "resnet18": ("layer3", 256), "resnet50": ("layer3", 1024), "resnet18_cifar": ("layer3", 256),
    "deit_small_patch16_224": ("blocks.5", 384), "swin_tiny_patch4_window7_224": ("layers.2", 384),
    "convnext_tiny": ("stages.2", 384), "tf_efficientnet_b0": ("blocks.4", 112), "mobilenetv2_100": ("blocks.4", 96),
    "pvt_tiny": ("stages.2", 320), "moganet_tiny": ("stages.2", 128),
}  # fmt: skip


def test_masks_are_made_at_the_published_stage_and_a_model_without_stages_is_refused():
    assert backbones.__name__  # registers models of ours
    for model, place in PLACES.items():
        with torch.device("meta"):
            found = blocks.mixed_stage(timm.create_model(model))
        assert (found[0], found[2]) == place, model
    with pytest.raises(ValueError, match="does not publish its stages"):
        Step(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), build("automix"), CRITERION)


@every
def test_the_block_has_a_group_of_its_own(name):
    step = make(name, block_lr=0.3, block_min_lr=0.1, block_momentum=0.0)
    one_hot, block = step.mixer.param_groups(1.0, 0.1)
    assert one_hot == {"params": list(step.mixer.one_hot.parameters())}
    trained = {id(p) for group in (one_hot, block) for p in group["params"]}
    assert not trained & {id(p) for p in step.mixer.encoder.parameters()}
    del block["params"]
    assert block == {"lr": 0.3, "min_lr": 0.1, "warmup_epochs": 0, "momentum": 0.0}
    _, block = make(name).mixer.param_groups(0.2, 0.1)
    assert (block["lr"], block["min_lr"]) == (0.2, 0.002) and "momentum" not in block


@pytest.mark.parametrize("order", [["mixup", "automix"], ["automix", "mixup"]])
def test_a_switch_reports_what_its_learned_member_does_and_has_one_of_each_name(order):
    step = make("switch", mixers=order, probs=[float(member == "mixup") for member in order])
    learned = step.mixer.members()[order.index("automix")]
    nets = step.mixer.models(step.model)
    assert nets[""] is learned.encoder.model and nets["q"] is step.model and len(nets) == 4
    # a member that is not chosen has gradients of zeros: processes that wait for each do not wait for ever
    step(*batch(), rng_of(0)).loss.backward()
    own = [p for p in step.mixer.parameters() if p.requires_grad]
    assert own and all(p.grad is not None and not p.grad.any() for p in own)
    with pytest.raises(ValueError, match="two members bring a classifier 'k_one'; use one of them in a switch"):
        make("switch", mixers=["automix", "samix"])


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "automix", ["automix", "adautomix"]))
def test_two_processes_train_like_one_that_accumulates_twice(reference, name):
    fixed = ("--mixer", name, "--model", "test_vit", "--per_device_train_batch_size", 4, "--epochs", 1)
    runs = [log(reference(*fixed, "--warmup_epochs", 0, processes=n)) for n in (1, 2)]
    one, two = ([line["loss"] for line in run if line["mode"] == "train"] for run in runs)
    assert one == pytest.approx(two, rel=1e-4) and one


def test_a_run_scores_and_exports_four_classifiers_and_its_masks_are_drawn_and_measured(reference, tmp_path):
    folder = reference("--mixer", "samix")
    final = [line for line in log(folder) if line["mode"] == "val"][-1]
    assert {f"{name}top1" for name in ("", "k_one_", "q_", "q_one_", "ema_")} <= final.keys()
    others = list((folder / "models").iterdir())
    assert {path.name for path in others} == {"k_one", "q", "q_one", "ema"}
    networks = [timm.create_model(f"local-dir:{place}", pretrained=True) for place in (folder, *others)]
    weights = [network.get_classifier().weight for network in networks]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))

    found = masks(Run.open(folder), 2, tmp_path / "masks.png")
    rows = [line.split("|")[1:4] for line in found.splitlines() if line.startswith("| 0.")]
    assert [float(row[0]) for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert all(0 < float(row[1]) < 1 for row in rows)
    assert found.endswith("The masks are nearly flat: so far this run mixes as Mixup does.")  # 3 epochs are few
    with Image.open(tmp_path / "masks.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 8 * 120
    learns_none = make_run(tmp_path / "deit", quick("deit", model="test_resnet"))
    for place, pairs, says in (
        (learns_none, 2, "mixer 'deit' learns no masks; expected a run of automix, samix or adautomix"),
        (tmp_path, 2, "is not a run folder: recipe.yaml is missing"),
        (folder, 0, "pairs: expected 1 to 16, got 0"),
    ):
        with pytest.raises(UserError, match=says):
            masks(Run.open(place), pairs, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "samix", NAMES))
@traced
def test_encoder_model_and_block_are_compiled_inside_of_switches_too_and_give_the_same(name, compiler, monkeypatch):
    plain, step, compiled = make(name), make(name), []

    def note(module, **options):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", note)
    launch.compile_step(step)
    assert step.mixer.block in compiled
    for network in (step.model, step.mixer.encoder.model):
        assert all(network.get_submodule(stage) in compiled for stage in taps.stages(network))
    for index in range(3):
        ours, theirs = (s(*batch(), rng_of(index)) for s in (step, plain))
        assert_close((ours.loss, ours.logits), (theirs.loss, theirs.logits))
    inside = build(name)
    launch.compile_step(make("switch", mixers=["mixup", Switch([inside])]))
    assert inside.block in compiled
