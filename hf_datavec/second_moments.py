"""Optional files beside a vector: second moments of a site's gradients, of its layers' inputs, of the base's features.

The first two say which weights the site's images depend on, so that methods can weigh each weight by it; the last are
sums that a head follows from in closed form. All summarise private images, so they travel only when a site says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError, listed
from hf_datavec.linear_head import FeatureSums
from hf_datavec.manifest import AGAIN, MANIFEST_FILE, Manifest, SecondMoment
from hf_datavec.methods import as_matrix
from hf_datavec.tensors import Record, StoredTensors, combined_digest, open_file
from hf_datavec.writing import in_file_order, write_file

if TYPE_CHECKING:
    import torch

Kind = Literal["fisher", "gram", "features"]
WHAT = {
    "fisher": "the diagonal of the Fisher information: how strongly predictions depend on each weight",
    "gram": "the products of the inputs of each linear or convolutional layer with each other",
    "features": "sums of the untouched base's features: their products with each other, and their sum for each label",
}
HEAD = "the products of the head's inputs with each other"
REVEALED = (
    "The sums of features show class counts, the mean feature of each class, and products of features; of few images "
    "the products span the features themselves, so a class with one image shows that image's feature vector. Share "
    "them as you would share the images' features, better under a secure sum."
)
# How values are stored. The features' mean is taken off their sums again, and 32 bits would leave too little.
DTYPES = {"fisher": "F32", "gram": "F32", "features": "F64"}
DAMAGED = "the file was changed or damaged; ask the site to send it again"
PRODUCTS, BY_LABEL = "products", "by_label"


@dataclass(frozen=True)
class SecondMoments:
    """The second moments beside a vector, of the kinds that its manifest lists."""

    folder: Path
    entries: Mapping[str, SecondMoment]
    tensors: Mapping[str, StoredTensors]

    def read(self, kind: str, name: str) -> torch.Tensor | None:
        """What is stored of one kind for a tensor of the vector, or None."""
        found = self.tensors[kind]
        return found.read(name) if name in found.records else None

    def feature_sums(self, labels: tuple[str, ...]) -> FeatureSums:
        """The sums of features, with a row for each of the vector's labels.

        Raises: InputError for values that are not finite, or that are not the sums of so many images.
        """
        import numpy as np

        found = self.tensors["features"]
        sums = FeatureSums(labels, *(np.asarray(found.array(name), np.float64) for name in (PRODUCTS, BY_LABEL)))
        place = self.folder / file_name("features")
        for name in (PRODUCTS, BY_LABEL):
            if not np.isfinite(getattr(sums, name)).all():
                raise InputError(f"'{place}': tensor '{name}' has NaN or infinite values", hint=DAMAGED)
        said = self.entries["features"].images
        if sums.images != said or (sums.counts < 0).any() or float(sums.counts.sum()) != said:
            counted = f"the products are of {sums.images:g} images, the labels of {float(sums.counts.sum()):g}"
            raise InputError(f"'{place}': {counted}, and the manifest says {said}", hint=DAMAGED)
        return sums

    def verify(self) -> None:
        """Compare the stored bytes with the manifest. Raises: InputError when they differ."""
        for kind, entry in sorted(self.entries.items()):
            found = self.tensors[kind].digest
            if found != entry.content:
                raise InputError(
                    f"'{self.folder / file_name(kind)}' is not the file its {MANIFEST_FILE} describes: "
                    f"digest {found[:19]}..., expected {entry.content[:19]}...",
                    hint=DAMAGED,
                )


def file_name(kind: str) -> str:
    """The name of a kind's file in the vector's folder."""
    return f"{kind}.safetensors"


def write(folder: Path, kind: Kind, found: Mapping[str, torch.Tensor], images: int) -> SecondMoment:
    """Write the second moments of one kind, by the tensors' names, beside a vector; returns the manifest's entry."""
    layout = [Record(name, DTYPES[kind], tuple(value.shape), folder, 0) for name, value in found.items()]
    stream = ((record.name, _stored(kind, found[record.name])) for record in in_file_order(layout))
    return SecondMoment(content=combined_digest(write_file(folder / file_name(kind), layout, stream)), images=images)


def open_beside(folder: Path, manifest: Manifest) -> SecondMoments:
    """The second moments in a vector's folder, their headers held against the manifest; no tensor is read.

    Raises: InputError for a file that is missing or does not fit.
    """
    entries: dict[str, SecondMoment] = {str(kind): one for kind, one in (manifest.second_moments or {}).items()}
    tensors = {kind: open_file(folder / file_name(kind)) for kind in sorted(entries)}
    for kind, stored in tensors.items():
        wrong = list(_misfits(kind, stored, manifest))
        if wrong:
            problem = f"'{folder / file_name(kind)}' does not fit its vector: {listed(wrong)}"
            raise InputError(problem, hint=AGAIN)
    return SecondMoments(folder, entries, tensors)


def expected_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a tensor's second moments; None for one that has none of the kind."""
    if kind == "fisher":
        return shape
    if kind == "features":  # which are of the head as a whole
        return None
    matrix = as_matrix(shape)
    return (matrix[1], matrix[1]) if matrix else None


def feature_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The shapes of the sums of features, by name; none for a head that is no single linear layer."""
    heads = [entry.shape for entry in manifest.stored.values() if entry.role is Role.HEAD]
    matrices = [shape for shape in heads if len(shape) == 2]
    if len(matrices) != 1:
        return {}
    rows, columns = matrices[0]
    return {PRODUCTS: (columns + 1, columns + 1), BY_LABEL: (rows, columns + 1)}


def _stored(kind: Kind, value: torch.Tensor) -> torch.Tensor:
    return value.double() if DTYPES[kind] == "F64" else value.float()


def _misfits(kind: str, stored: StoredTensors, manifest: Manifest) -> Iterator[str]:
    if kind == "features":
        yield from _feature_misfits(stored, manifest)
        return
    weights = {name: entry.shape for name, entry in manifest.stored.items() if entry.role is not Role.STATISTIC}
    for name, record in stored.records.items():
        if name not in weights or record.dtype != DTYPES[kind] or record.shape != expected_shape(kind, weights[name]):
            yield name
    if kind == "fisher":
        yield from set(weights) - set(stored.records)


def _feature_misfits(stored: StoredTensors, manifest: Manifest) -> Iterator[str]:
    expected = feature_shapes(manifest)
    for name in sorted({*stored.records, *(expected or (PRODUCTS, BY_LABEL))}):
        record = stored.records.get(name)
        if record is None or record.dtype != DTYPES["features"] or record.shape != expected.get(name):
            yield name
