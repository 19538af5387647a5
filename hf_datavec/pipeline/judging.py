"""The judge of a merge: the ensemble of the sites' networks on the recipe's public images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec import ensemble, models, pooled_heads, probe, processes, recalibrate
from hf_datavec.agreement import Agreement, Match
from hf_datavec.ensemble import Ensemble
from hf_datavec.images import ImageSet
from hf_datavec.pipeline import restore as restoring
from hf_datavec.pipeline.restore import Restoration
from hf_datavec.plan import Plan
from hf_datavec.recalibrate import Pictures, Sites

if TYPE_CHECKING:
    from hf_datavec.ensemble import Floats

log = logging.getLogger(__name__)

AGREEMENT_FILE = "agreement.json"


@dataclass(frozen=True)
class Judge:
    """An ensemble with the pictures that it has looked at."""

    ensemble: Ensemble
    pictures: Pictures
    images: str
    digest: str
    # What the layers of each site's network see on these pictures, by the site's name.
    seen: Mapping[str, Any]
    # Whether these are all pictures that the fused network is restored on.
    is_whole: bool
    # What `repair` looks at in the sites' networks, once somebody has.
    goals: list[Any] = field(default_factory=list)

    def match(self, network: models.Network) -> Match:
        """How a network relates to the ensemble; every process must call it."""
        return self.matched(recalibrate.outputs(network, self.pictures), network.labels)

    def matched(self, logits: Floats, labels: Sequence[str]) -> Match:
        """The same from the network's logits (n, its labels)."""
        # One process decides, since a number on an edge may fall to either side on another machine.
        return processes.on_main(lambda: self.ensemble.match(logits, labels))

    def agreement(self, network: models.Network, *, mean: Match | None = None, foreign: bool = False) -> Agreement:
        """The fused network and each site's held against the ensemble. Warns on the log of what speaks against it."""
        fused = self.match(network)
        sites = processes.on_main(lambda: self.ensemble.sites)
        names = self.ensemble.names
        found = Agreement(self.images, self.digest, self.pictures.count, names, fused, sites, mean, foreign)
        log.info("agreement: %s", found.text)
        if found.caution:
            log.warning("warning: %s", found.caution)
        return found

    def spares(self, chosen: Restoration) -> None:
        """Leave to a restoration what the sites' networks have shown on its very pictures already."""
        names = [one.name for one in chosen.sites.members]
        if self.is_whole and chosen.mode != "repair" and not chosen.kept and set(names) <= set(self.seen):
            chosen.kept.extend(self.seen[name] for name in names)


def judge(plan: Plan, images: ImageSet, device: str) -> Judge | None:
    """The ensemble of the sites' networks on the recipe's images; None, with a warning, when none gives finite
    answers."""
    wanted = plan.recipe.recalibrate
    assert wanted is not None  # it names the images
    sites = everyone(plan, device)
    shown = restoring.calibration_pictures(sites, images, wanted)
    return of_pictures(plan, sites, shown, (images.fetched.reference.identity, images.digest))


def everyone(plan: Plan, device: str) -> Sites:
    """All sites of a plan, each with its own statistics where it shares them."""
    return Sites(plan.base, plan.contributions, any(one.has_statistics for one in plan.contributions), device)


def of_pictures(plan: Plan, sites: Sites, shown: Pictures, images: tuple[str, str] = ("", "")) -> Judge | None:
    """The same on pictures that are at hand, for all sites; `images` are what results call the pictures, and their
    digest."""
    seen, some = list[Any](), ensemble.held(shown)
    found = ensemble.of(sites, plan.labels, some, kept=seen)
    if pooled_heads.possible(plan):
        found = replace(found, head=processes.on_main(lambda: _head(plan, sites, some)))
    if found.is_silent:
        log.warning("warning: no site's network gives finite answers, so nothing tells how good the fused one is")
        return None
    return Judge(found, some, *images, dict(seen), some.count == shown.count)


def _head(plan: Plan, sites: Sites, pictures: Pictures) -> Floats:
    """The logits (n, k) of the head that the sites' sums of features give, on the untouched base."""
    network = models.load(plan.base.folder, device=sites.device)
    features = probe.features(network, plan.base, pictures.load, pictures.count)
    head = pooled_heads.of_all(plan)
    result: Floats = features.cpu().double().numpy() @ head.weights.T + head.bias
    return result


def held_against(
    judge: Judge | None, folder: Path, device: str, *, mean: Match | None = None, foreign: bool = False
) -> Agreement | None:
    """The written network of a folder held against the ensemble, if there is one."""
    if judge is None:
        return None
    network = processes.together(lambda: models.load(folder, device=device))
    return judge.agreement(network, mean=mean, foreign=foreign)
