"""A merge that an earlier run finished, when its push did not get through."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hf_datavec import candidates, fuse, head_scaling, tensors, variants
from hf_datavec import recipe as recipes
from hf_datavec.agreement import Agreement, Match
from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry, Gram
from hf_datavec.images import ImageSet
from hf_datavec.methods import all_methods
from hf_datavec.metrics import Estimate
from hf_datavec.pipeline import lock
from hf_datavec.pipeline.aliases import aliased
from hf_datavec.pipeline.confidence import given
from hf_datavec.pipeline.judging import AGREEMENT_FILE
from hf_datavec.pipeline.prepare import Prepared

EVALUATION_FILE = "evaluation.json"


def geometry_of(
    output: Path, prepared: Prepared, public: ImageSet | None, test: ImageSet | None, device: str
) -> Geometry | None:
    """The norms and cosines of a merge whose result already is in `output`; None when something else is, or nothing.

    It is the result when recipe and lock are those that this run would write, so that commits, digests and tools are
    the same, and every fused tensor is.
    """
    import torch

    if not (output / lock.RECIPE_FILE).is_file():
        return None
    texts = _texts(output, prepared, public, test)
    if not all(place.is_file() and place.read_bytes() == text.encode() for place, text in texts.items()):
        return None
    stored, gram = tensors.open_folder(output), Gram()
    # Statistics follow from the weights and the calibration images, whose digest is in the lock.
    fused = {step.name for step in prepared.plan.steps if step.role in (Role.WEIGHT, Role.HEAD)}
    if not fused <= set(stored.records):
        return None
    heads, temperature = prepared.plan.base.named(Role.HEAD), given(prepared.plan)
    for name, tensor in fuse.run(prepared.plan, only=fused, device=device, gram=gram):
        if temperature is not None and name in heads:
            tensor = head_scaling.divided(tensor, temperature)
        if not torch.equal(stored.read(name), tensor):
            return None
    return gram.geometry()


def temperature_of(output: Path, prepared: Prepared) -> float | Literal["none"]:
    """What the lock of an earlier run says that it scaled the confidence by; without a lock what the recipe says."""
    wanted = prepared.plan.recipe.recalibrate
    if wanted is None or wanted.temperature == "none":
        return "none"
    try:
        locked = recipes.load(lock.beside(prepared) if prepared.recipe.aliases else output / lock.LOCK_FILE)
    except InputError:
        return given(prepared.plan) or "none"
    found = locked.recalibrate.temperature if locked.recalibrate else "none"
    return "none" if isinstance(found, str) else found


def resolved(output: Path, prepared: Prepared) -> Prepared:
    """The recipe with what the lock of an earlier run in `output` says that `auto` chose; as it is without one."""
    place = lock.beside(prepared) if prepared.recipe.aliases else output / lock.LOCK_FILE
    try:
        found = recipes.load(place)
    except InputError:
        return prepared
    merge = {name: getattr(found.merge, name) for name in ("method", "scale", "options", "overrides")}
    plan = variants.with_merge(prepared.plan, prepared.plan.recipe.merge.model_copy(update=merge))
    names = [entry.name for entry in found.entries]
    if found.recalibrate is not None:
        plan = candidates.with_mode(plan, found.recalibrate.mode)
    if set(names) != set(prepared.order):
        return prepared
    if plan.recipe.merge.method in all_methods() and all_methods()[plan.recipe.merge.method].needs_counts:
        plan = variants.counted(plan)
    if any(entry.weight is not None for entry in found.entries):
        weights = {str(entry.name): 1.0 if entry.weight is None else entry.weight for entry in found.entries}
        plan = variants.weighted(plan, weights)
    return replace(prepared, plan=plan)


def _texts(output: Path, prepared: Prepared, public: ImageSet | None, test: ImageSet | None) -> dict[Path, str]:
    """The recipe and, unless the recipe itself is one, the lock that this run would write, by their places."""
    recipe = {output / lock.RECIPE_FILE: aliased(prepared).text}
    if prepared.recipe.aliases and prepared.recipe.lock:
        return recipe
    place = lock.beside(prepared) if prepared.recipe.aliases else output / lock.LOCK_FILE
    return {**recipe, place: lock.text(prepared, public, test, folder=place.parent)}


def evaluation_of(output: Path) -> Evaluation | None:
    """The metrics that the earlier run measured, if it was to."""
    place = output / EVALUATION_FILE
    if not place.is_file():
        return None
    found = json.loads(place.read_text("utf-8"))
    metrics = {
        name: Estimate(**{key: math.nan if value is None else value for key, value in numbers.items()})
        for name, numbers in found["metrics"].items()
    }
    return Evaluation(**{**found, "metrics": metrics})


def agreement_of(output: Path, names: Sequence[str]) -> Agreement | None:
    """How the earlier run's network related to the ensemble, if it was held against it; `names` are the sites'."""
    place = output / AGREEMENT_FILE
    if not place.is_file():
        return None
    found = json.loads(place.read_text("utf-8"))
    del found["caution"]  # it follows from the rest
    sites = tuple(_match(one) if one else None for one in found["sites"].values())
    mean = _match(found["mean"]) if found["mean"] else None
    # The file may have aliases in place of the names, in the same order.
    return Agreement(**{**found, "names": tuple(names), "fused": _match(found["fused"]), "mean": mean, "sites": sites})


def _match(numbers: Mapping[str, float | None]) -> Match:
    return Match(**{key: math.inf if value is None else value for key, value in numbers.items()})
