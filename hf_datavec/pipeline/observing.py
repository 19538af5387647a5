"""What a site measures on its images beside its vector: second moments of the kinds that it says."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import curvature, hub, probe, second_moments, vector
from hf_datavec.checkpoint import Role
from hf_datavec.images import ImageSet, evenly_spread, open_images
from hf_datavec.manifest import SecondMoment
from hf_datavec.models import load, refuse_offloaded
from hf_datavec.pipeline import device as devices
from hf_datavec.progress import progress
from hf_datavec.second_moments import Kind

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Observed:
    """Which second moments are measured, on how many images of which set at most; features on all of them."""

    kinds: tuple[Kind, ...]
    images: str | ImageSet
    split: str | None = None
    count: int = 256
    device: devices.Device = "auto"

    @property
    def runs_tuned(self) -> bool:
        """Whether the tuned network must be run; features are the base's."""
        return set(self.kinds) != {"features"}

    def opened(self) -> ImageSet:
        """The images. Raises: InputError, see `open_images`."""
        given = self.images
        return open_images(hub.parse(given), split=self.split) if isinstance(given, str) else given


def measured(
    wanted: Observed, place: Path, differences: vector.TunedDifferences, folder: Path
) -> dict[Kind, SecondMoment]:
    """Measure second moments on the site's images and write them beside the vector in `folder`.

    Raises: InputError for unreadable images, and for features for labels that the vector lacks.
    """
    images = wanted.opened()
    found: dict[Kind, SecondMoment] = {}
    if "features" in wanted.kinds:
        found["features"] = _features(wanted, images, differences, folder)
    if wanted.runs_tuned:
        found |= _of_tuned(wanted, images, place, differences, folder)
    return {kind: found[kind] for kind in wanted.kinds}


def _features(wanted: Observed, images: ImageSet, differences: vector.TunedDifferences, folder: Path) -> SecondMoment:
    """The sums of the base's features over all images."""
    base = differences.base
    images.label_rows(differences.labels)
    network = load(base.folder, device=devices.choose(wanted.device))
    refuse_offloaded(network, "measuring features")
    values = probe.feature_sums(network, base, images, differences.labels)
    _refuse_nonfinite(values, wanted)
    return second_moments.write(folder, "features", values, len(images))


def _of_tuned(
    wanted: Observed, images: ImageSet, place: Path, differences: vector.TunedDifferences, folder: Path
) -> dict[Kind, SecondMoment]:
    """The kinds that are measured on the tuned network at `place`."""
    base, tuned = differences.base, differences.tuned
    names = base.named(Role.WEIGHT, Role.HEAD)
    count = min(wanted.count, len(images))
    spread = evenly_spread(len(images), count)
    network = load(place, device=devices.choose(wanted.device))
    refuse_offloaded(network, "measuring second moments")
    weights = curvature.parameters(network, {name: tuned.names[name] for name in names})
    found: dict[Kind, SecondMoment] = {}
    for kind in (kind for kind in wanted.kinds if kind != "features"):
        bar = progress(range(count), text=kind, total=count, unit="image")

        def pixels(indices: Sequence[int]) -> torch.Tensor:
            return images.tensors(network.preprocess, [spread[index] for index in indices])

        def notify(done: int, bar: Iterator[int] = bar) -> None:
            for _ in range(done):
                next(bar, None)

        if kind == "fisher":
            values = curvature.fisher(network, weights, pixels, count, notify=notify)
        else:
            # A round of heads moves nothing else, and what does not move is not weighed.
            only = _is_head_alone(differences)
            some = {name: value for name, value in weights.items() if not only or name in base.named(Role.HEAD)}
            values = curvature.gram(network, some, pixels, count, notify=notify)
            if only and count < len(images):
                text = "warning: the Gram matrix is of %d of %d images; --count %d makes it that of all"
                log.warning(text, count, len(images), len(images))
        if kind == "fisher":  # no prediction depends on what is no parameter
            values = {name: values.get(name, tuned.read(name).float() * 0) for name in names}
        _refuse_nonfinite(values, wanted)
        found[kind] = second_moments.write(folder, kind, values, count)
        if kind == "gram" and only:
            found[kind] = found[kind].model_copy(update={"only": "head"})
    return found


def _refuse_nonfinite(values: dict[str, torch.Tensor], wanted: Observed) -> None:
    for name, value in sorted(values.items()):
        vector.refuse_nonfinite(value, name, wanted.images if isinstance(wanted.images, str) else "the site's images")


def _is_head_alone(differences: vector.TunedDifferences) -> bool:
    """Whether the tuned network differs from its base in nothing but the head, statistics included."""
    base = differences.base
    names = set(base.named(Role.WEIGHT, Role.STATISTIC)) & set(differences.tuned.names)
    return all(bool((base.tensors.read(name) == differences.tuned.read(name)).all()) for name in sorted(names))
