"""Promise: scores by class are what counting image by image gives, and macro scores count each class the same."""

from collections import Counter

import numpy as np
import pytest

from mixup_recipes.metrics.calibration.formula import BINS, bin_of, calibration
from mixup_recipes.runs.per_class import confusions, matrix, per_class


def by_hand(label, predicted, k):
    """Precision, recall and F1 of class ``k`` in percent, image by image; 0 where there is nothing to divide by."""
    pairs = list(zip(label.tolist(), predicted.tolist(), strict=True))
    right, missed = pairs.count((k, k)), sum(a == k != b for a, b in pairs)
    false = sum(a != k == b for a, b in pairs)
    precision = right / (right + false) if right + false else 0
    recall = right / (right + missed) if right + missed else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return 100 * precision, 100 * recall, 100 * f1


@pytest.mark.parametrize(("classes", "images", "used"), [(1, 1, 1), (2, 5, 2), (4, 60, 4), (9, 40, 6), (300, 90, 250)])
def test_scores_of_each_class_and_their_means_are_those_of_counting(classes, images, used):
    rng = np.random.default_rng(classes)
    label = rng.integers(0, used, images).astype(np.int32)  # the last classes have no images
    predicted = np.where(rng.random(images) < 0.6, label, rng.integers(0, classes, images)).astype(np.int32)
    found = per_class(label, predicted, classes)
    expected = np.array([by_hand(label, predicted, k) for k in range(classes)])
    np.testing.assert_allclose(np.stack([found.precision, found.recall, found.f1], 1), expected)
    there = sorted(set(label.tolist()))
    for column, scores in enumerate((found.precision, found.recall, found.f1)):
        assert found.macro(scores) == pytest.approx(sum(expected[k, column] for k in there) / len(there))
    assert found.top1 == pytest.approx(100 * np.mean(label == predicted))
    counts, all_of_them = Counter(zip(label.tolist(), predicted.tolist(), strict=True)), range(classes)
    assert matrix(label, predicted, classes).tolist() == [[counts[a, b] for b in all_of_them] for a in all_of_them]
    pairs = {(a, b): times for a, b, times in confusions(label, predicted, classes).tolist()}
    assert pairs == {(a, b): times for (a, b), times in counts.items() if a != b}


def test_a_rare_class_counts_as_much_as_a_frequent_one_and_a_class_without_images_not_at_all():
    found = per_class([0] * 98 + [1, 1], [0] * 98 + [0, 1], 4)
    assert (found.top1, found.macro(found.recall)) == (99.0, 75.0)
    assert found.macro(found.precision) == pytest.approx((9800 / 99 + 100) / 2)
    never = per_class([0, 0, 1], [0, 0, 2], 3)
    assert (never.precision.tolist(), never.recall.tolist(), never.f1.tolist()) == ([100, 0, 0],) * 3
    assert never.macro(never.f1) == 50.0


def test_of_pairs_that_are_as_frequent_the_greater_share_of_a_class_comes_first():
    label, predicted = [0, 0, 0, 1, 1, 2, 3, 3], [1, 1, 0, 0, 1, 0, 2, 2]
    assert confusions(label, predicted, 4).tolist() == [[3, 2, 2], [0, 1, 2], [2, 0, 1], [1, 0, 1]]
    assert confusions([1], [1], 2).shape == (0, 3)


def test_many_classes_need_no_matrix():
    assert confusions([2**20 - 1, 5], [7, 5], 2**20).tolist() == [[2**20 - 1, 7, 1]]


@pytest.mark.parametrize("formula", [per_class, confusions, matrix])
@pytest.mark.parametrize(
    ("label", "predicted", "says"),
    [
        ([], [], "at least one image"),
        ([0, 1], [0], r"got \(2,\) and \(1,\)"),
        ([[0]], [[0]], r"must both be \(N,\)"),
        ([0, 3], [0, 0], "label must be a class from 0 to 2; row 1 is 3"),
        ([0, 1], [-1, 0], "predicted must be a class from 0 to 2; row 0 is -1"),
        ([0.0], [0], "label must be whole numbers, got float64"),
    ],
)
def test_what_cannot_be_counted_is_explained(formula, label, predicted, says):
    with pytest.raises(ValueError, match=says):
        formula(label, predicted, 3)


def test_the_bins_of_a_diagram_are_those_of_the_calibration_error():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), np.arange(BINS + 1) / BINS])
    right, gap = rng.random(len(confidence)) < confidence**2, 0.0
    for k in range(BINS):
        inside = (confidence > k / BINS) & (confidence <= (k + 1) / BINS) | (k == 0) & (confidence == 0)
        assert (inside == (bin_of(confidence) == k)).all()
        gap += abs(right[inside].sum() - confidence[inside].sum()) if inside.any() else 0
    ece = calibration(confidence, right, np.zeros(len(right)))["ece"]
    assert ece == pytest.approx(100 * gap / len(right))
