"""Rows against each other: means with intervals over seeds, and paired tests on the same test images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.metrics import CONFIDENCE, LESS_IS_BETTER, Estimate, weighted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

# Student's t at 0.975 for 1 to 10 degrees of freedom (any table of the distribution).
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NORMAL_975 = 1.959964
RESAMPLES = 1000
# Student's factor is 12.7 for two seeds: their interval is wider than most differences that a study is about.
FEWEST_SEEDS = 3


def student(freedom: int) -> float:
    """The quantile 0.975 of Student's t; beyond the table by the expansion in 1 / freedom, good to 3e-3.

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = NORMAL_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds with Student's 95 % interval; one or two seeds tell no interval that is of any use."""
    mean = math.fsum(values) / len(values)
    if len(values) < FEWEST_SEEDS:
        return Estimate(mean, math.nan, math.nan)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = student(len(values) - 1) * spread / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def point(probabilities: Floats, references: Integers) -> dict[str, float]:
    """Every metric of one seed's predictions."""
    import numpy as np

    found = weighted(probabilities, references, np.ones((1, len(references))))
    return {name: float(values[0]) for name, values in found.items()}


@dataclass(frozen=True, slots=True)
class Paired:
    """One row against another in one seed: images that only one gets right, and what chance explains of it."""

    only_first: int
    only_second: int
    p: float
    accuracy: Estimate
    balanced_accuracy: Estimate


def paired(first: Floats, second: Floats, references: Integers, groups: Sequence[str], *, seed: int) -> Paired:
    """McNemar's exact test, and differences with bootstrap intervals over groups, since a patient's images are alike.

    Source: McNemar 1947, doi 10.1007/BF02295996; intervals by the percentile method over resampled groups.
    """
    hit, other = first.argmax(1) == references, second.argmax(1) == references
    wins, losses = int((hit & ~other).sum()), int((other & ~hit).sum())
    weights = Resampling.of(groups, seed=seed).images
    each = [weighted(one, references, weights) for one in (first, second)]
    exact = [point(one, references) for one in (first, second)]
    differences = {
        name: interval(exact[0][name] - exact[1][name], each[0][name] - each[1][name])
        for name in ("accuracy", "balanced_accuracy")
    }
    return Paired(wins, losses, mcnemar(wins, losses), **differences)


def mcnemar(wins: int, losses: int) -> float:
    """The two-sided probability of a split at least as uneven, each image falling to either side alike."""
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, index) for index in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


@dataclass(frozen=True)
class Resampling:
    """Test images drawn again, whole groups at a time: the group of each image, and how often each group is drawn.

    Shapes: places (n,), draws (RESAMPLES, groups).
    """

    places: Integers
    draws: Floats

    @classmethod
    def of(cls, groups: Sequence[str], *, seed: int) -> Resampling:
        """Those of images with these groups."""
        import numpy as np

        names = sorted(set(groups))
        place = {name: index for index, name in enumerate(names)}
        draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
        return cls(np.array([place[group] for group in groups]), draws.astype(np.float64))

    @property
    def images(self) -> Floats:
        """How often each image is drawn, shape (RESAMPLES, n)."""
        return self.draws[:, self.places]

    def mean(self, values: Floats) -> Estimate:
        """The mean of one value for each image, shape (n,), with its bootstrap interval over groups."""
        import numpy as np

        sums, counts = np.bincount(self.places, values), np.bincount(self.places)
        return interval(float(values.mean()), self.draws @ sums / (self.draws @ counts))


def interval(value: float, spread: Floats) -> Estimate:
    """A value with the 95 % percentile interval of its resamples (b,), NaN where none of them is defined."""
    import numpy as np

    tail, known = (1 - CONFIDENCE) / 2, spread[~np.isnan(spread)]
    low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def best_of(sites: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The best single site by each metric on its own, the hardest bar there is; of errors the least."""
    return {name: (min if name in LESS_IS_BETTER else max)(one[name] for one in sites) for name in sites[0]}


def mean_of(sites: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over sites by each metric."""
    return {name: math.fsum(one[name] for one in sites) / len(sites) for name in sites[0]}
