"""What the guard's finding means: in words, for `auto`, and as cautions before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from hf_datavec.recalibrate.domain import FOREIGN, Domain
from hf_datavec.recalibrate.outlying import outlying
from hf_datavec.recalibrate.sites import Sites


def kind(domain: Domain) -> str:
    """What the guard found, in words."""
    kind = "of another kind than the sites'" if domain.foreign else "of the sites' kind"
    usual = f"at most {FOREIGN:g} is usual"
    return f"{kind} (divergence {domain.divergence:.2g} at the first BatchNorm layer, {usual})"


def automatic(shared: bool, everyone: bool, domain: Domain, *, images: bool) -> str:
    """The mode that `auto` stands for; docs/restoration.md has the measurements behind the rule."""
    if not images:
        return "moments" if shared and everyone else "none"
    return "relative" if domain.foreign else "statistics"


def cautions(mode: str, sites: Sites, weights: Sequence[float], domain: Domain) -> str:
    """What a user must know about a restoration that may make the model worse; empty when nothing is known to.

    `weights` are those of all sites, whether they share statistics or not.
    """
    found = []
    if mode in ("statistics", "repair", "tune") and domain.foreign:
        found.append(
            f"The public images are {kind(domain)}: restoring on them can make the model worse than not restoring; "
            "mode: relative is made for such images"
        )
    if mode in ("statistics", "tune") and domain.divergence is None:
        found.append(
            "No site shares BatchNorm statistics, so nothing tells whether the public images look like the sites': "
            "if they do not, the model can be worse than an unrestored one"
        )
    if mode in ("relative", "repair") and not sites.shared:
        found.append(
            "No site shares BatchNorm statistics, so the base's stand for the sites': the model can be worse than an "
            "unrestored one"
        )
    # A site that alone counts has statistics that belong to its weights, which are the fused ones.
    alone = len(weights) > 1 and sum(weight != 0 for weight in weights) == 1
    if mode in ("relative", "repair") and sites.shared and len(sites.members) < len(weights) and not alone:
        found.append(f"Only {len(sites.members)} of {len(weights)} sites share statistics and stand for all")
    for name in outlying(sites):
        found.append(
            f"The statistics that '{name}' shares are so far from the other sites' that images hardly explain it, and "
            "they are part of what is restored to and of what public images are held against: ask the site, or leave "
            "it out"
        )
    if mode == "moments" and not alone:
        found.append(
            "The sites' statistics belong to the sites' weights, not to the fused ones: the model can be worse than an "
            "unrestored one; mode: relative on public images of any kind makes up for that"
        )
    if mode == "none":
        found.append("There is nothing to restore from, so BatchNorm statistics stay the base's")
    return ". ".join(found) + "." if found else ""
