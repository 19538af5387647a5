"""What is measured over whole vectors before the first tensor is combined: norms, inner products, thresholds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from blake3 import blake3

from hf_datavec.checkpoint import Role
from hf_datavec.combine import Sites, inner_products, site_shares, slice_length
from hf_datavec.plan import Contribution, Plan, Step
from hf_datavec.pooled_heads import PooledHead, is_pooled, pooled
from hf_datavec.progress import progress
from hf_datavec.selection import memory, sample, streamed
from hf_datavec.threads import Task, in_order
from hf_datavec.vector import TaskVector, refuse_nonfinite, rows_by_label
from hf_datavec.writing import in_file_order

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[Any]

Key = tuple[str, str]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Survey:
    """Norms of the sites' whole vectors, what clipping leaves of them, and what methods of scope `vector` ask for."""

    norms: tuple[float, ...]
    factors: tuple[float, ...]
    thresholds: Mapping[Key, tuple[tuple[float, ...], ...]]
    shares: Mapping[Key, tuple[float, ...]]
    # The head that follows from the sites' sums of features; no part of the digest, since vectors and plan decide it.
    head: PooledHead | None = None

    @property
    def digest(self) -> str:
        """What tells one survey from another."""
        measured = (self.norms, self.factors, sorted(self.thresholds.items()), sorted(self.shares.items()))
        return blake3(repr(measured).encode()).hexdigest()

    def sites(self, plan: Plan, step: Step) -> Sites:
        """What a method needs to know of the sites for one tensor."""
        return Sites(
            tuple(one.weight for one in plan.contributions),
            tuple(one.digest for one in plan.contributions),
            self.factors,
            self.thresholds.get(_key(step)) if step.surveys else None,
            self.shares.get(_key(step)) if step.surveys else None,
            _beside(plan, step, self.head),
        )

    def notes(self, plan: Plan) -> Iterator[str]:
        """What the survey found that its users should know: who was clipped, and how much of whom a merge takes."""
        names = [one.name for one in plan.contributions]
        for name, norm, factor in zip(names, self.norms, self.factors, strict=False):
            if factor < 1:
                yield f"'{name}' is clipped: its vector of norm {norm:.4g} counts {100 * factor:.1f} %"
        for (method, _), shares in self.shares.items():
            found = sorted(zip(names, shares, strict=True))
            yield f"{method} takes " + ", ".join(f"{name} x {share:.3g}" for name, share in found)
        if self.head is not None:
            yield self.head.note


def _beside(plan: Plan, step: Step, head: PooledHead | None) -> dict[str, tuple[torch.Tensor, ...]]:
    """Second moments that a tensor's method asks for, of a head with a row for each label, and its coefficients."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    if is_pooled(step) and head is not None:
        found["features"] = (head.differences[step.name],) * len(plan.contributions)
    for kind in (kind for kind in step.method.from_sites if kind != "features"):
        values = []
        for one in plan.contributions:
            assert isinstance(one.source, TaskVector)  # the plan has refused others
            value = one.source.beside.read(kind, step.name)
            if value is None:  # no site has any of this tensor
                break
            refuse_nonfinite(value, step.name, one.name)
            by_label = kind == "fisher" and step.role is Role.HEAD
            values.append(rows_by_label(value, one.labels, plan.labels) if by_label else value)
        else:
            found[kind] = tuple(values)
    if step.method.learned and step.name in plan.coefficients:
        import torch

        row = plan.coefficients[step.name]
        found["coefficients"] = tuple(torch.tensor(value, dtype=torch.float64) for value in row)
    return found


def take(plan: Plan) -> Survey:
    """Measure the vectors, as far as the plan needs it; without need none is read.

    Raises: InputError for NaN or infinite values in a vector.
    """
    count, head = len(plan.contributions), pooled(plan)
    if not plan.surveys:
        return Survey((), (1.0,) * count, {}, {}, head)
    steps = {_key(step): step for step in plan.steps if step.surveys}
    site = {key: step for key, step in steps.items() if step.method.kind == "site"}
    ranked = {key: step for key, step in steps.items() if step.method.ranks}
    norms: tuple[float, ...] = ()
    if plan.recipe.merge.clip is not None:
        norms = tuple(_each_vector(plan, "survey, norms", _norm, lambda *_: 16 * slice_length(1)))
    factors = clip_factors(norms, plan.recipe.merge.clip) if norms else (1.0,) * count
    shares = _shares(plan, site, factors) if site else {}
    thresholds: dict[Key, tuple[tuple[float, ...], ...]] = {}
    if ranked:
        found = list(_each_vector(plan, "survey, ranks", partial(_magnitudes, ranked), partial(_memory, ranked)))
        for key in ranked:
            rows = [tuple(value * factor for value in one[key]) for one, factor in zip(found, factors, strict=True)]
            thresholds[key] = tuple(rows)
    return Survey(norms, factors, thresholds, shares, head)


def _each_vector(
    plan: Plan, text: str, measure: Callable[[Plan, Contribution], Result], nbytes: Callable[[Plan, Contribution], int]
) -> Iterator[Result]:
    """A few numbers measured on each site's vector, several at a time; `nbytes` is the memory that takes."""
    tasks = (Task(partial(measure, plan, one), nbytes(plan, one), 0) for one in plan.contributions)
    by_torch = not all(one.source.by_numpy for one in plan.contributions)
    yield from progress(in_order(tasks, by_torch=by_torch), text=text, total=len(plan.contributions), unit="vector")


def _norm(plan: Plan, one: Contribution) -> float:
    import numpy as np

    parts = _slices(plan, one, _names(plan), slice_length(1))
    squares = (float(np.square(part, dtype=np.float64).sum()) for part in parts)
    return sum(squares) ** 0.5  # type: ignore[no-any-return] # a sum of no numbers is 0


def _magnitudes(ranked: Mapping[Key, Step], plan: Plan, one: Contribution) -> dict[Key, list[float]]:
    names, length = _names(plan), _length(plan, one)
    some = sample((_parts(plan, one, name) for name in names), length)
    asked = {key: step.ranks(length) for key, step in ranked.items()}
    found = iter(
        streamed(lambda: _slices(plan, one, names, slice_length(1)), some, list(chain(*asked.values())), length)
    )
    return {key: list(islice(found, len(ranks))) for key, ranks in asked.items()}


def _memory(ranked: Mapping[Key, Step], plan: Plan, one: Contribution) -> int:
    """What finding these magnitudes takes."""
    length = _length(plan, one)
    return memory(length, sum(len(step.ranks(length)) for step in ranked.values()))


def _length(plan: Plan, one: Contribution) -> int:
    """How many values a site's whole vector has."""
    return sum(math.prod(plan.base.shape_with(name, one.labels)) for name in _names(plan))


def _names(plan: Plan) -> list[str]:
    records = (step.record for step in plan.steps if step.role in (Role.WEIGHT, Role.HEAD))
    return [record.name for record in in_file_order(records)]


def _parts(plan: Plan, one: Contribution, name: str) -> tuple[int, Callable[[slice], Array]]:
    """The length of one tensor of a site's vector, and what reads some of its values."""
    length = math.prod(plan.base.shape_with(name, one.labels))
    other_head = plan.base.roles[name] is Role.HEAD and one.labels != plan.base.labels
    if one.source.by_numpy and not other_head:
        return length, one.source.arrays(name)
    if plan.base.roles[name] is Role.HEAD:
        return length, one.source.read(name).reshape(-1).numpy().__getitem__
    parts = one.source.parts(name)
    return length, lambda where: parts(where).numpy()


def _slices(plan: Plan, one: Contribution, names: Sequence[str], size: int) -> Iterator[Array]:
    """A site's vector in slices of a size. Raises: InputError for NaN or infinite values."""
    import numpy as np

    for name in names:
        length, parts = _parts(plan, one, name)
        for start in range(0, length, size):
            part = parts(slice(start, min(start + size, length)))
            with np.errstate(over="ignore", invalid="ignore"):  # told by name
                total = float(part.sum())
            if not math.isfinite(total):
                refuse_nonfinite(one.source.read(name), name, one.name)
            yield part


def clip_factors(norms: Sequence[float], clip: str | float | None) -> tuple[float, ...]:
    """What is left of each vector when none may be longer than `clip`, or than the median of their norms."""
    if clip is None:
        return (1.0,) * len(norms)
    most = statistics.median(norms) if clip == "median" else float(clip)
    return tuple(min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms)


def _key(step: Step) -> Key:
    return step.method.name, repr(sorted(step.method.chosen(step.options).items()))


def _shares(plan: Plan, steps: Mapping[Key, Step], factors: Sequence[float]) -> dict[Key, tuple[float, ...]]:
    """The factor of each site by site methods, from the inner products of whole vectors."""
    import torch

    names, weights = _names(plan), [one.weight for one in plan.contributions]
    products = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    tasks = (Task(partial(_products, plan, name), plan.base.records[name].nbytes * len(weights), 0) for name in names)
    for found in progress(in_order(tasks), text="survey", total=len(names), unit="tensor"):
        products += found
    scaled = torch.tensor(factors, dtype=torch.float64)
    clipped = products * scaled[:, None] * scaled
    return {
        key: site_shares(step.method, step.method.chosen(step.options), clipped, weights) for key, step in steps.items()
    }


def _products(plan: Plan, name: str) -> torch.Tensor:
    """The inner products of a tensor of all sites; of heads the labels that all have are compared."""
    rows = []
    common = tuple(label for label in plan.labels if all(label in one.labels for one in plan.contributions))
    for one in plan.contributions:
        row = one.source.read(name)
        refuse_nonfinite(row, name, one.name)
        rows.append(rows_by_label(row, one.labels, common) if plan.base.roles[name] is Role.HEAD else row)
    return inner_products(rows, [1.0] * len(rows))
