"""Methods whose result follows from sums over the sites' images, which the engine has put together: ridge_head."""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from typing import TYPE_CHECKING, Annotated

from hf_datavec.linear_head import SHARPNESS
from hf_datavec.methods import Between, method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "ridge_head",
    formula="s Y^T X (X^T X + l I)^-1 - the base's head, X and Y centred features and one-hot labels of all sites' "
    "images, s = sharpness; no tau_j counts",
    source="arXiv 2405.16240 (analytic federated learning)",
    uses_weights=False,
    kind="tensor",
)
def ridge_head(
    vectors: "Tensor", weights: "Tensor", *, features: "Tensor | None" = None,
    sharpness: Annotated[float, Between(0.01, 1000)] = SHARPNESS,
) -> "Tensor":  # fmt: skip
    """The head that ridge regression on all sites' images together gives, from sums of the base's features; heads only.

    `features` is that head's difference to the base's, the same for each site, with `sharpness` in it. Without it,
    which no plan allows, vectors are averaged.
    """
    found: Tensor = vectors.double().mean(0) if features is None else features[0]
    return found
