"""Learning of a fused network from the sites' networks, after it was restored."""

from __future__ import annotations

import logging
from pathlib import Path

from hf_datavec import distillation, models, processes
from hf_datavec.errors import InputError, RunError, listed
from hf_datavec.pipeline import judging
from hf_datavec.pipeline import restore as restoring
from hf_datavec.pipeline.judging import Judge
from hf_datavec.plan import Plan

log = logging.getLogger(__name__)


def refuse(plan: Plan, judge: Judge | None) -> None:
    """Raise InputError or RunError, before anything is fused, when there is nothing to learn from."""
    if not plan.recipe.distils:
        return
    if judge is None:
        problem = "there is no ensemble to learn from: no site's network gives finite answers on the public images"
        raise RunError(problem, hint="look at the vectors with `hf-datavec inspect`, or leave `loss: ensemble` out")
    if negative := [one.name for one in plan.contributions if one.weight < 0]:
        problem = f"the weight of {listed(negative)} is below zero, and every site's network teaches"
        raise InputError(problem, hint="leave `loss: ensemble` out, or use weights of at least 0")
    distillation.refuse_few(judge.pictures.count)


# On images of another kind the sites' networks are no teacher either.
FOREIGN = (
    "Nothing was learned from the ensemble of the sites' networks, since the public images are of another kind than "
    "the sites'."
)


def learn(
    plan: Plan, folder: Path, judge: Judge | None, where: tuple[str, str], *, foreign: bool = False
) -> tuple[str, str]:
    """Let the written network learn from the ensemble that has judged it, if the recipe says so.

    `where` are the device and the content digest so far; on `foreign` images nothing is learned. Returns what to say
    about it, and the new content digest. Every process must call it; one trains and writes.
    """
    device, digest = where
    wanted = plan.recipe.recalibrate
    if foreign and plan.recipe.distils:
        log.warning("warning: %s", FOREIGN)
        return FOREIGN, digest
    if wanted is None or wanted.tune is None or not wanted.distils or judge is None:
        return "", digest
    network = processes.together(lambda: models.load(folder, device=device))
    found = distillation.learn(
        network,
        judge.ensemble,
        judge.pictures,
        sites=judging.everyone(plan, device),
        settings=wanted.tune,
        seed=plan.recipe.merge.seed,
    )
    if found.undone:
        log.warning("warning: %s", found.text)
        return found.text, digest
    log.info("%s", found.text)
    # The steps depend on each other, so one process takes them; only its network is written.
    return found.text, processes.on_main(
        lambda: restoring.overwrite(plan, folder, models.stored(network, lambda _: True))
    )
