"""MogaNet-Tiny: every formula against a slow one in double precision, stages, drop path, and the published start."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mixup_recipes.training.backbones.moganet import FFN, Block, Moga, MultiOrder

# Slow and obvious: ``x`` are maps (B, C, H, W).


def arrays(*tensors):
    return [t.detach().numpy() for t in tensors]


def gelu(v):
    return 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2)))


def silu(v):
    return v / (1 + np.exp(-v))


def pointwise(x, m):
    w, b = arrays(m.weight[:, :, 0, 0], m.bias[:, None, None])
    return np.einsum("oc,bchw->bohw", w, x) + b


def depthwise(x, m, dilation):
    """Every channel by its own kernel, zeros outside."""
    w, b = arrays(m.weight[:, 0], m.bias)
    out = np.zeros_like(x)
    for c, i, j in np.ndindex(x.shape[1:]):
        out[:, c, i, j] = b[c]
        for p, q in np.ndindex(w.shape[1:]):
            row, column = i + dilation * (p - w.shape[1] // 2), j + dilation * (q - w.shape[2] // 2)
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                out[:, c, i, j] += w[c, p, q] * x[:, c, row, column]
    return out


def norm(x, m):
    """BatchNorm in evaluation."""
    mean, variance, weight, bias = (t[:, None, None] for t in arrays(m.running_mean, m.running_var, m.weight, m.bias))
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def multi_order(x, m):
    v = depthwise(x, m.near, 1)
    a, b = v.shape[1] // 8, v.shape[1] // 2
    parts = [v[:, :a], depthwise(v[:, a:b], m.middle, 2), depthwise(v[:, b:], m.far, 3)]
    return pointwise(np.concatenate(parts, axis=1), m.project)


def moga(x, m):
    u, (s,) = pointwise(x, m.expand), arrays(m.detail_scale)
    z = silu(u + s * (u - u.mean(axis=(2, 3), keepdims=True)))
    return x + pointwise(silu(pointwise(z, m.gate)) * silu(multi_order(z, m.value)), m.project)


def ffn(x, m):
    h, (t,) = gelu(depthwise(pointwise(x, m.expand), m.depthwise, 1)), arrays(m.detail_scale)
    return pointwise(h + t * (h - gelu(pointwise(h, m.common))), m.project)


def block(x, m):
    a, b = arrays(m.layer_scale1, m.layer_scale2)
    x = x + a * moga(norm(x, m.norm1), m.moga)
    return x + b * ffn(norm(x, m.norm2), m.ffn)


def drawn(module):
    """All weights and statistics of order 1, in double precision: no scale is nearly off."""
    torch.manual_seed(0)
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.2, 1.2) if t.ndim == 1 else t.data.normal_(std=0.5)
    return module.double().eval()


X = torch.randn(2, 8, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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
def test_a_part_computes_its_formula(module, slow):
    with torch.no_grad():
        torch.testing.assert_close(drawn(module)(X), torch.from_numpy(slow(X.numpy(), module)))


@pytest.mark.parametrize("gate_fp32", [True, False])
def test_the_gate_is_taken_in_single_precision_under_autocast_if_asked(gate_fp32):
    module, seen = drawn(Moga(8, gate_fp32)).float(), {}
    for name in ("gate", "value"):
        module.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
    module.project.register_forward_pre_hook(lambda _, args: seen.update(product=args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(X.float())
    assert {t.dtype for t in seen.values()} == {torch.bfloat16}  # what the convolutions around it see
    gate, value = arrays(seen["gate"].double(), seen["value"].double())
    exact = torch.from_numpy(silu(gate) * silu(value))
    error = ((seen["product"].double() - exact).abs() / exact.abs().clamp(min=1e-6)).max()
    rounded_once = 2**-8  # bfloat16 keeps 8 bits
    assert error <= 1.01 * rounded_once if gate_fp32 else error > 1.5 * rounded_once


def test_the_stages_have_the_published_depth_width_and_stride_and_end_with_batchnorm():
    model = timm.create_model("moganet_tiny", num_classes=5)
    assert [len(stage.blocks) for stage in model.stages] == [3, 3, 12, 2]
    assert [stage.blocks[0].ffn.expand.out_channels for stage in model.stages] == [256, 512, 512, 1024]
    for feature in model.forward_intermediates(torch.randn(2, 3, 128, 128), intermediates_only=True):
        zeros, ones = torch.zeros(feature.shape[1]), torch.ones(feature.shape[1])
        torch.testing.assert_close(feature.mean((0, 2, 3)), zeros, rtol=0, atol=1e-5)
        torch.testing.assert_close(feature.var((0, 2, 3), correction=0), ones, rtol=0, atol=1e-2)
    with torch.device("meta"):
        model = timm.create_model("moganet_tiny").eval()
        for size in (224, 64):
            features = model.forward_intermediates(torch.empty(2, 3, size, size), intermediates_only=True)
            assert [f.shape for f in features] == [
                (2, 32 * 2**i, size // 2**i // 4, size // 2**i // 4) for i in range(4)
            ]
            assert model(torch.empty(2, 3, size, size)).shape == (2, 1000)


def test_it_starts_from_normals_by_the_fan_out_of_a_group():
    torch.manual_seed(0)
    model = timm.create_model("moganet_tiny")
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            outputs = 1 if m.groups > 1 else m.out_channels  # that one input reaches, per tap of the kernel
            expected, close = math.sqrt(2 / (outputs * m.kernel_size[0] ** 2)), 5 / math.sqrt(2 * m.weight.numel())
            assert m.weight.square().mean().sqrt().item() == pytest.approx(expected, rel=close) and not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and not m.bias.any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.01) and not model.head.bias.any()
    scales = [model.get_parameter(name) for name in model.no_weight_decay()]
    assert len(scales) == 4 * 20 and all((scale == 1e-5).all() for scale in scales)
