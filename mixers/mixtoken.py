"""MixToken. All Tokens Matter: Token Labeling for Training Better Vision Transformers. Jiang, Hou, Yuan, Zhou, Shi,
Jin, Wang, Feng. NeurIPS 2021.

https://arxiv.org/abs/2104.10858, reference code https://github.com/zihangJiang/TokenLabeling

This file has two parts of the paper: MixToken and, with a teacher, token labels.

Formula: This is CutMix of tokens behind the patch embedding E. The tokens of the partner stand inside a box of the
token grid, ``T' = M*E(x) + (1-M)*E(x[index])``. ``y' = lam*y + (1-lam)*y[index]``, where lam is the mean of M. With a
teacher each patch has a label too. It is what the teacher's classifier says of each position of its last feature on the
clean image, brought to the token grid bilinearly, then a softmax. These labels P are mixed like the tokens,
``P' = M*P + (1-M)*P[index]``. The loss is ``L(z, y') + dense_weight * mean over patches of L(h(t), P')`` with logits z,
the last tokens t and a head h for tokens. h starts as a copy of the model's classifier and is dropped when the model is
exported.

Published defaults: alpha = 1, and both losses weigh the same (reference code). Every batch is mixed.

Sampling law: ``mixtoken@jiang-2021``: CutMix's box is drawn on the grid of the last tokens (14 x 14 for DeiT, 7 x 7 for
Swin at 224 pixels), so that each of them is of one image. ``lam0 ~ Beta(alpha, alpha)``. Half sides are rounded down to
whole tokens, the centre is uniform, and the box is clipped at the border. The whole batch has one box. The partners are
a uniformly random permutation of the batch. Fixed points are allowed: an image may be its own partner.

Cost: There is no extra pass. With a teacher there is one forward of the teacher, and h on all tokens.

Where it mixes: In an embedding whose patches do not overlap (ViT, DeiT, Swin) a token is made of its own pixels alone.
There the same is done to the images, and the method without a teacher is CutMix of whole patches. Behind an embedding
that looks across patches (VOLO, PVT.V2) the tokens are mixed, and ``mix`` returns the images as they are. XCiT, PiT,
CrossViT and MViTv2 are not mixed: ``setup`` refuses them. Their tokens are no grid of the stride that timm publishes,
or come with more than themselves.

Deviations: This was written from the code. What the code also calls LV-ViT is an architecture and is not here: its
embedding of four convolutions, its scaled residual connections, and a prediction to which half of the largest patch
logits is added. The reference code reads labels that a network (NFNet-F6 at 576 pixels) made of whole images in
advance. It keeps the five largest scores of a position, as if all others were 0, and crops the labels as the image was
cropped. Here the teacher looks at the crop itself. The reference code takes the teacher's label of the crop for y
(``--ground-truth`` adds y to it), smooths P, and gives every patch the label of its image where there are no label
maps. Here y is the recipe's, P is as the teacher has it, and without a teacher there is no head for tokens. The
reference code moves the patch outputs back to their images in place of mixing P, which gives the same mean. It pairs a
batch with its reverse, and draws h anew. The reference code is of one grid of tokens. That the box follows the last of
several grids is as in VOLO, by some of the same authors. VOLO itself is mixed, but gets no token labels here.

Kind: input, feature.
"""

import contextlib
import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan

EMBEDDING = "patch_embed"  # its name in timm
USE = "use deit_small_patch16_224, swin_tiny_patch4_window7_224, volo_d1_224 or pvt_v2_b1"


class MixToken(Mixer):
    """Mix whole tokens as CutMix does, with labels for tokens where a teacher gives them.

    ``alpha`` is the Beta parameter and must be above 0. ``teacher`` is the timm name, ``hf-hub:`` address or run folder
    of a network trained on the same classes, for images of the size and normalisation of the run. If it is None, there
    are only class labels. ``dense_weight`` says what the loss of the tokens weighs beside that of the class and must be
    at least 0.
    """

    inside = True

    def __init__(self, alpha: float = 1.0, teacher: str | None = None, dense_weight: float = 1.0):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_between("dense_weight", dense_weight, 0.0)
        if teacher is not None and not (isinstance(teacher, str) and teacher):
            raise ValueError(f"teacher must be the name of timm weights or a folder, or None, got {teacher!r}")
        self.alpha = alpha
        self.teacher = teacher
        self.dense_weight = dense_weight
        self.one_label = teacher is not None  # the labels of tokens are softmaxes

    def setup(self, model: nn.Module) -> None:
        """Load the teacher, make the head for tokens.

        Raises ``ValueError`` for a model without a patch embedding, or with one whose tokens are no grid of the
        published stride, for a teacher that has other classes or no linear classifier, and for one with a model whose
        last tokens are not those of patches alone.
        """
        if not hasattr(model, EMBEDDING) or isinstance(model.get_submodule(EMBEDDING), nn.ModuleList):
            raise ValueError(
                f"MixToken needs a transformer with a patch embedding, which {type(model).__name__} lacks; {USE}"
            )
        try:
            strides = taps.reductions(model).values()
        except AttributeError as error:  # a stage under a name that the model does not have
            raise ValueError(
                f"{type(model).__name__} publishes stages that it does not have ({error}); {USE}"
            ) from error
        if overlaps(model) and not on_grid(model, min(strides), max(strides)):
            raise ValueError(
                f"MixToken needs a patch embedding that gives a token for every {min(strides)} pixels, that of "
                f"{type(model).__name__} does not; {USE}"
            )
        # The tokens of patches are those behind the number of others, which VOLO does not publish.
        if self.teacher and getattr(model, "cls_token", None) is not None and not hasattr(model, "num_prefix_tokens"):
            raise ValueError(
                f"MixToken cannot tell the last tokens of {type(model).__name__} from its class token; leave the "
                "teacher out, or use deit_small_patch16_224 or swin_tiny_patch4_window7_224"
            )
        self.frozen = taps.Frozen(self.teacher) if self.teacher else None
        if self.frozen:
            head, of_teacher = taps.classifier(model), taps.classifier(self.frozen.model)
            if head.out_features != of_teacher.out_features:
                raise ValueError(
                    f"the teacher {self.teacher!r} knows {of_teacher.out_features} classes, expected "
                    f"{head.out_features}, those of the model"
                )
            self.head = copy.deepcopy(head)

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (B,), ``mask`` (B, 1, H, W) with 0 inside the box, ``lam`` (B,) its mean, ``hidden``.

        ``hidden``: whether it is the tokens that are mixed, and not the images. ``look``: the model.
        """
        ops.check_look(look)
        cell = max(taps.reductions(look[0]).values())
        height, width = (side // cell for side in x.shape[-2:])
        if (height * cell, width * cell) != x.shape[-2:]:
            raise ValueError(f"MixToken needs images whose sides are multiples of {cell}, got {tuple(x.shape[-2:])}")
        box = ops.clipped_box(height, width, ops.beta(self.alpha, self.alpha, rng), rng)
        top, bottom, left, right = (cell * side for side in box)
        return {
            "index": ops.partners(x, rng),
            "mask": ops.box_mask(top, bottom, left, right, x),
            "lam": ops.per_sample(1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1]), x),
            "hidden": overlaps(look[0]),
        }

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, " B"],
        mask: Float[Tensor, "B 1 H W"],
        lam: Float[Tensor, " B"],
        hidden: bool,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """Mixed targets, and the images: mixed, or as they are when it is the tokens that are mixed."""
        ops.check_batch(x, y)
        return x if hidden else ops.blend(x, index, mask), ops.blend_targets(y, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, with the loss of the tokens added where a teacher has labels for them."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model)
        mixed, target = self.mix(x, y, **plan)
        features: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if plan["hidden"]:
                own = every(plan["mask"], min(taps.reductions(model).values()))
                place = tokens_at(model)

                def change(tokens: Tensor) -> Tensor:
                    cells = own if tokens.ndim == 4 else own.flatten(1)
                    cells = cells.unsqueeze(taps.channel_axis(model, place, tokens))
                    return ops.blend(tokens, plan["index"], cells)

                stack.enter_context(taps.edit(model, place, change))
            if self.frozen:
                features = stack.enter_context(taps.last_feature(model))
            logits = model(mixed)
        parts = {"mix": criterion(logits, target)}
        if self.frozen:
            own = every(plan["mask"], max(taps.reductions(model).values()))
            labels = token_labels(self.frozen.model, x, own.shape[1:]).to(y.dtype)
            labels = torch.where(own.flatten(1)[:, :, None] > 0, labels, labels[plan["index"]])
            tokens = taps.to_tokens(model, features[0])
            if tokens.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"MixToken expected {labels.shape[1]} last tokens of {type(model).__name__}, one for each cell of "
                    f"the grid, got {tokens.shape[1]}; leave the teacher out, or use deit_small_patch16_224"
                )
            said = self.head(taps.before_classifier(model, tokens.flatten(0, 1), features[0]))
            parts["tokens"] = self.dense_weight * criterion(said, labels.flatten(0, 1))
        return Out.of(logits, target, plan, **parts)


def overlaps(model: nn.Module) -> bool:
    """Whether a token of the model's embedding is made of other pixels than those of its own patch."""
    layers = [m for m in model.get_submodule(EMBEDDING).modules() if isinstance(m, nn.Conv2d)]
    return any(m.kernel_size != m.stride or any(side != 0 for side in m.padding) for m in layers)


def every(mask: Float[Tensor, "B 1 H W"], stride: int) -> Float[Tensor, "B h w"]:
    """The mask at the first pixel of each cell of ``stride`` pixels."""
    return mask[:, 0, ::stride, ::stride]


def tokens_at(model: nn.Module) -> str:
    """Where the tokens of an embedding are to be had: its last convolution, whose layout is known, if it has one.

    PVT.V2 and VOLO call it ``proj``. What comes behind it in an embedding is done to each token alone.
    """
    projection = getattr(model.get_submodule(EMBEDDING), "proj", None)
    return f"{EMBEDDING}.proj" if isinstance(projection, nn.Conv2d) else EMBEDDING


def on_grid(model: nn.Module, stride: int, cell: int) -> bool:
    """Whether the embedding makes of an image a tensor with a token for every ``stride`` pixels."""
    embedding, place = model.get_submodule(EMBEDDING), tokens_at(model)
    first = next(m for m in embedding.modules() if isinstance(m, nn.Conv2d))
    height, width = getattr(embedding, "img_size", None) or (2 * cell, 2 * cell)
    with taps.looking(model):
        tokens = embedding(first.weight.new_zeros(1, first.in_channels, height, width))
    if not isinstance(tokens, Tensor):
        return False
    axis = taps.channel_axis(model, place, tokens)
    channels = getattr(model.get_submodule(place), "out_channels", tokens.shape[axis])
    return tokens.numel() == channels * (height // stride) * (width // stride)


@torch.no_grad()
def token_labels(teacher: Any, x: Float[Tensor, "B C H W"], grid: torch.Size) -> Float[Tensor, "B P K"]:
    """What a trained network sees in each cell of a grid of clean images: distributions over its classes."""
    with taps.looking(teacher):
        feature = teacher.forward_features(x)
        tokens = taps.to_tokens(teacher, feature)
        seen = taps.before_classifier(teacher, tokens.flatten(0, 1), feature)
        scores = taps.classifier(teacher)(seen).unflatten(0, tokens.shape[:2])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).transpose(1, 2)
    scores = scores.unflatten(2, taps.to_map(teacher, feature, x).shape[2:])
    return F.interpolate(scores, grid, mode="bilinear").flatten(2).transpose(1, 2).softmax(2)
