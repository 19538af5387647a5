"""Metadata in the front matter of README.md: what is wrong with it, and the tags that follow from it."""

import re
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def read(readme: str) -> tuple[dict[str, Any], list[str]]:
    """The front matter of a README and what the Hub would refuse in it, a selection."""
    found = FRONT_MATTER.match(readme)
    try:
        card = (yaml.safe_load(found[1] or "") if found else None) or {}
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata could not be parsed: {error}"]
    if not isinstance(card, dict):
        return {}, ["YAML metadata must be a mapping"]
    rules = {
        '"model-index" must be an array': isinstance(card.get("model-index", []), list),
        f'"base_model_relation" must be one of {RELATIONS}': card.get("base_model_relation", "merge") in RELATIONS,
    }
    return card, [message for message, kept in rules.items() if not kept]


def tags(card: dict[str, Any]) -> list[str]:
    """Everything a listing can be filtered by."""
    relation = card.get("base_model_relation") or ("merge" if isinstance(card.get("base_model"), list) else "finetune")
    beginnings = {"library_name": "", "pipeline_tag": "", "tags": "", "language": "", "datasets": "dataset:"}
    beginnings |= {"license": "license:", "base_model": "base_model:"}
    found = []
    for key, beginning in beginnings.items():
        value = card.get(key) or []
        found += [f"{beginning}{item}" for item in (value if isinstance(value, list) else [value])]
    bases = [tag.removeprefix("base_model:") for tag in found if tag.startswith("base_model:")]
    return list(dict.fromkeys([*found, *(f"base_model:{relation}:{base}" for base in bases), "region:us"]))
