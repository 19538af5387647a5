"""Exact magnitudes at given ranks of long float32 vectors, in linear time and bounded memory, without sorting.

The bits of a float without its sign, read as a number, have the order of the magnitudes. A histogram over the upper
half of the bits finds the bin of a rank; a second one over the lower half, of the values in that bin only, finds the
magnitude itself. So vectors stream by twice, in slices of any size and order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOWER = 16  # bits; the 31 bits of a magnitude fall into halves of 2^15 and 2^16 bins
# Up to here selecting directly is faster than going through so many bins; a slice of a longer vector, too.
SHORT = 2**15


class Ranked:
    """The magnitudes at some ranks of one vector; rank 1 is the largest, a rank beyond the last is the last."""

    def __init__(self, ranks: Sequence[int], length: int) -> None:
        import torch

        self._ranks = [min(max(1, rank), length) for rank in ranks]
        self._upper = torch.zeros(2 ** (31 - LOWER), dtype=torch.int64)
        self._lower = [torch.zeros(2**LOWER, dtype=torch.int64) for _ in ranks]
        self._bins: list[tuple[int, int]] | None = None  # the upper half, and the rank among those that share it
        self._empty = length == 0

    def count(self, values: torch.Tensor) -> None:
        """First pass: count a slice of the vector."""
        self._upper += (_bits(values) >> LOWER).bincount(minlength=len(self._upper))

    def refine(self, values: torch.Tensor) -> None:
        """Second pass: count the same values again."""
        if self._bins is None:
            self._bins = [_find(self._upper, rank) for rank in self._ranks]
        bits = _bits(values)
        upper = bits >> LOWER
        for (place, _), lower in zip(self._bins, self._lower, strict=True):
            lower += (bits[upper == place] & (2**LOWER - 1)).bincount(minlength=len(lower))

    def magnitudes(self) -> list[float]:
        """The magnitude at each rank; zero of an empty vector."""
        import torch

        if self._empty:
            return [0.0] * len(self._ranks)
        found = []
        for (upper, rank), counts in zip(self._bins or (), self._lower, strict=True):
            bits = torch.tensor([(upper << LOWER) + _find(counts, rank)[0]], dtype=torch.int32)
            found.append(float(bits.view(torch.float32)))
        return found


def magnitudes(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """The magnitudes at some ranks of a float32 vector (d,) that is at hand."""
    length = len(values)
    if 0 < length <= SHORT:
        sizes = values.abs()
        return [float(sizes.kthvalue(length + 1 - min(max(1, rank), length)).values) for rank in ranks]
    ranked = Ranked(ranks, length)
    for look in (ranked.count, ranked.refine):
        for part in values.split(SHORT) if length else ():
            look(part)
    return ranked.magnitudes()


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def _find(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds a rank, counted from the last bin, and the rank within the bin."""
    import torch

    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    before = int(at_least[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
