"""AdAutoMix, whose generator is the classifier's adversary; whole steps and runs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mixers import build
from mixers.adautomix import mix_many
from originals import Checkout, Gap, beside
from originals.learned import drawn_plan, run_gaps, schedule_gaps
from originals.pairs import (
    CHANNELS,
    CLASSES,
    CLASSIFIERS,
    HEADS,
    HOOKS,
    OPENMIXUP,
    Original,
    Pair,
    Recorded,
    absolute,
    batch,
    watch,
)

ADAUTOMIX = "JinXins/Adversarial-AutoMixup"


def feed_adautomix(pair: Pair, rng: Recorded) -> None:
    """Lambdas and partners; of three samples the first is the image itself, which there is a partner too."""
    partners = [torch.from_numpy(p) for p in rng.drawn["permutation"]]
    if pair.mixer.samples == 2:
        pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"][::-1]))
        pair.original.torch.values["randperm"] += partners
        return
    own, (first, second, first_k, second_k) = torch.arange(len(partners[0])), partners
    pair.original.numpy.values["beta"].append(np.array(rng.drawn["beta"]))
    pair.original.torch.values["randperm"] += [first_k, own, second_k, own, first, second]


def adautomix_pair(original: Checkout, **args: Any) -> Pair:
    """AdAutoMix of the reference code, laid over OpenMixup, or of OpenMixup; ``args`` of the mixer."""
    mixer: Any = build("adautomix", **{"momentum": 0.9, "momentum_end": 0.9} | args)
    own = (original.folder / f"{CLASSIFIERS}/AdAutoMix.py").is_file()
    code = Original(original, Checkout(original.folder.parent / OPENMIXUP.split("/")[1]))
    code.read(f"{HEADS}/{'Ada_mix_pine' if own else 'adaptive_mask'}.py", "AdaptiveMask")
    block = {
        "type": "AdaptiveMask", "in_channel": CHANNELS, "lam_concat": mixer.lam_concat,
        "unsampling_mode": mixer.upsample, "scale_factor": 16, "att_norm_cfg": {"type": "BN"} if mixer.norm else None,
    }  # fmt: skip
    layers = {f"{ours}.0": f"conv_{ours[0]}.conv" for ours in ("query", "key")} | {"value": "conv_v"}
    layers |= {f"{ours}.1": f"conv_{ours[0]}.bn" for ours in ("query", "key")}
    settings = {"mix_samples": mixer.samples, "beta_radio": mixer.beta, "mixup_radio": mixer.mixup_share, "save": False}
    file = f"{CLASSIFIERS}/{'AdAutoMix' if own else 'adautomix'}.py"
    return Pair(code, file, "AdAutoMix", mixer, layers, feed_adautomix, block, **settings)


def adautomix_gaps(pair: Pair, of: str, why: str = "") -> Iterator[Gap]:
    """Masks, images, losses and gradients of an adversarial step and of the one that follows it."""
    x, labels = batch()
    mixing = "mixup" if pair.mixer.samples == 2 else "co_mixup"
    masks, images, k, q, blocks_ = (watch(*at) for at in (
        (pair.mixer, "masks"), (pair.theirs, mixing), (pair.theirs, "forward_k"), (pair.theirs, "forward_q"),
        (pair.theirs.mix_block, "forward"),
    ))  # fmt: skip
    gaps = {"masks": 0.0, "mixed images": 0.0, "losses": 0.0, "gradients of all weights": 0.0}
    for seed in (3, 4):
        out, theirs = pair.run(x, labels, seed)
        if len(masks) != 2:
            raise LookupError("this draw is within the margin")
        gaps["masks"] = max(gaps["masks"], *map(absolute, masks, [result["mask"] for result in blocks_[::-1]]))
        plan, y = out.plan, F.one_hot(labels, CLASSES).double()
        generator, last = plan["generator"], masks[-1]
        generated = mix_many(x.double(), y, generator["index"], last, generator["lam"])[0]
        found = pair.mixer.mix(x.double(), y, **plan)[0], generated
        theirs_found = images[-1]["img_mix_bb"], images[-1]["img_mix_mb"]
        gaps["mixed images"] = max(gaps["mixed images"], *map(absolute, found, theirs_found))
        clean = out.logs["one_hot"] + out.logs.get("mixup", 0)
        losses = (clean, q[-1][0]), (out.logs["mix"], q[-1][1]), (out.logs["generator"], k[-1][1])
        gaps["losses"] = max(gaps["losses"], *(absolute(ours, there["loss"]) for ours, there in losses))
        pair.step.zero_grad()
        pair.theirs.zero_grad()
        out.loss.backward()
        theirs["loss"].sum().backward()
        gaps["gradients of all weights"] = max(gaps["gradients of all weights"], pair.gradients())
        pair.mixer.after_step(pair.step.model, 0.0)
        pair.theirs.momentum_update()
        masks.clear()
        blocks_.clear()
    for what, gap in gaps.items():
        unit = "relative" if what.startswith("gradients") else "absolute"
        yield Gap(f"{what}, an adversarial step and the next, {of}, float64", gap, unit, why if gap > 1e-9 else "")


STATISTICS = "ours runs the momentum encoder once on the clean batch, the original {} times: mixed images weigh less"


@beside(
    "adautomix", ADAUTOMIX, f"{CLASSIFIERS}/AdAutoMix.py", f"{HEADS}/Ada_mix_pine.py", f"{HEADS}/cls_mixup_head.py",
    held="test_automix.py::"
    "test_every_second_step_of_adautomix_is_adversarial_and_three_samples_share_pixels_and_labels",
)  # fmt: skip
def adautomix_steps(original: Checkout) -> Iterator[Gap]:
    """Steps and runs of two samples and of three, the settings of ImageNet and of Tiny-ImageNet."""
    two = {"norm": True}
    three = {"samples": 3, "beta": 0.4, "lam_concat": False}
    for args, of, times in ((two, "small ResNet, 2 samples", 3), (three, "small ResNet, 3 samples", 4)):
        yield from adautomix_gaps(adautomix_pair(original, **args), of)
        for again in (0, times - 1):
            pair = adautomix_pair(original, **args)
            seen = f", where ours saw the clean batch {times} times too" if again else ""
            why = "" if again else STATISTICS.format(times)
            yield from run_gaps(pair, of + seen, Original(pair.original.beneath), why, again)


@beside(
    "adautomix", OPENMIXUP, f"{CLASSIFIERS}/adautomix.py", f"{HEADS}/adaptive_mask.py", f"{HOOKS}/momentum_hook.py",
    held="test_automix.py::test_the_generator_of_adautomix_is_its_formula",
)  # fmt: skip
def adautomix_openmixup(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's own version of the step, and the momentum of k."""
    yield from adautomix_gaps(adautomix_pair(original), "small ResNet, 2 samples")
    three = adautomix_pair(original, samples=3, beta=0.4, lam_concat=False)
    why = "its condition on the margin is turned round: it mixes by constants where the reference code mixes by masks"
    yield from adautomix_gaps(three, "small ResNet, 3 samples", why)
    yield from schedule_gaps(Original(original), "adautomix")


@beside(
    "adautomix", ADAUTOMIX, f"{CLASSIFIERS}/AdAutoMix.py",
    held="test_automix.py::test_the_margin_is_met_and_the_generator_switched_off_as_often_as_the_law_says",
)  # fmt: skip
def adautomix_laws(original: Checkout) -> Iterator[Gap]:
    """For which draws the margin makes plain Mixup."""
    code, draws, x = Original(original), 10000, torch.zeros(3, 1, 1, 1)
    for samples, name in ((2, "mixup"), (3, "co_mixup")):
        mix = original.method(f"{CLASSIFIERS}/AdAutoMix.py", "AdAutoMix", name, **code.given)
        mixer: Any = build("adautomix", samples=samples)
        mixer.masks = lambda *args, n=samples: torch.full((3, n, 1, 1), -1.0)
        made = {"mask": torch.full((3, samples, 1, 1), -1.0)}
        this = SimpleNamespace(mix_block=lambda *args, made=made: made, debug=False, lam_margin=0.03, co_mix=samples)
        differ = 0
        for seed in range(draws):
            plan, rng = drawn_plan(mixer, x, seed, torch.zeros(3, 1, 1, 1))
            lam, index = np.array(rng.drawn["beta"]), torch.arange(3)
            same = [[index] * samples] * 2
            given = (lam[::-1], [index] * 2) if samples == 2 else ([*(lam / lam.sum())], *same)
            mixed = mix(this, x + 1, *given, torch.zeros(3, 1, 1, 1))["img_mix_bb"]
            differ += (float(mixed[0]) < 0) != (float(plan["mask"][0].flatten()[0]) < 0)
        yield Gap(f"steps of plain Mixup by the margin, {samples} samples, {draws:,} draws", differ / draws, "share")
