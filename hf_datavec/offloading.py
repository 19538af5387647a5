"""Networks larger than a device: which part is kept where, as Accelerate infers it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import Checkpoint
from hf_datavec.errors import InputError

if TYPE_CHECKING:
    import torch

# Says how much of a device's memory a network's weights may take; what is beyond goes to the next slower place.
LIMIT = "HF_DATAVEC_MAX_MEMORY"
# What is left of a device's free memory for pictures and activations when the user sets no limit.
SHARE_FOR_WEIGHTS = 0.8
# All networks run in float32.
WEIGHT_BYTES = 4


def config(checkpoint: Checkpoint) -> Any:
    """The configuration of a checkpoint as transformers takes it."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if checkpoint.library == "timm" and found.model_args:
        # timm 1.0.31 records num_classes here too, and transformers then passes it twice and fails.
        found.model_args.pop("num_classes", None)
    return found


def places(checkpoint: Checkpoint, device: torch.device | str) -> dict[str, int | str]:
    """Where each part of a network goes, by its name: the device, the CPU or the disk; empty when all fits the device.

    Raises: InputError for a limit that is no size.
    """
    import torch

    device = torch.device(device)
    needed = sum(WEIGHT_BYTES * record.nbytes // _item_bytes(record.dtype) for record in checkpoint.records.values())
    memory = _memory(device)
    first = next(iter(memory.values()))
    if needed <= first:
        return {}
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoModelForImageClassification

    with init_empty_weights():
        empty = AutoModelForImageClassification.from_config(config(checkpoint))
    # A layer that holds tensors beside layers of its own, as timm's BatchNorm does, would be torn from its weights.
    holders = {name: type(part).__name__ for name, part in empty.named_modules() if _holds_tensors(part)}
    whole = sorted({*holders.values(), *(getattr(empty, "_no_split_modules", None) or ())})
    inferred: dict[str, int | str] = infer_auto_device_map(empty, max_memory=memory, no_split_module_classes=whole)
    found = {name: _place_of(name, inferred) for name in holders if not _inside(name, holders)}
    # transformers asks the first weight where pictures go, and what is offloaded is nowhere.
    found[next(iter(found))] = next(iter(memory))
    return found


def _holds_tensors(part: Any) -> bool:
    return any(True for _ in part.parameters(recurse=False)) or any(True for _ in part.buffers(recurse=False))


def _place_of(name: str, inferred: Mapping[str, int | str]) -> int | str:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(inferred[prefix] for prefix in prefixes if prefix in inferred)


def _inside(name: str, holders: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in holders for length in range(1, len(parts)))


def _memory(device: torch.device) -> dict[int | str, int]:
    """Bytes for weights on the device and, behind a GPU, in the machine's memory."""
    import torch

    limit = _limit()
    if device.type != "cuda":
        return {"cpu": limit if limit is not None else int(SHARE_FOR_WEIGHTS * _available())}
    index = device.index or 0
    free, _ = torch.cuda.mem_get_info(index)
    return {index: limit if limit is not None else int(SHARE_FOR_WEIGHTS * free), "cpu": _available()}


def _available() -> int:
    """The bytes of the machine's memory that can be had; where nobody tells, as if without end."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 2**62
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached()


def _cached() -> int:
    # What files take of the memory is given back when it is asked for.
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            found = re.search(r"^Cached:\s+(\d+) kB", handle.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _limit() -> int | None:
    text = os.environ.get(LIMIT)
    if not text:
        return None
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(text))
    except ValueError:
        raise InputError(f"{LIMIT} is '{text}', expected a size", hint="for example 8GB or 500MB") from None


def _item_bytes(dtype: str) -> int:
    from hf_datavec.headers import ITEM_BYTES

    return ITEM_BYTES[dtype]
