"""Methods that weigh whole vectors by angles and distances equal their papers' formulas, written on the vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from combining import combine, counts, laws, seeds, some_vectors, some_weights
from hypothesis import given
from hypothesis import strategies as st

few_shapes = st.sampled_from(((2,), (64,), (6, 10), (4, 3, 3, 3)))


def plain(vectors: torch.Tensor) -> np.ndarray:
    return vectors.double().reshape(len(vectors), -1).numpy()


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found.reshape(-1).numpy(), expected, rtol=tolerance, atol=tolerance)


def angle(one: np.ndarray, other: np.ndarray) -> float:
    cosine = float(one @ other) / (math.sqrt(float(one @ one)) * math.sqrt(float(other @ other)))
    return math.acos(min(1.0, max(-1.0, cosine)))


# Angles


@laws
@given(count=st.integers(2, 6), shape=few_shapes, seed=seeds, alike=st.floats(0, 2))
def test_model_stock_is_the_papers_ratio_of_the_mean(count, shape, seed, alike):
    vectors = some_vectors(count, shape, seed) + alike * some_vectors(1, shape, seed + 1)
    rows = plain(vectors)
    cosines = [math.cos(angle(rows[i], rows[j])) for i in range(count) for j in range(i)]
    mean = max(0.0, sum(cosines) / len(cosines))
    ratio = count * mean / (1 + (count - 1) * mean)
    close(combine("model_stock", vectors), ratio * rows.mean(0))


def test_model_stock_of_orthogonal_vectors_is_the_base_and_of_opposite_ones_too():
    assert not combine("model_stock", torch.eye(3)).any()
    assert not combine("model_stock", torch.tensor([[1.0, 2.0], [-1.0, -2.0]])).any()


@laws
@given(shape=few_shapes, seed=seeds)
def test_slerp_is_half_of_the_arc_and_nuslerp_divides_it_by_the_weights(shape, seed):
    vectors, weights = some_vectors(2, shape, seed), some_weights(2, seed)
    first, second = plain(vectors)
    between = angle(first, second)
    for name, given_weights, t in (("slerp", None, 0.5), ("nuslerp", weights, float(weights[1] / weights.sum()))):
        if math.sin(between) > 1e-4:
            expected = math.sin((1 - t) * between) * first + math.sin(t * between) * second
            close(combine(name, vectors, given_weights), expected / math.sin(between))


def test_the_arc_between_directions_that_are_nearly_one_is_the_chord():
    first = torch.tensor([1.0, 2.0, 3.0])
    vectors = torch.stack([first, 2 * first * (1 + 1e-7)])
    close(combine("slerp", vectors), plain(vectors).mean(0), 1e-6)
    close(combine("slerp", torch.stack([first, -first])), np.zeros(3))


def naive_karcher(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Gradient descent for the squared angles on the sphere, as its definition says."""
    lengths = np.sqrt((rows**2).sum(1))
    units, shares = rows / lengths[:, None], weights / weights.sum()
    point = (shares[:, None] * units).sum(0)
    point /= np.linalg.norm(point)
    for _ in range(2000):
        tangent = np.zeros_like(point)
        for unit, share in zip(units, shares, strict=True):
            theta = math.acos(min(1.0, max(-1.0, float(unit @ point))))
            across = unit - float(unit @ point) * point
            length = np.linalg.norm(across)
            if length > 1e-12:
                tangent += share * theta * across / length
        point = point + 0.3 * tangent
        point /= np.linalg.norm(point)
    return float((shares * lengths).sum()) * point


@laws
@given(count=st.integers(2, 6), shape=st.sampled_from(((64,), (6, 10))), seed=seeds)
def test_the_karcher_mean_is_the_point_of_least_squared_angles(count, shape, seed):
    vectors = some_vectors(count, shape, seed) + 0.5 * some_vectors(1, shape, seed + 1)
    weights = some_weights(count, seed)
    close(combine("karcher_mean", vectors, weights), naive_karcher(plain(vectors), weights.numpy()), 1e-7)


def test_the_karcher_mean_of_two_vectors_of_one_length_is_their_slerp():
    vectors = some_vectors(2, (64,), 3)
    vectors /= vectors.norm(dim=1, keepdim=True)
    close(combine("karcher_mean", vectors), combine("slerp", vectors).numpy(), 1e-6)


def test_a_zero_vector_gives_the_karcher_mean_no_direction_but_shortens_it():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    close(combine("karcher_mean", vectors), np.array([1.5, 2.0]))


# Distances


@laws
@given(count=st.integers(3, 7), shape=few_shapes, seed=seeds)
def test_the_geometric_median_has_no_better_point_around_it(count, shape, seed):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    rows, found = plain(vectors), combine("geometric_median", vectors, weights).reshape(-1).numpy()

    def cost(point: np.ndarray) -> float:
        return float((weights.numpy() * np.sqrt(((rows - point) ** 2).sum(1))).sum())

    random = np.random.default_rng(seed)
    for step in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            assert cost(found) <= cost(found + step * random.normal(size=found.shape)) + 1e-9
    best = rows[int(np.argmin([cost(row) for row in rows]))]
    assert cost(found) <= cost(best) + 1e-6


@laws
@given(count=st.integers(3, 7), shape=few_shapes, seed=seeds)
def test_the_geometric_median_is_what_weiszfelds_steps_lead_to(count, shape, seed):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed).numpy()
    rows = plain(vectors)
    point = (weights[:, None] * rows).sum(0) / weights.sum()
    for _ in range(1000):
        pulls = weights / np.maximum(np.sqrt(((rows - point) ** 2).sum(1)), 1e-9)
        point = (pulls[:, None] * rows).sum(0) / pulls.sum()
    close(combine("geometric_median", vectors, torch.from_numpy(weights)), point, 1e-6)


def test_the_geometric_median_of_vectors_that_lie_close_together_far_from_zero_is_exact():
    vectors = 1e4 + 1e-2 * some_vectors(5, (64,), 1)
    close(combine("geometric_median", vectors) - 1e4, combine("geometric_median", vectors - 1e4).numpy(), 1e-6)


def naive_krum(rows: np.ndarray, f: int) -> list[int]:
    """The sites by their score, best first."""
    scores = []
    for i, row in enumerate(rows):
        others = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        scores.append(math.fsum(others[: len(rows) - f - 2]))
    return sorted(range(len(rows)), key=lambda site: scores[site])


@laws
@given(data=st.data(), shape=few_shapes, seed=seeds, f=st.integers(0, 2))
def test_krum_chooses_the_vector_nearest_to_its_neighbours(data, shape, seed, f):
    count = data.draw(counts("krum", f=f))
    vectors = some_vectors(count, shape, seed)
    rows = plain(vectors)
    best = naive_krum(rows, f)
    close(combine("krum", vectors, f=f), rows[best[0]])
    close(combine("multi_krum", vectors, f=f), rows[best[: count - f]].mean(0))
    close(combine("multi_krum", vectors, f=f, keep=2), rows[best[:2]].mean(0))


@pytest.mark.parametrize("method", ["krum", "multi_krum", "geometric_median", "median", "trimmed_mean"])
def test_one_vector_however_large_moves_a_robust_mean_little(method):
    honest = 1 + 0.1 * some_vectors(5, (64,), 1)
    for hostile in (1e6 * honest[4], -honest[4], -1e6 * honest[4], torch.full((64,), 1e30)):
        honest[4] = hostile
        moved = combine(method, honest) - plain(honest[:4]).mean(0)
        assert float(moved.norm()) < 0.2 * 8  # of a mean of length 8
