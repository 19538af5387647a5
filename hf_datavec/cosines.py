"""Norms and cosines of whole vectors, by one pass over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hf_datavec.combine import SLICE
from hf_datavec.geometry import Geometry, Gram, products
from hf_datavec.progress import progress
from hf_datavec.threads import Task, in_order
from hf_datavec.vector import refuse_nonfinite

if TYPE_CHECKING:
    import torch

    from hf_datavec.vector import Parts

    # A site's name, and what reads one tensor of its vector slice by slice.
    Vector = tuple[str, Callable[[str], Parts]]


def measured(vectors: Sequence[Vector], lengths: Mapping[str, int], *, text: str) -> Geometry:
    """Norms and cosines of vectors over some of their tensors, whose numbers of values are given.

    The same for any number of threads. Raises: InputError for NaN or infinite values.
    """
    gram, size = Gram(), 4 * SLICE * len(vectors)
    tasks = (Task(partial(_products, vectors, name, length), size) for name, length in sorted(lengths.items()))
    for found in progress(in_order(tasks), text=text, total=len(lengths), unit="tensor"):
        gram.include(found.numpy())
    return gram.geometry()


def _products(vectors: Sequence[Vector], name: str, length: int) -> torch.Tensor:
    import torch

    parts = [read(name) for _, read in vectors]
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for start in range(0, length, SLICE):
        total += products(torch.stack([part(slice(start, min(start + SLICE, length))) for part in parts]))
    if not math.isfinite(float(total.trace())):
        for (site, _), part in zip(vectors, parts, strict=True):
            refuse_nonfinite(part(slice(0, length)), name, site)
    return total
