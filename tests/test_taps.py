"""Looking into and editing models from outside: on plain timm models, without a trace, loud when it does not work."""

import copy
import functools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import torch.distributed as dist
from driver import free_port
from timm.layers import set_reentrant_ckpt
from timm.models import save_for_hf
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mixers import taps, weights
from mixers.taps import Frozen, attention, compile_stages, edit, record, saliency, stages
from mixers.testing import batch, differences, equal, footprint, global_rngs
from mixers.weights import NoWeights
from mixup_recipes.training.backbones import load_model
from mixup_recipes.typed import UserError

STAGES = {
    "resnet18": [f"layer{i}" for i in (1, 2, 3, 4)],
    "resnet50": [f"layer{i}" for i in (1, 2, 3, 4)],
    "deit_small_patch16_224": [f"blocks.{i}" for i in range(12)],
    "swin_tiny_patch4_window7_224": [f"layers.{i}" for i in range(4)],
    "convnext_tiny": [f"stages.{i}" for i in range(4)],
    "tf_efficientnet_b0": [f"blocks.{i}" for i in (0, 1, 2, 4, 6)],
    "mobilenetv2_100": [f"blocks.{i}" for i in (0, 1, 2, 4, 6)],
}

# Every backbone of the published tables, as narrow and shallow as it can be made by arguments.
CNN = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
BACKBONES = dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet18_cifar"), CNN)
BACKBONES |= dict.fromkeys(("resnext101_32x4d", "resnext50_32x4d_cifar"), CNN | {"base_width": 16})
BACKBONES |= {
    f"deit_{size}_patch16_224": {"depth": 4, "embed_dim": 48, "img_size": 64} for size in ("tiny", "small", "base")
}
BACKBONES |= {
    "tf_efficientnet_b0": {},
    "mobilenetv2_100": {},
    "pvt_tiny": {"img_size": 64},
    SWIN: {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)},
    "moganet_tiny": {},
}
FAMILIES = ["resnet18", "tf_efficientnet_b0", DEIT, "pvt_tiny", SWIN, "convnext_tiny", "moganet_tiny"]  # one of each
ATTENTIVE = [name for name in BACKBONES if name.startswith(("deit", "pvt", "swin"))]
CRITERION = nn.CrossEntropyLoss(reduction="none")

# The compiler itself reads .grad of what it traces.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@functools.cache
def built(name: str, **args: object) -> tuple[nn.Module, Tensor]:
    """A model that nothing has run yet, and the state of torch's generator once its weights were drawn."""
    torch.manual_seed(0)
    drop = {} if name.startswith(("mobile", "tf_")) else {"drop_path_rate": 0.2}
    return timm.create_model(name, num_classes=5, **(BACKBONES[name] | drop | args)), torch.get_rng_state()


def backbone(name: str, **args: object) -> nn.Module:
    """A small one with 5 classes, the same weights each time, in training mode, drop path on where there is some."""
    model, drawn = built(name, **args)
    torch.set_rng_state(drawn)
    return copy.deepcopy(model)


def photos() -> tuple[Tensor, Tensor]:
    """Four images of 64 pixels, one-hot targets of 5 classes."""
    return batch(4, 64, 64)


def state(model: nn.Module) -> dict:
    """All that may not change on a model: modes, hooks, flags, gradients, parameters and buffers."""
    found = footprint(model) | {name: value.clone() for name, value in model.state_dict().items()}
    return found | {f"{name} track": getattr(m, "track_running_stats", None) for name, m in model.named_modules()}


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


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_feature_is_that_of_the_one_forward_in_the_block_and_leaves_no_trace(name: str) -> None:
    model, (images, _) = backbone(name).eval(), photos()
    before = state(model)
    with taps.last_feature(model) as found:
        logits = model(images)
    torch.testing.assert_close(model.forward_head(found[0]), logits)
    assert found[0].requires_grad and not differences(before, state(model))
    for forwards in (0, 2):
        with pytest.raises(RuntimeError, match=f"ran {forwards} times, expected once"), taps.last_feature(model):
            [model(images) for _ in range(forwards)]
    assert not differences(before, state(model))


@pytest.mark.parametrize("name", ["", "layer1", "layer4", "fc"])
def test_an_edit_changes_what_the_rest_of_the_model_sees_and_only_in_the_block(model, x, name: str) -> None:
    plain = model.eval()(x)
    with edit(model, name, lambda feature: feature + 1):
        edited = model(x)
    assert not torch.allclose(plain, edited, atol=1e-3)
    assert torch.equal(model(x), plain) and hooks(model) == 0
    if name in ("", "fc"):
        torch.testing.assert_close(edited, model(x + 1) if name == "" else plain + 1)
    with pytest.raises(ZeroDivisionError), edit(model, name, lambda feature: feature / (1 // 0)):
        model(x)
    assert hooks(model) == 0


def test_gradient_flows_through_an_edit(model, x) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with edit(model, "layer2", lambda feature: scale * feature):
        model(x).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad != 0
    assert model.conv1[0].weight.grad.any()


def test_an_edit_is_of_one_forward_and_its_error_hides_none_of_the_block(model, x) -> None:
    model.spare = nn.Linear(2, 2)
    with (
        pytest.raises(RuntimeError, match=r"'spare' of ResNet did not fire.*compile_stages"),
        edit(model, "spare", abs),
    ):
        model(x)
    with pytest.raises(RuntimeError, match="would be edited twice"), edit(model, "layer1", lambda h: h):
        [model(x) for _ in range(2)]
    with pytest.raises(KeyError), edit(model, "layer1", abs):
        raise KeyError
    with pytest.raises(AttributeError, match="layer9"), edit(model, "layer9", abs):
        pass
    assert hooks(model) == 0


# --------------------------------------------------------------------------------------------- record


@pytest.mark.parametrize("name", BACKBONES)
def test_a_record_holds_the_maps_that_the_model_itself_gives_out_as_tokens_and_back(name: str) -> None:
    model, (x, _) = backbone(name).eval(), photos()
    before = state(model)
    names = stages(model)
    with record(model, *names) as outputs, torch.no_grad():
        logits = model(x)
    assert list(outputs) == names
    assert not differences(before, state(model))
    assert torch.equal(logits, model(x))
    maps = model.forward_intermediates(x, indices=len(names), intermediates_only=True)
    for stage, wanted in zip(names, maps, strict=True):
        tokens = taps.to_tokens(model, outputs[stage])
        assert torch.equal(taps.from_tokens(model, tokens, like=outputs[stage]), outputs[stage])
        torch.testing.assert_close(tokens.transpose(1, 2).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_a_record_keeps_the_graph_and_adds_nothing_to_it(model, x) -> None:
    plain = copy.deepcopy(model)
    with record(model, "layer1", "layer3") as outputs:
        logits = model(x)
    (logits.square().sum() + outputs["layer3"].square().sum() + outputs["layer1"].sum()).backward()
    first = plain.layer1(plain.maxpool(plain.act1(plain.bn1(plain.conv1(x)))))
    third = plain.layer3(plain.layer2(first))
    logits = plain.fc(plain.global_pool(plain.layer4(third)))
    (logits.square().sum() + third.square().sum() + first.sum()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_record_is_of_one_forward(model, x) -> None:
    with pytest.raises(RuntimeError, match=r"'layer2' of ResNet fired 2 times"), record(model, "layer2"):
        model(x)
        model(x)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"'spare' of ResNet did not fire"), record(model, "layer2", "spare"):
        model(x)
    with pytest.raises(ZeroDivisionError), record(model, "layer2", "spare"):
        raise ZeroDivisionError
    with pytest.raises(AttributeError, match="layer9"), record(model, "layer1", "layer9"):
        pass
    assert hooks(model) == 0


# --------------------------------------------------------------------------------------------- saliency


def gradient_image_by_image(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each sample's own loss, the sample alone, by ``backward`` on a copy."""
    model = copy.deepcopy(model).eval()
    gradients = []
    for i in range(len(x)):
        image = x[i : i + 1].clone().requires_grad_()
        CRITERION(model(image), y[i : i + 1]).sum().backward()
        gradients.append(image.grad)
    return torch.cat(gradients)


@pytest.mark.parametrize("name", BACKBONES)
def test_saliency_is_the_gradient_of_each_image_and_leaves_no_trace(name: str) -> None:
    model, (x, y) = backbone(name), photos()
    CRITERION(model(x), y).mean().backward()  # a gradient is being accumulated, and BatchNorm has seen something
    model.get_submodule(stages(model)[0]).eval()
    next(model.parameters()).requires_grad_(False)
    expected = gradient_image_by_image(model, x, y)
    before, generators = state(model), global_rngs()
    found = saliency(model, CRITERION, x, y)
    assert not differences(before, state(model))
    assert not differences(generators, global_rngs())
    assert not found.requires_grad and not x.requires_grad and x.grad is None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_saliency_is_the_slope_of_the_loss(model) -> None:
    x, y = batch(2, 16, 16)
    model, x, y = model.double(), x.double(), y.double()
    gradient = saliency(model, CRITERION, x, y)
    model.eval()
    for n, c, i, j in ((0, 0, 3, 5), (1, 2, 15, 0), (1, 1, 8, 8)):
        step = torch.zeros_like(x)
        step[n, c, i, j] = 1e-5
        with torch.no_grad():
            slope = (CRITERION(model(x + step), y).sum() - CRITERION(model(x - step), y).sum()) / 2e-5
        assert gradient[n, c, i, j].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_in_training_mode_uses_the_batch_but_moves_no_buffer_or_generator(name: str) -> None:
    model, (x, y) = backbone(name), photos()
    plain, images = copy.deepcopy(model), x.clone().requires_grad_()
    before, generators = state(model), global_rngs()
    with torch.random.fork_rng(devices=[]):
        CRITERION(plain(images), y).sum().backward()
    found = saliency(model, CRITERION, x, y, training=True)
    assert not differences(before, state(model))
    assert not differences(generators, global_rngs())
    torch.testing.assert_close(found, images.grad, rtol=1e-3, atol=1e-5 * images.grad.abs().max().item())
    assert not torch.allclose(found, saliency(model, CRITERION, x, y), rtol=1e-2, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_saliency_restores_the_model_also_after_an_error(model, training: bool) -> None:
    x, y = batch()
    model.layer2.eval()
    before, generators = state(model), global_rngs()

    def breaks(logits: Tensor, _: Tensor) -> Tensor:
        torch.rand(1)
        assert model.layer1.training is training and not model.layer2.training
        raise ZeroDivisionError

    with torch.random.fork_rng(devices=[]), pytest.raises(ZeroDivisionError):
        saliency(model, breaks, x, y, training=training)
    assert not differences(before, state(model))
    assert not differences(generators, global_rngs())


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_under_autocast_points_where_it_does_in_full_precision(name: str) -> None:
    model, (x, y) = backbone(name), photos()
    expected = saliency(model, CRITERION, x, y).flatten(1)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = saliency(model, CRITERION, x, y)
        assert found.dtype == torch.float32
        assert nn.functional.cosine_similarity(found.flatten(1), expected).min() > 0.9
        torch.testing.assert_close(found.flatten(1).norm(dim=1), expected.norm(dim=1), rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_saliency_in_float16_neither_underflows_nor_overflows_where_a_plain_gradient_does(size: float) -> None:
    model, (x, y) = backbone("resnet18"), photos()
    sizes = size * torch.tensor([1.0, 1.0, 1e-4, 1e-6])  # of the samples' losses: some are nearly learnt

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        return CRITERION(logits, target) * sizes

    expected = saliency(model, criterion, x, y).flatten(1)
    images = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        found = saliency(model, criterion, x, y).flatten(1)
        (plain,) = torch.autograd.grad(criterion(model.eval()(images), y).sum(), images)
    directions = nn.functional.cosine_similarity(plain.flatten(1), expected)
    assert not (directions > 0.9).all()
    # in float64, in which no size underflows
    assert (nn.functional.cosine_similarity(found.double(), expected.double(), eps=0) > 0.98).all()
    torch.testing.assert_close(found.norm(dim=1) / expected.norm(dim=1), torch.ones(4), rtol=0.1, atol=0)


def test_saliency_of_a_flat_loss_is_zero_and_a_frozen_model_or_no_grad_changes_nothing(model) -> None:
    x, y = batch()
    for training in (False, True):
        found = saliency(model, lambda logits, target: 0 * logits.sum(1), x, y, training=training)
        assert torch.equal(found, torch.zeros_like(x))
    expected = saliency(model, CRITERION, x, y)
    with torch.no_grad():
        assert torch.equal(saliency(model.requires_grad_(False), CRITERION, x, y), expected)


def test_looks_read_nothing_from_the_device(model) -> None:
    x, y = (value.to("meta") for value in batch())
    for training in (False, True):
        assert saliency(model.to("meta"), CRITERION, x, y, training=training).device.type == "meta"
    vit = backbone(DEIT).to("meta")
    with attention(vit) as look:
        vit(photos()[0].to("meta"))
    assert look.of_class_token().device.type == "meta"


class Looks(nn.Module):
    """A step that looks at the input gradient before its forward, or does not."""

    def __init__(self, model: nn.Module, look: bool):
        super().__init__()
        self.model, self.look = model, look

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.look:
            saliency(self.model, CRITERION, x, y)
        return CRITERION(self.model(x), y).mean()


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saliency_inside_distributed_training_changes_no_gradient(model, dtype, process_group) -> None:
    gradients = []
    for look in (False, True):
        step = Looks(copy.deepcopy(model), look)
        parallel = nn.parallel.DistributedDataParallel(step)
        for seed, last in ((0, False), (1, True)):
            with ExitStack() as stack:
                if not last:
                    stack.enter_context(parallel.no_sync())
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = parallel(*batch(seed=seed))
                loss.backward()
        gradients.append({name: p.grad for name, p in step.model.named_parameters()})
    assert not differences(*gradients)


# --------------------------------------------------------------------------------------------- attention


def attention_unfused(model: nn.Module, x: Tensor, path: str) -> Tensor:
    """The attention that a copy of the model multiplies its values by, in front of the dropout at ``path``."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    return seen[0]


DROPOUTS = {
    "deit": "blocks.3.attn.attn_drop",
    "swin": "layers.3.blocks.0.attn.attn_drop",
    "pvt": "stages.3.layers.1.attention.self.dropout",
}


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_is_what_the_layer_multiplies_its_values_by_and_changes_nothing(name: str) -> None:
    model, (x, _) = backbone(name).eval(), photos()
    nn.init.normal_(next(p for n, p in model.named_parameters() if "pos_embed" in n or "position" in n), std=1)
    expected = attention_unfused(model, x, DROPOUTS[name.split("_")[0]])
    before, plain = state(model), model(x)
    with attention(model) as look:
        logits = model(x)
    assert torch.equal(logits, plain) and logits.requires_grad
    assert not differences(before, state(model))
    weights = look.weights()
    assert not weights.requires_grad
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert weights.std() > 1e-3  # not uniform, so that a wrong axis shows

    prefix = 0 if name.startswith("swin") else 1
    side = round((weights.shape[3] - prefix) ** 0.5)
    images = torch.zeros(4, side, side)
    token = torch.zeros(4, side, side)
    for n in range(4):
        for i in range(side):
            for j in range(side):
                key = prefix + i * side + j
                images[n, i, j] = expected[n, :, prefix:, key].mean()
                token[n, i, j] = expected[n, :, 0, key].mean()
    torch.testing.assert_close(look.of_patches(), images / images.sum((1, 2), keepdim=True))
    if prefix:
        torch.testing.assert_close(look.of_class_token(), token / token.sum((1, 2), keepdim=True))
    else:
        with pytest.raises(ValueError, match="no class token"):
            look.of_class_token()


@pytest.mark.parametrize("block", [0, 2, -4, -1])
def test_any_block_can_be_looked_at_with_normalised_queries_and_keys_too(block: int) -> None:
    model, (x, _) = backbone(DEIT, qk_norm=True), photos()
    torch.nn.init.normal_(model.blocks[block].attn.q_norm.weight)
    expected = attention_unfused(model, x, f"blocks.{block % 4}.attn.attn_drop")
    with attention(model.eval(), block) as look, torch.no_grad():
        model(x)
    torch.testing.assert_close(look.weights(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(look.weights(slice(2, 5)), expected[:, :, 2:5], rtol=1e-5, atol=1e-6)


def test_the_grid_has_the_proportions_of_the_images() -> None:
    model = backbone(DEIT, dynamic_img_size=True).eval()
    for height, width in ((64, 96), (96, 64), (32, 128), (16, 16)):
        with attention(model) as look:
            model(torch.randn(3, 3, height, width))
        assert look.of_class_token().shape == (3, height // 16, width // 16)
        torch.testing.assert_close(look.of_patches().sum((1, 2)), torch.ones(3))


def test_attention_in_training_under_autocast_is_in_float32_and_carries_no_gradient() -> None:
    model, (x, y) = backbone(DEIT, drop_path_rate=0.0), photos()
    plain = copy.deepcopy(model)
    expected = attention_unfused(model, x, DROPOUTS["deit"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with attention(model) as look:
            loss = CRITERION(model(x), y).mean()
        weights = look.weights()
        CRITERION(plain(x), y).mean().backward()
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(weights.sum(3), torch.ones(weights.shape[:3]))
    torch.testing.assert_close(weights, expected, rtol=0.1, atol=1e-3)
    loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ATTENTIVE] + ["xcit_nano_12_p16_224"])
def test_a_model_without_attention_between_tokens_is_refused_with_models_that_have_it(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=r"no attention between image tokens.*deit_small.*swin_tiny.*pvt_tiny"):
        taps.attention_layers(model)
    with pytest.raises(ValueError, match="no attention between image tokens"), attention(model):
        pass


def test_attention_that_cannot_be_looked_at_is_an_error_in_words() -> None:
    vit, swin = backbone(DEIT), backbone(SWIN).eval()
    x, _ = photos()
    for block in (4, -5):
        with pytest.raises(ValueError, match=rf"block must be in \[-4, 3\], got {block}"), attention(vit, block):
            pass
    with pytest.raises(RuntimeError, match=r"'blocks.3.attn.qkv' of VisionTransformer did not fire"), attention(vit):
        pass
    with attention(swin, 0) as look:
        with pytest.raises(RuntimeError, match="no attention yet"):
            look.weights()
        swin(x)
    with pytest.raises(RuntimeError, match="9 windows per image"):
        look.weights()
    fused = [m for m in swin.modules() if isinstance(m, WindowAttention)][-1]
    fused.fused_attn = True
    with pytest.raises(ValueError, match=r"layers.3.blocks.0.attn of SwinTransformer fuses its attention"):
        attention(swin).__enter__()
    assert hooks(vit) == hooks(swin) == 0


# --------------------------------------------------------------------------------------------- compiled stages


@pytest.fixture
def compiler(without_shape_checks) -> Iterator[None]:
    """One that has compiled nothing yet, with the limits of a run."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


QUICK = [("resnet18_cifar", "aot_eager"), (DEIT, "eager")]
SLOW = [(name, backend) for name in FAMILIES for backend in ("eager", "aot_eager") if (name, backend) not in QUICK]


@traced
@pytest.mark.parametrize(("name", "backend"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_tap_works_on_compiled_stages(name: str, backend: str, compiler) -> None:
    plain, (x, y) = backbone(name).eval(), photos()
    model = copy.deepcopy(plain)
    compile_stages(model, backend=backend, dynamic=False)
    second = stages(model)[1]
    inner = {"resnet18_cifar": "layer2.0.conv1", DEIT: "blocks.2.mlp"}.get(name, second)
    assert list(model.state_dict()) == list(plain.state_dict())
    before = state(model)
    for _ in range(2):  # compiled now, then found compiled
        results = []
        for net in (plain, model):
            with edit(net, second, lambda feature: feature.flip(0)), torch.no_grad():
                edited = net(x)
            with record(net, second, inner) as outputs, torch.no_grad():
                logits = net(x)
            with torch.no_grad():
                untouched = net(x)
            found = {"edited": edited, "logits": logits, "untouched": untouched, **outputs}
            found["saliency"] = saliency(net, CRITERION, x, y)
            if name in ATTENTIVE:
                with attention(net) as look, torch.no_grad():
                    net(x)
                found["attention"] = look.weights()
            results.append(found)
        for what, expected in results[0].items():
            torch.testing.assert_close(results[1][what], expected, rtol=1e-3, atol=1e-5, msg=what)
        assert not torch.allclose(results[1]["edited"], results[1]["logits"], rtol=1e-2)
    assert not differences(before, state(model))


@traced
def test_taps_at_every_step_compile_once(model, x, compiler) -> None:
    counter = CompileCounter()
    compile_stages(model.eval(), backend=counter)
    y = torch.eye(5)[:2]
    frames = []
    for lam in torch.arange(3) / 3:
        with edit(model, "layer2", lambda feature, lam=lam: lam * feature):
            model(x)
        with record(model, "layer2"):
            model(x)
        saliency(model, CRITERION, x, y)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2] > 0


@traced
@pytest.mark.parametrize("name", ["resnet18_cifar", DEIT])
def test_a_tap_on_a_model_compiled_as_a_whole_works_or_is_refused_but_never_ignored(name, compiler) -> None:
    model, (x, _) = backbone(name).eval(), photos()
    second = stages(model)[1]
    with record(model, second) as expected:
        plain = model(x)
    model.compile(backend="eager")
    torch.testing.assert_close(model(x), plain)
    for tap in (record(model, second), edit(model, second, lambda feature: feature + 1)):
        try:
            with tap as outputs:
                logits = model(x)
        except RuntimeError as error:
            assert "did not fire" in str(error)
        else:
            if outputs is None:
                assert not torch.allclose(logits, plain)
            else:
                torch.testing.assert_close(outputs[second], expected[second])


# --------------------------------------------------------------------------------------------- activation checkpointing

CHECKPOINTING = [name for name in FAMILIES if name not in ("pvt_tiny", "moganet_tiny")]
# timm checkpoints inside these stages and not across them.
STAGE_BY_STAGE = [SWIN, "convnext_tiny"]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_with_activation_checkpointing_an_edit_is_right_or_refused(name: str) -> None:
    model, (x, _) = backbone(name, drop_path_rate=0.0).eval(), photos()
    lam, second = torch.tensor(0.3), stages(model)[1]

    def loss() -> Tensor:
        with edit(model, second, lambda h: torch.lerp(h.flip(0), h, lam) * h):
            return model(x).square().sum()

    plain = gradients(model, loss())
    model.set_grad_checkpointing(True)
    if name in STAGE_BY_STAGE:
        torch.testing.assert_close(gradients(model, loss()), plain)
    else:
        with pytest.raises(RuntimeError, match=rf"no tap on '{second}' of .* while it checkpoints activations"):
            loss()
    with edit(model, "", lambda images: images.flip(0)):
        flipped = model(x)
    torch.testing.assert_close(flipped, model(x.flip(0)))
    assert hooks(model) == 0


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_with_activation_checkpointing_a_record_is_right_or_refused(name: str, request) -> None:
    model, (x, _) = backbone(name, drop_path_rate=0.0).eval(), photos()
    second = stages(model)[1]

    def loss() -> Tensor:
        with record(model, second) as outputs:
            logits = model(x)
        return logits.square().sum() + outputs[second].square().sum()

    plain = gradients(model, loss())
    model.set_grad_checkpointing(True)
    request.addfinalizer(lambda: set_reentrant_ckpt(False))
    for reentrant in (False, True):
        set_reentrant_ckpt(reentrant)
        if name in STAGE_BY_STAGE or (name == DEIT and not reentrant):
            torch.testing.assert_close(gradients(model, loss()), plain)
        else:
            with pytest.raises(RuntimeError, match=r"did not fire|while it checkpoints activations"):
                loss()
        assert hooks(model) == 0


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_with_activation_checkpointing_saliency_and_attention_are_the_same(name: str) -> None:
    model, (x, y) = backbone(name, drop_path_rate=0.0), photos()
    expected = saliency(model, CRITERION, x, y)
    maps = []
    for _ in range(2):
        if name in ATTENTIVE:
            with attention(model) as look:
                loss = model(x).square().sum()
            maps.append(look.weights())
            loss.backward()
        model.set_grad_checkpointing(True)
    torch.testing.assert_close(saliency(model, CRITERION, x, y), expected)
    if maps:
        torch.testing.assert_close(*maps)


# --------------------------------------------------------------------------------------------- a frozen teacher


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A trained model in a folder, in the format of a run."""
    save_for_hf(model, tmp_path / "teacher", safe_serialization=True)
    return tmp_path / "teacher"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_frozen_teacher_has_the_weights_that_were_saved_and_never_leaves_evaluation_mode(model, saved, prefix, x):
    generators = global_rngs()
    teacher = Frozen(f"{prefix}{saved}")
    assert not differences(generators, global_rngs())
    with torch.no_grad():
        expected = model.eval()(x)
    parent = nn.Sequential(teacher, nn.Linear(5, 5)).train()
    teacher.train()
    for _ in range(2):
        assert torch.equal(teacher(x), expected)
    assert not any(module.training for module in (teacher, *teacher.model.modules()))
    assert repr(teacher) == f"Frozen('{prefix}{saved}')"
    assert not teacher(x).requires_grad

    assert [name for name, _ in parent.named_parameters()] == ["1.weight", "1.bias"]
    assert list(parent.state_dict()) == ["1.weight", "1.bias"] and not list(parent.buffers())
    parent.requires_grad_(True)
    images = x.clone().requires_grad_()
    parent(images).sum().backward()
    assert images.grad.any()
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    for resets in parent.modules():
        assert not isinstance(resets, nn.BatchNorm2d)


def test_a_frozen_teacher_moves_with_its_parent(saved, x) -> None:
    teacher = Frozen(str(saved))
    step = nn.Sequential(teacher).double()
    assert teacher(x.double()).dtype == torch.float64
    step.to(memory_format=torch.channels_last)
    assert teacher.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    step.to("meta")
    assert {t.device.type for t in teacher.model.state_dict().values()} == {"meta"}
    assert not equal(copy.deepcopy(step)[0].model, teacher.model)  # a copy has a model of its own


def test_a_module_is_frozen_as_a_copy(model, x) -> None:
    before = state(model)
    teacher = Frozen(model)
    assert not differences(before, state(model))
    expected = teacher(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(teacher(x), expected)
    assert repr(teacher) == "Frozen('ResNet')"


NO_WEIGHTS = {
    "resnet18.a1_in1k": "not on this machine, and {}",
    "hf-hub:someone/nothing": "not on this machine, and {}",
    "resnet18.no_such": "Invalid pretrained tag (no_such) for resnet18",
    "no_such_model": "Unknown model (no_such_model)",
    "empty": "empty: config.json cannot be read: [Errno 2] No such file or directory: 'empty/config.json'",
}


@pytest.fixture(params=["offline", "no network"])
def out_of_reach(request, tmp_path, monkeypatch) -> str:
    """The Hub cannot be asked; in words, why not."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return "HF_HUB_OFFLINE is set" if request.param == "offline" else f"{endpoint} cannot be reached"


def test_weights_that_cannot_be_had_are_one_readable_line_at_once(out_of_reach, capfd) -> None:
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    for name, reason in NO_WEIGHTS.items():
        with pytest.raises(ValueError) as caught:
            Frozen(name)
        assert str(caught.value) == (
            f"no weights for the teacher '{name}' ({reason.format(out_of_reach)}); expected timm weights such as "
            "'resnet18.tv_in1k', hf-hub:owner/name, or a run folder"
        )
        assert huggingface_hub.constants.HF_HUB_OFFLINE is before
    with pytest.raises(UserError) as caught:
        load_model("resnet18.a1_in1k")
    assert str(caught.value) == f"cannot load model 'resnet18.a1_in1k': not on this machine, and {out_of_reach}"
    assert capfd.readouterr() == ("", "")  # the Hub's client reports each of its attempts


def test_a_teacher_in_the_cache_needs_no_hub(out_of_reach, saved, x, tmp_path) -> None:
    snapshot = tmp_path / "cache/models--someone--net/snapshots/0123456789012345678901234567890123456789"
    shutil.copytree(saved, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    assert torch.equal(Frozen("hf-hub:someone/net")(x), Frozen(str(saved))(x))


def answer(status: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(headers={}, request=None, status_code=status)


def test_what_the_hub_answered_is_said_in_a_few_words(monkeypatch) -> None:
    words = "404 Client Error. (Request ID: 1)\n\nRepository Not Found for url: http://hub"
    error = huggingface_hub.errors.RepositoryNotFoundError(words, response=answer())
    assert taps.why(error) == "the Hub has no such repository, or does not show it without a token"
    assert taps.why(OSError()) == "OSError"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    busy = huggingface_hub.errors.HfHubHTTPError("busy", response=answer(429))
    for cause, why in (
        (busy, "the Hub answered 429"),
        *((e, "http://hub cannot be reached") for e in (OSError(), None)),
    ):
        error = huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        error.__cause__ = cause
        assert taps.why(error) == f"not on this machine, and {why}"


VIT = "vit_tiny_patch16_224"
TOO_LARGE = [
    (VIT, {"depth": 9999, "embed_dim": 9999, "num_heads": 3}),
    (VIT, {"depth": 9999}),
    ("test_vit", {"depth": 30}),  # a little more than there is
    ("resnet18", {"layers": [2, 2, 9999, 2]}),
    (SWIN, {"window_size": 100, "img_size": 3200}),  # buffers, not parameters
]


@pytest.mark.parametrize(("architecture", "args"), TOO_LARGE)
def test_a_configuration_of_more_numbers_than_the_weights_hold_is_refused_before_it_is_built(
    saved: Path, architecture: str, args: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"architecture": architecture, "model_args": args}
    (saved / "config.json").write_text(json.dumps(config))
    if architecture == "test_vit":  # this much: 30 layers of 64 channels have 1.5 million numbers
        (saved / "model.safetensors").write_bytes(bytes(10**6))
    create, device = timm.create_model, []

    def watched(*given: object, **more: object) -> object:
        device.append(torch.empty(0).device.type)
        assert device[-1] == "meta"
        return create(*given, **more)

    monkeypatch.setattr(timm, "create_model", watched)
    began = time.monotonic()
    with pytest.raises(NoWeights, match=r"config.json describes (more than )?[\d,]+ numbers, the weights hold fewer"):
        weights.load(saved, "a stranger's")
    assert device == ["meta"] and time.monotonic() - began < 30
    assert not torch.nn.modules.module._global_parameter_registration_hooks
