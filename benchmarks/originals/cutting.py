"""Methods that cut and blend without looking: boxes, grids, masks, constants."""

from collections.abc import Iterator

import numpy as np
import torch

from mixers import build
from originals import Checkout, Draws, Gap, Numpy, beside


@beside(
    "cutmix",
    "clovaai/CutMix-PyTorch",
    "train.py",
    held="test_parity.py::test_cutmix_mask_is_the_box_of_the_paper",
)
def clova_box(original: Checkout) -> Iterator[Gap]:
    """The published box for the lambda and the centre that ours drew."""
    differing = 0
    x, y = torch.zeros(2, 3, 224, 160), torch.eye(2)
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        lam = rng.beta(1.0, 1.0)
        centre = [rng.integers(224), rng.integers(160)]
        rand_bbox = original.names("train.py", "rand_bbox", np=Numpy(Draws(randint=centre)))
        top, left, bottom, right = rand_bbox(x.shape, lam)
        mask = build("cutmix").plan(x, y, np.random.default_rng(seed))["mask"][0, 0]
        theirs = torch.ones(224, 160)
        theirs[top:bottom, left:right] = 0
        differing += int(not torch.equal(mask, theirs))
    yield Gap("the box, 2,000 draws of lambda and centre, 224 x 160 pixels", differing / 2000, "share")
