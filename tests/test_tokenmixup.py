"""TokenMixup against loops: partners by trying all, tokens and labels one by one, the step with a model taken apart."""

import itertools

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import linear_sum_assignment
from small_models import CRITERION, DEIT, SWIN, attention_unfused, backbone, photos, unchanged
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixers import Step, TokenMixup, build
from mixers.testing import batch, differences, rng_of
from mixers.tokenmixup import assigned, auctioned, difficulty, matched

EASY = {"tau": 1.0, "rho": 0.0}  # every sample is easy, every token that is more salient moves


def attended(count: int, tokens: int, seed: int = 0, sharpness: float = 1.0) -> torch.Tensor:
    """What a class token attends to: smooth, and less than 1 in all, as it attends to itself too."""
    draw = np.random.default_rng(seed).standard_normal((count, tokens + 1))
    smooth = np.exp(sharpness * np.stack([np.convolve(row, np.ones(9) / 3, "same") for row in draw]))
    return torch.from_numpy(smooth / smooth.sum(1, keepdims=True))[:, 1:].float()


@pytest.mark.parametrize("seed", range(6))
def test_easy_samples_get_the_partners_and_tokens_of_the_largest_gain(seed):
    saliency, rho = attended(5, 20, seed), 0.01
    easy = torch.tensor(np.random.default_rng(seed).random(5) < 0.7)
    gains = [[(b - a - rho).clamp(min=0).sum().item() for b in saliency] for a in saliency]
    rows = easy.nonzero()[:, 0].tolist()

    def total(chosen) -> float:
        return sum(gains[i][j] for i, j in zip(rows, chosen, strict=True))

    index, kept, lam = matched(saliency, easy, rho)
    best = max(total(chosen) for chosen in itertools.permutations(range(5), len(rows)))
    assert total(index[easy].tolist()) == pytest.approx(best, abs=1e-6)
    assert len({index[i].item() for i in rows}) == len(rows) and kept.dtype == saliency.dtype
    for n in range(5):
        own, partner = 0.0, 0.0
        for at in range(20):
            stays = not easy[n] or saliency[index[n], at] - saliency[n, at] <= rho
            assert kept[n, at] == stays
            own, partner = own + stays * saliency[n, at], partner + (not stays) * saliency[index[n], at]
        assert lam[n].item() == pytest.approx((own / (own + partner)).item(), abs=1e-6)
        assert easy[n] or (index[n] == n and lam[n] == 1)
    assert (lam < 1).any() or not rows
    if rows:  # as published: all are compared with the first easy one
        same, kept, _ = matched(saliency, easy, rho, "first")
        assert torch.equal(same, index)
        for n, at in np.ndindex(5, 20):
            assert kept[n, at] == (not easy[n] or saliency[index[n], at] - saliency[rows[0], at] <= rho)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 64, 128])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_a_device_does_without_reading_a_value_is_near_the_largest_sum(size, share):
    rows = torch.tensor(np.random.default_rng(size).random(size) < share)
    for sharpness, rho in ((0.3, 0.002), (1.0, 0.01), (2.0, 0.002)):
        saliency = attended(size, 196, 1, sharpness)
        gain = (saliency[None] - saliency[:, None] - rho).clamp(min=0).sum(2)
        most = gain[rows].numpy()[linear_sum_assignment(gain[rows].numpy(), maximize=True)].sum()
        for found in (assigned(gain, rows), auctioned(gain, rows)):
            assert gain[torch.arange(size), found][rows].sum().item() >= 0.98 * most - 1e-6
            assert torch.equal(found[~rows], torch.arange(size)[~rows])
            bought = [j for i, j in enumerate(found.tolist()) if i != j]
            assert len(set(bought)) == len(bought)


class Count(TorchDispatchMode):
    """Counts the operations that are dispatched in the block."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


def test_the_operations_of_an_auction_are_few_and_do_not_depend_on_the_values():
    totals = []
    for saliency in (attended(32, 49), attended(32, 49, 1, 2.0), torch.ones(32, 49)):
        gain = (saliency[None] - saliency[:, None] - 0.002).clamp(min=0).sum(2)
        with Count() as count:
            auctioned(gain, saliency[:, 0] >= 0)
        totals.append(count.total)
    assert len(set(totals)) == 1 and totals[0] <= 2000


def by_hand(model, mixer, x, y):
    """Logits, target and score of a step, block by block, in evaluation mode."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    inputs, maps = [], []
    for number, block in enumerate(model.blocks):
        seen = attention_unfused(torch.nn.Sequential(block), tokens, "0.attn.attn_drop")
        if number == mixer.at:
            scores = mixer.score(tokens[:, 0])
            easy = -(y * scores.log_softmax(1)).sum(1) / 10 <= mixer.tau
            index, kept, lam = matched(seen.mean(1)[:, 0, 1:], easy, mixer.rho)
            partner = tokens[index]
            tokens = torch.stack([torch.cat((own[:1], torch.where(stays[:, None] == 1, own[1:], other[1:])))
                                  for own, other, stays in zip(tokens, partner, kept, strict=True)])  # fmt: skip
            seen = attention_unfused(torch.nn.Sequential(block), tokens, "0.attn.attn_drop")
        inputs.append(tokens)
        maps.append(seen.mean(1)[:, 0, 1:])
        if mixer.kappa and number == mixer.vertical_at:
            more = []
            for before, where in zip(inputs[:-1], maps[:-1], strict=True):
                for n in range(len(x)):
                    best = sorted(range(where.shape[1]), key=lambda at: -where[n, at].item())[: mixer.kappa]
                    more.append((n, before[n, 0 if mixer.shifted else 1 :][best]))
            extra = torch.stack([torch.cat([t for m, t in more if m == n]) for n in range(len(x))])
            tokens = block(torch.cat((tokens, extra), 1))[:, : tokens.shape[1]]
        else:
            tokens = block(tokens)
    target = torch.stack([share * own + (1 - share) * y[j] for share, own, j in zip(lam, y, index, strict=True)])
    return model.forward_head(model.norm(tokens)), target, scores


@pytest.mark.parametrize(
    ("kappa", "shifted", "places"),
    [(0, False, (1, None)), (2, False, (1, None)), (2, True, (None, None)), (2, False, (2, 1)), (2, False, (2, 2))],
)
@pytest.mark.parametrize("detach", [True, False])
def test_a_step_is_that_of_the_model_taken_apart_and_so_are_its_gradients(kappa, shifted, places, detach):
    model, (x, y) = backbone(DEIT).eval(), photos()
    with torch.no_grad():
        for p in model.parameters():  # away from the small initial weights, with which all attention is alike
            p.mul_(3) if p.ndim > 1 else p
    args = {"tau": 0.3, "rho": 0.01, "score_weight": 0.5, "detach": detach, "kappa": kappa, "shifted": shifted}
    layer, behind = places
    step = Step(model, build("tokenmixup", layer=layer, vertical_layer=behind, **args), CRITERION)
    step.eval()
    losses = difficulty(step.mixer.score(model._pos_embed(model.patch_embed(x))[:, 0]), y)
    assert (step.mixer.at, step.mixer.vertical_at) == (layer or 1, behind or 2) and losses.isfinite().all()
    logits, target, scores = by_hand(model, step.mixer, x, y)
    score = CRITERION(scores, y).mean() * 0.5
    mix = CRITERION(logits, target).mean()
    parameters = dict(step.named_parameters())
    expected = torch.autograd.grad(mix, list(parameters.values()), allow_unused=True, retain_graph=True)
    of_score = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
    with unchanged(model):
        out = step(x, y, rng_of(0))
    assert 0 < out.plan["lam"].min() < 1
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.target, target)
    assert out.logs["mix"].item() == pytest.approx(mix.item(), rel=1e-4)
    assert out.logs["score"].item() == pytest.approx(score.item(), rel=1e-4)
    out.loss.backward()
    for name, a, b in zip(parameters, expected, of_score, strict=True):
        parts = [g for g in (a, b if not detach or name.startswith("mixer") else None) if g is not None]
        found = parameters[name].grad
        torch.testing.assert_close(found, sum(parts), rtol=1e-3, atol=1e-4 * found.abs().max().item() + 1e-6, msg=name)


def test_hard_samples_and_a_step_without_easy_ones_stay_as_they_are(transformer):
    (x, y), plain = batch(), transformer.eval()
    step = Step(plain, build("tokenmixup"), CRITERION).eval()
    nn.init.zeros_(step.mixer.score.weight), nn.init.zeros_(step.mixer.score.bias)
    out = step(x, y, rng_of(0))  # ln 5 / 10 is above 0.1
    assert torch.equal(out.target, y) and torch.equal(out.plan["index"], torch.arange(4))
    torch.testing.assert_close(out.logits, plain(x))
    with torch.no_grad():  # a score net that knows two classes
        step.mixer.score.bias.copy_(torch.tensor([3.0, 3.0, 0, 0, 0]))
    out = step(x, y, rng_of(0))
    assert (out.plan["lam"][2:] == 1).all() and torch.equal(out.plan["index"][2:], torch.tensor([2, 3]))


def test_the_score_net_is_of_the_type_of_the_model(transformer):
    x, y = batch()
    step = Step(transformer.double(), build("tokenmixup", **EASY), CRITERION)
    out = step(x.double(), y.double(), rng_of(0))
    assert step.mixer.score.weight.dtype == out.loss.dtype == torch.float64 and (out.plan["lam"] < 1).any()
    out.loss.backward()


def test_it_goes_over_a_base_that_mixes_images(transformer):
    (x, y), base = batch(), build("deit")
    step = Step(transformer, build("tokenmixup", base=base, **EASY), CRITERION)
    for i in range(4):
        out = step(x, y, rng_of(i))
        mixed, before = base.mix(x, y, **out.plan["base"])
        found, target = step.mixer.mix(x, y, **out.plan)
        assert torch.equal(found, mixed) and not differences(out.plan["base"], base.plan(x, y, rng_of(i)))
        lam = out.plan["lam"][:, None]
        torch.testing.assert_close(target, lam * before + (1 - lam) * before[out.plan["index"]])
        assert (lam < 1).any()


@pytest.mark.parametrize(("depth", "layer", "behind"), [(2, 1, None), (3, 1, 2), (7, 2, 3), (12, 3, 4)])
def test_a_quarter_of_the_blocks_go_before_unless_told(depth, layer, behind):
    model = timm.create_model(DEIT, depth=depth, embed_dim=48, num_classes=5)
    step = Step(model, build("tokenmixup", kappa=0 if behind is None else 1), CRITERION)
    assert step.mixer.at == layer and (behind is None or step.mixer.vertical_at == behind)


def test_what_cannot_be_is_refused_in_words(model, transformer):
    for net in (model, backbone(SWIN), timm.create_model("test_vit", class_token=False, global_pool="avg")):
        with pytest.raises(ValueError, match=r"needs a ViT with a class token, .* use deit_small_patch16_224"):
            Step(net, build("tokenmixup"), CRITERION)
    for wrong, says in (
        ({"layer": 6}, "layer must be below 6, the blocks of VisionTransformer, got 6"),
        ({"layer": 5, "kappa": 1}, "vertical_layer must be below 6, the blocks of VisionTransformer, got 6"),
    ):
        with pytest.raises(ValueError, match=says):
            Step(transformer, build("tokenmixup", **wrong), CRITERION)
    assert Step(transformer, TokenMixup(build("vanilla"), layer=5), CRITERION)  # nothing is vertical
