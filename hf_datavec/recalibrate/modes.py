"""The modes that measure statistics on pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_datavec.models import Network
from hf_datavec.recalibrate.lockstep import Pictures, looked_at, observe
from hf_datavec.recalibrate.pooling import Gaussian, Measured
from hf_datavec.recalibrate.relative import abroad, relative
from hf_datavec.recalibrate.repair import goals, repair
from hf_datavec.recalibrate.sites import Sites


@dataclass(frozen=True, slots=True)
class Found:
    """Statistics by layer, how many images they took, and the largest standard error of a layer's."""

    statistics: Mapping[str, Gaussian]
    images: int
    error: float


def measured(mode: str, network: Network, pictures: Pictures, sites: Sites, *, kept: list[Any] | None = None) -> Found:
    """The statistics by layer that a mode gives a network on pictures."""
    if mode == "repair":
        pictures = replace(pictures, tolerance=0.0)  # all networks must have seen the same
        wanted = goals(sites, pictures, kept=kept)
        return Found(repair(network, pictures, goals=wanted), pictures.count, 0.0)
    return of_seen(mode, observe(network, pictures), pictures, sites, kept=kept)


def of_seen(
    mode: str, seen: Mapping[str, Measured], pictures: Pictures, sites: Sites, *, kept: list[Any] | None = None
) -> Found:
    """The statistics by layer that `statistics` or `relative` makes of what was seen in the layers' inputs."""
    images = next((one.images for one in seen.values()), 0)
    error = max((one.error for one in seen.values()), default=0.0)
    if mode == "relative":
        # The sites' networks are shown what the fused one was shown, since it is their difference that counts.
        shown = replace(looked_at(seen, pictures), tolerance=0.0)
        # What is kept was seen on all pictures.
        elsewhere = abroad(sites, shown, kept=kept if shown.count == pictures.count else None)
        return Found(relative(seen, home=sites.home(), abroad=elsewhere), images, error)
    return Found({name: Gaussian(one.mean, one.variance) for name, one in seen.items()}, images, error)
