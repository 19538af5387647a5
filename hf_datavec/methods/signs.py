"""Methods that settle conflicts coordinate by coordinate: ties, breadcrumbs, magmax, emr, consensus.

A value is trimmed by its rank among the magnitudes of its tensor or of the site's whole vector, as `scope` says. Values
as large as the one at the boundary stay in, so how many are kept is exact whenever magnitudes differ.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from hf_datavec.methods import Between, Scope, method
from hf_datavec.methods.linear import averaged, weighted_sum

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.generic]

# Less than one value in ten thousand is a slip of the pen; zero would keep nothing.
Density = Annotated[float, Between(0.0001, 1)]


def agreeing(vectors: "Tensor | Sequence[Tensor]", weights: "Tensor", *, normalize: bool) -> "Tensor":
    """The sum, or weighted average, of those w_j tau_j whose sign is that of the sum of all of them, one row each.

    Where the sum is zero no sign is elected and the result is zero.

    Source: arXiv 2306.01708, algorithm 1, its steps "elect" and "disjoint merge".
    """
    import torch

    factors = weights.tolist()
    total = weighted_sum(vectors, factors)
    if any(factor != 1 for factor in factors):
        return _agreeing_weighted(vectors, factors, total.sign(), normalize=normalize)
    # What agrees and what does not make up the sum of magnitudes, and differ by the size of the votes' sum; so it is
    # with the numbers of sites, which are exact in any type, and short ones are faster to add.
    sizes, present, balance = torch.zeros_like(total), *torch.zeros(2, *total.shape, device=total.device)
    for vector in vectors:
        sizes.add_(vector.abs())
        if normalize:
            sign = vector.sign()
            balance.add_(sign)
            present.add_(sign.abs_())
    # Half of both is left out where it stands above and below the line.
    elected = total.sign()
    agreed = sizes.add_(total.abs_()).mul_(elected)
    if not normalize:
        return agreed.div_(2)
    chosen = elected.to(present.dtype)
    divisor = present.addcmul_(chosen, balance)
    # Where no sign is elected, zero is divided by one more than nothing; any other divisor stays as it is.
    return agreed.div_(divisor.sub_(chosen.abs_().sub_(1)))


def _agreeing_weighted(
    vectors: "Tensor | Sequence[Tensor]", factors: list[float], elected: "Tensor", *, normalize: bool
) -> "Tensor":
    """The same for any weights, which differences of sums would lose when they are unlike or cancel."""
    import torch

    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, factor in zip(vectors, factors, strict=True):
        # The sign of w_j tau_j, so that a negative weight votes for the other side.
        vote = vector.double() * factor
        # One where the signs agree, else zero: by products of signs, several times faster than by masks.
        same = vote.sign().mul_(elected).clamp_(min=0)
        total.addcmul_(vote, same)
        divisor.add_(same, alpha=factor)
    return total.div_(divisor).masked_fill_(divisor == 0, 0.0) if normalize else total


def trimmed(vectors: "Tensor", thresholds: "Tensor") -> "list[Tensor]":
    """The vectors one by one, with zero below the last threshold, and above the first where there are two."""
    import torch
    from torch.nn.functional import hardshrink

    bounds = thresholds.to(vectors.dtype)
    # `hardshrink` keeps what is above a bound; the next smaller number keeps the bound itself, too.
    below = torch.nextafter(bounds[:, -1], torch.zeros_like(bounds[:, -1])).tolist()
    kept = [hardshrink(vector, least) for vector, least in zip(vectors, below, strict=True)]
    if thresholds.shape[1] == 2:
        for vector, row, most in zip(vectors, kept, bounds[:, 0].tolist(), strict=True):
            row -= hardshrink(vector, most)
    return kept


def agreeing_rows(kept: "Iterable[Array]", sites: int, *, normalize: bool) -> "Array":
    """The same as `agreeing` of numpy rows (d,) of so many sites, each of weight 1, whose memory it uses."""
    import numpy as np

    rows = iter(kept)
    first = next(rows)
    count = np.min_scalar_type(sites)
    total = first.astype(np.float64)
    above, below = np.greater(first, 0).astype(count), np.less(first, 0).astype(count)
    positive = np.maximum(first, 0, out=first).astype(np.float64)
    for row in rows:
        np.add(total, row, out=total)
        if normalize:
            np.add(above, np.greater(row, 0).view(np.uint8), out=above)
            np.add(below, np.less(row, 0).view(np.uint8), out=below)
        np.add(positive, np.maximum(row, 0, out=row), out=positive)
    # The heavier side: of the positive sum and the size of the negative one, which make up the total, the larger one.
    agreed = np.subtract(positive, total)
    np.maximum(agreed, positive, out=agreed)
    drawn = np.logical_and(total == 0, agreed > 0)
    if drawn.any():
        agreed[drawn] = 0
    np.copysign(agreed, total, out=agreed)
    if normalize:
        # By products of numbers, since choosing by truth values that follow no rule takes many times as long.
        np.subtract(above, below, out=above)
        np.multiply(above, np.greater(total, 0).view(np.uint8), out=above)
        np.add(above, below, out=above)
        np.bitwise_or(above, np.equal(above, 0).view(np.uint8), out=above)
        np.divide(agreed, above, out=agreed)
    return agreed


def _trimmed_rows(rows: "Sequence[Array]", thresholds: Sequence[Sequence[float]]) -> "Iterator[Array]":
    """Numpy rows (d,) one by one, with zero below a threshold each."""
    import numpy as np

    for row, (least,) in zip(rows, thresholds, strict=True):
        bits = row.view(np.int32)
        # Magnitudes have the order of their bits: the sign of a difference, spread over all bits, is what to keep.
        bound = max(1, int(np.float32(least).view(np.int32)))
        kept = np.bitwise_and(bits, 0x7FFFFFFF)
        np.subtract(bound - 1, kept, out=kept)
        np.right_shift(kept, 31, out=kept)
        yield np.bitwise_and(kept, bits, out=kept).view(np.float32)


def share(fraction: float, length: int) -> int:
    """How many values a fraction of them is, rounded down."""
    return int(fraction * length + 1e-9)  # 0.29 * 100 is 28.999999999999996


def _largest(length: int, density: float, **_: object) -> tuple[int, ...]:
    return (max(1, share(density, length)),)


def _ties_rows(
    rows: "Sequence[Array]", *, thresholds: Sequence[Sequence[float]], normalize: bool, **_: object
) -> "list[Array]":
    return [agreeing_rows(_trimmed_rows(rows, thresholds), len(rows), normalize=normalize)]


@method(
    "ties",
    formula="sum_{j in A} w_j t_j / sum_{j in A} w_j, t_j = top density of tau_j, A = {j: sgn t_j = sgn sum w_j t_j}",
    source="arXiv 2306.01708, algorithm 1 (TIES-Merging)",
    uses_weights=True,
    ranks=_largest,
    rows=_ties_rows,
    factors=averaged,
)
def ties(
    vectors: "Tensor", weights: "Tensor", *, thresholds: "Tensor",
    density: Density = 0.2, scope: Scope = "vector", normalize: bool = True,
) -> "Tensor":  # fmt: skip
    """The largest values of each vector, averaged over the sites that agree with the sign of the heavier side."""
    return agreeing(trimmed(vectors, thresholds), weights, normalize=normalize)


def _between(length: int, density: float, gamma: float, **_: object) -> tuple[int, ...]:
    top = min(share(gamma, length), length - 1)
    return top + 1, min(top + max(1, share(density, length)), length)


def _too_much(sites: int, density: float, gamma: float, **_: object) -> str | None:
    if density + gamma > 1 + 1e-9:
        return f"keeps density {density:g} after dropping gamma {gamma:g} of the values: together at most 1"
    return None


@method(
    "breadcrumbs",
    formula="sum_j w_j m_j tau_j, m_j drops the largest gamma, keeps the next density of |tau_j|",
    source="arXiv 2312.06795 (Model Breadcrumbs)",
    uses_weights=True,
    ranks=_between,
    refusal=_too_much,
)
def breadcrumbs(
    vectors: "Tensor", weights: "Tensor", *, thresholds: "Tensor", density: Density = 0.9,
    gamma: Annotated[float, Between(0, 0.9)] = 0.01, scope: Scope = "tensor", normalize: bool = False,
) -> "Tensor":  # fmt: skip
    """The sum of the vectors without their outliers and without their smallest values."""
    return weighted_sum(trimmed(vectors, thresholds), weights.tolist(), normalize=normalize)


@method(
    "breadcrumbs_ties",
    formula="sum_{j in A} w_j m_j tau_j / sum_{j in A} w_j, m_j as in breadcrumbs, A as in ties",
    source="arXiv 2312.06795 (Model Breadcrumbs) and arXiv 2306.01708 (TIES-Merging)",
    uses_weights=True,
    ranks=_between,
    refusal=_too_much,
)
def breadcrumbs_ties(
    vectors: "Tensor", weights: "Tensor", *, thresholds: "Tensor", density: Density = 0.9,
    gamma: Annotated[float, Between(0, 0.9)] = 0.01, scope: Scope = "tensor", normalize: bool = True,
) -> "Tensor":  # fmt: skip
    """The vectors trimmed as in breadcrumbs, averaged over the sites that agree on the sign as in ties."""
    return agreeing(trimmed(vectors, thresholds), weights, normalize=normalize)


@method(
    "magmax",
    formula="tau_k, k = argmax_j |tau_j|",
    source="arXiv 2407.06322 (MagMax)",
    uses_weights=False,
)
def magmax(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """Of each coordinate the value of largest magnitude; of two that differ in sign alone the positive one."""
    import torch

    most, least = vectors.amax(0), vectors.amin(0)
    return torch.where(most >= -least, most, least)


@method(
    "emr",
    formula="g max_{j: sgn tau_j = g} |tau_j|, g = sgn sum_j tau_j",
    source="arXiv 2405.17461 (EMR-Merging), its unified vector",
    uses_weights=False,
)
def emr(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The elected sign with the largest magnitude that agrees with it; EMR's unified vector, without its masks."""
    import torch

    elected = weighted_sum(vectors, [1.0] * len(vectors)).sign()
    return elected * torch.where(vectors.sign() == elected, vectors.abs(), 0.0).amax(0)


def _too_many_votes(sites: int, votes: int, **_: object) -> str | None:
    return f"asks for {votes} sites that need a value (votes), but there are {sites}" if votes > sites else None


@method(
    "consensus",
    formula="[#{j: |tau_j| > threshold |T - tau_j|} >= votes] T, T = sum_j tau_j",
    source="arXiv 2405.07813 (TALL masks, Consensus TA)",
    uses_weights=False,
    refusal=_too_many_votes,
)
def consensus(
    vectors: "Tensor", weights: "Tensor", *,
    threshold: Annotated[float, Between(0, 10)] = 0.4, votes: Annotated[int, Between(1, 1000)] = 2,
) -> "Tensor":  # fmt: skip
    """The sum where at least `votes` sites need it; of a head row that fewer sites have, where all of those do."""
    total = weighted_sum(vectors, [1.0] * len(vectors))
    needed = vectors.abs() > threshold * (total - vectors.double()).abs()
    return total * (needed.sum(0) >= min(votes, len(vectors)))
