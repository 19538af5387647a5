"""What a study found: every row in every seed, means over seeds, and rows against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_datavec.metrics import METRICS, Estimate
from hf_datavec.study.comparison import FEWEST_SEEDS, Paired, over_seeds
from hf_datavec.study.rows import Chosen

RESULTS_FILE = "results.json"


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much a line's accuracy is above a bar's: in each seed, and over the test images of all seeds together.

    All intervals are bootstrap intervals over groups of images.
    """

    seeds: tuple[Estimate, ...]
    pooled: Estimate

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval: Student's over seeds where they are enough, else over groups."""
        if len(self.seeds) < FEWEST_SEEDS:
            return self.pooled
        return over_seeds([one.value for one in self.seeds])


@dataclass(frozen=True)
class Line:
    """One line of the table: a metric's value in each seed, by the metric's name.

    `images` are the intervals of a single seed over groups of images, `pooled` is the accuracy on the test images of
    all seeds together, `differences` are those of the accuracy to each bar.
    """

    text: str
    kind: str
    mode: str
    matters: bool
    values: Mapping[str, tuple[float, ...]]
    images: Mapping[str, Estimate]
    pooled: Estimate
    differences: Mapping[str, Difference]
    chosen: tuple[Chosen | None, ...] = ()

    def estimate(self, metric: str) -> Estimate:
        """Its mean over seeds with the 95 % interval: over groups for one seed, Student's from three seeds on."""
        return self.images[metric] if self.images else over_seeds(self.values[metric])

    def cell(self, metric: str) -> str:
        """The same in percent, as tables show it."""
        return cell(self.estimate(metric), self.values[metric])

    @property
    def shown(self) -> str:
        """Its name, with what stands in place of `auto`."""
        return f"{self.text} ({self.choice})" if self.choice else self.text

    @property
    def choice(self) -> str:
        """What stands in place of `auto`, each choice once; empty where nothing was left open."""
        some = [one for one in self.chosen if one]
        scales: dict[str, list[float]] = {}
        for one in some:
            scales.setdefault(one.method, []).append(one.scale)
        names = [f"{method} x {_span(found)}" for method, found in scales.items()]
        if any(one.weights or one.overrides for one in some):
            names = list(dict.fromkeys(one.text for one in some))
        modes = dict.fromkeys(one.mode for one in some)
        if names and self.text.startswith(names[0]):
            names = []  # only the mode was left open
        return ", ".join(filter(None, (" or ".join(names), " or ".join(modes) if self.mode == "auto" else "")))


@dataclass(frozen=True)
class Test:
    """A fused row against a bar, seed by seed."""

    text: str
    against: str
    seeds: tuple[Paired, ...]

    @property
    def won(self) -> int:
        """In how many seeds the fused row has the higher accuracy."""
        return sum(one.only_first > one.only_second for one in self.seeds)


@dataclass(frozen=True)
class Results:
    """The table of a study and the tests behind it."""

    seeds: tuple[int, ...]
    lines: tuple[Line, ...]
    tests: tuple[Test, ...]
    sizes: tuple[Mapping[str, int], ...]
    sites: Mapping[str, tuple[float, ...]]  # the accuracy of each site's own network
    settings: tuple[tuple[str, str], ...]
    groups: str  # the column of groups, such as patients
    default: str  # the merge that conclusions are about
    first_mode: str
    start: bool
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> str:
        """What bootstrap intervals are over, in words."""
        return "the test images" + (f", those of one {self.groups} together" if self.groups else "")

    def line(self, text: str) -> Line:
        """The line of a name."""
        return next(line for line in self.lines if line.text == text)

    def tested(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The tests as header and rows: difference of means in points, seeds won, p of each seed."""
        rows = [
            (
                f"{one.text} against {one.against}",
                *(
                    f"{100 * math.fsum(getattr(found, name).value for found in one.seeds) / len(one.seeds):+.1f}"
                    for name in ("accuracy", "balanced_accuracy")
                ),
                f"{one.won} of {len(one.seeds)}",
                ", ".join(probability(found.p) for found in one.seeds),
            )
            for one in self.tests
        ]
        header = ("pair, on the same test images", "accuracy", "balanced accuracy", "seeds won", "McNemar's p")
        return header, rows

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        found: dict[str, Any] = _plain(
            {
                "settings": dict(self.settings),
                "seeds": self.seeds,
                # What the intervals of means are over; two seeds tell none.
                "intervals": {1: "groups of test images", 2: None}.get(len(self.seeds), "seeds"),
                "images": self.sizes,
                "sites": self.sites,
                "notes": self.notes,
                "rows": [_row(line) for line in self.lines],
                "tests": [
                    {"row": one.text, "against": one.against, "seeds": [asdict(found) for found in one.seeds]}
                    for one in self.tests
                ],
            }
        )
        return found

    def write(self, folder: Path) -> None:
        """Write `results.json`."""
        (folder / RESULTS_FILE).write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", "utf-8")


def _span(values: Sequence[float]) -> str:
    """A number as it is, several as the smallest and the largest."""
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return f"{min(values):.3g} to {max(values):.3g}"


def _row(line: Line) -> dict[str, Any]:
    return {
        "name": line.text,
        "kind": line.kind,
        "matters": line.matters,
        "seeds": line.values,
        "mean": {name: asdict(line.estimate(name)) for name in METRICS},
        "pooled_images": asdict(line.pooled),
        "differences": {name: asdict(one) for name, one in line.differences.items()},
        **({"chosen": [one and one.as_dict() for one in line.chosen]} if any(line.chosen) else {}),
    }


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def cell(found: Estimate, values: tuple[float, ...] = ()) -> str:
    """A share in percent: of one seed with its interval, of two with both values, of more with the half-width."""
    if math.isnan(found.value):
        return "-"
    text = f"{100 * found.value:.1f}"
    if len(values) == 2:
        return f"{text} ({', '.join(f'{100 * one:.1f}' for one in values)})"
    if math.isnan(found.high):
        return text
    if len(values) == 1:
        return f"{text} ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{text} ± {100 * (found.high - found.value):.1f}"


def probability(p: float) -> str:
    """A p-value as tables show it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
