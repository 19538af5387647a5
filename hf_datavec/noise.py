"""Noise on shared BatchNorm statistics: the Gaussian mechanism, with what it assumes said aloud.

What is released per channel are two averages over a site's images in units of the base's statistics: the mean, and
the mean square. `docs/restoration.md` says what the guarantee covers, and what it does not.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError
from hf_datavec.manifest import StatisticsNoise
from hf_datavec.vector import TunedDifferences

if TYPE_CHECKING:
    import torch

    from hf_datavec.vector import Parts

# The usual chance of failure for some hundreds to thousands of images.
DELTA = 1e-5
# Assumed of every image: the root mean square over its channels' means and mean squares, in the base's units. Of 64
# skin lesions the largest had 1.8, of 64 digits 7.7; docs/restoration.md says why nothing can enforce it.
BOUND = 10.0
# Added to the base's variance, as BatchNorm does, so that a channel dead in the base has a unit too.
EPS = 1e-5


@dataclass(frozen=True)
class NoisedDifferences:
    """Differences whose statistics are replaced by noised ones; read as `TunedDifferences`."""

    exact: TunedDifferences
    statistics: dict[str, torch.Tensor]

    @property
    def base(self) -> Checkpoint:
        return self.exact.base

    @property
    def labels(self) -> tuple[str, ...]:
        return self.exact.labels

    def read(self, name: str) -> torch.Tensor:
        """The float32 difference of a tensor."""
        return self.statistics[name] if name in self.statistics else self.exact.read(name)

    def parts(self, name: str) -> Parts:
        """What reads some values of the flattened difference of a weight."""
        return self.exact.parts(name)


def noised(
    differences: TunedDifferences, *, epsilon: float, images: int, batch_size: int, momentum: float
) -> tuple[NoisedDifferences, StatisticsNoise]:
    """The differences with noise on their statistics, and the record of it.

    `momentum` is the share of a running average that each training batch replaces. Raises: InputError for fewer
    images than a batch.
    """
    if images < batch_size:
        raise InputError(
            f"--noise needs at least as many images as a training batch holds, got {images} and {batch_size}"
        )
    names = [name for name in differences.base.named(Role.STATISTIC) if name.endswith("running_mean")]
    channels = sum(math.prod(differences.base.records[name].shape) for name in names)
    weight = largest_weight(images, batch_size, momentum)
    record = describe(channels=channels, epsilon=epsilon, weight=weight)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        _noise_layer(differences, name, record, found)
    return NoisedDifferences(differences, found), record


def describe(*, channels: int, epsilon: float, weight: float) -> StatisticsNoise:
    """The noise that a guarantee asks for, when `weight` is the most that one image weighs in the averages.

    Sensitivity: an image moves the released vector of `2 * channels` averages by at most twice its weight times
    `bound * sqrt(2 * channels)`, the length that one image's own vector is assumed not to exceed. Source for sigma:
    zero-concentrated differential privacy, arXiv 1605.02065, propositions 1.3 and 1.6.
    """
    sensitivity = 2 * weight * BOUND * math.sqrt(2 * channels)
    tail = math.log(1 / DELTA)
    rho = (math.sqrt(tail + epsilon) - math.sqrt(tail)) ** 2
    return StatisticsNoise(
        epsilon=epsilon, delta=DELTA, bound=BOUND, sensitivity=sensitivity, sigma=sensitivity / math.sqrt(2 * rho)
    )


def largest_weight(images: int, batch_size: int, momentum: float) -> float:
    """What one image can weigh in a running average: in the last batch of every epoch, however small that is."""
    # A single image left over is no batch of its own: training drops it, see `finetune.train`.
    left_over = images % batch_size
    smallest = left_over if left_over > 1 else batch_size
    share: float = momentum / smallest / (1 - (1 - momentum) ** (images // batch_size))
    return min(1.0, share)


def _noise_layer(
    differences: TunedDifferences,
    name: str,
    record: StatisticsNoise,
    found: dict[str, torch.Tensor],
) -> None:
    variance_name = f"{name.removesuffix('running_mean')}running_var"
    base = differences.base.tensors
    variance = base.read(variance_name).double().clamp(min=0)
    unit = (variance + EPS).sqrt()
    moved = differences.read(name).double()
    tuned = (variance + differences.read(variance_name).double()).clamp(min=0)
    first = _shrunk(_clipped(moved / unit, record), record)
    second = _shrunk(_clipped((tuned + moved**2 - variance) / unit**2, record), record)
    # A mean square below the squared mean is noise; a hundredth of the base's variance keeps the layer usable.
    restored = (variance + (second - first**2) * unit**2).maximum(0.01 * variance)
    found[name] = (first * unit).float()
    found[variance_name] = (restored - variance).float()


def _clipped(values: torch.Tensor, record: StatisticsNoise) -> torch.Tensor:
    """Values whose root mean square is at most the bound, as that of averages of bounded contributions must be."""
    length = record.bound * math.sqrt(values.numel())
    return values * min(1.0, length / max(float(values.norm()), 1e-300))


def _shrunk(values: torch.Tensor, record: StatisticsNoise) -> torch.Tensor:
    """Values plus noise, shrunk towards the base as far as they could be noise alone (James and Stein 1961)."""
    noisy = values + record.sigma * gaussian(values.numel()).reshape(values.shape)
    expected = (values.numel() - 2) * record.sigma**2
    return noisy * max(0.0, 1 - expected / max(float(noisy.square().sum()), 1e-300))


def gaussian(count: int) -> torch.Tensor:
    """Independent standard normal numbers in float64, from the operating system's random bytes.

    Noise that can be drawn again protects nothing, and torch's generator knows no more than 2**32 sequences.
    """
    import torch

    numbers = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) if count else torch.zeros(0)
    # 52 of the 64 bits: the middles of 2**52 equal parts of the interval from 0 to 1, never its ends.
    middles = ((numbers.long() & (2**52 - 1)).double() + 0.5) * 2.0**-52
    drawn: torch.Tensor = torch.special.ndtri(middles)
    return drawn
