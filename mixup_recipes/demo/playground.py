"""What the page shows: photos mixed by a mixer, masks, labels, and what a trained model says of the mixed photos."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixers import Mixer, Step, build
from mixers.registry import docstring
from mixup_recipes.data import images
from mixup_recipes.data.decoding import BadImage, decode, read
from mixup_recipes.data.images import EvalTransform
from mixup_recipes.data.pictures import to_uint8
from mixup_recipes.demo.arguments import values
from mixup_recipes.demo.models import MOST, SIDE, Model, recipe_of
from mixup_recipes.mixer_args import check_mixer_name, counting
from mixup_recipes.pages import preview
from mixup_recipes.pages.methods import kinds, parse
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion
from mixup_recipes.typed import UserError

LEAST = 2  # photos
UPDATES = 10  # of a seed, among which the page looks for one that shows the method
SHOWN = 5  # classes of the model
VISIBLE = 0.03  # of a normalised photo: about two levels of 255
NOISE = (2.0, 5.0)  # the Beta distribution of noise levels in ``mixers.ops.draw_noise``: what it gives is no lambda


class Photo(NamedTuple):
    """A photo as a file, and what the page calls it."""

    path: Path
    name: str


class Shown(NamedTuple):
    """One photo after mixing."""

    pixels: Tensor
    """uint8 (3, H, W)."""
    mask: Tensor | None
    """(H, W) in [0, 1]: the share of the photo itself in each pixel. None where it is the same share everywhere."""
    labels: list[tuple[str, float]]
    """Names of photos and their shares in the label, the photo itself first. Shares of nothing are left out."""
    says: list[tuple[str, float]]
    """The model's likeliest classes with their probabilities, the likeliest first; empty without a model."""


class Result(NamedTuple):
    """What the page shows for a choice of mixer, arguments and seed."""

    photos: list[Shown]
    update: int
    """Which update of the seed it is."""
    notes: list[str]
    """Sentences: who looked, what is special."""


class Looking(NamedTuple):
    """The mixer on the network that looks at the photos, where one has to."""

    step: Step
    classes: list[int]
    """The class of each photo, no two the same."""
    total: int
    """How many classes there are."""
    trained: bool


class Update(NamedTuple):
    """One update of the seed."""

    number: int
    drawn: preview.Drawn
    mixed: Tensor
    """(N, 3, H, W), normalised."""
    target: Tensor
    """(N, K)."""
    changed: Tensor
    """(N,): which photos look otherwise than before, or have another label."""
    fixed: bool
    """Whether the mixer took the given lambda."""


class FixedLambda(np.random.Generator):
    """The generator of an update that gives a fixed lambda, and draws everything else as it would without that."""

    def __init__(self, key: tuple[int, int], lam: float):
        super().__init__(np.random.PCG64(np.random.SeedSequence(key)))
        self.lam, self.used = lam, False

    def beta(self, a: Any, b: Any, size: Any = None) -> Any:
        """``lam`` for a single draw, unless it is a level of noise."""
        drawn = super().beta(a, b, size)
        if size is not None or (a, b) == NOISE:
            return drawn
        self.used = True
        return self.lam


def mix(
    model: Model | None,
    photos: Sequence[Photo],
    mixer: str,
    fields: list[Any],
    seed: Any = 0,
    lam: float | None = None,
) -> Result:
    """Mix photos as the batch of one update, and ask the model about them.

    ``fields``: what the fields of the mixer's arguments hold. ``seed``: the update is the first one of this seed in
    which every photo changes, among the first ten, or else the one in which most do. ``lam``: a lambda in [0, 1] in
    place of a drawn one. Raises ``UserError``: too few photos or too many, a file that is no photo, an argument out of
    its range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | float) or seed < 0 or not float(seed).is_integer():
        raise UserError("The seed must be a whole number of at least 0.")
    check_mixer_name(mixer)
    recipe = recipe_of(model)
    args = values(mixer, recipe, fields)
    made = built(mixer, args)
    transform = model.transform if model else EvalTransform(SIDE, SIDE, "bicubic")
    upright = recipe.exif_orientation or model is None
    found = [seen(photo, transform, upright) for photo in photos[: MOST + 1]]
    if not LEAST <= len(photos) <= MOST:
        have = "there is 1" if len(photos) == 1 else f"there are {len(photos) or 'none'}"
        raise UserError(f"Mixing needs {LEAST} to {MOST} photos, and {have}.")
    pixels = torch.stack(found)
    x = images.normalise(pixels, recipe, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):  # of what setup draws, and dropout
        torch.manual_seed(int(seed))
        at = looking(model, mixer, args, made, x)
        y = torch.eye(at.total)[at.classes]
        update = shown_best(at.step, x, y, int(seed), lam)
        masks = masks_of(at.step.mixer, x, y, update)
    says = answers(model, update.mixed) if model else [[] for _ in photos]
    names, after = [photo.name for photo in photos], to_uint8(update.mixed, recipe)
    shown = []
    for i in range(len(x)):
        shares = {names[j]: float(update.target[i, at.classes[j]]) for j in sorted(range(len(x)), key=lambda j: j != i)}
        labels = [(name, share) for name, share in shares.items() if share > 0.005]
        shown.append(Shown(after[i], masks[i], labels, says[i]))
    return Result(shown, update.number, notes(model, mixer, args, at, x, y, update, lam))


def built(mixer: str, args: dict[str, Any]) -> Mixer:
    """The mixer. Raises ``UserError`` for an argument that it does not take, or that is out of its range."""
    try:
        made = build(mixer, **args)
    except (ValueError, TypeError) as error:
        raise UserError(f"{mixer}: {error}") from None
    for part in counting(made):
        part.class_counts = None  # of the recipe's classes, where each photo here is of its own
    return made


def seen(photo: Photo, transform: EvalTransform, upright: bool) -> Tensor:
    """A photo as the model sees it, uint8 (3, H, W). Raises ``UserError`` for a file that is none."""
    try:
        return transform(decode(read(photo.path), upright=upright))
    except BadImage as error:
        raise UserError(f"{photo.name} cannot be read as a photo: {error}.") from None


def thumbnail(photo: Photo) -> Tensor | None:
    """A photo as people see it, uint8 (3, 128, 128); None for a file that is none."""
    try:
        return EvalTransform(128, 128, "bicubic")(decode(read(photo.path), upright=True))
    except BadImage:
        return None


def looking(model: Model | None, mixer: str, args: dict[str, Any], made: Mixer, x: Tensor) -> Looking:
    """The network that looks: none where the mixer needs none, the model, or a small network that is not trained.

    The class of a photo is the likeliest one by the model that no photo before it has, so that labels tell photos
    apart. Raises ``UserError`` where no network here serves the mixer.
    """
    own, recipe = list(range(len(x))), recipe_of(model)
    plain = Recipe(
        name=mixer, mixer=mixer, mixer_args={mixer: args}, dataset=preview.SYNTHETIC, model="test_resnet",
        image_size=x.shape[-1], mean=recipe.mean, std=recipe.std,
    )  # fmt: skip
    if made.needs == "batch":
        return Looking(Step(nn.Identity(), made, criterion(plain)), own, len(x), False)
    if model and len(model.classes) >= len(x):
        try:
            step = Step(copy.deepcopy(model.net).train(), made, criterion(plain))
            return Looking(step, likeliest(model.net, x), len(model.classes), True)
        except ValueError:  # the mixer asks for another kind of network
            pass
    return Looking(preview.step_for(plain, len(x)), own, len(x), False)


@torch.no_grad()
def likeliest(net: nn.Module, x: Tensor) -> list[int]:
    """For each photo the likeliest class that no photo before it has."""
    taken: list[int] = []
    for row in net(x).argsort(1, descending=True).tolist():
        taken.append(next(k for k in row if k not in taken))
    return taken


def shown_best(step: Step, x: Tensor, y: Tensor, seed: int, lam: float | None) -> Update:
    """The first of the first updates in which every photo changes, or else the one in which most do."""
    best: Update | None = None
    for number in range(UPDATES):
        made: list[FixedLambda] = []
        draw: Callable[[], np.random.Generator] = functools.partial(np.random.default_rng, (seed, number))
        if lam is not None:
            draw = functools.partial(fixed, (seed, number), lam, made)
        drawn = preview.draw_plan(step, x, y, draw)
        with torch.no_grad():
            mixed, target = step.mixer.mix(x, y, **drawn.plan)
        changed = ((mixed - x).abs().amax((1, 2, 3)) > VISIBLE) | ((target - y).abs().amax(1) > 0.01)
        update = Update(number, drawn, mixed, target, changed, any(generator.used for generator in made))
        if best is None or changed.sum() > best.changed.sum():
            best = update
        if changed.all():
            break
    assert best is not None
    return best


def fixed(key: tuple[int, int], lam: float, made: list[FixedLambda]) -> FixedLambda:
    """A generator with a fixed lambda, which is noted in ``made``."""
    made.append(FixedLambda(key, lam))
    return made[-1]


@torch.no_grad()
def masks_of(mixer: Mixer, x: Tensor, y: Tensor, update: Update) -> list[Tensor | None]:
    """Each photo's share in each pixel of what it became, see ``Shown.mask``.

    Found by mixing white where the photo was and black where the others were, and the other way around, so that it is
    right for every mixer whose plan blends photos. None for a mixer that does something else to them.
    """
    masks: list[Tensor | None] = []
    for i in range(len(x)):
        white = torch.zeros_like(x)
        white[i] = 1
        own, others = (mixer.mix(batch, y, **update.drawn.plan)[0][i].mean(0) for batch in (white, 1 - white))
        blended = torch.allclose(own + others, torch.ones_like(own), atol=1e-3)
        masks.append(own.clamp(0, 1) if blended and own.max() - own.min() > 0.01 else None)
    return masks


@torch.no_grad()
def answers(model: Model, mixed: Tensor) -> list[list[tuple[str, float]]]:
    """For each image the model's likeliest classes with their probabilities."""
    logits = model.net(mixed).float()
    likely = logits.sigmoid() if model.recipe.multi_label else logits.softmax(1)
    top = likely.topk(min(SHOWN, logits.shape[1]))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[(model.classes[k], p) for k, p in zip(*row, strict=True)] for row in rows]


def notes(
    model: Model | None, mixer: str, args: dict[str, Any], at: Looking, x: Tensor, y: Tensor, update: Update,
    lam: float | None,
) -> list[str]:  # fmt: skip
    """What is to be known of a result, in sentences."""
    told = []
    inside = preview.in_features(at.step, x, y, update.mixed, update.target)
    if update.drawn.looked and at.trained and model:
        told.append(f"{model.name} is the network that the mixer worked with.")
    elif update.drawn.looked:
        why = f"{mixer} cannot work with {model.name}" if model else "No trained network is here"
        told.append(f"{why}, so the mixer worked with a small network that is not trained.")
    if isinstance(args.get("teacher"), str):
        told.append(f"Its teacher is {args['teacher']}.")
    if "learned" in kinds(parse(docstring(mixer)))[0]:
        told.append("It learns its masks in training. Here they come from a mix block that is not trained.")
    if inside:
        told.append("In this update it mixes features inside of the network, so the photos stay as they are.")
    elif not update.changed.any():
        plain = mixer == "vanilla"
        still = f"No photo changes in the first {UPDATES} updates of this seed."
        told.append("It leaves photos as they are." if plain else still)
    if lam is not None and update.fixed:
        told.append(f"Lambda is fixed at {lam:g}. The label shows what the mixer makes of it.")
    elif lam is not None:
        told.append("Lambda is not fixed, since the mixer drew none from a Beta distribution in this update.")
    return told
