"""Which method, with which options, a recipe wants for which tensor, and why a choice cannot be carried out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_datavec.errors import InputError
from hf_datavec.methods import all_methods
from hf_datavec.recipe import AUTO, Merge, Override


def used(merge: Merge) -> list[str]:
    """The names of the methods that a recipe uses, sorted."""
    return sorted({_planned(merge), *(override.method for override in merge.overrides if override.method)})


def first_match(merge: Merge, name: str) -> Override:
    """The override that a tensor falls under, or an empty one."""
    for override in merge.overrides:
        if re.fullmatch(override.tensors, name):
            return override
    return Override(tensors=".*")


def chosen(merge: Merge, override: Override) -> tuple[str, Mapping[str, Any]]:
    """Method and options for the tensors of an override."""
    options = override.options if override.options is not None else merge.options
    if override.method and override.method != merge.method and override.options is None:
        options = {}  # options of one method mean nothing to another
    return override.method or _planned(merge), options


def _planned(merge: Merge) -> str:
    """The method of the recipe; for `auto` the one that it usually is, until the vectors have been looked at."""
    return "sum" if merge.method == AUTO else merge.method


def method_errors(merge: Merge, sites: Sequence[tuple[str, float]]) -> Iterator[InputError]:
    """Why the methods cannot merge these sites, given by name and weight."""
    for name in used(merge):
        if "features" in all_methods()[name].from_sites:
            continue  # images count alike, whatever the weights that other tensors are combined by
        if not all_methods()[name].uses_weights and len({weight for _, weight in sites}) > 1:
            given = ", ".join(f"{site}: {weight:g}" for site, weight in sites)
            hint = "use method: linear, or leave the weights out"
            yield InputError(f"the method '{name}' ignores weights, but they differ ({given})", hint=hint)
    told = []
    for override in (Override(tensors=".*"), *merge.overrides):
        name, options = chosen(merge, override)
        reason = all_methods()[name].refuse(len(sites), options)
        if reason and (name, reason) not in told:
            told.append((name, reason))
            yield InputError(f"the method '{name}' {reason}", hint="see `hf-datavec methods` for what it needs")


def override_errors(merge: Merge, names: Sequence[str]) -> Iterator[InputError]:
    """The overrides that none of the base's tensors fall under."""
    for override in merge.overrides:
        if not any(re.fullmatch(override.tensors, name) for name in names):
            hint = f"a pattern must match a whole name such as '{names[0]}'"
            yield InputError(f"the override '{override.tensors}' matches no tensor of the base", hint=hint)
