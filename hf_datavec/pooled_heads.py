"""The heads of a merge that follow from the sites' sums of features, each as its difference to the base's head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError, listed
from hf_datavec.linear_head import PENALTIES, FeatureSums, Head, pooled_head
from hf_datavec.plan import Plan, Step
from hf_datavec.vector import TaskVector, rows_by_label

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PooledHead:
    """What a head of all sites' images adds to the base's head, by tensor; and how its penalty was found."""

    method: str
    differences: Mapping[str, torch.Tensor]
    penalty: float
    errors: tuple[float, ...]

    @property
    def note(self) -> str:
        """What its users should know, in a sentence."""
        if not self.errors:
            return f"{self.method} takes the default penalty {self.penalty:.3g}: no second site could judge it"
        error = self.errors[PENALTIES.index(self.penalty)]
        return f"{self.method} takes the penalty {self.penalty:.3g} (mean squared error {error:.4g} on sites left out)"


def is_pooled(step: Step) -> bool:
    """Whether a tensor is made of the sums of features."""
    return step.is_merged and "features" in step.method.from_sites


def pooled(plan: Plan) -> PooledHead | None:
    """The head that a plan's method makes of the sums of features, or None where no tensor asks for one.

    Images count alike, whatever the sites' weights. Raises: InputError for sums that are not finite.
    """
    steps = [step for step in plan.steps if is_pooled(step)]
    if not steps:
        return None
    import torch  # a merge without such a head may need none

    first = steps[0]
    sharpness = first.method.chosen(first.options)["sharpness"]
    head = pooled_head([sums.aligned(plan.labels) for sums in _sums(plan)], sharpness=sharpness)
    differences = {}
    for step in steps:
        base = rows_by_label(plan.base.tensors.read(step.name), plan.base.labels, plan.labels).double()
        made = head.weights if len(step.record.shape) == 2 else head.bias
        differences[step.name] = torch.from_numpy(made.copy()) - base
    return PooledHead(first.method.name, differences, head.penalty, head.errors)


def of_all(plan: Plan) -> Head:
    """The head that the sums of all sites give, for the plan's labels.

    Raises: InputError for sums that are not finite.
    """
    return pooled_head([sums.aligned(plan.labels) for sums in _sums(plan)])


def possible(plan: Plan) -> bool:
    """Whether every site shares sums of features, and the base has a head that can be made of them."""
    shapes = sorted(len(plan.base.records[name].shape) for name in plan.base.named(Role.HEAD))
    shared = (
        isinstance(one.source, TaskVector) and "features" in one.source.beside.entries for one in plan.contributions
    )
    return shapes == [1, 2] and not plan.base_fetched.hollow and all(shared)


def _sums(plan: Plan) -> Iterator[FeatureSums]:
    for one in plan.contributions:
        assert isinstance(one.source, TaskVector)  # the plan has refused others
        yield one.source.beside.feature_sums(one.labels)


def errors(plan: Plan) -> Iterator[InputError]:
    """Why the sums of features cannot make the tensors that a recipe wants of them."""
    made = [step for step in plan.steps if is_pooled(step)]
    if not made:
        return
    method, heads = made[0].method.name, [step for step in plan.steps if step.role is Role.HEAD]
    pattern = heads[0].name.rpartition(".")[0].replace(".", r"\\.") + r"\\..*"
    hint = f'name the head alone: overrides: [{{tensors: "{pattern}", method: {method}, scale: 1}}]'
    if others := [step.name for step in made if step.role is not Role.HEAD]:
        yield InputError(
            f"the method '{method}' makes heads alone, but the recipe wants {listed(others)} of it", hint=hint
        )
    if left := [step.name for step in heads if step not in made]:
        yield InputError(
            f"the method '{method}' makes whole heads, but {listed(left)} falls to another method", hint=hint
        )
    if sorted(len(step.record.shape) for step in heads) != [1, 2]:
        problem = f"the head of '{plan.base.folder}' is no single linear layer with a bias"
        yield InputError(f"{problem} ({', '.join(step.name for step in heads)})", hint="merge it by another method")
    if len({repr(step.method.chosen(step.options)) for step in made}) > 1:
        yield InputError(f"the method '{method}' is given different options for the tensors of one head", hint=hint)
