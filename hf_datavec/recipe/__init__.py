"""The recipe: YAML to a frozen, checked description of one merge."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from hf_datavec import located
from hf_datavec.errors import raise_all
from hf_datavec.located import Document, LocatedError
from hf_datavec.recipe import mergekit
from hf_datavec.recipe.problems import method_problems, sense_problems, told
from hf_datavec.recipe.schema import schema
from hf_datavec.recipe.sections import (
    AUTO,
    FITTED,
    Evaluate,
    Finite,
    LockedInput,
    Measured,
    Merge,
    ModelEntry,
    Override,
    Recalibrate,
    Recipe,
    ScaleSearch,
    ScaleValue,
    Section,
    Text,
    Trained,
    Tune,
    VectorEntry,
    WeightSearch,
)

__all__ = [
    "AUTO",
    "FITTED",
    "Evaluate",
    "Finite",
    "LockedInput",
    "Measured",
    "Merge",
    "ModelEntry",
    "Override",
    "Recalibrate",
    "Recipe",
    "ScaleSearch",
    "ScaleValue",
    "Section",
    "Text",
    "Trained",
    "Tune",
    "VectorEntry",
    "WeightSearch",
    "check",
    "load",
    "load_with_notes",
    "mergekit",
    "schema",
]  # fmt: skip


def load(path: Path) -> Recipe:
    """The recipe in a file.

    Raises: InputError, or InputErrors with everything that is wrong, each with its line and column.
    """
    return load_with_notes(path)[0]


def load_with_notes(path: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe in a file, which may be a mergekit configuration, and what is to be said of it. Raises as `load`."""
    document = located.read(path)
    if not mergekit.is_configuration(document):
        return check(document), ()
    translation = mergekit.translate(document)
    return check(translation.document), translation.notes


def check(document: Document) -> Recipe:
    """The recipe that a document holds. Raises as `load` does."""
    if not isinstance(document.data, dict):
        raise document.problem((), "a recipe is a mapping with `base:` and `vectors:`")
    problems: list[LocatedError] = [*document.problems, *method_problems(document)]
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
        problems += sense_problems(document, recipe)
    except ValidationError as error:
        # Beside a bad entry pydantic also calls the list too short, which it is not.
        wrong = [one for one in error.errors() if one["type"] != "too_short" or not one["input"]]
        problems += [told(document, one) for one in wrong]
    problems.sort(key=lambda problem: problem.place)
    raise_all(problems)
    assert recipe is not None  # a ValidationError always holds a problem
    return recipe
