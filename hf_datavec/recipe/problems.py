"""What is wrong with a recipe, in words and at its place in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_datavec.errors import did_you_mean
from hf_datavec.located import Document, KeyPath, LocatedError
from hf_datavec.methods import all_methods, options_model
from hf_datavec.recipe.sections import (
    AUTO,
    FITTED,
    Evaluate,
    Lock,
    Merge,
    ModelEntry,
    Override,
    Push,
    Recalibrate,
    Recipe,
    ScaleSearch,
    Tune,
    VectorEntry,
    WeightSearch,
)

# Where pydantic puts the kind of an entry into an error's path, and the kinds there are.
TAGS: dict[KeyPath, tuple[str, ...]] = {
    ("vectors",): ("<text>", "<model>", "<vector>"),
    ("merge", "scale"): ("<value>", "<search>"),
    ("merge", "weights"): ("<value>", "<search>"),
}
# The modes that measure something on images; `auto` takes them if there are any.
NEED_IMAGES = ("statistics", "relative", "repair", "tune")
# The keys of `tune` that count single steps, and those of learning from the sites' networks.
STEPPED = ("steps",)
DISTILLED = ("augment", "batch_size", "copies", "epochs", "mixup", "teacher")
# The methods whose length follows from the vectors' inner products, so that `scale: auto` can be told.
LENGTHS_KNOWN = ("sum", "mean")


def unknown_length(method: str) -> str:
    """Why `scale: auto` cannot be told for a method without public images."""
    known = ", ".join(LENGTHS_KNOWN)
    return f"'auto' is known for {known} and for method: auto, not for '{method}' without public images"


def unknown_scale(method: str) -> str:
    """Why `scale: auto` makes no sense for a method that learns coefficients."""
    return f"'auto' is not known for '{method}', which learns how much of each vector to add"


def told(document: Document, found: Any, known_keys: Callable[[KeyPath, Any], list[str]] | None = None) -> LocatedError:
    """A pydantic error in our words, at its place in the file; `known_keys` tells the keys that a path may have."""
    known_keys = known_keys or _known_keys
    path = tuple(
        part
        for place, part in enumerate(found["loc"])
        if not (place == 2 and part in TAGS.get(found["loc"][: 1 if found["loc"][0] == "vectors" else 2], ()))
    )
    kind, value = found["type"], found.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(document, path, known_keys(path[:-1], value_at(document.data, path[:-1])))
    if kind == "missing":
        return document.problem(path[:-1], f"'{path[-1]}:' is missing", at="key")
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", found["ctx"]["expected"])
        near = did_you_mean(str(value), words, listing=False)
        return document.problem(path, f"{_shown(value)} is not one of {', '.join(words)}", hint=near)
    return document.problem(path, f"{_expectation(found)}, found {_shown(value)}")


def _unknown_key(document: Document, path: KeyPath, known: Iterable[str], otherwise: str | None = None) -> LocatedError:
    hint = did_you_mean(str(path[-1]), known) or otherwise
    return document.problem(path, f"unknown key '{path[-1]}'", at="key", about=path[:-1], hint=hint)


def _expectation(found: Any) -> str:
    bounds = found.get("ctx", {})
    said = {
        "string_type": "expected text",
        "float_type": "expected a number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "bool_type": "expected true or false",
        "finite_number": "expected a finite number",
        "dict_type": "expected a mapping",
        "model_type": "expected a mapping",
        "model_attributes_type": "expected a mapping",
        "tuple_type": "expected a list",
        "string_too_short": "expected some text",
        "too_short": "expected at least one entry",
        "literal_error": f"expected {bounds.get('expected')}",
        "too_long": f"expected at most {bounds.get('max_length')} entries",
        "greater_than_equal": f"expected a number of at least {bounds.get('ge')}",
        "less_than_equal": f"expected a number of at most {bounds.get('le')}",
    }
    return said.get(found["type"], str(found["msg"]))


def _shown(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing", bool: str(value).lower()}
    text = names.get(type(value), repr(value)) if value != [] else "an empty list"
    return text if len(text) <= 60 else f"{text[:57]}..."


def value_at(data: Any, path: KeyPath) -> Any:
    """The value at a path, or None."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _known_keys(path: KeyPath, data: Any) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "merge": Merge, "recalibrate": Recalibrate, "evaluate": Evaluate, "push": Push, "lock": Lock,
    }  # fmt: skip
    if not path:
        return list(Recipe.model_fields)
    if path[0] == "vectors":
        return list((ModelEntry if isinstance(data, dict) and "model" in data else VectorEntry).model_fields)
    if path[:2] == ("merge", "overrides"):
        return list(Override.model_fields)
    if path[:2] in (("merge", "scale"), ("merge", "weights")):
        return list((ScaleSearch if path[1] == "scale" else WeightSearch).model_fields)
    if path == ("recalibrate", "tune"):
        return list(Tune.model_fields)
    return list(sections[str(path[0])].model_fields) if len(path) == 1 and path[0] in sections else []


def method_problems(document: Document) -> Iterator[LocatedError]:
    """Unknown methods, and options that a method lacks or that are out of range, in the whole file."""
    merge = value_at(document.data, ("merge",))
    if not isinstance(merge, dict):
        return
    default = merge.get("method", Merge().method)
    places: list[tuple[KeyPath, Any]] = [(("merge",), default)]
    overrides = merge.get("overrides")
    for index, override in enumerate(overrides if isinstance(overrides, list) else []):
        if isinstance(override, dict):
            places.append((("merge", "overrides", index), override.get("method", default)))
    for path, name in places:
        if isinstance(name, str):
            yield from choice_problems(document, path, name)


def choice_problems(document: Document, path: KeyPath, name: str) -> Iterator[LocatedError]:
    """An unknown method in the mapping at `path`, or what is wrong with the options that are given for it there."""
    if name == AUTO and "overrides" in path:
        problem = "'auto' looks at whole vectors"
        yield document.problem((*path, "method"), problem, hint="name a method here, or use auto as merge.method")
    elif name == AUTO:
        if value_at(document.data, (*path, "options")):
            problem = "method: auto has no options"
            yield document.problem((*path, "options"), problem, at="key", hint="name a method to give it options")
        scale = value_at(document.data, (*path, "scale"))
        if scale not in (None, AUTO):
            hint = "leave it out, or name a method: sum takes any scale"
            yield document.problem((*path, "scale"), "method: auto chooses the scale as well", hint=hint)
    elif name in all_methods():
        yield from _option_problems(document, (*path, "options"), name)
    elif (*path, "method") in document.values:
        known = did_you_mean(name, all_methods())
        yield document.problem((*path, "method"), f"there is no merge method '{name}'", hint=known)


def _option_problems(document: Document, path: KeyPath, method: str) -> Iterator[LocatedError]:
    options = value_at(document.data, path)
    if not isinstance(options, dict):
        return
    model = options_model(method)
    try:
        model.model_validate(options)
    except ValidationError as error:
        for found in error.errors():
            here = (*path, *found["loc"])
            if found["type"] == "extra_forbidden":
                yield _unknown_key(document, here, model.model_fields, f"the method '{method}' has no options")
            else:
                yield document.problem(here, f"{_expectation(found)}, found {_shown(found.get('input'))}")


def sense_problems(document: Document, recipe: Recipe) -> Iterator[LocatedError]:
    """What no single field can tell: sections that contradict or lack each other."""
    weighed = [index for index, entry in enumerate(recipe.entries) if entry.weight is not None]
    if weighed and recipe.merge.weights == "examples":
        where: KeyPath = ("vectors", weighed[0], "weight")
        yield document.problem(where, "a weight is given although merge.weights is 'examples'; keep one of the two")
    yield from _scale_problems(document, recipe)
    if recipe.merge.method == AUTO:
        hint = "leave it out, or name a method"
        if weighed:
            problem = "a weight is given although method: auto chooses how sites are weighed; keep one of the two"
            yield document.problem(("vectors", weighed[0], "weight"), problem, hint=hint)
        if recipe.merge.weights != "equal":
            problem = "method: auto chooses how sites are weighed as well"
            yield document.problem(("merge", "weights"), problem, at="key", hint=hint)
    methods = (recipe.merge.method, *(override.method or "" for override in recipe.merge.overrides))
    counting = [name for name in methods if name in all_methods() and all_methods()[name].needs_counts]
    if weighed and counting:
        problem = f"a weight is given although the method '{counting[0]}' weighs by example counts; keep one of the two"
        yield document.problem(("vectors", weighed[0], "weight"), problem, hint="method: linear takes given weights")
    yield from _search_problems(document, recipe, weighed)
    learning = [name for name in methods if name in all_methods() and all_methods()[name].learned]
    learned = recipe.lock and recipe.lock.coefficients
    if learning and not learned and not (recipe.recalibrate and recipe.recalibrate.images):
        problem = f"the method '{learning[0]}' learns on public images, and there are no 'recalibrate.images'"
        hint = "add recalibrate: {images: ./public-images}, with mode: none for a network without BatchNorm"
        yield document.problem(("merge", "method"), problem, about=("merge",), hint=hint)
    restore = recipe.recalibrate
    if restore and restore.mode in NEED_IMAGES and not restore.images:
        hint = "name a folder or data set of public images, or use mode: moments or none"
        yield document.problem(("recalibrate",), f"mode '{restore.mode}' needs 'images:'", at="key", hint=hint)
    if restore and restore.temperature in FITTED and not restore.images:
        problem = f"'{restore.temperature}' is fitted on public images, and there are no 'images:'"
        hint = "add images: ./public-images, or use temperature: sites, or a number"
        yield document.problem(("recalibrate", "temperature"), problem, at="key", hint=hint)
    yield from _tune_problems(document, restore)
    for index, override in enumerate(recipe.merge.overrides):
        try:
            re.compile(override.tensors)
        except re.error as error:
            where = ("merge", "overrides", index, "tensors")
            yield document.problem(where, f"not a regular expression: {error}")


def _tune_problems(document: Document, restore: Recalibrate | None) -> Iterator[LocatedError]:
    """Tuning without its mode or its images, and keys that do not go with its loss."""
    tune = restore.tune if restore else None
    if restore is None or tune is None:
        return
    where: KeyPath = ("recalibrate", "tune")
    if restore.mode != "tune" and not restore.distils:
        problem = f"is for mode 'tune' alone, but the mode is '{restore.mode}'"
        hint = "remove it, or use mode: tune; loss: ensemble goes with every mode"
        yield document.problem(where, problem, at="key", hint=hint)
    if restore.distils and restore.images is None and restore.mode not in NEED_IMAGES:
        hint = "add recalibrate.images, a folder or data set of public images"
        yield document.problem(where, "loss: ensemble learns on public images, and there are none", at="key", hint=hint)
    strange = sorted(tune.model_fields_set & set(STEPPED if restore.distils else DISTILLED))
    if strange:
        said = " and ".join(f"'{key}'" for key in strange)
        problem = f"{said}: only for loss: ensemble"
        if restore.distils:
            problem = f"{said}: not for loss: ensemble, which counts 'epochs'"
        yield document.problem((*where, strange[0]), problem, at="key", about=where, hint="remove it")
    if tune.parameters == "head" and not restore.distils:
        problem = "'head' is only for loss: ensemble"
        yield document.problem((*where, "parameters"), problem, hint="use affine or all, or loss: ensemble")
    if restore.distils and tune.augment == "none" and "copies" in tune.model_fields_set:
        problem = "without 'augment' there is one variant of each image"
        yield document.problem((*where, "copies"), problem, at="key", hint="remove it, or use augment: turns or crops")


def _scale_problems(document: Document, recipe: Recipe) -> Iterator[LocatedError]:
    """A scale that nothing tells: public images tell it for every method but those that learn on them."""
    method = recipe.merge.method
    if recipe.merge.scale != AUTO or method in (AUTO, *LENGTHS_KNOWN):
        return
    if method in all_methods() and all_methods()[method].learned:
        yield document.problem(("merge", "scale"), unknown_scale(method), hint="leave it out")
    elif not (recipe.recalibrate and recipe.recalibrate.images):
        hint = "give a number, {search: [...], images: ...}, or recalibrate: {images: ...} that tell it"
        yield document.problem(("merge", "scale"), unknown_length(method), hint=hint)


def _search_problems(document: Document, recipe: Recipe, weighed: list[int]) -> Iterator[LocatedError]:
    scale, weights, method = recipe.merge.scale, recipe.merge.weights, recipe.merge.method
    if isinstance(scale, ScaleSearch):
        for index, value in enumerate(scale.search):
            if value in scale.search[:index]:
                yield document.problem(("merge", "scale", "search", index), f"{value:g} is given twice")
    if not isinstance(weights, WeightSearch):
        return
    where: KeyPath = ("merge", "weights")
    if isinstance(scale, ScaleSearch):
        hint = "search for one of them, write it down, and search for the other"
        yield document.problem(where, "scale and weights are both searched for", at="key", hint=hint)
    if weighed:
        problem = "a weight is given although merge.weights is searched for; keep one of the two"
        yield document.problem(("vectors", weighed[0], "weight"), problem)
    if method in all_methods() and (not all_methods()[method].uses_weights or all_methods()[method].needs_counts):
        hint = "use method: linear, or leave the weights out"
        yield document.problem(where, f"the method '{method}' takes no weights to search for", at="key", hint=hint)
    if len(recipe.vectors) == 1:
        yield document.problem(where, "a single vector has no weights to search for", at="key")
