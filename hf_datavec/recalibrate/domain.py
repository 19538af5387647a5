"""The guard: do public images look like the sites' images?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_datavec.models import Network
from hf_datavec.recalibrate.lockstep import Pictures, fewer, observe
from hf_datavec.recalibrate.pooling import Channels, Measured
from hf_datavec.recalibrate.sites import Sites, combined

# At the first BatchNorm layer of EfficientNet-Lite0: held-out images of the sites' kind differ by 0.001 to 0.02, of one
# class only by up to 0.04; images of another kind by 0.2 and more (docs/restoration.md has the measurements).
FOREIGN = 0.1
# Enough for the first layer, whose input is little more than the pixels; more would cost without telling more.
LOOKED_AT = 128


@dataclass(frozen=True, slots=True)
class Domain:
    """How far the public images are from the sites' at the first BatchNorm layer; None when no site tells."""

    divergence: float | None

    @property
    def foreign(self) -> bool:
        # Not `>`: statistics that overflow give no number, and are no sign of a likeness.
        return self.divergence is not None and not self.divergence <= FOREIGN


class _SeenError(Exception):
    """Ends a pass whose first layer has been seen."""


def compare(sites: Sites, pictures: Pictures) -> Domain:
    """Hold the pictures against the sites' statistics, each site's first convolution looking at both."""
    if not sites.shared:
        return Domain(None)
    some = fewer(pictures, LOOKED_AT)
    return compare_seen(sites, [_first(network, some) for network, _ in sites.networks()])


def compare_seen(sites: Sites, seen: Sequence[Mapping[str, Measured]]) -> Domain:
    """The same from what the sites' layers have seen of the pictures already, the first layer first.

    What the first layer sees depends on no statistics.
    """
    name = next(iter(seen[0]), None) if sites.shared else None
    if name is None:
        return Domain(None)
    found = combined([{name: one[name]} for one in seen], sites.weights)[name]
    return Domain(divergence(found, sites.home()[name]))


def _first(network: Network, pictures: Pictures) -> dict[str, Measured]:
    found: dict[str, Measured] = {}

    def stop(name: str, moments: Measured) -> Channels:
        found[name] = moments
        raise _SeenError

    with contextlib.suppress(_SeenError):
        observe(network, pictures, settle=stop)
    return found


def divergence(one: Channels, other: Channels) -> float:
    """The symmetric Kullback-Leibler divergence of two Gaussians per channel: the median over all channels.

    `((v1 + d^2) / v2 + (v2 + d^2) / v1) / 2 - 1` with d the difference of the means.
    """
    import torch

    first, second = one.variance.double().clamp(min=0), other.variance.double().clamp(min=0)
    # Two dead channels are alike; one dead channel must not divide by zero.
    floor = 1e-5 * torch.maximum(first, second)
    first, second = torch.maximum(first, floor), torch.maximum(second, floor)
    alive = floor > 0
    squared = (one.mean.double() - other.mean.double()) ** 2
    each = (
        (first + squared) / torch.where(alive, second, 1.0) + (second + squared) / torch.where(alive, first, 1.0)
    ) / 2
    return float(torch.where(alive, each - 1, squared).median())
