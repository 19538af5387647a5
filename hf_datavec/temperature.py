"""Temperatures: one number that divides all logits, so that probabilities say how often answers are right.

Dividing changes no answer, only how sure it is. All functions take log-probabilities (n, k), which stand for logits:
what is added to all logits of an image changes nothing. Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

# Beyond these the probabilities are one-hot or alike; labels that are all told have no best temperature above zero.
LEAST, MOST = 0.05, 20.0
# Halvings of the range of log T, after which it is below the rounding of T itself.
HALVINGS = 60
# Slopes and differences below this are rounding.
ROUNDING = 1e-12
# The logarithm of the smallest probability that is told from zero.
LOWEST = -700.0


def fit_labels(log_probabilities: Floats, rows: Integers) -> float:
    """The temperature of the least negative log-likelihood of labels, given as rows (n,).

    It lies in [LEAST, MOST], and is 1 where no temperature is better than another.
    """
    import numpy as np

    logits = _logits(log_probabilities)
    return _of_least_cross_entropy(logits, logits[np.arange(len(rows)), rows])


def fit_ensemble(log_probabilities: Floats, teacher: Floats) -> float:
    """The temperature of the least cross-entropy against a teacher's probabilities (n, k). The range is that of labels.

    For one-hot probabilities it is that of the labels.
    """
    logits = _logits(log_probabilities)
    return _of_least_cross_entropy(logits, (teacher * logits).sum(1))


def weighted_mean(temperatures: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted geometric mean of temperatures: they are factors, so their logarithms are averaged."""
    pairs = zip(temperatures, weights, strict=True)
    return math.exp(math.fsum(weight * math.log(one) for one, weight in pairs) / math.fsum(weights))


def _of_least_cross_entropy(logits: Floats, wanted: Floats) -> float:
    """The temperature of the least mean of `logsumexp(z / T) - t / T`, for the logits that are `wanted` (n,).

    The mean is convex in 1/T, so its slope, the expected logits less the wanted ones, crosses zero once at most.
    """
    target = float(wanted.mean())
    return _root(lambda inverse: float((_softmax(inverse * logits) * logits).sum(1).mean()) - target)


def _root(rising: Callable[[float], float]) -> float:
    """One over the number at which a rising function crosses zero, by halving the range of its logarithm."""
    least, most = rising(1 / MOST), rising(1 / LEAST)
    if most - least <= ROUNDING:
        return 1.0
    if most <= ROUNDING:
        return LEAST
    if least >= -ROUNDING:
        return MOST
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(math.exp(-middle)) < 0 else (middle, high)
    return math.exp((low + high) / 2)


def _logits(log_probabilities: Floats) -> Floats:
    import numpy as np

    result: Floats = np.maximum(log_probabilities, LOWEST, dtype=np.float64)
    return result


def _softmax(logits: Floats) -> Floats:
    import numpy as np

    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: Floats = powers / powers.sum(1, keepdims=True)
    return result
