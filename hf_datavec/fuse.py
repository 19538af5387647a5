"""The merge itself: a plan becomes a stream of fused tensors; the caller chooses where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from hf_datavec import survey as surveys
from hf_datavec.checkpoint import Role
from hf_datavec.combine import SLICE, Sites, needs_whole, ready
from hf_datavec.errors import InputError
from hf_datavec.plan import Plan, Step
from hf_datavec.survey import Survey
from hf_datavec.tensors import TORCH_NAMES, in_file_order
from hf_datavec.vector import refuse_nonfinite, rows_by_label

if TYPE_CHECKING:
    import torch

    # Where combining happens, and who watches.
    Place = tuple[torch.device | str, Callable[[torch.Tensor], None] | None]


def run(
    plan: Plan,
    *,
    only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    observe: Callable[[torch.Tensor], None] | None = None,
    survey: Survey | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, fused tensor) for the base's tensors, or those in `only`, in the order of a safetensors file.

    `observe` sees the sites' vectors of each tensor, shape (n, d), except for heads, whose rows may differ
    from site to site. `survey` is what `survey.take` found; without it the vectors are measured here.

    Raises: InputError for NaN or infinite values in a vector, and for a result that overflows its type.
    """
    steps = {step.name: step for step in plan.steps if only is None or step.name in only}
    survey = survey or surveys.take(plan)
    for record in in_file_order(step.record for step in steps.values()):
        step = steps[record.name]
        if step.is_merged:
            yield step.name, _fused(plan, step, survey.sites(plan, step), (device, observe)).cpu()
        else:
            yield step.name, _kept(plan, step)


def _kept(plan: Plan, step: Step) -> torch.Tensor:
    tensor = plan.base.tensors.read(step.name)
    return tensor if step.role is Role.CONSTANT else _cast(step, tensor)


def _fused(plan: Plan, step: Step, sites: Sites, place: Place) -> torch.Tensor:
    """Base plus scaled combination in float64, so that the cast to the result's type is the only rounding."""
    import torch

    device, observe = place
    base = plan.base.tensors.read(step.name)
    rows = [one.source.read(step.name) for one in plan.contributions]
    if step.role is Role.HEAD:
        for one, row in zip(plan.contributions, rows, strict=True):
            refuse_nonfinite(row, step.name, one.name)
        base = rows_by_label(base, plan.base.labels, plan.labels).to(device)
        return _cast(step, base.double() + step.scale * _combined_head(plan, step, rows, sites, device))
    result = torch.empty(step.record.shape, dtype=getattr(torch, TORCH_NAMES[step.record.dtype]), device=device)
    flat, flat_base, flat_rows = result.view(-1), base.reshape(-1), [row.reshape(-1) for row in rows]
    combine = ready(step.method, step.options, rows, sites, key=step.name, seed=plan.recipe.merge.seed)
    length = _slice_length(step, len(flat), device)
    for start in range(0, max(1, len(flat)), length):
        part = slice(start, start + length)
        vectors = torch.stack([row[part] for row in flat_rows]).to(device)
        _refuse_nonfinite_rows(plan, step, vectors)
        if observe is not None:
            observe(vectors)
        combined = combine(_clipped(vectors, sites))
        # float32 plus float64 is float64, without a copy of the base in between
        flat[part] = _cast(step, torch.add(flat_base[part].to(device), combined, alpha=step.scale))
    return result


def _slice_length(step: Step, length: int, device: torch.device | str) -> int:
    """How many coordinates are combined at a time: what stays in a core's cache, or all of them."""
    whole = needs_whole(step.method) or str(device) != "cpu"
    return max(1, length) if whole else SLICE


def _clipped(vectors: torch.Tensor, sites: Sites) -> torch.Tensor:
    import torch

    if all(factor == 1 for factor in sites.factors):
        return vectors
    return vectors.double() * torch.tensor(sites.factors, dtype=torch.float64, device=vectors.device)[:, None]


def _refuse_nonfinite_rows(plan: Plan, step: Step, vectors: torch.Tensor) -> None:
    # One sum tells whether any value is NaN or infinite; only then it is worth looking for which.
    if not math.isfinite(float(vectors.sum())):
        for one in plan.contributions:
            refuse_nonfinite(one.source.read(step.name), step.name, one.name)


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
        result[places] = combine(vectors).reshape(parts[0].shape)
    return result


def _cast(step: Step, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    result = tensor.to(getattr(torch, TORCH_NAMES[step.record.dtype]))
    if not math.isfinite(float(result.sum())) and not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        if math.isnan(largest):
            raise InputError(f"the method '{step.method.name}' gave NaN for the tensor '{step.name}'")
        raise InputError(
            f"the fused tensor '{step.name}' does not fit {step.record.dtype} (largest value {largest:.3g})",
            hint="use a smaller scale, or dtype: float32",
        )
    return result
