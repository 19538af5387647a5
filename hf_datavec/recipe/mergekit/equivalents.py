"""What mergekit's methods and parameters (0.1.5) are called in a recipe, and where the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MASKS = "random masks are drawn anew, so single weights differ from mergekit's; a recipe's seed repeats them"
RESCALED = (
    "mergekit rescales what DARE and DELLA keep so that the sum of absolute values stays; here it is divided by the "
    "chance to be kept, as in the papers"
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of mergekit: our option, or None with the `only` value that means the same here."""

    option: str | None
    default: Any
    only: Any = None
    per_model: bool = False


@dataclass(frozen=True, slots=True)
class Equivalent:
    """Our method for one of mergekit's; `counts_base` if mergekit takes the base for one of the models."""

    method: str
    parameters: Mapping[str, Parameter]
    weighs: bool = True
    fixed: Mapping[str, Any] | None = None
    counts_base: bool = False
    base_is_an_end: bool = False
    notes: tuple[str, ...] = ()


# Only how a mask is stored; it changes no value.
_MASK = {"int8_mask": Parameter(None, False)}
_LAMBDA = {"lambda": Parameter("scale", 1.0)}

EQUIVALENTS: Mapping[str, Equivalent] = {
    "linear": Equivalent("linear", {"normalize": Parameter("normalize", True)}, counts_base=True),
}
