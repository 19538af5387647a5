"""What the numbers of a study say, in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hf_datavec.metrics import Estimate
from hf_datavec.study import trivial
from hf_datavec.study.comparison import FEWEST_SEEDS
from hf_datavec.study.listing import LOGITS
from hf_datavec.study.measure import BEST_SITE
from hf_datavec.study.results import Line, Results


def sentences(results: Results) -> Iterator[str]:
    """The conclusion: who has which accuracy, and whether the default merge is above or below each bar."""
    merged, best = default(results), results.line("single site: best")
    pooled = hardest_pooled(results)
    bars = (("the best single site", best), ("the ensemble of logits", results.line(LOGITS)))
    named = [*bars, *((("all data pooled", pooled),) if pooled else ()), (_called(merged), merged)]
    yield "Accuracy in percent: " + ", ".join(f"{name} {line.cell('accuracy')}" for name, line in named) + "."
    yield _sites(results, merged)
    yield f"Against the best single site it is {_difference(merged, BEST_SITE)}."
    yield f"Against the ensemble of logits it is {_difference(merged, LOGITS)}."
    if pooled:
        share = _mean(merged) / _mean(pooled) if _mean(pooled) else math.nan
        difference = _difference(merged, pooled.text)
        yield f"Against '{pooled.text}' it is {difference}; it has {100 * share:.0f} % of that accuracy."
    if trivial.NAME in merged.differences:
        features = results.line(trivial.NAME).cell("accuracy")
        yield (
            f"Trivial features have {features}; the merge is {_difference(merged, trivial.NAME)} against them. "
            "A network that is not clearly above them may only use a shortcut."
        )
    yield from results.notes
    yield _intervals(results)


def default(results: Results) -> Line:
    """The line of the merge that a user would take: `auto` if it is listed, else the first, restored."""
    return results.line(f"{results.default}, {results.first_mode}")


def hardest_pooled(results: Results) -> Line | None:
    """Of the networks on all data the one of the highest accuracy."""
    return max((line for line in results.lines if line.kind == "pooled"), key=_mean, default=None)


def _mean(line: Line) -> float:
    return math.fsum(line.values["accuracy"]) / len(line.values["accuracy"])


def _called(merged: Line) -> str:
    return f"the default merge '{merged.shown}'"


def _sites(results: Results, merged: Line) -> str:
    own = {name: math.fsum(values) / len(values) for name, values in results.sites.items()}
    below = [name for name, value in own.items() if value < _mean(merged)]
    mean = 100 * math.fsum(own.values()) / len(own)
    return f"A site's own network has {mean:.1f} on average; the merge is above it at {len(below)} of {len(own)} sites."


def _difference(line: Line, bar: str) -> str:
    """The difference of accuracies in points with its interval, and what it means."""
    found = line.differences[bar].estimate
    return f"{_verdict(found)} ({100 * found.value:+.1f} points, {100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _verdict(found: Estimate) -> str:
    if found.low > 0:
        return "above"
    return "below" if found.high < 0 else "not clearly different"


def _intervals(results: Results) -> str:
    count = len(results.seeds)
    if count < FEWEST_SEEDS:
        some = "One seed does" if count == 1 else "Two seeds do"
        return (
            f"{some} not tell how results vary with the split and the training; intervals of differences are 95 % "
            f"bootstrap intervals over {results.images}."
        )
    return f"Intervals of differences are Student's 95 % intervals over {count} seeds."
