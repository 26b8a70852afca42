"""Methods that learn to mix: AutoMix and SAMix; whole steps and runs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import base, build
from originals import Checkout, Gap, beside
from originals.pairs import (
    CHANNELS,
    CLASSES,
    CLASSIFIERS,
    HEADS,
    HOOKS,
    OPENMIXUP,
    SCHEDULES,
    STEP,
    UPDATES,
    Original,
    Pair,
    Recorded,
    Scripted,
    absolute,
    batch,
    relative,
    watch,
)


def feed_automix(pair: Pair, rng: Recorded) -> None:
    """Lambdas, partners, the draw of switching off and what dropout leaves."""
    pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"][::-1]))
    pair.original.numpy.values["rand"] = [
        0.5,
        *rng.drawn.get("random", []),
    ]  # the first is of mask_adjust, which is off
    pair.original.torch.values["randperm"] += map(torch.from_numpy, rng.drawn["permutation"])
    if isinstance(dropout := getattr(pair.theirs.mix_block.value, "dropout", None), Scripted):
        dropout.factors = pair.noise[-2:][::-1]


def automix_pair(original: Checkout, **args: Any) -> Pair:
    """AutoMix as it is set for ImageNet; ``args`` of the mixer, or ``model`` and ``size``."""
    network = {key: args.pop(key) for key in ("model", "size", "double") if key in args}
    mixer: Any = build("automix", **{"mask_loss_law": "compounded", "momentum": 0.9, "momentum_end": 0.9} | args)
    code = Original(original)
    code.read(f"{HEADS}/pmix_block.py", "PixelMixBlock")
    block = {
        "type": "PixelMixBlock", "in_channels": CHANNELS, "unsampling_mode": [mixer.block.upsample],
        "lam_concat": mixer.block.lam_concat, "mask_loss_margin": 0.1,
    }  # fmt: skip
    layers = {"query_key": "query.conv", "value": "value"}
    own = {"mask_loss": mixer.mask_loss, "switch_off": mixer.switch_off}
    return Pair(code, f"{CLASSIFIERS}/automix.py", "AutoMixup", mixer, layers, feed_automix, block, **network, **own)


def samix_pair(original: Checkout, neg_weight: float = 1, **args: Any) -> Pair:
    """SAMix as it is set for ImageNet; ``args`` of the mixer."""
    mixer: Any = build("samix", **{"mask_loss_law": "compounded", "momentum": 0.9, "momentum_end": 0.9} | args)
    code = Original(original)
    code.read("openmixup/models/necks/conv_necks.py", "ConvNeck")
    code.read(f"{HEADS}/pmix_block.py", "PixelMixBlock")
    neck = {
        "type": "ConvNeck",
        "in_channels": CHANNELS,
        "hid_channels": CHANNELS // 2,
        "out_channels": 1,
        "num_layers": 2,
    }
    neck["with_last_dropout"] = mixer.block.dropout
    block = {
        "type": "PixelMixBlock", "in_channels": CHANNELS, "unsampling_mode": [mixer.block.upsample], "lam_mul": True,
        "lam_residual": True, "lam_mul_k": mixer.block.lam_mul_k, "value_neck_cfg": neck, "x_qk_concat": True,
        "mask_loss_mode": "L1+Variance", "mask_loss_margin": 0.1,
    }  # fmt: skip
    soft = {"loss": {"type": "CrossEntropyLoss", "use_soft": True}, "multi_label": True, "neg_weight": neg_weight}
    layers = {"query": "query.conv", "key": "key.conv", "value.0": "value.conv.0.conv", "value.1": "value.conv.0.bn"}
    layers["value.3"] = "value.conv.1.conv"
    own = {"mask_loss": mixer.mask_loss, "switch_off": mixer.switch_off}
    pair = Pair(code, f"{CLASSIFIERS}/automix.py", "AutoMixup", mixer, layers, feed_automix, block, soft, **own)
    if pair.theirs.mix_block.value.dropout.p != mixer.block.dropout:
        raise LookupError("another rate of dropout")
    pair.theirs.mix_block.value.dropout, pair.noise = Scripted(), watch(mixer.block, "noise")
    return pair


def automix_step(pair: Pair, of: str, seed: int = 3) -> Iterator[Gap]:
    """Masks, images, losses and gradients of one step."""
    (x, labels), precision = batch(), "float64" if pair.double else "float32"
    of = f"{of}, {precision}"
    masks, images, k, q = (watch(*at) for at in (
        (pair.mixer, "mask"), (pair.theirs, "pixel_mixup"), (pair.theirs, "forward_k"), (pair.theirs, "forward_q")
    ))  # fmt: skip
    blocks = watch(pair.theirs.mix_block, "forward")
    out, theirs = pair.run(x, labels, seed)
    x, y, plan = x.to(out.loss.dtype), F.one_hot(labels, CLASSES).to(out.loss.dtype), out.plan
    their_masks = [result["mask"][:, :1] for result in blocks[::-1]][-len(masks) :]
    yield Gap(f"masks, {of}", max(map(absolute, masks, their_masks)))
    given = {key: plan["generator"][key] for key in ("index", "lam")}
    generated = base.Mixer.mix(pair.mixer, x, y, mask=masks[-1], **given)[0]
    found = pair.mixer.mix(x, y, **plan)[0], generated
    yield Gap(
        f"mixed images of classifier and mix block, {of}",
        max(map(absolute, found, (images[0]["img_mix_bb"], images[0]["img_mix_mb"]))),
    )
    one, mix = q[0]
    losses = {"mix": mix, "one_hot": one, "generator": k[0], "mask": {"loss": images[0]["mask_loss"]}}
    gap = max(absolute(out.logs[name], losses[name]["loss"]) for name in out.logs)
    yield Gap(f"the {len(out.logs)} losses, {of}", max(gap, absolute(out.loss, theirs["loss"])))
    out.loss.backward()
    theirs["loss"].sum().backward()
    yield Gap(f"gradients of all weights, {of}", pair.gradients(), "relative")


def run_gaps(pair: Pair, of: str, code: Original, why: str = "", again: int = 0) -> Iterator[Gap]:
    """Weights and statistics after a run, the original's schedules by its hooks."""
    code.read(f"{HOOKS}/momentum_hook.py", "CosineScheduleHook")
    code.read(f"{HOOKS}/addtional_scheduler.py", "annealing_cos", "CustomSchedulerHook", "CustomCosineAnnealingHook")
    hooks = [code.given["CosineScheduleHook"](0.9, [0.1, 1.0], "constant")]
    if hasattr(pair.theirs, "mask_loss"):
        settings = {"attr_name": "mask_loss", "attr_base": 0.1, "min_attr": 0.0, "by_epoch": False}
        hooks.append(code.given["CustomCosineAnnealingHook"](**settings))
    pair.train(hooks, again)
    weights = f"weights after {UPDATES} updates with SGD, the momentum encoder's included, {of}, float64"
    statistics = f"BatchNorm statistics of the momentum encoder after {UPDATES} updates, {of}, float64"
    yield Gap(weights, pair.weights(), "relative")
    yield Gap(statistics, pair.statistics(), "relative", why)


@beside("automix", OPENMIXUP, *STEP, *SCHEDULES, held="test_automix.py::test_the_step_is_the_sum_of_its_four_losses")
def automix_steps(original: Checkout) -> Iterator[Gap]:
    """One step on a residual network and on a transformer, near an end of lambda too, and a run."""
    yield from automix_step(automix_pair(original), "small ResNet, 80 pixels")
    transformer = {"model": "vit_tiny_patch16_224", "size": {"img_size": 80}, "double": False}
    yield from automix_step(automix_pair(original, **transformer), "ViT-Ti/16, 80 pixels")
    yield from automix_step(automix_pair(original, margin=0.5), "small ResNet, where the margin makes plain Mixup")
    yield from automix_step(automix_pair(original, lam_concat=False), "small ResNet, without a channel of lambda")
    pair = automix_pair(original, switch_off=0.8)
    yield from run_gaps(pair, "small ResNet, switch_off 0.8, mask_loss_law compounded", pair.original)


def schedule_gaps(code: Original, name: str) -> Iterator[Gap]:
    """The momentum of the encoder over 1,000 updates, and of AutoMix the weight of the mask's loss."""
    total = 1000
    code.read(f"{HOOKS}/momentum_hook.py", "CosineScheduleHook")
    code.read(f"{HOOKS}/addtional_scheduler.py", "annealing_cos", "CustomSchedulerHook", "CustomCosineAnnealingHook")
    settings = {"attr_name": "mask_loss", "attr_base": 0.1, "min_attr": 0.0, "by_epoch": False}
    hook = code.given["CosineScheduleHook"](0.99999, [0.25, 1.0], "constant")
    weight = code.given["CustomCosineAnnealingHook"](**settings)
    module = SimpleNamespace(momentum=0.999, base_momentum=0.999, mask_loss=0.1)
    runner = SimpleNamespace(iter=0, max_iters=total, model=SimpleNamespace(module=module))
    theirs, cosine = [], []
    for runner.iter in range(total):
        hook.before_train_iter(runner)
        weight.before_train_iter(runner)
        theirs.append((module.momentum, module.mask_loss))
        cosine.append(weight.get_attr(runner, 0.1))

    def ours(shift: int, **args: Any) -> tuple[list[float], list[float]]:
        mixer: Any = build(name, momentum_delay=0.25, **args)
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        mixer.setup(model.double())
        momenta, weights = list[float](), list[float]()
        mixer.encoder.follow = lambda model, one_hot, momentum: momenta.append(momentum)
        if hasattr(mixer, "gamma"):
            mixer.double().gamma.fill_(0.1)
        for update in range(total):
            weights.append(float(getattr(mixer, "gamma", torch.zeros(()))))
            mixer.after_step(model, (update + shift) / total)
        return momenta, weights

    def gap(a: Any, b: Any) -> float:
        return float(np.abs(np.array(a) - np.array(b)).max())

    momenta, weights = zip(*theirs, strict=True)
    of = f"over {total:,} updates, delay 0.25"
    yield Gap(f"momentum of the encoder {of}, of the same progress", gap(ours(0)[0], momenta))
    late = "ours takes the progress behind an update, OpenMixup that before it"
    yield Gap(f"momentum of the encoder {of}, update by update", gap(ours(1)[0], momenta), why=late)
    if name == "adautomix":
        return
    yield Gap(f"weight of the mask's loss {of}, compounded", gap(ours(1, mask_loss_law="compounded")[1], weights))
    yield Gap(
        f"weight of the mask's loss {of}, cosine, beside the hook's formula of its start", gap(ours(1)[1], cosine)
    )
    why = "the hook multiplies its factor onto what the last update left; mask_loss_law compounded is that"
    yield Gap(f"weight of the mask's loss {of}, cosine, beside the hook as it runs", gap(ours(1)[1], weights), why=why)


@beside(
    "automix", OPENMIXUP, *SCHEDULES,
    held="test_automix.py::test_the_schedules_are_monotone_and_end_where_they_should",
)  # fmt: skip
def automix_schedules(original: Checkout) -> Iterator[Gap]:
    """The momentum of k and the weight of the mask's loss over a run."""
    yield from schedule_gaps(Original(original), "automix")


class RanError(Exception):
    """The mix block is trained."""


def drawn_plan(mixer: Any, x: Tensor, seed: int, look: Any) -> tuple[dict[str, Any], Recorded]:
    """A plan, and what was drawn for it, where masks are 0.5."""
    rng = Recorded(seed)
    return mixer.plan(x, torch.eye(len(x)), rng, look), rng


@beside(
    "automix", OPENMIXUP, f"{CLASSIFIERS}/automix.py",
    held="test_automix.py::test_the_margin_is_met_and_the_generator_switched_off_as_often_as_the_law_says",
)  # fmt: skip
def automix_laws(original: Checkout) -> Iterator[Gap]:
    """For which draws the margin makes plain Mixup, and for which the mix block is switched off."""
    code, file = Original(original), f"{CLASSIFIERS}/automix.py"
    methods = (original.method(file, "AutoMixup", name, **code.given) for name in ("pixel_mixup", "forward_k"))
    pixel_mixup, forward_k = methods

    def runs(*args: Any) -> None:
        raise RanError

    x, half, draws = torch.zeros(3, 1, 1, 1), {"mask": torch.full((3, 2, 1, 1), 0.25)}, 10000
    for switch_off in (0.8, 0.0):
        mixer: Any = build("automix", switch_off=switch_off)
        mixer.setup(timm.create_model("test_resnet"))
        mixer.mask = lambda *args: torch.full((3, 1, 1, 1), 0.25)
        look = mixer.block.project(torch.zeros(3, mixer.encoder.channels, 1, 1))
        this = SimpleNamespace(
            mask_layer=0, mix_block=lambda *args, **kwargs: half, debug=False, mask_up_override=None, pre_one_loss=0,
            mask_adjust=0.0, lam_margin=0.08, mask_loss=0, switch_off=switch_off, cos_annealing=1.0, weight_mix_k=1,
            backbone_k=runs,
        )  # fmt: skip
        constant, run = 0, 0
        for seed in range(draws):
            plan, rng = drawn_plan(mixer, x, seed, look)
            lams, index = rng.drawn["beta"][::-1], torch.zeros(2, 3, dtype=torch.int64)
            code.numpy.values["rand"] = [0.5, *rng.drawn.get("random", [])]
            mixed = pixel_mixup(this, torch.tensor([1.0, 0, 0])[:, None, None, None], None, lams, 2 * [[1, 1, 1]], None)
            theirs = float(mixed["img_mix_bb"][0]) != 0.25
            constant += theirs != (float(plan["mask"][0]) != 0.25)
            try:
                forward_k(this, x, None, index, lams[0])
                trains = False
            except RanError:
                trains = True
            run += trains != plan["generator"]["run"]
        if switch_off:
            yield Gap(f"steps of plain Mixup by the margin, {draws:,} draws", constant / draws, "share")
        yield Gap(f"steps that train the mix block, switch_off {switch_off}, {draws:,} draws", run / draws, "share")


@beside(
    "samix", OPENMIXUP, *STEP, "openmixup/models/necks/conv_necks.py", *SCHEDULES,
    held="test_automix.py::test_the_block_of_samix_is_its_formula",
)  # fmt: skip
def samix_steps(original: Checkout) -> Iterator[Gap]:
    """One step with the straight line and the curve of lambda, with dropout and a neg_weight, and a run."""
    yield from automix_step(samix_pair(original), "small ResNet, dropout 0.1")
    curve = samix_pair(original, 0.5, lam_mul_k=0.25, dropout=0.2, upsample="nearest")
    yield from automix_step(curve, "small ResNet, lam_mul_k 0.25, OpenMixup's neg_weight 0.5")
    pair = samix_pair(original)
    yield from run_gaps(pair, "small ResNet, dropout 0.1, mask_loss_law compounded", pair.original)
    theirs, ours = pair.theirs.state_dict(), pair.step.state_dict()
    kept = [n for n in ours if n.startswith("mixer.block") and "running" in n]
    why = "OpenMixup makes both masks in another order, and one that the margin discards; training does not read them"
    gap = relative([ours[n] for n in kept], [theirs[pair.name(n)] for n in kept])
    yield Gap(
        f"BatchNorm statistics of the mix block after {UPDATES} updates, small ResNet, float64", gap, "relative", why
    )
