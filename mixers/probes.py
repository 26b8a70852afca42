"""Statistical probes for any callable that mixes a batch: ours, another library's, a stranger's.

``probe(subject)`` looks at a black box ``mix(x, y) -> (x', y')`` from outside, with images whose pixels tell where they
come from and labels that do, and returns a ``Finding`` by name: ``holds`` is True or False for what the contract asks
of everyone, None for a plain fact. ``mixers.testing`` holds a ``Mixer`` against the whole contract.

Shapes: B images, C channels, H W pixels, K classes.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .base import Step, plan_alone
from .testing import differences, global_rngs

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CLASSES = 10
BATCH = 8
HEIGHT, WIDTH = 16, 32  # small, so that a box that is a pixel off shows; not square, so that swapped sides show
DRAWS = 8000
LEVEL = 1e-4  # a correct sampler fails a law once in ten thousand seeds; the seeds are fixed


class Finding(NamedTuple):
    """What a probe found."""

    holds: bool | None
    found: str


@dataclass(frozen=True)
class Subject:
    """What is probed."""

    make: Callable[[float | None], Mix]
    """A new ``mix(x, y)`` for a Beta parameter, or with its own default for None. ``y``: classes or one-hot."""
    seed: Callable[[int], None]
    """Start the randomness of every ``mix`` anew."""
    alphas: tuple[float, ...] = ()
    """Beta parameters that ``make`` takes and whose law it declares; empty: no law is declared."""
    boxes_as_cutmix: bool = True
    """The declared law of a pasted box is that of CutMix; of another method's boxes none is known here."""
    draws: int = DRAWS
    """How many batches a law is judged by."""
    is_mixer: bool = False
    """It is a ``Mixer``, which may mix inside the model, but leaves the global generators and the device alone."""


Probe = Callable[["Bench"], Finding]
PROBES: dict[str, Probe] = {}


def probe(subject: Subject) -> dict[str, Finding]:
    """Everything that is found out about a subject, by the name of the probe; an exception is a finding too.

    Raises ``ValueError`` when it cannot be called with a batch of 8 float images at all.
    """
    bench = Bench(subject)
    findings = {}
    for name, run in PROBES.items():
        try:
            findings[name] = run(bench)
        except (Exception, SystemExit) as error:
            findings[name] = Finding(False, raised(error))
    return findings


def entry(name: str) -> Callable[[Probe], Probe]:
    """Enter a function in ``PROBES``."""

    def enter(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return enter


# --------------------------------------------------------------------------------------------- subjects


def seed_globals(seed: int) -> None:
    """Seed what strangers draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def of_mixer(
    step: Callable[[float | None], Step], alphas: tuple[float, ...] = (), boxes_as_cutmix: bool = True
) -> Subject:
    """One of our mixers as a subject: call number n after a seed is update n of a run with that seed.

    ``step(alpha)`` returns a new step with a model of ``CLASSES`` classes, at which only a mixer looks that must;
    such a one is slow, and its law is not judged.
    """
    state = {"seed": 0, "update": 0}

    def seed(value: int) -> None:
        state.update(seed=value, update=0)

    def make(alpha: float | None) -> Mix:
        made = step(alpha)
        for norm in made.modules():  # the mixer's own networks too
            if isinstance(norm, _BatchNorm):
                norm.eval()  # one small image has no statistics of its own

        def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            def rng() -> np.random.Generator:
                return np.random.default_rng((state["seed"], state["update"]))

            plan = plan_alone(made.mixer, x, y, rng())
            plan = made(x, y, rng()).plan if plan is None else plan
            state["update"] += 1
            with torch.no_grad():
                mixed = made.mixer.mix(x, y, **plan)
            made.mixer.after_step(made.model, 0.0)
            return mixed

        return mix

    x, y = torch.zeros(2, 3, HEIGHT, WIDTH), torch.eye(2, CLASSES)
    looks = plan_alone(step(None).mixer, x, y, np.random.default_rng(0)) is None
    return Subject(make, seed, () if looks else alphas, boxes_as_cutmix, 100 if looks else DRAWS, is_mixer=True)


def forms(mix: Mix) -> list[str]:
    """Which labels it takes: "classes" (B,), "one-hot" (B, K), or both. Raises ``ValueError`` when neither."""
    x, labels = torch.rand(BATCH, 3, HEIGHT, WIDTH), torch.arange(BATCH)
    taken, reasons = [], []
    for form in ("classes", "one-hot"):
        try:
            _, target = mix(x.clone(), given(labels, form))
            if target.shape == (BATCH, max(target.shape[-1], BATCH)) and target.is_floating_point():
                taken.append(form)
            else:
                reasons.append(f"with {form} it returns targets {tuple(target.shape)} {target.dtype}")
        except (Exception, SystemExit) as error:
            reasons.append(f"with {form}: {raised(error)}")
    if not taken:
        raise ValueError(f"expected mix(x, y) -> (images, float targets (B, K)); {'; '.join(reasons)}")
    return taken


def given(labels: Tensor, form: str) -> Tensor:
    """Labels (B,) as the subject takes them."""
    return labels if form == "classes" else F.one_hot(labels, CLASSES).to(torch.float32)


def raised(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}".rstrip(": ")


class Bench:
    """A subject with the images it is probed with."""

    def __init__(self, subject: Subject):
        self.subject = subject
        subject.seed(0)
        self.forms = forms(subject.make(None))

    @functools.cached_property
    def kinds(self) -> set[str]:
        """What it does to pixels: "blend" (one weight for all), "box" (a pasted rectangle) or another "mask"."""
        found = set()
        for mixed, _ in self.calls(four(), 40):
            for own in sources(mixed).diagonal().permute(2, 0, 1):
                pasted = own < 1e-3
                if (own - own[0, 0]).abs().max() < 1e-4:
                    found |= {"blend"} if 1e-3 < own[0, 0] < 1 - 1e-3 else set()
                else:
                    whole = bool((pasted | (own > 1 - 1e-3)).all())
                    found.add("box" if whole and is_box(pasted) else "mask")
        return found

    def calls(
        self, x: Tensor, times: int, alpha: float | None = None, seed: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Mixed copies of a batch of images with labels 0, 1, ..., and their targets."""
        self.subject.seed(seed)
        mix = self.subject.make(alpha)
        y = given(torch.arange(len(x)), self.forms[0]).to(x.device)
        for _ in range(times):
            yield mix(x.clone(), y.clone())

    def one(self, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
        """One such call."""
        return next(self.calls(x, 1, seed=seed))


def four() -> Tensor:
    """Four images (4, 3, H, W) of one constant each: black, red, green, blue, so that shares can be read off."""
    colours = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return colours[:, :, None, None].expand(4, 3, HEIGHT, WIDTH).contiguous()


def noise(size: int = BATCH) -> Tensor:
    """Random images (size, 3, H, W)."""
    pixels = np.random.default_rng(0).standard_normal((size, 3, HEIGHT, WIDTH), dtype=np.float32)
    return torch.from_numpy(pixels)


def sources(mixed: Tensor) -> Tensor:
    """Share (4, 4, H, W) of each of the ``four`` images in each pixel of the mixed ones."""
    return torch.cat([1 - mixed.sum(1, keepdim=True), mixed], 1)


# --------------------------------------------------------------------------------------------- what it does


@entry("labels it takes")
def labels_taken(bench: Bench) -> Finding:
    return Finding(None, " and ".join(bench.forms))


@entry("kind of mix")
def kind(bench: Bench) -> Finding:
    """What it does to the pixels."""
    return Finding(None, " or ".join(sorted(bench.kinds)) or "none")


def is_box(pasted: Tensor) -> bool:
    """Whether the true pixels (H, W) are one filled rectangle."""
    rows, columns = pasted.any(1).nonzero()[:, 0], pasted.any(0).nonzero()[:, 0]
    return bool(pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


@entry("pixel share = label share")
def same_shares(bench: Bench) -> Finding:
    """Each source has the same share of an image and of its label."""
    off, hidden = 0.0, 0
    for mixed, target in bench.calls(four(), 200):
        pixels, labels = sources(mixed).mean((2, 3)), target[:, :4]
        if bench.subject.is_mixer and torch.equal(mixed, four()) and (labels - torch.eye(4)).abs().max() > 1e-3:
            hidden += 1  # a feature is mixed instead of the images: the checks of the contract see to that
        else:
            off = max(off, largest(pixels - labels))
    return Finding(off < 1e-3, f"off by {off:.1g}" + f", {hidden} of 200 batches mixed in the network" * (hidden > 0))


def largest(differences: Tensor) -> float:
    """The largest magnitude; what is not a number is infinitely far off."""
    return differences.abs().nan_to_num(nan=float("inf")).max().item()


@entry("targets are distributions")
def distributions(bench: Bench) -> Finding:
    """Targets lie in [0, 1] and sum to 1."""
    low, off = 0.0, 0.0
    for _, target in bench.calls(noise(), 50):
        low = min(low, -largest(target.clamp(max=0)), -largest((target - 1).clamp(min=0)))
        off = max(off, largest(target.sum(1) - 1))
    return Finding(low > -1e-5 and off < 1e-4, f"off by {off:.1g}" if low > -1e-5 else f"outside by {-low:.2g}")


# --------------------------------------------------------------------------------------------- laws


@entry("law of lambda")
def law(bench: Bench) -> Finding:
    """A blend's share against Beta(alpha, alpha), a box's against the paper's law with clipping, where declared."""
    subject = bench.subject
    alphas: list[float | None] = [*subject.alphas] or [None]
    known = bench.kinds == {"blend"} or (bench.kinds == {"box"} and subject.boxes_as_cutmix)
    texts, holds = [], True
    for alpha in alphas:
        lam = lambdas(bench, alpha)
        outside = f"{100 * ((lam < 0.01) | (lam > 0.99)).mean():.1f} % outside [.01, .99]"
        text = f"mean {lam.mean():.3f}, {outside}"
        if bench.kinds == {"blend"} and (lam.min() >= 0.4999 or lam.max() <= 0.5001):
            text += ", folded"
        if alpha is not None and known:
            expected, p = judge(lam, alpha, bench.kinds == {"box"})
            text = f"{text}, p {p:.1g}".replace(",", f" (law: {expected:.3f}),", 1)
            holds = holds and p > LEVEL
        texts.append(text if alpha is None else f"alpha {alpha:g}: {text}")
    return Finding(holds if subject.alphas and known else None, "; ".join(texts))


def lambdas(bench: Bench, alpha: float | None) -> np.ndarray:
    """The own shares of the labels: one per batch when all samples share it, else one per mixed sample."""
    per_batch, per_sample, shared = [], [], True
    for _, target in bench.calls(noise(), bench.subject.draws, alpha):
        own = target.diagonal()
        moved = own[own < 1]
        # a whole batch that stays as it is has lambda 1: that each is its own partner has a chance of 1 in 40,320
        per_batch.append(moved[0].item() if len(moved) else 1.0)
        per_sample += moved.tolist()
        shared = shared and (not len(moved) or (moved - moved[0]).abs().max().item() < 1e-4)
    return np.array(per_batch if shared else per_sample)


def judge(lam: np.ndarray, alpha: float, box: bool) -> tuple[float, float]:
    """Expected mean, and how likely a sample this far from the law is: the lesser p of two tests, doubled.

    Kolmogorov and Smirnov's test of the distribution, and a z test of the mean.
    """
    from scipy import stats

    beta = stats.beta(alpha, alpha)
    lam = np.sort(lam)
    if box:
        points, chance = box_law(HEIGHT, WIDTH, alpha)
        mean = float(points @ chance)
        spread = float(np.sqrt(points**2 @ chance - mean**2))
        gaps = np.searchsorted(lam, points + 1e-6) / len(lam) - chance.cumsum()
    else:
        points = lam[(lam > 1e-6) & (lam < 1 - 1e-6)]  # nearer to the ends float32 rounds to 0 and 1
        mean, spread = 0.5, float(beta.std())
        sides = [np.searchsorted(lam, points, side) / len(lam) for side in ("left", "right")]
        gaps = np.concatenate(sides) - np.tile(beta.cdf(points), 2)
    # for a law of single values, such as the box's, this p is an upper bound
    p = float(stats.kstwo.sf(np.abs(gaps).max(initial=0), len(lam)))
    z = abs(lam.mean() - mean) / (spread / np.sqrt(len(lam)))
    return mean, min(1.0, 2 * min(p, float(2 * stats.norm.sf(z))))


def box_law(height: int, width: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Own shares that CutMix's clipped box leaves, ascending, and the exact chance of each.

    Half sides are ``floor(side*sqrt(1-lam0)) // 2`` with ``lam0 ~ Beta(alpha, alpha)``, the centre is uniform on the
    pixels (Yun et al., https://arxiv.org/abs/1905.04899, and its code).
    """
    from scipy import stats

    halves = {0.0, 1.0} | {2 * k / side for side in (height, width) for k in range(1, side // 2 + 1)}
    steps = np.array(sorted(halves))  # values of sqrt(1-lam0) at which a half side grows
    below = stats.beta(alpha, alpha).sf(1 - steps**2)
    areas = np.zeros(height * width + 1)
    for start, chance in zip(steps[:-1], np.diff(below), strict=True):
        sides = []
        for side in (height, width):
            half, centre = int(side * (start + 1e-9)) // 2, np.arange(side)
            sides.append(np.minimum(centre + half, side) - np.maximum(centre - half, 0))
        np.add.at(areas, np.multiply.outer(*sides).ravel(), chance / (height * width))
    own = 1 - np.arange(height * width + 1) / (height * width)
    return own[::-1], areas[::-1]


@entry("one lambda per")
def shared_lambda(bench: Bench) -> Finding:
    """Whether the samples of a batch share their lambda."""
    for _, target in bench.calls(noise(), 50):
        own = target.diagonal()
        moved = own[own < 1]
        if len(moved) > 1 and (moved - moved[0]).abs().max() > 1e-4:
            return Finding(None, "sample")
    return Finding(None, "batch")


@entry("pairing")
def pairing(bench: Bench) -> Finding:
    """Who is mixed with whom, how many with themselves, and whether every image is used once as a partner."""
    drawn = []
    for _, target in bench.calls(noise(), 300):
        others = target[:, :BATCH].clone().fill_diagonal_(0)
        if others.max() > 0.01:
            share, partner = others.max(1)
            drawn.append(tuple(torch.where(share > 1e-4, partner, torch.arange(BATCH)).tolist()))
    if not drawn:
        return Finding(None, "none")
    own = tuple(range(BATCH))
    rolls = {tuple((i + k) % BATCH for i in own): f"roll by {-k}" for k in (1, -1)}
    known = {own[::-1]: "flip"} | rolls
    if len(set(drawn)) == 1:
        text = known.get(drawn[0], "always the same")
    else:
        text = "random permutation" if all(len(set(d)) == BATCH for d in drawn) else "random, some images used twice"
    fixed = np.mean([sum(a == b for a, b in zip(d, own, strict=True)) for d in drawn])
    return Finding(None, f"{text}, {fixed:.2f} of {BATCH} with themselves")


# --------------------------------------------------------------------------------------------- how it behaves


@entry("any batch size")
def batch_sizes(bench: Bench) -> Finding:
    """Batches of 1, 2, 3 and 7 images come back in their shape."""
    refused = []
    for size in (1, 2, 3, 7):
        try:
            mixed, target = bench.one(noise(size))
            right = mixed.shape == (size, 3, HEIGHT, WIDTH) and len(target) == size
            refused += [] if right else [f"{size}: shape {tuple(mixed.shape)}"]
        except Exception as error:
            refused.append(f"{size}: {type(error).__name__}")
    return Finding(not refused, "; ".join(refused) or "1, 2, 3, 7")


@entry("caller's tensors untouched")
def untouched(bench: Bench) -> Finding:
    """Neither images nor labels are written to."""
    bench.subject.seed(1)
    mix, written = bench.subject.make(None), set()
    for _ in range(10):
        x, y = noise(), given(torch.arange(BATCH), bench.forms[0])
        before = {"images": (x, x.clone()), "labels": (y, y.clone())}
        mix(x, y)
        written |= {name for name, (now, then) in before.items() if not torch.equal(now, then)}
    return Finding(not written, f"writes into {' and '.join(sorted(written))}" if written else "yes")


@entry("float64 and bfloat16 kept")
def dtypes(bench: Bench) -> Finding:
    """Images come back in the precision in which they were given."""
    wrong = []
    for dtype in (torch.float64, torch.bfloat16):
        try:
            found = bench.one(noise().to(dtype))[0].dtype
            wrong += [] if found == dtype else [f"{dtype} becomes {found}"]
        except Exception as error:
            wrong.append(f"{dtype}: {type(error).__name__}")
    return Finding(not wrong, "; ".join(wrong).replace("torch.", "") or "yes")


@entry("reads nothing from the device")
def device(bench: Bench) -> Finding:
    """It runs on the meta device, whose tensors have no values, and the result stays there."""
    try:
        mixed, target = bench.one(noise().to("meta"))
        holds, text = mixed.device.type == target.device.type == "meta", "yes"
    except Exception as error:
        holds, text = False, f"no: {raised(error)}"
    return Finding(holds if bench.subject.is_mixer else None, text if holds or "no" in text else "leaves it")


@entry("the same under a seed")
def deterministic(bench: Bench) -> Finding:
    """The same seed gives the same five results, another seed gives others."""
    runs = [list(bench.calls(noise(), 5, seed=seed)) for seed in (3, 3, 4)]

    def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
        return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))

    repeats, ignores = same(runs[0], runs[1]), same(runs[0], runs[2])
    return Finding(repeats, ("yes, whatever the seed" if ignores else "yes") if repeats else "no")


@entry("global generators")
def global_generators(bench: Bench) -> Finding:
    """Which of the global generators it draws from."""
    moved = set()
    bench.subject.seed(1)
    mix = bench.subject.make(None)
    for _ in range(5):
        x, y = noise(), given(torch.arange(BATCH), bench.forms[0])
        before = global_rngs()
        mix(x, y)
        names = zip(("python", "numpy", "torch"), before, global_rngs(), strict=True)
        moved |= {name for name, then, now in names if differences(then, now)}
    text = f"moves {' and '.join(sorted(moved))}" if moved else "left alone"
    return Finding(not moved if bench.subject.is_mixer else None, text)
