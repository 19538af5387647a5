"""The merge itself: a plan becomes a stream of fused tensors; the caller chooses where it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError
from hf_datavec.plan import Contribution, Plan, Step
from hf_datavec.tensors import TORCH_NAMES, in_file_order
from hf_datavec.vector import refuse_nonfinite, rows_by_label

if TYPE_CHECKING:
    import torch


def run(
    plan: Plan,
    *,
    only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    observe: Callable[[torch.Tensor], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, fused tensor) for the base's tensors, or those in `only`, in the order of a safetensors file.

    `observe` sees the sites' vectors of each tensor, shape (n, d), except for heads, whose rows may differ
    from site to site.

    Raises: InputError for NaN or infinite values in a vector, and for a result that overflows its type.
    """
    steps = {step.name: step for step in plan.steps if only is None or step.name in only}
    for record in in_file_order(step.record for step in steps.values()):
        step = steps[record.name]
        if step.role in (Role.STATISTIC, Role.CONSTANT):
            yield step.name, _kept(plan, step)
        else:
            yield step.name, _cast(step, _fused(plan, step, device, observe)).cpu()


def _kept(plan: Plan, step: Step) -> torch.Tensor:
    tensor = plan.base.tensors.read(step.name)
    return tensor if step.role is Role.CONSTANT else _cast(step, tensor)


def _fused(
    plan: Plan, step: Step, device: torch.device | str, observe: Callable[[torch.Tensor], None] | None
) -> torch.Tensor:
    """Base plus scaled combination in float64, so that the cast to the result's type is the only rounding."""
    import torch

    base = plan.base.tensors.read(step.name).to(device)
    rows = _rows(plan, step.name, device)
    if step.role is Role.HEAD:
        base = rows_by_label(base, plan.base.labels, plan.labels)
        return base.double() + step.scale * _combined_head(plan, step, rows)
    vectors = torch.stack([row.reshape(-1) for row in rows])
    if observe is not None:
        observe(vectors)
    return base.double() + step.scale * _combined(plan, step, plan.contributions, vectors).reshape(base.shape)


def _rows(plan: Plan, name: str, device: torch.device | str) -> list[torch.Tensor]:
    rows = []
    for one in plan.contributions:
        row = one.source.read(name).to(device)
        refuse_nonfinite(row, name, one.name)
        rows.append(row)
    return rows


def _combined(
    plan: Plan, step: Step, contributions: Sequence[Contribution], vectors: torch.Tensor, part: str = ""
) -> torch.Tensor:
    """What the method makes of vectors (n, d): a vector (d,), in float64."""
    import torch

    weights = torch.tensor([one.weight for one in contributions], dtype=torch.float64, device=vectors.device)
    extra = {}
    if step.method.kind == "tensor":
        seed = plan.recipe.merge.seed
        extra["generators"] = [_generator(seed, one.digest, step.name + part) for one in contributions]
    result: torch.Tensor = step.method.function(vectors, weights, **extra, **step.options)
    return result.double()


def _combined_head(plan: Plan, step: Step, rows: list[torch.Tensor]) -> torch.Tensor:
    """The head's combination, row by row over the sites that have the row's label."""
    import torch

    result = torch.zeros(step.record.shape, dtype=torch.float64, device=rows[0].device)
    groups: dict[tuple[int, ...], list[str]] = {}
    for label in plan.labels:
        having = tuple(index for index, one in enumerate(plan.contributions) if label in one.labels)
        groups.setdefault(having, []).append(label)
    for having, labels in groups.items():
        sites = [plan.contributions[index] for index in having]
        parts = [rows_by_label(rows[index], plan.contributions[index].labels, tuple(labels)) for index in having]
        places = [plan.labels.index(label) for label in labels]
        vectors = torch.stack([part.reshape(-1) for part in parts])
        combined = _combined(plan, step, sites, vectors, part="\0".join(labels))
        result[places] = combined.reshape(parts[0].shape)
    return result


def _generator(seed: int, digest: str, name: str) -> torch.Generator:
    """Random numbers that depend on the seed, the vector's content and the tensor alone."""
    import torch

    key = hashlib.sha256(f"{seed}\0{digest}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


def _cast(step: Step, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    result = tensor.to(getattr(torch, TORCH_NAMES[step.record.dtype]))
    if not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        raise InputError(
            f"the fused tensor '{step.name}' does not fit {step.record.dtype} (largest value {largest:.3g})",
            hint="use a smaller scale, or dtype: float32",
        )
    return result
