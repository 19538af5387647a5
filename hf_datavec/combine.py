"""A method made ready for the vectors of one tensor: what it measures first, and then slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_datavec.draws import Draws
from hf_datavec.methods import LIKE_VECTORS, Method
from hf_datavec.methods.linear import weighted_sum
from hf_datavec.selection import magnitudes

if TYPE_CHECKING:
    from torch import Tensor

# Coordinates that are summed up at a time: torch's own grain, below which an operation runs on one thread, so that a
# sum has one order on every machine.
SLICE = 2**15
# Values of all sites together that are combined at a time on a CPU: what stays near a core, and enough for an operation
# to take longer than two threads need to hand the interpreter to each other.
TOGETHER = 2**19


@dataclass(frozen=True, slots=True)
class Sites:
    """What belongs to the sites whose vectors are combined, one entry per site."""

    weights: tuple[float, ...]
    digests: tuple[str, ...]
    # What clipping leaves of each site's vector.
    factors: tuple[float, ...]
    # Measured over whole vectors, when the method's scope says so; else measured on the tensor at hand.
    thresholds: tuple[tuple[float, ...], ...] | None = None
    shares: tuple[float, ...] | None = None
    # For the tensor at hand, what sites pushed beside their vectors and the coefficients that were learned, by kind;
    # nothing where there is none.
    beside: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def chosen(self, places: Sequence[int]) -> Sites:
        """Some of the sites. Shares are renormalised; sites of which none has a share count alike."""
        shares = None
        if self.shares is not None:
            total = sum(self.shares[place] for place in places)
            kept = total / sum(self.shares) if sum(self.shares) else 0.0
            shares = tuple(
                self.shares[place] / kept if kept > 0 else sum(self.shares) / len(places) for place in places
            )
        return Sites(
            tuple(self.weights[place] for place in places),
            tuple(self.digests[place] for place in places),
            tuple(self.factors[place] for place in places),
            self.thresholds and tuple(self.thresholds[place] for place in places),
            shares,
            {kind: tuple(found[place] for place in places) for kind, found in self.beside.items()},
        )

    def at_rows(self, places: Sequence[int]) -> Sites:
        """The same sites for some rows of a head."""
        rows = {
            kind: tuple(value[list(places)] for value in found) if kind in LIKE_VECTORS else found
            for kind, found in self.beside.items()
        }
        return replace(self, beside=rows)


def slice_length(sites: int) -> int:
    """How many coordinates of a number of sites are combined at a time on a CPU."""
    return max(SLICE // 4, min(4 * SLICE, TOGETHER // sites))


def needs_whole(method: Method) -> bool:
    """Whether the method must see all values of a tensor at once."""
    return method.kind in ("tensor", "matrix")


def ready(
    method: Method, options: Mapping[str, Any], rows: Sequence[Tensor], sites: Sites, *, key: str, seed: int = 0
) -> Callable[[Tensor, int], Tensor]:
    """A function from a slice (n, d) of the sites' vectors of one tensor, and where it starts, to its combination (d,).

    `rows` are all the vectors of the tensor, each in its own shape, on the CPU: site methods and thresholds are
    measured on them. Where all is measured, and for coordinate methods that measure nothing, none are needed.
    `key` names the tensor to the generators. Slices are float32, or float64 when clipped; the combination is float64.
    """
    import torch

    chosen = method.chosen(options)
    if method.kind == "site":
        shares = sites.shares or site_shares(method, chosen, inner_products(rows, sites.factors), sites.weights)
        return lambda vectors, _: weighted_sum(vectors, shares)
    if method.ranks is not None:
        chosen["thresholds"] = torch.tensor(
            sites.thresholds or thresholds(method, chosen, rows, sites.factors), dtype=torch.float64
        )
    # What has one value per weight is flattened as the vectors are.
    beside = {
        kind: torch.stack([value.reshape(-1) if kind in LIKE_VECTORS else value for value in sites.beside[kind]])
        for kind in sites.beside
        if method.asks_for(kind)
    }
    shape = rows[0].shape if rows else ()
    weights = torch.tensor(sites.weights, dtype=torch.float64)

    def combined(vectors: Tensor, start: int) -> Tensor:
        extra = {**chosen, **{kind: value.to(vectors.device) for kind, value in beside.items()}}
        if "thresholds" in extra:
            extra["thresholds"] = chosen["thresholds"].to(vectors.device)
        if method.asks_for("generators"):
            extra["generators"] = [Draws(seed, digest, key, start) for digest in sites.digests]
        if method.kind == "matrix":
            vectors = vectors.reshape(len(vectors), shape[0] if len(shape) > 1 else 1, -1)
        with _one_thread() if needs_whole(method) and vectors.device.type == "cpu" else nullcontext():
            result: Tensor = method.function(vectors, weights.to(vectors.device), **extra)
        return result.double().reshape(-1)

    return combined


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over whole tensors and decompositions round by how threads share them, so there is one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def site_shares(
    method: Method, options: Mapping[str, Any], products: Tensor, weights: Sequence[float]
) -> tuple[float, ...]:
    """The factor of each site by a site method; a lone vector is left as it is."""
    import torch

    if len(weights) == 1:
        return (1.0,)
    found = method.function(products, torch.tensor(weights, dtype=torch.float64), **options)
    return tuple(found.tolist())


def inner_products(rows: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The inner products (n, n) of vectors times their factors, in float64; rows have one shape."""
    import torch

    flat = [row.reshape(-1) for row in rows]
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, len(flat[0]), SLICE):
        wide = [row[start : start + SLICE].double() * factor for row, factor in zip(flat, factors, strict=True)]
        # Not by a matrix product, whose order of summation depends on the number of threads.
        for place, one in enumerate(wide):
            for other in range(place, len(wide)):
                total[place, other] += (one * wide[other]).sum()
    return total + total.triu(1).T


def thresholds(
    method: Method, options: Mapping[str, Any], rows: Sequence[Tensor], factors: Sequence[float]
) -> list[list[float]]:
    """The magnitudes of each vector at the ranks that the method asks for, times the vector's factor."""
    assert method.ranks is not None
    found = []
    for row, factor in zip(rows, factors, strict=True):
        ranks = method.ranks(row.numel(), **{name: options[name] for name in method.options})
        found.append([magnitude * factor for magnitude in magnitudes(row.reshape(-1).numpy(), ranks)])
    return found
