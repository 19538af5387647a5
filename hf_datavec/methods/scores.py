"""Methods that score every value of a tensor against the others before they weigh it: sce, pcb."""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from typing import TYPE_CHECKING

from hf_datavec.methods import method
from hf_datavec.methods.linear import weighted_sum
from hf_datavec.methods.signs import Density, share

if TYPE_CHECKING:
    from torch import Tensor

# PCB cuts off this share of the smallest and of the largest values before it stretches them to 0..1.
OUTLIERS = 0.0001


@method(
    "sce",
    formula="sum_{j in A} e_j t_j / sum_{j in A} e_j, e_j = mean t_j^2, t_j = tau_j where sites vary most",
    source="arXiv 2408.07990 (FuseChat: select, calculate, erase), with its code's division by the weights left",
    uses_weights=False,
    kind="tensor",
)
def sce(vectors: "Tensor", weights: "Tensor", *, select_topk: Density = 1.0) -> "Tensor":
    """The values on which sites differ most, weighed by their energy, where they agree with the sign of the sum."""
    import torch

    wide, count = vectors.double(), len(vectors)
    variances = (wide - weighted_sum(wide, [1 / count] * count)).square().mean(0)
    if select_topk < 1 and wide.shape[1]:
        changed = max(1, share(select_topk, int((variances > 0).sum())))
        lowest = variances.kthvalue(len(variances) + 1 - changed).values
        wide = torch.where(variances >= lowest, wide, 0.0)
    largest = float(wide.abs().amax()) if wide.numel() else 0.0
    if largest == 0:
        return wide[0]
    # The square of a tiny value would vanish; only the ratios of the energies count.
    energies = (wide / largest).square().mean(1)
    elected = weighted_sum(wide, [1.0] * count).sign()
    same = wide.sign() == elected
    divisor = weighted_sum(same, energies.tolist())
    total = weighted_sum(wide * same, energies.tolist())
    return torch.where((divisor > 0) & (elected != 0), total / divisor, 0.0)


def _stretched(values: "Tensor") -> "Tensor":
    """Each row brought to 0..1; a row of equal values to 0."""
    least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - least) / (most - least).where(most > least, 1.0)


@method(
    "pcb",
    formula="sum_j s_j tau_j / sum_j s_j, s_j = norm(top ratio of exp(n norm(|tau_j|)^2) tanh(tau_j sum_i tau_i))",
    source="arXiv 2410.02396 (PCB-Merging), as in its code",
    uses_weights=False,
    kind="tensor",
    copies=8,
)
def pcb(vectors: "Tensor", weights: "Tensor", *, ratio: Density = 0.1) -> "Tensor":
    """The values that are large in their vector and fit the others', averaged by how much they are and do."""
    import torch

    if vectors.shape[1] == 0:
        return vectors[0].double()
    wide, (count, length) = vectors.double(), vectors.shape
    sizes = wide.abs()
    cut = int(OUTLIERS * length)
    least = sizes.kthvalue(cut + 1, dim=1, keepdim=True).values
    most = sizes.kthvalue(length - cut, dim=1, keepdim=True).values
    sizes = sizes.clamp(least, most)
    fits = (wide * weighted_sum(wide, [1.0] * count)).tanh()
    scores = (count * _stretched(sizes).square()).exp() * fits
    lowest = scores.kthvalue(length + 1 - max(1, share(ratio, length)), dim=1, keepdim=True).values
    kept = scores.clamp(min=lowest) - lowest
    # Where all that are kept score alike, they count alike.
    alike = (scores.amax(1, keepdim=True) == lowest) & (scores == lowest)
    kept = torch.where(alike, 1.0, _stretched(kept))
    total, divisor = weighted_sum(wide.sign() * sizes * kept, [1.0] * count), weighted_sum(kept, [1.0] * count)
    return torch.where(divisor > 0, total / divisor, 0.0)
