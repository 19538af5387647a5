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
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Bits = NDArray[np.int32]
    Counts = NDArray[np.int64]

    # Goes through all values of a vector, in slices of any size; every time in the same way.
    Slices = Callable[[], Iterable[Array]]
    Parts = Callable[[slice], Array]

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


def magnitudes(values: Array, ranks: Sequence[int]) -> list[float]:
    """The magnitudes at some ranks of a float32 vector (d,) that is at hand; rank 1 is the largest."""
    import numpy as np

    length = len(values)
    if 0 < length <= SHORT:
        places = [length - min(max(1, rank), length) for rank in ranks]
        sizes = np.partition(np.abs(values), places)
        return [float(sizes[place]) for place in places]

    def slices() -> Iterator[Array]:
        for start in range(0, length, SHORT):
            yield values[start : start + SHORT]

    return streamed(slices, sample([(length, values.__getitem__)], length), ranks, length)


def streamed(slices: Slices, some: Array, ranks: Sequence[int], length: int) -> list[float]:
    """The magnitudes at some ranks of a vector that is read slice by slice, once if `some` of it guess them well.

    A rank beyond the last is the last; magnitudes of an empty vector are zero.
    """
    if not length:
        return [0.0] * len(ranks)
    wanted = [min(max(1, rank), length) for rank in ranks]
    around = [Around(guess(some, rank, length)) for rank in wanted]
    for values in slices():
        bits = _bits(values)
        for one in around:
            one.count(bits)
    found = [one.find(rank) for one, rank in zip(around, wanted, strict=True)]
    missed = [rank for rank, bits in zip(wanted, found, strict=True) if bits is None]
    exact = iter(_by_halves(slices, missed))
    return [_magnitude(next(exact) if bits is None else bits) for bits in found]


def sample(tensors: Iterable[tuple[int, Parts]], length: int) -> Array:
    """Some values of a vector of a length, evenly from all of its tensors, in clusters.

    Of each tensor are given its length, and what reads some of its values.
    """
    import numpy as np

    each = CLUSTER * max(SPARSE, length // MOST)
    found = []
    for values, parts in tensors:
        for start in range(0, values, each):
            some = -(-min(each, values - start) * CLUSTER // each)
            found.append(parts(slice(start, start + some)))
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def guess(some: Array, rank: int, length: int) -> int:
    """The bits of about the magnitude that has a rank in a vector, from a sample of it."""
    place = len(some) - round((rank - 0.5) / length * len(some))
    place = min(max(1, place), len(some)) - 1
    bits = _bits(some)
    bits.partition(place)
    return int(bits[place])


class Around:
    """How often each bit pattern around a guess occurs, and how many values are larger."""

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
        self._count_waiting()
        if not self._larger < rank <= self._larger + int(self._counts.sum()):
            return None
        place, _ = _find(self._counts, rank - self._larger)
        return self._first + place


def _by_halves(slices: Slices, ranks: Sequence[int]) -> Iterator[int]:
    """The bits at some ranks, from two passes; none without ranks."""
    import numpy as np

    if not ranks:
        return
    upper: Counts = np.zeros(2 ** (31 - LOWER), np.int64)
    for values in slices():
        upper += np.bincount(_bits(values) >> LOWER, minlength=len(upper))
    bins = [_find(upper, rank) for rank in ranks]
    lower: list[Counts] = [np.zeros(2**LOWER, np.int64) for _ in ranks]
    for values in slices():
        bits = _bits(values)
        for (place, _), counts in zip(bins, lower, strict=True):
            counts += np.bincount(bits[bits >> LOWER == place] & (2**LOWER - 1), minlength=len(counts))
    for (place, rank), counts in zip(bins, lower, strict=True):
        yield (place << LOWER) + _find(counts, rank)[0]


def _bits(values: Array) -> Bits:
    import numpy as np

    found: Bits = values.reshape(-1).view(np.int32) & 0x7FFFFFFF
    return found


def _magnitude(bits: int) -> float:
    import numpy as np

    return float(np.int32(bits).view(np.float32))


def _find(counts: Counts, rank: int) -> tuple[int, int]:
    """The bin that holds a rank, counted from the last bin, and the rank within the bin."""
    at_least = counts[::-1].cumsum()
    place = int(at_least.searchsorted(rank))
    before = int(at_least[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
