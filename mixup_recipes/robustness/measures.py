"""Numbers of robustness in plain numpy: how well scores tell two sets of images apart, and temperatures of softmax.

Detecting out-of-distribution images: A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks. Hendrycks, Gimpel. ICLR 2017. https://arxiv.org/abs/1610.02136. Energy-based Out-of-distribution Detection.
Liu, Wang, Owens, Li. NeurIPS 2020. https://arxiv.org/abs/2010.03759. The images that the model knows are "inside": they
are what is looked for, and should score higher than those "outside".

Temperature: On Calibration of Modern Neural Networks. Guo, Pleiss, Sun, Weinberger. ICML 2017.
https://arxiv.org/abs/1706.04599.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import rankdata

from mixup_recipes.metrics.calibration.formula import calibration

COLDEST, HOTTEST = 0.05, 20.0
"""Between which temperatures are sought. Logits that are right about every image have none that is the best."""


def told_apart(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """``auroc``, ``fpr95`` and ``aupr`` of scores (N,) and (M,), in percent."""
    found = {"auroc": auroc(inside, outside), "fpr95": fpr95(inside, outside), "aupr": aupr(inside, outside)}
    return {name: 100 * value for name, value in found.items()}


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of pairs in which the image inside scores higher than the one outside; equal scores count half."""
    n, m = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of images outside that score no lower than the lowest of the best 95 % of those inside."""
    kept = -(-95 * len(inside) // 100)
    return float((outside >= np.sort(inside)[len(inside) - kept]).mean())


def aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Average precision: the mean, over the images inside, of the precision at the score of each."""
    scores = np.concatenate([inside, outside])
    known = np.arange(len(scores)) < len(inside)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(known[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # images of one score are taken together
    precision, found = hits[last] / (last + 1), np.diff(hits[last], prepend=0)
    return float((precision * found).sum() / len(inside))


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """``-log softmax(logits / temperature)[label]`` of each image (N,), in nats."""
    scaled = logits / temperature
    return np.maximum(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels], 0)


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that makes the mean ``nll`` least, by a bounded search over its logarithm."""
    logits = logits.astype(np.float64)
    found = minimize_scalar(
        lambda log: float(nll(logits, labels, math.exp(log)).mean()),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return math.exp(found.x)


def calibrated(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """``ece`` in percent and ``nll`` in nats of ``softmax(logits / temperature)``."""
    scaled = logits.astype(np.float64) / temperature
    confidence = np.minimum(np.exp(scaled.max(1) - logsumexp(scaled, axis=1)), 1)
    return calibration(confidence, scaled.argmax(1) == labels, nll(scaled, labels, 1))
