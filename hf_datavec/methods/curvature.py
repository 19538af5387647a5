"""Methods that weigh single weights by what sites say of them: fisher, regmean.

The sites' second moments are not of every tensor; without them a tensor is averaged.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from typing import TYPE_CHECKING, Annotated

from hf_datavec.methods import Between, method
from hf_datavec.methods.linear import linear

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "fisher",
    formula="sum_j w_j F_j tau_j / sum_j w_j F_j, F_j diagonal Fisher information of site j",
    source="arXiv 2111.09832 (Fisher merging)",
    uses_weights=True,
    kind="tensor",
)
def fisher_average(vectors: "Tensor", weights: "Tensor", *, fisher: "Tensor | None" = None) -> "Tensor":
    """Each weight averaged by how strongly each site's predictions depend on it; where none does, plainly."""
    import torch

    mean: Tensor = linear(vectors, weights)
    if fisher is None:
        return mean
    # Relative to the largest of its coordinate: products of tiny numbers would vanish.
    largest = fisher.double().amax(0)
    shares = weights[:, None] * (fisher.double() / largest.where(largest > 0, 1.0))
    total = shares.sum(0)
    return torch.where(total > 0, (shares * vectors.double()).sum(0) / total.where(total > 0, 1.0), mean)


@method(
    "regmean",
    formula="(sum_j w_j tau_j G_j) (sum_j w_j G_j)^-1, G_j = a X_j^T X_j + (1-a) diag(X_j^T X_j), a = off_diagonal",
    source="arXiv 2212.09849 (RegMean)",
    uses_weights=True,
    kind="matrix",
)
def regmean(
    vectors: "Tensor", weights: "Tensor", *, gram: "Tensor | None" = None,
    off_diagonal: Annotated[float, Between(0, 1)] = 0.95,
) -> "Tensor":  # fmt: skip
    """The linear map whose outputs are nearest to each site's own on its own inputs."""
    import torch

    mean: Tensor = linear(vectors, weights)
    if gram is None:
        return mean
    total, pull = torch.zeros_like(gram[0], dtype=torch.float64), torch.zeros_like(mean)
    for vector, weight, products in zip(vectors, weights.tolist(), gram, strict=True):
        shrunk = products.double() * off_diagonal
        shrunk.diagonal().copy_(products.diagonal())
        total += weight * shrunk
        # Measured from the mean, which is then what inputs that no site has leave in place.
        pull += weight * (vector.double() - mean) @ shrunk
    dead = total.diagonal() <= 0
    total.diagonal()[dead] = 1.0
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):  # inputs that depend on each other, with off_diagonal: 1
        found: Tensor = mean + pull @ torch.linalg.pinv(total, hermitian=True)
    else:
        found = mean + torch.cholesky_solve(pull.T, factor).T
    return found
