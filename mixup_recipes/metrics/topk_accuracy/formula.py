"""Top-k accuracy in plain numpy.

A sample is a top-k hit when its label is among the k classes with the highest scores; the top-k accuracy is
the share of hits. Top-5 is the error measure of ILSVRC: Russakovsky et al. IJCV 2015,
https://arxiv.org/abs/1409.0575, section 4.
"""

from collections.abc import Iterable
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike


def topk_accuracy(top_ids: ArrayLike, labels: ArrayLike, ks: Iterable[int] = (1, 5)) -> dict[str, float]:
    """Percentage of samples whose label is among their first k ids, for each k: ``{"top1": 76.5, "top5": 93.1}``.

    ``top_ids`` (N, k_max) whole numbers: class ids, best first, none twice in a row; ``labels`` (N,) whole
    numbers: class ids. With fewer than five classes pass the ids there are, and ``ks`` to match, e.g. ``ks=(1,)``.

    Raises ``ValueError`` if there are no samples, shapes do not fit, ids are negative, repeated or not whole
    numbers, or a k is below 1 or above k_max.
    """
    top_ids, labels = _class_ids("top_ids", top_ids), _class_ids("labels", labels)
    if top_ids.ndim != 2 or labels.shape != top_ids.shape[:1]:
        raise ValueError(f"top_ids must be (N, k_max) and labels (N,), got {top_ids.shape} and {labels.shape}")
    ks = tuple(ks)
    if not ks or not all(isinstance(k, Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks must be whole numbers of at least 1, got {ks}")
    width = top_ids.shape[1]
    if max(ks) > width:
        raise ValueError(
            f"ks asks for top-{max(ks)}, but top_ids has {width} ids per sample; "
            f"pass {max(ks)} ids, or with fewer classes than that smaller ks"
        )
    repeated = (np.diff(np.sort(top_ids, axis=1), axis=1) == 0).any(axis=1)
    if repeated.any():
        row = int(np.argmax(repeated))
        raise ValueError(f"row {row} of top_ids names a class twice, {top_ids[row]}; pass class ids, not scores")
    hits = top_ids == labels[:, None]
    return {f"top{k}": 100.0 * int(hits[:, :k].any(axis=1).sum()) / len(labels) for k in ks}


def _class_ids(name: str, values: ArrayLike) -> np.ndarray:
    """``values`` as an array, or ``ValueError`` if they cannot be class ids."""
    try:
        ids = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths; every sample needs the same number of ids") from None
    if ids.size == 0:
        raise ValueError(f"{name} is empty: there is nothing to average")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers (class ids, not scores), got {ids.dtype}")
    if ids.min() < 0:
        raise ValueError(f"{name} has a negative class id, {ids.min()}; does this split have labels?")
    return ids
