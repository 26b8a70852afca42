"""The whole step of every mixer, pinned by the losses of four updates."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from mixers import MIXERS, REGRESSION, Step, build
from mixers.testing import batch

LEARNED = ("automix", "samix")
# A number changes only with the method itself: say in the commit why it did. The test prints what to paste.
GOLDEN: dict[str, list[float]] = {
    "vanilla": [1.668346, 1.672559, 1.657808, 1.488188],
    "mixup": [1.645991, 1.537527, 1.762707, 2.091569],
    "cutmix": [1.838953, 1.878186, 1.482430, 1.634892],
    "deit": [1.505207, 1.839324, 1.600837, 2.211548],
    "rsb": [1.668346, 1.627668, 1.638862, 1.685397],
    "manifoldmix": [1.805686, 1.686177, 1.378641, 1.976025],
    "alignmix": [1.831290, 1.829645, 1.695592, 1.853815],
    "transmix": [1.785725, 2.218365, 2.122455, 1.794765],
    "mixpro": [1.959869, 1.792162, 2.142288, 2.034131],
    "tlalign": [1.784032, 1.845701, 2.128942, 1.833465],
    "tokenmix": [1.622218, 1.827545, 2.685446, 1.981433],
    "puzzlemix": [1.714469, 1.496409, 1.724843, 1.768292],
    "smmix": [1.622218, 3.604854, 4.469865, 2.051965],
    "smoothmix": [1.710037, 1.350188, 1.723239, 1.916192],
    "gridmix": [1.787175, 1.801045, 1.834684, 1.760347],
    "fmix": [1.819504, 1.633085, 1.640672, 1.979945],
    "resizemix": [1.835096, 1.658482, 1.626948, 1.814810],
    "saliencymix": [2.046053, 2.075637, 1.689563, 1.814556],
    "automix": [5.037653, 4.791680, 5.191217, 4.922021],
    "samix": [5.053566, 4.924288, 5.172323, 5.231626],
    "adautomix": [4.008792, 4.964345, 3.821368, 5.149176],
    "decouplemix": [1.917289, 1.737843, 2.315227, 2.168028],
    "recursivemix": [1.668346, 1.706772, 1.836124, 1.774047],
    "attentivemix": [2.061683, 1.620883, 1.628375, 1.672581],
    "supermix": [1.748290, 1.666036, 1.879526, 1.483771],
    "grafting": [1.864976, 1.345698, 1.773575, 1.700102],
    "augmix": [2.452427, 3.152707, 3.593393, 3.427170],
    "nfm": [1.800928, 1.674698, 1.527924, 1.710254],
    "noisymix": [2.459451, 3.690133, 3.829612, 3.538383],
    "snapmix": [0.856860, 1.645926, 0.837696, 1.425032],
    "hmix": [2.038924, 1.818250, 1.626498, 1.613471],
    "gmix": [2.110698, 1.619794, 1.967648, 1.434327],
    "regmixup": [3.366382, 3.480406, 3.529594, 3.609919],
    "lumix": [1.428581, 1.531399, 1.381579, 1.728740],
    "sumix": [2.438301, 2.545771, 2.489306, 2.261765],
    "mergemix": [3.367181, 4.624043, 4.993288, 5.395819],
    "patchup": [3.584069, 3.302784, 4.012353, 3.094529],
    "softpatchup": [3.302521, 3.743817, 3.728808, 3.440396],
    "catchupmix": [1.945632, 1.629441, 1.923303, 1.611583],
    "mixtoken": [1.772190, 1.861486, 2.192186, 1.866568],
    "tokenmixup": [3.529826, 3.445155, 4.332232, 3.768752],
    "remix": [1.737902, 1.522079, 2.277740, 1.943831],
    "cmixup": [1.948605, 1.755602, 1.370966, 1.859857],
}

# Where a method decides by comparing numbers, rounding decides for it sooner or later: what a processor without AVX-512
# gives instead, measured with the same code (version 0.1 gives these too).
WITHOUT_AVX512: dict[str, list[float]] = {
    "rsb": [1.668345, 1.627667, 1.637167, 1.652123],
    "gridmix": [1.787175, 1.801045, 1.834683, 1.763129],
    "guidedmix": [1.889682, 1.738866, 1.588368, 1.771015],
    "comixup": [3.336691, 2.853094, 2.883324, 2.844635],  # guidedmix, this one and the last two: so alone
    "supermix": [1.748292, 1.666034, 1.879623, 1.413793],
    "automix": [5.037654, 4.791677, 5.192102, 4.920572],
    "samix": [5.053565, 4.924285, 5.172322, 5.230607],
    "automix, compounded": [5.037654, 4.791677, 5.192102, 4.919254],
    "samix, compounded": [5.053565, 4.924285, 5.172326, 5.230247],
}


# Mixers, and a law that the published numbers of two of them were made by.
MADE = {name: functools.partial(build, name) for name in MIXERS}
MADE |= {name: functools.partial(build, name) for name in REGRESSION}
MADE["remix"] = functools.partial(build, "remix", class_counts=[90, 30, 10, 3, 1])
MADE |= {f"{name}, compounded": functools.partial(build, name, mask_loss_law="compounded") for name in LEARNED}


@pytest.mark.parametrize("mixer", MADE)
def test_four_updates_give_the_golden_losses(mixer, model, transformer):
    """Plain SGD, fixed weights, batches from numpy, the mixer's default arguments."""
    torch.manual_seed(0)  # for what a mixer makes in setup
    try:
        step = Step(model, MADE[mixer](), nn.CrossEntropyLoss(reduction="none"))
    except ValueError:  # without attention the model will not do
        torch.manual_seed(0)
        step = Step(transformer, MADE[mixer](), nn.CrossEntropyLoss(reduction="none"))
    groups = [{"params": list(step.model.parameters())}, *step.mixer.param_groups(0.05, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    found = []
    for index in range(4):
        out = step(*batch(size=8, height=32, width=48, seed=index), np.random.default_rng((1, index)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.mixer.after_step(step.model, (index + 1) / 4)
        found.append(out.loss.item())
    paste = f'"{mixer}": [{", ".join(f"{loss:.6f}" for loss in found)}],'
    expected = GOLDEN if torch.backends.cpu.get_cpu_capability() == "AVX512" else GOLDEN | WITHOUT_AVX512
    if mixer not in expected and mixer in WITHOUT_AVX512:
        pytest.skip("not measured on a processor with AVX-512")
    assert mixer in expected, f"no golden losses for {mixer}; check them by reading its step, then add\n    {paste}"
    old = torch.__version__ < "2.14"  # whose last digits turn masks of two, and labels of sumix
    rounding = 2e-2 if old and mixer in ("supermix", "samix", "sumix") else 1e-4
    assert found == pytest.approx(expected[mixer], rel=rounding), f"found\n    {paste}"


def test_golden_losses_belong_to_mixers_that_exist_and_differ():
    assert set(GOLDEN | WITHOUT_AVX512) == set(MADE)
    assert len({tuple(numbers) for numbers in GOLDEN.values()}) == len(GOLDEN)
