"""Noise on shared BatchNorm statistics: the Gaussian mechanism, with what it assumes said aloud.

What is released per channel are two averages over a site's images in units of the base's statistics: the mean, and
the mean square. `docs/restoration.md` says what the guarantee covers, and what it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError
from hf_datavec.manifest import StatisticsNoise
from hf_datavec.vector import TunedDifferences

if TYPE_CHECKING:
    import torch

# The usual chance of failure for some hundreds to thousands of images.
DELTA = 1e-5
# Assumed of every image: the root mean square over its channels' means and mean squares, in the base's units. The
# averages of the sites measured in docs/restoration.md have 0.1 to 1.0; a single image may have more.
BOUND = 1.0
# torch's default: how much of the running average is replaced by each training batch.
MOMENTUM = 0.1
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


def noised(
    differences: TunedDifferences, *, epsilon: float, images: int, batch_size: int
) -> tuple[NoisedDifferences, StatisticsNoise]:
    """The differences with noise on their statistics, and the record of it.

    Raises: InputError for fewer images than a batch.
    """
    import torch

    if images < batch_size:
        raise InputError(
            f"--noise needs at least as many images as a training batch holds, got {images} and {batch_size}"
        )
    names = [name for name in differences.base.named(Role.STATISTIC) if name.endswith("running_mean")]
    channels = sum(math.prod(differences.base.records[name].shape) for name in names)
    record = describe(channels=channels, epsilon=epsilon, images=images, batch_size=batch_size)
    generator = torch.Generator()
    generator.seed()  # from the operating system: noise that can be drawn again protects nothing
    found: dict[str, torch.Tensor] = {}
    for name in names:
        _noise_layer(differences, name, record, generator, found)
    return NoisedDifferences(differences, found), record


def describe(*, channels: int, epsilon: float, images: int, batch_size: int) -> StatisticsNoise:
    """The noise that a guarantee asks for.

    Sensitivity: an image moves the released vector of `2 * channels` averages by at most twice its weight times
    `bound * sqrt(2 * channels)`, the length that one image's own vector is assumed not to exceed. Its weight is the
    largest that an exponential average gives it. Source for sigma: zero-concentrated differential privacy, arXiv
    1605.02065, propositions 1.3 and 1.6.
    """
    weight = largest_weight(images, batch_size)
    sensitivity = 2 * weight * BOUND * math.sqrt(2 * channels)
    tail = math.log(1 / DELTA)
    rho = (math.sqrt(tail + epsilon) - math.sqrt(tail)) ** 2
    return StatisticsNoise(
        epsilon=epsilon, delta=DELTA, bound=BOUND, sensitivity=sensitivity, sigma=sensitivity / math.sqrt(2 * rho)
    )


def largest_weight(images: int, batch_size: int) -> float:
    """What one image can weigh in a running average: in the last batch, and in every epoch before it."""
    steps = images / batch_size
    share: float = MOMENTUM / batch_size / (1 - (1 - MOMENTUM) ** steps)
    return share


def _noise_layer(
    differences: TunedDifferences,
    name: str,
    record: StatisticsNoise,
    generator: torch.Generator,
    found: dict[str, torch.Tensor],
) -> None:
    variance_name = f"{name.removesuffix('running_mean')}running_var"
    base = differences.base.tensors
    variance = base.read(variance_name).double().clamp(min=0)
    unit = (variance + EPS).sqrt()
    moved = differences.read(name).double()
    tuned = (variance + differences.read(variance_name).double()).clamp(min=0)
    first = _shrunk(_clipped(moved / unit, record), record, generator)
    second = _shrunk(_clipped((tuned + moved**2 - variance) / unit**2, record), record, generator)
    # A mean square below the squared mean is noise; a hundredth of the base's variance keeps the layer usable.
    restored = (variance + (second - first**2) * unit**2).maximum(0.01 * variance)
    found[name] = (first * unit).float()
    found[variance_name] = (restored - variance).float()


def _clipped(values: torch.Tensor, record: StatisticsNoise) -> torch.Tensor:
    """Values whose root mean square is at most the bound, as that of averages of bounded contributions must be."""
    length = record.bound * math.sqrt(values.numel())
    return values * min(1.0, length / max(float(values.norm()), 1e-300))


def _shrunk(values: torch.Tensor, record: StatisticsNoise, generator: torch.Generator) -> torch.Tensor:
    """Values plus noise, shrunk towards the base as far as they could be noise alone (James and Stein 1961)."""
    import torch

    noisy = values + record.sigma * torch.randn(values.shape, generator=generator, dtype=torch.float64)
    expected = (values.numel() - 2) * record.sigma**2
    return noisy * max(0.0, 1 - expected / max(float(noisy.square().sum()), 1e-300))
