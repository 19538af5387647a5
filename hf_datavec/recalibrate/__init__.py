"""Restoration after a merge: statistics measured on public images or carried over from the sites', and tuning.

A fused network's activations are distributed like those of none of its parents, so the running statistics
that came with the base no longer fit (arXiv 2211.08403, section 4). `docs/restoration.md` derives the modes.
"""

from __future__ import annotations

from hf_datavec.models import statistic_layers as layers_of
from hf_datavec.recalibrate.change import median_change
from hf_datavec.recalibrate.domain import FOREIGN, Domain, compare, compare_seen
from hf_datavec.recalibrate.judgement import automatic, cautions, kind
from hf_datavec.recalibrate.lockstep import Pictures, assign, fewer, looked_at, observe, statistics
from hf_datavec.recalibrate.modes import Found, measured, of_seen
from hf_datavec.recalibrate.outlying import outlying
from hf_datavec.recalibrate.outputs import observed, outputs
from hf_datavec.recalibrate.pooling import Channels, Gaussian, Measured
from hf_datavec.recalibrate.relative import abroad, carried_over, relative
from hf_datavec.recalibrate.repair import goals, repair
from hf_datavec.recalibrate.sites import Sites, as_tensors, of_base, sharing
from hf_datavec.recalibrate.tune import HELD_OUT, trained, tune

__all__ = [
    "FOREIGN",
    "HELD_OUT",
    "Channels",
    "Domain",
    "Found",
    "Gaussian",
    "Measured",
    "Pictures",
    "Sites",
    "abroad",
    "as_tensors",
    "assign",
    "automatic",
    "carried_over",
    "cautions",
    "compare",
    "compare_seen",
    "fewer",
    "goals",
    "kind",
    "layers_of",
    "looked_at",
    "measured",
    "median_change",
    "observe",
    "observed",
    "of_base",
    "of_seen",
    "outlying",
    "outputs",
    "relative",
    "repair",
    "sharing",
    "statistics",
    "trained",
    "tune",
]
