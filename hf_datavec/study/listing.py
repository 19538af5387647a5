"""The rows of a study's table in their order: what is compared, and how each comes about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hf_datavec.recipe import AUTO
from hf_datavec.study import trivial
from hf_datavec.study.partition import FROM_BASE, POOLED
from hf_datavec.study.rounds import FEDAVG, FEDAVG_MODE, Pace, heads_alone, kind, pace, relay, with_heads
from hf_datavec.study.rows import Chosen, Measuring, Row, Wanted
from hf_datavec.study.sections import LOOK_AT_IMAGES, Combining, Heads, Study

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# A single site's own statistics are right for it already, so only these modes change anything.
FOR_ONE = ("statistics", "tune")
ENSEMBLE, LOGITS = "output ensemble of the sites", "ensemble of the sites, logits"
START_ALONE = "start: averaged heads on the untouched base"
HEADS_ALONE = "heads alone"
RANDOM = "random vectors"
LEARNED = "then learned from the ensemble"


def rows(measuring: Measuring) -> list[Wanted]:
    """Every row of a seed whose sites are trained."""
    parts = (_sites, _controls, _pooled, _merges, _learned, _random, _federated, _relays, _heads)
    return [wanted for part in parts for wanted in part(measuring)]


def first_mode(study: Study) -> str:
    """The restoration that comes first in a study, without which the table of rows that matter has no merge."""
    return next((mode for mode in study.restore if mode != "none"), study.restore[0])


def _sites(measuring: Measuring) -> Iterator[Wanted]:
    seed = measuring.seed
    modes = ["", *(mode for mode in dict.fromkeys(seed.place.study.restore) if mode in FOR_ONE)]
    vectors = dict(zip(seed.sites, measuring.vectors(), strict=True))
    for mode in modes:
        each = [
            Wanted(Row(site, "site", mode, matters=not mode), partial(measuring.alone, vector, mode))
            for site, vector in vectors.items()
        ]
        yield from each
        for name, mean in ((ENSEMBLE, _mean), (LOGITS, _mean_of_logits)):
            compute = partial(_together, measuring, each, mean)
            yield Wanted(Row(name, "ensemble", mode, matters=not mode), compute)


def _together(measuring: Measuring, each: Sequence[Wanted], mean: Callable[[Sequence[Floats]], Floats]) -> Floats:
    return mean([measuring.get(one) for one in each])


def _mean(found: Sequence[Floats]) -> Floats:
    return sum(found[1:], found[0]) / len(found)


def _mean_of_logits(found: Sequence[Floats]) -> Floats:
    """The softmax of the mean log-probabilities, which is that of the mean logits."""
    import numpy as np

    # A probability below the smallest float is stored as zero, whose logarithm would outvote all other sites.
    mean = _mean([np.log(np.maximum(one, np.finfo(np.float64).tiny)) for one in found])
    shares = np.exp(mean - mean.max(1, keepdims=True))
    result: Floats = shares / shares.sum(1, keepdims=True)
    return result


def _controls(measuring: Measuring) -> Iterator[Wanted]:
    seed = measuring.seed
    for site in seed.sites:
        row = Row(f"linear probe of {site}", "probe", matters=True)
        yield Wanted(row, partial(measuring.probed, site))
    yield Wanted(Row("linear probe, pooled", "probe"), partial(measuring.probed, POOLED))
    if seed.place.study.trivial and trivial.available():
        yield Wanted(Row(trivial.NAME, "control", matters=True), measuring.trivial)
    if seed.place.study.start:
        # Beside random vectors, which keep this head.
        yield Wanted(Row(START_ALONE, "control"), partial(measuring.loaded, seed.base))


def _pooled(measuring: Measuring) -> Iterator[Wanted]:
    seed = measuring.seed
    study = seed.place.study
    # As many steps as the sites take on average; as many epochs as all rounds have together.
    shares = {"epochs": 1.0, "steps": 1 / len(seed.sites), "rounds": 1.0}
    texts = {budget: f"equal {budget}" for budget in shares}
    if study.relay and study.relay.epochs:
        epochs = study.relay.epochs * study.relay.rounds
        shares["rounds"], texts["rounds"] = epochs / study.training.epochs, f"{epochs:g} epochs"
    starts = {POOLED: ("", seed.base)}
    if study.start:
        # Heads first help sites of few images; all of them together may do better without (docs/evidence.md).
        starts[FROM_BASE] = (" from the base", seed.place.base)
    for kept, (words, base) in starts.items():
        for budget in study.budgets:
            name = f"{kept}-{budget}" + (f"/{texts[budget].split()[0]}" if budget == "rounds" else "")
            row = Row(f"all data pooled{words}, {texts[budget]}", "pooled", matters=True)
            yield Wanted(row, partial(measuring.trained, name, shares[budget], base))


def _merges(measuring: Measuring) -> Iterator[Wanted]:
    study = measuring.seed.place.study
    for merge in study.merges:
        for mode in study.restore:
            shown = ("", *(one.name for one in study.more_public)) if mode in LOOK_AT_IMAGES else ("",)
            for on in shown:
                row = Row(merge.name, "fused", mode, on, matters=not on and mode == first_mode(study))
                chosen = measuring.chosen(merge, mode, on)
                more = ", ".join((*_told(chosen), *_images(measuring, on)))
                yield Wanted(row, partial(measuring.fused, merge, mode, on=on), more, merge)


def _learned(measuring: Measuring) -> Iterator[Wanted]:
    """The first merge after it has learned from the sites' networks, as it is and calibrated."""
    study = measuring.seed.place.study
    if study.distil is None:
        return
    merge, mode = study.merges[0], AUTO if AUTO in study.restore else first_mode(study)
    for on in ("", *(one.name for one in study.more_public)):
        more = ", ".join((*_told(measuring.chosen(merge, mode, on)), *_images(measuring, on), str(study.distil)))
        row = Row(f"{merge.name}, {LEARNED}", "fused", mode, on, matters=not on)
        key = f"temperature, {row.text}, {more}"
        taught = Wanted(row, partial(measuring.taught, merge, mode, on, key), more, merge, "learned")
        yield taught
        compute = partial(measuring.calibrated, taught, merge, on, key)
        yield Wanted(replace(row, name=f"{row.name}, calibrated"), compute, more, merge, "calibrated")


def _told(chosen: Chosen | None) -> tuple[str, ...]:
    return (f"{chosen.text}, {chosen.mode}",) if chosen else ()


def _images(measuring: Measuring, on: str) -> tuple[str, ...]:
    """Which images a name of `more_public:` stands for; those of `public:` never change."""
    return (measuring.seed.shown(on).digest, str(measuring.seed.most(on))) if on else ()


def _random(measuring: Measuring) -> Iterator[Wanted]:
    study = measuring.seed.place.study
    scale = next((merge.scale for merge in study.merges if not isinstance(merge.scale, str)), 1.0)
    control = Combining(method="random", scale=scale)
    for mode in study.restore:
        yield Wanted(Row(RANDOM, "random", mode), partial(measuring.fused, control, mode), control.name)


def _federated(measuring: Measuring) -> Iterator[Wanted]:
    study = measuring.seed.place.study
    if study.federated:
        count = study.federated.rounds
        row = Row(f"FedAvg, {count} rounds", "federated", FEDAVG_MODE, matters=True)
        yield Wanted(row, partial(_relayed, measuring, count, FEDAVG, FEDAVG_MODE, Pace()))


def _relays(measuring: Measuring) -> Iterator[Wanted]:
    study = measuring.seed.place.study
    if study.relay:
        chosen = study.relay
        for count in range(2, chosen.rounds + 1):
            row = Row(f"{chosen.merge.name}{_before(count, study)}", "relay", chosen.restore, matters=True)
            key = kind(study.heads) if study.heads and chosen.heads else ""
            compute = partial(_relayed, measuring, count, chosen.merge, chosen.restore, pace(study))
            yield Wanted(row, compute, key)


def _heads(measuring: Measuring) -> Iterator[Wanted]:
    study = measuring.seed.place.study
    if study.heads:
        again = study.heads
        closed = again.fit == "least_squares"
        how = " by least squares" if closed else ""
        key = kind(again).replace("least-squares", "least squares") if closed else f"{again.steps} steps"
        for count in range(1, again.rounds + 1):
            name = f"{again.merge.name}{_before(count, study)}, then heads{how}"
            row = Row(name, "relay", again.restore, matters=True)
            yield Wanted(row, partial(_with_heads, measuring, again, count), key)
        row = Row(f"{HEADS_ALONE}{how or ', averaged'}", "control", matters=True)
        yield Wanted(row, partial(_heads_alone, measuring, again), key)


def _with_heads(measuring: Measuring, heads: Heads, rounds: int) -> Floats:
    return measuring.loaded(with_heads(measuring.seed, heads, rounds))


def _heads_alone(measuring: Measuring, heads: Heads) -> Floats:
    return measuring.loaded(heads_alone(measuring.seed, heads))


def _relayed(measuring: Measuring, rounds: int, merge: Combining, mode: str, how: Pace) -> Floats:
    return measuring.loaded(relay(measuring.seed, rounds, merge, mode, how)[-1])


def _before(rounds: int, study: Study) -> str:
    """The rounds of merging that a row has seen, where there are more than one."""
    if rounds == 1:
        return ""
    how = pace(study)
    each = f" of {how.epochs:g} epochs" if how.epochs else ""
    return f", {rounds} rounds{each}" + (" with heads between" if how.heads else "")
