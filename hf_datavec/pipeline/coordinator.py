"""A coordinator's steps: plan, merge, restore, measure, describe, hand over."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import evaluate as evaluation
from hf_datavec import hub, merge as fusing, models, plan as planning, recalibrate, recipe as recipes, report, study_base, tensors
from hf_datavec.card import Fusion, fused_card
from hf_datavec.checkpoint import Checkpoint, open_checkpoint
from hf_datavec.errors import InputError, raise_all
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry, Gram
from hf_datavec.hub import Fetched
from hf_datavec.images import ImageSet, open_images
from hf_datavec.pipeline import device as devices
from hf_datavec.pipeline import lock
from hf_datavec.plan import Contribution, Plan
from hf_datavec.progress import progress
from hf_datavec.recipe import ModelEntry, Recipe, VectorEntry
from hf_datavec.staging import refuse_existing, staged
from hf_datavec.tuned import fitted
from hf_datavec.vector import TaskVector, TunedDifferences, open_vector

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

LOCK_FILE = "recipe.lock.yaml"


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


@dataclass(frozen=True)
class MergeResult:
    """Where the fused model lies, what it is, and how well it does."""

    output: Path
    plan: Plan
    digest: str
    geometry: Geometry
    restoration: str
    evaluation: Evaluation | None
    pushed_to: str | None


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


def _contributions(
    recipe: Recipe, folder: Path, base: Checkpoint
) -> tuple[tuple[Contribution, ...], list[InputError]]:
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


def write_lock(prepared: Prepared) -> Path:
    """Write the lock beside the recipe and return its path."""
    target = prepared.folder / f"{prepared.path.stem.removesuffix('.lock')}.lock.yaml"
    content = lock.text(prepared.plan, prepared.order, recipe_folder=prepared.folder, folder=target.parent)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(content, "utf-8")
    partial.replace(target)
    return target


def merge(
    path: Path, *, output: Path | None = None, push: bool = True, device: devices.Device = "auto"
) -> MergeResult:
    """Do what a recipe says, from pulling to pushing.

    Raises: InputError before anything is written; after that the output appears whole or not at all.
    """
    prepared = prepare(path)
    output = _output(prepared, output)
    refuse_existing(output)
    public, test = _image_sets(prepared)
    for note in prepared.plan.notes:
        log.info("note: %s", note)
    for one in prepared.plan.contributions:
        if isinstance(one.source, TaskVector):
            one.source.verify()
    place = devices.choose(device)
    gram = Gram()
    with staged(output) as folder:
        digest = _write_weights(prepared.plan, folder, place, gram)
        study_base.copy_description(prepared.plan.base, folder, prepared.plan.labels)
        restoration, digest = _restore(prepared.plan, folder, public, place, digest)
        measured = _measure(prepared.recipe, folder, test, place)
        _describe(prepared, folder, output, gram.geometry(), restoration, measured)
    target = _pushed(prepared, output) if push and prepared.recipe.push else None
    return MergeResult(output, prepared.plan, digest, gram.geometry(), restoration, measured, target)


def _output(prepared: Prepared, output: Path | None) -> Path:
    if output is not None:
        return output.absolute()
    if prepared.recipe.output is None:
        raise InputError(f"{prepared.path.name}: no 'output:' is given", hint="add output: ./fused, or use -o DIR")
    return (prepared.folder / Path(prepared.recipe.output).expanduser()).resolve()


def _image_sets(prepared: Prepared) -> tuple[ImageSet | None, ImageSet | None]:
    """The calibration and test images, opened before anything is written, so that mistakes show early."""
    restore, test = prepared.recipe.recalibrate, prepared.recipe.evaluate
    public = measured = None
    if restore and restore.mode == "statistics" and prepared.plan.base.has_statistics:
        public = open_images(hub.parse(str(restore.images), relative_to=prepared.folder), split=restore.split)
    if test:
        measured = open_images(hub.parse(test.images, relative_to=prepared.folder), split=test.split)
        measured.label_rows(prepared.plan.labels)
    return public, measured


def _write_weights(plan: Plan, folder: Path, device: torch.device, gram: Gram) -> str:
    """Write the fused tensors into the same files as the base has; returns the content digest."""
    by_file: dict[str, list[tensors.Record]] = {}
    for step in plan.steps:
        by_file.setdefault(step.record.file.name, []).append(step.record)
    hashes = []
    for file, records in sorted(by_file.items()):
        stream = fusing.run(plan, only={record.name for record in records}, device=device, observe=gram.add)
        shown = progress(stream, text=f"merge {file}", total=len(records), unit="tensor")
        hashes += tensors.write_file(folder / file, records, shown)
    if list(by_file) != [tensors.MODEL_FILE]:
        _write_index(plan, folder, by_file)
    return tensors.combined_digest(hashes)


def _write_index(plan: Plan, folder: Path, by_file: dict[str, list[tensors.Record]]) -> None:
    places = {record.name: file for file, records in by_file.items() for record in records}
    index = {"metadata": {"total_size": plan.write_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / tensors.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _restore(
    plan: Plan, folder: Path, public: ImageSet | None, device: torch.device, digest: str
) -> tuple[str, str]:
    """Restore BatchNorm statistics in the written folder; returns a sentence and the new content digest."""
    wanted = plan.recipe.recalibrate
    if not plan.base.has_statistics:
        models.refuse_unloadable(folder)
        return "The network has no BatchNorm, so no statistics needed restoring.", digest
    if wanted is None or wanted.mode == "none":
        models.refuse_unloadable(folder)
        return "BatchNorm statistics are the base's.", digest
    if public is not None:
        network = models.load(folder, device=device)
        count = min(wanted.count, len(public))
        layers = _measure_statistics(network, public, count, wanted.batch_size)
        restored = models.stored_statistics(network)
        text = f"The statistics of {layers} BatchNorm layers were re-estimated on {count} images of `{public.text}`."
    else:
        restored = recalibrate.moments(plan.base, plan.contributions)
        text = f"The statistics of {len(restored) // 2} BatchNorm layers were combined from the sites' own."
    stored = tensors.open_folder(folder)
    before = {name: plan.base.tensors.read(name) for name in restored}
    tensors.overwrite(stored.records, restored)
    models.refuse_unloadable(folder)
    log.info("BatchNorm means moved by up to %.1f standard deviations of the base's", recalibrate.largest_change(before, restored))
    return text, tensors.open_folder(folder).digest


def _measure_statistics(network: models.Network, public: ImageSet, count: int, batch_size: int) -> int:
    # Evenly spread, since folders list one class after the other.
    chosen = [index * len(public) // count for index in range(count)]
    with_bar = progress(range(count), text="recalibrate", total=count, unit="image")

    def load(indices: object) -> torch.Tensor:
        return public.tensors(network.preprocess, [chosen[index] for index in indices])  # type: ignore[attr-defined]

    def notify(images: int) -> None:
        for _ in range(images):
            next(with_bar, None)

    return recalibrate.statistics(network, load, count=count, batch_size=batch_size, notify=notify)


def _measure(recipe: Recipe, folder: Path, images: ImageSet | None, device: torch.device) -> Evaluation | None:
    if images is None or recipe.evaluate is None:
        return None
    network = models.load(folder, device=device)
    return evaluation.evaluate_network(network, images, batch_size=recipe.evaluate.batch_size)


def _describe(
    prepared: Prepared, folder: Path, output: Path, geometry: Geometry, restoration: str, measured: Evaluation | None
) -> None:
    """Write recipe, lock, plot, results and card beside the weights."""
    content = prepared.path.read_text("utf-8")
    (folder / "recipe.yaml").write_text(content, "utf-8")
    locked = lock.text(prepared.plan, prepared.order, recipe_folder=prepared.folder, folder=output)
    (folder / LOCK_FILE).write_text(locked, "utf-8")
    plots: tuple[tuple[str, str], ...] = ()
    if len(geometry.norms) > 1:
        names = [one.name for one in prepared.plan.contributions]
        report.plot_cosines(names, geometry, folder / "cosines.png")
        plots = (("cosines.png", "Cosines between the sites' vectors"),)
    if measured:
        text = json.dumps(measured.as_dict(), indent=2)
        (folder / "evaluation.json").write_text(text + "\n", "utf-8")
    fusion = Fusion(output.name, prepared.plan, geometry, restoration, measured, content, plots)
    (folder / "README.md").write_text(fused_card(fusion), "utf-8")


def _pushed(prepared: Prepared, output: Path) -> str:
    wanted = prepared.recipe.push
    assert wanted is not None
    to = hub.parse(wanted.repo, relative_to=prepared.folder)
    names = ", ".join(prepared.order)
    return hub.push(output, to, private=wanted.private, message=f"Fuse {names} by {prepared.recipe.merge.method}")


def evaluate(
    model: str, images: str, *, split: str | None = None, batch_size: int = 64, device: devices.Device = "auto"
) -> Evaluation:
    """Measure a model on labelled images. Raises: InputError, see `evaluate.predict`."""
    pictures = open_images(hub.parse(images), split=split)
    folder = hub.fetch(hub.parse(model)).folder
    pictures.label_rows(open_checkpoint(folder).labels)
    network = models.load(folder, device=devices.choose(device))
    return evaluation.evaluate_network(network, pictures, batch_size=batch_size)


@dataclass(frozen=True)
class Inspection:
    """Vectors side by side."""

    vectors: tuple[tuple[Fetched, TaskVector], ...]
    geometry: Geometry


def inspect(references: list[str], *, plot: Path | None = None) -> Inspection:
    """Norms and cosines of vectors over the weights that all of them hold.

    Raises: InputError for vectors of different networks.
    """
    fetched = [hub.fetch(hub.parse(text)) for text in references]
    vectors = [(one, open_vector(one.folder)) for one in fetched]
    first = vectors[0][1]
    names = [name for name, entry in first.manifest.stored.items() if entry.role == "weight"]
    for one, vector in vectors[1:]:
        shapes = {name: entry.shape for name, entry in vector.manifest.stored.items()}
        if any(shapes.get(name) != first.manifest.tensors[name].shape for name in names):
            raise InputError(f"the vectors '{first.folder}' and '{one.folder}' belong to different networks")
    geometry = _geometry([vector for _, vector in vectors], names)
    if plot is not None:
        refuse_existing(plot)
        report.plot_cosines([one.reference.name for one in fetched], geometry, plot)
    return Inspection(tuple(vectors), geometry)


def _geometry(vectors: list[TaskVector], names: list[str]) -> Geometry:
    import torch

    gram = Gram()
    for name in progress(sorted(names), text="inspect", total=len(names), unit="tensor"):
        gram.add(torch.stack([vector.read(name).reshape(-1) for vector in vectors]))
    return gram.geometry()
