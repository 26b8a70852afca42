"""A soup: one model whose weights are the average of those of several runs, or of the last checkpoints of one run.

Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time.
Wortsman et al. 2022, https://arxiv.org/abs/2203.05482. ``uniform``: the mean of all. ``greedy``: runs from the best to
the worst by the scores of their evaluations; each is added unless the score of the average falls.

Sums are taken in float64. Classes go by their names. The average of BatchNorm's statistics fits no network, so they are
taken anew, as PreciseBN takes them, over training images that are augmented and not mixed.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixers import Step, Vanilla
from mixup_recipes import fetch, files
from mixup_recipes.data import images
from mixup_recipes.data.identity import some
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.opening import is_here
from mixup_recipes.data.splits import Splits, count, load_splits
from mixup_recipes.recipe import Recipe, changed, to_yaml
from mixup_recipes.runs import replay
from mixup_recipes.runs.models import output_names
from mixup_recipes.runs.run import RECIPE, Data, Run, labels
from mixup_recipes.training import backbones, checkpoint, evaluation, launch, precise_bn
from mixup_recipes.training.export import export
from mixup_recipes.training.format import PLACE
from mixup_recipes.training.protocols import NAMES, headline
from mixup_recipes.training.update import criterion, new_step
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

SAME = ("model_args", "eval_size", "eval_resize", "interpolation", "mean", "std", "exif_orientation", "multi_label")
"""Fields of the recipe in which runs must agree beside the architecture: how the model is built, what it sees."""
Weights = dict[str, Tensor]


class Ingredient(NamedTuple):
    """Weights that may go into a soup."""

    name: str
    """The run's folder, or the checkpoint within."""
    sha256: str
    """Of the file that the weights are read from."""
    score: float | None
    """Top-1, or mAP, that the run noted of them, in percent; None where it noted none."""
    read: Callable[[], Weights]
    """The weights, by the names and in the order of classes of the first run."""


class Average(NamedTuple):
    """The mean of weights of one architecture."""

    sums: Weights
    """In float64; what is no floating-point number is that of the first."""
    first: Weights
    """The first of them, for the types."""
    models: int
    """How many there are."""

    @classmethod
    def of(cls, weights: Weights) -> "Average":
        """The average of one model: itself."""
        return cls({k: v.double() if v.is_floating_point() else v for k, v in weights.items()}, weights, 1)

    def plus(self, weights: Weights) -> "Average":
        """The average of one model more."""
        sums = {k: v + weights[k].double() if v.is_floating_point() else v for k, v in self.sums.items()}
        return Average(sums, self.first, self.models + 1)

    def weights(self) -> Weights:
        """The mean, in the types of the first model."""
        mean = {k: v / self.models if v.is_floating_point() else v for k, v in self.sums.items()}
        return {k: v.to(self.first[k].dtype) for k, v in mean.items()}


def soup(
    names: Sequence[str], out: Path, greedy: bool, last: int | None, bn_samples: int, dataset: str | None, batch: int
) -> str:
    """``mixup-recipes soup``: write the average as a model folder ``out``; returns what was done, in words.

    ``names``: run folders or ``hf-hub:owner/name``; one with ``last``, the number of its newest checkpoints.
    ``bn_samples``: training images of the first run for the statistics of BatchNorm. ``dataset``: where its data lie,
    if not where its recipe says. ``batch``: images per forward of an evaluation. Raises ``UserError``, and then leaves
    ``out`` alone.
    """
    check_arguments(names, out, greedy, last, bn_samples, batch)
    runs = [Run.open(name) for name in names]
    first = runs[0]
    net = fetch.model_of(first.folder, first.name)
    classes = output_names(net)
    found = of_runs(runs, net) if last is None else of_checkpoints(first, last)
    if again := [a.name for a, b in itertools.combinations(found, 2) if a.sha256 == b.sha256]:
        raise UserError(f"{again[0]} is given twice: two of the models have weights with the same SHA-256")
    fresh = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in net.modules())
    metric = headline(first.recipe)
    kitchen, why = opened(first, net, dataset, batch, bn_samples if fresh else None, fresh or greedy)
    if kitchen is None and (fresh or greedy):
        need = (
            "BatchNorm's statistics have to be computed again on training images"
            if fresh
            else "greedy scores each soup"
        )
        raise UserError(f"{need}, and the data of {first.name} cannot be opened: {why}")
    notes = [] if kitchen is None else same_images(runs, kitchen, greedy)
    for note in notes:
        print(note, flush=True)

    used = found
    if greedy and kitchen is not None:
        used = sorted(found, key=lambda one: -(one.score or 0.0))
        average, kept = greedily([one.read for one in used], lambda soup: kitchen.tried(soup, fresh))
        used = [used[number] for number in kept]
    else:
        average = Average.of(found[0].read())
        for one in found[1:]:
            average = average.plus(one.read())
    mixed = fresh and average.models > 1  # one model alone keeps its own statistics
    scores: dict[str, Any] = {}
    if kitchen is None:
        net.load_state_dict(average.weights())
    else:
        scores = kitchen.scores(average.weights(), mixed)
        net = kitchen.net.cpu()
    chosen, split = {one.name for one in used}, first.recipe.eval_split
    rows = [{k: getattr(one, k) for k in ("name", "sha256", "score")} | {"used": one.name in chosen} for one in found]
    about: dict[str, Any] = {
        "method": "greedy" if greedy else "uniform",
        "ingredients": rows,
        "metric": metric,
        "split": split,
    }
    counted = min(bn_samples, count(kitchen.splits.train)) if kitchen and mixed else None
    about |= {"scores": scores, "bn_samples": counted}
    put(out, net, runs, classes, about)
    said = [f"{one.name}: {told(metric, one.score)}{'' if one.name in chosen else ', left out'}" for one in found]
    number = f"{told(metric, scores[metric])} on {many(scores['count'], 'image')} of {split}" if scores else ""
    said.append(f"{out}: the average of {average.models}, {number or f'not scored: {why}'}")
    if greedy:
        said.append(
            f"the score on {split} decided which runs are in the soup, so only other images tell how good it is"
        )
    return "\n".join(said)


def told(metric: str, score: float | None) -> str:
    """A score in words."""
    return "not scored" if score is None else f"{NAMES[metric]} {score:.2f}"


def check_arguments(
    names: Sequence[str], out: Path, greedy: bool, last: int | None, bn_samples: int, batch: int
) -> None:
    """Raise ``UserError`` for what can be told before anything is opened."""
    for what, number, least in (("last", last, 2), ("bn_samples", bn_samples, 1), ("batch_size", batch, 1)):
        if number is not None and number < least:
            raise UserError(f"{what}: expected an integer at least {least}, got {number}")
    if last is None and len(names) < 2:
        raise UserError("a soup needs two or more runs, or one run and --last N to average its newest checkpoints")
    if last is not None and (len(names) != 1 or greedy):
        raise UserError("--last averages the newest checkpoints of one run; pass a single run, and leave out --greedy")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"cannot write {out}: it is there already; name a new folder")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")


def of_runs(runs: Sequence[Run], net: nn.Module) -> list[Ingredient]:
    """The exported weights of runs like the first, whose model is ``net``. Raises ``UserError`` where one is not."""
    first, classes = runs[0], output_names(net)
    heads = backbones.cfg_of(net).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = net.state_dict()
    found = []
    for run, label in zip(runs, labels(runs), strict=True):
        check_alike(first, run)
        where = places(classes, run.config.get("label_names"), first.name, run.name)

        def read(run: Run = run, where: list[int] = where) -> Weights:
            given = load_file(run.weights[""])
            if wrong := sorted(k for k in own.keys() | given.keys() if shape(own.get(k)) != shape(given.get(k))):
                raise UserError(
                    f"{run.name}: the shapes of its weights differ from those of {first.name}: {some(wrong)}"
                )
            moved = {k for k in given for head in heads if k.startswith(f"{head}.") and len(given[k]) == len(where)}
            return {k: v[where] if k in moved else v for k, v in given.items()}

        exported = run.exported[run.prefix + headline(run.recipe)]
        name = run.name if fetch.is_hub(run.name) else label
        found.append(Ingredient(name, run.weights_hash, exported, read))
    return found


def shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """The shape of a tensor that may be missing."""
    return None if tensor is None else tuple(tensor.shape)


def check_alike(first: Run, other: Run) -> None:
    """Raise ``UserError`` unless two runs have one architecture and see images alike."""
    a, b = (run.config.get("architecture") for run in (first, other))
    differing = [("architecture", a, b)] if a != b else []
    pairs = [(name, getattr(first.recipe, name), getattr(other.recipe, name)) for name in SAME]
    differing += [pair for pair in pairs if pair[1] != pair[2]]
    if differing:
        what, mine, theirs = differing[0]
        raise UserError(
            f"{other.name} has {what} {theirs} and {first.name} has {mine}, so their weights cannot be averaged"
        )


def places(classes: list[str], other: Any, first: str, name: str) -> list[int]:
    """Where each of the first run's classes is among those of another. Raises ``UserError`` where they are others."""
    if not isinstance(other, list):
        raise UserError(f"{first} names its classes and {name} does not, so the classes cannot be matched")
    if sorted(map(str, other)) != sorted(classes):
        new, gone = ([str(c) for c in a if c not in b] for a, b in ((other, classes), (classes, other)))
        words = [f"it has {some(new)}"] * bool(new) + [f"it lacks {some(gone)}"] * bool(gone)
        raise UserError(f"{name} does not have the same classes as {first}: {'; '.join(words) or 'some come twice'}")
    return [other.index(name) for name in classes]


def of_checkpoints(run: Run, last: int) -> list[Ingredient]:
    """The weights that a run reports, as they were at its newest checkpoints. Raises ``UserError``."""
    kept, recipe = run.checkpoints, run.recipe
    if len(kept) < last:
        raise UserError(
            f"{run.name} keeps {many(len(kept), 'checkpoint')}, but --last asks for {last}; --save_total_limit says "
            "how many a run keeps"
        )
    noted = {row.update: row.line.get(run.prefix + headline(recipe)) for row in run.log.val}
    file = "ema.safetensors" if recipe.report_ema else "model.safetensors"
    found = []
    for place in kept[-last:]:
        if why := checkpoint.damage(place):
            raise UserError(f"checkpoint {place} is damaged: {why}")
        update = int(place.name.removeprefix("step-"))

        def read(place: Path = place, update: int = update) -> Weights:
            if recipe.report_ema:
                return load_file(place / file)
            step = new_step(backbones.create_model(recipe), recipe)
            replay.load_weights(step, run, update, 0, 1)
            return step.mixer.models(step.model)[""].state_dict()

        sha256 = json.loads((place / "manifest.json").read_text())[file]
        found.append(Ingredient(f"checkpoints/{place.name}/{file}", sha256, noted.get(update), read))
    return found


def greedily(reads: Sequence[Callable[[], Weights]], score: Callable[[Average], float]) -> tuple[Average, list[int]]:
    """The average of the first and of each that does not lower its score, and which these are."""
    average, kept = Average.of(reads[0]()), [0]
    best = score(average)
    for number, read in enumerate(reads[1:], 1):
        more = average.plus(read())
        if (reached := score(more)) >= best:
            average, best = more, reached
            kept.append(number)
    return average, kept


class Kitchen:
    """Where weights are tried: a model, and the data of a run."""

    def __init__(self, net: nn.Module, splits: Splits, recipe: Recipe, batch: int):
        self.recipe, self.splits = recipe, splits
        self.accelerator = launch.accelerator(recipe, Path("."))
        self.net = launch.on_device(net, recipe, self.accelerator)
        self.train = Samples(splits.train, recipe, images.TrainTransform(recipe), "skip")
        self.held_out = Samples(splits.eval, recipe, images.EvalTransform.of(recipe), "skip")
        sizes = {"batch_size": batch, "per_device_train_batch_size": batch}
        self.evaluated = changed(recipe, **sizes)
        self.workers = launch.workers(None, self.accelerator, recipe)

    def scores(self, weights: Weights, fresh: bool) -> dict[str, Any]:
        """What the model scores with these weights; ``fresh``: with new statistics of BatchNorm, which it keeps."""
        self.net.load_state_dict(weights)
        if fresh:
            step = Step(self.net, Vanilla(), criterion(self.recipe))
            precise_bn.refresh(step, self.train, self.recipe, 1, self.workers, self.accelerator)
        columns = evaluation.predict_all(self.net, self.held_out, self.evaluated, self.accelerator, self.workers)
        return evaluation.score(columns)

    def tried(self, average: Average, fresh: bool) -> float:
        """The headline of an average, which is said; ``fresh``: the model has BatchNorm."""
        metric = headline(self.recipe)
        found = self.scores(average.weights(), fresh and average.models > 1)[metric]
        print(f"{many(average.models, 'run')}: {told(metric, found)}", flush=True)
        return found


def opened(
    run: Run, net: nn.Module, dataset: str | None, batch: int, bn_samples: int | None, needed: bool
) -> tuple[Kitchen | None, str]:
    """The kitchen of a run, or why its data cannot be opened; data that are not ``needed`` are not downloaded.

    ``bn_samples``: None for a model without BatchNorm.
    """
    plain: dict[str, Any] = {"sync_bn": False, "torch_compile": False, "report_ema": False, "streaming": False}
    plain |= {"unfreeze_epochs": None, "precise_bn_samples": bn_samples} | ({"dataset": dataset} if dataset else {})
    recipe = changed(run.recipe_here, **plain)
    try:
        if not needed and not is_here(recipe):
            raise UserError(f"dataset {recipe.dataset!r} is not on this machine")
        splits = load_splits(recipe, output_names(net))
    except UserError as e:
        return None, str(e)
    if splits.classes != output_names(net):
        raise UserError(f"dataset {recipe.dataset!r} has other classes than {run.name}: {some(splits.classes)}")
    if bn_samples is not None:
        seen = f"{many(min(bn_samples, count(splits.train)), 'image')} of {recipe.train_split}, in whole updates"
        print(f"BatchNorm's statistics are computed again on {seen} (--bn_samples)", flush=True)
    return Kitchen(net, splits, recipe, batch), ""


def same_images(runs: Sequence[Run], kitchen: Kitchen, greedy: bool) -> list[str]:
    """What to say where runs were evaluated on other images than those that score here.

    Raises ``UserError`` where ``greedy`` would choose by them: they may be images that one of the runs was trained on.
    """
    split = kitchen.recipe.eval_split
    found = kitchen.splits.identity["splits"][split]
    notes = []
    for run in runs:
        try:
            change = differing(run.data, run.recipe.eval_split, found, kitchen.splits.classes)
        except UserError as e:
            change = str(e)
        if change:
            notes.append(f"{run.name} was not evaluated on these images of {split}, and may have seen them: {change}")
    if notes and greedy:
        raise UserError(f"--greedy needs images that no run was trained on, but {notes[0]}")
    return notes


def differing(data: Data, split: str, found: dict[str, Any], classes: list[str]) -> str | None:
    """In what images differ from those of a run's split, which may number the same classes otherwise; None: in none."""
    if data.classes == classes or sorted(data.classes) != sorted(classes):
        return data.difference(split, found, classes)
    keys = ("images", "fingerprint")
    alike = all(data.splits[split].get(key) == found.get(key) for key in keys)
    return None if alike else "other files, or another number of them"


def same_data(runs: Sequence[Run]) -> bool:
    """Whether all runs note that they were trained and evaluated on the same images."""
    try:
        return all(run.data.identity == runs[0].data.identity for run in runs)
    except UserError:  # one notes nothing
        return False


def put(out: Path, net: nn.Module, runs: Sequence[Run], classes: list[str], about: dict[str, Any]) -> None:
    """Write the model folder, whole or not at all: what the root of the first run has of a model, and ``soup.json``.

    What it says of its data goes with it where it holds for all runs.
    """
    aside, first = files.aside(out), runs[0]
    try:
        with files.writing(out):
            aside.mkdir()
            backbones.cfg_of(net).pop("label_names", None)  # which an export writes in a place of their own
            export(net, aside, first.recipe, classes)
            files.write(aside / RECIPE, to_yaml(first.recipe))
            for name in ("data.json", PLACE) if same_data(runs) else ():
                if (first.folder / name).is_file():
                    shutil.copyfile(first.folder / name, aside / name)
            weights = aside / "model.safetensors"
            files.write_json(aside / "soup.json", about | {"weights_sha256": files.file_hash(weights)})
            os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
