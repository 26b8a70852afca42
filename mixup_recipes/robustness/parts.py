"""The parts of the suite: what each does to the images, and the numbers that it comes to.

Accuracies, errors and calibration errors are in percent, NLL in nats. How the images are changed is in ``attacks``,
``corruptions`` and ``occlusion``; how scores are told apart in ``measures``.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixers import ops
from mixup_recipes.data.images import Transform, normalise
from mixup_recipes.data.picture import Picture
from mixup_recipes.metrics.calibration.formula import calibration
from mixup_recipes.robustness import attacks, corruptions, measures, occlusion
from mixup_recipes.robustness.passes import (
    CORRUPT,
    HALVES,
    MIX,
    OCCLUDE,
    PARTNER,
    PGD,
    Bench,
    Columns,
    InPixels,
    percent,
    rng,
)
from mixup_recipes.training.evaluation import of_one
from mixup_recipes.typed import UserError

FGSM_EPS, PGD_EPS = (1, 4, 8), (1, 8)  # levels of 255, the largest change of a pixel
PGD_STEPS, PGD_STEP = 10, 0.25  # steps, and the size of one as a share of eps: with 8 as in OpenMixup's tool
SEVERITIES = range(1, 6)
BUDGETS: dict[str, dict[str, Any]] = {
    "attacks": {"fgsm_eps_255": FGSM_EPS, "pgd_eps_255": PGD_EPS, "pgd_steps": PGD_STEPS, "pgd_step_of_eps": PGD_STEP},
    "corruptions": {"severities": list(SEVERITIES)},
    "occlusion": {"shares": occlusion.SHARES, "grid": occlusion.GRID},
    "calibration": {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "temperatures": [measures.COLDEST, measures.HOTTEST]},
    "ood": {},
}
"""Part -> what it was measured with."""


def clean(bench: Bench, with_logits: bool = False) -> Columns:
    """What the model says of the images as they are: columns of ``evaluation.predict``, energy, and perhaps logits."""

    def look(_index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = bench.of_bytes(images)
        more = {"logits": logits} if with_logits else {}
        return {**of_one(logits, labels), "energy": logits.logsumexp(1), **more}

    return bench.over(look)


# --------------------------------------------------------------------------------------------- attacks


def pgd(net: InPixels, x: Tensor, labels: Tensor, eps: float, index: Tensor) -> Tensor:
    """PGD with the budget of the suite; the start of each image is drawn for it alone. ``eps`` in [0, 1]."""
    seeds = [int(rng(i, PGD).integers(2**63)) for i in index.tolist()]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return attacks.pgd(net, x, labels, eps, PGD_STEP * eps, PGD_STEPS, generators)


def attacked(bench: Bench) -> dict[str, Any]:
    """``fgsm`` and ``pgd``: largest change of a pixel in levels of 255 -> accuracy."""
    net = InPixels(bench)

    def look(index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = images.float() / 255
        made = {f"fgsm {eps}": attacks.fgsm(net, x, labels, eps / 255) for eps in FGSM_EPS}
        made |= {f"pgd {eps}": pgd(net, x, labels, eps / 255, index) for eps in PGD_EPS}
        with torch.no_grad():
            return {name: net(pixels).argmax(1) == labels for name, pixels in made.items()}

    columns = bench.over(look)
    budgets = {"fgsm": FGSM_EPS, "pgd": PGD_EPS}
    return {name: {str(e): percent(columns[f"{name} {e}"]) for e in eps} for name, eps in budgets.items()}


# --------------------------------------------------------------------------------------------- corruptions


class Severities:
    """An evaluation's transform and behind it a corruption at every severity: uint8 (3, 5 * H, W), one below another.

    They are made in the processes that load images.
    """

    def __init__(self, transform: Transform, name: str):
        self.transform, self.name = transform, name
        height, width = transform.size
        self.size = [len(SEVERITIES) * height, width]

    def __call__(self, image: Tensor | Picture, key: tuple[int, ...]) -> Tensor:
        _, _, index, _ = key  # seed, epoch, image, copy
        pixels = self.transform(image, key).permute(1, 2, 0).contiguous().numpy()
        made = [corrupted(pixels, self.name, severity, index) for severity in SEVERITIES]
        return torch.from_numpy(np.concatenate(made)).permute(2, 0, 1)


def corrupted(pixels: np.ndarray, name: str, severity: int, index: int) -> np.ndarray:
    """A picture uint8 (H, W, 3) with a corruption; what is drawn belongs to the image alone."""
    draw = rng(index, CORRUPT, corruptions.NAMES.index(name), severity)
    return corruptions.corrupt(pixels, name, severity, draw)


def corrupt(bench: Bench, thousand: bool) -> dict[str, Any]:
    """``errors``: corruption -> error at each severity; ``groups`` and ``mean``: of them; ``mce``, or None.

    ``thousand``: whether the classes are those of ImageNet, for which AlexNet's errors are known.
    """
    many = len(SEVERITIES)

    def look(_index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        batch, channels, height, width = images.shape
        each = images.view(batch, channels, many, height // many, width).transpose(1, 2).flatten(0, 1)
        return {"wrong": bench.of_bytes(each).argmax(1).view(batch, many) != labels[:, None]}

    errors = {}
    for name in corruptions.NAMES:
        bench.accelerator.print(f"  {name}", flush=True)
        columns = bench.over(look, bench.samples(Severities(bench.transform, name)), max(1, bench.size // many))
        errors[name] = [percent(wrong) for wrong in columns["wrong"].T]
    mean = {name: float(np.mean(found)) for name, found in errors.items()}
    groups = {group: float(np.mean([mean[name] for name in names])) for group, names in corruptions.GROUPS.items()}
    total = float(np.mean(list(mean.values())))
    return {"errors": errors, "groups": groups, "mean": total, "mce": corruptions.mce(errors) if thousand else None}


# --------------------------------------------------------------------------------------------- occlusion


def occluded(x: Tensor, share: float, index: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) without a share of their patches, which are drawn for each image alone."""
    draws = [rng(i, OCCLUDE, round(10 * share)) for i in index.tolist()]
    pairs = zip(x.split(1), draws, strict=True)
    return torch.cat([occlusion.occlude(one, share, occlusion.GRID, draw) for one, draw in pairs])


def occlude(bench: Bench, clean_top1: float) -> dict[str, Any]:
    """``accuracy``: share of the patches that are taken away -> accuracy; ``auc``: its mean over shares from 0 to 0.9.

    ``clean_top1``: the accuracy where nothing is taken away.
    """

    def look(index: Tensor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = normalise(images, bench.recipe, bench.accelerator.device)
        return {str(share): bench.logits(occluded(x, share, index)).argmax(1) == labels for share in occlusion.SHARES}

    columns = bench.over(look)
    accuracy = {str(share): percent(columns[str(share)]) for share in occlusion.SHARES}
    curve = [clean_top1, *accuracy.values()]
    return {"accuracy": accuracy, "auc": float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))}


# --------------------------------------------------------------------------------------------- calibration


def calibrate(bench: Bench, columns: Columns) -> dict[str, Any]:
    """The fitted ``temperature`` and what it changes; ``mixup`` and ``cutmix``: calibration on mixed pairs.

    ``columns``: of ``clean``, with logits. The temperature is fitted on one half of the images, ``fitted_on``, and
    ``before`` and ``after`` are of the other half, ``scored_on``. Raises ``UserError`` for fewer than two images.
    """
    images = len(bench.table)
    first = np.isin(columns["index"], rng(0, HALVES).permutation(images)[: images // 2])
    if first.all() or not first.any():
        raise UserError(
            "calibration fits on one half of the images and scores on the other, so it needs at least 2 images, got "
            f"{len(first)}"
        )
    logits, labels = columns["logits"], columns["label"]
    temperature = measures.fitted_temperature(logits[first], labels[first])
    rest = logits[~first], labels[~first]
    found: dict[str, Any] = {
        "temperature": temperature,
        "fitted_on": int(first.sum()),
        "scored_on": int((~first).sum()),
    }
    found |= {"before": measures.calibrated(*rest, 1.0), "after": measures.calibrated(*rest, temperature)}
    return found | mixed_calibration(bench)


def partners(images: int) -> np.ndarray:
    """Another image for each of several (N,): one circle through all of them, the same each time."""
    order = rng(0, PARTNER).permutation(images)
    partner = np.empty(images, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def masks(x: Tensor, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``mixup`` and ``cutmix`` with alpha 1 for each image alone: mask (B, 1, H or 1, W or 1), own share (B,)."""
    height, width = x.shape[2:]
    shares, cuts, left = [], [], []
    for i in index.tolist():
        draw = rng(i, MIX)
        shares.append(draw.beta(1, 1))
        top, bottom, first, last = ops.clipped_box(height, width, draw.beta(1, 1), draw)
        mask = torch.ones(1, height, width)
        mask[:, top:bottom, first:last] = 0
        cuts.append(mask)
        left.append(1 - (bottom - top) * (last - first) / (height * width))
    lam, kept = (torch.tensor(values, dtype=x.dtype, device=x.device) for values in (shares, left))
    return {"mixup": (lam.view(-1, 1, 1, 1), lam), "cutmix": (torch.stack(cuts).to(x), kept)}


def mixed_calibration(bench: Bench) -> dict[str, Any]:
    """Of each kind of mixing: ``top1`` and ``ece``, where the label of the larger share is the right answer,
    ``confidence``, the mean of the answer's probability, and ``share``, the mean of the label's share."""

    def look(index: Tensor, images: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> dict[str, Tensor]:
        x, y = (normalise(part, bench.recipe, bench.accelerator.device) for part in (images, others))
        found: dict[str, Tensor] = {}
        for name, (mask, lam) in masks(x, index).items():
            major = torch.where(lam >= 0.5, labels, other_labels)
            share = torch.where(labels == other_labels, 1, torch.maximum(lam, 1 - lam))
            said = of_one(bench.logits(torch.lerp(y, x, mask)), major)
            said["top"] = said["top"][:, 0]
            found |= {f"{name} {k}": v for k, v in ({"share": share} | said).items()}
        return found

    columns = bench.over(look, size=max(1, bench.size // 2), partner=partners(len(bench.table)))
    told = {}
    for name in ("mixup", "cutmix"):
        top, label, confidence, nlls, share = (
            columns[f"{name} {k}"] for k in ("top", "label", "confidence", "nll", "share")
        )
        right = top == label
        told[name] = {"top1": percent(right), "ece": calibration(confidence, right, nlls)["ece"]}
        told[name] |= {"confidence": percent(confidence), "share": percent(share)}
    return told


# --------------------------------------------------------------------------------------------- out of distribution


def apart(inside: Columns, second: Bench) -> dict[str, Any]:
    """``max_softmax`` and ``energy``: how well each tells the images from those of a second set, ``images`` of it.

    ``inside``: columns of ``clean``. Energy is logsumexp of the logits, so both are higher for what the model knows.
    """

    def look(_index: Tensor, images: Tensor, _labels: Tensor) -> dict[str, Tensor]:
        logits = second.of_bytes(images)
        return {"confidence": logits.softmax(1).amax(1), "energy": logits.logsumexp(1)}

    outside = second.over(look)
    names = {"max_softmax": "confidence", "energy": "energy"}
    found: dict[str, Any] = {name: measures.told_apart(inside[key], outside[key]) for name, key in names.items()}
    return found | {"images": len(outside["energy"])}
