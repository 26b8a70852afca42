"""MixToken against loops over tokens: where the box lies, what is mixed in which network, labels of tokens."""

import numpy as np
import pytest
import timm
import torch
from small_models import CRITERION, DEIT, SWIN, backbone, hooks, photos, unchanged
from teachers import fill
from timm.models import save_for_hf
from torch.nn import functional

from mixers import MixToken, Step
from mixers.mixtoken import token_labels
from mixers.testing import batch, rng_of


def volo(post=()):
    """A small one, whose embedding looks across patches and whose grid gets coarser; without a class token."""
    torch.manual_seed(0)
    small = {"embed_dims": (24, 48), "num_heads": (2, 4), "mlp_ratio": 2.0, "post_layers": post, "layers": (1, 1)}
    kept = {"outlook_attention": (True, False), "downsamples": (True, False), "stem_hidden_dim": 8}
    return timm.models.volo.VOLO(img_size=64, num_classes=5, global_pool="avg", **small, **kept).train()


def pvt(width=8):
    """A small one, whose embedding looks across patches and gives tokens (B, h, w, ``width``)."""
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1), "embed_dims": (width, 16, 16, 32), "num_heads": (1, 1, 1, 1)}
    return timm.create_model("pvt_v2_b0", num_classes=5, **small).train()


@pytest.mark.parametrize(("name", "cell"), [(DEIT, 16), (SWIN, 32)])
def test_a_box_of_whole_last_tokens_comes_from_the_partner_and_the_label_is_its_area(name, cell):
    model, found = backbone(name), set()
    (x, y), mixer = batch(3, 8 * cell, 4 * cell), MixToken()
    for i in range(20):
        rng = np.random.default_rng((1, i))
        lam = rng.beta(1.0, 1.0)
        height, width = x.shape[2] // cell, x.shape[3] // cell
        half = [int(side * (1 - lam) ** 0.5) // 2 for side in (height, width)]
        middle = rng.integers(height), rng.integers(width)
        partner = rng.permutation(3)
        plan = mixer.plan(x, y, np.random.default_rng((1, i)), model)
        mixed, target = mixer.mix(x, y, **plan)
        pasted = 0
        for row, column in np.ndindex(height, width):
            inside = all(m - h <= at < m + h for m, h, at in zip(middle, half, (row, column), strict=True))
            pasted += inside
            here = (..., slice(cell * row, cell * (row + 1)), slice(cell * column, cell * (column + 1)))
            for n in range(3):
                assert torch.equal(mixed[n][here], x[partner[n] if inside else n][here])
        share = 1 - pasted / (height * width)
        found.add(share)
        for n in range(3):
            torch.testing.assert_close(target[n], share * y[n] + (1 - share) * y[partner[n]])
    assert len(found) > 2
    with pytest.raises(ValueError, match=rf"sides are multiples of {cell}, got \(72, 64\)"):
        mixer.plan(*batch(3, 72, 64), rng_of(0), model)


@pytest.mark.parametrize(("make", "size"), [(pvt, 128), (lambda: pvt(32), 128), (volo, 64)])
def test_where_patches_overlap_the_tokens_are_mixed_and_not_the_images(make, size):
    model, (x, y) = make(), batch(4, size, size)
    step, passed = Step(model, MixToken(), CRITERION), []
    for i in range(30):  # until there is a box
        out = step(x, y, np.random.default_rng((2, i)))
        if 0 < out.plan["lam"][0] < 1:
            break
    assert out.plan["hidden"] and torch.equal(step.mixer.mix(x, y, **out.plan)[0], x) and not hooks(model)
    handles = [
        model.patch_embed.register_forward_hook(lambda _, __, tokens: passed.append(tokens.detach())),
        model.patch_embed.register_forward_pre_hook(lambda _, args: passed.append(args[0])),
    ]
    torch.manual_seed(1)
    again = step(x, y, np.random.default_rng((2, i)))
    for handle in handles:
        handle.remove()
    assert torch.equal(passed[0], x)
    clean = model.patch_embed(x) if make is volo else model.patch_embed(x).movedim(3, 1)
    mixed = clean.clone()
    stride = size // clean.shape[2]
    for n, row, column in np.ndindex(4, *clean.shape[2:]):
        if out.plan["mask"][n, 0, stride * row, stride * column] == 0:
            mixed[n, :, row, column] = clean[out.plan["index"][n], :, row, column]
    assert not torch.equal(mixed, clean)
    model.patch_embed.register_forward_hook(lambda *_: mixed if make is volo else mixed.movedim(1, 3))
    torch.manual_seed(1)
    torch.testing.assert_close(again.logits, model(x))


def test_a_step_with_a_teacher_is_the_loss_of_the_class_and_of_every_token(tmp_path):
    teacher = fill(timm.create_model("test_resnet", num_classes=5), seed=1).eval()
    save_for_hf(teacher, tmp_path / "teacher", safe_serialization=True)
    model, (x, y) = backbone(DEIT, drop_path_rate=0.0).train(), photos()
    step = Step(model, MixToken(teacher=str(tmp_path / "teacher"), dense_weight=0.5), CRITERION)
    with torch.no_grad():
        step.mixer.head.weight.mul_(2)  # no longer the model's
        head = teacher.fc.weight[:, :, None, None], teacher.fc.bias
        scores = functional.conv2d(teacher.forward_features(x), *head)  # 2 x 2, for the 4 x 4 tokens
    for i in range(30):
        out = step(x, y, np.random.default_rng((3, i)))
        if 0 < out.plan["lam"][0] < 1:
            break
    mixed, target = step.mixer.mix(x, y, **out.plan)
    features = model.forward_features(mixed)
    said = step.mixer.head(features[:, 1:])
    of_tokens = token_labels(teacher, x, torch.Size((4, 4)))
    torch.testing.assert_close(of_tokens, slow_labels(scores, 4))
    tokens = 0.0
    for n, at in np.ndindex(4, 16):
        own = out.plan["mask"][n, 0, 16 * (at // 4), 16 * (at % 4)] == 1
        aim = of_tokens[n if own else out.plan["index"][n], at]
        tokens -= (aim * said[n, at].log_softmax(0)).sum().item() / 64
    assert out.logs["tokens"].item() == pytest.approx(0.5 * tokens, rel=1e-4)
    assert out.logs["mix"].item() == pytest.approx(CRITERION(model(mixed), target).mean().item(), rel=1e-5)
    out.loss.backward()
    assert step.mixer.head.weight.grad.any() and list(step.mixer.state_dict()) == ["head.weight", "head.bias"]
    assert step.mixer.one_label and not MixToken().one_label


def slow_labels(scores, side):
    """Bilinear, from cell centre to cell centre, the border repeated; then a softmax."""
    small, found = scores.shape[2], []
    for row, column in np.ndindex(side, side):
        total = 0.0
        places = [(at + 0.5) * small / side - 0.5 for at in (row, column)]
        for a, b in np.ndindex(small + 2, small + 2):
            weight = np.prod([max(0.0, 1 - abs(p - (k - 1))) for p, k in zip(places, (a, b), strict=True)])
            total = total + weight * scores[:, :, min(max(a - 1, 0), small - 1), min(max(b - 1, 0), small - 1)]
        found.append(total.softmax(1))
    return torch.stack(found, 1)


def test_what_cannot_be_is_refused_in_words(model, transformer, tmp_path):
    with pytest.raises(ValueError, match="patch embedding, which ResNet lacks; use deit_small"):
        Step(model, MixToken(), CRITERION)
    save_for_hf(timm.create_model("test_resnet", num_classes=7), tmp_path / "seven", safe_serialization=True)
    with pytest.raises(ValueError, match="seven' knows 7 classes, expected 5, those of the model"):
        Step(transformer, MixToken(teacher=str(tmp_path / "seven")), CRITERION)
    save_for_hf(timm.create_model("test_resnet", num_classes=5), tmp_path / "five", safe_serialization=True)
    swin = Step(backbone(SWIN), MixToken(teacher=str(tmp_path / "five")), CRITERION)
    out = swin(*photos(), rng_of(0))
    assert set(out.logs) == {"mix", "tokens"} and out.loss.isfinite()


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        (
            "xcit_nano_12_p16_224",
            {"depth": 1},
            "gives a token for every 16 pixels, that of Xcit does not; use deit_small",
        ),
        ("pit_ti_224", {}, "for every 8 pixels, that of PoolingVisionTransformer does not; use deit_small"),
        ("mvitv2_tiny", {}, "MultiScaleVit publishes stages that it does not have .*; use deit_small"),
        ("crossvit_tiny_240", {}, "which CrossVit lacks; use deit_small"),
    ],
)
def test_a_model_that_cannot_be_mixed_is_refused_before_the_first_step(name, args, says):
    model = timm.create_model(name, num_classes=5, **args)
    with unchanged(model), pytest.raises(ValueError, match=says):
        Step(model, MixToken(), CRITERION)


def test_a_teacher_is_refused_at_once_where_the_class_token_cannot_be_told_from_the_last_tokens():
    with pytest.raises(
        ValueError, match="last tokens of VOLO from its class token; leave the teacher out, or use deit"
    ):
        Step(volo(("ca",)), MixToken(teacher="resnet18"), CRITERION)
    assert Step(volo(("ca",)), MixToken(), CRITERION)
