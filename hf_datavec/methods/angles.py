"""Methods that look at the angles between vectors: model_stock, slerp, nuslerp, karcher_mean.

Their results are sums of the vectors times factors that follow from inner products alone, so no vector is copied.
`scope` says whether angles are those of each tensor or of the whole vectors.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
import math
from typing import TYPE_CHECKING

from hf_datavec.methods import Scope, method

if TYPE_CHECKING:
    from torch import Tensor

# Below this sine the arc's formula divides noise by noise. For vectors of one direction the chord then is the arc, but
# for the square of this; for opposite ones no arc is the shortest.
FLAT = 1e-6
# Steps on the sphere shrink by a factor unless vectors lie on opposite sides; a hundred reach the last digits.
KARCHER_STEPS = 100
SETTLED = 1e-14


def _cosines(products: "Tensor") -> "Tensor":
    """The cosines (n, n) between vectors; those of a zero vector are zero."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    longest = float(lengths.max())
    # In two divisions: the product of two tiny lengths would vanish, that of two huge ones overflow.
    safe = lengths.where(lengths > 0, 1.0)
    return (products / safe[:, None] / safe).clamp(-1, 1) if longest > 0 else products.clone()


@method(
    "model_stock",
    formula="t/n sum_j tau_j, t = n c / (1 + (n-1) c), c = mean cosine between two vectors",
    source="arXiv 2403.19522 (Model Stock), its ratio for n models",
    uses_weights=False,
    kind="site",
)
def model_stock(products: "Tensor", weights: "Tensor", *, scope: Scope = "tensor") -> "Tensor":
    """The mean of the vectors, shortened by how much they disagree: not at all when equal, to zero when orthogonal."""
    count = len(products)
    cosines = _cosines(products)
    mean = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    # A mean cosine below zero would turn the result around; the paper's geometry has none.
    mean = max(0.0, mean)
    ratio = count * mean / (1 + (count - 1) * mean)
    return weights.new_full((count,), ratio / count)


def _arc(products: "Tensor", t: float) -> "Tensor":
    """Factors of two vectors, a part t of the way from the first to the second along the arc between them."""
    import torch

    angle = math.acos(float(_cosines(products)[0, 1]))
    sine = math.sin(angle)
    lengths = products.diagonal()
    if sine < FLAT or float(lengths.min()) <= 0:
        return torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.tensor([math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine], dtype=torch.float64)


def _not_two(sites: int, **_: object) -> str | None:
    return f"turns one vector into another: it takes exactly two sites, and there are {sites}" if sites != 2 else None


@method(
    "slerp",
    formula="(sin((1-t) a) tau_1 + sin(t a) tau_2) / sin a, a = angle between tau_1 and tau_2",
    source="doi 10.1145/325334.325242 (Shoemake 1985)",
    uses_weights=False,
    kind="site",
    refusal=_not_two,
)
def slerp(products: "Tensor", weights: "Tensor", *, scope: Scope = "tensor") -> "Tensor":
    """The vector half-way along the arc between two vectors; `nuslerp` with weights stops elsewhere."""
    return _arc(products, 0.5)


@method(
    "nuslerp",
    formula="(sin((1-t) a) tau_1 + sin(t a) tau_2) / sin a, t = w_2 / (w_1 + w_2)",
    source="doi 10.1145/325334.325242 (Shoemake 1985); mergekit's nuslerp, with the base as origin",
    uses_weights=True,
    kind="site",
    refusal=_not_two,
)
def nuslerp(products: "Tensor", weights: "Tensor", *, scope: Scope = "tensor") -> "Tensor":
    """The vector on the arc between two vectors that divides it by their weights."""
    return _arc(products, float(weights[1] / weights.sum()))


@method(
    "karcher_mean",
    formula="r m, m = argmin over the unit sphere of sum_j w_j angle(m, tau_j)^2, r = sum_j w_j |tau_j| / sum_j w_j",
    source="doi 10.1002/cpa.3160300502 (Karcher 1977)",
    uses_weights=True,
    kind="site",
)
def karcher_mean(products: "Tensor", weights: "Tensor", *, scope: Scope = "tensor") -> "Tensor":
    """The mean direction on the sphere, as long as the vectors are on average."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    shares = weights / weights.sum()
    # A zero vector has no direction, but it counts for the length.
    pulls = shares.where(lengths > 0, 0.0)
    cosines = _cosines(products)
    if float(pulls.sum()) <= 0:
        return shares
    point, moved = _unit(pulls / pulls.sum(), cosines), 1.0
    for _ in range(KARCHER_STEPS):
        if point is not None and moved >= SETTLED:
            point, moved = _step(point, cosines, pulls / pulls.sum())
    if point is None:
        return shares  # vectors that cancel out have no mean direction: their average is as good
    radius = float((shares * lengths).sum())
    return radius * point / lengths.where(lengths > 0, 1.0)


def _unit(point: "Tensor", cosines: "Tensor") -> "Tensor | None":
    """The point, given by its factors of the unit vectors, brought to length one; None for one of no length."""
    length = math.sqrt(max(0.0, float(point @ cosines @ point)))
    return point / length if length > FLAT else None


def _step(point: "Tensor", cosines: "Tensor", shares: "Tensor") -> "tuple[Tensor | None, float]":
    """One step to the mean of the directions as seen from the point, and its length."""
    towards = (cosines @ point).clamp(-1, 1)
    angles = towards.acos()
    sines = angles.sin()
    # A vector opposite to the point pulls it nowhere, since every way is as short.
    pulls = shares * (angles / sines).where(sines > FLAT, (towards > 0).double())
    tangent = pulls - (pulls * towards).sum() * point
    length = math.sqrt(max(0.0, float(tangent @ cosines @ tangent)))
    if length < SETTLED:
        return point, length
    return _unit(math.cos(length) * point + math.sin(length) / length * tangent, cosines), length
