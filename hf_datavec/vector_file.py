"""Task vectors written: the differences, and the manifest that describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hf_datavec import lineage
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.hub import Fetched
from hf_datavec.manifest import VECTOR_FILE, BaseIdentity, Manifest, SecondMoment, StatisticsNoise, TensorEntry
from hf_datavec.second_moments import Kind
from hf_datavec.staging import flushing
from hf_datavec.tensors import Record, combined_digest
from hf_datavec.threads import PIECE, Task, in_order
from hf_datavec.vector import VECTOR_DTYPE, TunedDifferences, tool_versions
from hf_datavec.writing import in_file_order, worth_caching, write_file

if TYPE_CHECKING:
    import torch

    from hf_datavec.vector import Arrays, Parts
    from hf_datavec.writing import Values

# Values whose squares are summed at a time.
SLICE = 2**16
# Bytes of a vector after which those that are written are brought to the disk, beside other work.
FLUSHED = 2**27


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
    temperature: float | None = None,
) -> Manifest:
    """Write `vector.safetensors` and `datavec.json` into a folder and return the manifest.

    Where numpy knows all types and heads have the rows of the base's, torch is not started.

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
        temperature=temperature,
        norm=0.0,
        tensors=entries,
        second_moments=dict(second_moments) if second_moments else None,
        lineage=lineage.read(base.folder) or None,
        tools=tool_versions(),
    )
    if isinstance(differences, TunedDifferences) and differences.by_numpy and base.labels == differences.labels:
        return write_described(folder, draft, differences.read, arrays=differences.arrays)
    return write_described(folder, draft, differences.read, parts=differences.parts)


def write_described(
    folder: Path,
    draft: Manifest,
    read: Callable[[str], torch.Tensor],
    *,
    parts: Callable[[str], Parts] | None = None,
    arrays: Callable[[str], Arrays] | None = None,
) -> Manifest:
    """Write the stored tensors that a manifest lists, and the manifest with their digest and norm.

    With `parts` weights are read piece by piece, and only heads and statistics as a whole; with `arrays` all are read
    piece by piece and without torch. Then `read` only tells which values of a tensor are not finite.
    """
    import numpy as np

    stored = draft.stored
    layout = [Record(name, VECTOR_DTYPE, entry.shape, folder, 0) for name, entry in stored.items()]
    squares: list[float] = []
    cached = worth_caching(layout)

    def measured(name: str, where: slice | None = None) -> tuple[str, Values, float]:
        by_pieces = arrays or parts
        with np.errstate(over="ignore", invalid="ignore"):  # told by name
            difference: Values = read(name) if where is None or by_pieces is None else by_pieces(name)(where)
            square = _square(difference)
        if not math.isfinite(square):
            read(name)
        return name, difference, square if stored[name].role is Role.WEIGHT else 0.0

    def tasks() -> Iterator[Task[tuple[str, Values, float]]]:
        # All differences have one type, so the order of the file is the order of the names.
        for record in in_file_order(layout):
            values = math.prod(record.shape)
            if arrays is None and (parts is None or stored[record.name].role is not Role.WEIGHT):
                yield Task(partial(measured, record.name), record.nbytes)
                continue
            for start in range(0, max(1, values), PIECE):
                where = slice(start, min(start + PIECE, values))
                yield Task(partial(measured, record.name, where), 3 * record.nbytes * PIECE // max(PIECE, values))

    def stream(flush: Callable[[Path], None]) -> Iterator[tuple[str, Values]]:
        written = 0
        for name, difference, square in in_order(tasks(), by_torch=arrays is None):
            squares.append(square)
            yield name, difference
            written += difference.nbytes
            if cached and written >= FLUSHED:
                flush(folder / VECTOR_FILE)
                written = 0

    with flushing() as flush:
        written = write_file(folder / VECTOR_FILE, layout, stream(flush), cached=cached)
    content = combined_digest(written)
    # Six digits, since the last bits depend on how many threads sum up.
    length = float(f"{math.sqrt(math.fsum(squares)):.6g}")
    result = draft.model_copy(update={"content": content, "norm": length}).sealed()
    result.write(folder)
    return result


def norm(tensors: Iterable[Values]) -> float:
    """The length of all tensors together."""
    return math.sqrt(math.fsum(_square(tensor) for tensor in tensors))


def _square(values: Values) -> float:
    """The sum of squares, in float64; infinite or NaN if and only if a value is."""
    import numpy as np

    if isinstance(values, np.ndarray):
        # By slices that stay near a core.
        wide = (values[start : start + SLICE].astype(np.float64) for start in range(0, len(values), SLICE))
        return math.fsum(float(np.dot(some, some)) for some in wide)
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def base_identity(fetched: Fetched, base: Checkpoint) -> BaseIdentity:
    """How a manifest names the base that was fetched."""
    weights = {name: value for name, value in fetched.hashes.items() if name.endswith(".safetensors")}
    return BaseIdentity(
        id=fetched.reference.identity, commit=fetched.commit, digest=base.tensors.digest, files=weights or None
    )
