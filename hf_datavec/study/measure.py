"""From predictions to results: lines of all seeds with their intervals, and lines against each other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hf_datavec.metrics import LESS_IS_BETTER, METRICS, Estimate, weighted
from hf_datavec.study import recipes, rounds, trivial
from hf_datavec.study.comparison import Paired, Resampling, best_of, interval, mean_of, paired, point
from hf_datavec.study.countdown import Countdown
from hf_datavec.study.listing import first_mode, rows
from hf_datavec.study.networks import Seed
from hf_datavec.study.results import Difference, Line, Results, Test
from hf_datavec.study.rows import Chosen, Measuring, Row, Wanted
from hf_datavec.study.settings import described

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

log = logging.getLogger(__name__)

BEST_SITE = "the best single site"


@dataclass(frozen=True)
class Found:
    """One seed's rows with their probabilities on the test images, and what `auto` chose in them."""

    seed: Seed
    rows: Mapping[Row, Floats]
    chosen: Mapping[Row, Chosen | None]

    @cached_property
    def references(self) -> Integers:
        """The row of each test image's label in the head."""
        import numpy as np

        labels = tuple(sorted(set(self.seed.place.table.labels)))
        return np.array(self.seed.test.label_rows(labels), dtype=np.int64)

    @cached_property
    def groups(self) -> list[str]:
        """The group of each test image, such as its patient."""
        return [self.seed.place.table.groups[place] for place in self.seed.division.parts["test"]]

    @cached_property
    def resampling(self) -> Resampling:
        """Its test images drawn again."""
        return Resampling.of(self.groups, seed=self.seed.number)

    def right(self, row: Row) -> Floats:
        """For each test image 1 where a row is right, else 0."""
        result: Floats = (self.rows[row].argmax(1) == self.references).astype(float)
        return result

    @property
    def sites(self) -> list[Row]:
        """The rows of the sites' networks as they are."""
        return [row for row in self.rows if row.kind == "site" and not row.mode]

    @property
    def best_site(self) -> Row:
        """The site of the highest accuracy in this seed, chosen on the test images, which favours it."""
        return max(self.sites, key=lambda row: self.right(row).mean())


@dataclass(frozen=True, slots=True)
class Member:
    """What one line is made of: a row, or the mean or the best of several."""

    text: str
    rows: tuple[Row, ...]
    best: bool = False

    def right(self, found: Found) -> Floats:
        """For each test image the share of its rows that are right, or whether the row of the best accuracy is."""
        each = [found.right(row) for row in self.rows]
        if self.best:
            return max(each, key=lambda one: one.mean())
        result: Floats = sum(each[1:], each[0]) / len(each)
        return result


def measure(seeds: Sequence[Seed]) -> Results:
    """Train what is not kept, merge, measure."""
    _train(seeds)
    listed = [(measuring, rows(measuring)) for measuring in map(Measuring, seeds)]
    missing = sum(not measuring.kept.has(one.key) for measuring, some in listed for one in some)
    countdown = Countdown(missing)
    found = [_found(measuring, some, countdown) for measuring, some in listed]
    members = list(_members(found[0]))
    bars = dict(_bars(found[0]))
    together = Resampling.of([group for one in found for group in one.groups], seed=0)
    lines = tuple(_line(member, found, bars, together) for member in members)
    sizes = tuple({name: len(places) for name, places in seed.division.parts.items()} for seed in seeds)
    study = seeds[0].place.study
    return Results(
        seeds=tuple(seed.number for seed in seeds),
        lines=lines,
        tests=tuple(_tests(found)),
        sizes=sizes,
        sites={row.name: tuple(float(one.right(row).mean()) for one in found) for row in found[0].sites},
        settings=tuple(described(seeds[0])),
        groups=study.data.group or "",
        default=next((merge.name for merge in study.merges if merge.method == "auto"), study.merges[0].name),
        first_mode=first_mode(study),
        start=study.start is not None,
        notes=(trivial.MISSING,) if study.trivial and not trivial.available() else (),
    )


def _train(seeds: Sequence[Seed]) -> None:
    """All sites of all seeds first: they are what everything else is made of."""
    missing = [(seed, site) for seed in seeds for site in seed.sites if not seed.has(site)]
    countdown = Countdown(len(missing))
    for seed in seeds:
        rounds.begin(seed)
    for place, (seed, site) in enumerate(missing, start=1):
        seed.vector(site, site, seed.settings())
        log.info("seed %d: network %d of %d (%s), %s", seed.number, place, len(missing), site, countdown.step())


def _found(measuring: Measuring, wanted: Sequence[Wanted], countdown: Countdown) -> Found:
    """Every row of a seed, measured where it is not kept, with a line of progress and a recipe for each merge."""
    seed, found, chosen = measuring.seed, {}, {}
    for place, one in enumerate(wanted, start=1):
        is_kept = measuring.kept.has(one.key)
        found[one.row] = measuring.get(one)
        if one.merge is not None:
            chosen[one.row] = measuring.chosen(one.merge, one.row.mode, one.row.on)
            recipes.write(seed, one, chosen[one.row])
        if not is_kept:
            left = countdown.step()
            log.info("seed %d: row %d of %d (%s), %s", seed.number, place, len(wanted), one.row.text, left)
    return Found(seed, found, chosen)


def _members(found: Found) -> Iterator[Member]:
    """The lines of the table, which are those of any seed, in their order."""
    done: list[tuple[str, str]] = []
    for row in found.rows:
        if row.kind != "site" and not (row.kind == "probe" and "pooled" not in row.name):
            yield Member(row.text, (row,))
            continue
        group = (row.kind, row.mode)
        if group in done:
            continue
        done.append(group)
        what = "linear probe of a site" if row.kind == "probe" else "single site"
        text = f"{what}, {row.mode}" if row.mode else what
        some = tuple(one for one in found.rows if (one.kind, one.mode) == group and "pooled" not in one.name)
        yield Member(f"{text}: mean", some)
        yield Member(f"{text}: best", some, best=True)


def _bars(found: Found) -> Iterator[tuple[str, Member]]:
    """What every line is held against."""
    yield BEST_SITE, Member(BEST_SITE, tuple(found.sites), best=True)
    for row in found.rows:
        if not row.mode and (row.kind in ("ensemble", "pooled") or row.name == trivial.NAME):
            yield row.text, Member(row.text, (row,))


def _line(member: Member, found: Sequence[Found], bars: Mapping[str, Member], together: Resampling) -> Line:
    """A line with its differences to bars; `together` draws the test images of all seeds."""
    import numpy as np

    row = member.rows[0]
    summary = best_of if member.best else mean_of
    points = [summary([point(one.rows[row], one.references) for row in member.rows]) for one in found]
    right = [member.right(one) for one in found]

    def against(bar: Member) -> Difference:
        gained = [mine - bar.right(one) for mine, one in zip(right, found, strict=True)]
        seeds = tuple(one.resampling.mean(some) for some, one in zip(gained, found, strict=True))
        return Difference(seeds, together.mean(np.concatenate(gained)))

    return Line(
        text=member.text,
        kind=row.kind,
        mode=row.mode,
        matters=row.matters and (row.kind != "probe" or member.best),
        values={name: tuple(one[name] for one in points) for name in METRICS},
        images=_over_groups(member, found[0]) if len(found) == 1 else {},
        pooled=together.mean(np.concatenate(right)),
        differences={name: against(bar) for name, bar in bars.items()},
        chosen=tuple(one.chosen.get(row) for one in found),
    )


def _over_groups(member: Member, found: Found) -> dict[str, Estimate]:
    """Every metric of one seed with its bootstrap interval over groups."""
    weights = found.resampling.images
    points = [point(found.rows[row], found.references) for row in member.rows]
    spread = [weighted(found.rows[row], found.references, weights) for row in member.rows]
    estimates = {}
    for name in METRICS:
        values = [one[name] for one in points]
        if member.best:
            place = values.index((min if name in LESS_IS_BETTER else max)(values))
            estimates[name] = interval(values[place], spread[place][name])
        else:
            mean = sum((one[name] for one in spread[1:]), spread[0][name]) / len(spread)
            estimates[name] = interval(mean_of(points)[name], mean)
    return estimates


def _tests(found: Sequence[Found]) -> Iterator[Test]:
    first = found[0]
    fused = [row for row in first.rows if row.kind in ("fused", "relay", "federated")]
    bars = [row for row in first.rows if row.kind in ("ensemble", "pooled") and not row.mode]
    for row in fused:
        yield Test(row.text, BEST_SITE, tuple(_paired(one, row, one.best_site) for one in found))
        for bar in bars:
            yield Test(row.text, bar.text, tuple(_paired(one, row, bar) for one in found))


def _paired(found: Found, first: Row, second: Row) -> Paired:
    return paired(found.rows[first], found.rows[second], found.references, found.groups, seed=found.seed.number)
