"""Exact magnitudes at given ranks of long float32 vectors, in linear time and bounded memory, without sorting.

The bits of a float without its sign, read as a number, have the order of the magnitudes. A sample of the vector guesses
where a rank lies; one pass over the vector counts every bit pattern around there, and how many values lie above. When
the guess was wrong, which those counts tell, two more passes find the rank by histograms over the upper and then the
lower half of the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Bits = NDArray[np.int32]
    Counts = NDArray[np.int64]

    # Goes through all values of a vector, in slices of any size; every time in the same way.
    Slices = Callable[[], Iterable[torch.Tensor]]
    Parts = Callable[[slice], torch.Tensor]

LOWER = 16  # bits; the 31 bits of a magnitude fall into halves of 2^15 and 2^16 bins
# Up to here selecting directly is faster than going through so many bins; a slice of a longer vector, too.
SHORT = 2**15
# Bit patterns counted around a guess: magnitudes up to 1.6 % smaller or larger, for the fewest digits of a mantissa.
AROUND = 2**18
# Values around a guess that are counted in one go, since each time costs a walk over all bins.
TOGETHER = 2**20
# Of a vector one value in this many is looked at for the guess, and no more than so many.
SPARSE, MOST = 64, 2**22
# Neighbours that are looked at together, since reading one value reads the memory page that it lies on.
CLUSTER = 1024


def magnitudes(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """The magnitudes at some ranks of a float32 vector (d,) that is at hand; rank 1 is the largest."""
    length = len(values)
    if 0 < length <= SHORT:
        sizes = values.abs()
        return [float(sizes.kthvalue(length + 1 - min(max(1, rank), length)).values) for rank in ranks]
    return streamed(
        lambda: values.split(SHORT) if length else (), sample([(length, values.__getitem__)], length), ranks, length
    )


def streamed(slices: Slices, some: torch.Tensor, ranks: Sequence[int], length: int) -> list[float]:
    """The magnitudes at some ranks of a vector that is read slice by slice, once if `some` of it guess them well.

    A rank beyond the last is the last; magnitudes of an empty vector are zero.
    """
    if not length:
        return [0.0] * len(ranks)
    wanted = [min(max(1, rank), length) for rank in ranks]
    around = [Around(guess(some, rank, length)) for rank in wanted]
    for values in slices():
        bits = _bits(values).numpy()
        for one in around:
            one.count(bits)
    found = [one.find(rank) for one, rank in zip(around, wanted, strict=True)]
    missed = [rank for rank, bits in zip(wanted, found, strict=True) if bits is None]
    exact = iter(_by_halves(slices, missed))
    return [_magnitude(next(exact) if bits is None else bits) for bits in found]


def sample(tensors: Iterable[tuple[int, Parts]], length: int) -> torch.Tensor:
    """Some values of a vector of a length, evenly from all of its tensors, in clusters.

    Of each tensor are given its length, and what reads some of its values.
    """
    import torch

    each = CLUSTER * max(SPARSE, length // MOST)
    found = []
    for values, parts in tensors:
        for start in range(0, values, each):
            some = -(-min(each, values - start) * CLUSTER // each)
            found.append(parts(slice(start, start + some)))
    return torch.cat(found) if found else torch.zeros(0)


def guess(some: torch.Tensor, rank: int, length: int) -> int:
    """The bits of about the magnitude that has a rank in a vector, from a sample of it."""
    place = len(some) - round((rank - 0.5) / length * len(some))
    place = min(max(1, place), len(some)) - 1
    bits = _bits(some).numpy()
    bits.partition(place)  # in place; torch's own selection keeps an index of 8 bytes beside each value
    return int(bits[place])


class Around:
    """How often each bit pattern around a guess occurs, and how many values are larger."""

    # By numpy, whose comparisons and searches among truth values are several times faster than torch's.

    def __init__(self, bits: int) -> None:
        import numpy as np

        self._first = max(0, bits - AROUND // 2)
        self._larger = 0
        self._counts: Counts = np.zeros(AROUND, np.int64)
        self._waiting: list[Bits] = []
        self._held = 0

    def count(self, bits: Bits) -> None:
        import numpy as np

        larger = bits >= self._first + AROUND
        self._larger += int(np.count_nonzero(larger))
        around = bits >= self._first
        around ^= larger
        self._waiting.append(bits[np.flatnonzero(around)])
        self._held += len(self._waiting[-1])
        if self._held >= TOGETHER:
            self._count_waiting()

    def _count_waiting(self) -> None:
        import numpy as np

        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting) - self._first, minlength=AROUND)
            self._waiting, self._held = [], 0

    def find(self, rank: int) -> int | None:
        """The bits at a rank, or None when they are not around."""
        import torch

        self._count_waiting()
        if not self._larger < rank <= self._larger + int(self._counts.sum()):
            return None
        place, _ = _find(torch.from_numpy(self._counts), rank - self._larger)
        return self._first + place


def _by_halves(slices: Slices, ranks: Sequence[int]) -> Iterator[int]:
    """The bits at some ranks, from two passes; none without ranks."""
    import torch

    if not ranks:
        return
    upper = torch.zeros(2 ** (31 - LOWER), dtype=torch.int64)
    for values in slices():
        upper += (_bits(values) >> LOWER).bincount(minlength=len(upper))
    bins = [_find(upper, rank) for rank in ranks]
    lower = [torch.zeros(2**LOWER, dtype=torch.int64) for _ in ranks]
    for values in slices():
        bits = _bits(values)
        for (place, _), counts in zip(bins, lower, strict=True):
            counts += (bits[bits >> LOWER == place] & (2**LOWER - 1)).bincount(minlength=len(counts))
    for (place, rank), counts in zip(bins, lower, strict=True):
        yield (place << LOWER) + _find(counts, rank)[0]


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def _magnitude(bits: int) -> float:
    import torch

    return float(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


def _find(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds a rank, counted from the last bin, and the rank within the bin."""
    import torch

    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, rank))
    before = int(at_least[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
