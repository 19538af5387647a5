"""The lock file: a recipe whose inputs are pinned by commit and content digest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_datavec import hub, lineage
from hf_datavec.hub import Fetched
from hf_datavec.images import ImageSet
from hf_datavec.pipeline.prepare import (
    Prepared,
    evaluation_images,
    judging_images,
    learning_images,
    search_images,
)
from hf_datavec.plan import Contribution, Plan
from hf_datavec.recipe import AUTO, ModelEntry, WeightSearch
from hf_datavec.vector import tool_versions

# In the folder of a fused model: the recipe as given, and what it stood for.
RECIPE_FILE = "recipe.yaml"
LOCK_FILE = "recipe.lock.yaml"


def beside(prepared: Prepared) -> Path:
    """The lock's place beside the recipe."""
    return prepared.folder / f"{prepared.path.stem.removesuffix('.lock')}.lock.yaml"


def write(prepared: Prepared, test: ImageSet | None = None, *, public: ImageSet | None = None) -> Path:
    """Write the lock beside the recipe and return its path; `test` and `public` are its images if they are open."""
    test = test or evaluation_images(prepared)
    target = beside(prepared)
    partial = target.with_name(f".{target.name}.partial")
    public = public or judging_images(prepared) or learning_images(prepared)
    pinned_text = text(prepared, public, test, search_images(prepared), folder=target.parent)
    partial.write_text(pinned_text, "utf-8")
    partial.replace(target)
    return target


def text(
    prepared: Prepared,
    public: ImageSet | None,
    test: ImageSet | None,
    labelled: ImageSet | None = None,
    *,
    folder: Path,
) -> str:
    """The lock of a prepared recipe as YAML, for a file in `folder`; local paths become relative to it.

    `public` are the images of the calibration, `test` those of the evaluation, `labelled` those of a search. What a
    search has found stands in its place, so that merging the lock needs no search.
    """
    plan, recipe_folder = prepared.plan, prepared.folder
    recipe = plan.recipe.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
    by_name = {one.name: one for one in plan.contributions}
    ordered = [by_name[name] for name in prepared.order]
    recipe["base"] = pinned(plan.base_fetched, folder)
    recipe["vectors"] = [
        _entry(entry, one.name, pinned(one.fetched, folder))
        for entry, one in zip(plan.recipe.entries, ordered, strict=True)
    ]
    # Of what `auto` may choose, only a single site is told by weights.
    one_site = prepared.recipe.merge.method == AUTO and plan.recipe.merge.method == "linear"
    if one_site or (isinstance(prepared.recipe.merge.weights, WeightSearch) and not plan.recipe.merge.searched):
        for entry, one in zip(recipe["vectors"], ordered, strict=True):
            entry["weight"] = one.weight
    if labelled and plan.recipe.merge.searched:
        key = "weights" if isinstance(plan.recipe.merge.weights, WeightSearch) else "scale"
        recipe["merge"][key]["images"] = pinned(labelled.fetched, folder)
    for section in ("recalibrate", "evaluate"):
        if recipe.get(section, {}).get("images"):
            recipe[section]["images"] = moved(recipe[section]["images"], recipe_folder, folder)
    if public:
        recipe["recalibrate"]["images"] = pinned(public.fetched, folder)
    if test:
        recipe["evaluate"]["images"] = pinned(test.fetched, folder)
    recipe.pop("output", None)
    if prepared.output and prepared.output != folder:  # a lock inside the result cannot name its own folder
        recipe["output"] = relative(prepared.output, folder)
    if recipe.get("push"):
        recipe["push"]["repo"] = moved(recipe["push"]["repo"], recipe_folder, folder)
    if behind := lineage.read(plan.base.folder):
        recipe["round"] = len(behind) + 1
    recipe["lock"] = {
        "base": _locked(plan.base_fetched, plan.base_digest, folder),
        "vectors": [_locked(one.fetched, one.digest, folder) for one in ordered],
        **({"calibration": _locked(public.fetched, public.digest, folder)} if public else {}),
        **({"evaluation": _locked(test.fetched, test.digest, folder)} if test else {}),
        **({"search": _locked(labelled.fetched, labelled.digest, folder)} if labelled else {}),
        **({"coefficients": _in_order(plan, ordered)} if plan.coefficients else {}),
        "tools": tool_versions(),
    }
    return dump(recipe)


def _in_order(plan: Plan, ordered: Sequence[Contribution]) -> dict[str, list[float]]:
    """What was learned, one number per vector in the order of the recipe."""
    place = {one.name: index for index, one in enumerate(plan.contributions)}
    return {name: [row[place[one.name]] for one in ordered] for name, row in plan.coefficients.items()}


def _entry(entry: Any, name: str, reference: str) -> dict[str, Any]:
    kind = "model" if isinstance(entry, ModelEntry) else "vector"
    found: dict[str, Any] = {kind: reference, "name": name}
    return found if entry.weight is None else {**found, "weight": entry.weight}


def _locked(fetched: Fetched, digest: str | None, folder: Path) -> dict[str, Any]:
    commit = {"commit": fetched.commit} if fetched.commit else {}
    known = {"digest": digest} if digest else {}
    return {"reference": pinned(fetched, folder), **commit, **known}


def pinned(fetched: Fetched, folder: Path) -> str:
    """The reference of what was fetched: a repo at its commit, or a path relative to `folder`."""
    if fetched.reference.path is not None:
        return relative(fetched.reference.path, folder)
    return f"{fetched.reference.repo}@{fetched.commit}"


def moved(reference: str, old: Path, new: Path) -> str:
    """A reference in a recipe in one folder as a recipe in another writes it."""
    parsed = hub.parse(reference, relative_to=old)
    return reference if parsed.path is None else relative(parsed.path, new)


def relative(path: Path, folder: Path) -> str:
    """A path as a recipe in `folder` writes it."""
    found = os.path.relpath(path, folder)
    return found if found.startswith("..") else f"./{found}"


def dump(data: dict[str, Any]) -> str:
    """Data as block-style YAML in the order given."""
    import io

    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 4096  # one value, one line
    out = io.StringIO()
    writer.dump(data, out)
    return out.getvalue()
