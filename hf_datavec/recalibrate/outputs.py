"""What networks answer to public pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_datavec import processes
from hf_datavec.models import Network
from hf_datavec.recalibrate.lockstep import JOINT, Pictures, assign, observe
from hf_datavec.recalibrate.pooling import Measured

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def outputs(network: Network, pictures: Pictures) -> Floats:
    """The logits (n, labels) of all pictures in float64; under several processes each looks at its share."""
    import torch

    # Whole batches are shared out, so that they are the same in any number of processes.
    mine = processes.share(range(0, pictures.count, pictures.batch_size))

    def look() -> list[torch.Tensor]:
        with torch.no_grad():
            ranges = (range(start, min(start + pictures.batch_size, pictures.count)) for start in mine)
            return [network.logits(pictures.load(one)) for one in ranges]

    return _together(processes.together(look), network)


def observed(network: Network, pictures: Pictures) -> tuple[dict[str, Measured], Floats]:
    """The moments of every BatchNorm layer's input, and the logits (n, labels) with these as its statistics.

    One pass gives both when all pictures are normalised together.
    """
    logits: list[torch.Tensor] = []
    found = observe(network, pictures, logits=logits)
    if not found or pictures.count > JOINT:
        assign(network, found)
        return found, outputs(network, pictures)
    return found, _together(logits, network)


def _together(parts: list[torch.Tensor], network: Network) -> Floats:
    import numpy as np

    found = processes.gathered([part.double().cpu().numpy() for part in parts])
    return np.concatenate(found) if found else np.empty((0, len(network.labels)))
