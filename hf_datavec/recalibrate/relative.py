"""Statistics carried over from the sites: public images measure only what merging changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_datavec.recalibrate.lockstep import Pictures, observe
from hf_datavec.recalibrate.pooling import Channels, Gaussian
from hf_datavec.recalibrate.sites import Sites, combined

# A channel that hardly varies on the public images says nothing about merging: below this share of the variance it
# has at the sites, the ratio is that of two roundings. Float32 activations carry 7 digits, their squares fewer.
STILL = 1e-5


def abroad(sites: Sites, pictures: Pictures, *, kept: list[Any] | None = None) -> dict[str, Gaussian]:
    """The mixture of the sites' networks' statistics on public pictures, each normalised by its own batch.

    A list given as `kept` spares another call, with other weights, the passes over the pictures.
    """
    return combined(sites.shown(lambda network, _: observe(network, pictures), kept), sites.weights)


def relative(
    found: Mapping[str, Channels], *, home: Mapping[str, Channels], abroad: Mapping[str, Channels]
) -> dict[str, Gaussian]:
    """The statistics that the fused network would have on the sites' images, by layer.

    `found` are its statistics on public pictures, `abroad` those of the sites' networks on the same ones, `home` those
    on the sites' own images.
    """
    return {name: carried_over(found[name], home[name], abroad[name]) for name in found}


def carried_over(fused: Channels, home: Channels, abroad: Channels) -> Gaussian:
    """`mu = mu_home + (mu_fused - mu_abroad) sqrt(v_home / v_abroad)`, `v = v_home v_fused / v_abroad`.

    Exact when every site's images are like the pictures, when nothing was merged, and whenever each channel's two
    domains differ by an increasing affine map that all networks share. A still channel keeps the home's.
    """
    import torch

    of_home, of_abroad = home.variance.double().clamp(min=0), abroad.variance.clamp(min=0)
    still = (of_abroad <= STILL * of_home) | (of_home == 0)
    scale = torch.where(still, torch.ones_like(of_home), of_home / torch.where(still, 1.0, of_abroad))
    shift = (fused.mean - abroad.mean) * scale.sqrt()
    variance = fused.variance.clamp(min=0) * scale
    return Gaussian(home.mean + torch.where(still, 0.0, shift), torch.where(still, of_home, variance).clamp(min=0))
