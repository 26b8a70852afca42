"""Looking into and editing models from outside: on plain timm models, without a trace, loud when it does not work."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from small_models import BACKBONES, CRITERION, FAMILIES, X, backbone, hooks, photos, unchanged
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from mixers import Step, Vanilla, taps
from mixers.taps import edit, record, saliency, stages
from mixers.testing import batch, differences, rng_of


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
