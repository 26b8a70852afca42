"""The backbones of the published tables: sizes, stages that can be edited, a head that is linear, initial weights."""

import contextlib
import json
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixers import Step, Vanilla
from mixers.taps import edit, stages
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import create_model, load_model
from mixup_recipes.training.export import export
from mixup_recipes.training.optimisation import optimizer

# name: classes, parameters, {image size: multiply-adds in 10^9, products of attention included}
SIZES = {
    "resnet18": (1000, 11_689_512, {224: "1.81"}),
    "resnet34": (1000, 21_797_672, {224: "3.66"}),
    "resnet50": (1000, 25_557_032, {224: "4.09", 160: "2.09"}),
    "resnet101": (1000, 44_549_160, {224: "7.80"}),
    "resnext101_32x4d": (1000, 44_177_704, {224: "7.97"}),
    "tf_efficientnet_b0": (1000, 5_288_548, {224: "0.386", 160: "0.198"}),
    "mobilenetv2_100": (1000, 3_504_872, {224: "0.301", 160: "0.154"}),
    "deit_tiny_patch16_224": (1000, 5_717_416, {224: "1.25"}),
    "deit_small_patch16_224": (1000, 22_050_664, {224: "4.60"}),
    "deit_base_patch16_224": (1000, 86_567_656, {224: "17.56"}),
    "pvt_tiny": (1000, 13_229_288, {224: "1.93"}),
    "swin_tiny_patch4_window7_224": (1000, 28_288_354, {224: "4.491"}),
    "convnext_tiny": (1000, 28_589_128, {224: "4.46"}),
    "moganet_tiny": (1000, 5_197_332, {224: "1.083", 256: "1.415"}),
    "resnet18_cifar": (200, 11_271_432, {64: "2.222"}),
    "resnext50_32x4d_cifar": (200, 23_382_024, {64: "5.38"}),
    "wide_resnet28_8_cifar": (100, 23_409_092, {32: "3.36"}),
    "convnext_tiny_cifar": (100, 27_895_012, {32: "1.45"}),
    "pvt_small": (1000, 24_485_864, {224: "3.8"}),
}
VITS = [name for name in SIZES if name.startswith("deit")]
FIXED = [*VITS, "pvt_tiny", "pvt_small", "swin_tiny_patch4_window7_224"]  # made for images of one size


def reductions(name):
    """Stage -> side of the image over side of the map."""
    if name in VITS:
        return {f"blocks.{i}": 16 for i in range(12)}
    if name in ("tf_efficientnet_b0", "mobilenetv2_100"):
        return {"blocks.0": 2, "blocks.1": 4, "blocks.2": 8, "blocks.4": 16, "blocks.6": 32}
    if name.startswith("res"):
        return {f"layer{i}": 2 ** (i - 1) * (1 if name.endswith("_cifar") else 4) for i in (1, 2, 3, 4)}
    if name.endswith("_cifar"):
        return {f"stages.{i}": 2**i for i in range(3 if name.startswith("wide") else 4)}
    return {f"{'layers' if name.startswith('swin') else 'stages'}.{i}": 2 ** (i + 2) for i in range(4)}


def ours(name, **args):
    """For images of 64 pixels, 5 classes."""
    return timm.create_model(name, num_classes=5, **({"img_size": 64} if name in FIXED else {}), **args)


@pytest.fixture(scope="module")
def images():
    return torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


@pytest.mark.parametrize("name", SIZES)
def test_a_backbone_has_the_published_size_to_every_digit_stages_to_edit_and_a_linear_head(name, images):
    classes, parameters, operations = SIZES[name]
    expected, shapes = reductions(name), {}
    for size, digits in operations.items():
        with torch.device("meta"):  # without memory or arithmetic
            model = timm.create_model(name, num_classes=classes, **({"img_size": size} if name in FIXED else {})).eval()
            image = torch.empty(1, 3, size, size)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # two matrix products, which can be counted
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert stages(model) == list(expected)
        with contextlib.ExitStack() as stack, torch.no_grad(), FlopCounterMode(display=False) as counter:
            for stage in expected:
                look = lambda feature, stage=stage: shapes.update({stage: feature.shape}) or feature  # noqa: E731
                stack.enter_context(edit(model, stage, look))
            model(image)
        assert f"{counter.get_total_flops() / 2e9:.{len(digits.split('.')[1])}f}" == digits
        info = {x["module"]: x for x in getattr(model.feature_info, "info", model.feature_info)}
        assert {stage: info[stage]["reduction"] for stage in expected} == expected
        for stage, shape in shapes.items():
            channels, side = info[stage]["num_chs"], size // expected[stage]
            if name in VITS or (name[:3], stage) == ("pvt", "stages.3"):  # the class token, then the patches
                assert shape == (1, 1 + side**2, channels)
            else:
                assert shape == ((1, side, side, channels) if name.startswith("swin") else (1, channels, side, side))
        assert list(shapes) == list(expected)
    model = ours(name).eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        head = model.get_classifier()
        assert isinstance(head, nn.Linear) and features.shape == (2, model.num_features)
        torch.testing.assert_close(features @ head.weight.T + head.bias, model(images))


def deviation(weight):
    """Of a weight drawn around 0."""
    return weight.square().mean().sqrt().item()


# name: most groups of a convolution, last norm of a residual block, blocks of each stage
CONVNETS: dict[str, tuple] = {
    "resnet18": (1, "bn2", (2, 2, 2, 2)), "resnext50_32x4d_cifar": (32, "bn3", (3, 4, 6, 3)),
    "tf_efficientnet_b0": (1152, "", ()), "mobilenetv2_100": (960, "", ()), "wide_resnet28_8_cifar": (1, "", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVNETS)
def test_a_published_convnet_starts_kaiming_normal_by_all_output_channels_with_a_small_head(name):
    most_groups, last_norm, depths = CONVNETS[name]
    model = create_model(Recipe(model=name, num_classes=1000, init="mmcls_cnn"))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for m in convolutions:
        n, fan_out = m.weight.numel(), m.out_channels * math.prod(m.kernel_size)  # of a depth-wise one as well
        assert deviation(m.weight) == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * n))
        assert abs(m.weight.mean()) < 5 * math.sqrt(2 / (fan_out * n))
        assert m.bias is None or not m.bias.any()
    assert max(m.groups for m in convolutions) == most_groups
    head = model.get_classifier()
    assert deviation(head.weight) == pytest.approx(0.01, rel=0.01) and not head.bias.any()
    assert head.weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert head.weight.abs().max() > 0.03  # normal, not uniform
    zero = set()  # the last norm of a residual block; all others start at 1
    for key, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert not m.bias.any() and m.weight.unique().numel() == 1 and m.weight[0] in (0, 1)
            zero |= {key} if not m.weight.any() else set()
    assert zero == {f"layer{i}.{j}.{last_norm}" for i, depth in enumerate(depths, 1) for j in range(depth)}


@pytest.mark.parametrize(
    ("name", "layers", "others"),
    [
        ("deit_tiny_patch16_224", nn.Linear, {"cls_token": 1, "pos_embed": 1}),
        ("swin_tiny_patch4_window7_224", nn.Linear, {"relative_position_bias_table": 12}),
        ("convnext_tiny", nn.Linear | nn.Conv2d, {}),
        ("convnext_tiny_cifar", nn.Linear | nn.Conv2d, {}),
    ],
)
def test_the_weights_of_a_published_transformer_or_convnext_start_from_a_normal_of_0_02(name, layers, others):
    model = create_model(Recipe(model=name, num_classes=1000, init="mmcls_vit" if name in VITS else "timm"))
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
        elif isinstance(m, layers) and m.bias is not None:
            assert not m.bias.any()
    drawn = [m.weight for m in model.modules() if isinstance(m, layers)]
    for key, count in others.items():
        found = [p for k, p in model.named_parameters() if k.endswith(key)]
        assert len(found) == count
        drawn += found
    for p in drawn:  # one in 2^24 of timm's truncated normal is -2
        assert deviation(p.clamp(-0.2, 0.2)) == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel()))
    scales = [p for k, p in model.named_parameters() if k.endswith("gamma")]
    assert len(scales) == (18 if name.startswith("convnext") else 0) and all((p == 1e-6).all() for p in scales)


OURS = pytest.mark.parametrize("name", ["pvt_tiny", "moganet_tiny"])


def test_wide_resnet_is_its_formula_and_its_intermediates_are_its_stages(images):
    model = ours("wide_resnet28_8_cifar", depth=2, widths=(8, 8, 12)).eval()
    weights = {k: v + 0.1 * (v.ndim == 1) for k, v in model.state_dict().items()}  # nothing stays at its start
    model.load_state_dict(weights)

    def layer(x, key, **args):
        return torch.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], **args)

    def active(x, key):
        mean, var = (weights[f"{key}.running_{k}"][:, None, None] for k in ("mean", "var"))
        scale, shift = (weights[f"{key}.{k}"][:, None, None] for k in ("weight", "bias"))
        x = (x - mean) / (var + 0.001).sqrt() * scale + shift
        return torch.where(x > 0, x, 0.1 * x)

    x, maps = layer(images, "stem", padding=1), []
    for stage in range(3):
        for block, key in enumerate(f"stages.{stage}.{i}" for i in range(2)):
            a = active(x, f"{key}.norm1")
            inner = layer(a, f"{key}.conv1", padding=1, stride=2 if stage and not block else 1)
            if f"{key}.shortcut.weight" in weights:  # of the first block of all, behind the activation
                x = layer(a if stage == 0 else x, f"{key}.shortcut", stride=2 if stage else 1)
            x = x + layer(active(inner, f"{key}.norm2"), f"{key}.conv2", padding=1)
        maps.append(x)
    last = active(x, "norm")
    logits = last.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits)
        final, found = model.forward_intermediates(images)
        normed = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close([final, *found, *normed], [last, *maps, last])
        early, (second,) = model.forward_intermediates(images, indices=[1], stop_early=True)
        assert torch.equal(early, second)
    assert all(m.momentum == 0.001 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@OURS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside transformers
def test_an_exported_model_is_loaded_by_timm_and_transformers_with_the_same_logits(name, images, tmp_path):
    from transformers import AutoModelForImageClassification

    recipe = Recipe(name="x", model=name, num_classes=5, drop_path_rate=0.3, eval_size=64, eval_resize=73)
    model = ours(name, drop_path_rate=0.3)
    with torch.no_grad():  # nothing, BatchNorm's statistics included, stays at its start
        for p in model.parameters():
            p.mul_(1.1).add_(0.01 * (p.ndim == 1))
        model(images)
    model.eval()
    export(model, tmp_path, recipe, list("abcde"))
    with torch.no_grad():
        logits = model(images)
        for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), load_model(str(tmp_path))):
            torch.testing.assert_close(again.eval()(images), logits, rtol=0, atol=0)
        other = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(other(images).logits, logits, rtol=0, atol=0)
        assert logits.std() > 1e-3
    assert list(other.config.id2label.values()) == list("abcde")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["pretrained_cfg"]["input_size"]) == (name, [3, 64, 64])


@OURS
def test_intermediates_are_what_the_stages_return_as_maps(name, images):
    model = ours(name).eval()
    ran = {}
    for stage in stages(model):
        model.get_submodule(stage).register_forward_hook(lambda *a, stage=stage: ran.update({stage: a[2]}))
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        (first,) = model.forward_intermediates(images, indices=[-4], intermediates_only=True)
    assert torch.equal(last, maps[3]) and torch.equal(first, maps[0])
    for stage, found, info in zip(stages(model), maps, model.feature_info, strict=True):
        assert found.shape[1:] == (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
        seen = ran[stage]
        if seen.ndim == 3:  # the class token and then the patches, row by row
            seen = torch.stack([seen[:, 1 + 2 * row : 3 + 2 * row] for row in range(2)], 1).permute(0, 3, 1, 2)
        assert torch.equal(found, seen)
    ran.clear()
    model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert list(ran) == ["stages.0", "stages.1"]
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got NHWC"):
        model.forward_intermediates(images, output_fmt="NHWC")


SIDES: dict[str, tuple] = dict.fromkeys(("pvt_tiny", "moganet_tiny"), ((1, 3), [8, 2]))
SIDES |= dict.fromkeys(("resnet18_cifar", "resnext50_32x4d_cifar"), ((0, 1, 2, 3, 4), [64, 64, 32, 16, 8]))
SIDES |= {"wide_resnet28_8_cifar": ((0, 2), [64, 16]), "convnext_tiny_cifar": ((0, 1, 2, 3), [64, 32, 16, 8])}


@pytest.mark.parametrize("name", SIDES)
def test_features_only_gives_the_maps_of_the_chosen_stages(name, images):
    chosen, sides = SIDES[name]
    model = ours(name, features_only=True, out_indices=chosen).eval()
    assert model.feature_info.reduction() == [64 // side for side in sides]
    with torch.no_grad():
        shapes = [f.shape[1:] for f in model(images)]
    assert shapes == [(c, side, side) for c, side in zip(model.feature_info.channels(), sides, strict=True)]


@OURS
def test_it_learns_and_decays_the_right_weights_and_drops_paths_and_its_classifier_can_be_replaced(name, images):
    model = ours(name)
    recipe = Recipe(model=name, num_classes=5, weight_decay=0.05, opt="adamw")
    groups = optimizer(Step(model, Vanilla(), nn.CrossEntropyLoss(reduction="none")), recipe).param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        model.reset_classifier(3)
        assert model.num_classes == 3 and model(images).shape == (2, 3)
        model.reset_classifier(0)
        assert torch.equal(model(images), features)
    assert timm.create_model(name, num_classes=0).num_classes == 0
    assert all(isinstance(b.drop_path, nn.Identity) for s in model.stages for b in list(s.children())[1])
    dropping = ours(name, drop_path_rate=0.1).stages
    first, *blocks = [b for stage in dropping for b in (stage.layers if name == "pvt_tiny" else stage.blocks)]
    last = {"pvt_tiny": 7, "moganet_tiny": 19}[name]
    assert isinstance(first.drop_path, nn.Identity)
    assert [b.drop_path.drop_prob for b in blocks] == pytest.approx([0.1 * i / last for i in range(1, last + 1)])
