"""DecoupleMix against softmax over the other K-1 classes, one sample at a time, and its invariants."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import BLOCKS, CutMix, DecoupleMix, Mixer, Mixup, RecursiveMix, Step, Switch, Vanilla, build
from mixers.decouplemix import without
from mixers.testing import batch, rng_of, tiny_step

INDEX = [2, 1, 4, 0, 3, 5]
LABELS = [0, 1, 2, 0, 0, 3]  # mixed pairs: 0 2, 1 itself, 2 0, 0 0 (one class), 0 0 (one class), 3 itself
LAMS = [0.3, 0.3, 0.5, 0.3, 0.9, 0.3]


def logits() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 3, (6, 5))).requires_grad_()


def slow(z: Tensor, lams: list[float], power: float) -> list[float]:
    """-lam^power log p(a without b) - (1-lam)^power log p(b without a), by exponentials in python floats."""
    losses = []
    for row, a, b, lam in zip(z.tolist(), LABELS, [LABELS[i] for i in INDEX], lams, strict=True):
        p = [math.exp(row[k]) / sum(math.exp(row[c]) for c in range(5) if c != other) for k, other in ((a, b), (b, a))]
        nothing = a == b or lam in (0, 1)
        losses.append(0.0 if nothing else -(lam**power) * math.log(p[0]) - (1 - lam) ** power * math.log(p[1]))
    return losses


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lams", [LAMS, [0.0] * 6, [1.0] * 6, [0.5] * 6], ids=["mixed", "0", "1", "half"])
def test_the_terms_are_softmax_without_the_partner_s_class(power, smoothing, lams):
    z, lam = logits(), torch.tensor(lams, dtype=torch.float64)[:, None]
    y = torch.eye(5, dtype=torch.float64)[LABELS] * (1 - smoothing) + smoothing / 5
    target = lam * y + (1 - lam) * y[INDEX]
    found = DecoupleMix(Mixup(), power=power).regulariser(z, y, target, torch.tensor(INDEX))
    assert found.tolist() == pytest.approx(slow(z, lams, power), abs=1e-9)
    found.sum().backward()
    assert z.grad.isfinite().all()


def test_a_term_has_no_gradient_at_the_partner_s_logit_and_large_logits_stay_finite():
    z, a, b = logits(), torch.tensor([0, 1, 2, 0, 0, 3]), torch.tensor([1, 2, 3, 4, 3, 2])
    without(z, a, b).sum().backward()
    assert (z.grad.gather(1, b[:, None]) == 0).all() and (z.grad.gather(1, a[:, None]) > 0).all()
    large = torch.tensor([[30000.0, -30000.0, 0, 0, 0]])
    assert without(large, torch.tensor([1]), torch.tensor([0])).item() == pytest.approx(-30000 - math.log(3))


@pytest.mark.parametrize("base", [Mixup, CutMix, lambda: Switch([Mixup(), Vanilla()]), lambda: build("alignmix")])
def test_without_eta_it_is_the_base_s_own_step_and_eta_adds_the_terms(base):
    x, y = batch()
    for index in range(4):
        makers = base, lambda: DecoupleMix(base(), eta=0.0), lambda: DecoupleMix(base(), eta=0.3)
        plain, off, on = (tiny_step(make)(x, y, rng_of(index)) for make in makers)
        assert off.loss.item() == plain.loss.item() and torch.equal(off.target, plain.target)
        if "index" in on.plan:
            terms = DecoupleMix(Mixup()).regulariser(on.logits, y, on.target, on.plan["index"])
            torch.testing.assert_close(on.loss, plain.loss + 0.3 * terms.mean())
        else:  # nothing was mixed
            assert on.loss.item() == plain.loss.item() and on.logs["decouple"] == 0


class Unnamed(Mixer):
    """A stranger's mixer that keeps its partners to itself."""

    def plan(self, x, y, rng, *look):
        return {"lam": 0.5}

    def mix(self, x, y, *, lam):
        return lam * x + (1 - lam) * x.flip(0), lam * y + (1 - lam) * y.flip(0)


def test_a_base_that_does_not_mix_pairs_is_refused_before_the_first_step_and_one_that_names_no_partner_in_it():
    bases = {
        "RecursiveMix(alpha=0.5": (RecursiveMix(), Switch([CutMix(), Switch([RecursiveMix()])])),
        "CoMixup(alpha=": (build("comixup"),),
        "AdAutoMix(alpha=1.0, samples=3": (build("adautomix", samples=3),),
    }
    for says, base in [(says, base) for says, all_of_them in bases.items() for base in all_of_them]:
        with pytest.raises(ValueError, match="a base that mixes each sample with one partner") as error:
            Step(tiny_step(Mixup).model, DecoupleMix(base), F.cross_entropy)
        assert says in str(error.value)
    with pytest.raises(ValueError, match=r"a base whose plan has index \(B,\), one partner for each; got \['lam'\]"):
        tiny_step(lambda: DecoupleMix(Unnamed()))(*batch(), rng_of(0))


@pytest.mark.parametrize("xi", [1.0, 2.0])
def test_two_hot_lifts_the_shares_of_both_classes_for_a_binary_cross_entropy(xi):
    (x, y), mixer = batch(), DecoupleMix(Mixup(), eta=0.0, two_hot=0.6, xi=xi)
    bce = lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1)  # noqa: E731
    out = Step(tiny_step(Mixup).model, mixer, bce)(x, y, rng_of(0))
    expected = [[min(1.0, (share / 0.6) ** xi) for share in row] for row in out.target.tolist()]
    torch.testing.assert_close(out.loss, bce(out.logits, torch.tensor(expected)).mean())
    torch.testing.assert_close(out.target, mixer.mix(x, y, **out.plan)[1])


def test_it_hands_on_what_its_base_owns():
    model, mixer = tiny_step(Mixup).model, BLOCKS["decouple"](build("automix"))
    mixer.setup(model)
    heads, block = mixer.param_groups(0.1, 0.05)
    assert heads["params"] == list(mixer.base.one_hot.parameters())
    assert block["params"] == list(mixer.base.block.parameters())
    assert set(mixer.models(model)) == {"", "k_one", "q", "q_one"} and mixer.needs == "step"
