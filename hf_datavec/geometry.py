"""How vectors lie to each other: norms and cosines, gathered while tensors stream by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    Products = NDArray[np.float64]


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
        self._products: Products | None = None

    def include(self, products: Products) -> None:
        """Count the inner products (n, n) of some slices."""
        self._products = products if self._products is None else self._products + products

    def taken(self) -> list[list[float]] | None:
        """All that was counted since the last call, as plain numbers, exact to the last bit; None for nothing."""
        found, self._products = self._products, None
        return None if found is None else found.tolist()

    def count(self, rows: list[list[float]] | None) -> None:
        """Count what another has counted, as `taken` from it."""
        import numpy as np

        if rows is not None:
            self.include(np.array(rows, dtype=np.float64))

    def geometry(self) -> Geometry:
        """Norms and cosines of all that was counted; a zero vector has cosine 0 to every other."""
        import numpy as np

        if self._products is None:
            return Geometry((), ())
        norms = np.sqrt(np.maximum(self._products.diagonal(), 0))
        cosines = np.clip(self._products / np.maximum(np.outer(norms, norms), 1e-300), -1, 1)
        return Geometry(tuple(norms.tolist()), tuple(map(tuple, cosines.tolist())))


def products(vectors: torch.Tensor) -> torch.Tensor:
    """The inner products (n, n) of vectors (n, d) in float64; infinite or NaN if and only if a value is."""
    products = vectors @ vectors.T
    # A value of 1e25 is no reason for an infinite norm, nor one of 1e-25 for a norm of zero.
    if all(SMALLEST < square < math.inf for square in products.diagonal().tolist()):
        return products.double()
    wide = vectors.double()
    return wide @ wide.T


# Up to so many vectors, product by product is as fast as a product of matrices, and nothing is copied.
FEW = 6


def products_of_rows(rows: Sequence[NDArray[Any]]) -> Products:
    """The same of n numpy rows (d,)."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        if len(rows) > FEW:
            together = np.stack(rows)
            found: Products = (together @ together.T).astype(np.float64)
        else:
            found = np.zeros((len(rows), len(rows)))
            for place, row in enumerate(rows):
                for other in range(place + 1):
                    found[place, other] = found[other, place] = np.dot(row, rows[other])
        if all(SMALLEST < square < math.inf for square in found.diagonal()):
            return found
        wide = np.stack(rows).astype(np.float64)
        found = wide @ wide.T
    return found
