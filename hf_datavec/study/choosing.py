"""What `auto` stands for in a study: what the sites' networks support most on the public images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_datavec import models
from hf_datavec.errors import RunError
from hf_datavec.pipeline import deciding, judging
from hf_datavec.pipeline.judging import Judge
from hf_datavec.plan import Plan
from hf_datavec.recipe import Recalibrate
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import PUBLIC
from hf_datavec.study.restoring import pictures


@dataclass(frozen=True, slots=True)
class Decided:
    """A plan and a mode without `auto`; `alone` says that one site alone was chosen."""

    plan: Plan
    mode: str
    alone: bool = False


def choose(seed: Seed, plan: Plan, mode: str, judge: Judge | None) -> Decided:
    """A plan and a mode in place of every `auto`, as a merge with the judge's images chooses them; without a judge
    nothing was left open.

    Raises: RunError when nothing gives finite answers.
    """
    if judge is None:
        return Decided(plan, mode)
    restore = Recalibrate.model_validate({"mode": mode, "images": PUBLIC, "count": judge.pictures.count})
    left_open = replace(plan, recipe=plan.recipe.model_copy(update={"recalibrate": restore}))
    found, verdict = deciding.choose(left_open, judge, seed.merged, seed.place.device)
    return Decided(found, verdict.best.mode, verdict.best.candidate.site is not None)


def judge_of(seed: Seed, plan: Plan, on: str = "") -> Judge:
    """The ensemble of a plan's sites on some public images; `on` names them, unless they are those of `public:`.

    Raises: RunError when no site's network gives finite answers.
    """
    sites = judging.everyone(plan, seed.place.device)
    shown = pictures(seed.shown(on), models.preprocess(plan.base), seed.most(on))
    judge = judging.of_pictures(plan, sites, shown)
    if judge is None:
        raise RunError("`auto` cannot choose: no site's network gives finite answers on the public images")
    return judge
