"""Methods that weigh whole vectors: sum, mean, linear.

Sums run in float64: with float32 vectors no bit is lost for any sensible number of sites, so that n equal
vectors average to exactly one of them.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from typing import TYPE_CHECKING

from hf_datavec.methods import method

if TYPE_CHECKING:
    from torch import Tensor


@method("sum", formula="sum_j tau_j", source="arXiv 2408.13038; arXiv 2212.04089, eq. 2", uses_weights=False)
def add(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The sum of all vectors, the paper's rule; the recipe's `scale` is its lambda."""
    return vectors.double().sum(0)


@method("mean", formula="1/n sum_j tau_j", source="arXiv 2203.05482, uniform soup", uses_weights=False)
def mean(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The average of all vectors, each counted alike."""
    return vectors.double().sum(0) / len(vectors)


@method(
    "linear",
    formula="sum_j w_j tau_j / sum_j w_j",
    source="arXiv 1602.05629, eq. for FedAvg with w_j = examples",
    uses_weights=True,
)
def linear(vectors: "Tensor", weights: "Tensor", *, normalize: bool = True) -> "Tensor":
    """The weighted average; `normalize: false` leaves out the division, a weighted sum."""
    total = (vectors.double() * weights.double().unsqueeze(1)).sum(0)
    return total / weights.double().sum() if normalize else total
