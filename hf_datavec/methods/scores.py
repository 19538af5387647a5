"""Methods that score every value of a tensor against the others before they weigh it: sce, pcb."""

# Without `from __future__ import annotations`, so that an option's range is an object, not text.
from collections.abc import Iterator
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

    count = len(vectors)
    # Site by site, so that no more than a few float64 rows are in memory.
    average = weighted_sum(vectors, [1 / count] * count)
    variances = torch.zeros_like(average)
    for vector in vectors:
        variances.add_((vector - average).square_())
    chosen = None
    if select_topk < 1 and len(average):
        changed = max(1, share(select_topk, int((variances > 0).sum())))
        chosen = variances >= variances.kthvalue(len(variances) + 1 - changed).values

    def rows() -> "Iterator[Tensor]":
        return (vector if chosen is None else vector * chosen for vector in vectors)

    largest = max(float(row.abs().amax()) for row in rows()) if len(average) else 0.0
    if largest == 0:
        return average.zero_()
    # The square of a tiny value would vanish; only the ratios of the energies count.
    energies = [float((row.double() / largest).square_().mean()) for row in rows()]
    total, divisor = average.zero_(), variances.zero_()
    for row in rows():
        total.add_(row)
    elected = total.sign().to(vectors.dtype)
    total.zero_()
    for row, energy in zip(rows(), energies, strict=True):
        same = row.sign() == elected
        divisor.add_(same, alpha=energy)
        total.add_(row * same, alpha=energy)
    return total.div_(divisor).masked_fill_((divisor <= 0) | (elected == 0), 0.0)


def _stretched(values: "Tensor") -> "Tensor":
    """A row brought to 0..1, in its place; a row of equal values to 0."""
    least, most = values.amin(), values.amax()
    return values.sub_(least).div_((most - least).where(most > least, 1.0))


@method(
    "pcb",
    formula="sum_j s_j tau_j / sum_j s_j, s_j = norm(top ratio of exp(n norm(|tau_j|)^2) tanh(tau_j sum_i tau_i))",
    source="arXiv 2410.02396 (PCB-Merging), as in its code",
    uses_weights=False,
    kind="tensor",
)
def pcb(vectors: "Tensor", weights: "Tensor", *, ratio: Density = 0.1) -> "Tensor":
    """The values that are large in their vector and fit the others', averaged by how much they are and do."""
    import torch

    if vectors.shape[1] == 0:
        return vectors[0].double()
    count, length = vectors.shape
    cut, kept_values = int(OUTLIERS * length), max(1, share(ratio, length))
    together = weighted_sum(vectors, [1.0] * count)
    total, divisor = torch.zeros_like(together), torch.zeros_like(together)
    # Site by site, so that no more than a few float64 rows are in memory.
    for vector in vectors:
        sizes = vector.abs().double()  # never the vector itself, which is float64 when it is clipped
        sizes = sizes.clamp_(sizes.kthvalue(cut + 1).values, sizes.kthvalue(length - cut).values)
        fits = (vector * together).tanh_()
        scores = _stretched(sizes.clone()).square_().mul_(count).exp_().mul_(fits)
        lowest = scores.kthvalue(length + 1 - kept_values).values
        # Where all that are kept score alike, they count alike.
        alike = (scores == lowest) if bool(scores.amax() == lowest) else None
        kept = _stretched(scores.clamp_(min=lowest).sub_(lowest))
        if alike is not None:
            kept.masked_fill_(alike, 1.0)
        divisor.add_(kept)
        total.add_(sizes.mul_(vector.sign()).mul_(kept))
    return total.div_(divisor).masked_fill_(divisor <= 0, 0.0)
