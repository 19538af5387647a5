"""The recipe: YAML to a frozen, checked description of one merge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from hf_datavec import located
from hf_datavec.errors import did_you_mean, raise_all
from hf_datavec.located import Document, KeyPath, LocatedError
from hf_datavec.methods import all_methods, options_model

Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Dtype = Literal["float32", "float16", "bfloat16"]


class _Section(BaseModel):
    # `strict`: the text "2" is no number here; YAML already knows the difference.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VectorEntry(_Section):
    """A site's vector; `weight` counts for methods that weigh, `name` is what tables call it."""

    vector: Text
    revision: Text | None = None
    weight: Finite | None = None
    name: Text | None = None


class ModelEntry(_Section):
    """A site's whole tuned model, whose vector is computed on the way."""

    model: Text
    revision: Text | None = None
    weight: Finite | None = None
    name: Text | None = None


def _entry_kind(value: Any) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return "<text>"
    is_model = isinstance(value, ModelEntry) or (isinstance(value, dict) and "model" in value)
    return "<model>" if is_model else "<vector>"


# Pydantic puts the tag of the branch into an error's path; the brackets tell it from a key.
Entry = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[ModelEntry, Tag("<model>")]
    | Annotated[VectorEntry, Tag("<vector>")],
    Discriminator(_entry_kind),
]


class Override(_Section):
    """Another method, options or scale for the tensors whose whole name matches a regular expression."""

    tensors: Text
    method: Text | None = None
    options: dict[str, Any] | None = None
    scale: Finite | None = None


class Merge(_Section):
    """How the vectors are combined; `scale` is the lambda that the result is multiplied with."""

    method: Text = "sum"
    scale: Finite = 1.0
    options: dict[str, Any] = {}
    weights: Literal["equal", "examples"] = "equal"
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    seed: Annotated[int, Field(ge=0)] = 0


class Recalibrate(_Section):
    """How BatchNorm statistics are restored; `images` are public, their labels are not looked at."""

    mode: Literal["none", "statistics", "moments"] = "statistics"
    images: Text | None = None
    split: Text | None = None
    count: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64


class Evaluate(_Section):
    """Labelled images that the fused model is measured on."""

    images: Text
    split: Text | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64


class Push(_Section):
    """Where the fused model goes: a Hub repo or a local folder."""

    repo: Text
    private: bool = True


class LockedInput(_Section):
    """The commit and the content digest of one input."""

    reference: Text
    commit: Text | None = None
    digest: Text


class Lock(_Section):
    """What a run really used, so that it can be had again."""

    base: LockedInput
    vectors: Annotated[tuple[LockedInput, ...], Field(strict=False)]
    tools: dict[str, str]


class Recipe(_Section):
    """A merge: base, vectors, how to combine, restore and measure, and where the result goes."""

    base: Text
    vectors: Annotated[tuple[Entry, ...], Field(min_length=1, strict=False)]
    merge: Merge = Merge()
    recalibrate: Recalibrate | None = None
    evaluate: Evaluate | None = None
    output: Text | None = None
    dtype: Dtype | None = None
    push: Push | None = None
    lock: Lock | None = None

    @property
    def entries(self) -> tuple[VectorEntry | ModelEntry, ...]:
        """The contributions, each in its long form."""
        return tuple(VectorEntry(vector=entry) if isinstance(entry, str) else entry for entry in self.vectors)


def load(path: Path) -> Recipe:
    """The recipe in a file.

    Raises: InputError, or InputErrors with everything that is wrong, each with its line and column.
    """
    return check(located.read(path))


def check(document: Document) -> Recipe:
    """The recipe that a document holds. Raises as `load` does."""
    if not isinstance(document.data, dict):
        raise document.problem((), "a recipe is a mapping with `base:` and `vectors:`")
    problems = [*document.problems, *_method_problems(document)]
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
        problems += _sense_problems(document, recipe)
    except ValidationError as error:
        # Beside a bad entry pydantic also calls the list too short, which it is not.
        found = [one for one in error.errors() if one["type"] != "too_short" or not one["input"]]
        problems += [_told(document, one) for one in found]
    raise_all(sorted(problems, key=lambda problem: problem.place))
    assert recipe is not None  # a ValidationError always holds a problem
    return recipe


def _told(document: Document, found: Any) -> LocatedError:
    """A pydantic error in our words, at its place in the file."""
    path = tuple(part for part in found["loc"] if not str(part).startswith("<"))
    kind, value = found["type"], found.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(document, path, _known_keys(path[:-1], value_at(document.data, path[:-1])))
    if kind == "missing":
        return document.problem(path[:-1], f"'{path[-1]}:' is missing", at="key")
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", found["ctx"]["expected"])
        hint = did_you_mean(str(value), words)
        return document.problem(path, f"{_shown(value)} is not one of {', '.join(words)}", hint=hint)
    return document.problem(path, f"{_expectation(found)}, found {_shown(value)}")


def _unknown_key(
    document: Document, path: KeyPath, known: Iterable[str], otherwise: str | None = None
) -> LocatedError:
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
        "greater_than_equal": f"expected a number of at least {bounds.get('ge')}",
        "less_than_equal": f"expected a number of at most {bounds.get('le')}",
    }
    return said.get(found["type"], str(found["msg"]))


def _shown(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing", bool: str(value).lower()}
    return names.get(type(value), repr(value)) if value != [] else "an empty list"


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
    return list(sections[str(path[0])].model_fields) if len(path) == 1 and path[0] in sections else []


def _method_problems(document: Document) -> Iterator[LocatedError]:
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
        if not isinstance(name, str):
            continue
        if name not in all_methods():
            known = did_you_mean(name, all_methods())
            if (*path, "method") in document.values:
                yield document.problem((*path, "method"), f"there is no merge method '{name}'", hint=known)
            continue
        yield from _option_problems(document, (*path, "options"), name)


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


def _sense_problems(document: Document, recipe: Recipe) -> Iterator[LocatedError]:
    """What no single field can tell: sections that contradict or lack each other."""
    weighed = [index for index, entry in enumerate(recipe.entries) if entry.weight is not None]
    if weighed and recipe.merge.weights == "examples":
        where = ("vectors", weighed[0], "weight")
        yield document.problem(where, "a weight is given although merge.weights is 'examples'; keep one of the two")
    restore = recipe.recalibrate
    if restore and restore.mode == "statistics" and not restore.images:
        hint = "name a folder or data set of public images, or use mode: moments or none"
        yield document.problem(("recalibrate",), "mode 'statistics' needs 'images:'", at="key", hint=hint)
    for index, override in enumerate(recipe.merge.overrides):
        try:
            re.compile(override.tensors)
        except re.error as error:
            where = ("merge", "overrides", index, "tensors")
            yield document.problem(where, f"not a regular expression: {error}")


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, with each method's options, for editors to complete and check."""
    found = Recipe.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = "hf-datavec recipe"
    for section in ("Merge", "Override"):
        part = found["$defs"][section]
        part["properties"]["method"] = {
            **part["properties"]["method"],
            "description": "the merge method",
            "enum": [*all_methods(), *([None] if section == "Override" else [])],
        }
        part["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": {"options": _options_schema(name)}},
            }
            for name in all_methods()
        ]
    return found


def _options_schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = options_model(name).model_json_schema()
    schema.pop("title", None)
    return schema
