"""Expected calibration error (ECE) and negative log-likelihood (NLL) in plain numpy.

On Calibration of Modern Neural Networks. Guo et al. ICML 2017. https://arxiv.org/abs/1706.04599

``ECE = sum_m |B_m| / N * |acc(B_m) - conf(B_m)|``, where bin m of M holds the samples whose confidence lies in
``((m-1)/M, m/M]``; ``NLL`` is the mean of ``-log p(label)`` over the samples (the paper writes its sum); section 2.

Deviations: a confidence of exactly 0, which no bin of the paper holds, is counted in the first.
"""

from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike

BINS = 15


def calibration(confidences: ArrayLike, correct: ArrayLike, nlls: ArrayLike, bins: int = BINS) -> dict[str, float]:
    """``{"ece": percent, "nll": nats}``.

    ``confidences`` (N,) probability of the predicted class, in [0, 1]; ``correct`` (N,) bool, whether that
    class is the label; ``nlls`` (N,) ``-log`` of the probability of the label, in nats, at least 0 (infinity is
    legal and gives an infinite mean); ``bins`` number of bins of equal width. Computed in float64.

    Raises ``ValueError`` if there are no samples, shapes differ, values are out of range or NaN, ``correct``
    is not bool, or ``bins`` is below 1.
    """
    confidences, nlls = np.asarray(confidences, dtype=np.float64), np.asarray(nlls, dtype=np.float64)
    correct = np.asarray(correct)
    if confidences.ndim != 1 or correct.shape != confidences.shape or nlls.shape != confidences.shape:
        raise ValueError(
            "confidences, correct and nlls must each be (N,), "
            f"got {confidences.shape}, {correct.shape} and {nlls.shape}"
        )
    if len(confidences) == 0:
        raise ValueError("confidences is empty: there is nothing to average")
    if correct.dtype != bool:
        raise ValueError(f"correct must be bool, got {correct.dtype}")
    if not isinstance(bins, Integral) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    _check("confidences", confidences, (confidences >= 0) & (confidences <= 1), "probabilities in [0, 1]")
    _check("nlls", nlls, nlls >= 0, "-log of probabilities, at least 0")

    gaps = np.bincount(bin_of(confidences, bins), weights=correct - confidences, minlength=bins)
    return {"ece": 100.0 * float(np.abs(gaps).sum()) / len(confidences), "nll": float(nlls.mean())}


def bin_of(confidences: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each confidence, from 0: the first m with ``confidence <= (m + 1) / bins``."""
    return np.searchsorted(np.arange(1, bins + 1) / bins, confidences)


def _check(name: str, values: np.ndarray, good: np.ndarray, what: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"{name} must be {what}; row {row} is {values[row]}")
