"""How far statistics have moved, for the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_datavec.recalibrate.pooling import Channels


def median_change(before: Mapping[str, Channels], after: Mapping[str, Channels]) -> float:
    """How far the channels' means moved: the median, in standard deviations of the statistics before."""
    import torch

    shifts = []
    for name, channels in sorted(after.items()):
        if name in before:
            spread = before[name].variance.double().clamp(min=1e-12).sqrt()
            shifts.append(((channels.mean.double() - before[name].mean.double()) / spread).abs())
    return float(torch.cat(shifts).median()) if shifts else 0.0
