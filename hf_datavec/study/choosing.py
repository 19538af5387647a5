"""What `auto` stands for in a study: what the sites' networks agree best with on the public images."""

from __future__ import annotations

from dataclasses import replace

from hf_datavec import models
from hf_datavec.errors import RunError
from hf_datavec.pipeline import deciding, judging
from hf_datavec.pipeline.judging import Judge
from hf_datavec.plan import Plan
from hf_datavec.recalibrate import Sites
from hf_datavec.recipe import AUTO, Recalibrate
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import PUBLIC
from hf_datavec.study.restoring import pictures


def choose(seed: Seed, plan: Plan, mode: str, judges: dict[object, Judge] | None = None) -> tuple[Plan, str]:
    """A plan and a mode in place of every `auto`, as a merge with the study's public images chooses them.

    `judges` keeps the ensembles of the sites' networks for further merges of the same vectors.

    Raises: RunError when nothing gives finite answers.
    """
    if AUTO not in (plan.recipe.merge.method, plan.recipe.merge.scale, mode):
        return plan, mode
    judges = {} if judges is None else judges
    key = (plan.base.folder, *(one.name for one in plan.contributions))
    if key not in judges:
        judges[key] = _judge(seed, plan)
    restore = Recalibrate.model_validate({"mode": mode, "images": PUBLIC, "count": seed.place.study.public.count})
    left_open = replace(plan, recipe=plan.recipe.model_copy(update={"recalibrate": restore}))
    found, verdict = deciding.choose(left_open, judges[key], seed.merged, seed.place.device)
    return found, verdict.best.mode


def _judge(seed: Seed, plan: Plan) -> Judge:
    shared = any(one.has_statistics for one in plan.contributions)
    sites = Sites(plan.base, plan.contributions, shared, seed.place.device)
    shown = pictures(seed.public, models.preprocess(plan.base), seed.place.study.public.count)
    judge = judging.of_pictures(sites, plan.labels, shown)
    if judge is None:
        raise RunError("`auto` cannot choose: no site's network gives finite answers on the public images")
    return judge
