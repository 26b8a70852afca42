"""TokenMix: its blocks and labels against loops over cells, and where content comes from."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from test_smmix import attention_by_hand
from test_taps import ATTENTIVE, CRITERION, backbone, photos
from timm.models import save_for_hf
from torch import Tensor, nn

from mixers import Mixup, Step, Switch, TokenMix, build
from mixers.testing import batch, differences, footprint, global_rngs
from mixers.tokenmix import blocks

LEVEL = 1e-3


def slow_blocks(height: int, width: int, count: int, rng: np.random.Generator) -> set[tuple[int, int]]:
    """The law of the docstring with sets of cells."""
    grid = list(np.ndindex(height, width))
    found: set[tuple[int, int]] = set()
    refused = 0
    while len(found) < count:
        left = count - len(found)
        if refused == 10:
            free = [cell for cell in grid if cell not in found]
            return found | {free[k] for k in rng.choice(len(free), left, replace=False)}
        area, log_aspect = rng.uniform(1, left), rng.uniform(math.log(0.3), -math.log(0.3))
        rows, columns = round((area * math.exp(log_aspect)) ** 0.5), round((area / math.exp(log_aspect)) ** 0.5)
        refused += 1
        if rows < height and columns < width:
            top, first = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
            new = {(i, j) for i in range(top, top + rows) for j in range(first, first + columns)} - found
            if 1 <= len(new) <= left:
                found |= new
                refused = 0
    return found


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (4, 9), (2, 2), (1, 6), (1, 1)])
def test_blocks_are_those_of_the_law_and_exactly_as_many_as_asked_for(height: int, width: int) -> None:
    for count in range(height * width + 1):
        found, expected = (
            law(height, width, count, np.random.default_rng((1, count))) for law in (blocks, slow_blocks)
        )
        assert found.shape == (height, width) and found.sum() == count
        assert set(zip(*np.nonzero(found), strict=True)) == expected


def test_blocks_hang_together_and_favour_no_direction() -> None:
    rng = np.random.default_rng(2)
    masks = np.array([blocks(14, 14, 112, rng) for _ in range(1500)])
    neighbours = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    assert neighbours > 0.8  # of independent cells (4/7)**2 + (3/7)**2 = 0.51 of neighbours are alike
    mean = masks.mean(0)
    for other in (mean[::-1], mean[:, ::-1], mean.T):
        np.testing.assert_allclose(mean, other, atol=0.07)  # 5 standard errors of a difference of two shares


class Given(TokenMix):
    """TokenMix with content that is given."""

    def __init__(self, content: Tensor, **options: object):
        super().__init__(**options)
        self.given = content

    def content(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.given


def cells_of(plan: dict, height: int, width: int) -> Tensor:
    """The mask on the grid; each cell must be one value, the same for the whole batch."""
    mask = plan["mask"]
    down, across = mask.shape[2] // height, mask.shape[3] // width
    cells = mask[:, 0, ::down, ::across]
    assert torch.equal(cells.repeat_interleave(down, 1).repeat_interleave(across, 2), mask[:, 0])
    assert set(cells.unique().tolist()) <= {0.0, 1.0} and torch.equal(cells, cells[:1].expand_as(cells))
    return cells[0]


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_share_of_cells_follows_the_beta_law(alpha: float) -> None:
    x, y = torch.zeros(1, 3, 28, 28), torch.ones(1, 2)
    mixer = Given(torch.full((1, 28, 28), 1 / 784), alpha=alpha)
    shares = []
    for i in range(400):
        lam0 = np.random.default_rng((3, i)).beta(alpha, alpha)
        plan = mixer.plan(x, y, np.random.default_rng((3, i)), nn.Identity())
        assert plan["mask"].sum().item() == 784 - round((1 - lam0) * 784)
        shares.append(plan["lam"].item())
    dither = np.random.default_rng(3).uniform(-0.5, 0.5, 400) / 784  # the share is a multiple of 1/784
    law = stats.beta(alpha, alpha).cdf
    assert stats.kstest(np.clip(np.array(shares) + dither, 0, 1), law).pvalue > LEVEL


@pytest.mark.parametrize(("side", "pasted"), [(14, 112), (7, 28), (2, 2)])
def test_the_reference_codes_constant_ignores_alpha(side: int, pasted: int) -> None:
    x, y = torch.zeros(2, 3, 2 * side, 2 * side), torch.ones(2, 2)
    for i in range(5):
        mixer = Given(torch.full((2, side, side), side**-2), alpha=0.1, use_alpha=False)
        cells = cells_of(mixer.plan(x, y, np.random.default_rng((4, i)), nn.Identity()), side, side)
        assert (cells == 0).sum() == pasted


def test_labels_are_the_content_that_shows_normalised() -> None:
    rng = np.random.default_rng(5)
    x, y = torch.zeros(5, 3, 16, 24), torch.eye(5)
    content = torch.from_numpy(rng.dirichlet(np.full(6, 0.3), 5).astype(np.float32)).view(5, 2, 3)
    for i in range(20):
        plan = Given(content).plan(x, y, np.random.default_rng((5, i)), nn.Identity())
        cells, index = cells_of(plan, 2, 3), plan["index"].tolist()
        target = Given(content).mix(x, y, **plan)[1]
        for n in range(5):
            own = sum(content[n, r, c].item() for r in range(2) for c in range(3) if cells[r, c] == 1)
            partner = sum(content[index[n], r, c].item() for r in range(2) for c in range(3) if cells[r, c] == 0)
            assert plan["lam"][n].item() == pytest.approx(own / (own + partner), abs=1e-6)
            expected = own / (own + partner) * y[n] + partner / (own + partner) * y[index[n]]
            torch.testing.assert_close(target[n], expected)


def test_even_content_gives_the_area_and_so_does_content_that_nowhere_shows() -> None:
    x, y = torch.zeros(6, 3, 8, 8), torch.eye(6)
    for i in range(10):
        even = Given(torch.full((6, 4, 4), 1 / 16)).plan(x, y, np.random.default_rng((6, i)), nn.Identity())
        torch.testing.assert_close(even["lam"], even["mask"].mean((1, 2, 3)))
        none = Given(torch.zeros(6, 4, 4)).plan(x, y, np.random.default_rng((6, i)), nn.Identity())
        torch.testing.assert_close(none["lam"], even["lam"])


@pytest.mark.parametrize("lam0", [0.0, 1.0])
def test_a_share_of_nothing_or_of_everything_is_legal(lam0: float, monkeypatch) -> None:
    monkeypatch.setattr("mixers.ops.beta", lambda *_: lam0)
    x, y = batch()
    plan = Given(torch.full((4, 2, 2), 0.25)).plan(x, y, np.random.default_rng(7), nn.Identity())
    mixed, target = TokenMix().mix(x, y, **plan)
    index = plan["index"]
    assert torch.equal(mixed, x if lam0 else x[index]) and torch.equal(target, y if lam0 else y[index])


@pytest.mark.parametrize("name", ATTENTIVE)
def test_content_is_the_models_attention_in_evaluation_mode_without_a_trace(name: str) -> None:
    model = backbone(name).train()
    x, y = photos()
    step = Step(model, TokenMix(), CRITERION)
    expected = attention_by_hand(copy.deepcopy(model), x, of_class_token=not name.startswith("swin"))
    before, rngs, buffers = footprint(model), global_rngs(), copy.deepcopy(dict(model.named_buffers()))
    content = step.mixer.content(model, x)
    assert not differences(before, footprint(model)) and not differences(rngs, global_rngs())
    assert not differences(buffers, dict(model.named_buffers()))
    assert not content.requires_grad and content.shape == ((4, 4, 4) if name.startswith("deit") else (4, 2, 2))
    torch.testing.assert_close(content, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(content.sum((1, 2)), torch.ones(4))
    out = step(x, y, np.random.default_rng(8))
    cells = cells_of(out.plan, *content.shape[1:])
    own, partner = (content * cells).sum((1, 2)), (content[out.plan["index"]] * (1 - cells)).sum((1, 2))
    torch.testing.assert_close(out.plan["lam"], own / (own + partner))


def test_a_teacher_says_where_the_content_is_also_to_a_model_without_attention(model, transformer, tmp_path) -> None:
    args = {"dynamic_img_size": True, "patch_size": 8}
    save_for_hf(transformer, tmp_path, safe_serialization=True, model_args=args)
    step = Step(model, build("token", teacher=str(tmp_path)), CRITERION)
    x, y = batch()
    out = step(x, y, np.random.default_rng(10))
    own = Step(transformer, TokenMix(), CRITERION)(x, y, np.random.default_rng(10))
    assert not differences(own.plan, out.plan)
    assert out.plan["lam"].unique().numel() > 1
    assert list(step.state_dict()) == [f"model.{key}" for key in model.state_dict()]


def test_what_has_no_attention_is_refused_before_training(model, tmp_path) -> None:
    for mixer in (TokenMix(), build("tokenmix")):
        with pytest.raises(ValueError, match=r"ResNet has no attention .* deit_small_patch16_224"):
            Step(model, mixer, CRITERION)
    save_for_hf(model, tmp_path / "cnn", safe_serialization=True)
    with pytest.raises(ValueError, match="ResNet has no attention"):
        Step(model, TokenMix(teacher=str(tmp_path / "cnn")), CRITERION)
    with pytest.raises(ValueError, match="no weights for the teacher"):
        Step(model, TokenMix(teacher=str(tmp_path / "nothing")), CRITERION)


def test_the_published_method_takes_mixup_for_half_of_the_batches() -> None:
    """By a switch of equal odds, whose law ``test_laws.py`` proves."""
    switch = build("tokenmix", mixup_alpha=0.3, cutmix_alpha=0.4, use_alpha=False)
    assert repr(switch) == repr(Switch([Mixup(0.3), TokenMix(0.4, use_alpha=False)]))
