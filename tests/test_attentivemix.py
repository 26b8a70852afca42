"""AttentiveMix+ against its definition by loops, its law, and a teacher from a run folder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from teachers import fill
from timm.models import create_model, save_for_hf

from mixers import AttentiveMix, Step
from mixers.taps import Frozen
from mixers.testing import batch, differences, rng_of, tiny_step

LEVEL = 1e-3


def slow_mask(attention: np.ndarray, kept: int, height: int, width: int) -> np.ndarray:
    """The most attended cells of a map, stretched to pixels by taking the cell that the pixel's corner lies in."""
    rows, columns = attention.shape
    cells = sorted((-attention[i, j], i, j) for i, j in np.ndindex(rows, columns))[:kept]
    best = {(i, j) for _, i, j in cells}
    mask = np.zeros((height, width))
    for r, c in np.ndindex(height, width):
        mask[r, c] = (r * rows // height, c * columns // width) in best
    return mask


def setup(**args: object) -> AttentiveMix:
    return tiny_step(lambda: AttentiveMix(**args)).mixer


@pytest.mark.parametrize(("height", "width"), [(224, 224), (64, 64), (56, 112), (50, 33)])
def test_a_sample_keeps_the_cells_that_the_teacher_attends_to_most(height: int, width: int) -> None:
    mixer, (x, y) = setup(), batch(3, height, width)
    teacher = fill(create_model("test_resnet")).eval()
    with torch.no_grad():
        feature = teacher.forward_features(F.interpolate(x, (224, 224), mode="bilinear", align_corners=False))
    attention = feature.double().mean(1).numpy()
    assert attention.shape == (3, 7, 7)
    for update in range(4):
        plan = mixer.plan(x, y, rng_of(update))
        rng = rng_of(update)
        kept = min(max(math.floor(49 * rng.beta(2, 2)), 1), 49)
        index = rng.permutation(3)
        assert plan["index"].tolist() == index.tolist()
        expected = np.stack([slow_mask(attention[i], kept, height, width) for i in range(3)])
        assert np.array_equal(plan["mask"][:, 0].numpy(), expected)
        mixed, target = mixer.mix(x, y, **plan)
        for i, j in enumerate(index):
            share = expected[i].mean()
            torch.testing.assert_close(mixed[i], torch.where(torch.tensor(expected[i]) == 1, x[i], x[j]))
            torch.testing.assert_close(target[i], share * y[i] + (1 - share) * y[j], atol=1e-6, rtol=0)
            assert abs(share - kept / 49) < (1e-9 if height % 7 == width % 7 == 0 else 0.05)


@pytest.mark.parametrize(("beta", "law"), [(None, stats.beta(2, 2)), (8.0, stats.beta(2, 8))])
def test_the_share_kept_follows_its_beta_law_in_49_steps(beta: float | None, law: object) -> None:
    mixer, (x, y) = setup(beta=beta), batch(2, 28, 28)
    mixer.attention = lambda x: torch.zeros(len(x), 7, 7)
    rng = np.random.default_rng(5)
    kept = [round(49 * mixer.plan(x, y, rng)["mask"][0].mean().item()) for _ in range(3000)]
    found = np.bincount(kept, minlength=50)[1:50]
    below = law.cdf(np.arange(50) / 49)
    expected = np.diff(below)
    expected = np.array([expected[0] + expected[1], *expected[2:], 0.0])  # floor 0 becomes 1; 49 only at lambda 1
    often = expected * 3000 >= 5
    counts = [*found[often], found[~often].sum()]
    assert stats.chisquare(counts, [*(3000 * expected[often]), 3000 * expected[~often].sum()]).pvalue > LEVEL
    assert np.mean(kept) == pytest.approx(24 if beta is None else 9.3, abs=0.5)


def test_equal_cells_are_kept_in_reading_order_also_where_attention_is_not_a_number() -> None:
    mixer, (x, y) = setup(), batch(2, 14, 14)
    for value in (0.0, math.nan):
        mixer.attention = lambda x, value=value: torch.full((len(x), 7, 7), value)
        mask = mixer.plan(x, y, rng_of(0))["mask"][:, 0, ::2, ::2].flatten(1)
        kept = int(mask[0].sum())
        assert 0 < kept < 49
        assert torch.equal(mask, torch.tensor([1.0] * kept + [0.0] * (49 - kept)).expand(2, -1))


def test_a_teacher_comes_from_a_run_folder_and_is_no_part_of_the_step(tmp_path) -> None:
    """``test_mixers_that_look.py`` says that a step leaves it as it was."""
    torch.manual_seed(3)
    saved = create_model("resnet10t", num_classes=7)
    save_for_hf(saved, str(tmp_path), safe_serialization=True)
    step, (x, _) = tiny_step(lambda: AttentiveMix(teacher=str(tmp_path))), batch()
    step.train()
    assert not differences(step.mixer.frozen.model.state_dict(), saved.state_dict())
    assert not any(p.requires_grad for p in step.mixer.frozen.model.parameters())
    assert not list(step.mixer.parameters()) and not [k for k in step.state_dict() if k.startswith("mixer")]
    with torch.no_grad():
        seen = saved.eval().forward_features(F.interpolate(x, (224, 224), mode="bilinear"))
    torch.testing.assert_close(step.mixer.attention(x), seen.mean(1))


def test_unfit_weights_are_one_line_at_setup_and_a_plan_before_it_says_what_to_do(tmp_path: Path) -> None:
    mixer = AttentiveMix(teacher="no_such_network.tv_in1k")
    with pytest.raises(ValueError, match=r"^no weights for the teacher 'runs/none' \(no such folder\); expected timm"):
        AttentiveMix(teacher="runs/none").setup(create_model("test_resnet"))
    with pytest.raises(ValueError, match=r"^no weights for the teacher 'no_such_network.tv_in1k' \([^\n]*$"):
        Step(create_model("test_resnet"), mixer, torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="setup"):
        mixer.plan(*batch(), rng_of(0))
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    vit = create_model("deit_tiny_patch16_224", num_classes=5, **args)
    save_for_hf(vit, str(tmp_path / "vit"), safe_serialization=True, model_config={"model_args": args})
    with pytest.raises(ValueError, match=r"does not take images of 224 x 224 \(Input height \(224\) doesn't match"):
        AttentiveMix(teacher=str(tmp_path / "vit")).setup(create_model("test_resnet", num_classes=5))


@pytest.mark.parametrize(("top", "nested"), [(7, 4), (4, 7)])
def test_a_configuration_of_other_classes_than_the_weights_is_refused(tmp_path: Path, top: int, nested: int) -> None:
    save_for_hf(create_model("test_resnet", num_classes=4), str(tmp_path), safe_serialization=True)
    Frozen(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_classes": top, "model_args": {"num_classes": nested}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the weights know 4 classes, which is not what config.json says"):
        Frozen(str(tmp_path))


def test_a_fingerprint_is_of_the_weights_whatever_their_type(tmp_path: Path) -> None:
    save_for_hf(create_model("test_resnet", num_classes=4), str(tmp_path), safe_serialization=True)
    one, other = Frozen(str(tmp_path)), Frozen(str(tmp_path))
    assert one.fingerprint() == other.fingerprint()
    with torch.no_grad():
        other.model.get_classifier().bias[0] += 1
    assert one.fingerprint() != other.fingerprint()
    assert len(other.to(torch.bfloat16).fingerprint()) == 64
