"""Choosing by measuring: the trials of a search, and which of them is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hf_datavec.errors import DatavecError
from hf_datavec.metrics import LESS_IS_BETTER, Estimate
from hf_datavec.tables import percent

Weights: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting and what was measured with it: nothing, when the network gave no finite numbers."""

    setting: float | Weights
    found: Estimate | None
    error: DatavecError | None = None

    @property
    def usable(self) -> bool:
        """Whether there is a value."""
        return self.found is not None and self.found.value == self.found.value


@dataclass(frozen=True, slots=True)
class Search:
    """What was searched for on which images, every trial in its order, and the best one."""

    kind: str
    metric: str
    images: str
    digest: str
    count: int
    sites: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the best value; of equals the first by `rank`."""
        return min(self.trials, key=lambda trial: rank(trial, self.metric))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Setting and value in percent of each trial, for tables; the best is marked."""
        return [
            (
                self._text(one.setting),
                percent(one.found) if one.found else str(one.error and one.error.problem),
                "chosen" if one is self.best else "",
            )
            for one in self.trials
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "searched": self.kind,
            "metric": self.metric,
            "images": self.images,
            "digest": self.digest,
            "count": self.count,
            "found": self._plain(self.best.setting),
            "trials": [{self.kind: self._plain(one.setting), **_estimate(one)} for one in self.trials],
        }

    def _text(self, setting: float | Weights) -> str:
        if not isinstance(setting, tuple):
            return f"{setting:g}"
        return ", ".join(f"{name} {weight:.3f}" for name, weight in zip(self.sites, setting, strict=True))

    def _plain(self, setting: float | Weights) -> Any:
        return dict(zip(self.sites, setting, strict=True)) if isinstance(setting, tuple) else setting


def _estimate(trial: Trial) -> dict[str, float | str | None]:
    if trial.found is None or not trial.usable:
        return {"value": None, "low": None, "high": None, **({"problem": trial.error.problem} if trial.error else {})}
    return {"value": trial.found.value, "low": trial.found.low, "high": trial.found.high}


def rank(trial: Trial, metric: str) -> tuple[float, float]:
    """A key that puts the better trial first: its value, then the smaller scale; weights keep their order."""
    value = math.inf
    if trial.found is not None and trial.usable:
        value = trial.found.value if metric in LESS_IS_BETTER else -trial.found.value
    return value, trial.setting if isinstance(trial.setting, float) else 0.0


def over_weights(count: int, rounds: int, measure: Callable[[Weights], Trial], metric: str) -> Iterator[Trial]:
    """Try weights by coordinate search, starting with equal ones; yields every trial, at most 1 + 2 n rounds.

    In each round every single weight is once doubled and once halved. The best of these is where the next round
    starts; without a gain the search ends. Weights are shares that add up to one, so a setting that comes again is
    not measured again.

    Source: Hooke and Jeeves 1961, doi 10.1145/321062.321069, pattern search, here over the logarithms of weights.
    """
    powers = (0,) * count
    known = {powers: measure(_shares(powers))}
    yield known[powers]
    for _ in range(rounds):
        around = [_moved(powers, place, by) for place in range(count) for by in (1, -1)]
        for one in around:
            if one not in known:
                known[one] = measure(_shares(one))
                yield known[one]
        best = min(around, key=lambda one: rank(known[one], metric))
        if rank(known[best], metric) >= rank(known[powers], metric):
            return
        powers = best


def _moved(powers: Sequence[int], place: int, by: int) -> tuple[int, ...]:
    """The powers of two with one of them changed, counted from the least, since only ratios matter."""
    changed = [power + by * (index == place) for index, power in enumerate(powers)]
    return tuple(power - min(changed) for power in changed)


def _shares(powers: Sequence[int]) -> Weights:
    total = sum(2.0**power for power in powers)
    return tuple(2.0**power / total for power in powers)
