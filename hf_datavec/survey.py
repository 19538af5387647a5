"""What is measured over whole vectors before the first tensor is combined: norms, inner products, thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.checkpoint import Role
from hf_datavec.combine import SLICE, Sites, inner_products, site_shares
from hf_datavec.plan import Plan, Step
from hf_datavec.progress import progress
from hf_datavec.selection import Ranked
from hf_datavec.tensors import in_file_order
from hf_datavec.vector import TaskVector, refuse_nonfinite, rows_by_label

if TYPE_CHECKING:
    import torch

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Survey:
    """Norms of the sites' whole vectors, what clipping leaves of them, and what methods of scope `vector` ask for."""

    norms: tuple[float, ...]
    factors: tuple[float, ...]
    thresholds: Mapping[Key, tuple[tuple[float, ...], ...]]
    shares: Mapping[Key, tuple[float, ...]]

    def sites(self, plan: Plan, step: Step) -> Sites:
        """What a method needs to know of the sites for one tensor."""
        return Sites(
            tuple(one.weight for one in plan.contributions),
            tuple(one.digest for one in plan.contributions),
            self.factors,
            self.thresholds.get(_key(step)) if step.surveys else None,
            self.shares.get(_key(step)) if step.surveys else None,
            _beside(plan, step),
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


def _beside(plan: Plan, step: Step) -> dict[str, tuple[torch.Tensor, ...]]:
    """Second moments that a tensor's method asks for, of a head with a row for each label, and its coefficients."""
    import torch

    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for kind in step.method.from_sites:
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
        row = plan.coefficients[step.name]
        found["coefficients"] = tuple(torch.tensor(value, dtype=torch.float64) for value in row)
    return found


def take(plan: Plan) -> Survey:
    """Measure the vectors, as far as the plan needs it; without need none is read.

    Raises: InputError for NaN or infinite values in a vector.
    """
    import torch

    count = len(plan.contributions)
    if not plan.surveys:
        return Survey((), (1.0,) * count, {}, {})
    steps = {_key(step): step for step in plan.steps if step.surveys}
    ranked = {key: _ranked(plan, step) for key, step in steps.items() if step.method.ranks}
    squares, products = [0.0] * count, inner_products([torch.zeros(0)] * count, [1.0] * count)
    for rows, alike in _read(plan, "survey"):
        for place, row in enumerate(rows):
            squares[place] += sum(float(part.double().square().sum()) for part in _slices(row))
        if any(step.method.kind == "site" for step in steps.values()):
            products = products + inner_products(alike, [1.0] * count)
        _look(ranked, rows, Ranked.count)
    if ranked:
        for rows, _ in _read(plan, "survey, second look"):
            _look(ranked, rows, Ranked.refine)
    norms = tuple(square**0.5 for square in squares)
    factors = clip_factors(norms, plan.recipe.merge.clip)
    return Survey(
        norms,
        factors,
        {key: _thresholds(found, factors) for key, found in ranked.items()},
        {key: _shares(plan, step, products, factors) for key, step in steps.items() if step.method.kind == "site"},
    )


def _thresholds(ranked: Sequence[Ranked], factors: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(magnitude * factor for magnitude in one.magnitudes()) for one, factor in zip(ranked, factors, strict=True)
    )


def clip_factors(norms: Sequence[float], clip: str | float | None) -> tuple[float, ...]:
    """What is left of each vector when none may be longer than `clip`, or than the median of their norms."""
    if clip is None:
        return (1.0,) * len(norms)
    most = statistics.median(norms) if clip == "median" else float(clip)
    return tuple(min(1.0, most / norm) if norm > 0 else 1.0 for norm in norms)


def _key(step: Step) -> Key:
    return step.method.name, repr(sorted(step.method.chosen(step.options).items()))


def _read(plan: Plan, text: str) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Of each tensor, the sites' vectors, and their parts that can be compared: of heads the labels that all have."""
    records = in_file_order(step.record for step in plan.steps if step.role in (Role.WEIGHT, Role.HEAD))
    common = [label for label in plan.labels if all(label in one.labels for one in plan.contributions)]
    for record in progress(records, text=text, total=len(records), unit="tensor"):
        rows = []
        for one in plan.contributions:
            rows.append(one.source.read(record.name))
            refuse_nonfinite(rows[-1], record.name, one.name)
        alike = rows
        if plan.base.roles[record.name] is Role.HEAD:
            alike = [
                rows_by_label(row, one.labels, tuple(common)) for row, one in zip(rows, plan.contributions, strict=True)
            ]
        yield rows, alike


def _ranked(plan: Plan, step: Step) -> list[Ranked]:
    assert step.method.ranks is not None
    found = []
    for one in plan.contributions:
        names = plan.base.named(Role.WEIGHT, Role.HEAD)
        length = sum(_size(plan.base.shape_with(name, one.labels)) for name in names)
        found.append(Ranked(step.method.ranks(length, **step.method.chosen(step.options)), length))
    return found


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _look(
    ranked: Mapping[Key, list[Ranked]], rows: list[torch.Tensor], look: Callable[[Ranked, torch.Tensor], None]
) -> None:
    for found in ranked.values():
        for one, row in zip(found, rows, strict=True):
            for part in _slices(row):
                look(one, part)


def _slices(row: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return row.reshape(-1).split(SLICE) if row.numel() else ()


def _shares(plan: Plan, step: Step, products: torch.Tensor, factors: Sequence[float]) -> tuple[float, ...]:
    import torch

    scaled = torch.tensor(factors, dtype=torch.float64)
    weights = [one.weight for one in plan.contributions]
    clipped = products * scaled[:, None] * scaled
    return site_shares(step.method, step.method.chosen(step.options), clipped, weights)
