"""On a GPU: each mixer gives the CPU's numbers, in every precision and layout, the same twice, and waits for nothing.
Batches that are copied beside the steps are whole when a step reads them.

`pytest -m gpu`, or `benchmarks/gpu.sh`; MIXUP_RECIPES_TEST_DEVICE=cpu tries the tests themselves elsewhere.
"""

import contextlib
import os

import numpy as np
import pytest
import torch
from small_models import ATTENTIVE, CRITERION, DEIT, backbone, photos

from mixers import MIXERS, Step, Vanilla, build, taps
from mixup_recipes.data.loading import on_device
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.optimisation import FUSED, optimizer

DEVICE = torch.device(os.environ.get("MIXUP_RECIPES_TEST_DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
ATTENTION = {"transmix", "tokenmix", "smmix", "mixpro", "tlalign", "mixtoken", "tokenmixup"}
CASES = [
    (model, mixer) for model in ("resnet18", DEIT) for mixer in MIXERS if model in ATTENTIVE or mixer not in ATTENTION
]
SOLVED_ON_THE_HOST = {"comixup", "puzzlemix"}  # their solvers may run there
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions and products in 32 bits, by algorithms that give the same numbers twice."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        yield


def stepped(model, mixer, device, dtype=None, last=False, compiled=False, **args):
    """Losses of two updates, and the gradients of the second, in float64 on the host."""
    step = Step(backbone(model, **args), build(mixer), CRITERION)
    step = step.to(device, memory_format=torch.channels_last if last else torch.contiguous_format).train()
    if compiled:
        taps.compile_stages(step.model, dynamic=False)
    x, y = (part.to(device) for part in photos())
    x, losses = x.contiguous(memory_format=torch.channels_last) if last else x, []
    for number in range(2):
        torch.manual_seed(number)
        step.zero_grad()
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = step(x, y, np.random.default_rng((3, number))).loss
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad.double().cpu() for name, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("model", "mixer"), CASES)
def test_a_step_on_the_device_is_that_of_the_cpu(model, mixer):
    """Without drop path, which draws from the device's own generator."""
    host = torch.device("cpu")
    (losses, grads), (expected, others) = (stepped(model, mixer, where, drop_path_rate=0.0) for where in (DEVICE, host))
    assert losses == pytest.approx(expected, rel=2e-4)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 5e-3 * others[name].norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16])
@pytest.mark.parametrize(("model", "mixer"), CASES)
def test_half_precision_is_near_and_finite(model, mixer, dtype):
    (losses, grads), (expected, _) = stepped(model, mixer, DEVICE, dtype), stepped(model, mixer, DEVICE)
    assert losses == pytest.approx(expected, rel=0.1)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in ATTENTION])
def test_channels_last_gives_the_same_losses(mixer):
    assert stepped("resnet18", mixer, DEVICE, last=True)[0] == pytest.approx(
        stepped("resnet18", mixer, DEVICE)[0], rel=1e-3
    )


@pytest.mark.parametrize(("model", "mixer"), CASES)
def test_the_same_twice(model, mixer):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        (losses, grads), (again, others) = stepped(model, mixer, DEVICE), stepped(model, mixer, DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == again and all(torch.equal(grads[name], others[name]) for name in grads)


@pytest.mark.skipif(not GPU, reason="a CPU is never waited for")
@pytest.mark.parametrize(("model", "mixer"), [case for case in CASES if case[1] not in SOLVED_ON_THE_HOST])
def test_a_step_does_not_wait_for_the_device(model, mixer):
    step, (x, y) = Step(backbone(model), build(mixer), CRITERION).to(DEVICE).train(), photos()
    x, y = x.to(DEVICE), y.to(DEVICE)
    step(x, y, np.random.default_rng(0)).loss.backward()  # what is kept for later is made now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y, np.random.default_rng(1)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mixer", ["vanilla", "cutmix", "puzzlemix", "automix"])
def test_a_compiled_step_gives_nearly_the_same_losses(mixer):
    found, expected = stepped("resnet18", mixer, DEVICE, compiled=True)[0], stepped("resnet18", mixer, DEVICE)[0]
    assert found == pytest.approx(expected, rel=1e-3)


def test_batches_that_were_copied_beside_the_steps_are_those_of_a_plain_copy():
    """The device is far behind the host, which has dropped the batches when they are read."""

    def loaded():
        for n in range(30):
            parts = torch.full((64, 3, 96, 96), n, dtype=torch.uint8), torch.full((64,), n)
            yield *(part.pin_memory() if GPU else part for part in parts), torch.arange(64), torch.zeros(64)

    busy, read = torch.eye(4096 if GPU else 4, device=DEVICE), []
    for pixels, labels, *_ in on_device(loaded(), DEVICE):
        busy = busy @ busy
        read.append(torch.stack((*pixels.float().aminmax(), *labels.float().aminmax())))
    assert torch.stack(read).tolist() == [[n] * 4 for n in range(30)]


@pytest.mark.parametrize("opt", FUSED)
def test_an_optimiser_with_a_kernel_of_its_own_steps_as_on_the_cpu(opt):
    recipe, ends = load_recipe("quickstart_vanilla", opt=opt, lr=0.1), []
    for where in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        step = Step(torch.nn.Linear(5, 3), Vanilla(), CRITERION).to(where)
        made = optimizer(step, recipe)
        assert all(bool(group.get("fused")) == (where.type == "cuda") for group in made.param_groups)
        for _ in range(3):
            for p in step.parameters():
                p.grad = p.detach().cos()
            made.step()
        ends.append(step.model.weight.detach().cpu())
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-6)
