"""NFM and NoisyMix: their noise, and their steps against running the network piece by piece and mixing by hand."""

import copy
import itertools

import pytest
import torch
from small_models import CRITERION, DEIT, FAMILIES, SWIN, backbone, photos
from test_hidden import INDEX, LAM, blended, by_hand, expect_same_step, places
from torch.testing import assert_close

from mixers import NFM, ManifoldMix, NoisyMix, Step, augmentations, ops
from mixers.testing import batch, differences, footprint, rng_of, tiny_step

NOISE = {"add": 0.3, "mult": 0.2, "seed": 5}
THIRD = {"swin": "layers.2", "deit": "blocks.2", "tf_": "blocks.4", "res": "layer3"}  # other families: stages.2


def place(name: str, layer: int) -> str | None:
    """Where each of the layers ends."""
    third = next((value for family, value in THIRD.items() if name.startswith(family)), "stages.2")
    return [None, *places(name)[:2], third][layer]


def noisy(h, add, mult, seed, sparse=0.0):
    """The formula, number by number, with what a generator of this seed gives in turn."""
    generator = torch.Generator().manual_seed(seed)
    draws = [draw(h.shape, generator=generator, dtype=h.dtype).flatten() for draw in drawn_for(add, mult, sparse)]
    normal, *rest = draws if add else [None, *draws]
    spared, *rest = rest if add and sparse else [None, *rest]
    uniform, *kept = rest if mult else [None]
    found = []
    for i, value in enumerate(h.flatten()):
        if mult and not (kept and kept[0][i] < sparse):
            value = value * (1 + mult * (2 * uniform[i] - 1))
        if add and not (spared is not None and spared[i] < sparse):
            value = value + add * normal[i]
        found.append(value)
    return torch.stack(found).view(h.shape)


def drawn_for(add, mult, sparse):
    once = [torch.rand] * bool(sparse)
    return [*([torch.randn, *once] if add else []), *([torch.rand, *once] if mult else [])]


@pytest.mark.parametrize(("add", "mult", "sparse"), [*itertools.product([0.0, 0.4], [0.0, 0.2], [0.0, 0.6])])
def test_noise_is_the_formula_number_by_number_and_of_the_type_and_layout_of_what_it_is_put_on(add, mult, sparse):
    h = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert_close(ops.noisy(h, add, mult, 7, sparse), noisy(h, add, mult, 7, sparse))
    last = h.to(memory_format=torch.channels_last)
    found = ops.noisy(last, add, mult, 7, sparse)
    assert torch.equal(found, ops.noisy(h, add, mult, 7, sparse))
    assert found.is_contiguous(memory_format=torch.channels_last)
    half = ops.noisy(h.bfloat16(), add, mult, 7, sparse)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), found, atol=0.05, rtol=0.02)


def test_noise_has_its_law_and_spares_its_share():
    one, zero = torch.ones(200_000), torch.zeros(200_000)
    added, scaled = ops.noisy(zero, 0.4, 0.0, 1), ops.noisy(one, 0.0, 0.2, 2)
    assert added.mean().abs() < 4e-3 and added.std() == pytest.approx(0.4, abs=4e-3)
    assert scaled.min() > 0.8 and scaled.max() < 1.2 and scaled.std() == pytest.approx(0.2 / 3**0.5, abs=1e-3)
    for spared in (ops.noisy(zero, 0.4, 0.0, 3, 0.65) == 0, ops.noisy(one, 0.0, 0.2, 4, 0.65) == 1):
        assert spared.float().mean() == pytest.approx(0.65, abs=5e-3)
    assert not torch.equal(added, ops.noisy(zero, 0.4, 0.0, 9))


CASES = [(name, 3) for name in FAMILIES] + [(name, layer) for name in ("resnet18", DEIT, SWIN) for layer in (0, 1, 2)]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_step_of_nfm_is_running_the_stages_mixing_adding_noise_and_running_the_rest(name, layer, monkeypatch):
    mixer = NFM()
    monkeypatch.setattr(mixer, "plan", lambda *_: {"index": INDEX, "lam": LAM, "layer": layer} | NOISE)

    def changed(h):
        return ops.noisy(blended(h), **NOISE)

    def expected(net, x):
        return by_hand(net, name, x, place(name, layer), changed) if layer else by_hand(net, name, changed(x))

    expect_same_step(name, mixer, expected)


def test_without_noise_nfm_is_manifold_mixup_bit_for_bit(monkeypatch):
    for layer in (0, 1, 2):
        outs = []
        for mixer, extra in ((NFM(), {"add": 0.0, "mult": 0.0, "seed": 1}), (ManifoldMix(), {})):
            step = tiny_step(lambda mixer=mixer: mixer)
            plan = {"index": INDEX, "lam": LAM, "layer": layer} | extra
            monkeypatch.setattr(mixer, "plan", lambda *_, plan=plan: plan)
            outs.append(step(*batch(), rng_of(0)))
        assert torch.equal(outs[0].loss, outs[1].loss) and torch.equal(outs[0].target, outs[1].target)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", 0), ("resnet18", 3), (DEIT, 0), (DEIT, 1)])
def test_a_step_of_noisymix_mixes_the_batch_and_both_views_alike_with_noise_of_their_own(name, layer, monkeypatch):
    mixer, (x, y) = NoisyMix(jsd_weight=3.0), (value.double() for value in photos())
    noise = [{"add": 0.1 * part, "mult": 0.2, "seed": part} for part in (1, 2, 3)]
    views = mixer.plan(x, y, rng_of(0))
    plan = {"index": INDEX, "lam": LAM, "layer": layer, "noise": noise, "view": views["view"], "other": views["other"]}
    monkeypatch.setattr(mixer, "plan", lambda *_: plan)
    model = backbone(name, drop_path_rate=0.0).double()
    plain, before = copy.deepcopy(model), footprint(model)
    out = Step(model, mixer, CRITERION)(x, y, rng_of(0))
    assert not differences(before, footprint(model))
    images = torch.cat([x, *(augmentations.view(x, views[key], mixer.mean, mixer.std) for key in ("view", "other"))])

    def changed(h):
        parts = zip(h.split(4), noise, strict=True)
        return torch.cat([ops.noisy(blended(part), **own, sparse=0.65) for part, own in parts])

    at = place(name, layer)
    logits = by_hand(plain, name, images, at, changed) if at else by_hand(plain, name, changed(images))
    target, apart = blended(y), augmentations.divergence(*logits.split(4))
    loss = CRITERION(logits[:4], target).mean() + 3 * apart.mean()
    assert_close(out.loss, loss, rtol=1e-6, atol=1e-7)
    assert_close(out.target, target, rtol=0, atol=1e-12)
    out.loss.backward(), loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * max(theirs.grad.abs().max().item(), 1e-3))


def test_the_strengths_of_noisymix_grow_with_the_part_and_are_drawn_for_each():
    x, y = batch(2, 8, 8)
    plans = [NoisyMix().plan(x, y, rng_of(i))["noise"] for i in range(600)]
    for part in range(3):
        added, scaled = ([noise[part][key] for noise in plans] for key in ("add", "mult"))
        assert sum(added) / 600 == pytest.approx((part + 1) * 0.5 * 2 / 7, rel=0.08)  # the mean of Beta(2, 5) is 2/7
        assert sum(scaled) / 600 == pytest.approx(0.5 * 2 / 7, rel=0.08)
    assert len({noise["seed"] for plan in plans for noise in plan}) == 1800


def test_a_network_of_too_few_stages_is_refused_in_words():
    model = backbone("resnet18")
    model.feature_info = model.feature_info[:2]
    for mixer in (NFM(), NoisyMix()):
        says = f"{type(mixer).__name__} needs 3 stages, ResNet publishes 1; use resnet50"
        with pytest.raises(ValueError, match=says):
            mixer.setup(model)
