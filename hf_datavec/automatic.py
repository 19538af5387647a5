"""`method: auto` and `scale: auto` where no public images tell anything: rules that look at no image.

docs/choosing.md has the measurements behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_datavec import candidates, cosines
from hf_datavec.candidates import Candidate
from hf_datavec.checkpoint import Role
from hf_datavec.geometry import Geometry
from hf_datavec.plan import Plan
from hf_datavec.recipe import AUTO
from hf_datavec.survey import clip_factors

# A sum of n vectors is sqrt(n (1 + (n - 1) c)) times as long as one of them (c: their mean cosine). Scaled to a site's
# own length times this factor it did best on PAD-UFES-20 and second best, within 1 point, on the digits.
LENGTH = 1.2
# With the sites' own statistics alone it did best in the mean of eight cases (docs/choosing.md).
METHOD = "tsv"
# A site with more than this share of all images is weighed by it: with 0.85 of the digits, every method that counts
# sites alike lost to that site alone.
DOMINANT = 2 / 3


@dataclass(frozen=True, slots=True)
class Automatic:
    """What was chosen, and why in one sentence."""

    method: str
    scale: float
    text: str
    head: bool = False


def by_sizes(counts: Sequence[int | None]) -> Automatic | None:
    """What `method: auto` chooses from the sites' numbers of examples alone; None when they leave it open."""
    known = [count for count in counts if count]
    if not known or len(known) < len(counts):
        return None
    share = max(known) / sum(known)
    if len(known) == 1 or share <= DOMINANT:
        return None
    text = f"One site has {100 * share:.0f} % of all examples, so `auto` chose `fedavg`, which counts sites by theirs."
    return Automatic("fedavg", 1.0, text)


def scale_of(geometry: Geometry, method: str) -> Automatic:
    """The scale of `sum` or `mean` for vectors with this geometry."""
    norms, count = geometry.norms, len(geometry.norms)
    if count < 2:
        return Automatic(method, 1.0, "A single vector is added as it is.")
    pairs = [geometry.cosines[row][column] for row in range(count) for column in range(row)]
    terms = [
        norms[row] * norms[column] * geometry.cosines[row][column] for row in range(count) for column in range(count)
    ]
    whole = math.sqrt(max(0.0, math.fsum(terms)))
    typical = math.sqrt(math.fsum(norm**2 for norm in norms) / count)
    # Vectors that cancel out, or are all zero, have no sum that could be given a length.
    scale = min(1.0, LENGTH * typical / whole) if whole > 0 else 1.0
    scale = float(f"{scale:.4g}") * (count if method == "mean" else 1)
    mean = math.fsum(pairs) / len(pairs)
    text = f"The vectors' mean cosine is {mean:.3f}, so `auto` chose scale {scale:g} for `{method}`."
    return Automatic(method, scale, text)


def method_of(plan: Plan) -> Automatic:
    """The method and its scale: of few means the first that the sites' declarations allow."""
    if len(plan.contributions) == 1:
        return Automatic("sum", 1.0, "A single vector is added as it is.")
    if any(candidates.heads(plan)):
        text = "No public images tell, so `auto` chose the base with the head that all sites' sums of features give."
        return Automatic("sum", 0.0, text, head=True)
    found = by_sizes([one.examples for one in plan.contributions])
    if found and not candidates.fits(plan, Candidate(found.method, found.scale)):
        found = None
    return found or Automatic(METHOD, 1.0, f"No public images tell, so `auto` chose `{METHOD}`, scale 1.")


def decide(plan: Plan) -> Automatic | None:
    """What `auto` chooses for a plan, if it asks for that. Raises: InputError for NaN or infinite values."""
    merge = plan.recipe.merge
    if not merge.automatic:
        return None
    if merge.method == "auto":
        return method_of(plan)
    vectors = [(one.name, one.source.parts) for one in plan.contributions]
    lengths = {name: math.prod(plan.base.records[name].shape) for name in plan.base.named(Role.WEIGHT)}
    geometry = cosines.measured(vectors, lengths, text="auto")
    clipped = zip(geometry.norms, clip_factors(geometry.norms, merge.clip), strict=True)
    return scale_of(replace(geometry, norms=tuple(norm * factor for norm, factor in clipped)), merge.method)


def applied(plan: Plan, chosen: Automatic | None) -> tuple[Plan, str]:
    """The plan with what was chosen, and the sentence that says why."""
    if chosen is None:
        return plan, ""
    candidate = Candidate(chosen.method, chosen.scale, plan.recipe.merge.options, head=chosen.head)
    # A head on the untouched base fits the base's statistics and no others.
    return candidates.planned(plan, candidate, "none" if chosen.head else AUTO), chosen.text
