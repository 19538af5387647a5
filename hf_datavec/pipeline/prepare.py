"""From a recipe file to a plan: fetch what it names, and refuse what cannot be merged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hf_datavec import hub
from hf_datavec import plan as planning
from hf_datavec import recipe as recipes
from hf_datavec.checkpoint import Checkpoint, open_checkpoint
from hf_datavec.errors import InputError, raise_all
from hf_datavec.images import ImageSet, open_images
from hf_datavec.plan import Contribution, Plan
from hf_datavec.recipe import ModelEntry, Recipe, VectorEntry
from hf_datavec.tuned import fitted
from hf_datavec.vector import TunedDifferences, open_vector


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that it names at hand, and the plan made of it."""

    path: Path
    recipe: Recipe
    plan: Plan
    order: tuple[str, ...]  # the contributions' names as the recipe lists them

    @property
    def folder(self) -> Path:
        return self.path.absolute().parent


def prepare(path: Path) -> Prepared:
    """Read a recipe, fetch what it names and plan the merge.

    Raises: InputErrors with every reason why it cannot be done.
    """
    recipe = recipes.load(path)
    folder = path.absolute().parent
    base = hub.fetch(hub.parse(recipe.base, relative_to=folder))
    checkpoint = open_checkpoint(base.folder)
    contributions, errors = _contributions(recipe, folder, checkpoint)
    raise_all(errors)
    made = planning.make(recipe, base, checkpoint, contributions)
    return Prepared(path, recipe, made, tuple(one.name for one in contributions))


def calibration_images(prepared: Prepared) -> ImageSet | None:
    """The public images that the recipe restores BatchNorm statistics on, if it does and the network has any.

    Raises: InputError when they cannot be opened, or are not those that the lock pins.
    """
    wanted, lock = prepared.recipe.recalibrate, prepared.recipe.lock
    if wanted is None or wanted.mode != "statistics" or not prepared.plan.base.has_statistics:
        return None
    images = open_images(hub.parse(str(wanted.images), relative_to=prepared.folder), split=wanted.split)
    if lock and lock.calibration and lock.calibration.digest != images.digest:
        raise planning.not_pinned("calibration images", lock.calibration, images.digest)
    return images


def _contributions(recipe: Recipe, folder: Path, base: Checkpoint) -> tuple[tuple[Contribution, ...], list[InputError]]:
    found, errors = [], []
    names = _names(recipe, folder)
    for entry, name in zip(recipe.entries, names, strict=True):
        try:
            found.append(_contribution(entry, name, folder, base))
        except InputError as error:  # the next sites may be wrong as well: tell all at once
            errors.append(error)
    return tuple(found), errors


def _names(recipe: Recipe, folder: Path) -> list[str]:
    """A name for each contribution: as given, else the folder's or repo's own, made unique by its position."""
    parsed = [_reference(entry, folder) for entry in recipe.entries]
    names = [entry.name or reference.name for entry, reference in zip(recipe.entries, parsed, strict=True)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}#{index + 1}" for index, name in enumerate(names)]


def _reference(entry: VectorEntry | ModelEntry, folder: Path) -> hub.Reference:
    text = entry.model if isinstance(entry, ModelEntry) else entry.vector
    return hub.parse(text, relative_to=folder, revision=entry.revision)


def _contribution(entry: VectorEntry | ModelEntry, name: str, folder: Path, base: Checkpoint) -> Contribution:
    fetched = hub.fetch(_reference(entry, folder))
    weight = 1.0 if entry.weight is None else entry.weight
    if isinstance(entry, ModelEntry):
        tuned = open_checkpoint(fetched.folder)
        source = TunedDifferences(base, fitted(str(fetched.folder), tuned.tensors, tuned.labels, base))
        return Contribution(name, fetched, source, weight, tuned.tensors.digest)
    vector = open_vector(fetched.folder)
    return Contribution(name, fetched, vector, weight, vector.manifest.digest)
