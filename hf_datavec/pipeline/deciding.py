"""What `auto` stands for: candidates are made in memory, restored and held against the ensemble of the sites."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_datavec import agreement, candidates, processes, recalibrate
from hf_datavec.agreement import Match
from hf_datavec.candidates import Candidate
from hf_datavec.errors import DatavecError, RunError
from hf_datavec.geometry import Gram
from hf_datavec.models import Network
from hf_datavec.pipeline import weights
from hf_datavec.pipeline.judging import Judge
from hf_datavec.pipeline.trying import Tried
from hf_datavec.plan import Plan
from hf_datavec.progress import progress
from hf_datavec.recalibrate import Domain, Sites
from hf_datavec.verdict import Trial, Verdict

log = logging.getLogger(__name__)


NetworkOf = Callable[[Plan], Network]


def in_memory(plan: Plan, folder: Path, device: str) -> NetworkOf:
    """What makes the networks of a plan's candidates, one after the other and not restored; `folder` holds all of the
    fused model but its weights."""

    def write(_: Plan, writing: Plan, gram: Gram) -> None:
        weights.write(writing, folder, device, gram)

    tried = Tried(folder, plan, write, lambda _plan, _network: {}, device)
    return lambda made: tried.network(made, made)


def decided(plan: Plan, judge: Judge | None, folder: Path, device: str) -> tuple[Plan, Verdict | None]:
    """A plan in which something is `auto` without it, and what was tried, if there was more than one candidate.

    `folder` holds all of the fused model but its weights. Every process must call it.

    Raises: RunError when there is nothing to go by.
    """
    listed = candidates.of(plan)
    if len(listed) == 1 and len(listed[0].modes) == 1:
        return candidates.resolved(plan, listed[0], listed[0].modes[0]), None
    if judge is None:
        problem = "`auto` cannot choose: no site's network gives finite answers on the public images"
        raise RunError(problem, hint="look at the vectors with `hf-datavec inspect`, or name method, scale and mode")
    return choose(plan, judge, in_memory(plan, folder, device), device)


def choose(plan: Plan, judge: Judge, network_of: NetworkOf, device: str) -> tuple[Plan, Verdict]:
    """The plan with what the ensemble supports most in place of every `auto`, and all that was tried.

    On images of another kind than the sites' nothing is compared, see `candidates.abroad`. `network_of` makes the
    network of a plan with the base's statistics; it is good until the next is asked for. With
    more calibration images than the ensemble looks at, candidates are restored on those that it looks at. Every process
    must call it.

    Raises: RunError when no candidate gives finite answers.
    """
    domain = domain_of(plan, judge, device)
    listed = candidates.abroad(plan) if domain.foreign else candidates.of(plan)
    decider, trials = _Decider(judge, network_of, device), list[Trial]()
    for candidate in progress(listed, text="auto", total=len(listed), unit="candidate"):
        trials += decider.trials(plan, candidate)
    foreign = domain.divergence if domain.foreign else None
    verdict = Verdict(judge.images, judge.digest, judge.pictures.count, judge.ensemble.names, tuple(trials), foreign)
    best = verdict.best
    if not best.usable:
        problem = f"none of {len(trials)} candidates of `auto` could be used: {best.problem}"
        raise RunError(problem, hint="look at the vectors with `hf-datavec inspect`, or name method and scale")
    log.info("%s", verdict.text)
    return candidates.resolved(plan, best.candidate, best.mode), verdict


def domain_of(plan: Plan, judge: Judge, device: str) -> Domain:
    """How the judge's images relate to the sites', as far as sites tell; every process must call it."""
    if not plan.base.has_statistics:
        return Domain(None)
    sites = recalibrate.sharing(plan.base, plan.contributions, device=device)
    seen = [judge.seen[one.name] for one in sites.members]
    # One process decides, since a number on an edge may fall to either side on another machine.
    return Domain(processes.on_main(lambda: recalibrate.compare_seen(sites, seen).divergence))


@dataclass(frozen=True)
class _Decider:
    judge: Judge
    network_of: NetworkOf
    device: str

    def trials(self, plan: Plan, candidate: Candidate) -> list[Trial]:
        """How a candidate does in each of its modes."""
        try:
            found = processes.together(lambda: dict(self._matches(plan, candidate)))
        except processes.LostError:
            raise  # another process has ended; the candidate is not to blame
        except DatavecError as error:
            # A method that breaks the network is a finding; the others may be fine.
            return [Trial(candidate, mode, agreement.BROKEN, error.problem) for mode in candidate.modes]
        trials = [Trial(candidate, mode, match, _problem(match)) for mode, match in found.items()]
        for one in trials:
            shown = candidate.named(self.judge.ensemble.names)
            log.info("auto: %s, %s: support %s %%, same answer %s %%, divergence %s", shown, one.mode, *one.match.texts)
        return trials

    def _matches(self, plan: Plan, candidate: Candidate) -> Iterator[tuple[str, Match]]:
        """How the candidate does in each of its modes; it is combined once, and its layers are looked at once."""
        if known := self._known(plan, candidate):
            yield from known.items()
            return
        made = candidates.planned(plan, candidate, candidate.modes[0])
        network = self.network_of(made)
        sites = recalibrate.sharing(made.base, made.contributions, device=self.device)
        seen: dict[str, Any] = {}
        for mode in candidate.modes:
            # Tuning starts from statistics that fit; the steps themselves are left to the merge.
            if mode in ("statistics", "tune", "relative") and not seen:
                seen, logits = recalibrate.observed(network, self.judge.pictures)
                if mode != "relative":
                    yield mode, self.judge.matched(logits, network.labels)
                    continue
            self._restore(network, mode, sites, seen)
            yield mode, self.judge.match(network)

    def _restore(self, network: Network, mode: str, sites: Sites, seen: Any) -> None:
        """Give a network the statistics of a mode; `seen` is what its layers see of the pictures."""
        if mode in ("statistics", "tune"):
            recalibrate.assign(network, seen)
        elif mode == "relative":
            kept = [self.judge.seen[one.name] for one in sites.members]
            found = recalibrate.of_seen(mode, seen, self.judge.pictures, sites, kept=kept)
            recalibrate.assign(network, found.statistics)
        elif mode == "repair":
            found = recalibrate.measured(mode, network, self.judge.pictures, sites, kept=self.judge.goals)
            recalibrate.assign(network, found.statistics)
        elif mode == "moments":
            recalibrate.assign(network, sites.home())

    def _known(self, plan: Plan, candidate: Candidate) -> dict[str, Match]:
        """How a site's own network does, all of whose answers the ensemble knows; nothing where it does not."""
        merge, site = plan.recipe.merge, candidate.site
        if site is None or merge.clip is not None or merge.overrides or plan.recipe.dtype is not None:
            return {}
        if plan.base.has_statistics and not {*candidate.modes} <= {"moments", "relative", "statistics"}:
            return {}
        views = self.judge.ensemble.log_probabilities[site]
        answers = {mode: views[1 if mode == "statistics" else 0] for mode in candidate.modes}
        if any(math.isnan(float(one.sum())) for one in answers.values()):
            return {}
        return {mode: self.judge.matched(one, plan.labels) for mode, one in answers.items()}


def _problem(match: Match) -> str:
    return "" if match != agreement.BROKEN else "the network gives NaN or infinite values"
