"""Where computing happens: Accelerate's choice, or what the user says."""

from __future__ import annotations

import os
import sys
from typing import Literal

from hf_datavec import processes
from hf_datavec.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
# With more than one thread, Intel's library rounds a product by where its operands happen to lie in memory, unless it
# is told to be reproducible; it reads this at its first product, and is not slower for it.
REPRODUCIBLE = ("MKL_CBWR", "AUTO,STRICT")

# Where programs find the drivers of NVIDIA (also under Windows), AMD, Intel, Habana and Ascend, and Linux's own kind.
ACCELERATORS = (
    "/dev/nvidiactl",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/dri",
    "/dev/accel",
    "/dev/habanalabs",
    "/dev/hl0",
    "/dev/davinci_manager",
)


def choose(device: Device) -> str:
    """The device of this process, as torch spells it.

    Raises: InputError for `cuda` on a machine without a usable GPU.
    """
    os.environ.setdefault(*REPRODUCIBLE)
    if device != "cuda" and processes.count() == 1 and not _any_accelerator():
        return "cpu"  # what torch and Accelerate would say, without the seconds that their import takes
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU on this machine", hint="use --device auto or cpu")
    if device == "auto" and not torch.cuda.is_available() and processes.count() == 1:
        return "cpu"

    from accelerate import PartialState

    processes.join(cpu=device == "cpu")
    if device == "cpu":
        PartialState(cpu=True)  # remembered for the whole process, Trainer included
        return "cpu"
    return str(PartialState().device)


def _any_accelerator() -> bool:
    """Whether this machine may have an accelerator; on Linux each has a file by which programs reach it."""
    return sys.platform != "linux" or any(map(os.path.exists, ACCELERATORS))
