"""How the candidates of `auto` did, and which of them is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_datavec.agreement import Match
from hf_datavec.candidates import Candidate

# Divergences that differ beyond these digits are equal: less is what another machine's roundings make.
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate in one mode, and how it relates to the ensemble; a problem instead where it gives nothing finite."""

    candidate: Candidate
    mode: str
    match: Match
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether it may be chosen."""
        return math.isfinite(self.match.divergence)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every candidate that was tried on which images, for sites with these names."""

    images: str
    digest: str
    count: int
    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    # How far the images are from the sites', where they are of another kind.
    foreign: float | None = None

    @property
    def best(self) -> Trial:
        """The trial with the most support; of equals the one that diverges least, then the first."""
        return min(self.trials, key=_rank)

    @property
    def mean(self) -> Match | None:
        """How the plain mean does, in the mode that suits it best, if it was tried."""
        found = [one.match for one in self.trials if one.candidate.method == "mean" and one.candidate.scale == 1]
        return max(found, key=lambda match: match.support, default=None)

    @property
    def text(self) -> str:
        """What was chosen and why, in one sentence."""
        best, support = self.best, self.best.match.texts[0]
        chosen, restored = best.candidate, "" if best.mode == "none" else f", restored by `{best.mode}`"
        what = f"`{chosen.method}`, scale {chosen.scale:.4g}"
        if chosen.site is not None or chosen.head or not chosen.scale:
            what = chosen.named(self.names)
        if self.foreign is not None:
            return (
                f"`auto` chose {what}{restored}: the public images are of another kind than the sites' (divergence "
                f"{self.foreign:.2g}), so the sites' networks are no judge there."
            )
        return (
            f"`auto` chose {what}{restored}: of {len(self.trials)} candidates the ensemble of the sites' networks "
            f"gives its answers the most probability ({support} %) on {self.count} public images."
        )

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Candidate, mode, support, agreement and divergence of each trial, for tables; the best is marked."""
        return [
            (one.candidate.named(self.names), one.mode, *_shown(one), "chosen" if one is self.best else "")
            for one in self.trials
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "images": self.images,
            "digest": self.digest,
            "count": self.count,
            **({} if self.foreign is None else {"foreign": self.foreign if math.isfinite(self.foreign) else None}),
            "found": _plain(self.best, self.names),
            "candidates": [_plain(one, self.names) for one in self.trials],
        }


def _rank(trial: Trial) -> tuple[float, float]:
    if not trial.usable:
        return math.inf, math.inf
    return -round(trial.match.support, DIGITS), round(trial.match.divergence, DIGITS)


def _shown(trial: Trial) -> tuple[str, str, str]:
    return (trial.problem, "", "") if trial.problem else trial.match.texts


def _plain(trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    one = trial.candidate
    return {
        "method": one.method,
        "scale": one.scale,
        **({"options": dict(one.options)} if one.options else {}),
        **({"site": names[one.site]} if one.site is not None else {}),
        **({"head": "pooled"} if one.head else {}),
        "mode": trial.mode,
        **trial.match.as_dict(),
        **({"problem": trial.problem} if trial.problem else {}),
    }
