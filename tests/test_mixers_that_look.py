"""Mixers that look at the model or at saliency: accumulation, processes, half precision, compiled stages, dull images.

What every mixer promises is in ``test_contract.py``, what each one computes in its own file.
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import Forks
from marks import slow_unless
from small_models import traced
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mixers import MIXERS, AttentiveMix, CoMixup, Grafting, GuidedMix, PuzzleMix, SaliencyMix, Step, SuperMix, taps
from mixers.testing import Factory, batch, differences, footprint, leaves, rng_of, tiny_step
from mixup_recipes.training import launch

LOOKING: dict[str, Factory] = {
    "attentivemix": AttentiveMix,
    "puzzlemix": PuzzleMix,
    "puzzlemix clean": lambda: PuzzleMix(clean_lam=0.5),
    "puzzlemix adversarial": lambda: PuzzleMix(adv_p=1.0),
    "comixup": lambda: CoMixup(part=3),
    "comixup without clean": lambda: CoMixup(part=3, clean_lam=0.0),
    "grafting": Grafting,
    "grafting gradient": lambda: Grafting(source="gradient"),
    "supermix": lambda: SuperMix(steps=2, grid=8, sigma=1.0),
    "guidedmix": GuidedMix,
    "guidedmix gradient": lambda: GuidedMix("gradient"),
    "saliencymix": SaliencyMix,
}
LEARN_THE_CLEAN_BATCH = ("puzzlemix clean", "comixup")
BY_THE_GRADIENT = [name for name in LOOKING if name.startswith(("puzzle", "comixup")) or name.endswith("gradient")]
LR = 0.05
SLOW = {name for name in LOOKING if " " in name}  # options of a mixer that is there by itself
# no look by a gradient
INTO_THE_MODEL = [
    *("manifoldmix", "alignmix", "recursivemix", "snapmix", "decouplemix", "augmix", "nfm", "noisymix"),
    *("mixtoken", "tokenmixup", "regmixup", "lumix", "sumix", "patchup", "softpatchup", "catchupmix"),
]


def some(names: Iterable[str]) -> list[Any]:
    """The names, those of options for the slow tests."""
    return slow_unless(lambda name: name not in SLOW, names)


every = pytest.mark.parametrize("name", some(LOOKING))


def learn_by(step, criterion):
    """Replaces a step's criterion, and returns the one that it had."""
    had = step.criterion
    del step.criterion  # a module, in whose place torch takes no function
    step.criterion = criterion
    return had


def gradients(step):
    return {name: p.grad.clone() for name, p in step.named_parameters()}


def expect_close(found: dict[str, Tensor], expected: dict[str, Tensor], share: float = 1e-4) -> None:
    """Equal but for rounding, of each tensor's largest entry; of a gradient that is 0 in theory rounding is all."""
    assert found.keys() == expected.keys()
    sizes = {name: value.abs().max().item() for name, value in expected.items()}
    for name, value in expected.items():
        room = max(share * sizes[name], 1e-6 * max(sizes.values()))
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=room, msg=name)


@every
def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(name):
    step = tiny_step(LOOKING[name])
    for module in step.model.modules():
        if isinstance(module, _NormBase):
            module.eval()  # with running statistics nothing depends on what is in a micro-batch together
    parts = [batch(4, 64, 64, seed=seed) for seed in range(3)]
    mixed = []
    for x, y in parts:
        out = step(x, y, rng_of(0))
        (out.loss / 3).backward()
        mixed.append(step.mixer.mix(x, y, **out.plan))
    found = gradients(step)
    step.zero_grad()
    (images, targets), (x, y) = ([torch.cat(values) for values in zip(*of, strict=True)] for of in (mixed, parts))
    loss = step.criterion(step.model(images), targets).mean()
    if name in LEARN_THE_CLEAN_BATCH:
        loss = loss + step.mixer.clean_lam * step.criterion(step.model(x), y).mean()
    loss.backward()
    expect_close(found, gradients(step))


def train_in_parallel(rank: int, folder: str) -> None:
    """Two updates with each mixer as process ``rank`` of two, wrapped as the job does it; parameters into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, make in LOOKING.items():
        step = tiny_step(make)
        parallel = nn.parallel.DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(step.parameters(), lr=LR)
        for update in range(2):  # a parameter without a gradient is an error in the second one
            parallel(*batch(4, 64, 64, seed=2 * update + rank), rng_of(update)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = {n: p.detach() for n, p in step.named_parameters()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """The parameters that each process holds, by mixer."""
    folder = tmp_path_factory.mktemp("processes")
    code = "import test_mixers_that_look; test_mixers_that_look.train_in_parallel(int(sys.argv[1]), sys.argv[2])"
    with Forks({}, "import teachers, test_mixers_that_look; teachers.stand_in()") as forks:
        started = [forks.start(code, rank, folder) for rank in range(2)]
        for done in [forks.wait(one) for one in started]:
            assert done.returncode == 0, done.output
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@every
def test_two_processes_hold_the_parameters_of_one_that_takes_the_mean_of_both_gradients(name, of_two_processes):
    first, second = (of_rank[name] for of_rank in of_two_processes)
    assert not differences(first, second)
    steps = [tiny_step(LOOKING[name]) for _ in range(2)]  # each has BatchNorm statistics of its own, as a process has
    for update in range(2):
        for rank, step in enumerate(steps):
            step.zero_grad()
            step(*batch(4, 64, 64, seed=2 * update + rank), rng_of(update)).loss.backward()
        with torch.no_grad():
            for a, b in zip(*(step.parameters() for step in steps), strict=True):
                a -= LR * (a.grad + b.grad) / 2
                b.copy_(a)
    expect_close(first, dict(steps[0].named_parameters()), share=1e-3)


def floats(plan: dict[str, Any]) -> dict[str, Tensor]:
    """What is not an index in a plan."""
    return {path: v for path, v in leaves(plan) if isinstance(v, Tensor) and v.is_floating_point()}


def expect_finite(step: Step, loss: Tensor) -> None:
    """Scaled as a gradient scaler does it."""
    (loss * 256).backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(step).values())


half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@half_precision
@every
def test_a_step_in_half_precision_is_finite_with_a_plan_in_full_precision(name, dtype):
    step = tiny_step(LOOKING[name])
    with torch.autocast("cpu", dtype=dtype):
        out = step(*batch(), rng_of(0))
    expect_finite(step, out.loss)
    for path, value in floats(out.plan).items():
        assert value.dtype == torch.float32 and value.isfinite().all(), path


@half_precision
@pytest.mark.parametrize("name", some(BY_THE_GRADIENT))
def test_a_loss_whose_gradient_would_underflow_gives_the_same_images(name, dtype):
    def mixed_by(size):
        step, (x, y) = tiny_step(LOOKING[name]), batch(4, 64, 64)
        if hasattr(step.mixer, "eta"):
            step.mixer.eta = 0.0  # saliency decides alone, however flat it is before anything was learnt
        criterion = learn_by(step, lambda logits, target: criterion(logits, target) * size)
        with torch.autocast("cpu", dtype=dtype):
            plans = [step(x, y, rng_of(update)).plan for update in range(2)]
        return torch.cat([step.mixer.mix(x, y, **plan)[0] for plan in plans])

    expected = mixed_by(1.0)
    assert torch.equal(mixed_by(2.0**-30), expected)  # float16 ends at 2**-24
    assert not torch.equal(mixed_by(0.0), expected)


@traced
@pytest.mark.parametrize(
    ("make", "backend"),
    [pytest.param(LOOKING[name], "eager", id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LOOKING]
    + [pytest.param(MIXERS[name], "eager", id=name, marks=pytest.mark.slow) for name in INTO_THE_MODEL]
    + [  # the code that was compiled for this machine
        pytest.param(MIXERS[name], "inductor", id=f"{name} on this machine", marks=pytest.mark.slow)
        for name in ("puzzlemix", "comixup", "grafting", "automix", "samix")
    ],
)
def test_a_compiled_backbone_is_looked_at_all_the_same(make, backend, compiler, monkeypatch):
    """Two updates of a step, compiled as the job does it, and the logits of the model after them."""
    monkeypatch.setattr(taps, "compile_stages", functools.partial(taps.compile_stages, backend=backend))
    steps = [tiny_step(make) for _ in range(2)]
    launch.compile_step(steps[1])
    optimizers = [torch.optim.SGD(step.parameters(), lr=LR) for step in steps]
    for update in range(2):
        x, y = batch(4, 64, 64, seed=update)
        outs = [step(x, y, rng_of(update)) for step in steps]
        torch.testing.assert_close(outs[1].loss, outs[0].loss, rtol=1e-3, atol=1e-4)
        for step, out, optimizer in zip(steps, outs, optimizers, strict=True):
            optimizer.zero_grad()
            out.loss.backward()
            if update == 0:
                optimizer.step()
                step.mixer.after_step(step.model, 0.5)
    plain, compiled = ({n: p.grad for n, p in step.named_parameters() if p.grad is not None} for step in steps)
    expect_close(compiled, plain, share=5e-3)


@pytest.mark.parametrize("name", LEARN_THE_CLEAN_BATCH)
def test_a_model_that_learns_from_the_clean_batch_too_sees_both_batches_and_keeps_all_else(name):
    """The contract leaves these out whole, for their BatchNorm statistics."""
    step, (x, y) = tiny_step(LOOKING[name]), batch(4, 64, 64)
    step.model.get_classifier().eval()
    plain, before = copy.deepcopy(step.model), footprint(step.model)
    out = step(x, y, rng_of(0))
    assert not differences(before, footprint(step.model))
    with torch.no_grad():
        plain(x)
        plain(step.mixer.mix(x, y, **out.plan)[0])
    moved = dict(step.model.named_buffers())
    for buffer_name, buffer in plain.named_buffers():
        torch.testing.assert_close(moved[buffer_name], buffer, rtol=1e-4, atol=1e-6)


def expect_plan(step, x, y):
    """Plans and mixed images are made of numbers, masks and labels of shares."""
    for update in range(3):
        plan = step(x, y, rng_of(update)).plan
        for path, value in floats(plan).items():
            if "noise" in path:
                assert value[x.isfinite().all(3).all(2).all(1)].abs().max() <= step.mixer.adv_eps + 1e-6
            else:
                assert ((value >= 0) & (value <= 1)).all(), path  # not a number is neither
        _, target = step.mixer.mix(x, y, **plan)
        assert ((target >= 0) & (target <= 1 + 1e-6)).all()
        torch.testing.assert_close(target.sum(1), torch.ones(len(y)), atol=1e-5, rtol=0)


@every
def test_dull_and_broken_images_a_loss_without_a_usable_gradient_and_any_size_get_a_plan(name):
    x, y = batch(4, 64, 64)
    flat, broken = (torch.full_like(x[:1], value) for value in (1.0, torch.nan))
    for images in (torch.full_like(x, 0.7), torch.zeros_like(x), torch.cat([flat, x[1:]]), torch.cat([broken, x[1:]])):
        expect_plan(tiny_step(LOOKING[name]), images, y)
    for size in (0.0, torch.inf, torch.nan):
        step = tiny_step(LOOKING[name])
        learn_by(step, lambda logits, target, size=size: (logits * target).sum(1) * size)
        expect_plan(step, x, y)
    for shape in [(1, 64, 64), (2, 33, 47), (5, 50, 150), (7, 61, 64), (3, 9, 70)]:
        step, (x, y) = tiny_step(LOOKING[name]), batch(*shape)
        expect_plan(step, x, y)
        expect_finite(step, step(x, y, rng_of(0)).loss)
