"""Scores by class, and which classes are taken for which, in plain numpy.

Of class k: ``recall = right / images``, ``precision = right / predicted`` and ``F1 = 2 right / (images + predicted)``,
where ``images`` are of class k, ``predicted`` were taken for it, and ``right`` are both. What would be divided by zero
is 0, as in scikit-learn.

Macro scores are means over the classes that have images, each class counting the same; macro recall is the balanced
accuracy. They are scikit-learn's where every class has images; where not, its macro precision and F1 count a class
without images as 0 as soon as one image is taken for it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class PerClass(NamedTuple):
    """Counts of each class, (K,), and the scores that follow from them, in percent."""

    images: NDArray[np.int64]
    predicted: NDArray[np.int64]
    """Images that were taken for the class."""
    right: NDArray[np.int64]

    @property
    def recall(self) -> NDArray[np.float64]:
        """(K,) share of the images of a class that were taken for it; 0 without images."""
        return ratio(self.right, self.images)

    @property
    def precision(self) -> NDArray[np.float64]:
        """(K,) share of the images taken for a class that are of it; 0 for a class that is never predicted."""
        return ratio(self.right, self.predicted)

    @property
    def f1(self) -> NDArray[np.float64]:
        """(K,) harmonic mean of precision and recall; 0 where nothing is right."""
        return ratio(2 * self.right, self.images + self.predicted)

    @property
    def top1(self) -> float:
        """Share of all images."""
        return 100 * int(self.right.sum()) / int(self.images.sum())

    def macro(self, scores: NDArray[np.float64]) -> float:
        """The mean over the classes that have images."""
        return float(scores[self.images > 0].mean())


def ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Percent, 0 where the whole is 0."""
    return np.divide(100.0 * part, whole, out=np.zeros(len(whole)), where=whole > 0)


def per_class(label: ArrayLike, predicted: ArrayLike, classes: int) -> PerClass:
    """The scores of ``classes`` classes. ``label`` and ``predicted`` (N,) classes of the images, from 0.

    Raises ``ValueError`` if there are no images, shapes differ, or a class is out of range.
    """
    label, predicted = checked(label, predicted, classes)
    counts = (np.bincount(of, minlength=classes) for of in (label, predicted, label[label == predicted]))
    return PerClass(*counts)


def confusions(label: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """(P, 3) rows of class, the other class that it was taken for, and how many times; the most frequent first.

    Of pairs that are as frequent, the one whose class has fewer images comes first. See ``per_class``.
    """
    label, predicted = checked(label, predicted, classes)
    wrong = label != predicted
    found, times = np.unique(label[wrong] * classes + predicted[wrong], return_counts=True)
    true, other = np.divmod(found, classes)
    order = np.lexsort((other, true, np.bincount(label, minlength=classes)[true], -times))
    return np.stack([true, other, times], 1)[order]


def matrix(label: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """(K, K) images by their class, a row each, and the class that they were taken for. See ``per_class``."""
    label, predicted = checked(label, predicted, classes)
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)


def checked(label: ArrayLike, predicted: ArrayLike, classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both as int64, after looking at them."""
    label, predicted = np.asarray(label), np.asarray(predicted)
    if label.ndim != 1 or label.shape != predicted.shape or not label.size:
        raise ValueError(f"label and predicted must both be (N,) of at least one image, got {label.shape} and "
                         f"{predicted.shape}")  # fmt: skip
    for name, values in (("label", label), ("predicted", predicted)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
        if not (values.min() >= 0 and values.max() < classes):
            row = int(np.argmax((values < 0) | (values >= classes)))
            raise ValueError(f"{name} must be a class from 0 to {classes - 1}; row {row} is {values[row]}")
    return label.astype(np.int64), predicted.astype(np.int64)
