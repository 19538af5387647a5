"""Classification metrics with bootstrap intervals, in plain numpy.

All work on probabilities (n, k) and reference rows (n,); a metric over classes counts only classes that occur
in the references, as scikit-learn's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

RESAMPLES = 1000
CONFIDENCE = 0.95
# Guo et al. 2017, arXiv 1706.04599, use 15 equally wide bins.
CALIBRATION_BINS = 15
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "brier")
# The metrics of errors.
LESS_IS_BETTER = ("ece", "brier")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and its 95 % percentile bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def measure(probabilities: Floats, references: Integers, *, seed: int = 0) -> dict[str, Estimate]:
    """Every metric of `METRICS` with its interval over resampled images (Efron 1979, percentile method)."""
    import numpy as np

    count = len(references)
    ones = np.ones((1, count))
    point = weighted(probabilities, references, ones)
    # How often each image is drawn; a seeded generator of its own keeps reports reproducible.
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    spread = weighted(probabilities, references, draws.astype(np.float64))
    tail = (1 - CONFIDENCE) / 2
    estimates = {}
    for name in METRICS:
        values = spread[name][~np.isnan(spread[name])]
        low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (np.nan, np.nan)
        estimates[name] = Estimate(float(point[name][0]), float(low), float(high))
    return estimates


def weighted(probabilities: Floats, references: Integers, weights: Floats) -> dict[str, Floats]:
    """The metrics for many weightings of the images at once; weights (b, n), each result (b,)."""
    import numpy as np

    predicted = probabilities.argmax(1)
    classes = probabilities.shape[1]
    correct = (predicted == references).astype(np.float64)
    actual = counts_per_class(references, classes, weights)
    guessed = counts_per_class(predicted, classes, weights)
    hits = counts_per_class(references, classes, weights * correct)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(actual > 0, hits / actual, np.nan)
        # A class that is neither present nor predicted has no F1.
        f1 = np.where(actual + guessed > 0, 2 * hits / (actual + guessed), np.nan)
    return {
        "accuracy": hits.sum(1) / weights.sum(1),
        "balanced_accuracy": _mean(recall),
        "macro_f1": _mean(f1),
        "auroc": _mean(_auroc(probabilities, references, weights)),
        "ece": _calibration_error(probabilities, predicted == references, weights),
        "brier": weights @ _squared_error(probabilities, references) / weights.sum(1),
    }


def _mean(values: Floats) -> Floats:
    import numpy as np

    known = ~np.isnan(values)
    counts = known.sum(1)
    total = np.where(known, values, 0.0).sum(1)
    result: Floats = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
    return result


def counts_per_class(rows: Integers, classes: int, weights: Floats) -> Floats:
    """The weight of the images of each class, shape (b, k), for rows (n,) and weights (b, n)."""
    import numpy as np

    one_hot = np.zeros((len(rows), classes))
    one_hot[np.arange(len(rows)), rows] = 1.0
    result: Floats = weights @ one_hot
    return result


def _auroc(probabilities: Floats, references: Integers, weights: Floats) -> Floats:
    """One against the rest, per class: the chance that a positive scores above a negative, ties half."""
    import numpy as np

    result = np.full((len(weights), probabilities.shape[1]), np.nan)
    for label in range(probabilities.shape[1]):
        positive = references == label
        if positive.all() or not positive.any():
            continue
        order = np.argsort(probabilities[:, label], kind="stable")
        scores, of_class = probabilities[order, label], positive[order]
        starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
        drawn = weights[:, order]
        positives = np.add.reduceat(drawn * of_class, starts, axis=1)
        negatives = np.add.reduceat(drawn * ~of_class, starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        pairs = positives.sum(1) * negatives.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            result[:, label] = np.where(pairs > 0, (positives * (below + negatives / 2)).sum(1) / pairs, np.nan)
    return result


def _calibration_error(probabilities: Floats, correct: NDArray[np.bool_], weights: Floats) -> Floats:
    """Expected calibration error: the mean gap between confidence and accuracy over equally wide bins."""
    import numpy as np

    confidence = probabilities.max(1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    member = np.zeros((len(bins), CALIBRATION_BINS))
    member[np.arange(len(bins)), bins] = 1.0
    gaps = np.abs((weights * (correct - confidence)) @ member)
    result: Floats = gaps.sum(1) / weights.sum(1)
    return result


def _squared_error(probabilities: Floats, references: Integers) -> Floats:
    """The Brier score of each image: the squared distance of probabilities and one-hot label, from 0 to 2; shape (n,).

    Source: Brier 1950, doi 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    import numpy as np

    distances = probabilities.astype(np.float64)
    distances[np.arange(len(references)), references] -= 1.0
    result: Floats = np.square(distances).sum(1)
    return result
