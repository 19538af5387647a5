"""Exact magnitudes at given ranks of long float32 vectors, in linear time and bounded memory, without sorting.

The bits of a float without its sign, read as a number, have the order of the magnitudes. A sample of the vector tells
between which two magnitudes a rank lies; one pass over the vector keeps the values between them, or counts their bit
patterns where they are many, and counts how many values lie above. When the sample was wrong, which those numbers tell,
two more passes find the rank by histograms over the upper and then the lower half of the bits.
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
# Up to here selecting directly is faster than looking at a sample first.
SHORT = 2**15
# The largest slices that a caller reads a vector in, and the bytes of a value.
SLICE, ITEM = 2**17, 4
# A rank lies so many standard errors of the sample's ranks around the sample's, twice what chance allows, since
# neighbours are alike.
ERRORS = 8
# Values between two magnitudes that are kept; when there are more, they are counted.
TOGETHER = 2**18
# Bit patterns that can be counted: magnitudes up to 1.6 % smaller or larger, for the fewest digits of a mantissa.
AROUND = 2**18
LARGEST = 2**31 - 1
# Of a vector one value in this many is looked at first, and no more than so many.
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
        for start in range(0, length, SLICE):
            yield values[start : start + SLICE]

    return streamed(slices, sample([(length, values.__getitem__)], length), ranks, length)


def streamed(slices: Slices, some: Array, ranks: Sequence[int], length: int) -> list[float]:
    """The magnitudes at some ranks of a vector that is read slice by slice, once if `some` of it tell where they lie.

    A rank beyond the last is the last; magnitudes of an empty vector are zero.
    """
    if not length:
        return [0.0] * len(ranks)
    wanted = [min(max(1, rank), length) for rank in ranks]
    around = brackets(some, wanted, length)
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


def brackets(some: Array, ranks: Sequence[int], length: int) -> list[Bracket]:
    """Two magnitudes for each rank in a vector of a length, between which it lies, as `some` of its values tell."""
    bits, count = _bits(some), len(some)
    places, margins = [], []
    for rank in ranks:
        above = min(1.0, (rank - 0.5) / length)
        places.append(min(max(1, count - round(above * count)), count) - 1)
        margins.append(ERRORS * (1 + round((count * above * (1 - above)) ** 0.5)))
    lowest = [place - margin for place, margin in zip(places, margins, strict=True)]
    highest = [place + margin for place, margin in zip(places, margins, strict=True)]
    bits.partition(sorted({place for place in (*lowest, *places, *highest) if 0 <= place < count}))
    found = []
    for low, place, high in zip(lowest, places, highest, strict=True):
        first = int(bits[low]) if low >= 0 else 0
        last = int(bits[high]) if high < count else LARGEST
        if last - first >= AROUND and (high - low) * length > TOGETHER * count:
            first = max(0, int(bits[place]) - AROUND // 2)
            last = min(first + AROUND - 1, LARGEST)
        found.append(Bracket(first, last))
    return found


def memory(length: int, ranks: int) -> int:
    """A bound on the bytes that finding the magnitudes at so many ranks of a vector takes beside the vector."""
    if length <= SHORT:
        return 2 * ITEM * length
    some = ITEM * (length // max(SPARSE, length // MOST) + CLUSTER)
    kept = min(length, TOGETHER + SLICE)
    # Of each rank its counts and the values that are kept; of one of them these put together, their places among the
    # patterns as numbers of 8 bytes, counts of these and sums of counts; and a slice.
    counting = ranks * (8 * AROUND + ITEM * kept) + 16 * kept + 2 * 8 * AROUND + 24 * min(length, SLICE)
    return some + max(some, counting)


class Bracket:
    """The values of a vector between two magnitudes, and how many are larger; magnitudes are given as bits."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._larger = 0
        self._kept: list[Bits] = []
        self._held = 0
        self._counts: Counts | None = None
        self._too_many = False

    def count(self, bits: Bits) -> None:
        """See some more values of the vector."""
        import numpy as np

        if self._too_many:
            return
        larger = bits > self._last
        self._larger += int(np.count_nonzero(larger))
        between = bits >= self._first
        between ^= larger
        self._kept.append(bits[np.flatnonzero(between)])
        self._held += len(self._kept[-1])
        if self._held >= TOGETHER:
            self._count_kept()

    def _count_kept(self) -> None:
        import numpy as np

        self._too_many = self._last - self._first >= AROUND
        if self._held and not self._too_many:
            counts = np.bincount(np.concatenate(self._kept) - self._first, minlength=AROUND)
            self._counts = counts if self._counts is None else np.add(self._counts, counts, out=self._counts)
        self._kept, self._held = [], 0

    def find(self, rank: int) -> int | None:
        """The bits at a rank, or None when they are not between, or there were too many to keep."""
        import numpy as np

        if self._counts is not None:
            self._count_kept()
        between = self._held if self._counts is None else int(self._counts.sum())
        if self._too_many or not self._larger < rank <= self._larger + between:
            return None
        if self._counts is not None:
            return self._first + _find(self._counts, rank - self._larger)[0]
        kept, place = np.concatenate(self._kept), between - (rank - self._larger)
        kept.partition(place)
        return int(kept[place])


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
