"""Task vectors: computed from a base and a tuned network, written, opened and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hf_datavec import __version__, lineage
from hf_datavec import manifest as manifests
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.hub import Fetched
from hf_datavec.manifest import AGAIN, VECTOR_FILE, BaseIdentity, Manifest, SecondMoment, StatisticsNoise, TensorEntry
from hf_datavec.second_moments import Kind, SecondMoments, open_beside
from hf_datavec.tensors import Record, StoredTensors, combined_digest, open_file
from hf_datavec.threads import PIECE, Task, in_order
from hf_datavec.tuned import Tuned
from hf_datavec.writing import in_file_order, write_file

if TYPE_CHECKING:
    import torch

    Parts = Callable[[slice], torch.Tensor]

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
    def weights(self) -> dict[str, int]:
        """How many values each tensor has that is neither of a head nor a statistic."""
        stored = self.manifest.stored.items()
        return {name: math.prod(entry.shape) for name, entry in stored if entry.role is Role.WEIGHT}

    def verify(self) -> None:
        """Compare the stored bytes with the manifest. Raises: InputError when they differ."""
        found = self.tensors.digest
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
        refuse_nonfinite(difference, name, self.tuned.text)
        return difference

    def parts(self, name: str) -> Parts:
        """What reads some values of the flattened difference, infinite and NaN ones too; of no head."""
        ours, theirs = self.base.tensors.read(name).reshape(-1), self.tuned.read(name).reshape(-1)
        return lambda where: self._between(name, ours[where], theirs[where])

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

    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        count = int((~finite).sum())
        raise InputError(
            f"'{where}': tensor '{name}' has {count} NaN or infinite values of {tensor.numel()}",
            hint="the training diverged or the file is damaged; a vector must be finite",
        )


class Differences(Protocol):
    """Differences to a base, whatever they are computed from."""

    @property
    def base(self) -> Checkpoint: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def parts(self, name: str) -> Parts: ...


def write(
    folder: Path,
    differences: Differences,
    base_id: BaseIdentity,
    *,
    with_statistics: bool = False,
    examples: Mapping[str, int] | None = None,
    training: Mapping[str, Any] | None = None,
    second_moments: Mapping[Kind, SecondMoment] | None = None,
    noise: StatisticsNoise | None = None,
) -> Manifest:
    """Write `vector.safetensors` and `datavec.json` into a folder and return the manifest.

    Raises: InputError for a tuned network with NaN or infinite weights.
    """
    base = differences.base
    roles = (Role.WEIGHT, Role.HEAD, Role.STATISTIC) if with_statistics else (Role.WEIGHT, Role.HEAD)
    entries = {
        name: TensorEntry(
            role=base.roles[name],
            shape=base.shape_with(name, differences.labels),
            dtype=base.records[name].dtype,
            stored=base.roles[name] in roles,
        )
        for name in sorted(base.records)
    }
    draft = Manifest(
        base=base_id,
        content="",
        labels=differences.labels,
        examples=dict(examples) if examples else None,
        training=dict(training) if training else None,
        noise=noise,
        norm=0.0,
        tensors=entries,
        second_moments=dict(second_moments) if second_moments else None,
        lineage=lineage.read(base.folder) or None,
        tools=tool_versions(),
    )
    return write_described(folder, draft, differences.read, parts=differences.parts)


def write_described(
    folder: Path, draft: Manifest, read: Callable[[str], torch.Tensor], *, parts: Callable[[str], Parts] | None = None
) -> Manifest:
    """Write the stored tensors that a manifest lists, and the manifest with their digest and norm.

    With `parts` weights are read piece by piece, and only heads and statistics as a whole.
    """
    stored = draft.stored
    layout = [Record(name, VECTOR_DTYPE, entry.shape, folder, 0) for name, entry in stored.items()]
    squares: list[float] = []

    def measured(name: str, where: slice | None = None) -> tuple[str, torch.Tensor, float]:
        difference = read(name) if where is None or parts is None else parts(name)(where)
        if where is not None and not math.isfinite(float(difference.sum())):
            read(name)  # tells which values are not finite
        return name, difference, _square(difference) if stored[name].role is Role.WEIGHT else 0.0

    def tasks() -> Iterator[Task[tuple[str, torch.Tensor, float]]]:
        # All differences have one type, so the order of the file is the order of the names.
        for record in in_file_order(layout):
            values = math.prod(record.shape)
            if parts is None or stored[record.name].role is not Role.WEIGHT:
                yield Task(partial(measured, record.name), record.nbytes)
                continue
            for start in range(0, max(1, values), PIECE):
                where = slice(start, min(start + PIECE, values))
                yield Task(partial(measured, record.name, where), 3 * record.nbytes * PIECE // max(PIECE, values))

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, difference, square in in_order(tasks()):
            squares.append(square)
            yield name, difference

    content = combined_digest(write_file(folder / VECTOR_FILE, layout, stream()))
    # Six digits, since the last bits depend on how many threads sum up.
    length = float(f"{math.sqrt(math.fsum(squares)):.6g}")
    result = draft.model_copy(update={"content": content, "norm": length}).sealed()
    result.write(folder)
    return result


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """The length of all tensors together."""
    return math.sqrt(math.fsum(_square(tensor) for tensor in tensors))


def _square(tensor: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def tool_versions() -> dict[str, str]:
    """The versions that decide the bytes of a result."""
    return {"hf-datavec": __version__, **{name: version(name) for name in ("safetensors", "torch")}}


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


def base_identity(fetched: Fetched, base: Checkpoint) -> BaseIdentity:
    """How a manifest names the base that was fetched."""
    weights = {name: value for name, value in fetched.hashes.items() if name.endswith(".safetensors")}
    return BaseIdentity(
        id=fetched.reference.identity, commit=fetched.commit, digest=base.tensors.digest, files=weights or None
    )
