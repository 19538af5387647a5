"""Coefficients for each tensor and site, learned without labels: confident predictions on public images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.models import Network, normalization_layers, stored_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Settings:
    """How coefficients are learned."""

    steps: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Learned:
    """The coefficients of each tensor, one per site, and the mean entropy of each step's batch in nats."""

    coefficients: Mapping[str, tuple[float, ...]]
    entropies: tuple[float, ...]


def learn(
    network: Network,
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    load: Callable[[Sequence[int]], torch.Tensor],
    count: int,
    settings: Settings,
    *,
    notify: Callable[[], None] = lambda: None,
) -> Learned:
    """Coefficients that minimise the entropy of the predictions on `count` images by Adam, starting at 1/n.

    `parts` are, by the names in the network's file, the base (*shape) and the sites' vectors (n, *shape) as they are
    added to it. Everything else of the network stays. BatchNorm layers use the statistics of each batch, since the
    running ones fit no coefficients but those that they were measured with; the network's own are not needed
    afterwards. Batches follow one seeded order of the images, again and again.

    Source: arXiv 2310.02575 (AdaMerging), its layer-wise form.
    """
    import torch

    device = network.module.device
    names, places = sorted(parts), stored_names(network)
    bases = [parts[name][0].float().to(device) for name in names]
    vectors = [parts[name][1].float().to(device) for name in names]
    sites = len(vectors[0])
    coefficients = torch.full((len(names), sites), 1 / sites, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=settings.learning_rate)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    size, entropies = min(settings.batch_size, count), []
    network.module.requires_grad_(False)
    for layer in normalization_layers(network.module):
        layer.train()
    for step in range(settings.steps):
        pixels = load([order[(step * size + place) % count] for place in range(size)]).to(device)
        shares = coefficients.float().to(device)
        tensors = {
            places[name]: base + torch.tensordot(share, vector, dims=1)
            for name, base, vector, share in zip(names, bases, vectors, shares, strict=True)
        }
        logits = torch.func.functional_call(network.module, tensors, kwargs={"pixel_values": pixels}).logits
        logarithms = logits.log_softmax(1)
        entropy = -(logarithms.exp() * logarithms).sum(1).mean()
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
        entropies.append(float(entropy.detach()))
        notify()
    found = {name: tuple(row) for name, row in zip(names, coefficients.detach().tolist(), strict=True)}
    return Learned(found, tuple(entropies))
