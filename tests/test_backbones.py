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


# --------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("r50_100e", 25_557_032), ("deit_s", 22_050_664), ("cifar10_r18_200e", 11_173_962)],
)
def test_a_setting_has_a_model_of_the_published_size(name: str, parameters: int) -> None:
    r = dataclasses.replace(load_recipe(name), init="timm")
    with torch.device("meta"):
        assert count(create_model(r)) == parameters


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


@pytest.mark.parametrize(("name", "init"), [("test_resnet", "mmcls_cnn"), ("test_vit", "mmcls_vit")])
def test_the_published_start_changes_convolutions_and_head_or_token_and_head(name: str, init: str) -> None:
    ours, theirs = (create_model(recipe(model=name, init=i)) for i in (init, "timm"))
    before = theirs.state_dict()
    changed = {k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])}
    if init == "mmcls_cnn":
        assert theirs.fc.weight.abs().max() <= theirs.num_features**-0.5  # uniform
        expected = {f"{k}.weight" for k, m in ours.named_modules() if isinstance(m, nn.Conv2d)} | {"fc.weight"}
        assert changed == expected | {"fc.bias"}
    else:
        assert changed == {"head.weight", "cls_token"} and theirs.cls_token.std() < 1e-4


# --------------------------------------------------------------------------------------------- arguments and errors


def test_arguments_reach_the_model() -> None:
    model = create_model(recipe(model="test_vit", model_args={"img_size": 32}, drop_path_rate=0.5))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates and max(rates) == pytest.approx(0.5)
    plain = create_model(recipe(model="test_vit", drop_path_rate=0.0))
    assert not [m for m in plain.modules() if type(m).__name__ == "DropPath"]


ODD = "model 'pvt_tiny' with {{'img_size': {}}}: ValueError: img_size must be square and a multiple of 32, got"


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
        ({"model_args": {"checkpoint_path": "/no"}}, "model 'test_resnet' with {'checkpoint_path': '/no'}: FileNot"),
        ({"model": "pvt_tiny", "model_args": {"img_size": 64.0}}, "model 'pvt_tiny' with {'img_size': 64.0}: Strict"),
        ({"model": "pvt_tiny", "model_args": {"img_size": 60}}, f"{ODD.format(60)} 60 x 60"),
        ({"model": "pvt_tiny", "model_args": {"img_size": (64, 96)}}, f"{ODD.format((64, 96))} 64 x 96"),
        ({"model_args": {"features_only": True}}, "model 'test_resnet' with {'features_only': True} is no classifier"),
        ({"init": "mmcls_vit"}, "init mmcls_vit needs a model with a class token, such as deit_small; got 'test_res"),
    ],
)
def test_a_model_that_cannot_be_made_is_explained(changes: dict, says: str) -> None:
    with pytest.raises(UserError) as caught:
        create_model(recipe(**changes))
    message = str(caught.value)
    assert message.startswith(says) and "\n" not in message and len(message) < 600


FIXED = {"img_size": 160, "dynamic_img_size": False}
NO_LOGITS = {"img_size": 32, "global_pool": ""}


@pytest.mark.parametrize(
    ("args", "fits", "wrong", "says"),
    [
        (FIXED, 160, 64, r"does not take 2 images of 64 x 64: .*\(some models want --model_args.img_size 64\)$"),
        ({}, 64, 50, r"does not take 2 images of 50 x 50: .*\(some models want --model_args.img_size 50\)$"),
        ({"img_size": 64}, 64, 50, r"does not take 2 images of 50 x 50: .*\(some models want .*img_size 50\)$"),
        (NO_LOGITS, None, 32, r"gives \(2, 5, 5\) and not logits \(2, 5\);"),  # 4 patches, 1 token
    ],
)
def test_a_model_refuses_images_of_a_size_it_cannot_take(args: dict, fits: int | None, wrong: int, says: str) -> None:
    model = create_model(recipe(model="test_vit", model_args=args))
    if fits:
        check_input(model, 2, fits, "test_vit", training=False)
    with pytest.raises(UserError, match=f"^model 'test_vit' {says}"):
        check_input(model, 2, wrong, "test_vit", training=False)


def test_checking_the_input_leaves_the_model_as_it_was_also_where_batchnorm_would_see_one_value() -> None:
    model = create_model(recipe())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="does not take 1 image of 32 x 32 in training: Expected more than 1 value"):
        check_input(model, 1, 32, "test_resnet", training=True)
    check_input(model, 1, 32, "test_resnet", training=False)
    for size in (32, 33, 64):
        check_input(model, 2, size, "test_resnet", training=True)
    assert model.training
    assert all(v.device.type == "cpu" and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_size_in_bytes_counts_parameters_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert weight_bytes(model) == 4 * (6 + 2 + 2 + 2 + 2 + 2) + 8
