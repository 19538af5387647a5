"""The study's images: all of them with their groups, and parts of them as some scanner shows them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from hf_datavec import hub
from hf_datavec.errors import InputError, did_you_mean, listed
from hf_datavec.images import ImageSet, open_images
from hf_datavec.study.sections import Data

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Stands for images and networks that come with packages.
EMBEDDED = "demo"


@dataclass(frozen=True)
class Part(ImageSet):
    """Some of the images, each as its scanner shows it; prepared pictures are kept.

    All networks of a study prepare pictures alike, so that what one of them prepared serves the others.
    """

    places: tuple[int, ...] = ()
    scanners: tuple[str | None, ...] = ()
    kept: dict[int, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def image(self, index: int) -> Image:
        """The picture in RGB; a scanner's noise belongs to the picture, whatever part it is in. Raises as any set."""
        import numpy as np

        from hf_datavec.scanners import rescan

        picture, scanner = super().image(index), self.scanners[index]
        if scanner is None:
            return picture
        return rescan(picture, scanner, np.random.default_rng(self.places[index]))

    def part(self, indices: Sequence[int]) -> Part:
        """The pictures of some indices as a set of their own."""
        places = tuple(self.places[index] for index in indices)
        scanners = tuple(self.scanners[index] for index in indices)
        return replace(self, rows=self.rows.select(indices), places=places, scanners=scanners, kept={})

    @cached_property
    def digest(self) -> str:
        """BLAKE3 over the encoded pictures and the names of their scanners."""
        plain = str(super().digest)
        if not any(self.scanners):
            return plain
        seen = ",".join(map(str, (*self.places, *self.scanners)))
        return f"blake3:{blake3(f'{plain} {seen}'.encode()).hexdigest()}"

    def tensors(self, preprocess: Callable[[Image], torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The preprocessed pictures of some indices, shape (n, channels, height, width)."""
        import torch

        for index in indices:
            if index not in self.kept:
                self.kept[index] = preprocess(self.image(index))
        return torch.stack([self.kept[index] for index in indices])


def part(images: ImageSet, places: Sequence[int], scanners: Sequence[str | None] | None = None) -> Part:
    """The pictures at some places of a set, in this order."""
    rows = images.rows.select(list(places))
    shown = tuple(scanners) if scanners else (None,) * len(places)
    return Part(images.fetched, rows, images.image_column, images.label_column, tuple(places), shown)


@dataclass(frozen=True)
class Table:
    """All images of a study with the label and the group of each; columns are read when they are asked for."""

    images: ImageSet
    labels: tuple[str, ...]
    groups: tuple[str, ...]

    def column(self, name: str) -> tuple[str, ...]:
        """A column as text, one entry for each image. Raises: InputError when there is none of that name."""
        return _column(self.images, name)


def open_table(data: Data, folder: Path) -> Table:
    """The images that a study is about; local paths are relative to `folder`.

    Raises: InputError for what `open_images` refuses, unknown columns, and missing labels.
    """
    images = _digits() if data.images == EMBEDDED else open_images(
        hub.parse(data.images, relative_to=folder), split=data.split
    )  # fmt: skip
    if data.label is not None:
        _refuse_unknown(images, data.label)
        images = replace(images, label_column=data.label)
    if data.count is not None and data.count < len(images):
        import numpy as np

        chosen = sorted(np.random.default_rng(0).permutation(len(images))[: data.count].tolist())
        images = replace(images, rows=images.rows.select(chosen))
    groups = _column(images, data.group) if data.group else tuple(str(index) for index in range(len(images)))
    return Table(images, images.labels, groups)


def _column(images: ImageSet, name: str) -> tuple[str, ...]:
    _refuse_unknown(images, name)
    feature, values = images.rows.features[name], images.rows[name]
    empty = [index for index, value in enumerate(values) if value is None or value == ""]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(images)} images have nothing in the column '{name}'; the first is number {empty[0]}"
        )
    known = feature.int2str if hasattr(feature, "int2str") else str
    return tuple(known(value) for value in values)


def _refuse_unknown(images: ImageSet, name: str) -> None:
    columns = [column for column in images.rows.features if column != images.image_column]
    if name not in columns:
        have = f"its columns are {listed(columns)}" if columns else "it has no columns beside the images"
        raise InputError(f"'{images.text}' has no column '{name}'; {have}", hint=did_you_mean(name, columns))


def _digits() -> ImageSet:
    """The handwritten digits of a package, as an image set in memory."""
    import datasets

    from hf_datavec.samples import digits
    from hf_datavec.scanners import enlarged

    pictures, labels = digits()
    columns: dict[str, list[Any]] = {"image": [], "label": [str(label) for label in labels]}
    for number, picture in enumerate(pictures):
        stored = io.BytesIO()
        enlarged(picture).save(stored, format="PNG")
        columns["image"].append({"path": f"digit-{number}", "bytes": stored.getvalue()})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    here = hub.Fetched(hub.Reference(EMBEDDED, path=Path(EMBEDDED)), Path(EMBEDDED))
    return ImageSet(here, rows, "image", "label")
