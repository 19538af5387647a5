"""The merge: plan, fuse, restore, measure, describe, hand over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import automatic, candidates, hub, models, processes, study_base, tensors, variants
from hf_datavec import evaluate as evaluation
from hf_datavec.agreement import Agreement
from hf_datavec.errors import InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry, Gram
from hf_datavec.images import ImageSet
from hf_datavec.pipeline import confidence, deciding, describing, distilling, finished, judging, ledger, weights
from hf_datavec.pipeline import device as devices
from hf_datavec.pipeline import restore as restoring
from hf_datavec.pipeline.adapting import adapt
from hf_datavec.pipeline.aliases import aliases
from hf_datavec.pipeline.choosing import Choice, Chooser
from hf_datavec.pipeline.confidence import Scaled
from hf_datavec.pipeline.judging import Judge
from hf_datavec.pipeline.prepare import Images, Prepared, open_all, prepare
from hf_datavec.pipeline.trying import Tried
from hf_datavec.pipeline.verification import Verification, verifying
from hf_datavec.plan import Plan
from hf_datavec.search import Search
from hf_datavec.staging import partial_path, refuse_existing, staged
from hf_datavec.threads import import_ahead
from hf_datavec.verdict import Verdict

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
    temperature: float | None = None
    agreement: Agreement | None = None
    verdict: Verdict | None = None


def merge(path: Path, *, output: Path | None = None, push: bool = True, device: devices.Device = "auto") -> MergeResult:
    """Do what a recipe says, from pulling to pushing.

    A run whose push failed can be run again: when the output already is what this recipe gives, it is only pushed.

    Raises: InputError before anything is written, but for what only the tensors tell; the output appears whole or not
    at all.
    """
    if processes.count() > 1:
        devices.choose(device)  # where they meet: from here on an error in one of them ends all
    prepared = processes.first_on_each_machine(lambda: prepare(path))
    output = _output(prepared, output)
    pushing = push and prepared.recipe.push is not None
    if not pushing:
        processes.on_main(lambda: refuse_existing(output))
    # Opened before anything is written, so that mistakes show early.
    images = processes.first_on_each_machine(lambda: open_all(prepared))
    for note in prepared.plan.notes:
        log.info("note: %s", note)
    place = devices.choose(device)
    if not pushing:
        processes.on_main(lambda: _refuse_hopeless(prepared.plan, output))
    with verifying(prepared.plan) as vectors:
        return _merged(prepared, images, (output, place), pushing=pushing, vectors=vectors)


def _merged(
    prepared: Prepared,
    images: Images,
    where: tuple[Path, str],
    *,
    pushing: bool,
    vectors: Verification,
) -> MergeResult:
    """Make the fused model, or find it made, and hand it over; nothing appears before all vectors are verified."""
    output, place = where
    # One process decides, since a number on an edge may fall to either side on another machine.
    by_agreement = candidates.wanted(prepared.plan)
    decided = None if by_agreement else processes.on_main(lambda: automatic.decide(prepared.plan))
    resolved, why = automatic.applied(prepared.plan, decided)
    prepared = replace(prepared, plan=resolved)
    if why:
        log.info("%s", why)
    if pushing:
        before = finished.resolved(output, prepared) if by_agreement else prepared
        scaled = processes.on_main(lambda: finished.temperature_of(output, before))
        before = replace(before, plan=variants.tempered(before.plan, scaled))
        geometry = processes.on_main(lambda: finished.geometry_of(output, before, images.judged, images.test, place))
        if geometry is not None:
            vectors.wait()
            return _handed_over(before, output, geometry)
        processes.on_main(lambda: _refuse_hopeless(prepared.plan, output))
    result = _made(prepared, why, images, where, vectors)
    return replace(result, pushed_to=processes.on_main(lambda: _pushed(prepared, output))) if pushing else result


def _refuse_hopeless(plan: Plan, output: Path) -> None:
    refuse_existing(output)
    weights.refuse_too_large(plan, output, partial_path(output))


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """The staging folder, made and renamed by the main process, seen by all."""
    with contextlib.ExitStack() as stack:
        folder = processes.on_main(lambda: stack.enter_context(staged(output, keep_unfinished=ledger.worth_keeping)))
        processes.on_main(lambda: ledger.tidy(folder))
        yield folder
        processes.on_main(lambda: ledger.forget(folder))
        processes.on_main(stack.close)


def _made(prepared: Prepared, why: str, images: Images, where: tuple[Path, str], vectors: Verification) -> MergeResult:
    """Fuse, restore, measure and describe into an output on a device; it appears whole or not at all."""
    output, place = where
    meanwhile = partial(import_ahead, *describing.LIBRARIES)
    gram, recipe = Gram(), prepared.recipe
    # Before anything is written, unless the mode is what has to be found.
    chosen = None if candidates.wanted(prepared.plan) else _decide(prepared.plan, images, place)
    judge, verdict = _judge(prepared.plan, images, place), None
    distilling.refuse(prepared.plan, judge)
    with _staged(output) as folder:
        processes.on_main(
            lambda: study_base.copy_description(prepared.plan.base, folder, prepared.plan.labels, dtype=recipe.dtype)
        )
        if chosen is None:
            decided, verdict = deciding.decided(prepared.plan, judge, folder, place)
            prepared = replace(prepared, plan=decided)
            why = replace(verdict, names=aliases(prepared, verdict.names)).text if verdict else why
        chosen, public = chosen or _decide(prepared.plan, images, place), images.public(prepared.plan)
        if judge is not None:
            judge.spares(chosen)
        # Only a merge in one go leaves weights that a next run would make again.
        resume = recipe.merge.searched is None and images.learning is None
        if not resume:
            vectors.begin()
        looked_at = any(one is not None for one in (images.judged, images.test, recipe.push))
        again = not resume or chosen.mode != "none" or looked_at

        def make(plan: Plan, writing: Plan, seen: Gram) -> tuple[str, str]:
            trusted = vectors if resume else None
            digest = weights.write(writing, folder, place, seen, resume=trusted, read_again=again, meanwhile=meanwhile)
            return restoring.restore(plan, folder, public, chosen, digest)

        def restored(plan: Plan, network: models.Network) -> Mapping[str, torch.Tensor]:
            return restoring.restored(plan, network, public, chosen)

        plan, adapted = prepared.plan, None
        if images.learning is not None:
            start = variants.scaled(plan, 1.0) if recipe.merge.searched else plan
            weights.write(start, folder, place, Gram())
            learning = images.learning
            adapted = processes.on_main(lambda: adapt(plan, learning, folder, device=place))
            plan = replace(plan, coefficients=adapted.learned.coefficients)
        choice = Choice(plan, plan)
        if images.labelled is not None:
            tried = Tried(folder, plan, make, restored, place)
            choice = Chooser(images.labelled, tried).choose(plan, gram)
        # A combination at hand is made of vectors that `gram` has seen already.
        restoration, digest = make(choice.plan, choice.writing, gram if choice.writing is choice.plan else Gram())
        foreign = _is_foreign(choice.plan, judge, chosen, place)
        learned, digest = distilling.learn(choice.plan, folder, judge, (place, digest), foreign=foreign)
        scaled = _scaled(choice.plan, folder, (images.judged, judge), (place, digest), foreign=foreign)
        choice, prepared = replace(choice, plan=scaled.plan), replace(prepared, plan=scaled.plan)
        texts = (why, adapted.text if adapted else "", restoration, learned, scaled.text)
        restoration = " ".join(filter(None, texts))
        mean = verdict.mean if verdict else None
        agreed = judging.held_against(judge, folder, place, mean=mean, foreign=foreign)
        measured = _measure(choice.plan, folder, images.test, place)
        vectors.wait()
        done = describing.Done(prepared, choice, adapted, gram.geometry(), restoration, measured, agreed, verdict)
        processes.on_main(lambda: describing.write(done, images, folder, output))
    result = MergeResult(
        output, choice.plan, scaled.digest, gram.geometry(), restoration, measured, None, choice.search
    )
    return replace(result, temperature=scaled.temperature, agreement=agreed, verdict=verdict)


def _scaled(
    plan: Plan,
    folder: Path,
    looked_at: tuple[ImageSet | None, Judge | None],
    where: tuple[str, str],
    *,
    foreign: bool,
) -> Scaled:
    """The merge with its confidence scaled; the plan is not sent between processes, which all have it.

    `looked_at` are the public images and their judge, `where` the device and the content digest so far.
    """
    images, judge = looked_at

    def found() -> tuple[float | None, str, str]:
        ensemble = judge.ensemble if judge else None
        scaled = confidence.scale(plan, folder, images, ensemble, where, foreign=foreign)
        return scaled.temperature, scaled.text, scaled.digest

    temperature, text, digest = processes.on_main(found)
    return Scaled(variants.tempered(plan, "none" if temperature is None else temperature), text, digest)


def _judge(plan: Plan, images: Images, place: str) -> Judge | None:
    judged = images.judged
    return processes.together(lambda: judging.judge(plan, judged, place)) if judged is not None else None


def _is_foreign(plan: Plan, judge: Judge | None, chosen: restoring.Restoration, place: str) -> bool:
    """Whether the public images are of another kind than the sites'; modes that look at none leave it to be found."""
    if judge is None or chosen.domain.divergence is not None:
        return chosen.domain.foreign
    return deciding.domain_of(plan, judge, place).foreign


def _decide(plan: Plan, images: Images, place: str) -> restoring.Restoration:
    return processes.together(lambda: restoring.decide(plan, images.public(plan), place))


def _handed_over(prepared: Prepared, output: Path, geometry: Geometry) -> MergeResult:
    """Push what an earlier run left complete, and tell of it what that run would have told."""
    log.info("'%s' already holds this merge; only the push is missing", output)
    digest, measured = tensors.open_folder(output).digest, finished.evaluation_of(output)
    sentence = "The fused model was complete before; this run only pushed it."
    target = processes.on_main(lambda: _pushed(prepared, output))
    found = MergeResult(output, prepared.plan, digest, geometry, sentence, measured, target)
    agreed = finished.agreement_of(output, [one.name for one in prepared.plan.contributions])
    return replace(found, temperature=confidence.given(prepared.plan), agreement=agreed)


def _output(prepared: Prepared, output: Path | None) -> Path:
    if output is not None:
        return output.expanduser().absolute()
    if prepared.output is None:
        raise InputError(f"{prepared.path.name}: no 'output:' is given", hint="add output: ./fused, or use -o DIR")
    return prepared.output


def _measure(plan: Plan, folder: Path, images: ImageSet | None, device: str) -> Evaluation | None:
    """The metrics of the written model, loaded as its users will load it; without images it is only held to the plan.

    A network that was restored has been loaded by then. Else the files have the names, shapes and types of the base,
    which its users load already, and no framework needs to be started to see that.
    """
    if images is None or plan.recipe.evaluate is None:
        planned = {step.name: step.record for step in plan.steps}
        processes.on_main(lambda: models.refuse_other_tensors(folder, planned, plan.labels))
        return None
    network = processes.together(lambda: models.load(folder, device=device))
    return evaluation.evaluate_network(network, images, batch_size=plan.recipe.evaluate.batch_size)


def _pushed(prepared: Prepared, output: Path) -> str:
    wanted = prepared.recipe.push
    assert wanted is not None
    to = hub.parse(wanted.repo, relative_to=prepared.folder, revision=wanted.revision)
    message = f"Fuse {len(prepared.order)} task vectors by {prepared.recipe.merge.method}"
    return hub.push(output, to, private=wanted.private, message=message, create_pr=wanted.create_pr)
