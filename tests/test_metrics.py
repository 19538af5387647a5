"""Metrics against scikit-learn and naive loops, and intervals that mean what they say."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hf_datavec import metrics, tables
from hf_datavec.metrics import CALIBRATION_BINS, METRICS, counts_per_class, measure
from hf_datavec.study.comparison import best_of

oracle = settings(max_examples=25, deadline=None, derandomize=True)


def some(count: int, classes: int, seed: int, *, levels: int | None = None, present: int | None = None):
    """Probabilities (n, k) and references (n,); `levels` makes ties, `present` leaves later classes out."""
    random = np.random.default_rng(seed)
    references = random.integers(0, present or classes, count)
    scores = random.normal(size=(count, classes)) + 1.5 * np.eye(classes)[references]
    if levels:
        scores = np.round(scores * levels / 4) / levels * 4
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    if levels:
        probabilities = np.round(probabilities * levels) / levels
    return probabilities, references


def values(probabilities, references) -> dict[str, float]:
    return {name: estimate.value for name, estimate in measure(probabilities, references).items()}


def one_against_the_rest(probabilities, references) -> float:
    """The mean over classes, present and not alone, of scikit-learn's binary AUROC."""
    areas = [
        sklearn_metrics.roc_auc_score(references == label, probabilities[:, label])
        for label in range(probabilities.shape[1])
        if 0 < (references == label).sum() < len(references)
    ]
    return float(np.mean(areas)) if areas else math.nan


def naive_calibration_error(probabilities, references) -> float:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(CALIBRATION_BINS)]
    for row, reference in zip(probabilities.tolist(), references.tolist(), strict=True):
        confidence = max(row)
        place = min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins[place].append((confidence, row.index(confidence) == reference))
    total = 0.0
    for found in bins:
        if found:
            confidence = sum(one for one, _ in found) / len(found)
            accuracy = sum(right for _, right in found) / len(found)
            total += len(found) / len(references) * abs(confidence - accuracy)
    return total


def naive_brier_score(probabilities, references) -> float:
    total = 0.0
    for row, reference in zip(probabilities.tolist(), references.tolist(), strict=True):
        for label, probability in enumerate(row):
            total += (probability - (label == reference)) ** 2
    return total / len(references)


@oracle
@given(
    count=st.integers(1, 80), classes=st.integers(2, 6), seed=st.integers(0, 10**6),
    levels=st.sampled_from([None, 2, 5]), absent=st.integers(0, 2),
)  # fmt: skip
def test_every_metric_is_what_scikit_learn_or_a_loop_makes_of_it(count, classes, seed, levels, absent):
    probabilities, references = some(count, classes, seed, levels=levels, present=max(1, classes - absent))
    predicted = probabilities.argmax(1)
    found = values(probabilities, references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, about classes that are predicted but absent
        expected = {
            "accuracy": sklearn_metrics.accuracy_score(references, predicted),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(references, predicted),
            "macro_f1": sklearn_metrics.f1_score(references, predicted, average="macro"),
            "auroc": one_against_the_rest(probabilities, references),
            "ece": naive_calibration_error(probabilities, references),
            "brier": naive_brier_score(probabilities, references),
        }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
    assert tuple(found) == METRICS


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_scikit_learns_macro_average_of_one_against_the_rest(seed):
    probabilities, references = some(120, 4, seed)
    assert set(references) == {0, 1, 2, 3}
    expected = sklearn_metrics.roc_auc_score(references, probabilities, multi_class="ovr", average="macro")
    assert values(probabilities, references)["auroc"] == pytest.approx(expected, rel=1e-12)


def test_auroc_of_two_classes_is_the_usual_one():
    probabilities, references = some(60, 2, 3)
    expected = sklearn_metrics.roc_auc_score(references, probabilities[:, 1])
    assert values(probabilities, references)["auroc"] == pytest.approx(expected, rel=1e-9)


def test_the_brier_score_is_scikit_learns_with_all_classes_and_twice_its_binary_one():
    probabilities, references = some(90, 4, 5)
    expected = sklearn_metrics.brier_score_loss(references, probabilities, labels=[0, 1, 2, 3], scale_by_half=False)
    assert values(probabilities, references)["brier"] == pytest.approx(expected, rel=1e-12)
    probabilities, references = some(60, 2, 3)
    expected = 2 * sklearn_metrics.brier_score_loss(references, probabilities[:, 1])
    assert values(probabilities, references)["brier"] == pytest.approx(expected, rel=1e-9)


def test_tied_scores_count_half():
    probabilities = np.full((6, 2), 0.5)
    assert values(probabilities, np.array([0, 1, 0, 1, 1, 1]))["auroc"] == 0.5
    probabilities = np.array([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    assert values(probabilities, np.array([1, 1, 0, 0]))["auroc"] == pytest.approx(3.5 / 4)


def test_a_perfect_and_a_hopeless_classifier():
    references = np.array([0, 1, 2, 0, 1, 2])
    perfect = np.eye(3)[references]
    assert values(perfect, references) == {
        "accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "auroc": 1, "ece": 0, "brier": 0,
    }  # fmt: skip
    hopeless = values(np.eye(3)[(references + 1) % 3], references)
    assert [hopeless[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "ece", "brier")] == [0, 0, 0, 1, 2]


def test_a_class_that_is_absent_from_the_references_counts_in_no_average_over_the_references():
    probabilities, references = some(50, 3, 1, present=2)
    narrowed = probabilities.copy()
    narrowed[:, 2] = 0  # never predicted
    with_class, without = values(narrowed, references), values(narrowed[:, :2], references)
    assert with_class == pytest.approx(without)


def test_one_class_alone_has_no_auroc_and_says_so_by_nan():
    found = measure(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]))
    assert math.isnan(found["auroc"].value)
    assert math.isnan(found["auroc"].low)
    assert math.isnan(found["auroc"].high)
    assert found["accuracy"].value == 0.5


def test_one_image_is_measured():
    found = measure(np.array([[0.2, 0.8]]), np.array([1]))
    assert (found["accuracy"].value, found["accuracy"].low, found["accuracy"].high) == (1, 1, 1)
    assert found["ece"].value == pytest.approx(0.2)


def test_certainty_falls_into_the_last_bin():
    probabilities = np.array([[1.0, 0.0], [0.95, 0.05]])
    assert values(probabilities, np.array([0, 0]))["ece"] == pytest.approx(0.025)


@oracle
@given(count=st.integers(2, 80), classes=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_intervals_lie_in_order_around_what_was_found_and_are_the_same_each_time(count, classes, seed):
    probabilities, references = some(count, classes, seed)
    first, second = measure(probabilities, references), measure(probabilities, references)
    for name in METRICS:
        one = first[name]
        assert repr(one) == repr(second[name])  # equal, NaN included
        assert (
            math.isnan(one.value)
            or math.isnan(one.low)
            or 0 <= one.low <= one.high <= (2 if name == "brier" else 1) + 1e-12
        )
    accuracy = first["accuracy"]
    assert accuracy.low <= accuracy.value <= accuracy.high


@pytest.mark.parametrize("seed", range(10))
def test_intervals_of_many_images_cover_the_point_estimate(seed):
    # The calibration error is left out: resampling adds to it, so its bootstrap interval may lie above it.
    for name, estimate in measure(*some(300, 4, seed)).items():
        if name != "ece":
            assert estimate.low < estimate.value < estimate.high, name


def test_the_interval_of_the_accuracy_is_as_wide_as_the_binomial_one():
    probabilities, references = some(400, 2, 0)
    found = measure(probabilities, references)["accuracy"]
    expected = 1.96 * math.sqrt(found.value * (1 - found.value) / 400)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_claim():
    random = np.random.default_rng(0)
    truth, trials, hits = 0.7, 120, 0
    for _ in range(trials):
        right = random.random(150) < truth
        probabilities = np.where(right[:, None], [[0.8, 0.2]], [[0.2, 0.8]])
        found = measure(probabilities, np.zeros(150, dtype=np.int64))["accuracy"]
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / trials <= 1


def test_another_seed_gives_other_draws_and_the_same_value():
    data = some(50, 3, 0)
    one, other = measure(*data, seed=0)["accuracy"], measure(*data, seed=1)["ece"]
    assert one.value == measure(*data, seed=1)["accuracy"].value
    assert other != measure(*data, seed=0)["ece"]


def test_images_are_counted_per_class_by_their_weight():
    rows = np.array([0, 1, 1, 2])
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 3, 5]])
    assert counts_per_class(rows, 3, weights).tolist() == [[1, 2, 1], [2, 3, 5]]


def test_a_metric_of_one_class_is_not_defined_and_large_heads_need_little_memory():
    random = np.random.default_rng(0)
    found = measure(random.dirichlet(np.ones(3), 20), np.zeros(20, dtype=np.int64))
    assert np.isnan(found["auroc"].value)
    many = measure(random.dirichlet(np.ones(1000), 400), random.integers(0, 1000, 400))
    assert 0 <= many["balanced_accuracy"].value <= 1


def test_tables_scale_the_brier_score_like_a_share_and_say_so():
    found = {name: metrics.Estimate(0.5, 0.25, 1.5) for name in ("balanced_accuracy", "brier")}
    assert tables.metric_rows(found) == [
        ("balanced accuracy", "50.0 (25.0 to 150.0)"),
        ("Brier score x 100", "50.0 (25.0 to 150.0)"),
    ]


def test_the_best_site_is_the_one_of_the_least_error():
    sites = [{"accuracy": 0.5, "ece": 0.2, "brier": 0.7}, {"accuracy": 0.6, "ece": 0.3, "brier": 0.8}]
    assert best_of(sites) == {"accuracy": 0.6, "ece": 0.2, "brier": 0.7}
