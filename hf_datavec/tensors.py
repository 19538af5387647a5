"""Safetensors on disk: headers without tensors, tensors one by one, and digests."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from hf_datavec import headers
from hf_datavec.errors import InputError, RunError, listed
from hf_datavec.headers import ITEM_BYTES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

FLOATS = ("F64", "F32", "F16", "BF16")
# The same names as torch spells them, for the types that a weight may have.
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# And as numpy spells those that it knows, whole numbers too.
NUMPY_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool"}
NUMPY_NAMES |= {
    f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}

# Types that no weight has, but that a buffer in a file may.
OTHER_TORCH_NAMES = {name: kind for name, kind in NUMPY_NAMES.items() if name not in TORCH_NAMES}
OTHER_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64"}
# Of mmap(2): no memory is set aside for copies. Else Linux refuses to map a file larger than all memory, though nobody
# will write to it.
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)

INDEX_FILE = "model.safetensors.index.json"
MODEL_FILE = "model.safetensors"
# The safetensors library refuses larger headers as well; 100 MB describe about a million tensors.
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """What a header says of one tensor; `start` counts bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Tensors(Protocol):
    """Anything that holds named tensors: a folder of safetensors, or a state dict in memory."""

    @property
    def records(self) -> Mapping[str, Record]: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredTensors:
    """Named tensors in one or several safetensors files; memory-mapped, read when asked for."""

    records: Mapping[str, Record]
    # Sizes and times of change of the files when their headers were read.
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def _files(self) -> dict[Path, tuple[mmap.mmap, tuple[int, int]]]:
        return {}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({record.file for record in self.records.values()}))

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the type it is stored in.

        Raises: RunError when the file has gone or changed since it was opened.
        """
        import torch

        record = self.records[name]
        content, count = self._opened(record.file), math.prod(record.shape)
        kind: torch.dtype = getattr(torch, TORCH_NAMES.get(record.dtype) or OTHER_TORCH_NAMES[record.dtype])
        if not count:
            return torch.empty(record.shape, dtype=kind)
        return torch.frombuffer(content, dtype=kind, count=count, offset=record.start).reshape(record.shape)

    def array(self, name: str) -> NDArray[np.generic]:
        """The tensor without torch, of a type in `NUMPY_NAMES`: the file itself, mapped, not to be written to.

        Raises: RunError as `read`.
        """
        import numpy as np

        record = self.records[name]
        content = self._opened(record.file)
        kind, count = np.dtype(NUMPY_NAMES[record.dtype]), math.prod(record.shape)
        found: NDArray[np.generic] = np.frombuffer(content, kind, count, record.start).reshape(record.shape)
        found.flags.writeable = False
        return found

    def _opened(self, file: Path) -> mmap.mmap:
        """The bytes of a file, mapped once."""
        now = _stamp(file)
        opened, stamp = self._files.get(file, (None, self.stamps.get(file, now)))
        if now != stamp:
            # Seen before it is touched: beyond the end of a file that was cut, a mapping ends the process.
            raise RunError(f"'{file}' was changed while it was being read", hint="let it be, and run again")
        if opened is None:
            opened = _mapped(file)
            self._files[file] = opened, stamp
        return opened

    @cached_property
    def digest(self) -> str:
        """The content digest: BLAKE3 over names, types, shapes and bytes in the order of the names.

        It does not depend on how tensors are spread over files, nor on a file's metadata.
        """
        return self.hashed(threads=min(4, os.cpu_count() or 1))

    def hash_of(self, name: str) -> str:
        """The hash of a tensor's bytes. Raises: RunError as `read`."""
        record = self.records[name]
        return _hash(self._opened(record.file), record)

    def hashed(self, *, threads: int) -> str:
        """The content digest, computed now by so many threads."""
        # From the mapping that is read later, so that its pages are not asked for twice.
        contents = {file: self._opened(file) for file in self.files}
        with ThreadPoolExecutor(threads) as pool:  # hashing releases the interpreter lock
            hashes = list(
                pool.map(
                    lambda record: _hash(contents[record.file], record),
                    (self.records[name] for name in sorted(self.records)),
                )
            )
        return combined_digest(zip((self.records[name] for name in sorted(self.records)), hashes, strict=True))


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of change."""
    try:
        found = file.stat()
    except OSError as error:
        hint = "is its disk still there? put it back and run again"
        raise RunError(f"cannot read '{file}' any more: {error.strerror}", hint=hint) from None
    return found.st_size, found.st_mtime_ns


def combined_digest(parts: Iterable[tuple[Record, str]]) -> str:
    """The content digest of tensors whose own hashes are known."""
    whole = blake3()
    for record, tensor_hash in sorted(parts, key=lambda part: part[0].name):
        shape = "x".join(map(str, record.shape))
        whole.update(f"{record.name}\0{record.dtype}\0{shape}\0{tensor_hash}\n".encode())
    return f"blake3:{whole.hexdigest()}"


def hash_of(record: Record) -> str:
    """The hash of a stored tensor's bytes."""
    with _mapped(record.file) as content:
        return _hash(content, record)


def _hash(content: mmap.mmap, record: Record) -> str:
    with memoryview(content) as whole, whole[record.start : record.start + record.nbytes] as part:
        return blake3(part).hexdigest()


def _mapped(file: Path) -> mmap.mmap:
    """The bytes of a file that holds some; who writes to them gets a copy, and the file stays as it is."""
    with open(file, "rb") as handle:
        if not sys.platform.startswith("linux"):
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return mmap.mmap(handle.fileno(), 0, flags=flags, prot=protection)
        except OSError:  # where memory is set aside all the same (vm.overcommit_memory=2); nobody here writes to it
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def open_file(path: Path) -> StoredTensors:
    """The tensors of one safetensors file, after its header was checked.

    Raises: InputError for a missing, truncated or malformed file, and for tensor names that are paths.
    """
    stamps = {path: _stamp(path)} if path.is_file() else {}
    return StoredTensors(_read_header(path), stamps)


def open_folder(folder: Path) -> StoredTensors:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names.

    Raises: InputError, also when the folder holds only pickles, or index and shards disagree.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _open_shards(folder, index)
    if (folder / MODEL_FILE).is_file():
        return open_file(folder / MODEL_FILE)
    pickles = [path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.pkl") for path in folder.glob(pattern)]
    if pickles:
        raise InputError(
            f"'{folder}' holds only pickle files ({listed(pickles)}), expected {MODEL_FILE}",
            hint="a pickle can run code, so none is read from a folder; save the model with "
            "save_pretrained, or give `diff` the local .pth/.bin file itself",
        )
    raise InputError(f"'{folder}' has no {MODEL_FILE}", hint="expected a transformers or timm model folder")


def _open_shards(folder: Path, index: Path) -> StoredTensors:
    try:
        shard_of = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{index}' is not a safetensors index: {error!r}") from None
    records: dict[str, Record] = {}
    stamps: dict[Path, tuple[int, int]] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"'{index}' names the file '{shard}', expected a .safetensors file beside it")
        if (folder / shard).is_file():
            stamps[folder / shard] = _stamp(folder / shard)
        found = _read_header(folder / shard)
        strange = {name for name in found if shard_of.get(name) != shard}
        if strange:
            raise InputError(f"'{folder / shard}' holds tensors that its index does not place there: {listed(strange)}")
        records.update(found)
    missing = set(shard_of) - set(records)
    if missing:
        raise InputError(f"'{index}' names tensors that no shard holds: {listed(missing)}")
    return StoredTensors(records, stamps)


def _read_header(path: Path) -> dict[str, Record]:
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(min(length, LARGEST_HEADER))
        header = headers.regular(text, path.stat().st_size - 8 - length)
        if header is None:
            # The library decides, and says what is wrong. It starts numpy for that, which nothing else in `plan` needs.
            with safe_open(path, framework="np"):
                pass
            header = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"there is no file '{path}'") from None
    except SafetensorError as error:
        raise InputError(
            f"'{path}' is not a complete safetensors file: {error}", hint="copy or download the file again"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    header.pop("__metadata__", None)
    _check_names(path, header)
    offset = 8 + length
    return {
        name: Record(name, entry["dtype"], tuple(entry["shape"]), path, offset + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
    }


def _check_names(path: Path, header: Mapping[str, Any]) -> None:
    for name, entry in header.items():
        if ".." in name or "/" in name or "\\" in name or not name.isprintable() or not name:
            raise InputError(
                f"'{path}' has a tensor named {name!r}, expected a name such as 'layer1.0.conv1.weight'",
                hint="a name that is a path is never followed; ask where the file comes from",
            )
        if entry["dtype"] not in ITEM_BYTES:
            raise InputError(f"'{path}': tensor '{name}' has the unsupported type {entry['dtype']}")
