"""Moments of a BatchNorm layer's input, pooled exactly over batches, groups and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Values looked at for a first guess of the mean, and values in float64 at a time.
GLANCE = 1024
SLICE = 2**15


class Channels(Protocol):
    """Mean and population variance per channel."""

    @property
    def mean(self) -> torch.Tensor: ...

    @property
    def variance(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean and variance per channel, in float64."""

    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, in float64."""

    count: float
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """The population variance."""
        return self.deviation / max(self.count, 1.0)


def pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of the union of disjoint sets, in the order given (Chan et al. 1979, eq. 2.1)."""
    total = parts[0]
    for part in parts[1:]:
        count = total.count + part.count
        if not part.count:
            continue
        shift = part.mean - total.mean
        share = part.count / count
        deviation = total.deviation + part.deviation + shift**2 * (total.count * share)
        total = Moments(count, total.mean + shift * share, deviation)
    return total


def measure(values: torch.Tensor) -> Moments:
    """The moments per channel of a BatchNorm layer's input, shape (n, channels, ...)."""
    import torch

    channels = values.shape[1]
    rows = values.detach().movedim(1, -1).reshape(-1, channels)
    # Sums of squares around a value near the mean lose nothing in float64; slices stay in a core's cache.
    middle = rows[:GLANCE].double().mean(0)
    total, squares = torch.zeros_like(middle), torch.zeros_like(middle)
    for part in rows.split(max(1, SLICE // channels)):
        offset = part.double() - middle
        total += offset.sum(0)
        squares += offset.square_().sum(0)
    shift = total / len(rows)
    return Moments(float(len(rows)), middle + shift, (squares - total * shift).clamp(min=0))


def mixture(parts: Sequence[Channels], weights: Sequence[float]) -> Gaussian:
    """The moments of a mixture, by the law of total variance in float64, weights normalised to one.

    `mu = sum_j w_j mu_j`, `var = sum_j w_j (var_j + (mu_j - mu)^2)`. A channel that is dead at a site can have a
    stored variance below zero by rounding, so each var_j is clamped at zero.
    """
    import torch

    total = sum(weights)
    shares = [weight / total for weight in weights]
    mean = torch.zeros_like(parts[0].mean, dtype=torch.float64)
    for share, part in zip(shares, parts, strict=True):
        mean += share * part.mean
    variance = torch.zeros_like(mean)
    for share, part in zip(shares, parts, strict=True):
        variance += share * (part.variance.clamp(min=0) + (part.mean - mean) ** 2)
    return Gaussian(mean, variance)


def across_processes(mine: Moments) -> Moments:
    """The moments of all processes' values; every process must call it."""
    from accelerate import PartialState

    if PartialState().num_processes == 1:
        return mine
    import torch
    from accelerate.utils import gather

    count = torch.full_like(mine.mean, mine.count)
    rows = gather(torch.stack([count, mine.mean, mine.deviation]).unsqueeze(0))
    return pooled([Moments(float(row[0, 0]), row[1], row[2]) for row in rows if float(row[0, 0])])
