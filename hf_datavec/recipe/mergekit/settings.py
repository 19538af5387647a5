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
    if method.between:
        _write_ends(reading, models)
    else:
        _write_sites(reading, method, models)
    for option, value in method.fixed.items():
        reading.data["merge"].setdefault("options", {})[option] = value


def _write_sites(reading: Reading, method: Equivalent, models: list[str]) -> None:
    base = reading.at(("base_model",))
    sites = [index for index, model in enumerate(models) if model != base or method.counts_base]
    if not sites:
        reading.refuse(("models",), "no model is left beside the base", at="key", about=())
        return
    for name, parameter in method.parameters.items():
        _write_parameter(reading, name, parameter, sites)
    _narrow(reading)
    _write_entries(reading, method, models, sites)
    if method.counts_base:
        _count_base(reading, base if base not in models else None)


def _write_ends(reading: Reading, models: list[str]) -> None:
    """Two models and how far between them: `t` is zero at the base and one at the other."""
    first = reading.at(("base_model",))
    others = [model for model in models if model != first]
    place: KeyPath = ("parameters", "t")
    t = reading.at(place)
    if first is None:
        reading.refuse(("merge_method",), "'base_model:' is missing, the model where t is 0", about=())
    elif len(others) != 1:
        problem = f"it goes from base_model to one other model, found {len(others)}"
        reading.refuse(("models",), problem, at="key", about=("models",))
    elif isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 <= t <= 1:
        problem = f"'t' must be a number from 0 to 1, found {'nothing' if t is None else t}"
        reading.refuse(place if t is not None else ("merge_method",), problem, about=("parameters",))
    else:
        ends = [{"model": first, "weight": 1 - t}, {"model": others[0], "weight": t}]
        reading.data["vectors"] = ends
        reading.mark(("vectors",), ("models",))


def _narrow(reading: Reading) -> None:
    """Bring options to what mergekit makes of them at the ends of their ranges."""
    options = reading.data["merge"].get("options", {})
    density, gamma = options.get("density"), options.get("gamma")
    if not isinstance(density, (int, float)):
        return
    if isinstance(gamma, (int, float)) and density + gamma > 1:
        # Of outliers only so many are dropped that the density is kept.
        options["gamma"] = round(max(0.0, 1 - density), 12)
        if density < 1:
            note = (
                f"'gamma' is {options['gamma']:g}, what 'density' leaves of it in mergekit, up to one value of a tensor"
            )
            reading.notes.append(note)
    if "epsilon" in options and density >= 1:
        options["epsilon"] = 0.0


def _usable(reading: Reading, method: Equivalent, models: int) -> bool:
    """Whether the parameters are known to the method and each is one value; problems are noted."""
    known = [*method.parameters, *(["weight"] if method.weighs else []), *(["t"] if method.between else [])]
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
            shared = name == "t" or (name in method.parameters and not method.parameters[name].per_model)
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
        if value != values[0] and value == value:  # NaN, which equals nothing, is for the recipe to refuse
            shown = place or places[0] or ()
            hint = "give all models the same value"
            reading.refuse(shown, f"'{name}' is {value} here and {values[0]} elsewhere; a recipe has one", hint=hint)
            return
    place, value = places[0], values[0]
    if parameter.option is None:
        if value != parameter.only and parameter.only is not None:
            hint = f"leave it out; what a recipe does is as with '{_yaml(parameter.only)}'"
            reading.refuse(place or (), f"'{name}: {_yaml(value)}' has no equal in a recipe", hint=hint)
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
