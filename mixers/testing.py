"""The contract as named checks: hold any mixer against it with ``check_mixer``.

``CHECKS`` maps the name of each check to a function that takes a factory, a callable without arguments that
returns a new mixer, and raises ``AssertionError`` saying what was expected and what was found. No test runner is
needed::

    from mixers.testing import check_mixer

    check_mixer(lambda: MyMixer(alpha=0.5))

Every check runs the mixer through ``Step`` on a tiny model, on the CPU, in a fraction of a second. A plan is taken
from ``Out.plan``, so a mixer may hand what it likes to its own ``plan``.
"""

import copy
import inspect
import io
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from typing import Any, get_args

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .base import Mixer, Needs, Out, Plan, Step

Factory = Callable[[], Mixer]
Check = Callable[[Factory], None]

CHECKS: dict[str, Check] = {}
CLASSES = 5


def check_mixer(factory: Factory, skip: Collection[str] = ()) -> None:
    """Run all checks but those in ``skip``; raise one ``AssertionError`` with a line for each that failed.

    Raises ``ValueError`` when ``skip`` names a check that does not exist.
    """
    unknown = set(skip) - set(CHECKS)
    if unknown:
        raise ValueError(f"no check is called {sorted(unknown)}; valid names: {', '.join(CHECKS)}")
    failures = []
    for name, run in CHECKS.items():
        if name not in skip:
            try:
                run(factory)
            except AssertionError as error:
                failures.append(str(error))
    if failures:
        raise AssertionError("\n".join(failures))


def check(function: Check) -> Check:
    """Enter a function in ``CHECKS``; whatever it raises becomes an ``AssertionError`` that opens with its name."""
    name = function.__name__

    @wraps(function)
    def run(factory: Factory) -> None:
        try:
            function(factory)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: expected no error; found {type(error).__name__}: {error}") from error

    CHECKS[name] = run
    return run


# What the checks are made of.


def expect(holds: bool, expected: str, found: object) -> None:
    """Raise ``AssertionError`` unless ``holds``."""
    if not holds:
        raise AssertionError(f"expected {expected}; found {found}")


def tiny_step(factory: Factory, seed: int = 0, classes: int = CLASSES) -> Step:
    """A new mixer on a tiny convolutional network with BatchNorm, or on a tiny ViT when it refuses the first one.

    Weights depend on ``seed`` only, those that the mixer makes in ``setup`` included.
    """
    refusals = []
    with torch.random.fork_rng(devices=[]):
        for name in ("test_resnet", "test_vit"):
            options: dict[str, Any] = {"dynamic_img_size": True, "patch_size": 8} if name == "test_vit" else {}
            torch.manual_seed(seed)
            model = timm.create_model(name, num_classes=classes, **options)
            try:
                return Step(model, factory(), nn.CrossEntropyLoss(reduction="none"))
            except ValueError as error:
                refusals.append(f"{name}: {error}")
    raise AssertionError(f"expected a mixer that can be set up on one of two tiny models; found {refusals}")


def batch(size: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images ``(B, 3, H, W)`` and one-hot targets ``(B, K)`` in which neighbours differ."""
    images = np.random.default_rng(seed).standard_normal((size, 3, height, width), dtype=np.float32)
    return torch.from_numpy(images), torch.eye(CLASSES)[torch.arange(size) % CLASSES]


def rng_of(step: int) -> np.random.Generator:
    """The generator of one optimiser update, made as the training loop makes it."""
    return np.random.default_rng((0, step))


def train(step: Step, first: int, last: int, total: int) -> list[float]:
    """Updates ``first`` to ``last - 1`` of ``total`` with plain SGD; returns the losses."""
    lr = 0.01
    groups: list[dict[str, Any]] = [{"params": [p for p in step.model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.SGD(groups + step.mixer.param_groups(lr, 0.0), lr=lr)
    losses = []
    for index in range(first, last):
        out = step(*batch(seed=index), rng_of(index))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.mixer.after_step(step.model, (index + 1) / total)
        losses.append(out.loss.item())
    return losses


def updates(step: Step, x: Tensor, y: Tensor, number: int) -> Iterator[Out]:
    """What ``number`` updates on one batch give, without an optimiser: a mixer may keep something for the next one."""
    for index in range(number):
        yield step(x, y, rng_of(index))
        step.mixer.after_step(step.model, (index + 1) / number)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of everything inside nested dicts, lists and tuples."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def differences(a: Any, b: Any) -> list[str]:
    """Paths at which two nested values are not the same bit for bit."""
    left, right = dict(leaves(a)), dict(leaves(b))
    paths = list(left) + [path for path in right if path not in left]
    return [path for path in paths if path not in left or path not in right or not equal(left[path], right[path])]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    return (a - b).abs().max().item()


def global_rngs() -> list[Any]:
    """The states of the global generators of python, numpy and torch, in plain values."""
    state: Any = np.random.get_state()
    return [random.getstate(), [state[1].tolist(), *state[2:]], torch.get_rng_state()]


def expect_global_rngs(before: list[Any], where: str) -> None:
    for name, a, b in zip(("python", "numpy", "torch"), before, global_rngs(), strict=True):
        expect(not differences(a, b), f"the global generator of {name} where it was after {where}", "it moved")


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that a step may not change on a model: modes, hooks, attributes, flags and gradients, but not buffers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str))
            found[f"{name}.{key}"] = value if plain else len(value) if isinstance(value, dict) else type(value).__name__
    for name, parameter in model.named_parameters():
        found[f"{name}.requires_grad"] = parameter.requires_grad
        found[f"{name}.grad"] = None if parameter.grad is None else parameter.grad.clone()
    return found


class Recorder(np.random.Generator):
    """The generator of step 0, which keeps everything that was drawn from it."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64((0, 0)))
        self.draws: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def draw(*args: Any, **options: Any) -> Any:
            result = found(*args, **options)
            self.draws.append(result)
            return result

        return draw


# Construction and plan.


@check
def constructor_stores_arguments(factory: Factory) -> None:
    """Each argument is an attribute of its own name, as given; nothing is drawn and nothing heavy is made."""
    before = global_rngs()
    mixer = factory()
    expect_global_rngs(before, "construction")
    names = inspect.signature(type(mixer)).parameters
    missing = [name for name in names if not hasattr(mixer, name)]
    expect(not missing, "every argument of the constructor stored under its own name", f"no attribute {missing}")
    stored = {name: getattr(mixer, name) for name in names}
    lists = {name: list(value) for name, value in stored.items() if isinstance(value, nn.ModuleList)}
    again = type(mixer)(**(stored | lists))
    for name, value in stored.items():
        rebuilt = getattr(again, name)
        as_given = repr(value) == repr(rebuilt) if isinstance(value, nn.Module) else equal(value, rebuilt)
        expect(as_given, f"{name}={value!r} stored as it was given", f"{rebuilt!r} after building again from it")
    heavy = [key for key in mixer.state_dict() if key.split(".")[0] not in names]
    expect(not heavy, "no parameter or buffer before setup(model)", heavy)


@check
def plan_is_plain_detached_data(factory: Factory) -> None:
    """A plan holds tensors without a graph, numbers, strings, None, and dicts, lists and tuples of them."""
    plan = tiny_step(factory)(*batch(), rng_of(0)).plan
    expect(type(plan) is dict, "a dict as the plan", type(plan).__name__)
    for path, value in leaves(plan):
        plain = value is None or isinstance(value, (Tensor, bool, int, float, str))
        expect(plain, f"a tensor, number, string or None at plan{path}", type(value).__name__)
        expect(not getattr(value, "requires_grad", False), f"plan{path} detached", "a tensor with a gradient graph")


@check
def plan_keys_are_mix_keywords(factory: Factory) -> None:
    """``mix(x, y, **plan)`` is a legal call."""
    step, (x, y) = tiny_step(factory), batch()
    signature = inspect.signature(step.mixer.mix)
    for out in updates(step, x, y, 3):
        try:
            signature.bind(x, y, **out.plan)
            step.mixer.mix(x, y, **out.plan)
        except TypeError as error:
            raise AssertionError(f"expected the keywords of mix{signature}; found {list(out.plan)}: {error}") from error


@check
def needs_is_true(factory: Factory) -> None:
    """A mixer that says it needs only the batch, or the batch and the model, plans its step from these alone."""
    step, (x, y) = tiny_step(factory), batch()
    needs = step.mixer.needs
    expect(needs in get_args(Needs), f"needs to be one of {get_args(Needs)}", repr(needs))
    look = {"batch": (), "model": (step.model, step.criterion), "step": None}[needs]
    if look is None:
        return
    for index in range(3):
        try:
            plan = factory().plan(x, y, rng_of(index), *look)
        except Exception as error:
            raise AssertionError(f"expected a plan without more than needs={needs!r}; found {error!r}") from error
        found = differences(step(x, y, rng_of(index)).plan, plan)
        expect(not found, f"the plan of the step from what needs={needs!r} hands over", f"another one at {found}")


@check
def same_rng_same_plan(factory: Factory) -> None:
    """All randomness comes from ``rng``: two new mixers with equal generators plan the same, bit for bit."""
    for index in range(3):
        first, second = (tiny_step(factory)(*batch(), rng_of(index)).plan for _ in range(2))
        found = differences(first, second)
        expect(not found, "equal plans from equal generators", f"differences at {found}")


@check
def other_rng_other_plan(factory: Factory) -> None:
    """The generator is used: new mixers with five different generators do not all plan the same."""
    plans = [tiny_step(factory)(*batch(), rng_of(index)).plan for index in range(5)]
    varies = any(differences(plans[0], plan) for plan in plans)
    expect(varies, "different plans from different generators", "five equal plans")


@check
def global_rng_untouched(factory: Factory) -> None:
    """Neither the step nor ``mix`` reads or moves a global generator."""
    step, (x, y) = tiny_step(factory), batch()
    # From a state that no seed leads to: a mixer that seeds a generator may have done so before.
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
    before = global_rngs()
    plan = step(x, y, rng_of(0)).plan
    expect_global_rngs(before, "a step")
    step.mixer.mix(x, y, **plan)
    expect_global_rngs(before, "mix")


# Mixing.


@check
def inputs_untouched(factory: Factory) -> None:
    """The caller's images and targets keep their values and their gradient flags."""
    step, (x, y) = tiny_step(factory), batch()
    given = {"images": x, "targets": y}
    before = {name: value.clone() for name, value in given.items()}
    for out in updates(step, x, y, 3):
        step.mixer.mix(x, y, **out.plan)
        found = differences(before, given)
        expect(not found, "images and targets that were not written to", f"changes in {found}")
        marked = [name for name, value in given.items() if value.requires_grad or value.grad is not None]
        expect(not marked, "images and targets without gradient or gradient flag", f"one on {marked}")


@check
def replay_rebuilds_the_step(factory: Factory) -> None:
    """``mix(x, y, **out.plan)`` gives, each time, the images the model saw and the target of the step."""
    step, (x, y) = tiny_step(factory), batch()
    seen: list[Tensor] = []
    step.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for out in updates(step, x, y, 3):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        found = differences((mixed, target), step.mixer.mix(x, y, **out.plan))
        expect(not found, "the same result each time mix is called", "another result the second time")
        off = gap(target, out.target)
        expect(off < 1e-6, "the target of the step from mix(x, y, **out.plan)", f"one that is off by {off:.3g}")
        off = min((gap(mixed, images) for images in seen if images.shape == mixed.shape), default=float("inf"))
        expect(off < 1e-5, "the images the model saw from mix(x, y, **out.plan)", f"images that are off by {off:.3g}")
        seen.clear()


@check
def shapes_dtypes_layout_kept(factory: Factory) -> None:
    """Any batch size and image shape work; shape, dtype and memory format of the batch are those of the result."""
    step = tiny_step(factory)
    for size, height, width in ((1, 64, 64), (2, 64, 96), (3, 96, 64), (7, 32, 32)):
        x, y = batch(size, height, width)
        for layout in (torch.contiguous_format, torch.channels_last):
            images = x.contiguous(memory_format=layout)
            plan = step(images, y, rng_of(size)).plan
            for dtype in (torch.float32, torch.bfloat16):
                mixed, target = step.mixer.mix(images.to(dtype), y, **plan)
                case = f"for images {tuple(x.shape)} in {dtype} and {layout}"
                found = (tuple(mixed.shape), mixed.dtype)
                expect(found == (tuple(x.shape), dtype), f"shape and dtype kept {case}", found)
                expect(mixed.is_contiguous(memory_format=layout), f"memory format kept {case}", mixed.stride())
                found = (tuple(target.shape), target.dtype)
                expect(found == (tuple(y.shape), y.dtype), f"targets {tuple(y.shape)} in {y.dtype} {case}", found)


@check
def uint8_is_a_type_error(factory: Factory) -> None:
    """Integer images or labels raise ``TypeError`` in a step and in ``mix``: mixing them would truncate."""
    step, (x, y) = tiny_step(factory), batch()
    plan = step(x, y, rng_of(0)).plan
    calls: dict[str, Callable[..., Any]] = {
        "a step": lambda x, y: step(x, y, rng_of(0)),
        "mix": lambda x, y: step.mixer.mix(x, y, **plan),
    }
    wrong = {"uint8 images": (x.to(torch.uint8), y), "integer one-hot": (x, y.long()), "labels": (x, y.argmax(1))}
    for where, call in calls.items():
        for what, arguments in wrong.items():
            try:
                call(*arguments)
            except TypeError:
                continue
            except Exception as error:
                raise AssertionError(f"expected TypeError for {what} in {where}; found {error!r}") from error
            raise AssertionError(f"expected TypeError for {what} in {where}; found no error")


@check
def it_mixes(factory: Factory) -> None:
    """Over five steps some pixel and some label change."""
    step, (x, y) = tiny_step(factory), batch()
    pixel = label = False
    for out in updates(step, x, y, 5):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        pixel, label = pixel or not torch.equal(mixed, x), label or not torch.equal(target, y)
        x.copy_(x.roll(1, 0)), y.copy_(y.roll(1, 0))  # an update meets another one's images in other places
    expect(pixel, "a changed pixel in five steps", "none")
    expect(label, "a changed label in five steps", "none")


@check
def targets_stay_distributions(factory: Factory) -> None:
    """Targets stay in [0, 1], rows that sum to 1 still do, and ``mix`` is linear in ``y``."""
    step, (x, hard) = tiny_step(factory), batch()
    kinds = {
        "one-hot": hard,
        "smoothed": 0.9 * hard + 0.1 / CLASSES,
        "multi-hot": torch.clamp(hard + hard.roll(1, dims=1), max=1),
    }
    for index in range(3):
        for kind, y in kinds.items():
            out = step(x, y, rng_of(index))
            inside = bool(((out.target > -1e-6) & (out.target < 1 + 1e-6)).all())
            expect(inside, f"{kind} targets in [0, 1]", (out.target.min().item(), out.target.max().item()))
            sums = out.target.sum(1)
            if kind != "multi-hot":
                expect(gap(sums, torch.ones(len(y))) < 1e-5, f"rows of {kind} targets that sum to 1", sums.tolist())

        def relabel(y: Tensor, plan: Plan = out.plan) -> Tensor:
            return step.mixer.mix(x, y, **plan)[1]

        one, other = kinds["smoothed"], kinds["multi-hot"]
        off = gap(relabel(0.3 * one + 0.7 * other), 0.3 * relabel(one) + 0.7 * relabel(other))
        expect(off < 1e-5, "a mix that is linear in y for a given plan", f"a difference of {off:.3g}")


@check
def label_share_is_pixel_share(factory: Factory) -> None:
    """Each image has a channel and a class of its own, so both shares of every source can be read off."""
    step = tiny_step(factory)
    y = torch.eye(3, CLASSES)
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 64).contiguous()
    for out in updates(step, x, y, 8):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        pixels, labels = mixed.mean((2, 3)), target[:, :3]
        off = gap(pixels, labels)
        found = f"pixels {pixels.tolist()} and labels {labels.tolist()}"
        expect(off < 1e-4, "each source's share of the label equal to its share of the pixels", found)


@check
def identical_images_stay(factory: Factory) -> None:
    """A batch of one image repeated, with one label repeated, comes back as it was."""
    step, (x, y) = tiny_step(factory), batch()
    x, y = x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4, 1)
    for out in updates(step, x, y, 3):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        off = gap(mixed, x), gap(target, y)
        expect(max(off) < 1e-5, "identical images and labels unchanged", f"differences of {off}")


# The step.


@check
def loss_is_sum_of_parts(factory: Factory) -> None:
    """The loss is one finite number with a gradient, and the sum of what is logged."""
    step, (x, y) = tiny_step(factory), batch()
    for out in updates(step, x, y, 3):
        expect(isinstance(out, Out), "an Out from forward", type(out).__name__)
        finite = out.loss.shape == () and bool(out.loss.isfinite())
        expect(finite and out.loss.requires_grad, "a finite scalar loss with a gradient", out.loss)
        plain = bool(out.logs) and all(part.shape == () and not part.requires_grad for part in out.logs.values())
        expect(plain, "named parts of the loss as detached scalars", out.logs)
        total = sum(part.item() for part in out.logs.values())
        expect(abs(total - out.loss.item()) < 1e-5, f"a loss equal to the sum of its parts, {total}", out.loss.item())
        shapes = (out.logits.shape, out.target.shape)
        expect(shapes == (y.shape, y.shape), f"logits and target of shape {tuple(y.shape)}", shapes)


@check
def model_left_as_found(factory: Factory) -> None:
    """A step changes no mode, hook, attribute, flag or gradient, and moves buffers as one plain forward would."""
    x, y = batch()
    for training in (True, False):
        step = tiny_step(factory)
        step.train(training)
        parameters = list(step.model.parameters())
        # One module, one flag and one gradient unlike the others: restoring a common value is not enough.
        list(step.model.modules())[-1].train(not training)
        parameters[0].requires_grad_(False)
        parameters[-1].grad = torch.ones_like(parameters[-1])
        plain = copy.deepcopy(step.model)
        before = footprint(step.model)
        out = step(x, y, rng_of(0))
        mode = "train" if training else "eval"
        found = differences(before, footprint(step.model))
        expect(not found, f"a model in {mode} mode left as it was found", f"changes at {found[:5]}")
        with torch.no_grad():
            plain(step.mixer.mix(x, y, **out.plan)[0])
        moved = dict(step.model.named_buffers())
        wrong = [n for n, b in plain.named_buffers() if not torch.allclose(b, moved[n], rtol=1e-4, atol=1e-6)]
        expect(not wrong, f"buffers in {mode} mode as after one forward on the mixed batch", f"others at {wrong[:5]}")


@check
def no_device_read(factory: Factory) -> None:
    """A step runs on the meta device, where tensors have no values to read, and its plan lives on that device."""
    step = tiny_step(factory).to("meta")
    x, y = (value.to("meta") for value in batch())
    for index in range(3):
        try:
            plan = step(x, y, rng_of(index)).plan
            step.mixer.after_step(step.model, (index + 1) / 3)
        except Exception as error:
            raise AssertionError(
                "expected a step that reads nothing back from the device (.item(), .cpu(), float(), if on a tensor, "
                f"boolean indexing) and leaves nothing on the host; found {type(error).__name__}: {error}"
            ) from error
        host = [path for path, value in leaves(plan) if isinstance(value, Tensor) and value.device != x.device]
        expect(not host, "all tensors of the plan on the device of the batch", f"others at {host}")


@check
def resume(factory: Factory) -> None:
    """Two steps, save, load into a new step, two more: the same losses and state as four steps, bit for bit."""
    whole = tiny_step(factory)
    train(whole, 0, 2, total=4)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    losses = train(whole, 2, 4, total=4)
    file.seek(0)
    resumed = tiny_step(factory, seed=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = train(resumed, 2, 4, total=4)
    expect(losses == again, f"losses {losses} after resuming", again)
    found = differences(dict(whole.state_dict()), dict(resumed.state_dict()))
    expect(not found, "the same state after resuming", f"differences at {found[:5]}")


@check
def autocast_bf16(factory: Factory) -> None:
    """A step runs under autocast: finite loss and gradients, targets in full precision."""
    step, (x, y) = tiny_step(factory), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step(x, y, rng_of(0))
    out.loss.backward()
    expect(bool(out.loss.isfinite()), "a finite loss", out.loss)
    expect(out.target.dtype == y.dtype, f"targets in {y.dtype}", out.target.dtype)
    wrong = [n for n, p in step.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not wrong, "finite gradients", f"others at {wrong[:5]}")


@check
def gradient_reaches_every_parameter(factory: Factory) -> None:
    """Over five steps every trainable parameter of model and mixer gets a gradient, and not all of it is zero."""
    step, (x, y) = tiny_step(factory), batch()
    for out in updates(step, x, y, 5):
        out.loss.backward()
    trainable = {name: p.grad for name, p in step.named_parameters() if p.requires_grad}
    missing = [name for name, grad in trainable.items() if grad is None]
    expect(not missing, "a gradient for every trainable parameter", f"none at {missing[:5]}")
    for owner in ("model.", "mixer."):
        own = [grad for name, grad in trainable.items() if name.startswith(owner) and grad is not None]
        expect(not own or any(bool(grad.any()) for grad in own), f"a gradient in {owner[:-1]} that is not 0", "only 0")


@check
def moves_with_to(factory: Factory) -> None:
    """``Step.to`` moves everything: no tensor is kept beside the registered parameters and buffers."""
    step = tiny_step(factory)
    train(step, 0, 1, total=2)
    x, y = (value.double() for value in batch())
    out = step.double()(x, y, rng_of(1))
    expect(out.loss.dtype == torch.float64, "a step in float64 after .double()", out.loss.dtype)
    step.to("meta")
    for name, module in step.named_modules():
        for path, value in leaves(vars(module)):
            tensors = list(value.state_dict().values()) if isinstance(value, nn.Module) else [value]
            left = any(isinstance(tensor, Tensor) and tensor.device.type != "meta" for tensor in tensors)
            expect(not left, f"{name}{path} moved by Step.to, as a parameter, buffer or submodule is", "it stayed")


@check
def accumulation_invariance(factory: Factory) -> None:
    """Micro-batches of one update draw the same values, and leave the gradient accumulated so far alone.

    Scalars (branch, layer, lambda) are drawn before anything whose amount depends on the size of the batch.
    """
    draws, plain = [], []
    for size, seed in ((4, 0), (4, 1), (3, 2), (7, 3)):
        rng = Recorder()
        plan = tiny_step(factory)(*batch(size, seed=seed), rng).plan
        draws.append(rng.draws)
        plain.append({path: None if isinstance(value, Tensor) else value for path, value in leaves(plan)})
    expect(repr(draws[0]) == repr(draws[1]), "the same draws whatever the images", f"{draws[0]} and {draws[1]}")
    scalars = [[draw for draw in of_one if np.ndim(draw) == 0] for of_one in draws]
    same = all(a == b for other in scalars[2:] for a, b in zip(scalars[0], other, strict=False))
    expect(same, "the same scalars drawn first whatever the batch size", scalars)
    expect(all(other == plain[0] for other in plain), "the same branch, layer and keys in every micro-batch", plain)

    step = tiny_step(factory)
    step(*batch(seed=0), rng_of(0)).loss.backward()
    before = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step(*batch(seed=1), rng_of(0))
    after = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    found = differences(before, after)
    expect(not found, "the gradient of the previous micro-batch untouched by the next step", f"changes at {found[:5]}")
