"""The merge: plan, fuse, restore, measure, describe, hand over."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import automatic, fuse, hub, lineage, models, report, study_base, tensors, variants
from hf_datavec import evaluate as evaluation
from hf_datavec import survey as surveys
from hf_datavec.card import Fusion, fused_card
from hf_datavec.errors import InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry, Gram
from hf_datavec.images import ImageSet
from hf_datavec.lineage import Round
from hf_datavec.pipeline import choosing, finished, lock
from hf_datavec.pipeline import device as devices
from hf_datavec.pipeline import restore as restoring
from hf_datavec.pipeline.adapting import adapt
from hf_datavec.pipeline.aliases import aliased
from hf_datavec.pipeline.choosing import Choice, Chooser
from hf_datavec.pipeline.prepare import (
    Prepared,
    calibration_images,
    evaluation_images,
    learning_images,
    prepare,
    search_images,
)
from hf_datavec.plan import Plan
from hf_datavec.progress import progress
from hf_datavec.search import Search
from hf_datavec.staging import refuse_existing, staged
from hf_datavec.threads import import_ahead
from hf_datavec.vector import TaskVector

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


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
    search: Search | None = None


def merge(path: Path, *, output: Path | None = None, push: bool = True, device: devices.Device = "auto") -> MergeResult:
    """Do what a recipe says, from pulling to pushing.

    A run whose push failed can be run again: when the output already is what this recipe gives, it is only pushed.

    Raises: InputError before anything is written; after that the output appears whole or not at all.
    """
    prepared = prepare(path)
    output = _output(prepared, output)
    pushing = push and prepared.recipe.push is not None
    if not pushing:
        refuse_existing(output)
    # Opened before anything is written, so that mistakes show early.
    public, test = calibration_images(prepared), evaluation_images(prepared)
    labelled, learning = search_images(prepared), learning_images(prepared)
    _verify(prepared.plan)
    place = devices.choose(device)
    resolved, why = automatic.resolve(prepared.plan)
    prepared = replace(prepared, plan=resolved)
    if why:
        log.info("%s", why)
    if pushing and (geometry := finished.geometry_of(output, prepared, public, test, place)):
        return _handed_over(prepared, output, geometry)
    refuse_existing(output)
    chosen = restoring.decide(prepared.plan, public, place)
    gram, recipe = Gram(), prepared.recipe
    with staged(output) as folder:
        if len(prepared.order) > 1:
            import_ahead(*report.LIBRARIES)
        study_base.copy_description(prepared.plan.base, folder, prepared.plan.labels, dtype=recipe.dtype)

        def make(plan: Plan, writing: Plan, seen: Gram) -> tuple[str, str]:
            digest = _write_weights(writing, folder, place, seen)
            return restoring.restore(plan, folder, public, chosen, digest)

        plan, adapted = prepared.plan, None
        if learning is not None:
            _write_weights(variants.scaled(plan, 1.0) if recipe.merge.searched else plan, folder, place, Gram())
            plan, adapted = adapt(plan, learning, folder, device=place)
        choice = Choice(plan, plan)
        if labelled is not None:
            choice = Chooser(labelled, folder, make, place).choose(plan, gram)
        prepared = replace(prepared, plan=choice.plan)
        # A combination at hand is made of vectors that `gram` has seen already.
        restoration, digest = make(choice.plan, choice.writing, gram if choice.writing is choice.plan else Gram())
        choosing.clear(folder)
        restoration = " ".join(filter(None, (why, adapted.text if adapted else "", restoration)))
        measured = _measure(choice.plan, folder, test, place)
        calibration = public.fetched if public else None
        shown = aliased(prepared)
        rounds = _rounds(prepared, restoration)
        lineage.write(folder, rounds)
        fusion = Fusion(output.name, shown.plan, gram.geometry(), restoration, measured, shown.text, calibration)
        sites = tuple(one.name for one in shown.plan.contributions)
        fusion = replace(fusion, rounds=rounds)
        fusion = replace(fusion, search=replace(choice.search, sites=sites) if choice.search else None)
        if adapted is not None:
            replace(adapted, sites=sites).write(folder)
        _describe(fusion, folder)
        if fusion.locked:
            locked = lock.text(prepared, public or learning, test, labelled, folder=output)
            (folder / lock.LOCK_FILE).write_text(locked, "utf-8")
        elif not prepared.recipe.lock:
            log.info("the lock, which names the sites, is beside the recipe: %s", lock.write(prepared, test))
    target = _pushed(prepared, output) if pushing else None
    return MergeResult(output, choice.plan, digest, gram.geometry(), restoration, measured, target, choice.search)


def _verify(plan: Plan) -> None:
    """Tell the plan's notes, and hold every vector against its manifest. Raises: InputError when one differs."""
    for note in plan.notes:
        log.info("note: %s", note)
    for one in plan.contributions:
        if isinstance(one.source, TaskVector):
            one.source.verify()


def _handed_over(prepared: Prepared, output: Path, geometry: Geometry) -> MergeResult:
    """Push what an earlier run left complete, and tell of it what that run would have told."""
    log.info("'%s' already holds this merge; only the push is missing", output)
    digest, measured = tensors.open_folder(output).digest, finished.evaluation_of(output)
    sentence = "The fused model was complete before; this run only pushed it."
    return MergeResult(output, prepared.plan, digest, geometry, sentence, measured, _pushed(prepared, output))


def _output(prepared: Prepared, output: Path | None) -> Path:
    if output is not None:
        return output.expanduser().absolute()
    if prepared.output is None:
        raise InputError(f"{prepared.path.name}: no 'output:' is given", hint="add output: ./fused, or use -o DIR")
    return prepared.output


def _write_weights(plan: Plan, folder: Path, device: torch.device, gram: Gram) -> str:
    """Write the fused tensors into the same files as the base has; returns the content digest."""
    by_file: dict[str, list[tensors.Record]] = {}
    for step in plan.steps:
        by_file.setdefault(step.record.file.name, []).append(step.record)
    hashes, survey = [], surveys.take(plan)
    for note in survey.notes(plan):
        log.info("note: %s", note)
    for file, records in sorted(by_file.items()):
        only = {record.name for record in records}
        (folder / file).unlink(missing_ok=True)  # a search writes again what a network may still have mapped
        stream = fuse.pieces(plan, only=only, device=device, gram=gram, survey=survey)
        shown = progress(stream, text=f"merge {file}", unit="piece")
        hashes += tensors.write_file(folder / file, records, shown)
    if list(by_file) != [tensors.MODEL_FILE]:
        _write_index(plan, folder, by_file)
    return tensors.combined_digest(hashes)


def _rounds(prepared: Prepared, restoration: str) -> tuple[Round, ...]:
    """The merges behind the fused model: those behind its base, and this one."""
    plan = prepared.plan
    merge, base = plan.recipe.merge, plan.base_fetched.reference.identity
    return (
        *lineage.read(plan.base.folder),
        Round(
            base=base,
            digest=plan.base.tensors.digest,
            sites=len(plan.contributions),
            method=merge.method,
            scale=merge.factor,
            restoration=restoration,
        ),
    )


def _write_index(plan: Plan, folder: Path, by_file: dict[str, list[tensors.Record]]) -> None:
    places = {record.name: file for file, records in by_file.items() for record in records}
    index = {"metadata": {"total_size": plan.write_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / tensors.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _measure(plan: Plan, folder: Path, images: ImageSet | None, device: torch.device) -> Evaluation | None:
    """The metrics of the written model, loaded as its users will load it; without images it is only held to the plan.

    A network that was restored has been loaded by then. Else the files have the names, shapes and types of the base,
    which its users load already, and no framework needs to be started to see that.
    """
    if images is None or plan.recipe.evaluate is None:
        models.refuse_other_tensors(folder, {step.name: step.record for step in plan.steps}, plan.labels)
        return None
    network = models.load(folder, device=device)
    return evaluation.evaluate_network(network, images, batch_size=plan.recipe.evaluate.batch_size)


def _describe(fusion: Fusion, folder: Path) -> None:
    """Write recipe, plot, results and card beside the weights."""
    (folder / lock.RECIPE_FILE).write_text(fusion.recipe, "utf-8")
    if len(fusion.geometry.norms) > 1:
        names = [one.name for one in fusion.plan.contributions]
        report.plot_cosines(names, fusion.geometry, folder / "cosines.png")
        fusion = replace(fusion, plots=(("cosines.png", "Cosines between the sites' vectors"),))
    if fusion.search:
        text = json.dumps(fusion.search.as_dict(), indent=2)
        (folder / "search.json").write_text(text + "\n", "utf-8")
    if fusion.evaluation:
        text = json.dumps(fusion.evaluation.as_dict(), indent=2)
        (folder / finished.EVALUATION_FILE).write_text(text + "\n", "utf-8")
    (folder / "README.md").write_text(fused_card(fusion), "utf-8")


def _pushed(prepared: Prepared, output: Path) -> str:
    wanted = prepared.recipe.push
    assert wanted is not None
    to = hub.parse(wanted.repo, relative_to=prepared.folder, revision=wanted.revision)
    message = f"Fuse {len(prepared.order)} task vectors by {prepared.recipe.merge.method}"
    return hub.push(output, to, private=wanted.private, message=message, create_pr=wanted.create_pr)
