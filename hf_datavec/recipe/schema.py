"""The JSON Schema of a recipe, for editors to complete and check."""

from __future__ import annotations

from typing import Any

from hf_datavec.methods import all_methods, options_model
from hf_datavec.recipe.sections import AUTO, Recipe


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
            "enum": [*all_methods(), None if section == "Override" else AUTO],
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
