"""What else a published run is made of: losses, samplers, averages, learning rates, erasing."""

import abc
import ast
import copy
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mixers import build
from mixup_recipes.data.images import erase
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.optimisation import learning_rate
from mixup_recipes.training.update import criterion, ema_decay, one_hot
from originals import Checkout, Gap, beside
from originals.same_draws import keeping

TIMM = "huggingface/pytorch-image-models"
OPENMIXUP = "Westlake-AI/openmixup"
UPDATES = 7
"""Updates of an epoch in the short runs here."""
space = types.SimpleNamespace


@beside(
    "binary cross-entropy of RSB",
    TIMM,
    "timm/loss/binary_cross_entropy.py",
    held="test_optimisation.py::test_a_loss_is_its_formula_one_number_per_sample",
)
def binary(original: Checkout) -> Iterator[Gap]:
    """The loss of mixed and smoothed targets and its gradient, with and without threshold and sum."""
    file = "timm/loss/binary_cross_entropy.py"
    given = {"torch": torch, "nn": nn, "F": nn.functional, "Optional": typing.Optional, "Union": typing.Union}
    made = original.names(file, "BinaryCrossEntropy", **given)
    for loss, threshold, smoothing in (("bce_mean", 0.2, 0.0), ("bce_mean", 0.2, 0.1), ("bce_sum", None, 0.1)):
        recipe = Recipe(num_classes=1000, loss=loss, bce_target_thresh=threshold, smoothing=smoothing)  # type: ignore[arg-type]
        ours = criterion(recipe)
        theirs = made(smoothing=0.0, target_threshold=threshold, sum_classes=loss == "bce_sum")
        values = slopes = 0.0
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            y = one_hot(torch.randint(1000, (32,), generator=generator), recipe)
            x, rng = torch.zeros(32, 3, 8, 8), np.random.default_rng(seed)
            _, target = build("rsb").mix(x, y, **build("rsb").plan(x, y, rng))
            logits = (4 * torch.randn(32, 1000, generator=generator)).requires_grad_()
            pair = [ours(logits, target).mean(), theirs(logits, target)]
            grads = [torch.autograd.grad(value, logits)[0] for value in pair]
            values = max(values, float(((pair[0] - pair[1]).abs() / pair[1]).detach()))
            slopes = max(slopes, float((grads[0] - grads[1]).abs().max() / grads[1].abs().max()))
        what = f"{loss}, threshold {threshold}, smoothing {smoothing:g}, 50 mixed batches of 32, 1,000 classes"
        yield Gap(f"loss: {what}", values, "relative")
        yield Gap(f"its gradient: {what}", slopes, "relative")


def shuffled(order: TrainOrder, epoch: int) -> Callable[..., Tensor]:
    """torch's permutation of an epoch, exchanged for ours."""
    index, _ = order.epoch(epoch)
    first = torch.from_numpy(index[:: order.recipe.aug_repeats].copy())
    seen = torch.zeros(order.size, dtype=torch.bool)
    seen[first] = True
    rest = (~seen).nonzero().flatten()
    return lambda *_, **__: torch.cat([first, rest])


@beside(
    "repeated augmentation",
    "facebookresearch/deit",
    "samplers.py",
    held="test_data.py::test_repeated_images_differ_in_their_draw_and_meet_in_no_micro_batch",
)
def repeated(original: Checkout) -> Iterator[Gap]:
    """The images that each of four ranks meets in three epochs, for the same permutation."""
    stub = space(utils=space(data=space(Sampler=object)), Generator=torch.Generator, repeat_interleave=None)
    for size, why in ((5120, ""), (5000, "an epoch there has whole multiples of 256 images, here of the batch size")):
        recipe = Recipe(batch_size=128, per_device_train_batch_size=32, aug_repeats=3, drop_last=True)
        orders = [TrainOrder(size, recipe, rank, 4) for rank in range(4)]
        given: dict[str, Any] = {"torch": torch, "math": math, "dist": stub}
        made = original.names("samplers.py", "RASampler", **given)
        differing = longer = total = 0
        for rank, order in enumerate(orders):
            sampler = made(range(size), num_replicas=4, rank=rank)
            ours = [key.index for micro in order for key in micro]
            length = order.updates_per_epoch * 32
            for epoch in range(3):
                with mock.patch.object(torch, "randperm", shuffled(order, epoch)):
                    sampler.set_epoch(epoch)
                    theirs = list(sampler)
                mine = ours[epoch * length : (epoch + 1) * length]
                longer += len(theirs) - len(mine)
                differing += sum(a != b for a, b in zip(mine, theirs, strict=False))
                total += len(mine)
        yield Gap(f"images by rank and place, 3 epochs of {size:,} images, 4 ranks", differing / total, "share")
        yield Gap(f"samples of an epoch, {size:,} images, batches of 128", abs(longer) / total, "share", why)


@beside(
    "random erasing",
    TIMM,
    "timm/data/random_erasing.py",
    held="test_images.py::test_erased_boxes_follow_the_law_of_timm",
)
def erasing(original: Checkout) -> Iterator[Gap]:
    """What is left of 3,200 images, for the same draws; boxes are filled with zeros."""
    attempts: list[Iterator[tuple[float, float]]] = []
    draws: dict[str, Iterator[float]] = {}

    def uniform(low: float, _high: float) -> float:
        """An attempt's area, and then the logarithm of its aspect."""
        if low > 0:
            draws["attempt"] = iter(next(attempts[0]))
        return next(draws["attempt"])

    def randint(_low: int, high: int) -> int:
        return math.floor(next(draws["place"]) * (high + 1))

    def start(*_: Any) -> float:
        """A new image: whether it is hit; its attempts and places."""
        attempts[:] = [iter(next(images))]
        return next(hits)

    scripted = space(random=start, uniform=uniform, randint=randint)
    given = {"torch": torch, "math": math, "random": scripted}
    made, _ = original.names("timm/data/random_erasing.py", "RandomErasing", "_get_pixels", **given)
    differing = 0
    for seed in range(50):
        kept: dict[str, list[Any]] = {}
        x = torch.full((64, 3, 32, 48), 9.0)
        ours = erase(x.clone(), 0.25, "const", keeping(seed, kept))
        (area, aspect), (hit, top, left) = ([value for _, value in kept[kind]] for kind in ("uniform", "random"))
        images, hits = iter(list(zip(*pair, strict=True)) for pair in zip(area, aspect, strict=True)), iter(hit)
        places = [value for i in range(64) if hit[i] < 0.25 for value in (top[i], left[i])]
        draws["place"] = iter(places)
        theirs = made(0.25, mode="const", device="cpu")(x.clone())
        differing += int((ours != theirs).any(1).sum())
    yield Gap("pixels of 3,200 images of 32 x 48, erased with probability 1/4", differing / (3200 * 32 * 48), "share")


def moved(model: nn.Module, update: int) -> None:
    """A step of the weights, as an optimiser would."""
    generator = torch.Generator().manual_seed(update)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def network() -> nn.Module:
    """Something with weights and statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 10))


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    floats = [name for name, value in theirs.items() if value.is_floating_point()]
    return max(float((ours[n] - theirs[n]).abs().max()) for n in floats) / max(
        float(theirs[n].abs().max()) for n in floats
    )


@beside(
    "moving average of weights",
    TIMM,
    "timm/utils/model_ema.py",
    held="test_update.py::test_an_update_is_the_one_written_down",
)
def average_timm(original: Checkout) -> Iterator[Gap]:
    """The average that DeiT keeps, of weights and statistics, over 50 updates; it has no warm-up."""
    made = original.names("timm/utils/model_ema.py", "ModelEma", torch=torch, deepcopy=copy.deepcopy)
    recipe, model = load_recipe("deit_b_official_deit"), network()
    for decay in (recipe.ema_decay, 0.9):
        theirs, ours = made(model, decay=decay), ModelEmaV3(model)
        own = Recipe(ema_decay=decay, ema_warmup_epochs=recipe.ema_warmup_epochs)
        for update in range(50):
            moved(model, update)
            ours.decay = ema_decay(own, update + 1, UPDATES)
            ours.update(model)
            theirs.update(model)
        gap = apart(ours.module.state_dict(), theirs.ema.state_dict())
        yield Gap(f"average after 50 updates, decay {decay:g}", gap, "relative")


@beside(
    "moving average of weights",
    OPENMIXUP,
    "openmixup/core/hooks/ema_hook.py",
    held="test_update.py::test_an_update_is_the_one_written_down",
)
def average_openmixup(original: Checkout) -> Iterator[Gap]:
    """The average of OpenMixup with its warm-up of the decay, over 50 updates, half of them warming up."""
    hooks = space(register_module=lambda: lambda made: made)
    base = type("Hook", (), {"every_n_iters": lambda self, runner, n: (runner.iter + 1) % n == 0})
    given = {"Hook": base, "HOOKS": hooks, "is_module_wrapper": lambda _: False, "warnings": None}
    made = original.names("openmixup/core/hooks/ema_hook.py", "EMAHook", **given)
    why = "it counts updates from 0 and here they count from 1, so that its decay warms up one update later"
    for later, said in ((0, why), (1, "")):
        model = network()
        ours = ModelEmaV3(model)
        hook = made(momentum=0.9, warmup="linear", warmup_iters=25, warmup_ratio=0.9)
        runner = space(model=network(), iter=0)
        hook.before_run(runner)
        recipe = Recipe(ema_decay=0.9, ema_warmup_epochs=5)
        for update in range(50):
            moved(model, update)
            ours.decay = ema_decay(recipe, update + 1, 5)
            ours.update(model)
            runner.iter = update + later
            runner.model.load_state_dict(model.state_dict(), strict=False)
            hook.after_train_iter(runner)
        buffers = dict(runner.model.named_buffers())
        theirs = {name: buffers[f"ema_{name.replace('.', '_')}"] for name, _ in model.named_parameters()}
        what = "parameters after 50 updates, decay 0.81 to 0.9" + (", counted as here" if later else "")
        yield Gap(f"average of {what}", apart(ours.module.state_dict(), theirs), "relative", said)


def timm_rates(original: Checkout, recipe: Recipe, updates: int) -> list[float]:
    """timm's cosine at each update of a run, which moves at the end of an epoch or of an update."""
    given: dict[str, Any] = {"torch": torch, "math": math, "np": np, "abc": abc, "ABC": object}
    given |= {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")}
    base = original.names("timm/scheduler/scheduler.py", "Scheduler", **given)
    made = original.names("timm/scheduler/cosine_lr.py", "CosineLRScheduler", Scheduler=base, _logger=None, **given)
    scale = updates if recipe.sched_on_updates else 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = made(
        optimizer,
        t_initial=recipe.epochs * scale,
        lr_min=recipe.min_lr,
        warmup_t=int(recipe.warmup_epochs) * scale,
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=not recipe.sched_on_updates,
        cycle_decay=0.1,
    )
    rates = []
    for update in range(recipe.epochs * updates):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step_update(update + 1)
        if (update + 1) % updates == 0:
            scheduler.step((update + 1) // updates)
    return rates


def deit_rates(original: Checkout, recipe: Recipe) -> list[float]:
    """The rate of each epoch in DeiT's own loop, with timm's scheduler."""
    tree = ast.parse((original.folder / "main.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    loop = [node for node in main.body if isinstance(node, ast.For)]
    optimizer, found = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr), []
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=recipe.epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=int(recipe.warmup_epochs),
    )

    def train_one_epoch(*_: Any, **__: Any) -> dict[str, float]:
        found.append(float(optimizer.param_groups[0]["lr"]))
        return {}

    given = {"lr_scheduler": scheduler, "train_one_epoch": train_one_epoch, "max_accuracy": 0.0, "n_parameters": 0}
    given |= {"evaluate": lambda *_: {"acc1": 0.0}, "print": lambda *_: None, "output_dir": None}
    given |= dict.fromkeys(("data_loader_train", "data_loader_val", "dataset_val", "model", "criterion"), "")
    given |= dict.fromkeys(("optimizer", "device", "loss_scaler", "model_ema", "mixup_fn"))
    given["args"] = space(
        start_epoch=0, epochs=recipe.epochs, distributed=False, clip_grad=None, train_mode=True, output_dir=""
    )
    exec(compile(ast.Module([*loop], []), "main.py", "exec"), given)
    return found


def rates(setting: str, original: Checkout) -> Iterator[Gap]:
    """Our rates beside timm's, during the warm-up and after it, relative to the largest."""
    recipe = load_recipe(setting)
    ours = [learning_rate(recipe, update, UPDATES) for update in range(recipe.epochs * UPDATES)]
    theirs = timm_rates(original, recipe, UPDATES)
    gaps = [abs(a - b) / max(theirs) for a, b in zip(ours, theirs, strict=True)]
    start = int(recipe.warmup_epochs) * UPDATES
    what = f"{recipe.epochs} epochs of {UPDATES} updates"
    yield Gap(f"rate of every update after the warm-up, {setting}, {what}", max(gaps[start:]), "relative")
    why = "timm moves once per epoch and replaces the cosine, here the warm-up moves per update and multiplies it"
    yield Gap(f"rate of every update of the warm-up, {setting}, {what}", max(gaps[:start]), "relative", why)


SCHEDULER = ("timm/scheduler/scheduler.py", "timm/scheduler/cosine_lr.py")
RATES = "test_optimisation.py::test_the_learning_rate_is_that_of_timm_after_a_warm_up_or_with_one_ahead_of_the_cosine"


@beside("learning rate of DeiT", TIMM, *SCHEDULER, held=RATES)
def rates_of_deit(original: Checkout) -> Iterator[Gap]:
    """The rate of every update of the official DeiT."""
    yield from rates("deit_s_official_deit", original)


@beside("learning rate of DeiT", "facebookresearch/deit", "main.py", held=RATES)
def epochs_of_deit(original: Checkout) -> Iterator[Gap]:
    """The rate of every epoch after the warm-up in DeiT's own loop."""
    recipe = load_recipe("deit_s_official_deit")
    ours = [learning_rate(recipe, epoch * UPDATES, UPDATES) for epoch in range(recipe.epochs)]
    theirs, warm = deit_rates(original, recipe), int(recipe.warmup_epochs)
    why = "the loop tells the scheduler the epoch that ended, so that all its rates come one epoch later than here"
    for later, said in ((0, why), (1, "")):
        pairs = list(zip(ours[warm:], theirs[warm + later :], strict=False))
        what = "rate of every epoch after the warm-up" + (", its next epoch" if later else "")
        yield Gap(f"{what}, 300 epochs", max(abs(a - b) for a, b in pairs) / max(theirs), "relative", said)


@beside("learning rate of RSB", TIMM, *SCHEDULER, held=RATES)
def rates_of_rsb(original: Checkout) -> Iterator[Gap]:
    """The rate of every update of RSB A2 as in timm."""
    yield from rates("r50_rsb_a2_original_rsb", original)


@beside(
    "learning rate of OpenMixup",
    OPENMIXUP,
    "openmixup/core/hooks/addtional_scheduler.py",
    held="test_optimisation.py::test_the_learning_rate_and_the_decay_of_the_average_are_those_of_the_published_runs",
)
def rates_of_openmixup(original: Checkout) -> Iterator[Gap]:
    """The rate of every update, by OpenMixup's own copy of the hooks that it takes from mmcv."""
    file = "openmixup/core/hooks/addtional_scheduler.py"
    given = {"cos": math.cos, "pi": math.pi, "Hook": object, "HOOKS": space(register_module=lambda: lambda made: made)}
    needed = ("LrAddtionalSchedulerHook", "CosineAnnealingLrAdditionalHook", "annealing_cos")
    _, made, _ = original.names(file, *needed, **given)
    for setting in ("deit_s_deit", "r50_rsb_a3_rsb", "r50_100e_mixup", "swin_t_deit", "convnext_t_deit"):
        recipe, rates = load_recipe(setting), []
        hook = made(
            addtional_indice=[0],
            by_epoch=not recipe.sched_on_updates,
            min_lr=recipe.min_lr,
            warmup="linear" if recipe.warmup_epochs else None,
            warmup_iters=int(recipe.warmup_epochs),
            warmup_by_epoch=bool(recipe.warmup_epochs),
            warmup_ratio=recipe.warmup_lr / recipe.lr,
        )
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
        runner = space(optimizer=optimizer, data_loader=range(UPDATES), epoch=0, iter=0)
        runner.max_epochs, runner.max_iters = recipe.epochs, recipe.epochs * UPDATES
        hook.before_run(runner)
        for runner.epoch in range(recipe.epochs):
            hook.before_train_epoch(runner)
            for _ in range(UPDATES):
                hook.before_train_iter(runner)
                rates.append(float(optimizer.param_groups[0]["lr"]))
                runner.iter += 1
        gap = max(abs(learning_rate(recipe, i, UPDATES) - rate) for i, rate in enumerate(rates)) / recipe.lr
        yield Gap(f"rate of every update, {setting}, {recipe.epochs} epochs of {UPDATES} updates", gap, "relative")
