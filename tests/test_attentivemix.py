"""AttentiveMix+ against its definition by loops, its law, and a teacher from a run folder."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from teachers import fill
from timm.models import create_model, save_for_hf

from mixers import AttentiveMix
from mixers.taps import Frozen
from mixers.testing import batch, rng_of, tiny_step


@pytest.mark.parametrize("beta", [None, 8.0])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (64, 64), (56, 112), (50, 33)])
def test_a_sample_keeps_the_cells_that_the_teacher_attends_to_most(height, width, beta):
    mixer, teacher = tiny_step(lambda: AttentiveMix(beta=beta)).mixer, fill(create_model("test_resnet")).eval()
    x, y = batch(3, height, width)
    with torch.no_grad():
        feature = teacher.forward_features(F.interpolate(x, (224, 224), mode="bilinear", align_corners=False))
    attention = feature.double().mean(1).numpy()
    for update in range(4):
        plan, rng = mixer.plan(x, y, rng_of(update)), rng_of(update)
        kept = min(max(math.floor(49 * rng.beta(2, beta or 2)), 1), 49)
        index = rng.permutation(3)
        assert plan["index"].tolist() == index.tolist()
        mixed, target = mixer.mix(x, y, **plan)
        for i, j in enumerate(index):
            cells = torch.zeros(49)
            cells[sorted(range(49), key=lambda at, i=i: -attention[i].flat[at])[:kept]] = 1
            rows, columns = (torch.arange(side) * 7 // side for side in (height, width))  # where a pixel's corner lies
            expected = cells.view(7, 7)[rows][:, columns]
            share = expected.double().mean().item()
            assert torch.equal(plan["mask"][i, 0], expected)
            assert abs(share - kept / 49) < (1e-9 if height % 7 == width % 7 == 0 else 0.05)
            torch.testing.assert_close(mixed[i], torch.where(expected == 1, x[i], x[j]))
            torch.testing.assert_close(target[i], share * y[i] + (1 - share) * y[j], atol=1e-6, rtol=0)


def test_equal_cells_are_kept_in_reading_order_also_where_attention_is_not_a_number():
    mixer, (x, y) = tiny_step(AttentiveMix).mixer, batch(2, 14, 14)
    for value in (0.0, math.nan):
        mixer.attention = lambda x, value=value: torch.full((len(x), 7, 7), value)
        mask = mixer.plan(x, y, rng_of(0))["mask"][:, 0, ::2, ::2].flatten(1)
        kept = int(mask[0].sum())
        assert 0 < kept < 49
        assert torch.equal(mask, torch.tensor([1.0] * kept + [0.0] * (49 - kept)).expand(2, -1))


def test_a_teacher_sees_images_of_teacher_size_and_one_that_cannot_or_none_at_all_is_refused(tmp_path):
    """What a teacher from a folder is, and weights that cannot be had: ``test_taps.py``."""
    with pytest.raises(ValueError, match="setup"):
        AttentiveMix().plan(*batch(), rng_of(0))
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    vit = create_model("deit_tiny_patch16_224", num_classes=5, **args)
    save_for_hf(vit, str(tmp_path), safe_serialization=True, model_config={"model_args": args})
    with pytest.raises(ValueError, match=r"does not take images of 224 x 224 \(Input height \(224\) doesn't match"):
        AttentiveMix(teacher=str(tmp_path)).setup(create_model("test_resnet", num_classes=5))
    save_for_hf(create_model("test_resnet", num_classes=5), str(tmp_path / "one"), safe_serialization=True)
    with pytest.raises(ValueError, match="sees an image of 32 x 32 as one cell, so nothing would be mixed"):
        AttentiveMix(teacher=str(tmp_path / "one"), teacher_size=32).setup(vit)
    mixer = AttentiveMix(teacher=str(tmp_path), teacher_size=32)
    mixer.setup(create_model("test_resnet", num_classes=5))
    x, _ = batch(2, 64, 64)
    seen = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(mixer.attention(x), vit.eval().forward_features(seen)[:, 1:].mean(2).view(2, 4, 4))


def test_a_fingerprint_is_of_the_weights_whatever_their_type_and_other_classes_than_theirs_are_refused(tmp_path):
    save_for_hf(create_model("test_resnet", num_classes=4), str(tmp_path), safe_serialization=True)
    one, other = Frozen(str(tmp_path)), Frozen(str(tmp_path))
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        other.model.get_classifier().bias[0] += 1
    assert one.fingerprint() != other.fingerprint()
    assert len(other.to(torch.bfloat16).fingerprint()) == 64
    config = json.loads((tmp_path / "config.json").read_text())
    for top, nested in ((7, 4), (4, 7)):
        classes = {"num_classes": top, "model_args": {"num_classes": nested}}
        (tmp_path / "config.json").write_text(json.dumps(config | classes))
        with pytest.raises(ValueError, match=r"the weights know 4 classes, which is not what config.json says"):
            Frozen(str(tmp_path))
