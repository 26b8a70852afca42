"""Mean average precision and F1 of images that may have several labels, or none, in plain numpy.

The average precision of a class is ``sum_n (R_n - R_{n-1}) P_n``, where n goes through the different scores, the
highest first, and P_n and R_n are precision and recall of "this score or higher": scikit-learn's
``average_precision_score``, without interpolation. Images of equal score come together. mAP is its mean over the
classes that have images; a class without one has none.

A class is predicted where its score is at least 0.5. ``F1 = 2 right / (images + predicted)`` over all images and
classes (micro), or as the mean over the classes that have images (macro); 0 where nothing is right.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5


def multi_label_scores(label: ArrayLike, score: ArrayLike) -> dict[str, float]:
    """``{"map": percent, "f1": percent, "f1_macro": percent}``; 0 where no image has a label.

    ``label`` (N, K) of 0 and 1; ``score`` (N, K) probabilities. Raises ``ValueError``: see ``checked``.
    """
    label, score = checked(label, score)
    images, predicted, right = counts(label, score)
    there = images > 0
    if not there.any():
        return dict.fromkeys(("map", "f1", "f1_macro"), 0.0)
    f1 = 200.0 * right[there] / (images + predicted)[there]
    return {
        "map": 100 * float(average_precisions(label, score)[there].mean()),
        "f1": 200.0 * int(right.sum()) / int((images + predicted).sum()),
        "f1_macro": float(f1.mean()),
    }


def average_precisions(label: ArrayLike, score: ArrayLike) -> NDArray[np.float64]:
    """(K,) average precision of each class, from 0 to 1; 0 for a class without images. See ``multi_label_scores``."""
    label, score = checked(label, score)
    found = np.zeros(label.shape[1])
    for k in np.flatnonzero(label.any(0)):
        order = np.argsort(-score[:, k], kind="stable")
        ordered = score[order, k]
        last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(order) - 1)  # of each different score
        right = np.cumsum(label[order, k], dtype=np.int64)[last]
        precision, recall = right / (last + 1), right / right[-1]
        found[k] = (np.diff(recall, prepend=0.0) * precision).sum()
    return found


def counts(label: NDArray, score: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(K,) images that have each class, images that it is predicted for, and those that are both."""
    has, said = label == 1, score >= THRESHOLD
    return has.sum(0), said.sum(0), (has & said).sum(0)


def checked(label: ArrayLike, score: ArrayLike) -> tuple[NDArray, NDArray]:
    """Both as arrays. Raises ``ValueError`` for other shapes, no images, other labels, and for no probabilities."""
    label, score = np.asarray(label), np.asarray(score)
    if label.ndim != 2 or label.shape != score.shape or not label.size:
        raise ValueError(
            f"label and score must both be (N, K), N and K at least 1, got {label.shape} and {score.shape}"
        )
    if not ((label == 0) | (label == 1)).all():
        raise ValueError("label must be of 0 and 1")
    if not ((score >= 0) & (score <= 1)).all():  # nan is not
        row = int(np.argmin(((score >= 0) & (score <= 1)).all(1)))
        raise ValueError(f"score must be probabilities in [0, 1]; row {row} has others")
    return label, score
