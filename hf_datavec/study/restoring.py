"""Restoring merged networks of a study in memory; what several merges need is measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_datavec import models, recalibrate
from hf_datavec.images import evenly_spread
from hf_datavec.recalibrate import Domain, Gaussian, Pictures, Sites
from hf_datavec.recipe import Recalibrate
from hf_datavec.study.pictures import Part

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    Preprocess = Callable[[Image], torch.Tensor]

BATCH = 64


def pictures(images: Part, preprocess: Preprocess, count: int | None = None) -> Pictures:
    """A part's images as networks take them, evenly spread when there are more than `count`."""
    number = min(count or len(images), len(images))
    chosen = evenly_spread(len(images), number)

    def load(indices: Sequence[int]) -> torch.Tensor:
        return images.tensors(preprocess, [chosen[index] for index in indices])

    return Pictures(number, load, BATCH)


def labelled(images: Part, known: Sequence[str]) -> bool:
    """Whether tuning can go by labels: the public images have some, and the network knows them all."""
    return images.label_column is not None and set(images.labels) <= set(known)


@dataclass(frozen=True)
class Restorer:
    """Public images and the sites that merges are made of."""

    sites: Sites
    public: Part
    count: int

    @cached_property
    def _kept(self) -> dict[str, list[Any]]:
        """What the sites' networks show on the public images, by mode."""
        return {}

    @cached_property
    def _pictures(self) -> Pictures:
        return pictures(self.public, models.preprocess(self.sites.base), self.count)

    @cached_property
    def _domain(self) -> Domain:
        return recalibrate.compare(self.sites, self._pictures)

    @property
    def _before_tuning(self) -> str:
        """Tuning starts from statistics that fit, as in a merge."""
        return "relative" if self._domain.foreign and self.sites.shared else "statistics"

    def apply(self, network: models.Network, mode: str) -> None:
        """Restore a network in place, by a mode of the recipe other than `auto`."""
        if mode == "none" or not models.normalization_layers(network.module):
            return
        recalibrate.assign(network, self._statistics(network, self._before_tuning if mode == "tune" else mode))
        if mode == "tune":
            self._tune(network)

    def _statistics(self, network: models.Network, mode: str) -> Mapping[str, Gaussian]:
        if mode == "moments":
            return self.sites.home()
        kept = self._kept.setdefault(mode, [])
        return recalibrate.measured(mode, network, self._pictures, self.sites, kept=kept).statistics

    def _tune(self, network: models.Network) -> None:
        chosen, count = Recalibrate().tuning, self._pictures.count
        rows = self.public.label_rows(network.labels) if labelled(self.public, network.labels) else None
        some = [rows[index] for index in evenly_spread(len(rows), count)] if rows else None
        recalibrate.tune(
            network,
            self._pictures,
            some,
            parameters=chosen.trained,
            steps=chosen.steps,
            learning_rate=chosen.learning_rate,
        )
