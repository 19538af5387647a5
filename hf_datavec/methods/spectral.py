"""Methods that look at the singular vectors of a weight matrix: tsv, iso_c, iso_cts; and wudi, which looks at its rows.

They take linear layers and convolutions, whose kernels are matrices out x (in * k * k). Vectors, depthwise kernels and
heads are averaged, as the papers average what is no matrix: a head's rank is its number of labels, and cutting it would
cut labels off.
"""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from hf_datavec.methods import Between, method
from hf_datavec.methods.linear import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

# Adam's constants, arXiv 1412.6980, algorithm 1.
BETAS = (0.9, 0.999)
EPSILON = 1e-8


def _decomposed(matrix: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """Singular vectors and values without those that are zero: a direction of no length is only rounding."""
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    floor = float(values.amax() if len(values) else 0.0) * max(matrix.shape) * torch.finfo(values.dtype).eps
    count = int((values > floor).sum())
    return left[:, :count], values[:count], right[:count]


def _orthogonal(columns: "Tensor") -> "Tensor":
    """The nearest matrix with orthogonal columns (Procrustes); within the span, when columns depend on each other."""
    left, _, right = _decomposed(columns)
    return left @ right


def _joined(parts: "Sequence[tuple[Tensor, Tensor, Tensor]]") -> "tuple[Tensor, Tensor, Tensor]":
    """Singular vectors of several matrices side by side, each side made orthogonal, and all singular values."""
    import torch

    left, right = torch.cat([part[0] for part in parts], 1), torch.cat([part[2] for part in parts], 0)
    return _orthogonal(left), torch.cat([part[1] for part in parts]), _orthogonal(right.T).T


@method(
    "tsv",
    formula="U diag(s) V', (U, s, V) = the top r/n singular triplets of every tau_j, U and V made orthogonal",
    source="arXiv 2412.00081 (Task Singular Vectors, TSV-M)",
    uses_weights=False,
    kind="matrix",
    otherwise="mean",
    copies=8,
)
def tsv(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The strongest directions of each vector, turned so that they do not interfere, summed."""
    count, most = len(vectors), min(vectors.shape[1:])
    kept = max(1, most // count)
    parts = []
    for vector in vectors:
        left, values, right = _decomposed(vector.double())
        parts.append((left[:, :kept], values[:kept], right[:kept]))
    left, values, right = _joined(parts)
    return (left * values) @ right


@method(
    "iso_c",
    formula="mean(s) U V', U diag(s) V' = sum_j tau_j",
    source="arXiv 2502.04959 (Iso-C)",
    uses_weights=False,
    kind="matrix",
    otherwise="mean",
    copies=6,
)
def iso_c(vectors: "Tensor", weights: "Tensor") -> "Tensor":
    """The sum with all its directions made equally strong."""
    left, values, right = _decomposed(weighted_sum(vectors, [1.0] * len(vectors)))
    # The mean over all directions of the matrix, those of no length included, as in the paper.
    return (left @ right) * (values.sum() / min(vectors.shape[1:]))


@method(
    "iso_cts",
    formula="mean(s) U V', (U, s, V) = top `common` of sum_j tau_j and the top rest/n of each tau_j outside it",
    source="arXiv 2502.04959 (Iso-CTS)",
    uses_weights=False,
    kind="matrix",
    otherwise="mean",
    copies=10,
)
def iso_cts(vectors: "Tensor", weights: "Tensor", *, common: Annotated[float, Between(0, 1)] = 0.8) -> "Tensor":
    """The sum's main directions and each vector's own beside them, all made equally strong."""
    count, most = len(vectors), min(vectors.shape[1:])
    each = round((most - int(common * most)) / count)
    left, values, right = _decomposed(weighted_sum(vectors, [1.0] * len(vectors)))
    shared = max(0, most - each * count)
    left, values, right = left[:, :shared], values[:shared], right[:shared]
    parts = [(left, values, right)]
    for vector in vectors:
        own = vector.double()
        found = _decomposed(own - left @ (left.T @ own))
        parts.append((found[0][:, :each], found[1][:each], found[2][:each]))
    left, values, right = _joined(parts)
    return (left @ right) * (values.sum() / max(1, shared + each * count))


@method(
    "wudi",
    formula="argmin_T sum_j |(T - tau_j) tau_j'|^2 / |tau_j|^2, from sum_j tau_j by `steps` of Adam",
    source="arXiv 2503.08099 (WUDI-Merging), as in its code",
    uses_weights=False,
    kind="matrix",
    otherwise="mean",
    copies=14,
)
def wudi(
    vectors: "Tensor", weights: "Tensor", *,
    steps: Annotated[int, Between(1, 100000)] = 300, learning_rate: Annotated[float, Between(1e-9, 1)] = 1e-5,
) -> "Tensor":  # fmt: skip
    """The vector that interferes least with each site's inputs, which its own vector stands for."""
    import torch

    found = weighted_sum(vectors, [1.0] * len(vectors))
    changed = [vector.double() for vector in vectors if bool(vector.any())]
    if len(changed) < 2:
        return found  # nothing interferes, and Adam would only blow up the rounding of a slope of zero
    slope_at = _slope(changed)
    first, second = torch.zeros_like(found), torch.zeros_like(found)
    for step in range(1, steps + 1):
        slope = slope_at(found)
        first = BETAS[0] * first + (1 - BETAS[0]) * slope
        second = BETAS[1] * second + (1 - BETAS[1]) * slope.square()
        spread = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        found -= learning_rate / (1 - BETAS[0] ** step) * first / spread
    return found


def _slope(vectors: "Sequence[Tensor]") -> "Callable[[Tensor], Tensor]":
    """The gradient of WUDI's loss, as a function of T: the sum over j of 2 (T - tau_j) tau_j' tau_j / |tau_j|^2."""
    parts = [vector * (2 / float(vector.square().sum())) for vector in vectors]
    rows, columns = vectors[0].shape
    if columns > 2 * len(vectors) * rows:  # then the products of all rows are larger than the vectors themselves
        return lambda found: sum(
            (((found - vector) @ vector.T) @ part for vector, part in zip(vectors, parts, strict=True)), found * 0.0
        )
    inputs, outputs = parts[0].T @ vectors[0], parts[0] @ (vectors[0].T @ vectors[0])
    for vector, part in zip(vectors[1:], parts[1:], strict=True):
        products = part.T @ vector
        inputs, outputs = inputs + products, outputs + vector @ products
    return lambda found: found @ inputs - outputs
