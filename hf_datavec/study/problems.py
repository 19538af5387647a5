"""What is wrong with a study file, in words and at its place."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from hf_datavec.located import Document, KeyPath, LocatedError
from hf_datavec.methods import all_methods
from hf_datavec.recipe import AUTO
from hf_datavec.recipe.problems import choice_problems, unknown_scale, value_at
from hf_datavec.study.sections import LOOK_AT_IMAGES, Combining, Study


def known_keys(path: KeyPath, _: Any) -> list[str]:
    """The keys that the mapping at `path` may have."""
    section: type[BaseModel] = Study
    for part in path:
        if isinstance(part, str):
            if part not in section.model_fields:
                return []
            found = _section(section.model_fields[part].annotation)
            if found is None:
                return []
            section = found
    return list(section.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section inside a field's type, such as `tuple[Combining, ...]` or `Relay | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section(part))), None)


def merge_problems(document: Document) -> Iterator[LocatedError]:
    """Unknown methods, and options that a method lacks or that are out of range, in the whole file."""
    merges = value_at(document.data, ("merges",))
    places: list[KeyPath] = [("merges", index) for index in range(len(merges) if isinstance(merges, list) else 0)]
    for path in [*places, ("relay", "merge"), ("heads", "merge")]:
        entry = value_at(document.data, path)
        if not isinstance(entry, dict):
            continue
        name = entry.get("method", Combining().method)
        if isinstance(name, str):
            yield from choice_problems(document, path, name)


def sense_problems(document: Document, study: Study) -> Iterator[LocatedError]:
    """What no single field can tell: keys that contradict or lack each other."""
    yield from _site_problems(document, study)
    held = study.test
    if (held.share is None) == (held.column is None):
        yield document.problem(("test",), "needs either 'share:' or 'column:' with 'values:'", at="key")
    if (held.column is None) != (held.values is None):
        yield document.problem(("test",), "'column:' and 'values:' belong together", at="key")
    if (study.public.share is None) == (study.public.images is None):
        hint = "share: 0.1 holds images of the same kind back; images: names another data set"
        yield document.problem(("public",), "needs either 'share:' or 'images:'", at="key", hint=hint)
    if (held.share or 0) + (study.public.share or 0) >= 1:
        yield document.problem(("public", "share"), "test and public images leave none for the sites")
    yield from _public_problems(document, study)
    yield from _choice_problems(document, study)


def _public_problems(document: Document, study: Study) -> Iterator[LocatedError]:
    names = [one.name for one in study.more_public]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield document.problem(("more_public", index, "name"), f"'{name}' is given twice")
    if names and not set(study.restore) & set(LOOK_AT_IMAGES):
        hint = f"add one of {', '.join(LOOK_AT_IMAGES)} to restore:, or leave the images out"
        yield document.problem(("more_public",), "no mode of 'restore:' looks at images", at="key", hint=hint)


def _site_problems(document: Document, study: Study) -> Iterator[LocatedError]:
    sites = study.sites
    wanted = {"column": sites.column, "dirichlet": sites.alpha, "scanners": sites.scanners}
    keys = {"column": "column", "dirichlet": "alpha", "scanners": "scanners"}
    for make, value in wanted.items():
        if sites.make == make and value is None:
            yield document.problem(("sites",), f"make: {make} needs '{keys[make]}:'", at="key")
        if sites.make != make and value is not None:
            hint = f"remove it, or use make: {make}"
            problem = f"is for make: {make}, but this is make: {sites.make}"
            yield document.problem(("sites", keys[make]), problem, at="key", hint=hint)
    for key, given in (("shares", sites.shares), ("scanners", sites.scanners)):
        if given is not None and len(given) != sites.count and sites.make != "column":
            yield document.problem(("sites", key), f"{len(given)} entries for {sites.count} sites")
    if sites.shares is not None and sites.make in ("column", "dirichlet"):
        yield document.problem(("sites", "shares"), f"make: {sites.make} decides how large sites are", at="key")


def _choice_problems(document: Document, study: Study) -> Iterator[LocatedError]:
    repeated = [seed for seed in study.seeds if study.seeds.count(seed) > 1]
    if repeated:
        yield document.problem(("seeds",), f"the seed {repeated[0]} is given twice")
    names: list[str] = []
    for index, one in enumerate(study.merges):
        if one.name in names:
            yield document.problem(("merges", index), f"'{one.name}' is given twice")
        names.append(one.name)
        yield from _merge_problems(document, study, ("merges", index), one)
    if study.heads:
        wrong = "steps" if study.heads.fit == "least_squares" else "target"
        told = {"steps": "heads by least squares take no steps", "target": "heads by steps aim at no output"}[wrong]
        if wrong in study.heads.model_fields_set:
            yield document.problem(("heads", wrong), told, hint="leave it out")
    if "rounds" in study.budgets and not (study.relay and study.relay.epochs):
        problem = "'rounds' are the epochs of all rounds of 'relay:', which does not say how many each has"
        yield document.problem(("budgets",), problem, hint="add relay: {epochs: ...}, or leave 'rounds' out")
    if study.start and study.training.probe_steps:
        yield document.problem(
            ("training", "probe_steps"), "would throw away the heads of 'start:'", hint="leave it out"
        )
    if study.relay and study.relay.heads and not study.heads:
        hint = "add heads: {...}, which says how heads are fitted"
        yield document.problem(("relay", "heads"), "needs 'heads:'", hint=hint)
    for key, later in (("relay", study.relay), ("heads", study.heads)):
        if later:
            yield from _merge_problems(document, study, (key, "merge"), later.merge)


def _merge_problems(document: Document, study: Study, path: KeyPath, merge: Combining) -> Iterator[LocatedError]:
    """What would stop the merge after hours of training."""
    found = all_methods().get(merge.method)
    if merge.scale == AUTO and found is not None and found.learned:
        yield document.problem((*path, "scale"), unknown_scale(merge.method))
    if merge.method == AUTO and merge.weights != "equal":
        problem = "method: auto chooses how sites are weighed as well"
        yield document.problem((*path, "weights"), problem, at="key", hint="leave it out, or name a method")
    if found is None:
        return
    where = (*path, "method")
    if found.learned or found.from_sites:
        hint = "merge the kept vectors with a recipe for it: hf-datavec merge RECIPE"
        yield document.problem(where, f"a study has no images to learn '{merge.method}' on", hint=hint)
    # How many sites a column makes is known when the images are.
    reason = found.refuse(study.sites.count, merge.options) if study.sites.make != "column" else None
    if reason:
        yield document.problem(where, f"the method '{merge.method}' {reason}")
    if merge.weights == "examples" and not found.uses_weights:
        problem = f"the method '{merge.method}' ignores weights"
        yield document.problem((*path, "weights"), problem, hint="use method: linear, or leave the weights out")
