"""Optional files beside a vector: second moments of a site's gradients and of its layers' inputs.

They say which weights the site's images depend on, so that methods can weigh each weight by it. Both summarise private
images, so they travel only when a site says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError, listed
from hf_datavec.manifest import AGAIN, MANIFEST_FILE, Manifest, SecondMoment
from hf_datavec.methods import as_matrix
from hf_datavec.tensors import Record, StoredTensors, combined_digest, open_file
from hf_datavec.writing import in_file_order, write_file

if TYPE_CHECKING:
    import torch

Kind = Literal["fisher", "gram"]
WHAT = {
    "fisher": "the diagonal of the Fisher information: how strongly predictions depend on each weight",
    "gram": "the products of the inputs of each linear or convolutional layer with each other",
}
HEAD = "the products of the head's inputs with each other"


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

    def verify(self) -> None:
        """Compare the stored bytes with the manifest. Raises: InputError when they differ."""
        for kind, entry in sorted(self.entries.items()):
            found = self.tensors[kind].digest
            if found != entry.content:
                raise InputError(
                    f"'{self.folder / file_name(kind)}' is not the file its {MANIFEST_FILE} describes: "
                    f"digest {found[:19]}..., expected {entry.content[:19]}...",
                    hint="the file was changed or damaged; ask the site to send it again",
                )


def file_name(kind: str) -> str:
    """The name of a kind's file in the vector's folder."""
    return f"{kind}.safetensors"


def write(folder: Path, kind: Kind, found: Mapping[str, torch.Tensor], images: int) -> SecondMoment:
    """Write the second moments of one kind, by the tensors' names, beside a vector; returns the manifest's entry."""
    layout = [Record(name, "F32", tuple(value.shape), folder, 0) for name, value in found.items()]
    stream = ((record.name, found[record.name].float()) for record in in_file_order(layout))
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
    matrix = as_matrix(shape)
    return (matrix[1], matrix[1]) if matrix else None


def _misfits(kind: str, stored: StoredTensors, manifest: Manifest) -> Iterator[str]:
    weights = {name: entry.shape for name, entry in manifest.stored.items() if entry.role is not Role.STATISTIC}
    for name, record in stored.records.items():
        if name not in weights or record.dtype != "F32" or record.shape != expected_shape(kind, weights[name]):
            yield name
    if kind == "fisher":
        yield from set(weights) - set(stored.records)
