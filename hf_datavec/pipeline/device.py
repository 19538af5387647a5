"""Where computing happens: Accelerate's choice, or what the user says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from hf_datavec import processes
from hf_datavec.errors import InputError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
# With more than one thread, Intel's library rounds a product by where its operands happen to lie in memory, unless it
# is told to be reproducible; it reads this at its first product, and is not slower for it.
REPRODUCIBLE = ("MKL_CBWR", "AUTO,STRICT")


def choose(device: Device) -> torch.device:
    """The device of this process. Raises: InputError for `cuda` on a machine without a usable GPU."""
    import torch

    os.environ.setdefault(*REPRODUCIBLE)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU on this machine", hint="use --device auto or cpu")
    if device == "auto" and not torch.cuda.is_available() and processes.count() == 1:
        return torch.device("cpu")  # what Accelerate would say, without the second that its import takes

    from accelerate import PartialState

    processes.join(cpu=device == "cpu")
    if device == "cpu":
        PartialState(cpu=True)  # remembered for the whole process, Trainer included
        return torch.device("cpu")
    found: torch.device = PartialState().device
    return found
