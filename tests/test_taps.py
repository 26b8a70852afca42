"""Looking into and editing models from outside: on plain timm models, without a trace, loud when it does not work."""

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from mixers.taps import compile_stages, edit, stages

STAGES = {
    "resnet18": [f"layer{i}" for i in (1, 2, 3, 4)],
    "resnet50": [f"layer{i}" for i in (1, 2, 3, 4)],
    "deit_small_patch16_224": [f"blocks.{i}" for i in range(12)],
    "swin_tiny_patch4_window7_224": [f"layers.{i}" for i in range(4)],
    "convnext_tiny": [f"stages.{i}" for i in range(4)],
    "tf_efficientnet_b0": [f"blocks.{i}" for i in (0, 1, 2, 4, 6)],
    "mobilenetv2_100": [f"blocks.{i}" for i in (0, 1, 2, 4, 6)],
}


# The compiler itself reads .grad of what it traces.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_modules_that_run_in_order_and_whose_output_can_be_edited(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        images = torch.empty(2, 3, 224, 224)
    assert stages(model) == STAGES[name]
    ran: list[str] = []
    for stage in stages(model):
        model.get_submodule(stage).register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    model(images)
    assert ran == STAGES[name]
    shapes: list[torch.Size] = []
    with edit(model, stages(model)[-1], lambda feature: shapes.append(feature.shape) or feature):
        model(images)
    assert len(shapes) == 1
    assert shapes[0][0] == 2


def test_a_model_that_does_not_publish_its_stages_is_refused_with_models_that_do() -> None:
    with pytest.raises(ValueError, match=r"Linear does not publish its stages .*resnet50"):
        stages(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["layer1", "layer4", "fc"])
def test_edit_changes_what_the_rest_of_the_model_sees_and_only_in_the_block(model, x, name: str) -> None:
    model.eval()
    plain = model(x)
    with edit(model, name, lambda feature: feature + 1):
        edited = model(x)
    assert not torch.allclose(plain, edited, atol=1e-3)
    assert torch.equal(model(x), plain)
    if name == "fc":
        torch.testing.assert_close(edited, plain + 1)


def test_edit_of_the_input_equals_editing_the_images(model, x) -> None:
    model.eval()
    with edit(model, "", lambda images: images.flip(0)):
        edited = model(x)
    torch.testing.assert_close(edited, model(x.flip(0)))


def test_gradient_flows_through_an_edit(model, x) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with edit(model, "layer2", lambda feature: scale * feature):
        model(x).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad != 0
    assert model.conv1[0].weight.grad.any()


@pytest.mark.parametrize("name", ["layer2", ""])
def test_edit_leaves_no_hook_also_after_an_error(model, x, name: str) -> None:
    before = hooks(model)
    with edit(model, name, lambda feature: feature):
        model(x)
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), edit(model, name, lambda feature: feature / (1 // 0)):
        model(x)
    assert hooks(model) == before


def test_an_edit_that_did_not_fire_raises_and_names_the_module(model, x) -> None:
    model.spare = nn.Linear(2, 2)
    with (
        pytest.raises(RuntimeError, match=r"'spare' of ResNet did not fire.*compile_stages"),
        edit(model, "spare", abs),
    ):
        model(x)
    assert hooks(model) == 0


def test_an_error_inside_the_block_is_not_hidden_by_the_tap_that_did_not_fire(model) -> None:
    with pytest.raises(KeyError), edit(model, "layer1", abs):
        raise KeyError


def test_an_unknown_module_is_an_error_before_anything_runs(model) -> None:
    with pytest.raises(AttributeError, match="layer9"), edit(model, "layer9", abs):
        pass


@traced
@pytest.mark.parametrize("first", ["plain", "edited"])
def test_compiled_stages_can_still_be_edited(model, x, first: str, without_shape_checks) -> None:
    model.eval()
    plain, keys = model(x), list(model.state_dict())
    with edit(model, "layer2", lambda feature: feature + 1):
        edited = model(x)
    compile_stages(model, backend="eager")
    assert list(model.state_dict()) == keys
    for what in (first, "plain", "edited", "plain"):
        if what == "plain":
            torch.testing.assert_close(model(x), plain)
        else:
            with edit(model, "layer2", lambda feature: feature + 1):
                torch.testing.assert_close(model(x), edited)


@traced
def test_editing_a_compiled_stage_at_every_step_compiles_once(model, x, without_shape_checks) -> None:
    model.eval()
    counter = CompileCounter()
    compile_stages(model, backend=counter)
    for step in range(3):
        lam = torch.tensor(step / 3)
        with edit(model, "layer2", lambda feature, lam=lam: lam * feature):
            model(x)
        if step == 0:
            compiled = counter.frame_count
    assert counter.frame_count == compiled > 0


@traced
def test_a_model_compiled_as_a_whole_is_edited_or_refused_but_never_ignored(model, x, without_shape_checks) -> None:
    model.eval()
    plain = model(x)
    model.compile(backend="eager")
    torch.testing.assert_close(model(x), plain)
    try:
        with edit(model, "layer2", lambda feature: feature + 1):
            edited = model(x)
    except RuntimeError as error:
        assert "did not fire" in str(error)
    else:
        assert not torch.allclose(plain, edited)
