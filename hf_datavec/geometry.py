"""How vectors lie to each other: norms and cosines, gathered while tensors stream by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Geometry:
    """Norms (n,) and cosines (n, n) of n vectors, as plain numbers; heads are not counted."""

    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]


# Below this square of a norm float32 has begun to lose what the products are made of.
SMALLEST = 1e-30


class Gram:
    """The inner products of n vectors, summed over the slices that it is shown."""

    def __init__(self) -> None:
        self._products: torch.Tensor | None = None

    def include(self, products: torch.Tensor) -> None:
        """Count the inner products (n, n) of some slices."""
        self._products = products if self._products is None else self._products + products

    def taken(self) -> list[list[float]] | None:
        """All that was counted since the last call, as plain numbers, exact to the last bit; None for nothing."""
        found, self._products = self._products, None
        return None if found is None else found.tolist()

    def count(self, rows: list[list[float]] | None) -> None:
        """Count what another has counted, as `taken` from it."""
        import torch

        if rows is not None:
            products = torch.tensor(rows, dtype=torch.float64)
            self._products = products if self._products is None else self._products + products

    def geometry(self) -> Geometry:
        """Norms and cosines of all that was counted; a zero vector has cosine 0 to every other."""
        if self._products is None:
            return Geometry((), ())
        norms = self._products.diagonal().clamp(min=0).sqrt()
        cosines = self._products / (norms[:, None] * norms[None, :]).clamp(min=1e-300)
        rows = tuple(tuple(float(value) for value in row) for row in cosines.clamp(-1, 1))
        return Geometry(tuple(float(norm) for norm in norms), rows)


def products(vectors: torch.Tensor) -> torch.Tensor:
    """The inner products (n, n) of vectors (n, d) in float64; infinite or NaN if and only if a value is."""
    products = vectors @ vectors.T
    # A value of 1e25 is no reason for an infinite norm, nor one of 1e-25 for a norm of zero.
    if all(SMALLEST < square < math.inf for square in products.diagonal().tolist()):
        return products.double()
    wide = vectors.double()
    return wide @ wide.T
