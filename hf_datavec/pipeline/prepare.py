"""From a recipe file to a plan: fetch what it names, and refuse what cannot be merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_datavec import hub, planning, sums
from hf_datavec import recipe as recipes
from hf_datavec.checkpoint import Checkpoint, open_checkpoint
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.hub import Fetched
from hf_datavec.images import ImageSet, open_images
from hf_datavec.plan import Contribution, Plan
from hf_datavec.recipe import Evaluate, LockedInput, Measured, ModelEntry, Recipe, VectorEntry
from hf_datavec.staging import refuse_existing
from hf_datavec.threads import import_ahead
from hf_datavec.tuned import fitted
from hf_datavec.vector import TunedDifferences, open_vector


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that it names at hand, and the plan made of it."""

    path: Path
    recipe: Recipe
    plan: Plan
    order: tuple[str, ...]  # the contributions' names as the recipe lists them
    text: str  # the recipe as it was when it was read

    @property
    def output(self) -> Path | None:
        """Where the recipe wants its result."""
        wanted = self.recipe.output
        return Path(os.path.normpath(self.folder / Path(wanted).expanduser())) if wanted else None

    @property
    def folder(self) -> Path:
        return self.path.absolute().parent


def prepare(path: Path, *, headers_only: bool = False) -> Prepared:
    """Read a recipe, fetch what it names and plan the merge; with `headers_only` no large file is downloaded.

    Raises: InputErrors with every reason why it cannot be done.
    """
    recipe, notes = recipes.load_with_notes(path)
    references = _references(recipe, path.absolute().parent)
    if not headers_only and any(reference.repo for reference in references):
        # Headers first: a refusal must not cost a download. Their commits then pin what is downloaded, so that
        # a branch which moves in between changes nothing.
        early = prepare(path, headers_only=True)
        by_name = {one.name: one.fetched for one in early.plan.contributions}
        seen = (early.plan.base_fetched, *(by_name[name] for name in early.order))
        references = tuple(_pinned(one.reference, one.commit) for one in seen)
    base = hub.fetch(references[0], headers_only=headers_only)
    with hub.naming(base):
        checkpoint = open_checkpoint(base.folder)
    if not headers_only and not sums.expected(recipe, checkpoint):
        import_ahead("torch")  # while digests are computed
    contributions, errors = _contributions(recipe, references[1:], checkpoint, headers_only)
    raise_all([*errors, *_reference_errors(recipe, path.absolute().parent, checkpoint)])
    with hub.naming(base, *(one.fetched for one in contributions)):
        made = planning.make(recipe, base, checkpoint, contributions)
    made = replace(made, notes=(*notes, *made.notes))
    order = tuple(one.name for one in contributions)
    return Prepared(path, recipe, made, order, path.read_text("utf-8"))


def _references(recipe: Recipe, folder: Path) -> tuple[hub.Reference, ...]:
    """The base's reference and the contributions', in the recipe's order."""
    base = hub.parse(recipe.base, relative_to=folder)
    return (base, *(_reference(entry, folder) for entry in recipe.entries))


def _reference_errors(recipe: Recipe, folder: Path, base: Checkpoint) -> Iterator[InputError]:
    """What is wrong with images and push targets, so that it is known before anything is computed."""
    restore = recipe.recalibrate
    judged = recipe.is_judged(has_statistics=base.has_statistics)
    if restore and not judged and not (base.has_statistics and restore.mode != "none"):
        restore = None  # nobody looks at these images then
    for section in (restore, recipe.merge.searched, recipe.evaluate):
        if section and section.images:
            try:
                found = hub.parse(section.images, relative_to=folder)
                if found.path is not None and not found.path.is_dir():
                    yield InputError(f"there is no folder '{found.path}'")
            except InputError as error:
                yield error
    if recipe.push:
        try:
            to = hub.parse(recipe.push.repo, relative_to=folder, revision=recipe.push.revision)
            if to.path is not None:
                refuse_existing(to.path)
        except InputError as error:
            yield error


def _pinned(reference: hub.Reference, commit: str | None) -> hub.Reference:
    return replace(reference, revision=commit) if reference.repo else reference


def judging_images(prepared: Prepared) -> ImageSet | None:
    """The public images that the recipe restores statistics on, or on which the sites' networks judge the fused one.

    Raises: InputError when they cannot be opened, are not those that the lock pins, or lack labels that a temperature
    is fitted to.
    """
    wanted, plan = prepared.recipe.recalibrate, prepared.plan
    if not plan.is_judged:
        return None
    images = _public(prepared)
    if wanted is not None and wanted.temperature == "labels" and plan.base.has_linear_head:
        try:
            images.label_rows(plan.labels)
        except InputError as error:
            hint = f"{error.hint}; or use temperature: ensemble, which looks at no label"
            raise InputError(error.problem, hint=hint) from None
    return images


def search_images(prepared: Prepared) -> ImageSet | None:
    """The labelled images of the recipe's search, if it has one.

    Raises: InputError when they cannot be opened, have labels that the model lacks, or are not what the lock pins.
    """
    wanted, lock = prepared.recipe.merge.searched, prepared.recipe.lock
    return _labelled(prepared, wanted, lock.search if lock else None, "search images") if wanted else None


def learning_images(prepared: Prepared) -> ImageSet | None:
    """The public images that coefficients are learned on, if a method learns and the lock does not know them yet.

    Raises: InputError when they cannot be opened, or are not those that the lock pins.
    """
    wanted, plan = prepared.recipe.recalibrate, prepared.plan
    learning = any(step.is_merged and step.method.learned for step in plan.steps)
    if wanted is None or wanted.images is None or not learning or plan.coefficients:
        return None
    return _public(prepared)


@dataclass(frozen=True)
class Images:
    """The images that a merge looks at: to judge and to restore, to measure, to search, to learn coefficients."""

    judged: ImageSet | None
    test: ImageSet | None
    labelled: ImageSet | None
    learning: ImageSet | None

    def public(self, plan: Plan) -> ImageSet | None:
        """Those that a plan restores on, if it does and the network has statistics to restore."""
        wanted = plan.recipe.recalibrate
        return self.judged if wanted and wanted.looks_at_images and plan.base.has_statistics else None


def open_all(prepared: Prepared) -> Images:
    """All images that a merge looks at. Raises: InputError when some cannot be opened, or are not those of the lock."""
    judged, test = judging_images(prepared), evaluation_images(prepared)
    return Images(judged, test, search_images(prepared), learning_images(prepared))


def _public(prepared: Prepared) -> ImageSet:
    wanted, lock = prepared.recipe.recalibrate, prepared.recipe.lock
    assert wanted is not None
    images = open_images(hub.parse(str(wanted.images), relative_to=prepared.folder), split=wanted.split)
    _refuse_unpinned(images, lock.calibration if lock else None, "calibration images")
    return images


def evaluation_images(prepared: Prepared) -> ImageSet | None:
    """The labelled images that the recipe measures the fused model on.

    Raises: InputError when they cannot be opened, have labels that the model lacks, or are not those of the lock.
    """
    wanted, lock = prepared.recipe.evaluate, prepared.recipe.lock
    return _labelled(prepared, wanted, lock.evaluation if lock else None, "test images") if wanted else None


def _labelled(prepared: Prepared, wanted: Evaluate | Measured, locked: LockedInput | None, what: str) -> ImageSet:
    images = open_images(hub.parse(wanted.images, relative_to=prepared.folder), split=wanted.split)
    images.label_rows(prepared.plan.labels)
    _refuse_unpinned(images, locked, what)
    return images


def _refuse_unpinned(images: ImageSet, locked: LockedInput | None, what: str) -> None:
    if locked and locked.digest != images.digest:
        raise planning.not_pinned(what, locked, images.digest)


def _contributions(
    recipe: Recipe, references: Sequence[hub.Reference], base: Checkpoint, headers_only: bool
) -> tuple[tuple[Contribution, ...], list[InputError]]:
    found, errors = [], []
    names = _names(recipe, references)
    for entry, name, reference in zip(recipe.entries, names, references, strict=True):
        try:
            fetched = hub.fetch(reference, headers_only=headers_only)
            with hub.naming(fetched):
                found.append(_contribution(entry, name, fetched, base))
        except InputError as error:  # the next sites may be wrong as well: tell all at once
            errors.append(error)
    return tuple(found), errors


def _names(recipe: Recipe, references: Sequence[hub.Reference]) -> list[str]:
    """A name for each contribution: as given, else the folder's or repo's own, made unique by its position."""
    given = [entry.name for entry in recipe.entries if entry.name]
    repeated = {name for name in given if given.count(name) > 1}
    if repeated:
        raise InputError(f"two vectors are named {listed(repeated)}", hint="give each vector a name of its own")
    names: list[str] = []
    for index, (entry, reference) in enumerate(zip(recipe.entries, references, strict=True), start=1):
        name = entry.name or reference.name
        alone = entry.name or sum(other.name == name for other in references) == 1
        names.append(name if alone and name not in names else f"{name}#{index}")
    return names


def _reference(entry: VectorEntry | ModelEntry, folder: Path) -> hub.Reference:
    text = entry.model if isinstance(entry, ModelEntry) else entry.vector
    return hub.parse(text, relative_to=folder, revision=entry.revision)


def _contribution(entry: VectorEntry | ModelEntry, name: str, fetched: Fetched, base: Checkpoint) -> Contribution:
    weight = 1.0 if entry.weight is None else entry.weight
    if isinstance(entry, ModelEntry):
        tuned = open_checkpoint(fetched.folder)
        source = TunedDifferences(base, fitted(str(fetched.folder), tuned.tensors, tuned.labels, base))
        return Contribution(name, fetched, source, weight, "" if fetched.hollow else tuned.tensors.digest)
    vector = open_vector(fetched.folder)
    return Contribution(name, fetched, vector, weight, vector.manifest.digest)
