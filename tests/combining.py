"""Merge methods called on plain tensors, as the engine calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st

from hf_datavec.combine import Sites, ready
from hf_datavec.methods import all_methods, applied

METHODS = sorted(all_methods())
# Numbers, nothing, one value, few values, a depthwise kernel, a matrix, a convolution's kernel.
SHAPES = ((), (0,), (1,), (64,), (64, 1, 3, 3), (6, 10), (4, 3, 3, 3))

shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**31)
# Over the whole range that weights of networks have, and far beyond.
sizes = st.sampled_from((1e-40, 1e-6, 1.0, 1e30))
# Few examples of many methods: the whole family of laws has to run in seconds.
laws = settings(max_examples=8, deadline=None, derandomize=True)


def counts(name: str, most: int = 7, **options: object) -> st.SearchStrategy[int]:
    """Numbers of sites that a method takes."""
    return st.sampled_from([n for n in range(1, most + 1) if all_methods()[name].refuse(n, options) is None])


def some_vectors(count: int, shape: tuple[int, ...], seed: int, size: float = 1.0) -> torch.Tensor:
    """Vectors (n, *shape)."""
    values = torch.randn(count, math.prod(shape), generator=torch.Generator().manual_seed(seed))
    return (size * values).float().reshape(count, *shape)


def some_weights(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + 0.1


def combine(
    name: str, vectors: torch.Tensor, weights: torch.Tensor | None = None, *, seed: int = 0,
    digests: Sequence[str] | None = None, tensor: str = "fc.weight", head: bool = False, slices: int = 0,
    factors: Sequence[float] | None = None, **options: object,
) -> torch.Tensor:  # fmt: skip
    """What a method makes of vectors (n, *shape): a tensor of this shape; in slices of some length, or as a whole."""
    method, chosen = applied(name, options, tuple(vectors.shape[1:]), head=head)
    count = len(vectors)
    sites = Sites(
        tuple((torch.ones(count) if weights is None else weights).tolist()),
        tuple(digests or [f"site {index}" for index in range(count)]),
        tuple(factors or [1.0] * count),
    )
    combined = ready(method, chosen, list(vectors), sites, key=tensor, seed=seed)
    flat = vectors.reshape(count, math.prod(vectors.shape[1:]))
    if slices:
        parts = [combined(part, place * slices) for place, part in enumerate(flat.split(slices, dim=1))]
        return torch.cat(parts).reshape(vectors.shape[1:])
    return combined(flat, 0).reshape(vectors.shape[1:])
