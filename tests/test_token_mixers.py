"""SMMix and TokenMix against loops over the cells of the token grid: squares and blocks, labels, losses."""

import copy
import math

import numpy as np
import pytest
import torch
from resuming import log
from small_models import ATTENTIVE, CRITERION, DROPOUTS, attention_unfused, backbone, photos
from timm.models import save_for_hf
from torch import Tensor, nn

from mixers import Mixup, SMMix, Step, Switch, TokenMix, build
from mixers.testing import batch, differences
from mixers.tokenmix import blocks


def attended(model: nn.Module, name: str, x: Tensor, of_class_token: bool = False) -> Tensor:
    """Shares (B, h, w) of the last layer's attention: of one query, or the mean over patches."""
    weights, prefix = attention_unfused(model, x, DROPOUTS[name.split("_")[0]]), int(not name.startswith("swin"))
    share = weights[:, :, slice(0, 1) if of_class_token else slice(prefix, None), prefix:].mean((1, 2))
    return (share / share.sum(1, keepdim=True)).unflatten(1, 2 * [round(share.shape[1] ** 0.5)])


def slow_square(attention: Tensor, side: int, sign: int) -> tuple[int, int]:
    """First cell of the square with the largest sum times ``sign``."""
    places = np.ndindex(attention.shape[0] - side + 1, attention.shape[1] - side + 1)
    return max(places, key=lambda at: sign * attention[at[0] : at[0] + side, at[1] : at[1] + side].sum().item())


def grids(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    shares = np.random.default_rng(seed).dirichlet(np.ones(height * width), count)
    return torch.from_numpy(shares).view(-1, height, width)


SIDES = {(14, 14): (3, 10), (7, 7): (1, 5), (7, 14): (1, 5), (5, 8): (1, 3), (2, 3): (1, 1), (1, 1): (1, 1)}


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_smmix_pastes_the_partners_most_attended_square_over_the_least_attended_one(height, width):
    """Its side is uniform from a quarter to three quarters of the grid, at least 1."""
    pixels, (least, most) = 3 if width < 8 else 2, SIDES[height, width]
    attention, y = grids(5, height, width, seed=1), torch.eye(5)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((5, 3, height * pixels, width * pixels)))
    for i in range(6):
        plan = SMMix().plan(x, y, np.random.default_rng((3, i)), attention)
        mixed, target = SMMix().mix(x, y, **plan)
        area = height * width - plan["mask"][0].sum().item() / pixels**2
        side, lam = round(area**0.5), 1 - area / (height * width)
        assert side**2 == area and side == np.random.default_rng((3, i)).integers(least, most + 1)
        for n, partner in enumerate(plan["index"].tolist()):
            expected, mask = x[n].clone(), torch.ones(x.shape[2:])
            (top, left), (above, before) = (slow_square(attention[k], side, s) for k, s in ((n, -1), (partner, 1)))
            for row, column in np.ndindex(side * pixels, side * pixels):
                here = top * pixels + row, left * pixels + column
                expected[:, *here] = x[partner, :, above * pixels + row, before * pixels + column]
                mask[here] = 0
            assert torch.equal(mixed[n], expected) and torch.equal(plan["mask"][n, 0], mask)
            assert plan["lam"][n].item() == pytest.approx(lam) == pytest.approx(mask.mean().item())
            torch.testing.assert_close(target[n], lam * y[n] + (1 - lam) * y[partner])


@pytest.mark.parametrize("name", ATTENTIVE)
def test_a_step_of_smmix_is_a_look_and_its_three_losses_and_their_gradients(name):
    model, (x, y) = backbone(name, drop_path_rate=0.0).train(), photos()
    with torch.no_grad():
        for p in model.parameters():  # away from the small initial weights, with which all attention is alike
            p.mul_(3) if p.ndim > 1 else p
    y, step = 0.9 * y + 0.02, Step(model, SMMix(), CRITERION)
    plain, head = copy.deepcopy(model), copy.deepcopy(step.mixer.head)
    passes = []
    model.register_forward_hook(
        lambda _, args, output: passes.append(({m.training for m in model.modules()}, output.requires_grad, *args))
    )
    out = step(x, y, np.random.default_rng(7))
    out.loss.backward()
    mixed = step.mixer.mix(x, y, **out.plan)[0]
    assert [one[:2] for one in passes] == [({False}, False), ({True}, True)]  # a look in evaluation mode, then the step
    assert torch.equal(passes[0][2], x) and torch.equal(passes[1][2], mixed)

    attention = attended(plain, name, x)
    side = round(((out.plan["mask"][0] == 0).sum().item() / (64 // attention.shape[1]) ** 2) ** 0.5)
    lam = 1 - side**2 / attention[0].numel()
    with torch.no_grad():
        clean = copy.deepcopy(plain).eval()(x)
    features = plain.forward_features(mixed)
    logits, tokens = plain.forward_head(features), features.flatten(1, 2) if features.ndim == 4 else features[:, 1:]
    losses = {"mix": [], "fine": [], "consistency": []}
    for n, partner in enumerate(out.plan["index"].tolist()):
        pasted, (top, left) = torch.zeros_like(attention[n]).bool(), slow_square(attention[n], side, -1)
        pasted[top : top + side, left : left + side] = True
        of_own, of_partner = (head(tokens[n][group.flatten()].mean(0)).log_softmax(0) for group in (~pasted, pasted))
        said = logits[n].log_softmax(0)
        losses["mix"].append(-((lam * y[n] + (1 - lam) * y[partner]) * said).sum())
        losses["fine"].append(-(y[n] * of_own + y[partner] * of_partner).sum() / 2)
        aim = (lam * clean[n] + (1 - lam) * clean[partner]).softmax(0)
        losses["consistency"].append((aim * (aim.log() - said)).sum())
    parts = {key: sum(values) / 4 for key, values in losses.items()}
    assert {k: v.item() for k, v in out.logs.items()} == pytest.approx(
        {k: v.item() for k, v in parts.items()}, rel=1e-4, abs=1e-6
    )
    sum(parts.values()).backward()
    ours, theirs = [*step.named_parameters()], [*plain.parameters(), *head.parameters()]
    for (key, p), q in zip(ours, theirs, strict=True):
        scale = max(q.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * scale, msg=key)


def test_the_head_for_tokens_is_trained_in_one_branch_touched_in_the_other_and_not_exported(transformer):
    step, seen = Step(transformer, build("smmix"), CRITERION), set()
    for i in range(6):
        step.zero_grad()
        out = step(*batch(), np.random.default_rng((8, i)))
        out.loss.backward()
        grad = step.mixer.members()[1].head.weight.grad
        assert bool(grad.any()) == (out.plan["choice"] == 1) == ("fine" in out.logs)
        seen.add(out.plan["choice"])
    assert seen == {0, 1} and step.mixer.models(transformer) == {"": transformer}
    saved = {k for k in step.state_dict() if k.startswith("mixer.")}
    assert saved == {f"mixer.mixers.1.head.{k}" for k in ("weight", "bias")}
    (group,) = step.mixer.param_groups(0.1, 0.05)
    assert set(group) == {"params"} and len(group["params"]) == 2


def test_the_look_costs_no_gradient_under_autocast_and_one_image_of_one_token_trains(transformer):
    with torch.autocast("cpu", dtype=torch.bfloat16):  # its cache of weights in bfloat16 outlives the look
        out = Step(transformer, SMMix(), CRITERION)(*batch(), np.random.default_rng(9))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in transformer.named_parameters() if p.ndim > 1)
    assert out.logs["consistency"].dtype == torch.float32
    x, y = batch(1, 8, 8)
    out = Step(transformer, SMMix(), CRITERION)(x, y, np.random.default_rng(10))
    assert torch.isfinite(out.loss) and out.plan["lam"].tolist() == [0.0]
    assert torch.equal(SMMix().mix(x, y, **out.plan)[0], x)  # it is its own partner


def test_models_and_images_without_what_smmix_takes_are_refused(transformer):
    """Models without attention: ``test_every_cell_trains.py``."""
    with pytest.raises(ValueError, match="multiples of those of the token grid, got 30 x 32 pixels, 4 x 4 tokens"):
        SMMix().plan(torch.zeros(2, 3, 30, 32), torch.eye(2), np.random.default_rng(11), grids(2, 4, 4))
    transformer.reset_classifier(0)
    with pytest.raises(ValueError, match=r"one linear classifier .* VisionTransformer lacks; .* swin_tiny"):
        Step(transformer, SMMix(), CRITERION)


@pytest.mark.slow
def test_two_processes_train_smmix_like_one_that_accumulates_twice(reference):
    fixed = ("--mixer", "smmix", "--model", "test_vit", "--per_device_train_batch_size", 4, "--epochs", 1,
             "--warmup_epochs", 0)  # fmt: skip
    runs = [log(reference(*fixed, processes=n)) for n in (1, 2)]
    one, two = ([line["loss"] for line in run if line["mode"] == "train"] for run in runs)
    assert one == pytest.approx(two, rel=1e-5) and one


def slow_blocks(height: int, width: int, count: int, rng: np.random.Generator) -> set[tuple[int, int]]:
    """The law of the docstring with sets of cells."""
    found: set[tuple[int, int]] = set()
    refused = 0
    while len(found) < count:
        left = count - len(found)
        if refused == 10:
            free = [cell for cell in np.ndindex(height, width) if cell not in found]
            return found | {free[k] for k in rng.choice(len(free), left, replace=False)}
        area, log_aspect = rng.uniform(1, left), rng.uniform(math.log(0.3), -math.log(0.3))
        rows, columns = round((area * math.exp(log_aspect)) ** 0.5), round((area / math.exp(log_aspect)) ** 0.5)
        refused += 1
        if rows < height and columns < width:
            top, first = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
            new = {(top + i, first + j) for i, j in np.ndindex(rows, columns)} - found
            if 1 <= len(new) <= left:
                found, refused = found | new, 0
    return found


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (4, 9), (2, 2), (1, 6), (1, 1)])
def test_blocks_of_tokenmix_are_those_of_the_law_and_exactly_as_many_as_asked_for(height, width):
    for count in range(height * width + 1):
        found, expected = (f(height, width, count, np.random.default_rng((1, count))) for f in (blocks, slow_blocks))
        assert found.shape == (height, width) and found.sum() == count
        assert set(zip(*np.nonzero(found), strict=True)) == expected


def test_blocks_hang_together_and_favour_no_direction():
    rng = np.random.default_rng(2)
    masks = np.array([blocks(14, 14, 112, rng) for _ in range(1500)])
    assert (masks[:, :, 1:] == masks[:, :, :-1]).mean() > 0.8  # of independent cells 0.51 of neighbours are alike
    mean = masks.mean(0)
    for other in (mean[::-1], mean[:, ::-1], mean.T):
        np.testing.assert_allclose(mean, other, atol=0.07)  # 5 standard errors of a difference of two shares


class Given(TokenMix):
    """TokenMix with content that is given."""

    def __init__(self, content: Tensor, **options):
        super().__init__(**options)
        self.given = content

    def content(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.given

    def planned(self, x: Tensor, y: Tensor, *seed: int) -> dict:
        return self.plan(x, y, np.random.default_rng(seed), nn.Identity())


def cells_of(plan: dict, height: int, width: int) -> Tensor:
    """The mask on the grid; each cell must be one value, the same for the whole batch."""
    mask = plan["mask"]
    down, across = mask.shape[2] // height, mask.shape[3] // width
    cells = mask[0, 0, ::down, ::across]
    assert torch.equal(cells.repeat_interleave(down, 0).repeat_interleave(across, 1).expand_as(mask), mask)
    assert set(cells.unique().tolist()) <= {0.0, 1.0}
    return cells


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_share_of_cells_follows_the_beta_law(alpha):
    mixer = Given(torch.full((1, 28, 28), 1 / 784), alpha=alpha)
    for i in range(100):
        plan, lam = mixer.planned(torch.zeros(1, 3, 28, 28), torch.ones(1, 2), 3, i), np.random.default_rng((3, i))
        kept = 784 - round((1 - lam.beta(alpha, alpha)) * 784)
        assert plan["mask"].sum().item() == kept and plan["lam"].item() == pytest.approx(kept / 784, abs=1e-6)


def test_the_reference_codes_constant_ignores_alpha_and_mixup_takes_half_of_the_batches():
    """By a switch of equal odds, whose law ``test_laws.py`` proves."""
    for side, pasted in ((14, 112), (7, 28), (2, 2)):
        mixer = Given(torch.full((2, side, side), side**-2), alpha=0.1, use_alpha=False)
        for i in range(5):
            plan = mixer.planned(torch.zeros(2, 3, 2 * side, 2 * side), torch.ones(2, 2), 4, i)
            assert (cells_of(plan, side, side) == 0).sum() == pasted
    switch = build("tokenmix", mixup_alpha=0.3, cutmix_alpha=0.4, use_alpha=False)
    assert repr(switch) == repr(Switch([Mixup(0.3), TokenMix(0.4, use_alpha=False)]))


def test_labels_are_the_content_that_shows_normalised_and_the_area_where_none_does_or_it_is_even():
    rng, y = np.random.default_rng(5), torch.eye(5)
    content = torch.from_numpy(rng.dirichlet(np.full(6, 0.3), 5).astype(np.float32)).view(5, 2, 3)
    for i in range(20):
        plan = Given(content).planned(torch.zeros(5, 3, 16, 24), y, 5, i)
        cells, target = cells_of(plan, 2, 3), TokenMix().mix(torch.zeros(5, 3, 16, 24), y, **plan)[1]
        for n, j in enumerate(plan["index"].tolist()):
            own, partner = content[n][cells == 1].sum().item(), content[j][cells == 0].sum().item()
            assert plan["lam"][n].item() == pytest.approx(own / (own + partner), abs=1e-6)
            torch.testing.assert_close(target[n], own / (own + partner) * y[n] + partner / (own + partner) * y[j])
    for i in range(10):
        even, none = (Given(c).planned(torch.zeros(6, 3, 8, 8), torch.eye(6), 6, i)
                      for c in (torch.full((6, 4, 4), 1 / 16), torch.zeros(6, 4, 4)))  # fmt: skip
        torch.testing.assert_close(even["lam"], even["mask"].mean((1, 2, 3)))
        torch.testing.assert_close(none["lam"], even["lam"])


@pytest.mark.parametrize("lam0", [0.0, 1.0])
def test_a_share_of_nothing_or_of_everything_is_legal(lam0, monkeypatch):
    monkeypatch.setattr("mixers.ops.beta", lambda *_: lam0)
    x, y = batch()
    plan = Given(torch.full((4, 2, 2), 0.25)).planned(x, y, 7)
    mixed, target = TokenMix().mix(x, y, **plan)
    kept = torch.arange(4) if lam0 else plan["index"]
    assert torch.equal(mixed, x[kept]) and torch.equal(target, y[kept])


@pytest.mark.parametrize("name", ATTENTIVE)
def test_tokenmix_takes_the_models_attention_in_evaluation_mode_for_content(name):
    model, (x, _) = backbone(name).train(), photos()
    expected = attended(model, name, x, of_class_token=not name.startswith("swin"))
    content = Step(model, TokenMix(), CRITERION).mixer.content(model, x)
    assert not content.requires_grad
    torch.testing.assert_close(content, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_says_where_the_content_is_also_to_a_model_without_attention(model, transformer, tmp_path):
    """A model without attention and without a teacher is refused: ``test_every_cell_trains.py``."""
    args, (x, y) = {"dynamic_img_size": True, "patch_size": 8}, batch()
    save_for_hf(transformer, tmp_path / "vit", safe_serialization=True, model_args=args)
    save_for_hf(model, tmp_path / "cnn", safe_serialization=True)
    step = Step(model, build("token", teacher=str(tmp_path / "vit")), CRITERION)
    out = step(x, y, np.random.default_rng(10))
    own = Step(transformer, TokenMix(), CRITERION)(x, y, np.random.default_rng(10))
    assert not differences(own.plan, out.plan) and out.plan["lam"].unique().numel() > 1
    assert list(step.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    for teacher, says in (("cnn", "ResNet has no attention"), ("nothing", "no weights for the teacher")):
        with pytest.raises(ValueError, match=says):
            Step(model, TokenMix(teacher=str(tmp_path / teacher)), CRITERION)
