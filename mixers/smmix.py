"""SMMix: Self-Motivated Image Mixing for Vision Transformers. Chen, Lin, Lin, Zhang, Chao, Ji. ICCV 2023.

https://arxiv.org/abs/2212.12977, reference code https://github.com/ChenMnZ/SMMix

Formula: A pass over the clean images, in evaluation mode and without gradient, gives logits z and A. A is the attention
that each patch gets from all patches in the last layer, as the mean over heads. The token grid is g x g, and a square
has s x s of its cells. Of all squares, the one of ``x[index]`` with the most attention is pasted over the one of ``x``
with the least. ``lam = 1 - s*s/(g*g)``. The mixed image gives logits o and tokens t after the last norm. With a head h
for tokens, the loss is
    ``L(o, lam*y + (1-lam)*y[index])``
    ``+ (L(h(mean of t outside the square), y) + L(h(mean of t inside), y[index])) / 2``
    ``+ KL(softmax(lam*z + (1-lam)*z[index]) || softmax(o))``.
h starts as a copy of the model's classifier and is dropped when the model is exported.

Published defaults: There is no hyperparameter. The three parts weigh the same. This class mixes every batch. The
published method, ``smmix``, does so for half of the batches and takes Mixup with alpha = 0.8 for the others.

Sampling law: ``smmix@chen-2023``: One s is drawn for the whole batch, uniformly on floor(g/4) ... floor(3g/4), but at
least 1, where g is the shorter side of the grid. This is 3 to 10 for DeiT and 1 to 5 for PVT and Swin at 224 pixels.
Every sample has its own squares. The partners are a uniformly random permutation of the batch. Fixed points are
allowed: an image may be its own partner.

Cost: A step takes one more forward, which makes 1.33 steps of the model itself. ``smmix`` does this in half of the
steps, so 1.17 are expected.

Deviations: L is the recipe's loss (reference code: cross-entropy), with labels smoothed as the recipe says. In the
reference code h starts from a draw of its own, and a batch is paired with its reverse. OpenMixup keeps only the pasted
square of this method. It takes the class token's attention and looks with drop path on.

Kind: input, label.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import Switch
from .registry import build

NORM = "norm"  # the last one, by its name in timm


class SMMix(Mixer):
    """Paste the partner's most attended square over the least attended one, and teach tokens what they show."""

    one_label = True  # the predictions that are blended are softmaxes

    def setup(self, model: nn.Module) -> None:
        """Make the head for tokens. Raises ``ValueError`` when the model has no attention, last norm or linear head."""
        taps.attention_layers(model)
        head = getattr(model, "get_classifier", lambda: None)()
        if not isinstance(head, nn.Linear) or not hasattr(model, NORM):
            raise ValueError(
                f"SMMix needs one linear classifier and a last norm over tokens, which {type(model).__name__} lacks; "
                "models that have: deit_small_patch16_224, swin_tiny_patch4_window7_224, pvt_tiny"
            )
        self.head = copy.deepcopy(head)

    def plan(
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
        attention: Float[Tensor, "B h w"],
    ) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 in the square, ``shift`` (B, 2) and ``lam`` (B,).

        ``shift``: rows and columns, in pixels, from a pixel of the square to what is pasted there. ``attention``: what
        each patch of the clean images gets.
        """
        height, width = attention.shape[1:]
        side = min(height, width)
        side = int(rng.integers(max(1, side // 4), max(1, 3 * side // 4) + 1))
        index = ops.partners(x, rng)
        least, most = squares(attention, side)
        cells = 1 - inside(height, least[:, 0], side)[:, :, None] * inside(width, least[:, 1], side)[:, None, :]
        pixels = ops.send(np.array([x.shape[2] // height, x.shape[3] // width]), x)
        return {
            "index": index,
            "mask": ops.to_pixels(cells[:, None], x),
            "shift": (most[index] - least) * pixels,
            "lam": ops.per_sample(1 - side**2 / (height * width), x),
        }

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 H W"],
        shift: Int[Tensor, "B 2"],
        lam: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Paste ``x[index]``, moved by ``shift``, where the mask is 0."""
        ops.check_batch(x, y)
        height, width = x.shape[2:]
        rows = (torch.arange(height, device=x.device) + shift[:, :1]) % height
        columns = (torch.arange(width, device=x.device) + shift[:, 1:]) % width
        moved = x[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
        return torch.where(mask > 0, x, moved), ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """A look at the clean images, then the step on the mixed ones."""
        ops.check_batch(x, y)
        with taps.looking(model), taps.attention(model) as look:
            clean = model(x)
        attention = look.of_patches()
        plan = self.plan(x, y, rng, attention)
        mixed, target = self.mix(x, y, **plan)
        with taps.record(model, NORM) as features:
            logits = model(mixed)
        own = plan["mask"][:, 0, :: x.shape[2] // attention.shape[1], :: x.shape[3] // attention.shape[2]].flatten(1)
        pooled = means(taps.to_tokens(model, features[NORM]), own).to(self.head.weight.dtype)
        of_own, of_partner = self.head(pooled).unbind(1)
        fine = (criterion(of_own, y) + criterion(of_partner, y[plan["index"]])) / 2
        consistency = divergence(logits, clean, plan["index"], plan["lam"])
        return Out.of(logits, target, plan, mix=criterion(logits, target), fine=fine, consistency=consistency)


def smmix(mixup_alpha: float = 0.8) -> Switch:
    """Make the published method: Mixup or the attended square, with probability one half each."""
    return Switch([build("mixup", alpha=mixup_alpha), SMMix()])


def squares(attention: Float[Tensor, "B h w"], side: int) -> tuple[Int[Tensor, "B 2"], Int[Tensor, "B 2"]]:
    """Row and column of the first cell of the square with the least attention, and of that with the most."""
    sums = F.avg_pool2d(attention[:, None], side, stride=1)
    columns = sums.shape[3]
    flat = sums.flatten(1)
    return tuple(torch.stack([at // columns, at % columns], 1) for at in (flat.argmin(1), flat.argmax(1)))  # type: ignore[return-value]


def inside(length: int, first: Int[Tensor, " B"], side: int) -> Float[Tensor, "B {length}"]:
    """1 in ``[first, first+side)``, 0 elsewhere."""
    place = torch.arange(length, device=first.device)
    return ((place >= first[:, None]) & (place < first[:, None] + side)).float()


def means(tokens: Float[Tensor, "B P C"], own: Float[Tensor, "B P"]) -> Float[Tensor, "B 2 C"]:
    """Mean of each sample's own tokens, and of its partner's: those where ``own`` is 1, and those where it is 0."""
    with ops.full_precision(tokens.device):
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        chosen = torch.stack([own, 1 - own], 1).to(tokens.dtype)
        return chosen @ tokens / chosen.sum(2, keepdim=True).clamp(min=1)


def divergence(
    logits: Float[Tensor, "B K"], clean: Float[Tensor, "B K"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """KL of the prediction for the mixed image from that of the blended clean logits."""
    with ops.full_precision(logits.device):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        aim = ops.blend_targets(clean.to(dtype), index, lam).log_softmax(1)
        return F.kl_div(logits.to(dtype).log_softmax(1), aim, reduction="none", log_target=True).sum(1)
