"""What the sites share about their BatchNorm statistics, and their networks, rebuilt from their vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_datavec import models, study_base
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError
from hf_datavec.recalibrate.pooling import Channels, Gaussian, mixture
from hf_datavec.tensors import MODEL_FILE, Record
from hf_datavec.vector import rows_by_label
from hf_datavec.writing import in_file_order, write_file

if TYPE_CHECKING:
    import torch

    from hf_datavec.plan import Contribution


T = TypeVar("T")
# A variance near zero, stored as its difference from the base's in float32, can come back below zero by so much.
ROUNDING = 1e-6


def layer_names(base: Checkpoint) -> tuple[str, ...]:
    """The names of the BatchNorm layers in the base's file."""
    ending = ".running_mean"
    return tuple(name.removesuffix(ending) for name in base.named(Role.STATISTIC) if name.endswith(ending))


def of_base(base: Checkpoint) -> dict[str, Gaussian]:
    """The base's own statistics, by layer."""
    read = base.tensors.read
    return {
        name: Gaussian(read(f"{name}.running_mean").double(), read(f"{name}.running_var").double())
        for name in layer_names(base)
    }


def of_site(base: Checkpoint, site: Contribution) -> dict[str, Gaussian]:
    """The statistics that a site shares, by layer; those of the base where it shares none.

    Raises: InputError for a variance that is below zero by more than rounding.
    """
    own = of_base(base)
    if not site.has_statistics:
        return own
    found = {}
    for name, channels in own.items():
        mean = channels.mean + site.source.read(f"{name}.running_mean").double()
        variance = channels.variance + site.source.read(f"{name}.running_var").double()
        lowest = float(variance.min()) if variance.numel() else 0.0
        if lowest < -ROUNDING * max(1.0, float(channels.variance.abs().max())):
            raise InputError(
                f"'{site.name}' shares a variance of {lowest:.3g} for '{name}', and none can be below zero",
                hint="the site's statistics are damaged: make the vector anew, or without --with-statistics",
            )
        found[name] = Gaussian(mean, variance.clamp(min=0))
    return found


def combined(parts: Sequence[Mapping[str, Channels]], weights: Sequence[float]) -> dict[str, Gaussian]:
    """The mixture of several networks' statistics, layer by layer: law of total variance, in float64."""
    return {name: mixture([part[name] for part in parts], weights) for name in parts[0]}


def as_tensors(statistics: Mapping[str, Channels]) -> dict[str, torch.Tensor]:
    """Statistics by layer as tensors by their names in the file."""
    found: dict[str, torch.Tensor] = {}
    for name, channels in statistics.items():
        found |= {f"{name}.running_mean": channels.mean, f"{name}.running_var": channels.variance}
    return found


@dataclass(frozen=True, slots=True)
class Sites:
    """The sites that speak for the clinics: those that share statistics, or all of them with the base's."""

    base: Checkpoint
    members: tuple[Contribution, ...]
    shared: bool
    device: torch.device | str = "cpu"

    @property
    def weights(self) -> tuple[float, ...]:
        """The sites' weights; alike when a method takes weights that are no shares."""
        given = tuple(one.weight for one in self.members)
        return given if min(given) >= 0 and sum(given) > 0 else (1.0,) * len(given)

    def home(self) -> dict[str, Gaussian]:
        """The statistics of the mixture of their data, by layer."""
        return combined([of_site(self.base, one) for one in self.members], self.weights)

    def networks(self) -> Iterator[tuple[models.Network, dict[str, Gaussian]]]:
        """Each site's network in turn, with the statistics that belong to it."""
        for one in self.members:
            # Of a network larger than its device, weights are read from the folder as long as it is used.
            with tempfile.TemporaryDirectory() as place:
                yield network(self.base, one, Path(place), device=self.device), of_site(self.base, one)

    def shown(self, look: Callable[[models.Network, Mapping[str, Gaussian]], T], kept: list[T] | None) -> list[T]:
        """What `look` finds at each site's network; what is `kept` is not looked for again."""
        kept = [] if kept is None else kept
        if not kept:
            kept += [look(network, own) for network, own in self.networks()]
        return kept


def sharing(base: Checkpoint, sites: Sequence[Contribution], *, device: torch.device | str = "cpu") -> Sites:
    """The sites that share their statistics; all of them, with the base's statistics, when none does."""
    members = tuple(one for one in sites if one.has_statistics)
    return Sites(base, members or tuple(sites), bool(members), device)


def network(
    base: Checkpoint, site: Contribution, folder: Path, *, device: torch.device | str = "cpu"
) -> models.Network:
    """A site's network, written to a folder: the base plus its vector, with the statistics it shares or the base's."""
    layout = [
        Record(name, record.dtype, base.shape_with(name, site.labels), folder, 0)
        for name, record in base.records.items()
    ]
    write_file(folder / MODEL_FILE, layout, _tensors(base, site, layout))
    study_base.copy_description(base, folder, site.labels)
    return models.load(folder, device=device)


def _tensors(base: Checkpoint, site: Contribution, layout: list[Record]) -> Iterator[tuple[str, torch.Tensor]]:
    statistics = as_tensors(of_site(base, site))
    for record in in_file_order(layout):
        ours, role = base.tensors.read(record.name), base.roles[record.name]
        if role is Role.STATISTIC:
            ours = statistics[record.name].to(ours.dtype)
        elif role is not Role.CONSTANT:
            start = rows_by_label(ours, base.labels, site.labels) if role is Role.HEAD else ours
            ours = (start.double() + site.source.read(record.name).double()).to(ours.dtype)
        yield record.name, ours
