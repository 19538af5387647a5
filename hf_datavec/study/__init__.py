"""The paper's experiment: sites made of one data set, every way to merge them, and an honest table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_datavec import located
from hf_datavec.errors import raise_all
from hf_datavec.located import Document, LocatedError
from hf_datavec.recipe.problems import told
from hf_datavec.study.problems import known_keys, merge_problems, sense_problems
from hf_datavec.study.sections import Study

__all__ = ["Study", "check", "load", "schema"]


def load(path: Path) -> Study:
    """The study in a file.

    Raises: InputError, or InputErrors with everything that is wrong, each with its line and column.
    """
    return check(located.read(path))


def check(document: Document) -> Study:
    """The study that a document holds. Raises as `load` does."""
    if not isinstance(document.data, dict):
        raise document.problem((), "a study is a mapping with `data:` and `base:`")
    problems: list[LocatedError] = [*document.problems, *merge_problems(document)]
    study = None
    try:
        study = Study.model_validate(document.data)
        problems += sense_problems(document, study)
    except ValidationError as error:
        # Beside a bad entry pydantic also calls the list too short, which it is not.
        wrong = [one for one in error.errors() if one["type"] != "too_short" or not one["input"]]
        problems += [told(document, one, known_keys) for one in wrong]
    problems.sort(key=lambda problem: problem.place)
    raise_all(problems)
    assert study is not None  # a ValidationError always holds a problem
    return study


def schema() -> dict[str, Any]:
    """The JSON Schema of a study file, for editors to complete and check."""
    found = Study.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = "hf-datavec study"
    return found
