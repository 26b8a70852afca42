"""Models: sizes of the published runs, features where they are said to be, initial weights, and readable errors."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.backbones import check_input, create_model, weight_bytes
from mixup_recipes.typed import UserError


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"model": "test_resnet", "num_classes": 5} | changes))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def complaint(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        create_model(recipe(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet18_cifar", 10, 11_173_962),
        ("resnet18_cifar", 200, 11_271_432),
        ("resnext50_32x4d_cifar", 200, 23_382_024),
    ],
)
def test_small_image_resnets_have_the_published_size(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(timm.create_model(name, num_classes=classes)) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("r50_100e", 25_557_032), ("deit_s", 22_050_664), ("cifar10_r18_200e", 11_173_962)],
)
def test_a_setting_has_a_model_of_the_published_size(name: str, parameters: int) -> None:
    r = dataclasses.replace(load_recipe(name), init="timm")
    with torch.device("meta"):
        assert count(create_model(r)) == parameters


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnext50_32x4d_cifar"])
def test_small_image_resnets_have_features_where_they_say(name: str) -> None:
    model = timm.create_model(name, num_classes=5, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.zeros(1, 3, 32, 32))
    assert [32 // f.shape[-1] for f in features] == model.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [f.shape[1] for f in features] == model.feature_info.channels()


def test_small_image_resnets_differ_from_those_of_timm_in_the_stem_only() -> None:
    for name in ("resnet18", "resnext50_32x4d"):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=5).state_dict()
            ours = timm.create_model(f"{name}_cifar", num_classes=5).state_dict()
        assert list(ours) == list(theirs)
        assert [k for k in ours if ours[k].shape != theirs[k].shape] == ["conv1.weight"]
        assert ours["conv1.weight"].shape == (64, 3, 3, 3)


# --------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first = create_model(recipe()).state_dict()
    torch.manual_seed(99)
    again = create_model(recipe()).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = create_model(recipe(seed=1)).state_dict()
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_head_of_a_published_resnet_starts_small() -> None:
    head = create_model(recipe(model="resnet18_cifar", num_classes=200, init="mmcls_cnn")).get_classifier()
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert head.weight.abs().max() > 0.03  # normal, not uniform
    assert not head.bias.any()
    uniform = create_model(recipe(model="resnet18_cifar", num_classes=200)).get_classifier()
    assert uniform.weight.abs().max() <= 512**-0.5


def test_the_token_and_head_of_a_published_transformer_start_from_a_normal_of_0_02() -> None:
    model = create_model(recipe(model="test_vit", num_classes=200, init="mmcls_vit"))
    for weight in (model.cls_token, model.get_classifier().weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.get_classifier().bias.any()
    assert create_model(recipe(model="test_vit")).cls_token.std() < 1e-4


def test_the_start_of_a_transformer_needs_a_class_token() -> None:
    with pytest.raises(UserError, match="needs a model with a class token"):
        create_model(recipe(model="test_resnet", init="mmcls_vit"))


@pytest.mark.parametrize(("name", "init"), [("test_resnet", "mmcls_cnn"), ("test_vit", "mmcls_vit")])
def test_the_published_start_changes_convolutions_and_head_or_token_and_head(name: str, init: str) -> None:
    ours, theirs = (create_model(recipe(model=name, init=i)) for i in (init, "timm"))
    before = theirs.state_dict()
    changed = {k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])}
    if init == "mmcls_cnn":
        expected = {f"{k}.weight" for k, m in ours.named_modules() if isinstance(m, nn.Conv2d)} | {"fc.weight"}
        assert changed == expected | {"fc.bias"}
    else:
        assert changed == {"head.weight", "cls_token"}


# --------------------------------------------------------------------------------------------- arguments and errors


def test_arguments_reach_the_model() -> None:
    model = create_model(recipe(model="test_vit", model_args={"img_size": 32}, drop_path_rate=0.5))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates and max(rates) == pytest.approx(0.5)
    plain = create_model(recipe(model="test_vit", drop_path_rate=0.0))
    assert not [m for m in plain.modules() if type(m).__name__ == "DropPath"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet51"}, "unknown model 'resnet51'; did you mean 'resnet"),
        ({"model": "resnet18_cifr"}, "unknown model 'resnet18_cifr'; did you mean 'resnet18_cifar'?"),
        ({"model": "zzzzzz"}, "unknown model 'zzzzzz'; none of the "),
        ({"model_args": {"img_sise": 64}}, "model 'test_resnet' with {'img_sise': 64}: "),
        ({"model": "test_vit", "model_args": {"img_size": "big"}}, "model 'test_vit' with {'img_size': 'big'}: "),
        ({"model_args": {"num_classes": 7}}, "model 'test_resnet' with {'num_classes': 7}: "),
        ({"model_args": {"block": "x"}}, "model 'test_resnet' with {'block': 'x'}: AttributeError: "),
        (
            {"model_args": {"checkpoint_path": "/no"}},
            "model 'test_resnet' with {'checkpoint_path': '/no'}: FileNotFound",
        ),
        ({"model": "pvt_tiny", "model_args": {"img_size": 64.0}}, "model 'pvt_tiny' with {'img_size': 64.0}: Strict"),
        (
            {"model_args": {"features_only": True}},
            "model 'test_resnet' with {'features_only': True} is no classifier of 5",
        ),
    ],
)
def test_a_model_that_cannot_be_made_is_explained(changes: dict, says: str) -> None:
    message = complaint(**changes)
    assert message.startswith(says)
    assert len(message) < 600


def test_a_model_refuses_images_of_a_size_it_cannot_take() -> None:
    fixed = {"img_size": 160, "dynamic_img_size": False}
    for args, good, wrong in ((fixed, 160, 64), ({}, 64, 50), ({"img_size": 64}, 64, 50)):
        model = create_model(recipe(model="test_vit", model_args=args))
        check_input(model, 2, good, "test_vit", training=False)
        with pytest.raises(UserError) as caught:
            check_input(model, 2, wrong, "test_vit", training=False)
        says = str(caught.value)
        assert says.startswith(f"model 'test_vit' does not take 2 images of {wrong} x {wrong}: ")
        assert says.endswith(f"(some models want --model_args.img_size {wrong})")


def test_a_model_that_gives_no_logits_is_refused() -> None:
    model = create_model(recipe(model="test_vit", model_args={"img_size": 32, "global_pool": ""}))
    with pytest.raises(
        UserError, match=r"model 'test_vit' gives \(2, 5, 5\) and not logits \(2, 5\)"
    ):  # 4 patches, 1 token
        check_input(model, 2, 32, "test_vit", training=False)


def test_one_image_at_a_time_is_refused_where_batchnorm_would_see_one_value() -> None:
    with pytest.raises(UserError, match="does not take 1 image of 32 x 32 in training: Expected more than 1 value"):
        check_input(create_model(recipe()), 1, 32, "test_resnet", training=True)
    check_input(create_model(recipe()), 1, 32, "test_resnet", training=False)


def test_checking_the_resolution_leaves_the_model_as_it_was() -> None:
    model = create_model(recipe())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for size in (32, 33, 64):
        check_input(model, 2, size, "test_resnet", training=True)
    assert model.training
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_size_in_bytes_counts_parameters_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert weight_bytes(model) == 4 * (6 + 2 + 2 + 2 + 2 + 2) + 8
