"""What a study found: every row in every seed, means over seeds, and rows against each other."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.metrics import METRICS, Estimate
from hf_datavec.study import rounds
from hf_datavec.study.comparison import Paired, best_of, mean_of, over_seeds, paired, point
from hf_datavec.study.networks import Seed
from hf_datavec.study.rows import Measuring, Row
from hf_datavec.tables import markdown_table, metric_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

log = logging.getLogger(__name__)

RESULTS_FILE, TABLE_FILE = "results.json", "README.md"


@dataclass(frozen=True)
class Line:
    """One line of the table: a metric's value in each seed, by the metric's name."""

    text: str
    kind: str
    values: Mapping[str, tuple[float, ...]]

    def estimate(self, metric: str) -> Estimate:
        """Its mean over seeds with the 95 % interval."""
        return over_seeds(self.values[metric])


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

    def line(self, text: str) -> Line:
        """The line of a name."""
        return next(line for line in self.lines if line.text == text)

    def markdown(self) -> str:
        """The table: percent, mean over seeds and the half-width of its 95 % interval."""
        header = ("row", *(metric_name(name) for name in METRICS))
        rows = [(line.text, *(cell(line.estimate(name)) for name in METRICS)) for line in self.lines]
        return markdown_table(header, rows)

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
                ", ".join(f"{found.p:.3g}" for found in one.seeds),
            )
            for one in self.tests
        ]
        header = ("pair, on the same test images", "accuracy", "balanced accuracy", "seeds won", "McNemar's p")
        return header, rows

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        found: dict[str, Any] = _plain(
            {
                "seeds": self.seeds,
                "images": self.sizes,
                "rows": [
                    {
                        "name": line.text,
                        "kind": line.kind,
                        "seeds": line.values,
                        "mean": {name: asdict(line.estimate(name)) for name in METRICS},
                    }
                    for line in self.lines
                ],
                "tests": [
                    {"row": one.text, "against": one.against, "seeds": [asdict(found) for found in one.seeds]}
                    for one in self.tests
                ],
            }
        )
        return found

    def write(self, folder: Path) -> None:
        """Write `results.json` and the tables."""
        (folder / RESULTS_FILE).write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
        text = f"# Results\n\nPercent, mean over seeds {list(self.seeds)} and the half-width of its 95 % interval.\n\n"
        (folder / TABLE_FILE).write_text(f"{text}{self.markdown()}\n\n{markdown_table(*self.tested())}\n", "utf-8")


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


def cell(found: Estimate) -> str:
    """A share in percent with the half-width of its interval."""
    if math.isnan(found.value):
        return "-"
    spread = "" if math.isnan(found.high) else f" ± {100 * (found.high - found.value):.1f}"
    return f"{100 * found.value:.1f}{spread}"


def measure(seeds: Sequence[Seed]) -> Results:
    """Train what is not kept, merge, measure."""
    for seed in seeds:  # all sites of all seeds first: they are what everything else is made of
        rounds.begin(seed)
        seed.site_vectors()
    found = [_measured(seed) for seed in seeds]
    lines = tuple(_lines(found, seeds))
    sizes = tuple({name: len(places) for name, places in seed.division.parts.items()} for seed in seeds)
    tests = tuple(_tests(found, seeds))
    return Results(tuple(seed.number for seed in seeds), lines, tests, sizes)


def _measured(seed: Seed) -> dict[Row, Floats]:
    found = {}
    for row, probabilities in Measuring(seed).rows():
        found[row] = probabilities
        log.info("seed %d: %s", seed.number, row.text)
    return found


def _references(seed: Seed) -> NDArray[np.int64]:
    import numpy as np

    labels = tuple(sorted(set(seed.place.table.labels)))
    return np.array(seed.test.label_rows(labels), dtype=np.int64)


def _lines(found: Sequence[Mapping[Row, Floats]], seeds: Sequence[Seed]) -> Iterator[Line]:
    points = [{row: point(one[row], _references(seed)) for row in one} for one, seed in zip(found, seeds, strict=True)]
    done: list[tuple[str, str]] = []
    for row in _all_rows(found):
        if row.kind != "site" and not (row.kind == "probe" and "pooled" not in row.name):
            yield _line(row.text, row.kind, [one[row] for one in points])
            continue
        group = (row.kind, row.mode)
        if group in done:
            continue
        done.append(group)
        what = "linear probe of a site" if row.kind == "probe" else "single site"
        text = f"{what}, {row.mode}" if row.mode else what
        members = [[one[other] for other in one if (other.kind, other.mode) == group and "pooled" not in other.name]
                   for one in points]  # fmt: skip
        yield _line(f"{text}: mean", row.kind, [mean_of(some) for some in members])
        yield _line(f"{text}: best", row.kind, [best_of(some) for some in members])


def _all_rows(found: Sequence[Mapping[Row, Floats]]) -> list[Row]:
    """The rows of the table, which are those of any seed, in their order."""
    return list(found[0])


def _line(text: str, kind: str, points: Sequence[Mapping[str, float]]) -> Line:
    return Line(text, kind, {name: tuple(one[name] for one in points) for name in METRICS})


def _tests(found: Sequence[Mapping[Row, Floats]], seeds: Sequence[Seed]) -> Iterator[Test]:
    fused = [row for row in _all_rows(found) if row.kind in ("fused", "relay", "federated")]
    bars = [row for row in _all_rows(found) if row.kind in ("ensemble", "pooled") and not row.mode]
    for row in fused:
        yield Test(row.text, "the best single site", tuple(
            _paired(one[row], _best_site(one, seed), seed) for one, seed in zip(found, seeds, strict=True)
        ))  # fmt: skip
        for bar in bars:
            pairs = tuple(_paired(one[row], one[bar], seed) for one, seed in zip(found, seeds, strict=True))
            yield Test(row.text, bar.text, pairs)


def _paired(first: Floats, second: Floats, seed: Seed) -> Paired:
    groups = [seed.place.table.groups[place] for place in seed.division.parts["test"]]
    return paired(first, second, _references(seed), groups, seed=seed.number)


def _best_site(found: Mapping[Row, Floats], seed: Seed) -> Floats:
    """The site of the highest accuracy in this seed, chosen on the test images, which favours it."""
    references = _references(seed)
    sites = [found[row] for row in found if row.kind == "site" and not row.mode]
    return max(sites, key=lambda one: point(one, references)["accuracy"])
