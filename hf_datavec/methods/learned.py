"""Methods whose coefficients are learned on public images before the merge: adamerging."""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from typing import TYPE_CHECKING, Annotated

from hf_datavec.methods import Between, method
from hf_datavec.methods.linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "adamerging",
    formula="sum_j c_jl tau_j in tensor l, c = argmin of the mean entropy of predictions on public images",
    source="arXiv 2310.02575 (AdaMerging, layer-wise)",
    uses_weights=False,
    learned=True,
)
def adamerging(
    vectors: "Tensor", weights: "Tensor", *, coefficients: "Tensor | None" = None,
    steps: Annotated[int, Between(1, 10000)] = 100, learning_rate: Annotated[float, Between(1e-6, 1)] = 0.01,
) -> "Tensor":  # fmt: skip
    """A sum with a coefficient for each tensor and site, which starts at 1/n and is learned without labels."""
    count = len(vectors)
    return weighted_sum(vectors, [1 / count] * count if coefficients is None else coefficients.tolist())
