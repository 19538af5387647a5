"""Temperatures: fitted to labels, to a teacher and to a confidence, and put into a head."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_datavec import temperature
from hf_datavec.temperature import LEAST, MOST, fit_confidence, fit_ensemble, fit_labels

oracle = settings(max_examples=25, deadline=None, derandomize=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(1, keepdims=True) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]


def some_logits(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(count, classes))


def sampled(probabilities: np.ndarray, seed: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(seed).random((len(probabilities), 1))
    return (probabilities.cumsum(1) < drawn).sum(1).clip(max=probabilities.shape[1] - 1)


def loss(log_probabilities: np.ndarray, rows: np.ndarray, found: float) -> float:
    """The mean negative log-likelihood, naively."""
    scaled = log_softmax(log_probabilities / found)
    return -sum(float(scaled[place, row]) for place, row in enumerate(rows)) / len(rows)


@pytest.mark.parametrize("truth", [0.3, 0.8, 1.0, 1.83, 4.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_temperature_that_labels_were_drawn_at_is_found_again(truth, classes):
    logits = some_logits(20_000, classes)
    rows = sampled(softmax(logits / truth))
    assert fit_labels(log_softmax(logits), rows) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("truth", [0.1, 0.5, 1.0, 2.5, 15.0])
def test_the_temperature_of_a_teacher_and_of_its_confidence_is_found_exactly(truth):
    logits = some_logits(100, 4)
    teacher = softmax(logits / truth)
    assert fit_ensemble(log_softmax(logits), teacher) == pytest.approx(truth, rel=1e-6)
    assert fit_confidence(log_softmax(logits), teacher.max(1).mean()) == pytest.approx(truth, rel=1e-6)


@oracle
@given(count=st.integers(1, 60), classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_no_other_temperature_has_a_lower_loss(count, classes, seed):
    logits = log_softmax(some_logits(count, classes, seed))
    rows = sampled(softmax(logits / 2), seed)
    found = fit_labels(logits, rows)
    assert LEAST <= found <= MOST
    best = min(loss(logits, rows, one) for one in np.geomspace(LEAST, MOST, 200))
    assert loss(logits, rows, found) <= best + 1e-9
    assert fit_ensemble(logits, np.eye(classes)[rows]) == pytest.approx(found, rel=1e-9)


def test_labels_that_are_all_told_or_all_missed_give_an_end_of_the_range():
    logits = log_softmax(some_logits(50, 3) + 20 * np.eye(3)[np.arange(50) % 3])
    assert fit_labels(logits, logits.argmax(1)) == LEAST
    assert fit_labels(logits, logits.argmin(1)) == MOST
    assert fit_confidence(logits, 1.0) == LEAST
    assert fit_confidence(logits, 0.1) == MOST


@pytest.mark.parametrize("classes", [1, 3])
def test_logits_that_are_alike_ask_for_no_temperature(classes):
    logits = np.full((7, classes), -math.log(classes))
    rows = np.zeros(7, dtype=np.int64)
    assert fit_labels(logits, rows) == 1
    assert fit_ensemble(logits, np.full((7, classes), 1 / classes)) == 1
    assert fit_confidence(logits, 0.9) == 1


def test_a_probability_of_zero_makes_no_nan():
    logits = np.array([[0.0, -math.inf], [-math.inf, 0.0], [-0.1, -2.4]])
    assert LEAST <= fit_labels(logits, np.array([0, 0, 1])) <= MOST
    assert LEAST <= fit_ensemble(logits, np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])) <= MOST


def test_what_is_added_to_all_logits_of_an_image_changes_nothing():
    logits = some_logits(30, 4)
    rows = sampled(softmax(logits / 2))
    shift = np.arange(30.0)[:, None]
    assert fit_labels(logits + shift, rows) == pytest.approx(fit_labels(logits, rows), rel=1e-9)


def test_temperatures_are_averaged_as_factors():
    assert temperature.weighted_mean([2.0, 8.0], [1, 1]) == pytest.approx(4)
    assert temperature.weighted_mean([2.0, 8.0], [300, 100]) == pytest.approx(2 ** (6 / 4))
