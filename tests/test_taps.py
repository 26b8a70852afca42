"""Looking into and editing models from outside: on plain timm models, without a trace, loud when it does not work."""

import contextlib
import copy
import functools
import json
import shutil
import time
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
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from mixers import Step, Vanilla, taps, weights
from mixers.taps import Frozen, attention, compile_stages, edit, record, saliency, stages
from mixers.testing import batch, differences, equal, footprint, global_rngs, rng_of
from mixers.weights import NoWeights
from mixup_recipes.training.backbones import load_model, moganet
from mixup_recipes.typed import UserError

# Every backbone of the published tables, as narrow and shallow as it can be made by arguments.
CNN: dict = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
VIT: dict = {"depth": 4, "embed_dim": 48, "img_size": 64}
BACKBONES: dict[str, dict] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet18_cifar"), CNN),
    **dict.fromkeys(("resnext101_32x4d", "resnext50_32x4d_cifar"), CNN | {"base_width": 16}),
    **dict.fromkeys((DEIT, "deit_small_patch16_224", "deit_base_patch16_224"), VIT),
    "tf_efficientnet_b0": {}, "mobilenetv2_100": {}, "moganet_tiny": {}, "pvt_tiny": {"img_size": 64},
    SWIN: {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)},
}  # fmt: skip
FAMILIES = ["resnet18", "tf_efficientnet_b0", DEIT, "pvt_tiny", SWIN, "convnext_tiny", "moganet_tiny"]  # one of each
ATTENTIVE = [name for name in BACKBONES if name.startswith(("deit", "pvt", "swin"))]
CRITERION = nn.CrossEntropyLoss(reduction="none")
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

# The compiler itself reads .grad of what it traces.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@functools.cache
def built(name, **args):
    """A model that nothing has run yet, and the state of torch's generator once its weights were drawn."""
    torch.manual_seed(0)
    drop = {} if name.startswith(("mobile", "tf_")) else {"drop_path_rate": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moganet, "DEPTHS", (1, 1, 2, 1))  # its depth is no argument
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


@contextlib.contextmanager
def unchanged(model):
    """The block moves nothing on the model and no global generator."""
    before, generators = state(model), global_rngs()
    yield
    assert not differences(before, state(model)) and not differences(generators, global_rngs())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["", "layer1", "layer4", "fc"])
def test_an_edit_changes_what_the_rest_of_the_model_sees_and_learns_and_only_in_the_block(model, name):
    plain, shift = model.eval()(X), torch.tensor(1.0, requires_grad=True)
    with edit(model, name, lambda feature: feature + shift):
        edited = model(X)
    edited.square().sum().backward()
    assert shift.grad != 0 and model.conv1[0].weight.grad.any() and not torch.allclose(plain, edited, atol=1e-3)
    assert torch.equal(model(X), plain) and hooks(model) == 0
    if name in ("", "fc"):
        assert_close(edited, model(X + 1) if name == "" else plain + 1)
    with pytest.raises(ZeroDivisionError), edit(model, name, lambda feature: feature / (1 // 0)):
        model(X)
    assert hooks(model) == 0


def test_a_tap_is_of_one_forward_and_its_error_hides_none_of_the_block(model):
    model.spare = nn.Linear(2, 2)
    for tap, forwards, says in (
        (edit(model, "spare", abs), 1, r"'spare' of ResNet did not fire.*compile_stages"),
        (edit(model, "layer1", lambda h: h), 2, "would be edited twice"),
        (record(model, "layer2"), 2, "'layer2' of ResNet fired 2 times"),
        (record(model, "layer2", "spare"), 1, "'spare' of ResNet did not fire"),
        *((taps.last_feature(model), n, f"ran {n} times, expected once") for n in (0, 2)),
    ):
        with pytest.raises(RuntimeError, match=says), tap:
            [model(X) for _ in range(forwards)]
        assert hooks(model) == 0
    for tap in (edit(model, "layer1", abs), record(model, "layer2", "spare")):
        with pytest.raises(KeyError), tap:
            raise KeyError
    for tap in (edit(model, "layer9", abs), record(model, "layer1", "layer9")):
        with pytest.raises(AttributeError, match="layer9"), tap:
            pass
    assert hooks(model) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_a_record_holds_the_maps_that_the_model_itself_gives_out_with_their_graph_as_tokens_and_back(name):
    dtype = torch.float64 if name == "resnet18" else torch.float32
    model, plain = (backbone(name).eval().to(dtype) for _ in range(2))
    names, x = stages(model), photos()[0].to(dtype)
    with unchanged(model):
        with taps.last_feature(model) as found:
            logits = model(x)
        with record(model, *names) as outputs:
            assert torch.equal(model(x), logits)
    assert torch.equal(logits, model(x)) and list(outputs) == names
    assert_close(model.forward_head(found[0]), logits)
    final, maps = plain.forward_intermediates(x, indices=len(names))
    tokens = [taps.to_tokens(model, feature) for feature in outputs.values()]
    for part, wanted, whole in zip(tokens, maps, outputs.values(), strict=True):
        assert torch.equal(taps.from_tokens(model, part, like=whole), whole)
        assert_close(part.transpose(1, 2).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
    if name == "resnet18":
        for head, hidden in ((model.forward_head(found[0]), tokens), (plain.forward_head(final), maps)):
            (head.square().sum() + sum(feature.square().sum() for feature in hidden)).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", BACKBONES)
def test_saliency_is_the_gradient_of_each_image_or_in_training_mode_of_the_batch_and_leaves_no_trace(name):
    model, (x, y) = backbone(name), photos()
    CRITERION(model(x), y).mean().backward()  # a gradient is being accumulated, and BatchNorm has seen something
    model.get_submodule(stages(model)[0]).eval()
    next(model.parameters()).requires_grad_(False)
    found = []
    for training, parts in ((False, range(4)), (True, [slice(None)])):
        plain = copy.deepcopy(model) if training else copy.deepcopy(model).eval()
        images = [x[part].view(-1, 3, 64, 64).clone().requires_grad_() for part in parts]
        with torch.random.fork_rng(devices=[]):
            for part, image in zip(parts, images, strict=True):
                CRITERION(plain(image), y[part].view(-1, 5)).sum().backward()
        expected = torch.cat([image.grad for image in images])
        with unchanged(model):
            found.append(saliency(model, CRITERION, x, y, training=training))
        assert not found[-1].requires_grad and not x.requires_grad and x.grad is None
        assert_close(found[-1], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(*found, rtol=1e-2, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_saliency_restores_the_model_after_an_error_is_zero_for_a_flat_loss_and_reads_no_device(model, training):
    x, y = batch()
    model.layer2.eval()

    def breaks(logits, _):
        torch.rand(1)
        assert model.layer1.training is training and not model.layer2.training
        raise ZeroDivisionError

    with unchanged(model), torch.random.fork_rng(devices=[]), pytest.raises(ZeroDivisionError):
        saliency(model, breaks, x, y, training=training)
    found = saliency(model, lambda logits, target: 0 * logits.sum(1), x, y, training=training)
    assert torch.equal(found, torch.zeros_like(x))
    expected = saliency(model, CRITERION, x, y, training=training)
    with torch.no_grad():
        assert torch.equal(saliency(model.requires_grad_(False), CRITERION, x, y, training=training), expected)
    assert saliency(model.to("meta"), CRITERION, x.to("meta"), y.to("meta"), training=training).is_meta


@pytest.mark.parametrize("name", FAMILIES)
def test_saliency_under_autocast_points_where_it_does_in_full_precision(name):
    model, (x, y) = backbone(name), photos()
    expected = saliency(model, CRITERION, x, y).flatten(1)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = saliency(model, CRITERION, x, y).flatten(1)
        assert found.dtype == torch.float32 and cosine_similarity(found, expected).min() > 0.9
        assert_close(found.norm(dim=1), expected.norm(dim=1), rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_saliency_in_float16_neither_underflows_nor_overflows_where_a_plain_gradient_does(size):
    model, (x, y) = backbone("resnet18"), photos()
    sizes = size * torch.tensor([1.0, 1.0, 1e-4, 1e-6])  # of the samples' losses: some are nearly learnt

    def criterion(logits, target):
        return CRITERION(logits, target) * sizes

    expected, images = saliency(model, criterion, x, y).flatten(1), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        found = saliency(model, criterion, x, y).flatten(1)
        (plain,) = torch.autograd.grad(criterion(model.eval()(images), y).sum(), images)
    assert not (cosine_similarity(plain.flatten(1), expected) > 0.9).all()
    assert (cosine_similarity(found.double(), expected.double(), eps=0) > 0.98).all()  # no size underflows in float64
    assert_close(found.norm(dim=1) / expected.norm(dim=1), torch.ones(4), rtol=0.1, atol=0)


class Looks(Vanilla):
    """Looks at the input gradient before its step."""

    def forward(self, model, criterion, x, y, rng):
        saliency(model, criterion, x, y)
        return super().forward(model, criterion, x, y, rng)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saliency_inside_distributed_training_changes_no_gradient(model, dtype, request):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    gradients = []
    for mixer in (Vanilla(), Looks()):
        step = Step(copy.deepcopy(model), mixer, CRITERION)
        parallel = nn.parallel.DistributedDataParallel(step)
        for seed in (0, 1):
            with contextlib.nullcontext() if seed else parallel.no_sync():
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = parallel(*batch(seed=seed), rng_of(seed)).loss
                loss.backward()
        gradients.append({name: p.grad for name, p in step.model.named_parameters()})
    assert not differences(*gradients)


def attention_unfused(model, x, path):
    """The attention that a copy of the model multiplies its values by, in front of the dropout at ``path``."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    seen = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    return seen[0]


DROPOUTS = {"deit": "blocks.3.attn.attn_drop", "swin": "layers.3.blocks.0.attn.attn_drop"}
DROPOUTS["pvt"] = "stages.3.layers.1.attention.self.dropout"


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_is_what_the_layer_multiplies_its_values_by_and_changes_nothing(name):
    model, (x, _) = backbone(name).eval(), photos()
    nn.init.normal_(next(p for n, p in model.named_parameters() if "pos_embed" in n or "position" in n), std=1)
    expected = attention_unfused(model, x, DROPOUTS[name.split("_")[0]])
    with unchanged(model):
        plain = model(x)
        with attention(model) as look:
            logits = model(x)
    assert torch.equal(logits, plain) and logits.requires_grad
    weights = look.weights()
    assert not weights.requires_grad
    assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert weights.std() > 1e-3  # not uniform, so that a wrong axis shows

    prefix = 0 if name.startswith("swin") else 1
    expected = expected[..., prefix:]  # what falls on the patches, row by row
    patches, token = expected[:, :, prefix:].mean((1, 2)), expected[:, :, 0].mean(1)
    assert_close(look.of_patches().flatten(1), patches / patches.sum(1, keepdim=True))
    if prefix:
        assert_close(look.of_class_token().flatten(1), token / token.sum(1, keepdim=True))
    else:
        with pytest.raises(ValueError, match="no class token"):
            look.of_class_token()


def test_any_block_can_be_looked_at_with_normalised_queries_and_keys_and_images_of_any_proportions():
    model, (x, _) = backbone(DEIT, qk_norm=True, dynamic_img_size=True).eval(), photos()
    for block in (0, 2, -4, -1):
        nn.init.normal_(model.blocks[block].attn.q_norm.weight)
        expected = attention_unfused(model, x, f"blocks.{block % 4}.attn.attn_drop")
        with attention(model, block) as look, torch.no_grad():
            model(x)
        assert_close(look.weights(), expected, rtol=1e-5, atol=1e-6)
        assert_close(look.weights(slice(2, 5)), expected[:, :, 2:5], rtol=1e-5, atol=1e-6)
    for height, width in ((64, 96), (96, 64), (32, 128), (16, 16)):
        with attention(model) as look:
            model(torch.randn(3, 3, height, width))
        assert look.of_class_token().shape == (3, height // 16, width // 16)
        assert_close(look.of_patches().sum((1, 2)), torch.ones(3))


def test_attention_in_training_under_autocast_is_in_float32_and_carries_no_gradient():
    model, (x, y) = backbone(DEIT, drop_path_rate=0.0), photos()
    plain, expected = copy.deepcopy(model), attention_unfused(model, x, DROPOUTS["deit"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with attention(model) as look:
            loss = CRITERION(model(x), y).mean()
        weights = look.weights()
        CRITERION(plain(x), y).mean().backward()
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert_close(weights.sum(3), torch.ones(weights.shape[:3]))
    assert_close(weights, expected, rtol=0.1, atol=1e-3)
    loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_attention_that_cannot_be_looked_at_is_an_error_in_words():
    for name in ({*BACKBONES} - {*ATTENTIVE}) | {"xcit_nano_12_p16_224"}:
        with torch.device("meta"):
            other = timm.create_model(name)
        with pytest.raises(ValueError, match=r"no attention between image tokens.*deit_small.*swin_tiny.*pvt_tiny"):
            attention(other).__enter__()
    vit, swin, (x, _) = backbone(DEIT), backbone(SWIN).eval(), photos()
    for block in (4, -5):
        with pytest.raises(ValueError, match=rf"block must be in \[-4, 3\], got {block}"):
            attention(vit, block).__enter__()
    with pytest.raises(RuntimeError, match=r"'blocks.3.attn.qkv' of VisionTransformer did not fire"), attention(vit):
        pass
    with attention(swin, 0) as look:
        with pytest.raises(RuntimeError, match="no attention yet"):
            look.weights()
        swin(x)
    with pytest.raises(RuntimeError, match="9 windows per image"):
        look.weights()
    [m for m in swin.modules() if isinstance(m, WindowAttention)][-1].fused_attn = True
    with pytest.raises(ValueError, match=r"layers.3.blocks.0.attn of SwinTransformer fuses its attention"):
        attention(swin).__enter__()
    assert hooks(vit) == hooks(swin) == 0


QUICK = [("resnet18_cifar", "aot_eager"), (DEIT, "eager")]
SLOW = [(name, backend) for name in FAMILIES for backend in ("eager", "aot_eager") if (name, backend) not in QUICK]


@traced
@pytest.mark.parametrize(("name", "backend"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_tap_works_on_compiled_stages(name, backend, compiler):
    plain, (x, y) = backbone(name).eval(), photos()
    model = copy.deepcopy(plain)
    compile_stages(model, backend=backend, dynamic=False)
    second = stages(model)[1]
    inner = {"resnet18_cifar": "layer2.0.conv1", DEIT: "blocks.2.mlp"}.get(name, second)
    assert list(model.state_dict()) == list(plain.state_dict())

    def seen(net):
        images = x.clone().requires_grad_()
        with edit(net, second, lambda feature: feature.flip(0)):
            edited = net(images)
        with record(net, second, inner) as outputs, torch.no_grad():
            logits = net(x)
        with attention(net) if name in ATTENTIVE else contextlib.nullcontext() as look, torch.no_grad():
            untouched = net(x)
        gradient = torch.autograd.grad(edited.square().sum(), images)
        found = {"edited": edited, "gradient": gradient, "logits": logits, "untouched": untouched, **outputs}
        return found | {"saliency": saliency(net, CRITERION, x, y), "attention": look and look.weights()}

    before = state(model)
    for _ in range(2):  # compiled now, then found compiled
        found, expected = seen(model), seen(plain)
        assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(found["edited"], found["logits"], rtol=1e-2)
        with torch.no_grad():
            assert_close(model(x), expected["untouched"], rtol=1e-3, atol=1e-5)
    assert not differences(before, state(model))


@traced
def test_taps_at_every_step_compile_once(model, compiler):
    counter, y = CompileCounter(), torch.eye(5)[:2]
    compile_stages(model.eval(), backend=counter)
    frames = []
    for lam in torch.arange(3) / 3:
        with edit(model, "layer2", lambda feature, lam=lam: lam * feature):
            model(X)
        with record(model, "layer2"):
            model(X)
        saliency(model, CRITERION, X, y)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2] > 0


@traced
@pytest.mark.parametrize("name", ["resnet18_cifar", DEIT])
def test_a_tap_on_a_model_compiled_as_a_whole_works_or_is_refused_but_never_ignored(name, compiler):
    model, (x, _) = backbone(name).eval(), photos()
    second = stages(model)[1]
    with record(model, second) as expected:
        plain = model(x)
    model.compile(backend="eager")
    assert_close(model(x), plain)
    for tap in (record(model, second), edit(model, second, lambda feature: feature + 1)):
        try:
            with tap as outputs:
                logits = model(x)
        except RuntimeError as error:
            assert "did not fire" in str(error)
            continue
        assert torch.allclose(outputs[second], expected[second]) if outputs else not torch.allclose(logits, plain)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("pvt_tiny", "moganet_tiny")])
def test_with_activation_checkpointing_a_tap_is_right_or_refused(name, request):
    model, (x, y) = backbone(name, drop_path_rate=0.0).eval(), photos()
    lam, second = torch.tensor(0.3), stages(model)[1]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def edited():
        with edit(model, second, lambda h: torch.lerp(h.flip(0), h, lam) * h):
            loss = model(x).square().sum()
        return gradients(loss)

    def recorded():
        with record(model, second) as outputs:
            logits = model(x)
        return gradients(logits.square().sum() + outputs[second].square().sum())

    def looked():
        with attention(model) if name in ATTENTIVE else contextlib.nullcontext() as look:
            loss = model(x).square().sum()
        return {"saliency": saliency(model, CRITERION, x, y), "attention": look and look.weights(), **gradients(loss)}

    plain = {run: run() for run in (edited, recorded, looked)}
    model.set_grad_checkpointing(True)
    assert_close(looked(), plain[looked])
    refused = {edited: rf"no tap on '{second}' of .* while it checkpoints activations"}
    refused[recorded] = "did not fire|while it checkpoints activations"
    request.addfinalizer(lambda: set_reentrant_ckpt(False))
    for run, reentrant in ((edited, False), (recorded, False), (recorded, True)):
        set_reentrant_ckpt(reentrant)
        # timm checkpoints inside of the stages of these and not across them
        if name in (SWIN, "convnext_tiny") or (name == DEIT and run is recorded and not reentrant):
            assert_close(run(), plain[run])
        else:
            with pytest.raises(RuntimeError, match=refused[run]):
                run()
        assert hooks(model) == 0
    with edit(model, "", lambda images: images.flip(0)):
        flipped = model(x)
    assert_close(flipped, model(x.flip(0)))


@pytest.fixture
def saved(model, tmp_path):
    """A trained model in a folder, in the format of a run."""
    save_for_hf(model, tmp_path / "teacher", safe_serialization=True)
    return tmp_path / "teacher"


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_frozen_teacher_has_the_weights_that_were_saved_and_never_leaves_evaluation_mode(model, saved, prefix):
    generators = global_rngs()
    teacher = Frozen(f"{prefix}{saved}")
    assert not differences(generators, global_rngs())
    with torch.no_grad():
        expected = model.eval()(X)
    parent = nn.Sequential(teacher, nn.Linear(5, 5)).train()
    teacher.train()
    assert all(torch.equal(teacher(X), expected) for _ in range(2))
    assert not any(module.training for module in (teacher, *teacher.model.modules()))
    assert repr(teacher) == f"Frozen('{prefix}{saved}')" and not teacher(X).requires_grad
    assert [name for name, _ in parent.named_parameters()] == list(parent.state_dict()) == ["1.weight", "1.bias"]
    assert not list(parent.buffers())
    parent.requires_grad_(True)
    images = X.clone().requires_grad_()
    parent(images).sum().backward()
    assert images.grad.any()
    assert all(not p.requires_grad and p.grad is None for p in teacher.model.parameters())
    assert not any(isinstance(resets, nn.BatchNorm2d) for resets in parent.modules())


def test_a_module_is_frozen_as_a_copy_and_a_copy_of_that_has_a_model_of_its_own(model):
    with unchanged(model):
        teacher = Frozen(model)
    expected = teacher(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(teacher(X), expected) and repr(teacher) == "Frozen('ResNet')"
    parent = nn.Sequential(teacher).to(memory_format=torch.channels_last)
    assert teacher.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not equal(copy.deepcopy(parent)[0].model, teacher.model)


@pytest.mark.parametrize("network", ["offline", "no network"])
def test_weights_out_of_reach_are_one_line_at_once_and_cached_ones_load(network, saved, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    endpoint, before = f"http://127.0.0.1:{free_port()}", network == "offline"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", before)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    out_of_reach = "HF_HUB_OFFLINE is set" if before else f"{endpoint} cannot be reached"
    for name, reason in {
        "resnet18.a1_in1k": f"not on this machine, and {out_of_reach}",
        "hf-hub:someone/nothing": f"not on this machine, and {out_of_reach}",
        "resnet18.no_such": "Invalid pretrained tag (no_such) for resnet18",
        "no_such_model": "Unknown model (no_such_model)",
        "empty": "empty: config.json cannot be read: [Errno 2] No such file or directory: 'empty/config.json'",
    }.items():
        with pytest.raises(ValueError) as caught:
            Frozen(name)
        assert str(caught.value) == (
            f"no weights for the teacher '{name}' ({reason}); expected timm weights such as "
            "'resnet18.tv_in1k', hf-hub:owner/name, or a run folder"
        )
        assert huggingface_hub.constants.HF_HUB_OFFLINE is before
    with pytest.raises(UserError) as caught:
        load_model("resnet18.a1_in1k")
    assert str(caught.value) == f"cannot load model 'resnet18.a1_in1k': not on this machine, and {out_of_reach}"
    assert capfd.readouterr() == ("", "")  # the Hub's client reports each of its attempts

    repo, commit = tmp_path / "cache/models--someone--net", "0123456789012345678901234567890123456789"
    shutil.copytree(saved, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert torch.equal(Frozen("hf-hub:someone/net")(X), Frozen(str(saved))(X))


def test_what_the_hub_answered_is_said_in_a_few_words(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    errors = huggingface_hub.errors
    unknown, busy = (SimpleNamespace(headers={}, request=None, status_code=status) for status in (None, 429))
    words = "404 Client Error. (Request ID: 1)\n\nRepository Not Found for url: http://hub"
    nobody = errors.RepositoryNotFoundError(words, response=unknown)
    missing = errors.LocalEntryNotFoundError("not in the cache")
    for error, cause, why in (
        (nobody, None, "the Hub has no such repository, or does not show it without a token"),
        (OSError(), None, "OSError"),
        (missing, errors.HfHubHTTPError("", response=busy), "not on this machine, and the Hub answered 429"),
        *((missing, e, "not on this machine, and http://hub cannot be reached") for e in (OSError(), None)),
    ):
        error.__cause__ = cause
        assert taps.why(error) == why


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_tiny_patch16_224", {"depth": 9999, "embed_dim": 9999, "num_heads": 3}),
        ("vit_tiny_patch16_224", {"depth": 9999}),
        ("test_vit", {"depth": 30}),  # a little more than there is
        ("resnet18", {"layers": [2, 2, 9999, 2]}),
        (SWIN, {"window_size": 100, "img_size": 3200}),  # buffers, not parameters
    ],
)
def test_a_configuration_of_more_numbers_than_the_weights_is_never_built(saved, architecture, args, monkeypatch):
    config = json.loads((saved / "config.json").read_text()) | {"architecture": architecture, "model_args": args}
    (saved / "config.json").write_text(json.dumps(config))
    if architecture == "test_vit":  # this much: 30 layers of 64 channels have 1.5 million numbers
        (saved / "model.safetensors").write_bytes(bytes(10**6))
    create, devices, began = timm.create_model, [], time.monotonic()
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: devices.append(torch.empty(0).device.type) or create(*a, **k)
    )
    with pytest.raises(NoWeights, match=r"config.json describes (more than )?[\d,]+ numbers, the weights hold fewer"):
        weights.load(saved, "a stranger's")
    assert devices == ["meta"] and time.monotonic() - began < 30
    assert not torch.nn.modules.module._global_parameter_registration_hooks
