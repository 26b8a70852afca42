"""Where the attention layers of a transformer looked in a forward."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from .. import ops
from .features import grid
from .hooks import did_not_fire, hooked

CHANNELS = 8  # of a value that is given to fused attention: what its kernels on a GPU are aligned to


def attention_layers(model: nn.Module) -> list[str]:
    """Return the module paths of the layers that ``attention`` can look at, in order of depth.

    A model that is not made of timm's ``Attention`` (ViT, DeiT) or ``WindowAttention`` (Swin) says itself where its
    maps are: ``model.attention_info`` is a list like ``feature_info``, and the input of each ``entry["module"]`` is the
    attention (B, heads, N, N) after the softmax. Raises ``ValueError`` for a model that has none.
    """
    info = getattr(model, "attention_info", None)
    if info is not None:
        return [entry["module"] for entry in info]
    names = [name for name, m in model.named_modules() if type(m) in (timm.layers.Attention, WindowAttention)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention between image tokens to look at; models that have: "
            "deit_small_patch16_224, vit_base_patch16_224, swin_tiny_patch4_window7_224, pvt_tiny"
        )
    return names


class Attention:
    """Where one attention layer looked in the forward just done.

    There are B images with N tokens each. The ``prefix`` tokens, which are no patches, come first, and the class token
    is the first of them. A grid of h x w patches follows. Everything is detached and at least in float32. Nothing is
    computed before it is asked for.
    """

    def __init__(self, layer: Any, prefix: int, has_class_token: bool):
        self.layer, self.prefix, self.has_class_token = layer, prefix, has_class_token
        self.captured: Tensor | None = None  # what the layer's qkv gave, or the attention itself
        self.images: torch.Size | None = None

    @property
    def projects(self) -> bool:
        """Whether it is the projection to queries and keys that is kept, and not the attention itself."""
        return isinstance(self.layer, timm.layers.Attention)

    def seen(self) -> tuple[Tensor, torch.Size]:
        """What was kept, and the shape of the images. Raises ``RuntimeError`` before there is something."""
        if self.captured is None or self.images is None:
            raise RuntimeError("no attention yet: run the model inside the block first")
        if len(self.captured) != self.images[0]:
            raise RuntimeError(
                f"the attention has {len(self.captured) // self.images[0]} windows per image, which share no token: "
                "look at a layer of one window, for Swin the last one at its published image size"
            )
        return self.captured, self.images

    def weights(self, queries: slice = slice(None)) -> Float[Tensor, "B heads Q N"]:
        """Rows of the attention, each a distribution over the N tokens: of all queries, or of a slice of them."""
        captured, _ = self.seen()
        with torch.no_grad(), ops.full_precision(captured.device):
            values = captured.to(torch.promote_types(captured.dtype, torch.float32))
            if not self.projects:
                return values[:, :, queries]
            q, k = queries_and_keys(self.layer, values)
            return (q[:, :, queries] * self.layer.scale @ k.transpose(2, 3)).softmax(3)

    def product(self, values: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The attention, averaged over heads, times one number per token: an average over the tokens looked at.

        Where queries and keys are kept it is had from fused attention in the layer's own precision, with the numbers
        as one channel of its values, so that no (N, N) is made on a GPU. A channel of ones divides what rounding makes
        of a row's sum, so that the result stays between the least and the largest number.
        """
        captured, _ = self.seen()
        with torch.no_grad(), ops.full_precision(captured.device):
            if not self.projects:
                return torch.einsum("bhqk,bk->bq", self.weights(), values) / captured.shape[1]
            q, k = queries_and_keys(self.layer, captured)
            channels = values.new_zeros(*values.shape, CHANNELS)
            channels[..., 0], channels[..., 1] = values, 1
            v = channels.to(q.dtype)[:, None].expand(-1, q.shape[1], -1, -1)
            both = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.layer.scale)[..., :2]
            product, total = both.to(values.dtype).mean(1).unbind(2)
            return product / total

    def of_class_token(self) -> Float[Tensor, "B h w"]:
        """Where the class token looks: mean over heads; the shares of the patches sum to 1.

        Raises ``ValueError`` when the model has none.
        """
        if not self.has_class_token:
            raise ValueError("the model has no class token; of_patches() gives the attention of all patches")
        return self.on_grid(self.weights(slice(0, 1)))

    def of_patches(self) -> Float[Tensor, "B h w"]:
        """Where the patches look: mean over heads and patches as queries; the shares of the patches sum to 1."""
        return self.on_grid(self.weights(slice(self.prefix, None)))

    def share(self, mask: Float[Tensor, "B 1 H W"]) -> Float[Tensor, " B"]:
        """The share of what the class token looks at, without one all patches, for which the mask is 1; in [0, 1]."""
        where = self.of_class_token() if self.has_class_token else self.of_patches()
        return (where * self.on_patches(mask).view_as(where)).sum((1, 2)) / where.sum((1, 2))

    def on_patches(self, mask: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B P"]:
        """The mask at the patches of the grid, each its first pixel: nearest downsampling as in TransMix."""
        captured, images = self.seen()
        tokens = captured.shape[1] if self.projects else captured.shape[3]
        cells = grid(tokens - self.prefix, images[-2:])
        if images[-2] % cells[0] or images[-1] % cells[1]:
            raise ValueError(
                f"images of {images[-2]} x {images[-1]} are padded to {cells} patches: masks would not fit"
            )
        return nn.functional.interpolate(mask, cells).flatten(1)

    def on_grid(self, rows: Float[Tensor, "B heads Q N"]) -> Float[Tensor, "B h w"]:
        """Mean over heads and queries, the prefix left out, summing to 1, on a grid of the images' proportions."""
        share = rows[..., self.prefix :].mean((1, 2))
        return (share / share.sum(1, keepdim=True)).unflatten(1, grid(share.shape[1], self.seen()[1][-2:]))


@contextmanager
def attention(model: nn.Module, block: int = -1) -> Iterator[Attention]:
    """Give what the attention layer ``block`` looked at in the last forward of the block, with fused attention left on.

    Only the projection to queries and keys is kept, and what is asked for is computed from it. The class token's row
    costs next to nothing. All rows cost as much as the layer itself without fusion. If a stage was compiled and the
    layer lies in it, the stage runs uncompiled during the block. Raises ``ValueError`` for a model or block that cannot
    be looked at, and ``RuntimeError`` if the layer never ran::

        with taps.attention(model) as look:
            logits = model(x)
        where = look.of_class_token()
    """
    layers = attention_layers(model)
    if not -len(layers) <= block < len(layers):
        raise ValueError(f"block must be in [{-len(layers)}, {len(layers) - 1}], got {block}")
    with looking(model, layers[block]) as look:
        yield look


@contextmanager
def attentions(model: nn.Module) -> Iterator[list[Attention]]:
    """The same of every layer, in order of depth, in one forward. A stage that was compiled runs uncompiled."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(looking(model, name)) for name in attention_layers(model)]


@contextmanager
def looking(model: nn.Module, name: str) -> Iterator[Attention]:
    """What the attention layer of that module path looked at."""
    layer = model.get_submodule(name)
    if getattr(layer, "fused_attn", False) and isinstance(layer, WindowAttention):
        raise ValueError(f"{name} of {type(model).__name__} fuses its attention: set its fused_attn to False")
    prefix = getattr(model, "num_prefix_tokens", 0)
    look = Attention(layer, prefix, getattr(model, "has_class_token", prefix > 0))

    def size(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        look.images = args[0].shape

    def projected(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        look.captured = output.detach()

    def weighed(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        look.captured = args[0].detach()

    tapped = name + {timm.layers.Attention: ".qkv", WindowAttention: ".attn_drop"}.get(type(layer), "")
    module = model.get_submodule(tapped)
    hook = module.register_forward_hook(projected) if look.projects else module.register_forward_pre_hook(weighed)
    with hooked(model, tapped, model.register_forward_pre_hook(size), hook):
        yield look
    if look.captured is None or look.images is None:
        raise did_not_fire(model, tapped)


def ahead(block: Any, tokens: Float[Tensor, "B N C"], prefix: int) -> Attention:
    """What the attention layer of a block of timm's ViT would look at, given the block's input, before the block runs.

    Without gradient, and without what the block does beside: its norm and its projection to queries and keys alone.
    ``prefix``: how many tokens are no patches, the class token first.
    """
    if hasattr(block, "unshard"):  # a process may hold but a piece of it until it runs
        block.unshard()
    look = Attention(block.attn, prefix, has_class_token=prefix > 0)
    with torch.no_grad():
        look.captured = block.attn.qkv(block.norm1(tokens.detach()))
    torch.clear_autocast_cache()  # see ``gradient.looking``
    look.images = tokens.shape
    return look


def queries_and_keys(layer: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, heads, N, d), of timm's ``Attention``, from the output (B, N, 3 * heads * d) of its ``qkv``."""
    q, k, _ = qkv.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return layer.q_norm(q), layer.k_norm(k)
