"""Task vectors: opened and checked, or computed from a base and a tuned network when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import __version__
from hf_datavec import manifest as manifests
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.manifest import AGAIN, VECTOR_FILE, Manifest
from hf_datavec.second_moments import SecondMoments, open_beside
from hf_datavec.tensors import NUMPY_NAMES, Record, StoredTensors, Tensors, combined_digest, open_file
from hf_datavec.tuned import Tuned

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
    Parts = Callable[[slice], torch.Tensor]
    Arrays = Callable[[slice], Array]

# Vectors travel in float32 whatever the base's type: differences of half-precision weights need the bits.
VECTOR_DTYPE = "F32"


@dataclass(frozen=True)
class TaskVector:
    """A vector folder: the manifest and the stored differences."""

    folder: Path
    manifest: Manifest
    tensors: StoredTensors
    beside: SecondMoments

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    def read(self, name: str) -> torch.Tensor:
        """The float32 difference; head tensors have one row per label of `labels`."""
        return self.tensors.read(name)

    def parts(self, name: str) -> Parts:
        """What reads some values of the flattened difference."""
        return self.read(name).reshape(-1).__getitem__

    @property
    def by_numpy(self) -> bool:
        """Whether `arrays` reads every tensor."""
        return True

    def arrays(self, name: str) -> Arrays:
        """The same as `parts`, without torch."""
        return _flat(self.tensors, name).__getitem__

    @property
    def weights(self) -> dict[str, int]:
        """How many values each tensor has that is neither of a head nor a statistic."""
        stored = self.manifest.stored.items()
        return {name: math.prod(entry.shape) for name, entry in stored if entry.role is Role.WEIGHT}

    def verify(self, *, threads: int | None = None) -> None:
        """Compare the stored bytes with the manifest. Raises: InputError when they differ."""
        self._compare(self.tensors.hashed(threads=threads) if threads else self.tensors.digest)

    def verify_by(self, hashes: Mapping[str, str]) -> None:
        """The same by hashes of tensors that somebody has taken; those that are missing are taken here."""
        taken = (hashes.get(name) or self.tensors.hash_of(name) for name in self.tensors.records)
        self._compare(combined_digest(zip(self.tensors.records.values(), taken, strict=True)))

    def _compare(self, found: str) -> None:
        if found != self.manifest.content:
            raise InputError(
                f"'{self.folder / VECTOR_FILE}' is not the file its {manifests.MANIFEST_FILE} describes: "
                f"digest {found[:19]}..., expected {self.manifest.content[:19]}...",
                hint="the file was changed or damaged; ask the site to send it again",
            )
        self.beside.verify()


@dataclass(frozen=True)
class TunedDifferences:
    """The differences of a tuned network to its base, computed when they are read."""

    base: Checkpoint
    tuned: Tuned

    @property
    def labels(self) -> tuple[str, ...]:
        return self.tuned.labels

    def read(self, name: str) -> torch.Tensor:
        """Tuned minus base in float32; a head row whose label the base lacks counts from zero.

        Raises: InputError for NaN or infinite values.
        """
        ours, theirs = self.base.tensors.read(name), self.tuned.read(name)
        if self.base.roles[name] is Role.HEAD and self.base.labels != self.labels:
            ours = rows_by_label(ours, self.base.labels, self.labels)
        difference = self._between(name, ours, theirs)
        if not math.isfinite(float(difference.sum())):
            for tensor, where in (
                (ours, str(self.base.folder)),
                (theirs, self.tuned.text),
                (difference, self.tuned.text),
            ):
                refuse_nonfinite(tensor, name, where)
        return difference

    def parts(self, name: str) -> Parts:
        """What reads some values of the flattened difference, infinite and NaN ones too; of no head."""
        ours, theirs = self.base.tensors.read(name).reshape(-1), self.tuned.read(name).reshape(-1)
        return lambda where: self._between(name, ours[where], theirs[where])

    @cached_property
    def by_numpy(self) -> bool:
        """Whether `arrays` reads every tensor: both networks are safetensors, of types that numpy knows."""
        networks = (self.base.tensors, self.tuned.tensors)
        return all(
            isinstance(one, StoredTensors) and {record.dtype for record in one.records.values()} <= set(NUMPY_NAMES)
            for one in networks
        )

    def arrays(self, name: str) -> Arrays:
        """The same as `parts`, without torch."""
        import numpy as np

        ours, theirs = _flat(self.base.tensors, name), _flat(self.tuned.tensors, self.tuned.names[name])
        if self.base.records[name].dtype == "F64":
            return lambda where: np.subtract(theirs[where], ours[where], dtype=np.float64).astype(np.float32)
        return lambda where: np.subtract(theirs[where], ours[where], dtype=np.float32, casting="same_kind")

    def _between(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if self.base.records[name].dtype == "F64":
            return (theirs.double() - ours.double()).float()
        return theirs.float() - ours.float()


@dataclass(frozen=True)
class Combination:
    """What a method made of all vectors, in float64; a merge of it alone only scales and adds it."""

    labels: tuple[str, ...]
    tensors: StoredTensors

    def read(self, name: str) -> torch.Tensor:
        """The unscaled combination."""
        return self.tensors.read(name)

    def parts(self, name: str) -> Parts:
        """What reads some values of the flattened combination."""
        return self.read(name).reshape(-1).__getitem__

    @property
    def by_numpy(self) -> bool:
        """Whether `arrays` reads every tensor."""
        return True

    def arrays(self, name: str) -> Arrays:
        """The same as `parts`, without torch."""
        return _flat(self.tensors, name).__getitem__


@dataclass(frozen=True)
class Nothing:
    """Tensors of these shapes that leave whatever is added to them as it is, the sign of a zero included."""

    records: Mapping[str, Record]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in float64."""
        import torch

        return torch.full(self.records[name].shape, -0.0, dtype=torch.float64)

    def array(self, name: str) -> Array:
        """The same flat and without torch, in the room of one value."""
        import numpy as np

        return np.broadcast_to(np.float64(-0.0), math.prod(self.records[name].shape))


def _flat(tensors: Tensors, name: str) -> Array:
    assert isinstance(tensors, StoredTensors)
    return tensors.array(name).reshape(-1)


def rows_by_label(tensor: torch.Tensor, have: tuple[str, ...], want: tuple[str, ...]) -> torch.Tensor:
    """The rows of a head tensor in the order of other labels; zero for a label that it lacks."""
    row_of = {label: row for row, label in enumerate(have)}
    result = tensor.new_zeros((len(want), *tensor.shape[1:]))
    for row, label in enumerate(want):
        if label in row_of:
            result[row] = tensor[row_of[label]]
    return result


def refuse_nonfinite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise InputError when a tensor holds NaN or infinite values, and say how many."""
    import torch

    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # which torch neither adds nor compares
        tensor = tensor.float()
    # A sum shows them, and takes no memory. Where it is not finite, which finite values that are too large together
    # cause as well, each value is looked at, and that takes as much memory as the tensor and more.
    if math.isfinite(float(tensor.sum())):
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise InputError(
            f"'{where}': tensor '{name}' has {count} NaN or infinite values of {tensor.numel()}",
            hint="the training diverged or the file is damaged; a vector must be finite",
        )


def tool_versions() -> dict[str, str]:
    """The versions that decide the bytes of a result."""
    return {"hf-datavec": __version__, **{name: version(name) for name in ("numpy", "safetensors", "torch")}}


def open_vector(folder: Path) -> TaskVector:
    """The vector in a folder, its header held against its manifest; no tensor is read.

    Raises: InputError for everything that does not fit, told at once.
    """
    manifest = manifests.read(folder)
    tensors = open_file(folder / VECTOR_FILE)
    stored = manifest.stored
    errors = []
    missing, extra = set(stored) - set(tensors.records), set(tensors.records) - set(stored)
    file = folder / VECTOR_FILE
    if missing:
        errors.append(InputError(f"'{file}' lacks tensors that its manifest lists: {listed(missing)}", hint=AGAIN))
    if extra:
        errors.append(InputError(f"'{file}' has tensors that its manifest does not list: {listed(extra)}", hint=AGAIN))
    for name in sorted(set(stored) & set(tensors.records)):
        record = tensors.records[name]
        if record.dtype != VECTOR_DTYPE:
            problem = f"'{file}': tensor '{name}' has type {record.dtype}, expected {VECTOR_DTYPE}"
            errors.append(InputError(problem, hint=AGAIN))
        elif record.shape != stored[name].shape:
            expected = list(stored[name].shape)
            errors.append(
                InputError(f"'{file}': tensor '{name}' has shape {list(record.shape)}, its manifest says {expected}")
            )
    raise_all(errors)
    return TaskVector(folder, manifest, tensors, open_beside(folder, manifest))
