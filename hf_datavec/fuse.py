"""The merge itself: a plan becomes a stream of fused tensors; the caller chooses where it goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hf_datavec import copies, sums
from hf_datavec import survey as surveys
from hf_datavec.checkpoint import Role
from hf_datavec.combine import Sites, needs_whole, ready, slice_length
from hf_datavec.errors import InputError
from hf_datavec.geometry import Gram, products
from hf_datavec.plan import Plan, Step
from hf_datavec.survey import Survey
from hf_datavec.tensors import TORCH_NAMES
from hf_datavec.threads import PIECE, Task, in_order
from hf_datavec.vector import Combination, refuse_nonfinite, rows_by_label
from hf_datavec.writing import in_file_order

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hf_datavec.geometry import Products
    from hf_datavec.writing import Values

    Array = NDArray[np.generic]

    # A tensor's name, some of its values, and the inner products (n, n) of the vectors that they were made of.
    Piece = tuple[str, Values, Products | None]
    Combine = Callable[[torch.Tensor, int], torch.Tensor]


def run(
    plan: Plan,
    *,
    only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    gram: Gram | None = None,
    survey: Survey | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, fused tensor) for the base's tensors, or those in `only`, in the order of a safetensors file.

    `gram` sees the sites' vectors of each tensor, except for heads, whose rows may differ from site to site.
    `survey` is what `survey.take` found; without it the vectors are measured here.

    Raises: InputError for NaN or infinite values in a vector, and for a result that overflows its type.
    """
    import numpy as np
    import torch

    shapes = {step.name: step.record.shape for step in plan.steps}
    found = pieces(plan, only=only, device=device, gram=gram, survey=survey)
    for name, parts in itertools.groupby(found, key=lambda piece: piece[0]):
        flat = [
            torch.from_numpy(np.require(part, requirements="W")) if isinstance(part, np.ndarray) else part
            for _, part in parts
        ]
        yield name, (flat[0] if len(flat) == 1 else torch.cat(flat)).reshape(shapes[name])


def pieces(
    plan: Plan,
    *,
    only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    gram: Gram | None = None,
    survey: Survey | None = None,
    into: Mapping[str, Array] | None = None,
) -> Iterator[tuple[str, Values]]:
    """The same as `run`, but flat, and of a large tensor several pieces in a row: none is in memory as a whole.

    Threads make pieces ahead, so that the next are computed while one is written. What is nothing but a sum is made
    by numpy, without torch. A tensor that `into` has room for, flat and in its type, may be made there; its pieces are
    then that room itself.
    """
    survey, ordered = survey or surveys.take(plan), _ordered(plan, only)
    by_torch = not sums.suffice(plan, device)
    make, rooms = _tasks if by_torch else _sums, into or {}
    tasks = (task for step in ordered for task in make(plan, step, survey, device, rooms.get(step.name)))
    threads = copies.THREADS if copies.is_gpu(device) else None if str(device) == "cpu" else 1
    for name, piece, seen in in_order(tasks, threads=threads, by_torch=by_torch):
        if gram is not None and seen is not None:
            gram.include(seen)
        yield name, piece


def sums_in_a_row(
    plan: Plan, only: Collection[str], survey: Survey, gram: Gram, watch: sums.Watch
) -> Iterator[tuple[str, Values]]:
    """The same pieces of a plan that is nothing but sums, each made when it is asked for; `watch` sees what is
    summed."""
    for step in _ordered(plan, only):
        for task in _sums(plan, step, survey, "cpu", watch=watch):
            name, piece, seen = task.compute()
            if seen is not None:
                gram.include(seen)
            yield name, piece


def _ordered(plan: Plan, only: Collection[str] | None) -> list[Step]:
    """The steps for some names, in the order of a file."""
    steps = {step.name: step for step in plan.steps if only is None or step.name in only}
    return [steps[record.name] for record in in_file_order(step.record for step in steps.values())]


def _tasks(
    plan: Plan, step: Step, survey: Survey, device: torch.device | str, into: Array | None
) -> Iterator[Task[Piece]]:
    """What has to be computed for one tensor, piece by piece."""
    length = math.prod(step.record.shape)
    if not step.is_merged:
        yield Task(partial(_kept, plan, step), step.record.nbytes)
        return
    sites = survey.sites(plan, step)
    if step.role is Role.HEAD:
        yield Task(partial(_fused_head, plan, step, sites, device), plan.bound(step), step.result_bytes)
        return
    if step.is_whole:
        yield Task(partial(_measured, plan, step, sites, device, into), plan.bound(step), step.result_bytes)
        return
    combine = ready(step.method, step.options, (), sites, key=step.name, seed=plan.recipe.merge.seed)
    combining = _Combining(plan, step, sites, device, combine, into)
    bound = plan.bound(step)
    for start in range(0, max(1, length), PIECE):
        where = range(start, min(start + PIECE, length))
        yield Task(partial(combining.piece, where), bound, step.result_bytes)


def _sums(
    plan: Plan,
    step: Step,
    survey: Survey,
    device: torch.device | str,
    into: Array | None = None,
    *,
    watch: sums.Watch | None = None,
) -> Iterator[Task[Piece]]:
    """The same for a tensor that is a sum, in the same pieces."""
    sites = survey.sites(plan, step)
    for number, where in enumerate(sums.ranges(step, PIECE)):

        def compute(number: int = number, where: range = where) -> Piece:
            found = sums.piece(plan, step, sites, where, into, watch=watch)
            # What is not finite is told by those who make all other methods.
            return found or next(itertools.islice(_tasks(plan, step, survey, device, into), number, None)).compute()

        yield Task(compute, plan.bound(step), step.result_bytes)


def _kept(plan: Plan, step: Step) -> Piece:
    import torch

    tensor = plan.base.tensors.read(step.name)
    if step.role is not Role.CONSTANT:
        stored, tensor = tensor, tensor.to(getattr(torch, TORCH_NAMES[step.record.dtype]))
        if not math.isfinite(float(tensor.sum())):
            refuse_nonfinite(stored, step.name, str(plan.base.folder))
        _refuse_overflow(step, tensor, lambda: float(stored.abs().max()))
    return step.name, tensor.reshape(-1), None


def _measured(plan: Plan, step: Step, sites: Sites, device: torch.device | str, into: Array | None) -> Piece:
    """A tensor whose method looks at all of it, at once or before it combines slices."""
    rows = [one.source.read(step.name) for one in plan.contributions]
    for one, row in zip(plan.contributions, rows, strict=True):
        refuse_nonfinite(row, step.name, one.name)
    combine = ready(step.method, step.options, rows, sites, key=step.name, seed=plan.recipe.merge.seed)
    return _Combining(plan, step, sites, device, combine, into).piece(range(math.prod(step.record.shape)))


@dataclass(frozen=True, slots=True)
class _Combining:
    """One tensor with everything that its pieces have in common."""

    plan: Plan
    step: Step
    sites: Sites
    device: torch.device | str
    combine: Combine
    into: Array | None

    def piece(self, where: range) -> Piece:
        """Base plus scaled combination in float64, so that the cast to the result's type is the only rounding."""
        with copies.beside_others(self.device):
            return self._piece(where)

    def _piece(self, where: range) -> Piece:
        import torch

        step, count = self.step, len(self.plan.contributions)
        if self.into is None:
            result = torch.empty(len(where), dtype=getattr(torch, TORCH_NAMES[step.record.dtype]), device=self.device)
        else:
            result = torch.from_numpy(self.into[where.start : where.stop])
        seen = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        # A search's combination was found finite when it was made, and a trial should cost little.
        measured = not any(isinstance(one.source, Combination) for one in self.plan.contributions)
        done = 0
        for vectors, base, combined in self._slices(where):
            here = result[done : done + base.shape[0]]
            # A copy even of a float64 base, which is the file itself.
            here.copy_(base.to(torch.float64, copy=True).add_(combined, alpha=self.step.scale))
            done += base.shape[0]
            if measured:
                for some in vectors.split(slice_length(count), dim=1):
                    seen += products(some)
        if not math.isfinite(float(seen.trace())):
            for one in self.plan.contributions:
                refuse_nonfinite(one.source.read(step.name), step.name, one.name)
        _refuse_overflow(step, result, lambda: self._largest(where))
        return step.name, copies.returned(result), seen.cpu().numpy()

    def _largest(self, where: range) -> float:
        """The largest magnitude of the fused values before they are cast."""
        found = [base.double() + self.step.scale * combined for _, base, combined in self._slices(where)]
        largest = [float(fused.abs().max()) for fused in found]
        return next(filter(math.isnan, largest), max(largest))

    def _slices(self, where: range) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Slice by slice the sites' vectors (n, d), the base's values (d,) and the combination (d,) in float64.

        The next slice's vectors take the place of this one's.
        """
        base = self.plan.base.tensors.read(self.step.name).reshape(-1)
        parts = [one.source.parts(self.step.name) for one in self.plan.contributions]
        whole = needs_whole(self.step.method) or str(self.device) != "cpu"
        length = max(1, len(where)) if whole else slice_length(len(parts))
        room: torch.Tensor | None = None
        for start in range(where.start, where.stop, length):
            here = slice(start, min(start + length, where.stop))
            rows = [part(here) for part in parts]
            vectors = room = copies.stacked(rows, self.device, room)
            yield (
                vectors,
                copies.stacked([base[here]], self.device)[0],
                self.combine(_clipped(vectors, self.sites), start),
            )


def _clipped(vectors: torch.Tensor, sites: Sites) -> torch.Tensor:
    import torch

    if all(factor == 1 for factor in sites.factors):
        return vectors
    return vectors.double() * torch.tensor(sites.factors, dtype=torch.float64, device=vectors.device)[:, None]


def _fused_head(plan: Plan, step: Step, sites: Sites, device: torch.device | str) -> Piece:
    import torch

    rows = [one.source.read(step.name) for one in plan.contributions]
    for one, row in zip(plan.contributions, rows, strict=True):
        refuse_nonfinite(row, step.name, one.name)
    base = rows_by_label(plan.base.tensors.read(step.name), plan.base.labels, plan.labels).to(device)
    wide = base.double() + step.scale * _combined_head(plan, step, rows, sites, device)
    result = wide.to(getattr(torch, TORCH_NAMES[step.record.dtype]))
    _refuse_overflow(step, result, lambda: float(wide.abs().max()))
    return step.name, result.cpu().reshape(-1), None


def _combined_head(
    plan: Plan, step: Step, rows: list[torch.Tensor], sites: Sites, device: torch.device | str
) -> torch.Tensor:
    """The head's combination, row by row over the sites that have the row's label."""
    import torch

    result = torch.zeros(step.record.shape, dtype=torch.float64, device=device)
    groups: dict[tuple[int, ...], list[str]] = {}
    for label in plan.labels:
        having = tuple(index for index, one in enumerate(plan.contributions) if label in one.labels)
        groups.setdefault(having, []).append(label)
    for having, labels in groups.items():
        places = [plan.labels.index(label) for label in labels]
        some = sites.chosen(having).at_rows(places)
        parts = [rows_by_label(rows[index], plan.contributions[index].labels, tuple(labels)) for index in having]
        key, seed = step.name + "\0".join(labels), plan.recipe.merge.seed
        combine = ready(step.method, step.options, parts, some, key=key, seed=seed)
        vectors = _clipped(torch.stack([part.reshape(-1) for part in parts]).to(device), some)
        result[places] = combine(vectors, 0).reshape(parts[0].shape)
    return result


def _refuse_overflow(step: Step, result: torch.Tensor, largest: Callable[[], float]) -> None:
    """Raise InputError when a fused tensor is not finite; `largest` tells its largest value before the cast."""
    import torch

    # One sum tells whether any value is NaN or infinite; only then it is worth looking closer.
    if math.isfinite(float(result.sum())) or bool(torch.isfinite(result).all()):
        return
    if math.isnan(value := largest()):
        raise InputError(f"the method '{step.method.name}' gave NaN for the tensor '{step.name}'")
    raise InputError(
        f"the fused tensor '{step.name}' does not fit {step.record.dtype} (largest value {value:.3g})",
        hint="use a smaller scale, or dtype: float32",
    )
