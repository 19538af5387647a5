"""Controls: what must not work, run by the same code as what should."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_datavec.methods import method

if TYPE_CHECKING:
    from torch import Tensor

    from hf_datavec.draws import Draws


@method(
    "random",
    formula="sum_j |tau_j| g_j / |g_j|, g_j ~ N(0, I)",
    source="arXiv 2408.13038, the random-vector control",
    uses_weights=False,
    kind="tensor",
)
def random(vectors: "Tensor", weights: "Tensor", *, generators: "Sequence[Draws]") -> "Tensor":
    """The sum of random vectors, each as long as the site's own in every tensor: the paper's control."""
    import torch

    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for vector, generator in zip(vectors, generators, strict=True):
        # Drawn on the CPU, so that every device sees the same numbers.
        direction = generator.normal(len(vector)).to(vector.device)
        length = direction.norm()
        if length > 0:
            total += direction * (vector.double().norm() / length)
    return total
