"""Safetensors files written as a stream, whole or part by part, and hashed on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from hf_datavec import headers, uncached
from hf_datavec.errors import RunError
from hf_datavec.headers import ITEM_BYTES
from hf_datavec.tensors import TORCH_NAMES, Record

# A result of more bytes than this is not kept in the page cache for its next reader: taking memory for it costs more
# than reading it from its disk, and may push out the networks that the next merge reads.
MOST_CACHED = 2**29

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Values = torch.Tensor | NDArray[np.generic]


def write_file(
    path: Path, layout: Iterable[Record], stream: Iterable[tuple[str, Values]], *, cached: bool = True
) -> list[tuple[Record, str]]:
    """Write tensors to `path` as they come, and return each record with the hash of its bytes.

    `layout` gives names, types and shapes; `stream` must yield the same names in the order of `in_file_order`, of each
    the tensor, or its flattened values piece by piece. No more than one of them is held. What is not `cached` is
    written past the page cache.
    """
    coming = iter(stream)
    written = write_into(path, lay_out(path, layout, reserve=not cached), coming, cached=cached)
    if next(coming, None) is not None:
        raise ValueError(f"stream yielded more than was planned for '{path}'")
    return written


def places(path: Path, layout: Iterable[Record]) -> list[Record]:
    """Where tensors go in a file of theirs, in the order of its bytes."""
    records = in_file_order(layout)
    _, start = _header(records)
    placed = []
    for record in records:
        placed.append(Record(record.name, record.dtype, record.shape, path, start))
        start += record.nbytes
    return placed


def lay_out(path: Path, layout: Iterable[Record], *, keep: bool = False, reserve: bool = False) -> list[Record]:
    """Make a file with its header, its final size and holes where its tensors go; returns their places.

    With `keep`, what stands between header and end stays. With `reserve` the disk sets its room aside at once, which
    what is written past the page cache needs to be fast.
    """
    placed = places(path, layout)
    header, start = _header(placed)
    try:
        with open(path, "r+b" if keep and path.is_file() else "wb") as handle:
            handle.write(header)
            size = start + sum(record.nbytes for record in placed)
            handle.truncate(size)
        if reserve:
            uncached.reserve(path, size)
    except OSError as error:
        raise RunError(f"cannot write '{path}': {error.strerror}") from None
    return placed


def write_into(
    path: Path,
    records: Sequence[Record],
    stream: Iterator[tuple[str, Values]],
    *,
    cached: bool = True,
    hashed: bool = True,
) -> list[tuple[Record, str]]:
    """Write the next tensors of a stream, as in `write_file`, to their places in a file that `lay_out` made.

    `records` are neighbours in the file. Returns each with the hash of its bytes, empty if they are not to be `hashed`.
    """
    written: list[tuple[Record, str]] = []
    try:
        with uncached.appending(path, records[0].start if records else 0, cached=cached) as handle:
            for record in records:
                whole = blake3() if hashed else None
                for content in _contents(stream, record):
                    handle.write(content)
                    if whole is not None:
                        whole.update(content)
                written.append((record, whole.hexdigest() if whole is not None else ""))
    except OSError as error:
        raise RunError(f"cannot write '{path}': {error.strerror}") from None
    return written


def _contents(stream: Iterator[tuple[str, Values]], record: Record) -> Iterator[memoryview]:
    """The bytes of one tensor, as they come from a stream."""
    missing = record.nbytes
    while True:
        name, tensor = next(stream, ("", None))
        if tensor is None or name != record.name:
            raise ValueError(f"stream yielded '{name}' where '{record.name}' was due")
        content = _bytes_of(tensor, record, piece=True)
        missing -= len(content)
        yield content
        if missing < 0:
            raise ValueError(f"stream yielded more values of '{name}' than planned")
        if missing == 0:
            return


def worth_caching(layout: Iterable[Record]) -> bool:
    """Whether tensors are few enough to be kept in the page cache when they are written."""
    return sum(record.nbytes for record in layout) <= MOST_CACHED


def in_file_order(layout: Iterable[Record]) -> list[Record]:
    """Records in the order of their bytes in a file: widest type first, so that all are aligned, then by name."""
    return sorted(layout, key=lambda record: (-ITEM_BYTES[record.dtype], record.name))


def _header(records: Iterable[Record]) -> tuple[bytes, int]:
    entries, end = {}, 0
    for record in records:
        entries[record.name] = (record.dtype, record.shape, (end, end + record.nbytes))
        end += record.nbytes
    start = headers.encode(entries)
    return start, len(start)


def _bytes_of(values: Values, record: Record, *, piece: bool = False) -> memoryview:
    """The bytes of a tensor, or of a piece of its flattened values. Raises: ValueError when it is not as planned."""
    expected = TORCH_NAMES.get(record.dtype)
    found = str(values.dtype).removeprefix("torch.")
    wrong_type = found != expected if expected else values.itemsize != ITEM_BYTES[record.dtype]
    wrong_shape = tuple(values.shape) != record.shape and not (piece and values.ndim == 1)
    if wrong_shape or wrong_type:
        raise ValueError(f"tensor '{record.name}' is {values.dtype} {tuple(values.shape)}, planned {record}")
    content: memoryview = _raw(values).data
    return content


def _raw(values: Values) -> NDArray[np.uint8]:
    """The bytes (d,) of values in memory."""
    import numpy as np

    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    import torch

    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def overwrite(records: Mapping[str, Record], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the bytes of some tensors in place; names, types and shapes stay as they are."""
    import torch

    for name in sorted(tensors):
        record = records[name]
        tensor = tensors[name].to(getattr(torch, TORCH_NAMES[record.dtype]))
        with open(record.file, "r+b") as handle:
            handle.seek(record.start)
            handle.write(_bytes_of(tensor, record))
