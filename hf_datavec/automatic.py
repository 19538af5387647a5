"""`method: auto` and `scale: auto`: chosen from the sites' sizes and how their vectors lie to each other, without any
label.

docs/choosing.md has the measurements behind the three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_datavec import cosines, variants
from hf_datavec.checkpoint import Role
from hf_datavec.geometry import Geometry
from hf_datavec.methods import all_methods
from hf_datavec.plan import Plan
from hf_datavec.survey import clip_factors

# A sum of n vectors is sqrt(n (1 + (n - 1) c)) times as long as one of them (c: their mean cosine). Scaled to a site's
# own length times this factor it did best on PAD-UFES-20 and second best, within 1 point, on the digits.
LENGTH = 1.2
# Sites that see the same kind of images share a direction (0.16 on PAD-UFES-20); at 0.02, as with four scanners, they
# are as good as orthogonal, and a spectrum that favours no site did better than their sum.
APART = 0.05
# A site with more than this share of all images is weighed by it: with 0.85 of the digits, every method that counts
# sites alike lost to that site alone.
DOMINANT = 2 / 3


@dataclass(frozen=True, slots=True)
class Automatic:
    """What was chosen, and why in one sentence."""

    method: str
    scale: float
    text: str


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


def choose(geometry: Geometry, method: str) -> Automatic:
    """The method, if it is `auto`, and the scale for vectors with this geometry."""
    norms, count = geometry.norms, len(geometry.norms)
    if count < 2:
        return Automatic("sum", 1.0, "A single vector is added as it is.")
    pairs = [geometry.cosines[row][column] for row in range(count) for column in range(row)]
    mean = math.fsum(pairs) / len(pairs)
    if method == "auto" and mean < APART:
        text = f"The vectors' mean cosine is {mean:.3f}, below {APART:g}, so `auto` chose `iso_c`, scale 1."
        return Automatic("iso_c", 1.0, text)
    found = "sum" if method == "auto" else method
    terms = [
        norms[row] * norms[column] * geometry.cosines[row][column] for row in range(count) for column in range(count)
    ]
    whole = math.sqrt(max(0.0, math.fsum(terms)))
    typical = math.sqrt(math.fsum(norm**2 for norm in norms) / count)
    # Vectors that cancel out, or are all zero, have no sum that could be given a length.
    scale = min(1.0, LENGTH * typical / whole) if whole > 0 else 1.0
    scale = float(f"{scale:.4g}") * (count if found == "mean" else 1)
    text = f"The vectors' mean cosine is {mean:.3f}, so `auto` chose `{found}`, scale {scale:g}."
    return Automatic(found, scale, text)


def decide(plan: Plan) -> Automatic | None:
    """What `auto` chooses for a plan, if it asks for that. Raises: InputError for NaN or infinite values."""
    merge = plan.recipe.merge
    if not merge.automatic:
        return None
    if merge.method == "auto" and (found := by_sizes([one.examples for one in plan.contributions])):
        return found
    vectors = [(one.name, one.source.parts) for one in plan.contributions]
    lengths = {name: math.prod(plan.base.records[name].shape) for name in plan.base.named(Role.WEIGHT)}
    geometry = cosines.measured(vectors, lengths, text="auto")
    clipped = zip(geometry.norms, clip_factors(geometry.norms, merge.clip), strict=True)
    return choose(replace(geometry, norms=tuple(norm * factor for norm, factor in clipped)), merge.method)


def applied(plan: Plan, chosen: Automatic | None) -> tuple[Plan, str]:
    """The plan with what was chosen, and the sentence that says why."""
    if chosen is None:
        return plan, ""
    update = {"method": chosen.method, "scale": chosen.scale}
    found = variants.with_merge(plan, plan.recipe.merge.model_copy(update=update))
    return (variants.counted(found) if all_methods()[chosen.method].needs_counts else found), chosen.text
