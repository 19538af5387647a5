"""What mergekit's methods and parameters (0.1.5) are called in a recipe, and where the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MASKS = "single values differ from mergekit's, whose masks are drawn anew in each run; here `seed` repeats them"
RESCALED = (
    "what is kept is divided by its chance to be kept, as in the papers; mergekit keeps the sum of absolute values"
)
CLAMPED = "where differences point away from each other the base stays; mergekit turns their average around"
TURNED = "mergekit turns whole weights; here the differences to the base are turned, so the result is another"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of mergekit: our option; or None, with the `only` value that has an equal here."""

    option: str | None
    default: Any
    only: Any = None
    per_model: bool = False


@dataclass(frozen=True, slots=True)
class Equivalent:
    """Our method for one of mergekit's, with its parameters; `fixed` options are what mergekit always does.

    `counts_base`: mergekit takes the base for one of the models. `between`: it goes from the base to the other model.
    """

    method: str
    parameters: Mapping[str, Parameter]
    weighs: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    counts_base: bool = False
    between: bool = False
    notes: tuple[str, ...] = ()


def _sparse(method: str, *, normalize: bool, rescale: Parameter, drawn: bool = False, **more: Parameter) -> Equivalent:
    """A method that drops values of each difference: what all of these have in common."""
    parameters = {
        "density": Parameter("density", 1.0, per_model=True),
        **more,
        "normalize": Parameter("normalize", normalize),
        "rescale": rescale,
        **SHARED,
    }
    if not drawn:
        return Equivalent(method, parameters, fixed={"scope": "tensor"})
    return Equivalent(method, parameters, notes=(MASKS, RESCALED))


# The first says how a mask is stored and changes no value.
SHARED = {"int8_mask": Parameter(None, False), "lambda": Parameter("scale", 1.0)}
NEVER = Parameter(None, False, only=False)
ALWAYS = Parameter("rescale", True)
GAMMA = Parameter("gamma", 0.01, per_model=True)
EPSILON = Parameter("epsilon", 0.15, per_model=True)

EQUIVALENTS: Mapping[str, Equivalent] = {
    "linear": Equivalent("linear", {"normalize": Parameter("normalize", True)}, counts_base=True),
    "task_arithmetic": Equivalent(
        "task_arithmetic",
        # mergekit knows the last two for all methods of the family; this one has no use for them there either.
        {"normalize": Parameter("normalize", False), **SHARED, "rescale": Parameter(None, False),
         "density": Parameter(None, 1.0, per_model=True)},
    ),
    "ties": _sparse("ties", normalize=True, rescale=NEVER),
    "dare_linear": _sparse("dare_linear", normalize=False, rescale=ALWAYS, drawn=True),
    "dare_ties": _sparse("dare_ties", normalize=False, rescale=ALWAYS, drawn=True),
    "breadcrumbs": _sparse("breadcrumbs", normalize=False, rescale=NEVER, gamma=GAMMA),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", normalize=False, rescale=NEVER, gamma=GAMMA),
    "della": _sparse("della", normalize=True, rescale=ALWAYS, drawn=True, epsilon=EPSILON),
    "della_linear": _sparse("della_linear", normalize=False, rescale=ALWAYS, drawn=True, epsilon=EPSILON),
    "sce": Equivalent(
        "sce", {"select_topk": Parameter("select_topk", 1.0), "int8_mask": SHARED["int8_mask"]}, weighs=False
    ),
    "model_stock": Equivalent(
        "model_stock", {"filter_wise": NEVER}, weighs=False, fixed={"scope": "tensor"}, notes=(CLAMPED,)
    ),
    "nuslerp": Equivalent(
        "nuslerp",
        {"nuslerp_flatten": Parameter(None, True, only=True), "nuslerp_row_wise": Parameter(None, False)},
        fixed={"scope": "tensor"},
    ),
    "slerp": Equivalent("nuslerp", {}, weighs=False, fixed={"scope": "tensor"}, between=True, notes=(TURNED,)),
    "karcher": Equivalent(
        "karcher_mean",
        # Ours goes on until nothing moves any more.
        {"max_iter": Parameter(None, 10), "tol": Parameter(None, 1e-5)},
        weighs=False, fixed={"scope": "tensor"}, notes=(TURNED,),
    ),
}  # fmt: skip
