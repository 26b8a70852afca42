"""RecursiveMix: Mixed Learning with History. Yang, Li, Chen, Zhao, Sun, Hou, Lv, Song, Luo, Yang. NeurIPS 2022.

https://arxiv.org/abs/2203.06844, reference code https://github.com/implus/RecursiveMix-pytorch

Formula: x°, y°, p° are the mixed images, mixed targets and predictions (softmax of the logits, no gradient) of the
previous update. The whole of x°, shrunk by nearest neighbours, is pasted into a box of x. ``y' = lam*y + (1-lam)*y°``
with ``lam = 1 - area(box)/(H*W)``. A second linear classifier sees the last feature averaged over the box (RoIAlign,
1x1). ``loss = CE(logits, y') + omega*(1-lam)*CE(logits of the box, p°)``.

Published defaults: alpha = 0.5, omega = 0.5 (reference code, ImageNet).

Sampling law: ``recursivemix@yang-2022``: One box is drawn for the whole batch. It has the height ``floor(H*sqrt(r))``
and the width ``floor(W*sqrt(r))`` with ``r ~ U(0, alpha)``. Half sides are rounded down, the centre is uniform on the
pixel grid, and the box is clipped at the border. Sample i meets row i of the history, so no partner is drawn.

History: The history of the i-th forward of an update is what the i-th forward of the update before left on this
process. So a micro-batch meets the same place of the previous update however many processes share it. ``after_step``
hands the history on. Row i of a batch that has no row i in the history stays as it is. A forward in evaluation mode or
without gradient (PreciseBN) sees the history and leaves none. The history is saved with the checkpoint: one batch per
process and micro-batch.

Cost: There is no extra pass. The method takes the second classifier, and one batch of memory per micro-batch.

Deviations: Until April 2023 (commit ed381bf) the reference code handed rows to RoIAlign as columns, so its box was
mirrored at the diagonal. ``swapped_roi=True`` does the same. The paper is of March 2022. The reference code forgets the
history at the start of an epoch. Here it is kept. A box without area leaves the batch as it is; the reference code
skips most such boxes. The second classifier starts as a copy of the first (reference code: drawn anew). For token
networks (DeiT, PVT) the placement is ours: the patches are the last feature, and the head's own norm, where there is
one, comes before the second classifier.

Kind: input, label.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan

KEPT = ("images", "targets", "predictions")
Box = tuple[int, int, int, int]


class RecursiveMix(Mixer):
    """Paste the previous update's mixed images, shrunk, and learn what was said of them.

    ``alpha``, in [0, 1], is the largest share of the box. ``omega`` is the weight of the box's loss and must be at
    least 0. ``swapped_roi`` looks at the box mirrored at the diagonal, as the code did until 2023.
    """

    one_label = True  # what the box is compared with is a softmax
    pairs = False

    def __init__(self, alpha: float = 0.5, omega: float = 0.5, swapped_roi: bool = False):
        super().__init__()
        ops.check_between("alpha", alpha, 0.0, 1.0)
        ops.check_between("omega", omega, 0.0)
        ops.check_choice("swapped_roi", swapped_roi, (False, True))
        self.alpha = alpha
        self.omega = omega
        self.swapped_roi = swapped_roi
        self.pending: list[tuple[Tensor, ...]] = []  # what this update's forwards leave to the next one

    def setup(self, model: nn.Module) -> None:
        """Make the second classifier. Raises ``ValueError`` for a model without a linear one."""
        self.roi_classifier = copy.deepcopy(taps.classifier(model))

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Tensor
    ) -> Plan:
        """``box``: top, bottom, left, right; ``lam`` (B,), 1 where there is no history; the history that fits.

        ``look``: ``images`` (n, C, h, w) and ``targets`` (n, K) of the history.
        """
        images, targets = look
        height, width = x.shape[-2:]
        top, bottom, left, right = ops.clipped_box(height, width, 1 - self.alpha * rng.random(), rng)
        lam = np.ones(len(x))
        lam[: len(images)] -= (bottom - top) * (right - left) / (height * width)
        fits = slice(len(x))
        return {
            "box": (top, bottom, left, right),
            "lam": ops.send(lam, x),
            "images": images[fits],
            "targets": targets[fits],
        }

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        box: Box,
        lam: Float[Tensor, " B"],
        images: Float[Tensor, "n C h w"],
        targets: Float[Tensor, "n K"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The first n images with the shrunk ``images`` inside the box."""
        ops.check_batch(x, y)
        top, bottom, left, right = box
        mixed, target, n = x.clone(), y.clone(), len(images)
        if n and area(box):
            mixed[:n, :, top:bottom, left:right] = F.interpolate(images, (bottom - top, right - left)).to(x.dtype)
            target[:n] = torch.lerp(targets.to(y.dtype), y[:n], lam[:n, None].to(y.dtype))
        return mixed, target

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the history of this micro-batch."""
        ops.check_batch(x, y)
        slot = len(self.pending)
        nothing = {"images": x[:0], "targets": y[:0], "predictions": y[:0]}
        images, targets, predictions = (dict(self.named_buffers()).get(f"{k}_{slot}", nothing[k]) for k in KEPT)
        plan = self.plan(x, y, rng, images, targets)
        mixed, target = self.mix(x, y, **plan)
        with taps.last_feature(model) as features:
            logits = model(mixed)
        if len(images) and area(plan["box"]):
            said = F.pad(predictions[: len(x)], (0, 0, 0, max(0, len(x) - len(predictions))))
            of_box = self.logits_of_box(model, features[0], x, plan["box"])
            roi = self.omega * (1 - plan["lam"]) * criterion(of_box, said)
        else:
            roi = logits.new_zeros(()) + ops.touch(self.parameters())
        if self.training and torch.is_grad_enabled():
            score = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            self.pending.append((mixed.detach(), target.detach(), score.softmax(1)))
        return Out.of(logits, target, plan, mix=criterion(logits, target), roi=roi)

    def logits_of_box(self, model: nn.Module, feature: Tensor, x: Tensor, box: Box) -> Float[Tensor, "B K"]:
        """What the second classifier says of the last feature inside the box, given in pixels of ``x``."""
        pixels = [(box[:2], x.shape[2]), (box[2:], x.shape[3])]
        (rows, height), (columns, width) = pixels[::-1] if self.swapped_roi else pixels
        positions = taps.to_map(model, feature, x)
        with ops.full_precision(x.device):
            positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
            h, w = (
                ops.send(roi_weights(*ends, length, size), x).to(positions.dtype)
                for ends, length, size in zip((rows, columns), positions.shape[2:], (height, width), strict=True)
            )
            inside = positions @ w @ h
        return self.roi_classifier(taps.before_classifier(model, inside.to(feature.dtype), feature))

    def after_step(self, model: nn.Module, progress: float) -> None:
        """What the forwards of this update left becomes the history."""
        if self.pending:  # empty when a switch chose another member
            pending, self.pending = self.pending, []
            self.remember({f"{k}_{i}": v for i, kept in enumerate(pending) for k, v in zip(KEPT, kept, strict=True)})

    def history_bytes(self, images: int, targets: int) -> int:
        """Images, targets, and predictions of the size of targets."""
        return images + 2 * targets

    def remember(self, history: dict[str, Tensor]) -> None:
        """Replace all history. New buffers, not new values: plans hold the old ones."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, value in history.items():
            self.register_buffer(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The shapes of the history are those of the batches that were seen: known when it is loaded.
        found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        device = self.roi_classifier.weight.device
        history = {name: torch.empty_like(value, device=device) for name, value in found.items() if "." not in name}
        self.pending = []
        self.remember(history)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> "RecursiveMix":
        self.pending = [tuple(map(fn, kept)) for kept in self.pending]
        return super()._apply(fn, recurse)


def area(box: Box) -> int:
    """Pixels inside."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left)


def roi_weights(first: int, last: int, length: int, size: int) -> np.ndarray:
    """How much each of ``length`` places of a feature's axis counts in the mean over pixels [first, last) of ``size``.

    RoIAlign (He et al. Mask R-CNN. ICCV 2017) with one output, aligned, and one sample per place that the box has,
    rounded up, each interpolated linearly; (length,), sums to 1. The corners in float32, as in torchvision.
    """
    scale = np.float32(length / size)
    start, end = (np.float32(corner) * scale - np.float32(0.5) for corner in (first, last))
    count = math.ceil(end - start)
    places = (start + (np.arange(count) + 0.5) * (end - start) / max(count, 1)).clip(0, length - 1)
    low = places.astype(int)
    weights = np.zeros(length)
    np.add.at(weights, low, (1 - places + low) / count if count else 0)
    np.add.at(weights, np.minimum(low + 1, length - 1), (places - low) / count if count else 0)
    return weights
