"""Moments of a BatchNorm layer's input, pooled exactly over batches, groups and processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hf_datavec import processes

if TYPE_CHECKING:
    import torch

# Values whose float32 sums are taken at a time: as many as stay in a processor's cache beside a copy, enough to give
# every thread of torch its part, and few enough to lose less than 1e-6 of a standard deviation. What is pooled from
# there on is float64.
BLOCK = 2**20


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


@dataclass(frozen=True, slots=True)
class Images:
    """The moments of a layer's input, image by image: values (n, 1), means and variances (n, channels), float64."""

    values: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a layer's input: of its values, and of how the images' means and squares are spread."""

    moments: Moments
    means: Moments
    squares: Moments

    @property
    def mean(self) -> torch.Tensor:
        return self.moments.mean

    @property
    def variance(self) -> torch.Tensor:
        return self.moments.variance

    @property
    def images(self) -> int:
        return int(self.means.count)

    @property
    def error(self) -> float:
        """The standard error of mean and standard deviation, in standard deviations: the larger of the two, each of the
        median of the channels that vary; infinite for a single image."""
        if self.images < 2:
            return math.inf
        variance = self.moments.variance
        alive = variance > 0
        if not bool(alive.any()):
            return 0.0
        of_mean = self.means.variance[alive] / variance[alive] / (self.images - 1)
        # The relative error of a root is half of that of what it is the root of.
        of_deviation = self.squares.variance[alive] / variance[alive] ** 2 / (self.images - 1) / 4
        return math.sqrt(max(float(of_mean.median()), float(of_deviation.median())))


def measure(values: torch.Tensor) -> Images:
    """The moments per image and channel of a BatchNorm layer's input, shape (n, channels, ...)."""
    import torch

    images, channels = values.shape[:2]
    rows = values.detach().movedim(1, -1).reshape(images, -1, channels)
    # Sums of squares around a value near the mean lose little.
    middle = rows[0].mean(0)
    length = rows.shape[1]
    if length * channels <= BLOCK:
        found = _sums(rows.split(max(1, BLOCK // max(1, length * channels))), middle)
    else:
        found = (_whole_sums(image[None].split(BLOCK // channels + 1, dim=1), middle) for image in rows)
    totals, squares = (torch.cat(part).double() for part in zip(*found, strict=True))
    shift = totals.div_(length)
    variances = squares.div_(length).sub_(shift.square()).clamp_(min=0)
    return Images(torch.full_like(shift[:, :1], length), shift.add_(middle), variances)


def _whole_sums(blocks: Sequence[torch.Tensor], middle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over the rows of all blocks of an image, in float64."""
    totals, squares = zip(*_sums(blocks, middle), strict=True)
    return sum(totals[1:], totals[0].double()), sum(squares[1:], squares[0].double())


def _sums(blocks: Sequence[torch.Tensor], middle: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Block by block, (n, rows, channels): the sums over rows of the offsets from `middle`, and of their squares."""
    import torch

    room = torch.empty_like(blocks[0])  # used again and again, so that it stays in the cache
    for block in blocks:
        offset = torch.sub(block, middle, out=room[: block.shape[0], : block.shape[1]])
        total = offset.sum(1)
        yield total, offset.square_().sum(1)


def summed(parts: Sequence[Images]) -> Measured:
    """What was measured on all images, in the order given."""
    import torch

    values = torch.cat([part.values for part in parts])
    means = torch.cat([part.means for part in parts])
    variances = torch.cat([part.variances for part in parts])
    total = values.sum()
    mean = (values * means).sum(0) / total
    squares = variances.add_((means - mean).square_())
    whole = Moments(float(total), mean, (values * squares).sum(0))
    return Measured(whole, _spread(means), _spread(squares))


def _spread(each: torch.Tensor) -> Moments:
    """The moments of one value per image and channel, in whose place their squared offsets are left."""
    mean = each.mean(0)
    return Moments(float(len(each)), mean, each.sub_(mean).square_().sum(0))


def all_of(groups: Sequence[Measured]) -> Measured:
    """What was measured on disjoint groups of images."""
    return Measured(
        pooled([one.moments for one in groups]),
        pooled([one.means for one in groups]),
        pooled([one.squares for one in groups]),
    )


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


def across_processes(mine: Sequence[Images]) -> list[Images]:
    """The moments of all processes' images, in the order of the images; every process must call it."""
    if processes.count() == 1:
        return list(mine)
    # As they are, not pooled before: the order of the sums must not depend on who measured what.
    return processes.gathered([Images(one.values.cpu(), one.means.cpu(), one.variances.cpu()) for one in mine])
