"""SUMix against loops over samples and classes: the label by distance, the loss of the uncertainty, bases."""

import copy
import math

import numpy as np
import pytest
import torch
from small_models import CRITERION, DEIT, backbone, photos
from torch import nn

from mixers import CutMix, GridMix, Mixup, Step, SUMix, Switch, Vanilla, build
from mixers.testing import batch, differences

ALMOST = {"rel": 1e-4, "abs": 1e-6}


def softmax(values):
    top = max(values)
    whole = sum(math.exp(v - top) for v in values)
    return [math.exp(v - top) / whole for v in values]


def unit(values):
    return [v / math.sqrt(sum(w * w for w in values)) for v in values]


def slow_distance(clean, mixed, without, scale, as_released):
    """``scale * N(softmax(p without one class - p'))``, the sign turned as released."""
    own = [0.0 if c == without else p for c, p in enumerate(softmax(clean))]
    away = [p - q for p, q in zip(own, softmax(mixed), strict=True)]
    return [scale * d for d in unit(softmax([-v if as_released else v for v in away]))]


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("name", ["resnet18", DEIT])
def test_a_step_is_two_forwards_and_the_formula_with_its_gradients(name, as_released):
    model, (x, y) = backbone(name, drop_path_rate=0.0), photos()
    mixer = SUMix(CutMix(0.2), gamma=0.7, scale=6.0, as_released=as_released)
    y, step = 0.9 * y + 0.02, Step(model.train(), mixer, CRITERION)
    with torch.no_grad():  # predictions and doubts that differ
        model.get_classifier().weight.mul_(30), mixer.uncertainty.weight.mul_(300)
    plain, layer = copy.deepcopy(model), copy.deepcopy(mixer.uncertainty)
    out = step(x, y, np.random.default_rng(3))
    out.loss.backward()
    drawn = CutMix(0.2).plan(x, y, np.random.default_rng(3))
    mixed, _ = CutMix().mix(x, y, **drawn)
    said, vectors = [], []
    plain.get_classifier().register_forward_pre_hook(lambda _, args: vectors.append(args[0]))
    for images in (x, mixed):
        said.append(plain(images))
    doubts = [nn.functional.normalize(layer(v).softmax(1), dim=1) for v in vectors]
    lams, parts, a = [], [], y.argmax(1).tolist()
    for n, partner in enumerate(drawn["index"].tolist()):
        lam, b = drawn["lam"][n].item(), a[partner]
        clean, other, both = (z.tolist() for z in (said[0][n], said[0][partner], said[1][n]))
        d = slow_distance(clean, both, b, 6.0, as_released)
        e = slow_distance(other, both, a[n], 6.0, as_released)
        lam = 1.0 if partner == n else lam
        near, far = lam * math.exp(-d[a[n]]), (1 - lam) * math.exp(-e[b])
        lams.append(near / (near + far))
        own, theirs = (
            -(t * torch.exp(-(doubts[0][i] + doubts[1][n] + torch.tensor(v))).log_softmax(0)).sum()
            for i, v, t in ((n, d, y[n]), (partner, e, y[partner]))
        )
        parts.append(0.7 * (lam * own + (1 - lam) * theirs))
    lams = [sum(lams) / 4] * 4 if as_released else lams
    assert out.plan["lam"].tolist() == pytest.approx(lams, **ALMOST)
    lam = torch.tensor(lams)[:, None]
    target = lam * y + (1 - lam) * y[drawn["index"]]
    losses = {"mix": CRITERION(said[1], target).mean(), "uncertainty": sum(parts) / 4}
    assert {k: v.item() for k, v in out.logs.items()} == pytest.approx(
        {k: v.item() for k, v in losses.items()}, **ALMOST
    )
    sum(losses.values()).backward()
    for p, q in zip(step.parameters(), [*plain.parameters(), *layer.parameters()], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * max(q.grad.abs().max().item(), 1e-3))
    assert mixer.uncertainty.weight.grad.any()


def test_the_label_follows_what_the_model_sees_and_as_released_goes_the_other_way():
    seen = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]])  # of the mixed images: each looks like the first sample
    clean = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    a, index = torch.tensor([0, 1]), torch.tensor([1, 0])
    (own, other), (turned, back) = (
        SUMix(CutMix(), scale=10.0, as_released=released).distances(clean, seen, a, index) for released in (False, True)
    )
    for n in range(2):
        assert own[n, a[n]] + 1 < other[n, a[1 - n]] and turned[n, a[n]] > back[n, a[1 - n]] + 1
    assert torch.allclose(own.norm(dim=1), torch.tensor(10.0))


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_where_one_image_shows_alone_its_label_stands_alone(lam, model, monkeypatch):
    monkeypatch.setattr("mixers.ops.beta", lambda *_: lam)
    x, y = batch(5)
    for released in (False, True):
        out = Step(model, SUMix(Mixup(), as_released=released), CRITERION)(x, y, np.random.default_rng(4))
        assert out.plan["lam"].tolist() == [lam] * 5 and torch.isfinite(out.loss)


BASES = ["mixup", "cutmix", "smoothmix", "gridmix", "fmix", "resizemix", "saliencymix", "puzzlemix", "grafting", "deit"]


@pytest.mark.parametrize("base", BASES)
def test_bases_that_only_mix_images_keep_their_draws_and_images_and_the_target_can_be_rebuilt(base, model):
    (x, y), seen = batch(5), []
    step = Step(model, build("sumix", base=base), CRITERION)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = step(x, y, np.random.default_rng(5))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    torch.testing.assert_close(mixed, seen[-1])
    torch.testing.assert_close(target, out.target)
    if base not in ("puzzlemix", "grafting"):  # whose plan depends on the model's mode and state
        drawn = build(base).plan(x, y, np.random.default_rng(5))
        assert torch.equal(build(base).mix(x, y, **drawn)[0], mixed)


def test_the_layer_is_trained_with_a_weight_of_0_too_and_is_not_exported(model):
    step = Step(model, SUMix(GridMix(), gamma=0.0), CRITERION)
    out = step(*batch(), np.random.default_rng(6))
    out.loss.backward()
    assert step.mixer.uncertainty.weight.grad is not None and not step.mixer.uncertainty.weight.grad.any()
    assert out.logs["uncertainty"] == 0 and step.mixer.models(model) == {"": model}
    (group,) = step.mixer.param_groups(0.1, 0.05)
    assert set(group) == {"params"} and len(group["params"]) == 2


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("base", [Vanilla, lambda: Switch([Vanilla()]), lambda: build("guidedmix", share=0.0)])
def test_where_the_base_does_not_mix_the_label_stays_as_it_is(base, as_released, model):
    x, y = batch()
    y, step = 0.9 * y + 0.02, Step(model.eval(), SUMix(base(), as_released=as_released), CRITERION)
    out = step(x, y, np.random.default_rng(8))
    assert torch.equal(out.target, y) and out.plan["lam"].tolist() == [1.0] * len(x)
    assert not differences(step.mixer.mix(x, y, **out.plan), (x, y))
    torch.testing.assert_close(out.logs["mix"], CRITERION(model(x), y).mean().detach())
    out.loss.backward()
    assert torch.isfinite(out.loss) and step.mixer.uncertainty.weight.grad.any()


def test_a_published_mixer_that_mixes_some_batches_only_and_a_switch_in_a_switch_are_bases(model):
    step, seen = Step(model, build("sumix", base="guidedmix"), CRITERION), set()
    for update in range(8):
        seen.add(step(*batch(), np.random.default_rng((9, update))).plan["images"]["choice"])
    assert seen == {0, 1}
    x, y = batch()
    base = Switch([Switch([CutMix()])])
    out = Step(model, SUMix(base), CRITERION)(x, y, np.random.default_rng(10))
    drawn = base.plan(x, y, np.random.default_rng(10))["inner"]
    assert torch.equal(out.plan["index"], drawn["index"])
    assert torch.equal(SUMix(base).mix(x, y, **out.plan)[0], base.mix(x, y, choice=0, inner=drawn)[0])


def test_bases_that_do_more_and_plans_without_a_partner_are_refused(model):
    for base in ("manifoldmix", "automix", "transmix"):
        with pytest.raises(ValueError, match=r"base must be a mixer that only mixes images, such as CutMix\(\), got"):
            build("semantic", base=base)
    with pytest.raises(ValueError, match="a base whose plan has index, got view; use CutMix"):
        Step(model, SUMix(build("augmix", jsd_weight=0.0)), CRITERION)(*batch(), np.random.default_rng(7))
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="has no linear classifier"):
        Step(model, SUMix(CutMix()), CRITERION)
