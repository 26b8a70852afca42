"""The loss that decouples, beside OpenMixup's two."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import DecoupleMix, Mixup
from originals import Checkout, Gap, beside
from originals.openmixup_step import SOFT, STEP, Listed, classifier, head, run
from originals.pairs import HEADS, LOSSES, OPENMIXUP, Original, Recorded, absolute, float64, ours64, relative
from originals.same_draws import Again, openmixup, twenty_updates


class Decoupled(NamedTuple):
    """One batch of random logits."""

    ordered: bool
    """Whether the first pair of two classes has the lower one first."""
    alike: bool
    """Whether a pair is of one class."""
    loss: float
    gradient: float


def decoupled(original: Original, rng: Any, mixer: DecoupleMix, seed: int, **head: Any) -> Decoupled:
    """The gaps of one batch of random logits."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(16, 10, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    labels = torch.randint(10, (16,), generator=generator)
    soft = mixer.two_hot is None

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        if soft:
            return F.cross_entropy(logits, target, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)

    x, y = torch.zeros(16, 1, 1, 1, dtype=torch.float64), F.one_hot(labels, 10).double()
    with ours64():
        out = mixer(lambda images: z, criterion, x, y, rng)
    partners = labels[out.plan["index"]]
    lam = float(rng.drawn["beta"][0])
    loss = {"type": "CrossEntropyLoss", "use_soft": soft, "use_sigmoid": not soft, "use_mix_decouple": soft}
    judge = original.given["ClsMixupHead"](loss=loss, in_channels=1, num_classes=10, multi_label=True, **head)
    with float64(), ours64():
        theirs = judge.loss([z], (labels, partners, lam))["loss"]
    (ours_grad,), (their_grad,) = (torch.autograd.grad(value, z) for value in (out.loss, theirs))
    differ = labels != partners
    ordered = bool((labels < partners)[differ][0])
    return Decoupled(ordered, not differ.all(), absolute(out.loss, theirs), relative([ours_grad], [their_grad]))


def worst(found: list[Decoupled], of: str, why: str = "") -> Iterator[Gap]:
    """The largest gaps of many batches."""
    yield Gap(f"loss, {of}, float64", max(one.loss for one in found), why=why)
    yield Gap(f"gradient of the logits, {of}, float64", max(one.gradient for one in found), "relative", why)


class Fixed(Recorded):
    """A generator whose lambda is given."""

    def __init__(self, lam: float):
        super().__init__(0)
        self.lam = lam

    def beta(self, a: float, b: float) -> float:
        """The lambda."""
        self.drawn["beta"] = [self.lam]
        return self.lam


@beside(
    "decouplemix", OPENMIXUP, f"{HEADS}/cls_mixup_head.py", f"{LOSSES}/cross_entropy_loss.py",
    held="test_decouplemix.py::test_the_terms_are_softmax_without_the_partner_s_class",
)  # fmt: skip
def decouplemix_losses(original: Checkout) -> Iterator[Gap]:
    """Loss and gradient of the logits, over Mixup: soft cross entropy, and binary cross entropy of two-hot targets."""
    code, draws = Original(original).heads(), 300
    eta = {"eta_weight": {"eta": 0.1, "mode": "both", "thr": 0.5}}
    by_share = eta | {"lam_scale_mode": "pow", "lam_thr": 1, "lam_idx": 1}
    plain, shared = DecoupleMix(Mixup(1.0), 0.1), DecoupleMix(Mixup(1.0), 0.1, power=1.0)

    found = [decoupled(code, Recorded(seed), plain, seed, **eta) for seed in range(draws)]
    yield from worst(found, f"both terms alike, {draws} batches")
    found = [decoupled(code, Recorded(seed), shared, seed, **by_share) for seed in range(draws)]
    order = [one for one in found if one.ordered]
    yield from worst(order, f"terms by their shares, the {len(order)} of {draws} batches whose first pair is in order")
    other = [one for one in found if not one.ordered]
    why = "OpenMixup orders both weights by the class numbers of the first pair, so that each gets the other's"
    yield from worst(other, f"terms by their shares, the other {len(other)} batches", why)
    for lam, why in (
        (0.5, "OpenMixup leaves the regulariser out where lambda is 0.5"),
        (0.0008, "OpenMixup leaves the regulariser out where a share is at most 0.001"),
    ):
        yield from worst([decoupled(code, Fixed(lam), plain, 0, **eta)], f"both terms alike, lambda {lam}", why)


@beside(
    "decouplemix", OPENMIXUP, f"{HEADS}/cls_mixup_head.py", f"{LOSSES}/cross_entropy_loss.py",
    held="test_decouplemix.py::test_two_hot_lifts_the_shares_of_both_classes_for_a_binary_cross_entropy",
)  # fmt: skip
def decouplemix_binary(original: Checkout) -> Iterator[Gap]:
    """Two-hot targets of the binary cross entropy: batches without a pair of one class, and all."""
    code, draws = Original(original).heads(), 300
    for xi in (1.0, 2.0):
        head = {"two_hot": True, "lam_scale_mode": "pow", "lam_thr": 0.8, "lam_idx": xi}
        mixer = DecoupleMix(Mixup(1.0), 0.0, two_hot=0.8, xi=xi)
        found = [decoupled(code, Recorded(seed), mixer, seed, **head) for seed in range(draws)]
        two = [one for one in found if not one.alike]
        yield from worst(two, f"two_hot 0.8, xi {xi:g}, the {len(two)} of {draws} batches without a pair of one class")
        why = "where both are of one class the original's target is the sum of both lifted shares, 1.25 at most, here 1"
        yield from worst([one for one in found if one.alike], f"two_hot 0.8, xi {xi:g}, the other batches", why)


class Ordered(DecoupleMix):
    """Ours in OpenMixup's order: the shares change places where the first pair of two classes has the higher first."""

    def regulariser(
        self, logits: Tensor, y: Tensor, target: Tensor, index: Tensor, lam: Tensor | None = None
    ) -> Tensor:
        """The two terms of each sample, of one-hot labels."""
        a = y.argmax(1)
        lam, first = target.gather(1, a[:, None])[:, 0], (a != a[index]).int().argmax()
        swapped = a[first] > a[index][first]
        return super().regulariser(logits, y, target, index, torch.where(swapped, 1 - lam, lam))


@beside(
    "decouplemix", OPENMIXUP, "openmixup/models/augments/mixup.py", *STEP, SOFT,
    held="test_decouplemix.py::test_the_terms_are_softmax_without_the_partner_s_class",
)  # fmt: skip
def decouplemix_updates(original: Checkout) -> Iterator[Gap]:
    """Images and weights of OpenMixup's whole step over Mixup, with the terms alike and by their shares."""
    again = Again()
    mix = openmixup(original, "mixup", again)
    loss = {"type": "CrossEntropyLoss", "use_soft": True, "use_mix_decouple": True}
    eta = {"loss": loss, "multi_label": True, "eta_weight": {"eta": 0.1, "mode": "both", "thr": 0.5}}
    by_share = eta | {"lam_scale_mode": "pow", "lam_thr": 1, "lam_idx": 1}
    why = "OpenMixup orders both weights by the class numbers of the first pair, so that each gets the other's"
    for mixer, options, how, said in (
        (DecoupleMix(Mixup(1.0), 0.1), eta, ", both terms alike", ""),
        (DecoupleMix(Mixup(1.0), 0.1, power=1.0), by_share, ", terms by their shares", why),
        (Ordered(Mixup(1.0), 0.1, power=1.0), by_share, ", terms by their shares, in its order in ours too", ""),
    ):

        def theirs(model: nn.Module, options: dict[str, Any] = options) -> None:
            judge = head(original, "ClsMixupHead", **options)
            run(classifier(original, "mixup", 1.0, Listed(model), judge, function=mix), again)

        yield from twenty_updates(mixer, theirs, again, how, said)
    yield again.gap()
