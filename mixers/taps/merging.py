"""A look in which similar patches become one token on the way.

This is Token Merging in a plain transformer, from outside (Bolya et al. Token Merging: Your ViT But Faster. ICLR 2023,
https://arxiv.org/abs/2210.09461).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import ops
from .attending import attention_layers, queries_and_keys
from .hooks import hooked


def merging_blocks(model: nn.Module) -> list[str]:
    """Module paths of the blocks between whose attention and MLP patches can be merged, in order of depth.

    Raises ``ValueError`` unless all attention of the model lies in timm's ``Block``, which keeps no grid.
    """
    names: list[str] = []
    with contextlib.suppress(ValueError):  # which names models that merge nothing
        names = [name.rpartition(".")[0] for name in attention_layers(model)]
    # not the type, which is one of its own where parameters are sharded
    if not names or any(type(model.get_submodule(name)).forward is not Block.forward for name in names):
        raise ValueError(
            f"{type(model).__name__} is no plain vision transformer, whose tokens may be merged; models that are: "
            "deit_tiny_patch16_224, deit_small_patch16_224, vit_base_patch16_224"
        )
    return names


def schedule(blocks: int, total: int) -> list[int]:
    """Return how many of ``total`` merges each block makes: fewer the deeper it lies.

    The numbers go from 1.5 r to 0.5 r, as ToMe's "-0.5". r is the number whose schedule, rounded down in each block,
    comes nearest to the total. Of two such numbers it is the smaller one. What is missing, or too much, is added to the
    first block or taken from it.
    """

    def counts(r: int) -> list[int]:
        first = int(1.5 * r)
        step = (2 * (r - first)) / max(1, blocks - 1)
        return [int(first + step * i) for i in range(blocks)]

    r = min(range(max(1, total)), key=lambda r: abs(sum(counts(r)) - total))
    found = counts(r)
    found[0] += total - sum(found)
    return found


@contextmanager
def merging(model: nn.Module, share: float) -> Iterator[list[Int[Tensor, "B P"]]]:
    """In the block, let one forward of the model merge ``share`` of its patches, in all blocks together.

    It gives a list that is filled by the forward. For each block the list says in which of the tokens that its
    attention sees a patch of the image is, as numbers along the tokens, class and other prefix tokens included. The
    last entry, one more than there are blocks, is of the tokens that are left. Prefix tokens are never merged. Block by
    block, the patches are divided into those at even and those at odd places among all tokens. The ``schedule`` gives
    the number of patches at even places that are merged. They are those whose keys, as the mean over heads, are the
    most similar to one at an odd place, by the cosine. Each becomes one with it: their mean, each weighted by the
    patches that it stands for. At most half of what is left is merged in a block.

    The logits of such a forward are those of another model. Raises ``ValueError`` as ``merging_blocks``.
    """
    names, state = merging_blocks(model), Merging(getattr(model, "num_prefix_tokens", 0), share)
    with contextlib.ExitStack() as stack:
        for name in names:
            block: Any = model.get_submodule(name)
            hook = block.attn.qkv.register_forward_hook(state.keep)
            stack.enter_context(hooked(model, f"{name}.attn.qkv", hook))
            stack.callback(block.__dict__.pop, "forward", None)
            block.forward = state.through(block, len(names))  # in front of the class's own, until the block ends
        yield state.groups
    if len(state.groups) != len(names) + 1:
        ran = max(0, len(state.groups) - 1)
        raise RuntimeError(f"{ran} of {len(names)} blocks of {type(model).__name__} merged: expected one forward")


class Merging:
    """What has been merged in the forward so far."""

    def __init__(self, prefix: int, share: float):
        self.prefix, self.share = prefix, share
        self.groups: list[Tensor] = []
        self.sizes, self.keys = torch.empty(0), torch.empty(0)
        self.counts: list[int] = []

    def keep(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        """A hook on a projection to queries, keys and values."""
        self.keys = output

    def through(self, block: Any, blocks: int) -> Callable[..., Tensor]:
        """The forward of timm's ``Block``, with a merge between its two halves."""

        def forward(x: Float[Tensor, "B N C"], **options: Any) -> Float[Tensor, "B n C"]:
            if not self.groups:
                self.start(x, blocks)
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **options)))
            x = self.merge(x, queries_and_keys(block.attn, self.keys)[1])
            return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

        return forward

    def start(self, x: Float[Tensor, "B N C"], blocks: int) -> None:
        """Each patch is a token of its own."""
        patches = torch.arange(self.prefix, x.shape[1], device=x.device)
        self.groups.append(patches.expand(len(x), -1))
        self.sizes = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        self.counts = schedule(blocks, round(self.share * len(patches)))

    def merge(self, x: Float[Tensor, "B N C"], keys: Float[Tensor, "B heads N d"]) -> Float[Tensor, "B n C"]:
        """The tokens after the merge of this block."""
        count = min(self.counts[len(self.groups) - 1], (x.shape[1] - self.prefix) // 2)
        if count < 1:
            self.groups.append(self.groups[-1])
            return x
        with torch.no_grad(), ops.full_precision(x.device):
            to = destinations(keys.to(self.sizes.dtype).mean(1), self.prefix, count)
            numbers = torch.arange(x.shape[1] - count, device=x.device)
            joins = (to[:, None, :] == numbers[:, None]).to(self.sizes.dtype)  # (B, n, N): sums in one order each time
            total = joins @ self.sizes[:, :, None]
            merged = joins @ (x * self.sizes[:, :, None]) / total
        self.sizes = total[:, :, 0]
        self.groups.append(to.gather(1, self.groups[-1]))
        return merged.to(x.dtype)


def destinations(metric: Float[Tensor, "B N d"], prefix: int, count: int) -> Int[Tensor, "B N"]:
    """The number of each token after ``count`` merges: prefix tokens, even places that stay, then odd places."""
    even, odd = prefix % 2, 1 - prefix % 2  # where both begin among the patches
    patches = F.normalize(metric[:, prefix:], dim=2)
    similarity, nearest = (patches[:, even::2] @ patches[:, odd::2].mT).max(2)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    gone, stay = order[:, :count], order[:, count:].sort(1).values
    first = prefix + stay.shape[1]  # of the odd places
    to = torch.arange(metric.shape[1], device=metric.device).repeat(len(metric), 1)
    to[:, prefix:][:, odd::2] = torch.arange(first, metric.shape[1] - count, device=metric.device)
    evens = torch.empty_like(order)
    evens.scatter_(1, stay, torch.arange(prefix, first, device=metric.device).expand_as(stay))
    evens.scatter_(1, gone, first + nearest.gather(1, gone))
    to[:, prefix:][:, even::2] = evens
    return to
