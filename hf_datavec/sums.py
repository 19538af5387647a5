"""Sums of vectors, or of some order statistics of theirs, by numpy and from mapped files.

torch takes longer to start than they take to be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.combine import Sites, slice_length
from hf_datavec.draws import Draws
from hf_datavec.geometry import products_of_rows
from hf_datavec.methods import Factors, Method, all_methods
from hf_datavec.plan import Plan, Step
from hf_datavec.recipe import Recipe
from hf_datavec.tensors import NUMPY_NAMES, StoredTensors
from hf_datavec.threads import PIECE
from hf_datavec.vector import Combination, Nothing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_datavec.geometry import Products

    Array = NDArray[np.generic]
    # A tensor's name, some of its values, and the inner products (n, n) of the vectors that they were made of.
    Piece = tuple[str, Array, Products | None]
    Parts = Callable[[slice], Array]
    # What is shown a tensor's name and some values (d,) of it from each site, slice by slice.
    Watch = Callable[[str, Sequence[Array]], None]

# Of a whole piece one slice in this many is multiplied out for the norms and cosines that card and plot show, since all
# would cost as much as the sum. Of ten million weights a cosine's error is some 0.0006; `inspect` counts all of them.
COUNTED = 4
# Bases whose values numpy can be given.
KNOWN = (StoredTensors, Nothing)


def expected(recipe: Recipe, base: Checkpoint) -> bool:
    """Whether a recipe asks for nothing but sums, as far as it tells without its vectors; torch then need not start."""
    merge, restore = recipe.merge, recipe.recalibrate
    found = all_methods().get(merge.method)
    restoring = restore is not None and restore.mode != "none" and base.has_statistics
    alike = merge.weights == "equal" and all(entry.weight in (None, 1) for entry in recipe.entries)
    more = restoring or recipe.evaluate or merge.searched
    return found is not None and not more and _adds_up(found, merge.options, alike=alike)


def _adds_up(method: Method, options: Mapping[str, Any], *, alike: bool) -> bool:
    """Whether a method only sums up vectors, `alike` if each has weight 1, or rows; what it ranks must be surveyed."""
    if method.factors is None or (method.ranks is not None and not method.surveys(options)):
        return False
    return method.rows is None or not method.uses_weights or alike


def suffice(plan: Plan, device: object) -> bool:
    """Whether every tensor of a plan is a sum that this module can make, on a CPU.

    Methods must be sums, nothing may be clipped, and numpy must know the types; heads must have the same
    rows everywhere.
    """
    if str(device) != "cpu" or plan.recipe.merge.clip is not None or not isinstance(plan.base.tensors, KNOWN):
        return False
    one_head = all(one.labels == plan.labels == plan.base.labels for one in plan.contributions)
    sites = all(one.source.by_numpy for one in plan.contributions)
    return sites and all(_is_sum(plan, step, one_head) for step in plan.steps)


def _is_sum(plan: Plan, step: Step, one_head: bool) -> bool:
    known = {step.record.dtype, plan.base.records[step.name].dtype} <= set(NUMPY_NAMES)
    if not step.is_merged:
        return known
    alike = all(one.weight == 1 for one in plan.contributions)
    return known and _adds_up(step.method, step.options, alike=alike) and (one_head or step.role is not Role.HEAD)


def ranges(step: Step, size: int) -> Iterator[range]:
    """The pieces of a tensor in its order, of a size where it is not handled as a whole."""
    length = math.prod(step.record.shape)
    if step.is_whole or not step.is_merged:
        size = length
    for start in range(0, max(1, length), max(1, size)):
        yield range(start, min(start + size, length))


def piece(
    plan: Plan, step: Step, sites: Sites, where: range, into: Array | None = None, *, watch: Watch | None = None
) -> Piece | None:
    """Base plus scaled sum in float64, so that the cast to the result's type is the only rounding.

    It is made in its place of the tensor's values (d,) in `into`, if they are given. `watch` sees what is summed while
    it is near the core. None when a value is not finite, for somebody else to tell why.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return _piece(plan, step, sites, where, into, watch=watch)


def _piece(
    plan: Plan, step: Step, sites: Sites, where: range, into: Array | None, *, watch: Watch | None
) -> Piece | None:
    import numpy as np

    assert isinstance(plan.base.tensors, KNOWN)  # else they do not suffice
    base, dtype = plan.base.tensors.array(step.name).reshape(-1), np.dtype(NUMPY_NAMES[step.record.dtype])
    if not step.is_merged:
        kept = base[where.start : where.stop].astype(dtype, copy=False)
        return (step.name, kept, None) if step.role is Role.CONSTANT or np.isfinite(kept).all() else None
    parts = [one.source.arrays(step.name) for one in plan.contributions]
    options = step.method.chosen(step.options)
    if step.method.ranks is not None:
        options["thresholds"] = sites.thresholds
    # What a search has combined was looked at when it was made; heads are looked at, but not counted.
    known = any(isinstance(one.source, Combination) for one in plan.contributions)
    seen = _Seen(len(parts), len(where))
    result = np.empty(len(where), dtype) if into is None else into[where.start : where.stop]
    length = slice_length(len(parts))
    room = np.empty((2, min(length, len(where))))
    for start in range(where.start, where.stop, length):
        here = slice(start, min(start + length, where.stop))
        rows = [part(here) for part in parts]
        if watch is not None:
            watch(step.name, rows)
        if step.method.asks_for("generators"):
            options["generators"] = [
                Draws(plan.recipe.merge.seed, one, _key(plan, step), start) for one in sites.digests
            ]
        total = combine(step.method, rows, sites.weights, options, room[:, : here.stop - start])
        if step.scale != 1:
            total = np.multiply(total, step.scale, out=room[0, : here.stop - start])
        values = result[start - where.start : here.stop - where.start]
        spare = room[1, : here.stop - start]
        values[...] = np.add(total, _wide(base[here], spare), out=spare)
        # A method that leaves values out may leave out the one that is not finite.
        if not (_is_finite(values) and (known or seen.include(rows, all_finite=bool(step.method.rows)))):
            return None
    return step.name, result, None if known or step.role is Role.HEAD else seen.products


class _Seen:
    """The inner products of n vectors over the values of a piece, or an estimate from some of its slices."""

    def __init__(self, vectors: int, length: int) -> None:
        import numpy as np

        self._length, self._slices, self._counted = length, 0, 0
        self._products = np.zeros((vectors, vectors))

    def include(self, rows: Sequence[Array], *, all_finite: bool) -> bool:
        """Count the next slice, if it is one that counts; returns whether what was looked at is finite.

        With `all_finite` every slice is looked at.
        """
        self._slices += 1
        if self._length >= PIECE and (self._slices - 1) % COUNTED:
            return not all_finite or all(map(_is_finite, rows))
        self._products += products_of_rows(rows)
        self._counted += len(rows[0])
        return math.isfinite(self._products.trace())

    @property
    def products(self) -> Products:
        """The products (n, n) of all values."""
        return self._products * (self._length / max(1, self._counted))


def _is_finite(values: Array) -> bool:
    """Whether all values are finite: one product tells, unless the square of one is not."""
    import numpy as np

    short = values.dtype.itemsize < 4  # has no fast product
    return (not short and math.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())


def _key(plan: Plan, step: Step) -> str:
    """What the tensor is called when numbers are drawn: of a head, with the labels of its rows."""
    return step.name + "\0".join(plan.labels) if step.role is Role.HEAD else step.name


def combine(
    method: Method,
    rows: Sequence[Array],
    weights: Sequence[float],
    options: Mapping[str, Any],
    room: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The combination (d,) of the sites' rows (d,) by a method that is a sum, in float64.

    It is the only row itself, where that is all; else `room` (2, d) holds it.
    """
    import numpy as np

    if method.rows is not None:
        rows = method.rows(rows, **options)
        weights = [1.0] * len(rows)
    assert method.factors is not None
    factors = method.factors(weights, **method.chosen(options))
    if len(rows) == 1 and rows[0].dtype == np.float64 and factors.each[0] == factors.divisor == 1:
        return rows[0].astype(np.float64, copy=False)
    total: NDArray[np.float64] = room[0]
    _add(rows, factors, total, room[1])
    return total


def _add(rows: Sequence[Array], factors: Factors, total: NDArray[np.float64], spare: NDArray[np.float64]) -> None:
    """The sum of rows (d,) times their factors, in float64, in the order of the sites, into `total`."""
    import numpy as np

    (first, factor), *rest = zip(rows, factors.each, strict=True)
    np.copyto(total, first)
    if factor != 1:
        np.multiply(total, factor, out=total)
    for row, factor in rest:
        wide = _wide(row, spare)
        np.add(total, wide if factor == 1 else np.multiply(wide, factor, out=spare), out=total)
    if factors.divisor != 1:
        _divide(total, factors.divisor)


def _wide(row: Array, room: NDArray[np.float64]) -> NDArray[np.float64]:
    """A row in float64, in `room` if it is not: a cast of its own, which numpy does faster than one within a sum."""
    import numpy as np

    if row.dtype != np.float64:
        np.copyto(room, row)
        row = room
    return cast("NDArray[np.float64]", row)


def _divide(values: NDArray[np.float64], divisor: float) -> None:
    import numpy as np

    if abs(math.frexp(divisor)[0]) == 0.5:  # a power of two: the product has the same bits, several times faster
        np.multiply(values, 1 / divisor, out=values)
    else:
        np.divide(values, divisor, out=values)
