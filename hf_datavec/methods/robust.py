"""Methods that one hostile or broken site cannot take over: median, trimmed_mean, geometric_median, krum, multi_krum.

The last three choose or weigh whole sites by the distances between their vectors.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from hf_datavec.methods import Between, Scope, method
from hf_datavec.methods.linear import averaged, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Hostile = Annotated[int, Between(0, 100)]
# Weiszfeld's steps shrink the distance to the median by a constant factor, save where it is one of the vectors
# itself; this many are far more than weights need to settle to the last digits.
WEISZFELD_STEPS = 1000
# Shares that change by less than this part of themselves have settled. A site nearer to the median than this part of
# the shortest distance between two sites lies on it; its pull would be infinite.
SETTLED = 1e-12
ON_THE_MEDIAN = 1e-9


def ordered(rows: Sequence[Any], wanted: range, library: ModuleType) -> list[Any]:
    """The values of each coordinate of n rows (d,) at some of the n ranks, from the smallest, by exchanges of whole
    rows by `library`, torch or numpy; no coordinate is sorted alone, and what no wanted rank depends on is left out.

    Source: Batcher 1968, odd-even merge sort, as written in Knuth, volume 3, algorithm 5.2.2M.
    """
    found = list(rows)
    for place, other, low, high in _exchanges(len(found), wanted):
        one, two = found[place], found[other]
        if low:
            found[place] = library.minimum(one, two)
        if high:
            found[other] = library.maximum(one, two)
    return found[wanted.start : wanted.stop]


@cache
def _exchanges(count: int, wanted: range) -> tuple[tuple[int, int, bool, bool], ...]:
    """Pairs of rows to exchange, in this order, and whether the smaller and the larger of both matter later."""
    found, live = [], set(wanted)
    for place, other in reversed(_sorting(count)):
        low, high = place in live, other in live
        if low or high:
            found.append((place, other, low, high))
            live |= {place, other}
    return tuple(reversed(found))


def _sorting(count: int) -> list[tuple[int, int]]:
    found = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            found += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return found


def _inner(rows: Sequence[Any], library: ModuleType) -> list[Any]:
    count = len(rows)
    return ordered(rows, range((count - 1) // 2, count // 2 + 1), library)


def _inner_rows(rows: Sequence[Any]) -> list[Any]:
    import numpy as np

    return _inner(rows, np)


@method(
    "median",
    formula="median_j tau_j",
    source="arXiv 1803.01498, definition 1",
    uses_weights=False,
    rows=_inner_rows,
    factors=averaged,
)
def median(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The median of each coordinate; of an even number of sites the middle of the two inner values."""
    import torch

    return _mean_of(_inner(vectors.unbind(0), torch))


def _mean_of(rows: "list[Tensor]") -> "Tensor":
    return weighted_sum(rows, [1.0] * len(rows)) / len(rows)


def _nothing_left(sites: int, f: int) -> str | None:
    return (
        f"leaves out the {f} largest and {f} smallest of {sites} values: at least {2 * f + 1} sites"
        if (sites < 2 * f + 1)
        else None
    )


def _without_extremes(rows: Sequence[Any], library: ModuleType, f: int) -> list[Any]:
    out = min(f, (len(rows) - 1) // 2)
    return ordered(rows, range(out, len(rows) - out), library)


def _rows_without_extremes(rows: Sequence[Any], *, f: int) -> list[Any]:
    import numpy as np

    return _without_extremes(rows, np, f=f)


@method(
    "trimmed_mean",
    formula="mean of tau_j without the f largest and f smallest of each coordinate",
    source="arXiv 1803.01498, definition 2, beta = f/n",
    uses_weights=False,
    refusal=_nothing_left,
    rows=_rows_without_extremes,
    factors=averaged,
)
def trimmed_mean(vectors: "Tensor", weights: "Tensor", *, f: Hostile = 1) -> "Tensor":
    """The mean of each coordinate without its extremes; of a head row that few sites have, fewer are left out."""
    import torch

    return _mean_of(_without_extremes(vectors.unbind(0), torch, f=f))


@method(
    "geometric_median",
    formula="argmin_x sum_j w_j |x - tau_j|",
    source="arXiv 1912.13445 (RFA, Weiszfeld's steps)",
    uses_weights=True,
    kind="site",
)
def geometric_median(products: "Tensor", weights: "Tensor", *, scope: Scope = "vector") -> "Tensor":
    """The point with the smallest weighted sum of distances to the vectors, as an average of them."""
    squares = _squared_distances(products)
    if float(squares.max()) == 0:
        return weights / weights.sum()
    gram = _seen_from_the_middle(products, squares)
    nearest = ON_THE_MEDIAN * float(squares[squares > 0].min().sqrt())
    shares = weights / weights.sum()
    for _ in range(WEISZFELD_STEPS):
        away = gram.diagonal() - 2 * gram @ shares + shares @ gram @ shares
        pulls = weights / away.clamp(min=0).sqrt().clamp(min=nearest)
        moved = pulls / pulls.sum()
        # Relative, since the smallest share belongs to the vector that is largest and farthest away.
        settled = bool(((moved - shares).abs() <= SETTLED * shares).all())
        shares = moved
        if settled:
            break
    return shares


def _squared_distances(products: "Tensor") -> "Tensor":
    squares = products.diagonal()
    found = (squares[:, None] + squares - 2 * products).clamp(min=0)
    found.fill_diagonal_(0)
    return found


def _seen_from_the_middle(products: "Tensor", squares: "Tensor") -> "Tensor":
    """Inner products of the vectors minus the one among them that is nearest to the others.

    The median depends on differences only. Seen from zero those of vectors far from it drown in rounding; seen from the
    mean they do so as well when one vector is huge.
    """
    middle = int(squares.sqrt().sum(1).argmin())
    column = products[:, middle]
    return products - column[:, None] - column + products[middle, middle]


def _scores(products: "Tensor", f: int) -> "Tensor":
    """Of each site the sum of squared distances to its n - f - 2 nearest."""
    distances = _squared_distances(products)
    distances.fill_diagonal_(float("inf"))
    nearest = max(1, len(products) - f - 2)
    return distances.sort(1).values[:, :nearest].sum(1)


def _too_few(sites: int, f: int, **_: object) -> str | None:
    least = 2 * f + 3
    return f"stands f = {f} hostile sites from {least} sites on, and there are {sites}" if sites < least else None


@method(
    "krum",
    formula="tau_k, k = argmin_i sum of |tau_i - tau_j|^2 over the n-f-2 nearest j",
    source="arXiv 1703.02757 (Krum)",
    uses_weights=False,
    kind="site",
    refusal=_too_few,
)
def krum(products: "Tensor", weights: "Tensor", *, f: Hostile = 1, scope: Scope = "vector") -> "Tensor":
    """The one vector that lies nearest to its neighbours; it stands up to `f` hostile sites."""
    return multi_krum(products, weights, f=f, keep=1)  # type: ignore[no-any-return]


@method(
    "multi_krum",
    formula="mean of the `keep` tau_j of lowest krum score; 0: n - f of them",
    source="arXiv 1703.02757 (multi-Krum)",
    uses_weights=False,
    kind="site",
    refusal=_too_few,
)
def multi_krum(
    products: "Tensor", weights: "Tensor", *,
    f: Hostile = 1, keep: Annotated[int, Between(0, 1000)] = 0, scope: Scope = "vector",
) -> "Tensor":  # fmt: skip
    """The mean of the vectors that lie nearest to their neighbours."""
    import torch

    count = len(products)
    # Stable: of equal scores the first site in the order of contents, whatever the recipe's order.
    best = _scores(products, f).argsort(stable=True)[: min(keep or count - f, count)]
    shares = torch.zeros(count, dtype=torch.float64)
    shares[best] = 1 / len(best)
    return shares
