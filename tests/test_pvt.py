"""PVT-Tiny: the arithmetic of transformers' model, the published start, and images of one size."""

import math
import re

import pytest
import timm
import torch
from torch import nn

from mixers.taps import compile_stages
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import create_model

IMAGES = torch.linspace(-3, 3, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


def both(size=64, **config):
    """The model of transformers with 5 classes, and ours with its weights."""
    from transformers import PvtConfig, PvtForImageClassification

    theirs = PvtForImageClassification(PvtConfig(image_size=size, num_labels=5, **config)).eval()
    ours = timm.create_model("pvt_tiny", num_classes=5, img_size=size).eval()
    weights = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("classifier.", "head.").replace("pvt.encoder.layer_norm.", "norm.")
        key = re.sub(r"^pvt\.encoder\.patch_embeddings\.(\d)", r"stages.\1.embed", key)
        weights[re.sub(r"^pvt\.encoder\.block\.(\d)", r"stages.\1.layers", key)] = value
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("size", [64, 224])
def test_logits_are_those_of_transformers(size):
    images = IMAGES if size == 64 else IMAGES.repeat(1, 1, 4, 4)[:1, :, :224, :224] + torch.linspace(0, 1, 224)
    theirs, ours = both(size)
    for training in (False, True):
        with torch.no_grad():
            expected = theirs.train(training)(images).logits
            assert expected.std() > 1e-3
            torch.testing.assert_close(ours.train(training)(images), expected, rtol=0, atol=1e-5)


def test_the_dropout_of_a_layer_sees_its_attention_and_compiled_stages_compute_the_same():
    """What mixers that cut by attention hook. Stages are compiled whole, with the layers of transformers in them."""
    theirs, ours = both(attn_implementation="eager")
    maps = []
    module = ours.get_submodule("stages.3.layers.1.attention.self.dropout")
    hook = module.register_forward_hook(lambda _module, _args, output: maps.append(output))
    with torch.no_grad():
        plain = ours(IMAGES)
        expected = theirs(IMAGES, output_attentions=True, return_dict=True).attentions[-1]
        assert maps[0].shape == (2, 8, 5, 5)  # 8 heads, the class token and 2 x 2 patches
        torch.testing.assert_close(maps[0], expected)
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 8, 5))
        hook.remove()
        compile_stages(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(ours(IMAGES), plain)


def test_a_published_pvt_starts_convolutions_as_torch_and_all_else_from_a_normal_of_0_02():
    model = create_model(Recipe(model="pvt_tiny", num_classes=200))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # uniform within 1 / sqrt(fan-in), in torch
            bound = (m.in_channels * math.prod(m.kernel_size)) ** -0.5
            assert 0.99 * bound < m.weight.abs().max() <= bound and m.bias.any()
        elif isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert m.weight.abs().max() > 0.06 and not m.bias.any()
        elif isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
    assert len(model.no_weight_decay()) == 5  # one class token, position embeddings of four stages
    for p in map(model.get_parameter, model.no_weight_decay()):
        assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel()))


def test_images_of_another_size_are_refused_with_both_sizes():
    model = timm.create_model("pvt_tiny", num_classes=5, img_size=64)
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="made for 64 x 64, got 64 x 96"):
            run(torch.zeros(1, 3, 64, 96))
