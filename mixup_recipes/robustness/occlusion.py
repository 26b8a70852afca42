"""Occlusion: a share of the cells of a grid over the picture is dropped, at random.

Intriguing Properties of Vision Transformers, Naseer et al., NeurIPS 2021, https://arxiv.org/abs/2105.10497, "random
PatchDrop"; the published curves drop 10 % to 90 % of a 14 x 14 grid, cells of 16 x 16 pixels at 224.

Deviations. A dropped cell becomes the mean of the data (0 in a normalised picture), as in OpenMixup's tool
(``openmixup/utils/collect.py`` at 37e1372); the authors' code makes it black. Each picture has its own cells; both
codes draw one set for a whole batch, so that their scores hang on how the data were cut into batches. Sides need not
be multiples of the grid: cells then differ by a pixel. The number of cells is rounded, as OpenMixup does; the authors'
code rounds down.
"""

import numpy as np
import torch
from torch import Tensor

from mixup_recipes.typed import UserError

GRID = 14
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def occlude(x: Tensor, share: float, grid: int, rng: np.random.Generator) -> Tensor:
    """Normalised pictures (B, C, H, W) with ``share`` of their ``grid`` x ``grid`` cells set to 0, each its own cells.

    Row ``i`` of the pixels is in row ``i * grid // H`` of the cells. ``round(share * grid**2)`` cells are dropped. The
    cells of a picture do not depend on how many are in its batch, only on how many ``rng`` has had before. Raises
    ``UserError`` for a share outside of 0 to 1 or a grid that is finer than the pixels.
    """
    batch, _, height, width = x.shape
    if not 0 <= share <= 1:
        raise UserError(f"the share of cells to drop must be from 0 to 1, got {share!r}")
    if not 1 <= grid <= min(height, width):
        raise UserError(f"the grid must have 1 to {min(height, width)} cells a side on these pictures, got {grid!r}")
    order = rng.random((batch, grid * grid)).argsort(1)  # a random order of the cells: the first of them are dropped
    dropped = np.zeros((batch, grid * grid), bool)
    np.put_along_axis(dropped, order[:, : round(share * grid * grid)], True, 1)
    cells = torch.from_numpy(dropped.reshape(batch, 1, grid, grid)).to(x.device)
    rows, columns = (torch.arange(side, device=x.device) * grid // side for side in (height, width))
    return x.masked_fill(cells[:, :, rows][..., columns], 0)
