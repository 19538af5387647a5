"""Methods that weigh vectors without looking at them: sum, mean, linear, task_arithmetic, fedavg.

Sums run in float64: with float32 vectors no bit is lost for any sensible number of sites, so that n equal
vectors average to exactly one of them.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_datavec.methods import Factors, method

if TYPE_CHECKING:
    from torch import Tensor


def weighted_sum(
    vectors: "Tensor | Sequence[Tensor]", weights: "Sequence[float]", *, normalize: bool = False
) -> "Tensor":
    """The sum of vectors (n, d), or of n rows, times their weights, in float64, in the order of the sites.

    With `normalize` divided by the sum of the weights.
    """
    # Site by site: torch's own sum picks its order by size and processor, and a slice must give the same bits.
    import torch

    first = weights[0]
    total = vectors[0].to(torch.float64, copy=True) if first == 1 else vectors[0].double() * first
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total.add_(vector, alpha=weight)
    return total.div_(sum(weights)) if normalize else total


def _alike(weights: Sequence[float]) -> Factors:
    return Factors([1.0] * len(weights))


def averaged(weights: Sequence[float], **_: object) -> Factors:
    """What makes a mean of a sum."""
    return Factors([1.0] * len(weights), len(weights))


def _weighed(weights: Sequence[float], *, normalize: bool = True) -> Factors:
    return Factors(weights, sum(weights) if normalize else 1.0)


def _sum(vectors: "Tensor", factors: Factors) -> "Tensor":
    total = weighted_sum(vectors, factors.each)
    return total if factors.divisor == 1 else total.div_(factors.divisor)


@method(
    "sum",
    formula="sum_j tau_j",
    source="arXiv 2408.13038; arXiv 2212.04089, eq. 2",
    uses_weights=False,
    factors=_alike,
)
def add(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The sum of all vectors, the paper's rule; the recipe's `scale` is its lambda."""
    return _sum(vectors, _alike(weights.tolist()))


@method(
    "mean", formula="1/n sum_j tau_j", source="arXiv 2203.05482, uniform soup", uses_weights=False, factors=averaged
)
def mean(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The average of all vectors, each counted alike."""
    return _sum(vectors, averaged(weights.tolist()))


@method(
    "linear",
    formula="sum_j w_j tau_j / sum_j w_j",
    source="arXiv 2203.05482, weighted",
    uses_weights=True,
    factors=_weighed,
)
def linear(vectors: "Tensor", weights: "Tensor", *, normalize: bool = True) -> "Tensor":
    """The weighted average; `normalize: false` leaves out the division, a weighted sum."""
    return _sum(vectors, _weighed(weights.tolist(), normalize=normalize))


@method(
    "task_arithmetic",
    formula="sum_j w_j tau_j",
    source="arXiv 2212.04089, eq. 2",
    uses_weights=True,
    factors=_weighed,
)
def task_arithmetic(vectors: "Tensor", weights: "Tensor", *, normalize: bool = False) -> "Tensor":
    """The weighted sum, by negative weights too; `sum` when all weights are 1."""
    return _sum(vectors, _weighed(weights.tolist(), normalize=normalize))


@method(
    "fedavg",
    formula="sum_j n_j tau_j / sum_j n_j, n_j examples of site j",
    source="arXiv 1602.05629 (FedAvg), one round",
    uses_weights=True,
    factors=_weighed,
    needs_counts=True,
)
def fedavg(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The average weighed by the sites' numbers of images, which every vector must declare."""
    return _sum(vectors, _weighed(weights.tolist()))
