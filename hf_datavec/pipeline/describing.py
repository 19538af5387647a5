"""Everything that stands beside the weights of a fused model: recipe, lock, plots, results and card."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_datavec import heatmap, lineage
from hf_datavec.agreement import Agreement
from hf_datavec.evaluate import Evaluation
from hf_datavec.fused_card import Fusion, fused_card
from hf_datavec.geometry import Geometry
from hf_datavec.lineage import Round
from hf_datavec.pipeline import choosing, finished, judging, lock
from hf_datavec.pipeline.adapting import Adaptation
from hf_datavec.pipeline.aliases import aliased, aliases, told
from hf_datavec.pipeline.choosing import Choice
from hf_datavec.pipeline.prepare import Images, Prepared
from hf_datavec.verdict import Verdict

log = logging.getLogger(__name__)

# What plots and cards need in the end, imported while tensors are combined.
LIBRARIES = ("PIL.ImageDraw", "PIL.ImageFont", "huggingface_hub.repocard_data")


@dataclass(frozen=True)
class Done:
    """What has been computed and is still to be told."""

    prepared: Prepared
    choice: Choice
    adapted: Adaptation | None
    geometry: Geometry
    restoration: str
    measured: Evaluation | None
    agreed: Agreement | None
    verdict: Verdict | None


def write(done: Done, images: Images, folder: Path, output: Path) -> None:
    """Write everything that will stand beside the weights in `output`, the lock included."""
    choosing.clear(folder)
    prepared, public, search = done.prepared, images.judged, done.choice.search
    calibration = public.fetched if public else None
    shown = aliased(prepared)
    if prepared.recipe.aliases:
        done = replace(done, restoration=told(prepared, done.restoration))
    rounds = _rounds(prepared, done.restoration)
    lineage.write(folder, rounds)
    fusion = Fusion(output.name, shown.plan, done.geometry, done.restoration, done.measured, shown.text, calibration)
    fusion = replace(fusion, rounds=rounds)
    sites = tuple(one.name for one in shown.plan.contributions)
    fusion = replace(fusion, search=replace(search, sites=sites) if search else None)
    if agreed := done.agreed:
        fusion = replace(fusion, agreement=replace(agreed, names=aliases(prepared, agreed.names)))
    if verdict := done.verdict:
        fusion = replace(fusion, verdict=replace(verdict, names=aliases(prepared, verdict.names)))
    if done.adapted is not None:
        replace(done.adapted, sites=sites).write(folder)
    _describe(fusion, folder)
    if fusion.locked:
        locked = lock.text(prepared, public or images.learning, images.test, images.labelled, folder=output)
        (folder / lock.LOCK_FILE).write_text(locked, "utf-8")
    elif not prepared.recipe.lock:
        log.info("the lock, which names the sites, is beside the recipe: %s", _lock_beside(prepared, images))


def _lock_beside(prepared: Prepared, images: Images) -> Path:
    """The lock beside the recipe, which pins the images that were looked at, whatever the choice leaves of them."""
    return lock.write(prepared, images.test, public=images.judged or images.learning)


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


def _describe(fusion: Fusion, folder: Path) -> None:
    """Write recipe, plot, results and card beside the weights."""
    (folder / lock.RECIPE_FILE).write_text(fusion.recipe, "utf-8")
    if len(fusion.geometry.norms) > 1:
        names = [one.name for one in fusion.plan.contributions]
        heatmap.plot_cosines(names, fusion.geometry, folder / "cosines.png")
        fusion = replace(fusion, plots=(("cosines.png", "Cosines between the sites' vectors"),))
    if found := _searched(fusion):
        text = json.dumps(found, indent=2)
        (folder / "search.json").write_text(text + "\n", "utf-8")
    if fusion.agreement:
        text = json.dumps(fusion.agreement.as_dict(), indent=2)
        (folder / judging.AGREEMENT_FILE).write_text(text + "\n", "utf-8")
    if fusion.evaluation:
        text = json.dumps(fusion.evaluation.as_dict(), indent=2)
        (folder / finished.EVALUATION_FILE).write_text(text + "\n", "utf-8")
    (folder / "README.md").write_text(fused_card(fusion), "utf-8")


def _searched(fusion: Fusion) -> dict[str, Any]:
    """Everything that was tried, on labelled images and by agreement."""
    search = fusion.search.as_dict() if fusion.search else {}
    return {**search, "choice": fusion.verdict.as_dict()} if fusion.verdict else search
