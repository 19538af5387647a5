"""REPAIR's target statistics, reached by running statistics alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_datavec.models import Network, statistic_layers
from hf_datavec.recalibrate.lockstep import Pictures, observe
from hf_datavec.recalibrate.pooling import Channels, Gaussian, Measured
from hf_datavec.recalibrate.sites import Sites

if TYPE_CHECKING:
    import torch

# Affine weights below this share of one turn a BatchNorm channel off; no statistics can give it a spread again.
OFF = 1e-6


def goals(sites: Sites, pictures: Pictures, *, kept: list[Any] | None = None) -> dict[str, Gaussian]:
    """The weighted means of the sites' networks' means and standard deviations after each BatchNorm layer.

    Every network runs with its own statistics. The deviation is stored squared. `kept` is as in `relative.abroad`.

    Source: arXiv 2211.08403, eq. 2.
    """
    seen = sites.shown(lambda network, own: _outputs(network, own, pictures), kept)
    shares = [weight / sum(sites.weights) for weight in sites.weights]
    found = {}
    for name, first in seen[0].items():
        mean, spread = first.mean * 0, first.mean * 0
        for share, one in zip(shares, seen, strict=True):
            mean, spread = mean + share * one[name].mean, spread + share * one[name].variance.sqrt()
        found[name] = Gaussian(mean, spread**2)
    return found


def _outputs(network: Network, own: Mapping[str, Gaussian], pictures: Pictures) -> dict[str, Gaussian]:
    layers = statistic_layers(network)

    def settle(name: str, _: Measured) -> Gaussian:
        return own[name]

    seen = observe(network, pictures, settle=settle)
    return {name: _after(layers[name], seen[name], own[name]) for name in seen}


def _after(layer: Any, seen: Channels, statistics: Channels) -> Gaussian:
    """Mean and variance after a layer with some statistics, of input with others."""
    gain, offset = _affine(layer)
    slope = gain / (statistics.variance + layer.eps).sqrt()
    return Gaussian(offset + slope * (seen.mean - statistics.mean), slope**2 * seen.variance)


def _affine(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if layer.weight is None:
        return torch.ones_like(layer.running_mean).double(), torch.zeros_like(layer.running_mean).double()
    from accelerate.utils import align_module_device

    with align_module_device(layer):  # weights of a network larger than its device come from where they are kept
        return layer.weight.detach().double(), layer.bias.detach().double()


def repair(network: Network, pictures: Pictures, *, goals: Mapping[str, Gaussian]) -> dict[str, Gaussian]:
    """Running statistics by layer with which the fused network's channels reach the goals on the pictures.

    Layer by layer, each fed by those already repaired. `s = |gain| sd_fused / sd_goal`,
    `m = mu_fused - (mu_goal - offset) s / gain`; the variance stored is `s^2 - eps`.
    """
    layers = statistic_layers(network)

    def settle(name: str, seen: Measured) -> Gaussian:
        return _reaching(layers[name], seen, goals[name])

    return {name: settle(name, seen) for name, seen in observe(network, pictures, settle=settle).items()}


def _reaching(layer: Any, seen: Channels, goal: Channels) -> Gaussian:
    import torch

    gain, offset = _affine(layer)
    possible = (gain.abs() > OFF) & (goal.variance > 0) & (seen.variance > 0)
    divisor = torch.where(possible, goal.variance, torch.ones_like(gain)).sqrt()
    # A spread narrower than the layer's eps allows is out of reach; the mean is still met.
    squared = torch.where(possible, (gain.abs() * seen.variance.sqrt() / divisor) ** 2, seen.variance + layer.eps)
    variance = (squared - layer.eps).clamp(min=0)
    spread = (variance + layer.eps).sqrt()
    shift = (goal.mean - offset) * spread / torch.where(possible, gain, torch.ones_like(gain))
    return Gaussian(seen.mean - torch.where(possible, shift, torch.zeros_like(shift)), variance)
