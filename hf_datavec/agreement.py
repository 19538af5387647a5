"""How closely a network's answers follow those of an ensemble, without any label; plain numpy.

All work on logits or logarithms of probabilities (n, k) for the same n images and k labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_datavec import temperature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# The ensemble may support the fused network's answers this much less than those of the best site, or of the plain mean,
# before a user is warned (docs/choosing.md has the false alarms and misses).
SLACK = 0.02
# On images of another kind only a network far below the least supported site, by this factor, is warned of.
FAR = 0.5
# Networks of one study spread their logits by up to 1.3 times the median of all (ten ensembles).
LOUDEST = 3.0


@dataclass(frozen=True, slots=True)
class Match:
    """How a network's answers relate to the ensemble's.

    `support` is the mean probability that the ensemble gives to the network's answers (1 is best), `agreement` the
    share of images for which both give the same answer (1 is best), `divergence` in nats (0 is best).
    """

    divergence: float
    agreement: float
    support: float

    def as_dict(self) -> dict[str, float | None]:
        """The same as plain data for JSON; a divergence that is not finite is null."""
        return {"support": self.support, "agreement": self.agreement, "divergence": _finite(self.divergence)}

    @property
    def texts(self) -> tuple[str, str, str]:
        """Support and agreement in percent, and divergence, for tables."""
        known = math.isfinite(self.divergence)
        divergence = f"{self.divergence:.3f}" if known else "not finite"
        return f"{100 * self.support:.1f}", f"{100 * self.agreement:.1f}", divergence


# What a network is worth whose answers are not finite.
BROKEN = Match(math.inf, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The fused network and each site's held against the ensemble; None for a site that has no say."""

    images: str
    digest: str
    count: int
    names: tuple[str, ...]
    fused: Match
    sites: tuple[Match | None, ...]
    mean: Match | None = None
    # Whether the images are known to be of another kind than the sites'; there the sites' networks are no judge.
    foreign: bool = False

    @property
    def caution(self) -> str:
        """What a user must know; empty when all is well, or when nobody can tell."""
        if self.foreign and self.fused.support >= FAR * min((one.support for one in self.sites if one), default=0.0):
            return ""
        return cautions(self.fused, self.sites, self.mean)

    @property
    def text(self) -> str:
        """The finding in one sentence."""
        support, agreement, divergence = self.fused.texts
        known = [one.support for one in self.sites if one is not None]
        sites = f" (the sites' own networks: {100 * min(known):.1f} to {100 * max(known):.1f} %)" if known else ""
        return (
            f"On {self.count} public images the ensemble of the sites' networks gives the fused network's answers a "
            f"mean probability of {support} %{sites}; {agreement} % of them are its own, divergence {divergence}."
            + (" The images are of another kind than the sites', so this tells little." if self.foreign else "")
        )

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Name, support, agreement and divergence of each network, for tables."""
        found: list[tuple[str, Match | None]] = [("fused", self.fused)]
        if self.mean is not None:
            found.append(("plain mean", self.mean))
        found += sorted(zip(self.names, self.sites, strict=True), key=lambda pair: pair[0])
        return [(name, *(one.texts if one else ("no finite answers", "", ""))) for name, one in found]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        sites = zip(self.names, self.sites, strict=True)
        return {
            "images": self.images,
            "digest": self.digest,
            "count": self.count,
            "foreign": self.foreign,
            "fused": self.fused.as_dict(),
            "mean": self.mean.as_dict() if self.mean else None,
            "sites": {name: one.as_dict() if one else None for name, one in sites},
            "caution": self.caution or None,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cautions(fused: Match, sites: Sequence[Match | None], mean: Match | None = None) -> str:
    """Why a fused network should not be trusted, and what to do; empty when nothing speaks against it."""
    bars = {"the best site's": max((one.support for one in sites if one is not None), default=0.0)}
    if mean is not None:
        bars["the plain mean's"] = mean.support
    below = [f"{name} {100 * bar:.1f} %" for name, bar in bars.items() if fused.support < bar - SLACK]
    if not math.isfinite(fused.divergence):
        below = ["any network's: its answers are not finite"]
    if not below:
        return ""
    return (
        f"The ensemble of the sites' networks gives the fused network's answers a mean probability of "
        f"{fused.texts[0]} %, less than {' and '.join(below)}: the fused network may be worse than a site's own. Use "
        "method: auto or mean, a smaller scale, or recalibrate: {mode: relative}; `hf-datavec inspect` shows vectors "
        "that are unlike the others."
    )


def log_softmax(logits: Floats) -> Floats:
    """The logarithms of the probabilities, row by row; a logit of minus infinity stays one."""
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        found: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def at_labels(values: Floats, have: Sequence[str], want: Sequence[str]) -> Floats:
    """The columns of values (n, k) in the order of other labels; NaN for a label that is not there."""
    import numpy as np

    found = np.full((len(values), len(want)), np.nan)
    for column, label in enumerate(want):
        if label in have:
            found[:, column] = values[:, have.index(label)]
    return found


def pooled(parts: Floats) -> Floats:
    """The ensemble's logarithms of probabilities (n, k) from those of its members (sites, n, k), NaN for no say.

    The mean over the members that have a say on a label, made to add up to one again; a label on which nobody has a say
    has probability zero.
    """
    import numpy as np

    says = ~np.isnan(parts)
    total = says.sum(axis=0)
    summed = np.where(says, parts, 0.0).sum(axis=0)
    return log_softmax(np.where(total > 0, summed / np.maximum(total, 1), -np.inf))


def shifts(counts: Floats) -> Floats:
    """What to add to each site's logarithms of probabilities (sites, k), so that all answer for one mix of classes.

    `counts` (sites, k) are the images of each class; a site that has seen few images of a class thinks it rare. With
    the site's shares `p_jc` and those of all sites together `p_c`: `log p_c - log p_jc`. Each class of a site counts
    one image more.

    Source: arXiv 2007.07314 (logit adjustment), eq. 9, from the mix of each site to that of all.
    """
    import numpy as np

    more = counts + 1
    together = more.sum(axis=0) / more.sum()
    found: Floats = np.log(together) - np.log(more / more.sum(axis=1, keepdims=True))
    return found


def taught(kind: str, parts: Floats) -> Floats:
    """The teacher's logarithms of probabilities (n, k) from those of its members (sites, n, k), NaN for no say.

    `logits` is `pooled`; `probabilities` takes the mean of probabilities instead; `confidence` is `pooled` with each
    member's answer to an image weighed by exp(-entropy), so that a member that cannot tell hardly counts.
    """
    import numpy as np

    if kind == "logits":
        return pooled(parts)
    says = ~np.isnan(parts)
    # Members are means over views, which need not add up to one; one without any say stays without.
    known = log_softmax_of_known(parts)
    shares = np.where(says, np.exp(known), 0.0)
    each = says.astype(np.float64)
    if kind == "confidence":
        entropy = -(shares * np.where(shares > 0, known, 0.0)).sum(axis=2, keepdims=True)
        each = each * np.exp(-entropy)
    values = shares if kind == "probabilities" else np.where(says, parts, 0.0)
    total = each.sum(axis=0)
    mean = (each * values).sum(axis=0) / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        found = np.log(mean) if kind == "probabilities" else mean
    return log_softmax(np.where(total > 0, found, -np.inf))


def log_softmax_of_known(values: Floats) -> Floats:
    """The logarithms of the probabilities along the last axis among the values that are no NaN; minus infinity else."""
    import numpy as np

    known = np.where(np.isnan(values), -np.inf, values)
    highest = known.max(axis=-1, keepdims=True)
    shifted = known - np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.where(np.isnan(found), -np.inf, found)


def no_louder(parts: Floats) -> Floats:
    """Members' logarithms of probabilities (sites, n, k) without one that outvotes all others, NaN for no say.

    A mean of logits follows whoever has the largest. A member's spread around its mean over labels is shortened to at
    most `LOUDEST` times that of the median member.
    """
    import numpy as np

    silent = np.isnan(parts).all(axis=2, keepdims=True)
    means = np.nanmean(np.where(silent, 0.0, parts), axis=2, keepdims=True)
    centred = parts - means
    spreads = np.sqrt(np.nanmean(np.where(silent, 0.0, centred) ** 2, axis=(1, 2)))
    known = spreads[~silent.reshape(len(parts), -1).all(axis=1)]
    known = known[known > 0]  # a member with a single label has no spread
    most = LOUDEST * float(np.median(known)) if len(known) else np.inf
    factors = np.where(spreads > most, most / np.where(spreads > 0, spreads, 1.0), 1.0)[:, None, None]
    return np.where(factors < 1, means + factors * centred, parts)


def skew(counts: Floats) -> float:
    """How much the sites' mixes of classes differ, from 0 (all alike) to nearly 1 (no class at two sites).

    The mean over images of the total variation between a site's mix and that of all sites, of `counts` (sites, k).
    """
    import numpy as np

    images = counts.sum(axis=1)
    own = counts / np.where(images > 0, images, 1.0)[:, None]
    each = np.abs(own - counts.sum(axis=0) / images.sum()).sum(axis=1) / 2
    return float((images * each).sum() / images.sum())


def match(teacher: Floats, student: Floats) -> Match:
    """Divergence and agreement of a student's logits with a teacher's logarithms of probabilities.

    Only labels that the student has, those without NaN, are looked at. Infinite values make it `BROKEN`.
    """
    import numpy as np

    has = ~np.isnan(student).all(axis=0)
    if not has.any() or not np.isfinite(student[:, has]).all():
        return BROKEN
    if not np.isfinite(teacher[:, has]).any(axis=1).all():
        return BROKEN
    theirs = log_softmax(teacher[:, has])
    answers = student[:, has]
    return Match(divergence(theirs, answers), agreement(theirs, answers), support(theirs, answers))


def support(teacher: Floats, student: Floats) -> float:
    """The mean probability that the teacher gives to the student's answers: its accuracy, were the teacher right."""
    import numpy as np

    return float(np.exp(teacher[np.arange(len(teacher)), student.argmax(axis=1)]).mean())


def agreement(teacher: Floats, student: Floats) -> float:
    """The share of images for which both give the same label."""
    return float((teacher.argmax(axis=1) == student.argmax(axis=1)).mean())


def divergence(teacher: Floats, student: Floats) -> float:
    """The mean of KL(teacher || softmax(student / T)) over images, at the temperature T that makes it least.

    A network is calibrated after a merge, so its confidence does not count, within the range of temperatures.
    """
    import numpy as np

    shares, logits = np.exp(teacher), log_softmax(student)
    entropy = -(shares * np.where(shares > 0, teacher, 0.0)).sum(axis=1)
    suited = log_softmax(logits / temperature.fit_ensemble(logits, shares))
    return max(0.0, float((-(shares * suited).sum(axis=1) - entropy).mean()))
