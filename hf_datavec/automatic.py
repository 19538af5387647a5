"""`method: auto` and `scale: auto`: chosen from how the vectors lie to each other, without any label.

docs/choosing.md has the measurements behind the two numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_datavec import variants
from hf_datavec.checkpoint import Role
from hf_datavec.geometry import Geometry, Gram, products
from hf_datavec.plan import Plan
from hf_datavec.progress import progress
from hf_datavec.vector import refuse_nonfinite

# A sum of n vectors is sqrt(n (1 + (n - 1) c)) times as long as one of them (c: their mean cosine). Scaled to a site's
# own length times this factor it did best on PAD-UFES-20 and second best, within 1 point, on the digits.
LENGTH = 1.2
# Sites that see the same kind of images share a direction (0.16 on PAD-UFES-20); at 0.02, as with four scanners, they
# are as good as orthogonal, and a spectrum that favours no site did better than their sum.
APART = 0.05


@dataclass(frozen=True, slots=True)
class Automatic:
    """What was chosen, and why in one sentence."""

    method: str
    scale: float
    text: str


def choose(geometry: Geometry, method: str) -> Automatic:
    """The method, if it is `auto`, and the scale for vectors with this geometry."""
    norms, count = geometry.norms, len(geometry.norms)
    if count < 2:
        return Automatic("sum", 1.0, "A single vector is added as it is.")
    cosines = [geometry.cosines[row][column] for row in range(count) for column in range(row)]
    mean = math.fsum(cosines) / len(cosines)
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


def resolve(plan: Plan) -> tuple[Plan, str]:
    """The plan with method and scale in place of `auto`, and the sentence that says why; reads the vectors once."""
    merge = plan.recipe.merge
    if not merge.automatic:
        return plan, ""
    found = choose(measured(plan), merge.method)
    return variants.with_merge(
        plan, merge.model_copy(update={"method": found.method, "scale": found.scale})
    ), found.text


def measured(plan: Plan) -> Geometry:
    """Norms and cosines of the plan's vectors. Raises: InputError for NaN or infinite values."""
    import torch

    gram, names = Gram(), plan.base.named(Role.WEIGHT)
    for name in progress(names, text="auto", total=len(names), unit="tensor"):
        rows = [one.source.read(name).reshape(-1) for one in plan.contributions]
        for one, row in zip(plan.contributions, rows, strict=True):
            refuse_nonfinite(row, name, one.name)
        gram.include(products(torch.stack(rows)))
    return gram.geometry()
