"""Methods that drop values at random and enlarge the rest: dare and della, summed or with an elected sign."""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from hf_datavec.methods import Between, Factors, method
from hf_datavec.methods.linear import weighted_sum
from hf_datavec.methods.signs import Density, agreeing, agreeing_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from hf_datavec.draws import Draws

    Array = NDArray[Any]

Epsilon = Annotated[float, Between(0, 0.5)]


def _dropped(vectors: "Tensor", density: float, generators: "Sequence[Draws]") -> "list[Tensor]":
    return [draws.keep(vector, density) for vector, draws in zip(vectors, generators, strict=True)]


@method(
    "dare_linear",
    formula="sum_j w_j b_j tau_j / density, b_j ~ Bernoulli(density)",
    source="arXiv 2311.03099 (DARE)",
    uses_weights=True,
)
def dare_linear(
    vectors: "Tensor", weights: "Tensor", *, generators: "Sequence[Draws]",
    density: Density = 0.5, rescale: bool = True, normalize: bool = False,
) -> "Tensor":  # fmt: skip
    """The sum of the vectors after values were dropped at random and the rest enlarged."""
    total = weighted_sum(_dropped(vectors, density, generators), weights.tolist())
    # Dividing what is kept by its chance is the same after the sum.
    return total / ((density if rescale else 1.0) * (sum(weights.tolist()) if normalize else 1.0))


def _dare_ties_rows(
    rows: "Sequence[Array]", *, generators: "Sequence[Draws]", density: float, rescale: bool, normalize: bool
) -> "list[Array]":
    kept = (draws.keep_of(row, density) for row, draws in zip(rows, generators, strict=True))
    return [agreeing_rows(kept, len(rows), normalize=normalize)]


def _enlarged(weights: Sequence[float], *, density: float, rescale: bool, **_: object) -> Factors:
    return Factors(weights, density if rescale else 1.0)


@method(
    "dare_ties",
    formula="sum_{j in A} w_j t_j / sum_{j in A} w_j, t_j = b_j tau_j / density, A as in ties",
    source="arXiv 2311.03099 (DARE) and arXiv 2306.01708 (TIES-Merging)",
    uses_weights=True,
    rows=_dare_ties_rows,
    factors=_enlarged,
)
def dare_ties(
    vectors: "Tensor", weights: "Tensor", *, generators: "Sequence[Draws]",
    density: Density = 0.5, rescale: bool = True, normalize: bool = True,
) -> "Tensor":  # fmt: skip
    """The vectors dropped at random as in dare, averaged over the sites that agree on the sign as in ties."""
    result = agreeing(_dropped(vectors, density, generators), weights, normalize=normalize)
    # Dividing what is kept by its chance changes no sign, so it is the same after the average.
    return result.div_(density) if rescale else result


def _chance_out_of_range(sites: int, density: float, epsilon: float, **_: object) -> str | None:
    if density - epsilon <= 0 or density + epsilon > 1 + 1e-9:
        return f"keeps values by chances from density - epsilon to density + epsilon: {density:g} -+ {epsilon:g}"
    return None


def _della(
    vectors: "Tensor", density: float, epsilon: float, generators: "Sequence[Draws]", *, rescale: bool
) -> "Tensor":
    """MagPrune: within each row a value's chance to stay grows evenly with the rank of its magnitude."""
    import torch

    kept = torch.empty(len(vectors), vectors[0].numel(), dtype=torch.float64, device=vectors.device)
    # Site by site, so that the orders and chances of no more than one are in memory.
    for vector, generator, row in zip(vectors, generators, kept, strict=True):
        # Stable, so that equal magnitudes are ranked by their place and not by chance.
        order = vector.abs().argsort(dim=1, stable=True)
        places = torch.arange(order.shape[1], device=order.device)
        ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        del order
        # A row of one value has no order; it stays by the middle chance.
        last = len(places) - 1
        chances = ranks.double()
        del ranks
        chances = chances.mul_(2 * epsilon / last).add_(density - epsilon) if last > 0 else chances.add_(density)
        drawn = generator.uniform(vector.numel()).view(vector.shape).to(vector.device)
        row.copy_(vector.reshape(-1))
        if rescale:
            row.div_(chances.view(-1))
        row.masked_fill_((drawn >= chances).view(-1), 0.0)
    return kept


@method(
    "della",
    formula="sum_{j in A} w_j t_j / sum_{j in A} w_j, t_j = b_j tau_j / p_j, p_j = density -+ epsilon by row rank",
    source="arXiv 2406.11617 (DELLA: MagPrune, elect, fuse)",
    uses_weights=True,
    kind="matrix",
    refusal=_chance_out_of_range,
)
def della(
    vectors: "Tensor", weights: "Tensor", *, generators: "Sequence[Draws]", density: Density = 0.5,
    epsilon: Epsilon = 0.1, rescale: bool = True, normalize: bool = True,
) -> "Tensor":  # fmt: skip
    """Values dropped at random, the small ones of each row more often, then averaged where signs agree."""
    kept = _della(vectors, density, epsilon, generators, rescale=rescale)
    return agreeing(kept, weights, normalize=normalize).reshape(vectors.shape[1:])


@method(
    "della_linear",
    formula="sum_j w_j b_j tau_j / p_j, p_j = density -+ epsilon by rank in the row",
    source="arXiv 2406.11617 (DELLA), without its election",
    uses_weights=True,
    kind="matrix",
    refusal=_chance_out_of_range,
)
def della_linear(
    vectors: "Tensor", weights: "Tensor", *, generators: "Sequence[Draws]", density: Density = 0.5,
    epsilon: Epsilon = 0.1, rescale: bool = True, normalize: bool = False,
) -> "Tensor":  # fmt: skip
    """Values dropped at random, the small ones of each row more often, then summed."""
    kept = _della(vectors, density, epsilon, generators, rescale=rescale)
    return weighted_sum(kept, weights.tolist(), normalize=normalize).reshape(vectors.shape[1:])
