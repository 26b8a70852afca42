"""MergeMix and the merging of tokens against loops over patches: groups, masks, labels, losses, models."""

import copy

import numpy as np
import pytest
import torch
from small_models import CRITERION, DEIT, backbone, hooks, photos, traced, unchanged

from mixers import MergeMix, Mixup, Step, Vanilla, build, taps
from mixers.mergemix import rescaled
from mixers.taps.merging import destinations, schedule
from mixers.testing import batch

PUBLISHED = {
    (12, 49): [12, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2],  # DeiT-S on ImageNet
    (12, 98): [8, 12, 11, 10, 10, 9, 8, 7, 7, 6, 5, 5],  # on CIFAR-100
}


def test_the_schedule_falls_makes_each_merge_and_is_the_published_one():
    for (depth, total), counts in PUBLISHED.items():
        assert schedule(depth, total) == counts
    for depth in (1, 2, 4, 12, 24):
        for total in (0, 1, 5, 49, 147):
            counts = schedule(depth, total)
            assert sum(counts) == total and len(counts) == depth
            assert counts[1:] == sorted(counts[1:], reverse=True)


def slow_destinations(metric, prefix, count):
    """The numbers of one image's tokens after the merges, by sorting pairs."""
    places = range(prefix, len(metric))
    even, odd = ([i for i in places if i % 2 == parity] for parity in (0, 1))

    def alike(i, j):
        return (metric[i] @ metric[j] / metric[i].norm() / metric[j].norm()).item()

    nearest = {i: max(odd, key=lambda j: alike(i, j)) for i in even}
    gone = sorted(even, key=lambda i: alike(i, nearest[i]), reverse=True)[:count]
    left = [*range(prefix), *(i for i in even if i not in gone), *odd]
    return [left.index(nearest[i] if i in gone else i) for i in range(len(metric))]


@pytest.mark.parametrize(("tokens", "prefix"), [(17, 1), (16, 0), (27, 2), (10, 5), (6, 1)])
def test_the_most_similar_even_places_join_their_nearest_odd_place_and_prefix_tokens_none(tokens, prefix):
    metric = torch.from_numpy(np.random.default_rng(tokens).standard_normal((3, tokens, 4)))
    for count in {1, (tokens - prefix) // 2}:
        found = destinations(metric, prefix, count)
        assert found.tolist() == [slow_destinations(one, prefix, count) for one in metric]
        assert [set(row) for row in found.tolist()] == [set(range(tokens - count))] * 3


def slow_look(model, x, share):
    """Attention of the last block (heads, N, N), groups after each block, and the last tokens, of one image."""
    x = model._pos_embed(model.patch_embed(x[None]))[0]
    prefix, sizes = model.num_prefix_tokens, [1] * len(x)
    groups = [[*range(prefix, len(x))]]
    for block, count in zip(model.blocks, schedule(len(model.blocks), round(share * (len(x) - prefix))), strict=True):
        layer, y = block.attn, block.norm1(x)
        q, k, v = layer.qkv(y).view(len(x), 3, layer.num_heads, -1).permute(1, 2, 0, 3)
        weights = (q * layer.scale @ k.mT).softmax(2)
        x = x + layer.proj((weights @ v).transpose(0, 1).flatten(1))
        count = min(count, (len(x) - prefix) // 2)
        to = slow_destinations(k.mean(0), prefix, count)
        members = [[i for i, token in enumerate(to) if token == new] for new in range(len(x) - count)]
        x = torch.stack([sum(sizes[i] * x[i] for i in ms) / sum(sizes[i] for i in ms) for ms in members])
        sizes = [sum(sizes[i] for i in ms) for ms in members]
        groups.append([to[token] for token in groups[-1]])
        x = x + block.mlp(block.norm2(x))
    return weights, groups, model.norm(x)


def sharpened() -> torch.nn.Module:
    """A small DeiT that looks at one patch more than at another."""
    model = backbone(DEIT, drop_path_rate=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p
    return model


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_look_merges_as_the_loops_do_and_leaves_the_model_as_it_was(share):
    model, (x, _) = sharpened().train(), photos()
    with unchanged(model), taps.looking(model), taps.merging(model, share) as groups, taps.attention(model) as look:
        logits = model(x)
    assert hooks(model) == 0 and all("forward" not in vars(block) for block in model.blocks)
    assert not logits.requires_grad and all(block.attn.fused_attn for block in model.blocks)
    for n in range(2):
        with torch.no_grad():
            weights, expected, tokens = slow_look(copy.deepcopy(model).eval(), x[n], share)
            torch.testing.assert_close(logits[n], model.head(tokens[0]), rtol=1e-3, atol=1e-4)
        assert [group[n].tolist() for group in groups] == expected
        torch.testing.assert_close(look.weights()[n], weights, rtol=1e-3, atol=1e-5)
        for released in (False, True):
            where = MergeMix(merged=share, as_released=released).attention(model, x)[n].flatten()
            scores = weights.mean(0)[:, 0] if released else weights.mean(0)[0]
            slow = torch.stack([scores[token] for token in expected[-1 if released else -2]])
            torch.testing.assert_close(where, slow, rtol=1e-3, atol=1e-6)


def test_a_look_that_merges_nothing_is_the_plain_model():
    model, (x, _) = backbone(DEIT).eval(), photos()
    with torch.no_grad(), taps.merging(model, 0.0) as groups:
        logits = model(x)
    assert torch.equal(logits, model(x).detach()) and len(groups) == 5
    assert torch.equal(groups[-1], groups[0]) and groups[0][0].tolist() == [*range(1, 17)]


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (5, 8), (2, 3), (1, 1)])
def test_the_most_attended_patches_stay_each_of_exactly_the_share_rounded_down(height, width):
    attention = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (5, height, width)) / 7.0)  # with equal ones
    x, y = torch.rand(5, 3, 2 * height, 2 * width), torch.eye(5)
    for i in range(6):
        plan = MergeMix(0.5).plan(x, y, np.random.default_rng((2, i)), attention)
        rng = np.random.default_rng((2, i))
        count = int(rng.beta(0.5, 0.5) * height * width)
        assert plan["index"].tolist() == rng.permutation(5).tolist()
        mixed, target = MergeMix().mix(x, y, **plan)
        for n, partner in enumerate(plan["index"].tolist()):
            order = sorted(np.ndindex(height, width), key=lambda at: -attention[n][at].item())[:count]
            mask = torch.zeros(2 * height, 2 * width)
            for row, column in order:
                mask[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 1
            assert torch.equal(plan["mask"][n, 0], mask)
            assert torch.equal(mixed[n], torch.where(mask > 0, x[n], x[partner]))
            lam = count / (height * width)
            assert plan["lam"][n].item() == pytest.approx(lam)
            torch.testing.assert_close(target[n], lam * y[n] + (1 - lam) * y[partner])


@pytest.mark.parametrize(("base", "made"), [(None, Vanilla()), ({"mixup": {"alpha": 0.8}}, Mixup(0.8))])
def test_a_step_is_a_look_in_evaluation_mode_and_a_loss_of_each_of_two_batches(base, made):
    model, (x, y), passes = sharpened().train(), photos(), []
    y, mixer = 0.9 * y + 0.02, build("mergemix", base=base)
    step, plain = Step(model, mixer, CRITERION), copy.deepcopy(model)
    model.register_forward_hook(
        lambda _, args, output: passes.append(({m.training for m in model.modules()}, output.requires_grad, *args))
    )
    out = step(x, y, np.random.default_rng(4))
    out.loss.backward()
    rng = np.random.default_rng(4)
    plan = mixer.plan(x, y, rng, mixer.attention(plain, x))
    second, aim = made.mix(x, y, **made.plan(x, y, rng))  # what the base draws comes behind
    mixed, target = mixer.mix(x, y, **plan)
    assert [one[:2] for one in passes] == [({False}, False), ({True}, True), ({True}, True)]
    assert all(torch.equal(found[2], images) for found, images in zip(passes, (x, second, mixed), strict=True))
    losses = {"mix": CRITERION(plain(mixed), target).mean(), "base": CRITERION(plain(second), aim).mean()}
    assert {k: v.item() for k, v in out.logs.items()} == pytest.approx({k: v.item() for k, v in losses.items()})
    sum(losses.values()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def test_the_rescaled_label_spans_0_to_1_and_knows_neither_mean_nor_deviation():
    one, other = (rescaled(share, mean, 64, np.random.default_rng(5)) for share, mean in ((0.9, 0.25), (0.2, 0.5)))
    assert one.min() == 0 and one.max() == pytest.approx(1, abs=1e-4) and one == pytest.approx(other, abs=1e-4)
    assert rescaled(0.0, 0.25, 3, np.random.default_rng(5)).tolist() == [0, 0, 0]
    x, y = torch.rand(6, 3, 8, 8), torch.eye(6)
    plan = MergeMix(rescale=True).plan(x, y, np.random.default_rng(6), torch.rand(6, 4, 4))
    rng = np.random.default_rng(6)
    lam, index = rng.beta(1, 1), rng.permutation(6)
    assert plan["lam"].tolist() == pytest.approx(rescaled(int(16 * lam) / 16, 0.25, 6, rng).tolist())
    assert plan["index"].tolist() == index.tolist()


def test_other_prefix_tokens_no_class_token_and_one_patch_do_too():
    x, y = photos()
    for args in ({"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}):
        model = backbone(DEIT, **args)
        out = Step(model, MergeMix(), CRITERION)(x, y, np.random.default_rng(8))
        assert torch.isfinite(out.loss) and out.plan["mask"].shape == (4, 1, 64, 64)
    model = backbone(DEIT, img_size=16)
    out = Step(model, MergeMix(), CRITERION)(x[:1, :, :16, :16], y[:1], np.random.default_rng(9))
    assert torch.isfinite(out.loss) and out.plan["lam"].tolist() == [0.0]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "pvt_tiny", "convnext_tiny"])
def test_models_that_are_no_plain_vision_transformer_are_refused_with_some_that_are(name):
    with pytest.raises(ValueError, match="deit_small_patch16_224"):
        Step(backbone(name), MergeMix(), CRITERION)


def test_bases_that_do_more_than_mix_images_and_images_that_do_not_fit_the_patches_are_refused():
    with pytest.raises(ValueError, match=r"base must be a mixer that only mixes images, such as Mixup\(\), got Mani"):
        build("mergemix", base="manifoldmix")
    with pytest.raises(ValueError, match="multiples of those of the token grid, got 30 x 32 pixels, 4 x 4 tokens"):
        MergeMix().plan(torch.zeros(2, 3, 30, 32), torch.eye(2), np.random.default_rng(9), torch.ones(2, 4, 4))


@traced
def test_a_compiled_model_runs_uncompiled_in_the_look_alone():
    x, y = batch(2, 64, 64)
    losses = []
    for compiled in (False, True):
        model = backbone(DEIT, drop_path_rate=0.0)
        if compiled:
            taps.compile_stages(model, backend="eager")
        losses.append(Step(model, MergeMix(), CRITERION)(x, y, np.random.default_rng(10)).loss.item())
        assert not compiled or all(block._compiled_call_impl is not None for block in model.blocks)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
