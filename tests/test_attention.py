"""Attention is looked at from outside: what a layer multiplies its values by, or an error in words."""

import copy

import pytest
import timm
import torch
from small_models import (
    ATTENTIVE,
    BACKBONES,
    CRITERION,
    DEIT,
    DROPOUTS,
    SWIN,
    attention_unfused,
    backbone,
    hooks,
    photos,
    unchanged,
)
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.testing import assert_close

from mixers.taps import attention


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
