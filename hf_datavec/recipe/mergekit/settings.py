"""Weights, density and other parameters of a configuration, as entries, options and scale of a recipe."""

from __future__ import annotations

from typing import Any

from hf_datavec.located import KeyPath
from hf_datavec.recipe.mergekit.equivalents import Equivalent, Parameter
from hf_datavec.recipe.mergekit.reading import Reading

# How far weights may be from a sum of one and still count as an average: they are decimal fractions in a file.
SUM_TOLERANCE = 1e-9


def write_settings(reading: Reading, method: Equivalent, models: list[str]) -> None:
    """Write `vectors` and `merge` of the recipe. Problems are noted in `reading`."""
    if not _usable(reading, method, len(models)):
        return
    base = reading.at(("base_model",))
    sites = [index for index, model in enumerate(models) if model != base or method.counts_base]
    if len(sites) < 1 + method.base_is_an_end:
        reading.refuse(("models",), "no model is left beside the base", at="key")
        return
    for name, parameter in method.parameters.items():
        _write_parameter(reading, name, parameter, sites)
    for option, value in (method.fixed or {}).items():
        reading.data["merge"].setdefault("options", {})[option] = value
    _write_entries(reading, method, models, sites)
    if method.counts_base:
        _count_base(reading, base if base not in models else None)


def _usable(reading: Reading, method: Equivalent, models: int) -> bool:
    """Whether the parameters are known to the method and each is one value; problems are noted."""
    known = [*method.parameters, *(["weight"] if method.weighs else [])]
    before = len(reading.problems)
    paths: list[KeyPath] = [("parameters",), *(("models", index, "parameters") for index in range(models))]
    for path in paths:
        given = reading.at(path)
        if given is not None and not isinstance(given, dict):
            reading.refuse(path, "expected a mapping")
            continue
        reading.refuse_unknown(path, known, "the method has no such parameter")
        for name, value in (given or {}).items():
            if isinstance(value, (list, dict)):
                hint = "give one number; merge.overrides of a recipe treats single tensors differently"
                reading.refuse((*path, name), f"'{name}' is given per layer or per tensor", hint=hint)
            shared = name in method.parameters and not method.parameters[name].per_model
            if shared and path != ("parameters",):
                hint = "give it under the top 'parameters:'"
                reading.refuse(
                    (*path, name), f"'{name}' is a parameter of the merge, not of a model", at="key", hint=hint
                )
    return len(reading.problems) == before


def _setting(reading: Reading, name: str, index: int) -> KeyPath | None:
    """Where a parameter of a model is given: at the model, else for all; None when nowhere."""
    paths: tuple[KeyPath, ...] = (("models", index, "parameters", name), ("parameters", name))
    return next((path for path in paths if reading.at(path) is not None), None)


def _write_parameter(reading: Reading, name: str, parameter: Parameter, sites: list[int]) -> None:
    places = [_setting(reading, name, index) for index in sites]
    values = [parameter.default if path is None else reading.at(path) for path in places]
    for place, value in zip(places, values, strict=True):
        if value != values[0]:
            shown = place or places[0] or ()
            hint = "give all models the same value"
            reading.refuse(shown, f"'{name}' is {value} here and {values[0]} elsewhere; a recipe has one", hint=hint)
            return
    place, value = places[0], values[0]
    if parameter.option is None:
        if value != parameter.only and parameter.only is not None:
            problem = (
                f"'{name}: {_yaml(value)}' has no equal in a recipe; it always does as with {_yaml(parameter.only)}"
            )
            reading.refuse(place or (), problem)
        elif place is not None:
            reading.notes.append(f"'{name}' is left out: it changes nothing here")
        return
    path = ("merge", "scale") if parameter.option == "scale" else ("merge", "options", parameter.option)
    if place is not None or path[1] == "options":
        # mergekit's default is written out, since ours may be another.
        reading.put(path, value, place or ("merge_method",))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write_entries(reading: Reading, method: Equivalent, models: list[str], sites: list[int]) -> None:
    reading.mark(("vectors",), ("models",))
    reading.data["vectors"] = []
    for position, index in enumerate(sites):
        entry: dict[str, Any] = {"model": models[index]}
        reading.mark(("vectors", position), ("models", index))
        reading.mark(("vectors", position, "model"), ("models", index, "model"))
        if method.weighs:
            place = _setting(reading, "weight", index)
            if place is None:
                reading.refuse(("models", index, "model"), "no 'weight' is given", about=("models", index))
                continue
            entry["weight"] = reading.at(place)
            reading.mark(("vectors", position, "weight"), place)
        reading.data["vectors"].append(entry)


def _count_base(reading: Reading, unlisted: Any) -> None:
    """What averages of whole models have that averages of differences lack: the base is one of them."""
    shared = reading.at(("parameters", "weight"))
    if unlisted is not None and shared is not None:
        reading.data["vectors"].append({"model": unlisted, "weight": shared})
        reading.notes.append("mergekit counts base_model as one more model; so does this recipe")
    weights = [entry.get("weight") for entry in reading.data["vectors"]]
    divided = reading.data["merge"].get("options", {}).get("normalize", True)
    if divided is False and all(isinstance(weight, (int, float)) for weight in weights):
        total = sum(weights)
        if abs(total - 1) > SUM_TOLERANCE:
            problem = f"without normalize the weights must add up to 1, found {total:g}: they weigh the base as well"
            reading.refuse(("parameters", "normalize"), problem, hint="use merge_method: task_arithmetic")
