"""The subjects that are probed, and the images that they are probed with."""

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

from ..base import Step, plan_alone

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CLASSES = 10
BATCH = 8
HEIGHT, WIDTH = 16, 32  # small, so that a box that is a pixel off shows; not square, so that swapped sides show
DRAWS = 8000


class Finding(NamedTuple):
    """The result of a probe."""

    holds: bool | None
    found: str


@dataclass(frozen=True)
class Subject:
    """A callable that is probed."""

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


def entry(name: str) -> Callable[[Probe], Probe]:
    """Enter a function in ``PROBES``."""

    def enter(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return enter


def seed_globals(seed: int) -> None:
    """Seed what strangers draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def of_mixer(
    step: Callable[[float | None], Step], alphas: tuple[float, ...] = (), boxes_as_cutmix: bool = True
) -> Subject:
    """Make one of our mixers a subject: call number n after a seed is update n of a run with that seed.

    ``step(alpha)`` returns a new step with a model of ``CLASSES`` classes. Only a mixer that must look at the model
    does so. Such a mixer is slow, and its law is not judged.
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


def is_box(pasted: Tensor) -> bool:
    """Whether the true pixels (H, W) are one filled rectangle."""
    rows, columns = pasted.any(1).nonzero()[:, 0], pasted.any(0).nonzero()[:, 0]
    return bool(pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
