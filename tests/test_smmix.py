"""SMMix: squares, pasting and the three losses against loops, and its cost in counted operations."""

import copy
import functools
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from resuming import Reference, log
from scipy import stats
from test_taps import ATTENTIVE, CRITERION, backbone, photos
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixers import SMMix, Step, build
from mixers.smmix import divergence, means, squares
from mixers.testing import batch, differences, footprint, global_rngs

LEVEL = 1e-3


def attention_by_hand(model: nn.Module, x: Tensor, of_class_token: bool = False) -> Tensor:
    """Shares (B, h, w) of attention of one query, or the mean over patches, head by head from the layer's weights."""
    model.eval()
    seen: list[Tensor] = []
    if hasattr(model, "blocks"):
        looked = layer = model.blocks[-1].attn
    elif hasattr(model, "layers"):
        looked = model.layers[-1].blocks[-1].attn.attn_drop
    else:
        looked = model.stages[-1].layers[-1].attention.self.dropout
    hook = looked.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    (found,) = seen
    if hasattr(model, "blocks"):
        maps, heads = [], layer.num_heads
        weights, biases = layer.qkv.weight.chunk(3 * heads), layer.qkv.bias.chunk(3 * heads)
        for head in range(heads):
            q, k = (found @ weights[part].T + biases[part] for part in (head, heads + head))
            maps.append((q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2))
        found = torch.stack(maps, 1).detach()
    prefix = 0 if hasattr(model, "layers") else 1
    queries = found[:, :, :1] if of_class_token else found[:, :, prefix:]
    share = queries[..., prefix:].mean((1, 2))
    side = int(share.shape[1] ** 0.5)
    return (share / share.sum(1, keepdim=True)).view(len(x), side, side)


def slow_square(attention: Tensor, side: int, sign: int) -> tuple[int, int]:
    """First cell of the square with the largest sum times ``sign``."""
    height, width = attention.shape
    sums = {}
    for top, left in np.ndindex(height - side + 1, width - side + 1):
        sums[top, left] = sign * sum(attention[top + i, left + j].item() for i, j in np.ndindex(side, side))
    return max(sums, key=lambda at: sums[at])


def grids(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    shares = np.random.default_rng(seed).dirichlet(np.ones(height * width), count)
    return torch.from_numpy(shares).view(-1, height, width)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(14, 14, 3), (14, 14, 10), (7, 7, 5), (4, 9, 3), (1, 1, 1), (3, 3, 3)]
)
def test_squares_are_those_of_least_and_most_attention(height: int, width: int, side: int) -> None:
    attention = grids(6, height, width)
    least, most = squares(attention, side)
    assert least.tolist() == [list(slow_square(a, side, -1)) for a in attention]
    assert most.tolist() == [list(slow_square(a, side, 1)) for a in attention]


@pytest.mark.parametrize(("height", "width", "pixels"), [(14, 14, 2), (7, 7, 3), (5, 8, 2), (2, 2, 4), (1, 1, 4)])
def test_the_partners_most_attended_square_lies_over_the_least_attended_one(height, width, pixels) -> None:
    attention = grids(5, height, width, seed=1)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((5, 3, height * pixels, width * pixels)))
    y = torch.eye(5)
    for i in range(6):
        plan = SMMix().plan(x, y, np.random.default_rng((3, i)), attention)
        mixed, target = SMMix().mix(x, y, **plan)
        index = plan["index"].tolist()
        area = height * width - plan["mask"][0].sum().item() / pixels**2
        side = round(area**0.5)
        assert side**2 == area
        for n in range(5):
            expected, mask = x[n].clone(), torch.ones(x.shape[2:])
            top, left = slow_square(attention[n], side, -1)
            above, before = slow_square(attention[index[n]], side, 1)
            for row, column in np.ndindex(side * pixels, side * pixels):
                there = x[index[n], :, above * pixels + row, before * pixels + column]
                expected[:, top * pixels + row, left * pixels + column] = there
                mask[top * pixels + row, left * pixels + column] = 0
            assert torch.equal(mixed[n], expected) and torch.equal(plan["mask"][n, 0], mask)
            lam = 1 - side**2 / (height * width)
            assert plan["lam"][n].item() == pytest.approx(lam) == pytest.approx(mask.mean().item())
            torch.testing.assert_close(target[n], lam * y[n] + (1 - lam) * y[index[n]])


@pytest.mark.parametrize(
    ("height", "width", "low", "high"),
    [(14, 14, 3, 10), (7, 7, 1, 5), (7, 14, 1, 5), (4, 4, 1, 3), (2, 3, 1, 1), (1, 1, 1, 1)],
)
def test_the_side_is_uniform_from_a_quarter_to_three_quarters(height: int, width: int, low: int, high: int) -> None:
    attention = torch.full((1, height, width), 1 / (height * width))
    x, y = torch.zeros(1, 3, height, width), torch.ones(1, 2)
    rng = np.random.default_rng(4)
    plans = [SMMix().plan(x, y, rng, attention) for _ in range(600)]
    sides = Counter(round((height * width - plan["mask"].sum().item()) ** 0.5) for plan in plans)
    assert set(sides) == set(range(low, high + 1))
    assert low == high or stats.chisquare(list(sides.values())).pvalue > LEVEL


def test_means_are_over_disjoint_tokens() -> None:
    tokens = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 6, 4)))
    own = torch.tensor([[1.0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    found = means(tokens, own)
    for n in range(2):
        for side, value in enumerate((1, 0)):
            chosen = [tokens[n, p] for p in range(6) if own[n, p] == value]
            torch.testing.assert_close(found[n, side], sum(chosen) / len(chosen))
    torch.testing.assert_close(found[2], torch.stack([torch.zeros(4).double(), tokens[2].mean(0)]))


def test_divergence_is_the_sum_over_classes_and_zero_for_the_blended_logits() -> None:
    rng = np.random.default_rng(6)
    logits, clean = (torch.from_numpy(rng.standard_normal((4, 5))) for _ in range(2))
    index, lam = torch.tensor([2, 0, 3, 1]), torch.tensor([0.25, 0.5, 1.0, 0.0])
    found = divergence(logits, clean, index, lam)
    for n in range(4):
        aim = (lam[n].item() * clean[n] + (1 - lam[n].item()) * clean[index[n]]).softmax(0)
        said = logits[n].softmax(0)
        expected = sum(aim[k].item() * np.log(aim[k].item() / said[k].item()) for k in range(5))
        assert found[n].item() == pytest.approx(expected) and expected > 0
    blended = lam[:, None] * clean + (1 - lam[:, None]) * clean[index]
    torch.testing.assert_close(divergence(blended + 3, clean, index, lam), torch.zeros(4).double(), atol=1e-7, rtol=0)


def final_tokens(model: nn.Module, features: Tensor) -> Tensor:
    """The patches (B, h*w, C) among what ``forward_features`` returns, whose last layer is the norm."""
    return features.flatten(1, 2) if features.ndim == 4 else features[:, 1:]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_step_is_its_three_losses_and_their_gradients(name: str) -> None:
    model = backbone(name, drop_path_rate=0.0).train()
    with torch.no_grad():
        for p in model.parameters():  # away from the small initial weights, with which all attention is alike
            p.mul_(3) if p.ndim > 1 else p
    x, y = photos()
    y = 0.9 * y + 0.02
    step = Step(model, SMMix(), CRITERION)
    plain, head = copy.deepcopy(model), copy.deepcopy(step.mixer.head)
    before, rngs = footprint(model), global_rngs()
    out = step(x, y, np.random.default_rng(7))
    assert not differences(before, footprint(model)) and not differences(rngs, global_rngs())
    out.loss.backward()

    attention = attention_by_hand(copy.deepcopy(plain), x)
    side = round(((out.plan["mask"][0] == 0).sum().item() / (64 // attention.shape[1]) ** 2) ** 0.5)
    index, lam = out.plan["index"].tolist(), 1 - side**2 / attention[0].numel()
    with torch.no_grad():
        clean = copy.deepcopy(plain).eval()(x)
    mixed, _ = step.mixer.mix(x, y, **out.plan)
    features = plain.forward_features(mixed)
    logits, tokens = plain.forward_head(features), final_tokens(plain, features)
    mix, fine, consistency = [], [], []
    for n in range(4):
        top, left = slow_square(attention[n], side, -1)
        width = attention.shape[2]
        pasted = {(top + i) * width + left + j for i in range(side) for j in range(side)}
        groups = [[p for p in range(tokens.shape[1]) if (p in pasted) == inside] for inside in (False, True)]
        of_own, of_partner = (head(torch.stack([tokens[n, p] for p in group]).mean(0)) for group in groups)
        expected = lam * y[n] + (1 - lam) * y[index[n]]
        mix.append(-(expected * logits[n].log_softmax(0)).sum())
        fine.append(-((y[n] * of_own.log_softmax(0)).sum() + (y[index[n]] * of_partner.log_softmax(0)).sum()) / 2)
        aim = (lam * clean[n] + (1 - lam) * clean[index[n]]).softmax(0)
        consistency.append((aim * (aim.log() - logits[n].log_softmax(0))).sum())
    losses = {"mix": mix, "fine": fine, "consistency": consistency}
    parts = {key: sum(values) / 4 for key, values in losses.items()}
    assert set(out.logs) == set(parts)
    for key, part in parts.items():
        assert out.logs[key].item() == pytest.approx(part.item(), rel=1e-4, abs=1e-6), key
    sum(parts.values()).backward()
    ours = dict(model.named_parameters()) | {f"h.{k}": p for k, p in step.mixer.head.named_parameters()}
    theirs = dict(plain.named_parameters()) | {f"h.{k}": p for k, p in head.named_parameters()}
    for key, p in ours.items():
        scale = theirs[key].grad.abs().max().item()
        torch.testing.assert_close(p.grad, theirs[key].grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=key)


def test_the_head_for_tokens_is_trained_in_one_branch_touched_in_the_other_and_not_exported(transformer) -> None:
    step = Step(transformer, build("smmix"), CRITERION)
    x, y = batch()
    seen = set()
    for i in range(6):
        step.zero_grad()
        out = step(x, y, np.random.default_rng((8, i)))
        out.loss.backward()
        grad = step.mixer.members()[1].head.weight.grad
        assert bool(grad.any()) == (out.plan["choice"] == 1) == ("fine" in out.logs)
        seen.add(out.plan["choice"])
    assert seen == {0, 1}
    assert step.mixer.models(transformer) == {"": transformer}
    assert {k for k in step.state_dict() if k.startswith("mixer.")} == {
        f"mixer.mixers.1.head.{k}" for k in ("weight", "bias")
    }
    (group,) = step.mixer.param_groups(0.1, 0.05)
    assert set(group) == {"params"} and len(group["params"]) == 2


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_tiny", "swin_tiny_patch4_window7_224"])
def test_a_step_looks_at_the_clean_images_in_evaluation_mode_without_gradient(name: str) -> None:
    model = backbone(name).train()
    x, y = photos()
    passes: list[tuple] = []

    def keep(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        modes = {module.training for module in model.modules()}
        passes.append((modes, output.requires_grad, args[0].clone()))

    step = Step(model, SMMix(), CRITERION)
    hook = model.register_forward_hook(keep)
    out = step(x, y, np.random.default_rng(12))
    hook.remove()
    (looked, graph, images), (trained, kept, mixed) = passes
    assert (looked, graph, trained, kept) == ({False}, False, {True}, True)
    assert torch.equal(images, x) and torch.equal(mixed, step.mixer.mix(x, y, **out.plan)[0])


def test_the_look_costs_no_gradient_under_autocast_and_one_image_of_one_token_trains(transformer) -> None:
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # its cache of weights in bfloat16 outlives the look
        out = Step(transformer, SMMix(), CRITERION)(x, y, np.random.default_rng(9))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in transformer.named_parameters() if p.ndim > 1)
    assert out.logs["consistency"].dtype == torch.float32
    x, y = batch(1, 8, 8)
    out = Step(transformer, SMMix(), CRITERION)(x, y, np.random.default_rng(10))
    assert torch.isfinite(out.loss) and out.plan["lam"].tolist() == [0.0]
    assert torch.equal(SMMix().mix(x, y, **out.plan)[0], x)  # it is its own partner


def test_models_and_images_without_what_it_takes_are_refused(model, transformer) -> None:
    x, y = torch.zeros(2, 3, 30, 32), torch.eye(2)
    with pytest.raises(ValueError, match="multiples of those of the token grid, got 30 x 32 pixels, 4 x 4 tokens"):
        SMMix().plan(x, y, np.random.default_rng(11), grids(2, 4, 4))
    with pytest.raises(ValueError, match=r"ResNet has no attention .* deit_small_patch16_224"):
        Step(model, build("smmix"), CRITERION)
    transformer.reset_classifier(0)
    with pytest.raises(ValueError, match=r"one linear classifier .* VisionTransformer lacks; .* swin_tiny"):
        Step(transformer, SMMix(), CRITERION)


# ------------------------------------------------------------------------------------------------ cost


@functools.cache
def operations(mixer: str, size: int = 224) -> int:
    """Counted floating-point operations of a forward and backward pass of DeiT-S on 2 images."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        step = Step(model, build(mixer), CRITERION)
        x, y = torch.zeros(2, 3, size, size), torch.zeros(2, 1000)
    with FlopCounterMode(display=False) as counter:
        step(x, y, np.random.default_rng(0)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mixer", ["smm", "token"])
def test_a_step_costs_a_third_more_and_half_of_that_is_expected(mixer: str) -> None:
    ratio = operations(mixer) / operations("vanilla")
    assert 1.3 < ratio < 1.34
    assert (1 + ratio) / 2 < 1.2  # Mixup, which costs nothing, takes the other half


# ------------------------------------------------------------------------------------------------ processes


def test_two_processes_train_like_one_that_accumulates_twice(reference: Reference) -> None:
    fixed = ("--mixer", "smmix", "--model", "test_vit", "--per_device_train_batch_size", 4, "--epochs", 1,
             "--warmup_epochs", 0)  # fmt: skip
    runs = [log(reference(*fixed, processes=n)) for n in (1, 2)]
    one, two = ([line["loss"] for line in run if line["mode"] == "train"] for run in runs)
    assert one == pytest.approx(two, rel=1e-5) and one
