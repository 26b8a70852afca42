"""Models: sizes of the published runs, features where they are said to be, initial weights, and readable errors."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.backbones import check_input, create_model, weight_bytes
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
        ("test_resnet", {"features_only": True}, " is no classifier"),
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
