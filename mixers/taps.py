"""Looks into a model that is not ours: its stages, hidden features, attention and input gradient; a frozen teacher.

Everything works on plain timm models from outside, through the module paths that timm publishes in
``feature_info``, and leaves no trace on the model: no hook, mode, flag, buffer or gradient. A tap that did not
fire raises: a hook on a model that was compiled as a whole, or that recomputes activations, would otherwise be
ignored without a word.

Two limits of torch decide what is possible. Inside a stage that was compiled no new hook fires, so a tap there
runs that one stage uncompiled during its block. Activation checkpointing runs a module again in the backward
pass, when hooks are gone: ``edit`` refuses it, ``record``, ``attention`` and ``saliency`` work where it reaches
the module at all.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from jaxtyping import Float
from timm.layers import use_reentrant_ckpt
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import ops, weights
from .weights import NoWeights


def stages(model: nn.Module) -> list[str]:
    """Module paths of the model's published stages, in order of depth, e.g. ``["layer1", ..., "layer4"]``.

    Leaves out an entry that is not a stage of residual blocks or tokens but the stem's activation.
    Raises ``ValueError`` when the model does not publish its stages.
    """
    return list(reductions(model))


def reductions(model: nn.Module) -> dict[str, int]:
    """The published stages, and how much coarser than the image each one's output is. Raises like ``stages``."""
    info = getattr(model, "feature_info", None)
    if info is None:
        raise ValueError(
            f"{type(model).__name__} does not publish its stages (feature_info); use a timm model such as "
            "resnet50, deit_small_patch16_224, swin_tiny_patch4_window7_224 or convnext_tiny"
        )
    found = {entry["module"]: entry["reduction"] for entry in (info.info if hasattr(info, "info") else info)}
    stems = (nn.ReLU, nn.SiLU, nn.GELU)
    return {name: by for name, by in found.items() if not isinstance(model.get_submodule(name), stems)}


def compile_stages(model: nn.Module, **options: Any) -> None:
    """Compile every stage by itself, in place: hooks between the stages keep working, state-dict keys stay.

    ``options`` are those of ``torch.compile``, e.g. ``backend``.
    """
    for name in stages(model):
        model.get_submodule(name).compile(**options)


# -------------------------------------------------------------------------------------------- hidden features


@contextmanager
def edit(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of the submodule ``name`` by ``change(output)`` during the block.

    ``name`` is a module path, or ``""`` for the model's input. Raises ``RuntimeError`` at once when the submodule
    lies where activations are checkpointed or runs a second time, and when the block ends and it never ran.
    """
    refuse_recomputation(model, name)
    fired = False

    def fire() -> None:
        nonlocal fired
        if fired:
            raise RuntimeError(f"{name or 'the input'} would be edited twice: one forward belongs into the block")
        fired = True

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fire()
        return (change(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fire()
        return change(output)

    module = model.get_submodule(name)
    with hooked(model, name, module.register_forward_hook(after) if name else model.register_forward_pre_hook(before)):
        yield
    if not fired:
        raise did_not_fire(model, name)


@contextmanager
def record(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after one forward in the block, the output of each submodule in ``names``, with its graph.

    Raises ``RuntimeError`` when the block ends and a submodule never ran, or ran more than once.
    """
    outputs: dict[str, Tensor] = {}
    calls = dict.fromkeys(names, 0)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = output
            calls[name] += 1

        return after

    with contextlib.ExitStack() as stack:
        for name in calls:
            if use_reentrant_ckpt():  # it runs the forward without a graph
                refuse_recomputation(model, name)
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            stack.enter_context(hooked(model, name, handle))
        yield outputs
    for name, times in calls.items():
        if times == 0:
            raise did_not_fire(model, name)
        if times > 1:
            raise RuntimeError(
                f"the tap on {name!r} of {type(model).__name__} fired {times} times: a record is of one forward, "
                "without the backward pass if activations are checkpointed"
            )


@contextmanager
def hooked(model: nn.Module, name: str, *handles: Any) -> Iterator[None]:
    """Remove the hooks when the block ends, and run what is compiled around the submodule uncompiled until then."""
    compiled = [(m, m._compiled_call_impl) for m in around(model, name)[1:] if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled:
            module._compiled_call_impl = call


def around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the submodule ``name``, the model first; none contains the model itself."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def refuse_recomputation(model: nn.Module, name: str) -> None:
    """Raise RuntimeError when the submodule runs again in the backward pass, as timm's flag says."""
    if any(getattr(module, "grad_checkpointing", False) for module in around(model, name)):
        raise RuntimeError(
            f"no tap on {name!r} of {type(model).__name__} while it checkpoints activations: they would be recomputed "
            "without the tap; call set_grad_checkpointing(False)"
        )


def did_not_fire(model: nn.Module, name: str) -> RuntimeError:
    """The error of a block in which the submodule never ran."""
    return RuntimeError(
        f"the tap on {name or 'the input'!r} of {type(model).__name__} did not fire: a model that was compiled as "
        "a whole or that checkpoints activations bypasses it; compile it stage by stage (compile_stages) instead"
    )


def to_tokens(model: nn.Module, feature: Tensor) -> Float[Tensor, "B P C"]:
    """The positions of a hidden feature: a map (B, C, h, w), or (B, h, w, C) as timm's ``output_fmt`` says, or tokens.

    Class and register tokens, which the model counts as ``num_prefix_tokens``, are left out.
    """
    if feature.ndim == 3:
        return feature[:, getattr(model, "num_prefix_tokens", 0) :]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return feature.flatten(1, 2)
    return feature.flatten(2).transpose(1, 2)


def from_tokens(model: nn.Module, tokens: Float[Tensor, "B P C"], like: Tensor) -> Tensor:
    """The inverse of ``to_tokens``: a feature of the shape of ``like``, with the prefix tokens of ``like``."""
    if like.ndim == 3:
        return torch.cat((like[:, : like.shape[1] - tokens.shape[1]], tokens), dim=1)
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return tokens.reshape(like.shape)
    return tokens.transpose(1, 2).reshape(like.shape)


@contextmanager
def last_feature(model: Any) -> Iterator[list[Tensor]]:
    """A list that holds, after one forward in the block, what ``forward_features`` gave, with its graph."""
    found: list[Tensor] = []
    whole = model.forward_features

    def keep(*args: Any, **options: Any) -> Tensor:
        found.append(whole(*args, **options))
        return found[-1]

    model.forward_features = keep  # in front of the class's own, until the block ends
    try:
        yield found
    finally:
        del model.forward_features
    if len(found) != 1:
        raise RuntimeError(f"forward_features of {type(model).__name__} ran {len(found)} times, expected once")


def to_map(model: nn.Module, feature: Tensor, images: Tensor) -> Float[Tensor, "B C h w"]:
    """The positions of a hidden feature (see ``to_tokens``) as a map of the proportions of ``images`` (B, C, H, W)."""
    if feature.ndim == 4:
        return feature.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else feature
    tokens = to_tokens(model, feature)
    return tokens.transpose(1, 2).unflatten(2, grid(tokens.shape[1], images.shape[-2:]))


def grid(positions: int, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of ``positions`` patches on images of ``size``, height first. Raises when there is no grid."""
    height, width = size
    down = max(1, round((positions * height / width) ** 0.5))
    if positions % down:
        raise RuntimeError(f"{positions} patches are no grid on images of {height} x {width}")
    return down, positions // down


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that turns the pooled last feature into logits. Raises ``ValueError`` when there is none."""
    get = getattr(model, "get_classifier", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear classifier (get_classifier() gives {type(head).__name__}); models "
            "that have: resnet50, deit_small_patch16_224, swin_tiny_patch4_window7_224, convnext_tiny"
        )
    return head


def before_classifier(model: Any, vectors: Float[Tensor, "n C"], feature: Tensor) -> Float[Tensor, "n D"]:
    """What the classifier is given when each of ``vectors`` is the last feature at every position: its head's norm.

    ``feature``: one of the model, whose layout is taken.
    """
    if feature.ndim == 3:  # as class token, and as the one patch
        alone = vectors[:, None].expand(-1, 1 + getattr(model, "num_prefix_tokens", 0), -1)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        alone = vectors[:, None, None]
    else:
        alone = vectors[:, :, None, None]
    return model.forward_head(alone, pre_logits=True)


# -------------------------------------------------------------------------------------------- input gradient


def saliency(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
    training: bool = False,
) -> Float[Tensor, "B C H W"]:
    """Gradient of the summed loss of ``model(x)`` with respect to the images, detached, at least in float32.

    In evaluation mode, so row i is the gradient of sample i's own loss: BatchNorm takes its running statistics,
    dropout and drop path are off. ``training=True`` leaves the modes as they are, and still no buffer and no random
    generator is moved. Only activations are differentiated: the gradients of parameters, also those accumulated
    so far, and the hooks of DistributedDataParallel (give this function the module inside it) are not touched.

    Nothing underflows in float16: the gradient is started at a size near 1, per sample where samples do not
    interact, and scaled back at the end, by powers of 2.
    """
    images = x.detach().requires_grad_()
    with as_is(model) if training else evaluating(model), torch.enable_grad():
        logits = model(images)
        slope, scale = started(logits, criterion, y, per_sample=not training)
        (gradient,) = torch.autograd.grad(logits, images, slope)
    return gradient.to(scale.dtype) / scale[:, None, None, None]


def started(
    logits: Float[Tensor, "B K"], criterion: Callable[[Tensor, Tensor], Tensor], y: Tensor, per_sample: bool
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """The slope of the summed loss in the logits, scaled to a size near 1, and the powers of 2 that did it.

    A criterion that returns a scalar returns the mean.
    """
    top = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    losses = criterion(top, y)
    (slope,) = torch.autograd.grad(losses.sum() if losses.ndim else losses * len(top), top)
    largest = slope.abs().amax(1) if per_sample else slope.abs().amax()
    scale = torch.exp2(-torch.frexp(largest)[1].to(slope.dtype)).expand(len(logits))
    return (slope * scale[:, None]).to(logits.dtype), scale


def clean_pass(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "B C H W"]]:
    """One forward and backward pass of a batch whose loss is to be learned too: its mean, and ``saliency`` beside it.

    In the modes that the model is in, as a training step. The gradients of the parameters are kept and handed over when
    the backward pass of the step reaches the loss that is returned: no graph of the first pass has to be kept or run
    twice, and ``grad`` is not touched before. They come in float32 from a start near 1, see ``saliency``.
    """
    images = x.detach().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        logits = model(images)
        slope, scale = started(logits, criterion, y, per_sample=False)
        gradient, *of_parameters = torch.autograd.grad(logits, [images, *parameters], slope, allow_unused=True)
    loss = criterion(logits.detach(), y).mean()
    if torch.is_grad_enabled():
        used = [(p, g / (scale[0] * len(x))) for p, g in zip(parameters, of_parameters, strict=True) if g is not None]
        loss = Learned.apply(loss, *(p for p, _ in used), *(g for _, g in used))
    return loss, gradient.to(scale.dtype) / scale[:, None, None, None]


class Learned(torch.autograd.Function):
    """A value whose gradients in some parameters are known: ``apply(value, *parameters, *gradients)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *(slope * gradient for gradient in gradients), *(None for _ in gradients)


def magnitude(gradient: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
    """Root mean square over channels of an image's gradient, as a share of its largest entry; 0 if not finite."""
    size = gradient.nan_to_num(0.0, 0.0, 0.0).abs()
    top = size.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return (size / top).square().mean(1).sqrt()  # scaled first: squares of small numbers are 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode during the block, and in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def as_is(model: nn.Module) -> Iterator[None]:
    """Every submodule in its own mode, but running statistics and the generators of torch stay where they are."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for module in norms:
        module.track_running_stats = False  # in training mode: statistics of the batch, none written
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in norms:
            module.track_running_stats = True


# -------------------------------------------------------------------------------------------- attention

CHANNELS = 8  # of a value that is given to fused attention: what its kernels on a GPU are aligned to


def attention_layers(model: nn.Module) -> list[str]:
    """Module paths of the layers that ``attention`` can look at, in order of depth.

    A model that is not made of timm's ``Attention`` (ViT, DeiT) or ``WindowAttention`` (Swin) says itself where its
    maps are: ``model.attention_info`` is a list like ``feature_info``, and the input of each ``entry["module"]`` is
    the attention (B, heads, N, N) after the softmax. Raises ``ValueError`` for a model that has none.
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

    B images, N tokens: ``prefix`` tokens that are no patches, the class token first, then a grid of h x w patches.
    Everything is detached and at least in float32; nothing is computed before it is asked for.
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
    """What the attention layer ``block`` looked at in the last forward of the block, fused attention left on.

    Only the projection to queries and keys is kept, and what is asked for is computed from it: the class token's row
    costs next to nothing, all rows as much as the layer itself without fusion. A stage that was compiled runs
    uncompiled during the block when the layer lies in it. Raises ``ValueError`` for a model or block that cannot be
    looked at, and ``RuntimeError`` when the layer never ran::

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


def queries_and_keys(layer: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, heads, N, d), of timm's ``Attention``, from the output (B, N, 3 * heads * d) of its ``qkv``."""
    q, k, _ = qkv.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return layer.q_norm(q), layer.k_norm(k)


# -------------------------------------------------------------------------------------------- a frozen teacher


class Frozen(nn.Module):
    """A trained model that never changes: in evaluation mode whatever is called, without parameters to train.

    ``source``: the name of timm weights (``resnet18.tv_in1k``), ``hf-hub:owner/name``, a run folder, or a module, which
    is copied. Raises ``ValueError``, in one line, when its weights cannot be had.

    The model inside is hidden from torch's registration: it moves with ``.to()``, but optimiser, checkpoint,
    DistributedDataParallel, SyncBatchNorm's conversion and whatever resets BatchNorm statistics do not see it. A run
    that is resumed loads it again by its name. Gradient flows through it to its input, not to its weights.
    """

    def __init__(self, source: str | nn.Module):
        super().__init__()
        self.source = source if isinstance(source, str) else type(source).__name__
        model = pretrained(source) if isinstance(source, str) else copy.deepcopy(source)
        self.hidden = [model.eval().requires_grad_(False)]
        self.training = False

    @property
    def model(self) -> nn.Module:
        """The model itself, for ``forward_features`` and taps."""
        return self.hidden[0]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        """What the model makes of images."""
        return self.model(x)

    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same name may stand for others some day."""
        found = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            found.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Frozen":
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return repr(self.source)


def teachers(module: nn.Module) -> dict[str, str]:
    """The frozen models inside a module: source -> SHA-256 of the weights."""
    return {part.source: part.fingerprint() for part in module.modules() if isinstance(part, Frozen)}


def pretrained(name: str) -> nn.Module:
    """A trained model, by timm name, ``hf-hub:`` or ``local-dir:`` address, or folder. Raises ``NoWeights``.

    Of folders and repositories safetensors alone are read: see ``mixers.weights``.
    """
    folder = Path(name.removeprefix("local-dir:"))
    try:
        # initial weights are drawn before the trained ones are read
        with contextlib.nullcontext() if folder.is_dir() else asking_once(), torch.random.fork_rng(devices=[]):
            if weights.is_hub(name):
                return weights.load(weights.fetch(name), name)
            if folder.is_dir():
                return weights.load(folder, name)
            if ":" in name:
                raise NoWeights("neither a folder nor a kind of address known here")
            if "/" in name:
                raise NoWeights("no such folder")
            return timm.create_model(name, pretrained=True)
    except Exception as e:  # the Hub, timm and safetensors raise some twenty types between them
        raise NoWeights(
            f"no weights for the teacher {name!r} ({why(e)}); expected timm weights such as 'resnet18.tv_in1k', "
            "hf-hub:owner/name, or a run folder"
        ) from None


@contextmanager
def asking_once() -> Iterator[None]:
    """Ask once whether the Hub answers; if not, the block has what is in the cache, as with HF_HUB_OFFLINE.

    The Hub's client would ask six times for each file, for a minute in all, and print each time.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the client's HTTP library, which changes
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def why(error: Exception) -> str:
    """What kept weights from being loaded, in a few words."""
    if isinstance(error, LocalEntryNotFoundError):
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        if status is not None:
            return f"not on this machine, and the Hub answered {status}"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"not on this machine, and {offline}"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or does not show it without a token"
    words = " ".join(str(error).split()) or type(error).__name__
    return words.split(". ")[0].rstrip(".")[:160]
