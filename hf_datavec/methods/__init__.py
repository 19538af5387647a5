"""The merge methods: a registry, filled by the modules beside this file, one per family.

A method is a small pure function over task vectors. It never sees the base, a file or a module. Of each kind:

* a *coordinate* method gets vectors `(n, d)` and weights `(n,)` and returns `(d,)`; each coordinate is combined
  on its own, so the engine may hand over any slice;
* a *tensor* method gets the same but always a whole tensor, flattened;
* a *matrix* method gets `(n, rows, cols)` and returns `(rows, cols)`; see `as_matrix` for what counts as one;
* a *site* method gets the inner products `(n, n)` of the vectors and weights `(n,)` and returns one factor per
  site, `(n,)`: the result is the sum of the vectors times these factors.

A function that names `generators` gets one `Draws` per vector; one that names `thresholds` gets, of each
vector, the magnitudes at the ranks that it was registered with. Adding a method is a decorated function in a module
here, and a test.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Kind = Literal["coordinate", "tensor", "matrix", "site"]
# What is measured before combining: each tensor for itself, or the whole vector of a site.
Scope = Literal["tensor", "vector"]
# What the engine hands over beside vectors and weights to a function that names it.
GIVEN = ("generators", "thresholds", "fisher", "gram", "features", "coefficients")
# Of these, what sites push beside their vectors.
FROM_SITES = {
    "fisher": "the sites' Fisher information", "gram": "the sites' Gram matrices",
    "features": "the sites' sums of features",
}  # fmt: skip
# Of these, what has a value for each value of the tensor, and so a row for each label of a head.
LIKE_VECTORS = ("fisher", "features")
_REGISTERED: dict[str, Method] = {}


@dataclass(frozen=True, slots=True)
class Factors:
    """What a method multiplies each site's vector by, and divides their sum by."""

    each: Sequence[float]
    divisor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method and everything that recipe, help, card and tests say of it."""

    name: str
    function: Callable[..., Any]
    kind: Kind
    formula: str
    source: str
    uses_weights: bool
    # Of a matrix method: the method for tensors that are no matrix and for heads; without one they are rows of one.
    otherwise: str | None = None
    # The ranks (1 is the largest magnitude) whose magnitudes are `thresholds`, from a vector's length and the options.
    ranks: Callable[..., tuple[int, ...]] | None = None
    # Why the method cannot merge a number of sites with these options, or None.
    refusal: Callable[..., str | None] | None = None
    # Of a method that is a sum: the factors, from the weights of what is summed and the options; numpy then does it.
    factors: Callable[..., Factors] | None = None
    # What is summed where it is not the vectors themselves: other numpy rows (d,), each of weight 1, from a list of
    # theirs, the options, and what `function` names of generators and thresholds. A method that uses weights is asked
    # for them only where every site's is 1.
    rows: Callable[..., Sequence[Any]] | None = None
    # Whether the weights must be the sites' numbers of examples.
    needs_counts: bool = False
    # Whether `coefficients` are learned on public images before the merge.
    learned: bool = False
    # How many float64 copies of all vectors of a tensor the function holds at most; for the plan's bound.
    copies: int = 4

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return inspect.getdoc(self.function).split("\n")[0]  # type: ignore[union-attr]

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters; the annotation of each carries its range."""
        return {
            name: parameter
            for name, parameter in _parameters(self.function).items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in GIVEN
        }

    def chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options: those given, else their defaults."""
        return {name: options.get(name, parameter.default) for name, parameter in self.options.items()}

    def asks_for(self, given: str) -> bool:
        """Whether the function names one of `GIVEN`."""
        return given in _parameters(self.function)

    @property
    def from_sites(self) -> tuple[str, ...]:
        """What the function names of what sites push beside their vectors."""
        return tuple(given for given in FROM_SITES if self.asks_for(given))

    def surveys(self, options: Mapping[str, Any]) -> bool:
        """Whether whole vectors must be measured before the first tensor is combined."""
        return self.chosen(options).get("scope") == "vector"

    @property
    def needs(self) -> tuple[str, ...]:
        """What a merge by this method takes beyond the vectors, in words."""
        found = []
        least = next((n for n in range(1, 100) if self.refuse(n, {}) is None), None)
        if least is not None and self.refuse(least + 1, {}) is not None:
            found.append(f"exactly {least} sites")
        elif least is not None and least > 1:
            found.append(f"{least} sites or more")
        if self.asks_for("generators"):
            found.append("randomness")
        if "scope" in self.options:
            found.append("a survey" if self.surveys({}) else "a survey with scope: vector")
        if self.needs_counts:
            found.append("example counts")
        found += [FROM_SITES[given] for given in self.from_sites]
        if self.learned:
            found.append("public images without labels")
        return tuple(found)

    def refuse(self, sites: int, options: Mapping[str, Any]) -> str | None:
        """Why this many sites cannot be merged with these options, or None."""
        return self.refusal(sites, **self.chosen(options)) if self.refusal else None


@cache  # every tensor of a merge asks
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def applied(
    name: str, options: Mapping[str, Any], shape: tuple[int, ...], *, head: bool = False
) -> tuple[Method, Mapping[str, Any]]:
    """The method that a tensor is combined by, and its options: a matrix method may leave some to another."""
    found = all_methods()[name]
    if found.otherwise and (head or as_matrix(shape) is None):
        return all_methods()[found.otherwise], {}
    return found, options


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a tensor as a linear map, or None for one that is none.

    A linear layer is out x in; a convolution's kernel is out x (in * k * k). Vectors, numbers and depthwise kernels,
    whose channels are combined with no other, are no linear map between channels.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    columns = 1
    for length in shape[1:]:
        columns *= length
    depthwise = len(shape) > 2 and shape[1] == 1
    return None if depthwise or min(shape[0], columns) < 2 else (shape[0], columns)


def Between(low: float, high: float) -> Any:  # noqa: N802 - reads as a type beside Annotated
    """The closed range of an option: `Annotated[float, Between(0, 1)]`."""
    from annotated_types import Interval

    return Interval(ge=low, le=high)


def method(
    name: str, *, formula: str, source: str, uses_weights: bool, kind: Kind = "coordinate", **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function under the name that recipes use; `more` are further fields of `Method`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _REGISTERED:
            raise ValueError(f"two merge methods are called '{name}'")
        _REGISTERED[name] = Method(
            name=name, function=function, kind=kind, formula=formula, source=source, uses_weights=uses_weights, **more
        )
        return function

    return register


@cache
def all_methods() -> Mapping[str, Method]:
    """Every registered method by name, in alphabetical order."""
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    return dict(sorted(_REGISTERED.items()))


@cache
def options_model(name: str) -> Any:
    """The pydantic model of a method's options: types, ranges and defaults from its signature."""
    from pydantic import ConfigDict, create_model

    fields: Any = {
        option: (parameter.annotation, parameter.default) for option, parameter in all_methods()[name].options.items()
    }
    return create_model(
        f"{name}_options", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
    )


def ranges(name: str) -> tuple[str, ...]:
    """A method's options as people read them: `density = 0.2 (0.0001 to 1)`."""
    found = []
    for option, entry in options_model(name).model_json_schema().get("properties", {}).items():
        default = json.dumps(entry["default"]).strip('"')
        if "enum" in entry:
            allowed = f" ({' or '.join(entry['enum'])})"
        elif "minimum" in entry:
            allowed = f" ({entry['minimum']:g} to {entry['maximum']:g})"
        else:
            allowed = " (true or false)" if entry.get("type") == "boolean" else ""
        found.append(f"{option} = {default}{allowed}")
    return tuple(found)
