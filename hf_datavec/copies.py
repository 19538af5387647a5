"""Copies to a GPU and back beside its work: page-locked memory, and a stream for each thread that has some for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Device = torch.device | str

# Threads that keep a GPU busy: while one waits for its copies, the work of the other is done.
THREADS = 2

_streams = threading.local()


def is_gpu(device: Device) -> bool:
    """Whether a device has memory of its own that is copied to beside its work."""
    return str(device).partition(":")[0] == "cuda"


@contextmanager
def beside_others(device: Device) -> Iterator[None]:
    """Do the block's work for a GPU on this thread's own stream, so that it waits for no other thread's."""
    import torch

    if not is_gpu(device):
        yield
        return
    known: dict[str, torch.cuda.Stream] = _streams.__dict__
    if str(device) not in known:
        known[str(device)] = torch.cuda.Stream(device)
    with torch.cuda.stream(known[str(device)]):
        yield


def stacked(rows: Sequence[torch.Tensor], device: Device, room: torch.Tensor | None = None) -> torch.Tensor:
    """Rows (d,) as one tensor (n, d) on a device; on a CPU in `room`, where it fits, in place of what it holds."""
    import torch

    if is_gpu(device):
        # torch keeps page-locked memory until all copies from it are done, and uses it again.
        locked = torch.empty(len(rows), len(rows[0]), dtype=rows[0].dtype, pin_memory=True)
        return torch.stack(list(rows), out=locked).to(device, non_blocking=True)
    if len(rows) == 1:
        return rows[0][None].to(device)
    if room is None or room.shape != (len(rows), len(rows[0])):
        room = rows[0].new_empty(len(rows), len(rows[0]))
    return torch.stack(list(rows), out=room).to(device)


def returned(values: torch.Tensor) -> torch.Tensor:
    """Values in the machine's memory, once the work on them is done."""
    import torch

    if not is_gpu(values.device):
        return values.cpu()
    locked = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    locked.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return locked
