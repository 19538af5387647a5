"""The header of a safetensors file: eight bytes of length, then JSON; and files that have nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Bytes of one element, by the name that safetensors headers use.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
# More than any network's tensors have.
MOST_DIMENSIONS = 16


def encode(entries: Mapping[str, tuple[str, Sequence[int], Sequence[int]]]) -> bytes:
    """The beginning of a file with these tensors: name to type, shape and offsets of begin and end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, offsets) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes, as the format asks
    return len(text).to_bytes(8, "little") + text


def regular(header: bytes, size: int) -> dict[str, Any] | None:
    """What a header says, if it describes exactly so many bytes, without a gap or an overlap, by types that are known
    here; None where somebody must look closer."""
    try:
        found: dict[str, Any] = json.loads(header)
        entries = [entry for name, entry in found.items() if name != "__metadata__"]
        end = 0
        for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
            shape, (start, stop) = entry["shape"], entry["data_offsets"]
            # Before anything is multiplied, which may take for ever: numbers of a file that is meant to harm.
            small = all(type(number) is int and 0 <= number <= size for number in (*shape, start, stop))
            if not small or len(shape) > MOST_DIMENSIONS or set(entry) != {"dtype", "shape", "data_offsets"}:
                return None
            if (start, stop) != (end, end + ITEM_BYTES[entry["dtype"]] * math.prod(shape)):
                return None
            end = stop
        told = all(isinstance(value, str) for value in found.get("__metadata__", {}).values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if told and end == size else None


def write_hollow(path: Path, entries: Mapping[str, tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Write a file with the header of these tensors and a hole where their values would be; it takes no room."""
    start = encode(entries)
    size = max((end for _, _, (_, end) in entries.values()), default=0)
    with open(path, "wb") as handle:
        handle.write(start)
        handle.truncate(len(start) + size)
