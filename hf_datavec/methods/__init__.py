"""The merge methods: a registry, filled by the modules beside this file, one per family.

A method is a small pure function over task vectors. It never sees the base, a file or a module:

* a coordinate method gets vectors `(n, d)` and weights `(n,)` and returns `(d,)`; each coordinate is combined
  on its own, so the engine may hand over any slice;
* a tensor method gets the same but always a whole tensor, with one seeded generator per vector.

Adding one is a decorated function in a module here, and a test.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Kind = Literal["coordinate", "tensor"]
_REGISTERED: dict[str, Method] = {}


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method and everything that recipe, help, card and tests say of it."""

    name: str
    function: Callable[..., Any]
    kind: Kind
    formula: str
    source: str
    uses_weights: bool

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return inspect.getdoc(self.function).split("\n")[0]  # type: ignore[union-attr]

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only parameters; the annotation of each carries its range."""
        parameters = inspect.signature(self.function).parameters
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "generators"
        }


def Between(low: float, high: float) -> Any:  # noqa: N802 - reads as a type beside Annotated
    """The closed range of an option: `Annotated[float, Between(0, 1)]`."""
    from annotated_types import Interval

    return Interval(ge=low, le=high)


def method(
    name: str, *, formula: str, source: str, uses_weights: bool, kind: Kind = "coordinate"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function under the name that recipes use."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _REGISTERED:
            raise ValueError(f"two merge methods are called '{name}'")
        _REGISTERED[name] = Method(name, function, kind, formula, source, uses_weights)
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
