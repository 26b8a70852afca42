"""Models: published sizes, formulas of our own, initial weights, what mixers tap, and readable errors."""

import dataclasses
import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mixers.taps import compile_stages
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.backbones import check_input, create_model, weight_bytes
from mixup_recipes.training.backbones.moganet import FFN, Block, Moga, MultiOrder
from mixup_recipes.typed import UserError


def create(model="test_resnet", **changes):
    return create_model(Recipe(model=model, num_classes=5, **changes))


def test_a_setting_has_a_model_of_the_published_size_and_small_image_resnets_differ_in_the_stem_only():
    with torch.device("meta"):
        for name, size in (("r50_100e", 25_557_032), ("deit_s", 22_050_664), ("cifar10_r18_200e", 11_173_962)):
            model = create_model(dataclasses.replace(load_recipe(name), init="timm"))
            assert sum(p.numel() for p in model.parameters()) == size, name
        for name in ("resnet18", "resnext50_32x4d"):
            theirs = timm.create_model(name, num_classes=5).state_dict()
            ours = timm.create_model(f"{name}_cifar", num_classes=5).state_dict()
            assert list(ours) == list(theirs) and ours["conv1.weight"].shape == (64, 3, 3, 3)
            assert [k for k in ours if ours[k].shape != theirs[k].shape] == ["conv1.weight"]
    assert weight_bytes(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))) == 4 * (6 + 2 + 2 + 2 + 2 + 2) + 8


def test_initial_weights_are_a_function_of_the_seed():
    first = create().state_dict()
    torch.manual_seed(99)
    again, other = create().state_dict(), create(seed=1).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize(("name", "init"), [("test_resnet", "mmcls_cnn"), ("test_vit", "mmcls_vit")])
def test_the_published_start_changes_convolutions_and_head_or_token_and_head(name, init):
    ours, theirs = create(name, init=init), create(name, init="timm")
    before = theirs.state_dict()
    changed = {k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])}
    if init == "mmcls_cnn":
        assert theirs.fc.weight.abs().max() <= theirs.num_features**-0.5  # uniform
        expected = {f"{k}.weight" for k, m in ours.named_modules() if isinstance(m, nn.Conv2d)} | {"fc.weight"}
        assert changed == expected | {"fc.bias"}
    else:
        assert changed == {"head.weight", "cls_token"} and theirs.cls_token.std() < 1e-4


def test_arguments_reach_the_model():
    model = create("test_vit", model_args={"img_size": 32}, drop_path_rate=0.5)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.5)
    assert "DropPath" not in {type(m).__name__ for m in create("test_vit", drop_path_rate=0.0).modules()}


ODD = "ValueError: img_size must be square and a multiple of 32, got"


@pytest.mark.parametrize(
    ("model", "args", "says"),
    [
        ("resnet51", {}, "unknown model 'resnet51'; did you mean 'resnet"),
        ("resnet18_cifr", {}, "unknown model 'resnet18_cifr'; did you mean 'resnet18_cifar'?"),
        ("zzzzzz", {}, "unknown model 'zzzzzz'; none of the "),
        ("test_resnet", {"img_sise": 64}, ": "),
        ("test_vit", {"img_size": "big"}, ": "),
        ("test_resnet", {"num_classes": 7}, ": "),
        ("test_resnet", {"block": "x"}, ": AttributeError: "),
        ("test_resnet", {"checkpoint_path": "/no"}, ": FileNot"),
        ("pvt_tiny", {"img_size": 64.0}, ": Strict"),
        ("pvt_tiny", {"img_size": 60}, f": {ODD} 60 x 60"),
        ("pvt_tiny", {"img_size": (64, 96)}, f": {ODD} 64 x 96"),
        ("test_resnet", {"features_only": True}, " is not a classifier of 5 classes"),
        ("test_resnet", {"init": "mmcls_vit"}, "init mmcls_vit needs a model with a class token, such as deit_small"),
    ],
)
def test_a_model_that_cannot_be_made_is_explained(model, args, says):
    given = args if "init" in args else {"model_args": args}
    with pytest.raises(UserError) as caught:
        create(model, **given)
    message = str(caught.value)
    expected = f"model {model!r} with {args}{says}" if says[0] in " :" else says
    assert message.startswith(expected) and "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("args", "fits", "wrong", "says"),
    [
        ({"img_size": 160, "dynamic_img_size": False}, 160, 64, "64 x 64: .*models want --model_args.img_size 64"),
        ({}, 64, 50, "50 x 50: .*models want --model_args.img_size 50"),
        ({"img_size": 64}, 64, 50, "50 x 50: .*models want .*img_size 50"),
    ],
)
def test_a_model_refuses_images_of_a_size_it_cannot_take(args, fits, wrong, says):
    model = create("test_vit", model_args=args)
    check_input(model, 2, fits, "test_vit", training=False)
    with pytest.raises(UserError, match=rf"^model 'test_vit' does not take 2 images of {says}\)$"):
        check_input(model, 2, wrong, "test_vit", training=False)


def test_a_model_without_logits_is_refused():
    model = create("test_vit", model_args={"img_size": 32, "global_pool": ""})  # 4 patches, 1 token
    with pytest.raises(UserError, match=r"^model 'test_vit' gives \(2, 5, 5\) and not logits \(2, 5\);"):
        check_input(model, 2, 32, "test_vit", training=False)


def test_checking_the_input_leaves_the_model_as_it_was_also_where_batchnorm_would_see_one_value():
    model = create()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="does not take 1 image of 32 x 32 in training: Expected more than 1 value"):
        check_input(model, 1, 32, "test_resnet", training=True)
    check_input(model, 1, 32, "test_resnet", training=False)
    for size in (32, 33, 64):
        check_input(model, 2, size, "test_resnet", training=True)
    assert model.training
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in model.state_dict().items())


# MogaNet-Tiny. Slow and obvious formulas: ``x`` are maps (B, C, H, W).


def gelu(v):
    return 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))


def silu(v):
    return v / (1 + torch.exp(-v))


def pointwise(x, m):
    return torch.einsum("oc,bchw->bohw", m.weight[:, :, 0, 0], x) + m.bias[:, None, None]


def depthwise(x, m, dilation):
    """Every channel by its own kernel, zeros outside."""
    (height, width), k = x.shape[2:], m.weight.shape[-1]
    out, padded = m.bias[:, None, None].expand_as(x), F.pad(x, [dilation * (k // 2)] * 4)
    for p, q in np.ndindex(k, k):
        i, j = dilation * p, dilation * q
        out = out + m.weight[:, 0, p, q, None, None] * padded[:, :, i : i + height, j : j + width]
    return out


def norm(x, m):
    """BatchNorm in evaluation."""
    mean, variance, weight, bias = (t[:, None, None] for t in (m.running_mean, m.running_var, m.weight, m.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def multi_order(x, m):
    v = depthwise(x, m.near, 1)
    a, b = v.shape[1] // 8, v.shape[1] // 2
    parts = [v[:, :a], depthwise(v[:, a:b], m.middle, 2), depthwise(v[:, b:], m.far, 3)]
    return pointwise(torch.cat(parts, 1), m.project)


def moga(x, m):
    u = pointwise(x, m.expand)
    z = silu(u + m.detail_scale * (u - u.mean((2, 3), keepdim=True)))
    return x + pointwise(silu(pointwise(z, m.gate)) * silu(multi_order(z, m.value)), m.project)


def ffn(x, m):
    h = gelu(depthwise(pointwise(x, m.expand), m.depthwise, 1))
    return pointwise(h + m.detail_scale * (h - gelu(pointwise(h, m.common))), m.project)


def block(x, m):
    x = x + m.layer_scale1 * moga(norm(x, m.norm1), m.moga)
    return x + m.layer_scale2 * ffn(norm(x, m.norm2), m.ffn)


def drawn(module):
    """All weights and statistics of order 1, in double precision: no scale is nearly off."""
    torch.manual_seed(0)
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.2, 1.2) if t.ndim == 1 else t.data.normal_(std=0.5)
    return module.double().eval()


X = torch.randn(2, 8, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


PARTS = {
    "depth-wise convolutions of three ranges": (MultiOrder(8), multi_order),
    "gated aggregation": (Moga(8, gate_fp32=False), moga),
    "channel aggregation": (FFN(8, 24), ffn),
    "block": (Block(8, 3, drop_path=0.0, gate_fp32=False), block),
}


@pytest.mark.parametrize(("module", "slow"), PARTS.values(), ids=PARTS)
def test_a_part_computes_its_formula(module, slow):
    with torch.no_grad():
        torch.testing.assert_close(drawn(module)(X), slow(X, module))


@pytest.mark.parametrize("gate_fp32", [True, False])
def test_the_gate_is_taken_in_single_precision_under_autocast_if_asked(gate_fp32):
    module, seen = drawn(Moga(8, gate_fp32)).float(), {}
    for name in ("gate", "value"):
        module.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.update({name: a[2]}))
    module.project.register_forward_pre_hook(lambda _, args: seen.update(product=args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(X.float())
    assert {t.dtype for t in seen.values()} == {torch.bfloat16}  # what the convolutions around it see
    exact = silu(seen["gate"].double()) * silu(seen["value"].double())
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
            assert [f.shape[1:] for f in features] == [(32 * 2**i, *[size // 4 // 2**i] * 2) for i in range(4)]
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


# PVT-Tiny

IMAGES = torch.linspace(-3, 3, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


def both(size=64, **config):
    """The model of transformers with 5 classes, and ours with its weights."""
    from transformers import PvtConfig, PvtForImageClassification

    theirs = PvtForImageClassification(PvtConfig(image_size=size, num_labels=5, **config)).eval()
    ours = timm.create_model("pvt_tiny", num_classes=5, img_size=size).eval()
    weights = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("classifier.", "head.").replace("pvt.encoder.layer_norm.", "norm.")
        key = re.sub(r"^pvt\.encoder\.patch_embeddings\.(\d)", r"stages.\1.embed", key)
        weights[re.sub(r"^pvt\.encoder\.block\.(\d)", r"stages.\1.layers", key)] = value
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("size", [64, 224])
def test_logits_are_those_of_transformers(size):
    images = IMAGES if size == 64 else IMAGES.repeat(1, 1, 4, 4)[:1, :, :224, :224] + torch.linspace(0, 1, 224)
    theirs, ours = both(size)
    for training in (False, True):
        with torch.no_grad():
            expected = theirs.train(training)(images).logits
            assert expected.std() > 1e-3
            torch.testing.assert_close(ours.train(training)(images), expected, rtol=0, atol=1e-5)


def test_the_dropout_of_a_layer_sees_its_attention_and_compiled_stages_compute_the_same():
    """What mixers that cut by attention hook. Stages are compiled whole, with the layers of transformers in them."""
    theirs, ours = both(attn_implementation="eager")
    maps = []
    module = ours.get_submodule("stages.3.layers.1.attention.self.dropout")
    hook = module.register_forward_hook(lambda _module, _args, output: maps.append(output))
    with torch.no_grad():
        plain = ours(IMAGES)
        expected = theirs(IMAGES, output_attentions=True, return_dict=True).attentions[-1]
        assert maps[0].shape == (2, 8, 5, 5)  # 8 heads, the class token and 2 x 2 patches
        torch.testing.assert_close(maps[0], expected)
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 8, 5))
        hook.remove()
        compile_stages(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(ours(IMAGES), plain)


def test_a_published_pvt_starts_convolutions_as_torch_and_all_else_from_a_normal_of_0_02():
    model = create_model(Recipe(model="pvt_tiny", num_classes=200))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # uniform within 1 / sqrt(fan-in), in torch
            bound = (m.in_channels * math.prod(m.kernel_size)) ** -0.5
            assert 0.99 * bound < m.weight.abs().max() <= bound and m.bias.any()
        elif isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert m.weight.abs().max() > 0.06 and not m.bias.any()
        elif isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
    assert len(model.no_weight_decay()) == 5  # one class token, position embeddings of four stages
    for p in map(model.get_parameter, model.no_weight_decay()):
        assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel()))


def test_images_of_another_size_are_refused_with_both_sizes():
    model = timm.create_model("pvt_tiny", num_classes=5, img_size=64)
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="made for 64 x 64, got 64 x 96"):
            run(torch.zeros(1, 3, 64, 96))
