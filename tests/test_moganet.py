"""MogaNet-Tiny: every formula against a slow one in double precision, stages, drop path, and the published start."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mixup_recipes.training.backbones.moganet import FFN, Block, Moga, MultiOrder

# --------------------------------------------------------------------------------------------- slow and obvious


def gelu(v: np.ndarray) -> np.ndarray:
    return 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2)))


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def pointwise(x: np.ndarray, m: nn.Conv2d) -> np.ndarray:
    """1 x 1 convolution of maps (B, C, H, W)."""
    w, b = m.weight.detach().numpy()[:, :, 0, 0], m.bias.detach().numpy()
    return np.einsum("oc,bchw->bohw", w, x) + b[:, None, None]


def depthwise(x: np.ndarray, m: nn.Conv2d, dilation: int) -> np.ndarray:
    """Every channel by its own kernel, zeros outside."""
    w, b = m.weight.detach().numpy()[:, 0], m.bias.detach().numpy()
    (_, channels, height, width), k = x.shape, w.shape[-1]
    out = np.zeros_like(x)
    for c, i, j in np.ndindex(channels, height, width):
        out[:, c, i, j] = b[c]
        for p, q in np.ndindex(k, k):
            row, column = i + dilation * (p - k // 2), j + dilation * (q - k // 2)
            if 0 <= row < height and 0 <= column < width:
                out[:, c, i, j] += w[c, p, q] * x[:, c, row, column]
    return out


def norm(x: np.ndarray, m: nn.BatchNorm2d) -> np.ndarray:
    """BatchNorm in evaluation."""
    mean, variance, weight, bias = (
        t.detach().numpy()[:, None, None] for t in (m.running_mean, m.running_var, m.weight, m.bias)
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def multi_order(x: np.ndarray, m: MultiOrder) -> np.ndarray:
    v = depthwise(x, m.near, 1)
    a, b = v.shape[1] // 8, v.shape[1] // 2
    parts = [v[:, :a], depthwise(v[:, a:b], m.middle, 2), depthwise(v[:, b:], m.far, 3)]
    return pointwise(np.concatenate(parts, axis=1), m.project)


def moga(x: np.ndarray, m: Moga) -> np.ndarray:
    u = pointwise(x, m.expand)
    s = m.detail_scale.detach().numpy()
    z = silu(u + s * (u - u.mean(axis=(2, 3), keepdims=True)))
    return x + pointwise(silu(pointwise(z, m.gate)) * silu(multi_order(z, m.value)), m.project)


def ffn(x: np.ndarray, m: FFN) -> np.ndarray:
    h = gelu(depthwise(pointwise(x, m.expand), m.depthwise, 1))
    t = m.detail_scale.detach().numpy()
    return pointwise(h + t * (h - gelu(pointwise(h, m.common))), m.project)


def block(x: np.ndarray, m: Block) -> np.ndarray:
    a, b = m.layer_scale1.detach().numpy(), m.layer_scale2.detach().numpy()
    x = x + a * moga(norm(x, m.norm1), m.moga)
    return x + b * ffn(norm(x, m.norm2), m.ffn)


# --------------------------------------------------------------------------------------------- formulas


def drawn(module: nn.Module) -> nn.Module:
    """All weights and statistics of order 1, in double precision: no scale is nearly off."""
    torch.manual_seed(0)
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.2, 1.2) if t.ndim == 1 else t.data.normal_(std=0.5)
    return module.double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        (MultiOrder(8), multi_order),
        (Moga(8, gate_fp32=False), moga),
        (FFN(8, 24), ffn),
        (Block(8, 3, drop_path=0.0, gate_fp32=False), block),
    ],
    ids=["depth-wise convolutions of three ranges", "gated aggregation", "channel aggregation", "block"],
)
def test_a_part_computes_its_formula(module: nn.Module, slow, x: Tensor) -> None:
    with torch.no_grad():
        found = drawn(module)(x)
    torch.testing.assert_close(found, torch.from_numpy(slow(x.numpy(), module)))


@pytest.mark.parametrize("gate_fp32", [True, False])
def test_the_gate_is_taken_in_single_precision_under_autocast_if_asked(gate_fp32: bool, x: Tensor) -> None:
    module = drawn(Moga(8, gate_fp32)).float()
    seen: dict[str, Tensor] = {}
    for name in ("gate", "value"):
        module.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
    module.project.register_forward_pre_hook(lambda _, args: seen.update(product=args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(x.float())
    assert {t.dtype for t in seen.values()} == {torch.bfloat16}  # what the convolutions around it see
    gate, value = seen["gate"].double().numpy(), seen["value"].double().numpy()
    exact = torch.from_numpy(silu(gate) * silu(value))
    error = ((seen["product"].double() - exact).abs() / exact.abs().clamp(min=1e-6)).max()
    rounded_once = 2**-8  # bfloat16 keeps 8 bits
    assert error <= 1.01 * rounded_once if gate_fp32 else error > 1.5 * rounded_once


# --------------------------------------------------------------------------------------------- the whole


def test_a_stage_ends_with_batchnorm() -> None:
    model = timm.create_model("moganet_tiny", num_classes=5)
    for feature in model.forward_intermediates(torch.randn(2, 3, 128, 128), intermediates_only=True):
        torch.testing.assert_close(feature.mean((0, 2, 3)), torch.zeros(feature.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            feature.var((0, 2, 3), correction=0), torch.ones(feature.shape[1]), rtol=0, atol=1e-2
        )


@pytest.mark.parametrize("size", [224, 64])
def test_the_stages_have_the_published_depth_width_and_stride(size: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("moganet_tiny").eval()
        features = model.forward_intermediates(torch.empty(2, 3, size, size), intermediates_only=True)
        logits = model(torch.empty(2, 3, size, size))
    assert [len(stage.blocks) for stage in model.stages] == [3, 3, 12, 2]
    widths, strides = (32, 64, 128, 256), (4, 8, 16, 32)
    assert [f.shape for f in features] == [(2, w, size // s, size // s) for w, s in zip(widths, strides, strict=True)]
    assert [stage.blocks[0].ffn.expand.out_channels for stage in model.stages] == [256, 512, 512, 1024]
    assert logits.shape == (2, 1000)


def test_it_starts_from_normals_by_the_fan_out_of_a_group() -> None:
    torch.manual_seed(0)
    model = timm.create_model("moganet_tiny")
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            outputs = 1 if m.groups > 1 else m.out_channels  # that one input reaches, per tap of the kernel
            expected = math.sqrt(2 / (outputs * m.kernel_size[0] ** 2))
            assert m.weight.square().mean().sqrt().item() == pytest.approx(
                expected, rel=5 / math.sqrt(2 * m.weight.numel())
            )
            assert not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not model.head.bias.any()
    for name in model.no_weight_decay():
        assert (model.get_parameter(name) == 1e-5).all()
    assert len(model.no_weight_decay()) == 4 * 20
