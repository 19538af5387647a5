"""Matrix methods equal their papers' algorithms, written from the papers with plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from combining import combine, laws, seeds, some_vectors
from hypothesis import given
from hypothesis import strategies as st

matrices = st.sampled_from(((6, 10), (10, 6), (8, 8), (4, 3, 3, 3), (2, 40)))
SPECTRAL = ("tsv", "iso_c", "iso_cts", "wudi")


def plain(vectors: torch.Tensor) -> np.ndarray:
    return vectors.double().reshape(len(vectors), vectors.shape[1], -1).numpy()


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found.reshape(expected.shape).numpy(), expected, rtol=0, atol=tolerance)


def whitened(columns: np.ndarray) -> np.ndarray:
    """Procrustes: X (X'X)^(-1/2), by the eigenvectors of X'X."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ vectors @ np.diag(values**-0.5) @ vectors.T


def nearest(columns: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(columns, full_matrices=False)
    return left @ right


@laws
@given(count=st.integers(1, 4), shape=matrices, seed=seeds)
def test_tsv_is_the_papers_algorithm(count, shape, seed):
    vectors = some_vectors(count, shape, seed)
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in plain(vectors)]
    kept = max(1, len(parts[0][1]) // count)
    left = np.concatenate([part[0][:, :kept] for part in parts], 1)
    right = np.concatenate([part[2][:kept] for part in parts], 0)
    values = np.concatenate([part[1][:kept] for part in parts])
    close(combine("tsv", vectors), whitened(left) @ np.diag(values) @ whitened(right.T).T, 1e-6)


@laws
@given(count=st.integers(1, 4), shape=matrices, seed=seeds)
def test_iso_c_makes_all_directions_of_the_sum_equally_strong(count, shape, seed):
    vectors = some_vectors(count, shape, seed)
    left, values, right = np.linalg.svd(plain(vectors).sum(0), full_matrices=False)
    expected = sum(values.mean() * np.outer(left[:, k], right[k]) for k in range(len(values)))
    found = combine("iso_c", vectors)
    close(found, expected)
    strengths = np.linalg.svd(found.reshape(expected.shape).numpy(), compute_uv=False)
    np.testing.assert_allclose(strengths, values.mean(), rtol=1e-9)


@laws
@given(count=st.integers(1, 4), shape=matrices, seed=seeds, common=st.sampled_from((0.0, 0.5, 0.8, 1.0)))
def test_iso_cts_is_the_papers_algorithm(count, shape, seed, common):
    vectors = some_vectors(count, shape, seed)
    rows = plain(vectors)
    left, values, right = np.linalg.svd(rows.sum(0), full_matrices=False)
    each = round((len(values) - int(common * len(values))) / count)
    shared = max(0, len(values) - each * count)
    lefts, strengths, rights = [left[:, :shared]], [values[:shared]], [right[:shared]]
    for matrix in rows:
        own = matrix - left[:, :shared] @ left[:, :shared].T @ matrix
        found = np.linalg.svd(own, full_matrices=False)
        lefts.append(found[0][:, :each])
        strengths.append(found[1][:each])
        rights.append(found[2][:each])
    strength = np.concatenate(strengths).mean()
    expected = strength * nearest(np.concatenate(lefts, 1)) @ nearest(np.concatenate(rights, 0).T).T
    close(combine("iso_cts", vectors, common=common), expected, 1e-6)


@laws
@given(count=st.integers(1, 3), shape=matrices, seed=seeds)
def test_wudi_is_adam_on_the_papers_loss(count, shape, seed):
    vectors = 0.01 * some_vectors(count, shape, seed)
    rows = torch.from_numpy(plain(vectors))
    merged = torch.nn.Parameter(rows.sum(0))
    optimiser = torch.optim.Adam([merged], lr=1e-4)
    for _ in range(20):
        loss = sum(((merged - matrix) @ matrix.T).square().sum() / matrix.square().sum() for matrix in rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    close(combine("wudi", vectors, steps=20, learning_rate=1e-4), merged.detach().numpy(), 1e-9)


def test_wudi_goes_towards_the_point_where_its_loss_is_least():
    vectors = some_vectors(3, (6, 10), 1)
    rows = plain(vectors)
    weights = [1 / (matrix**2).sum() for matrix in rows]
    inputs = sum(weight * matrix.T @ matrix for weight, matrix in zip(weights, rows, strict=True))
    outputs = sum(weight * matrix @ matrix.T @ matrix for weight, matrix in zip(weights, rows, strict=True))

    def loss(merged: np.ndarray) -> float:
        lost = [weight * (((merged - row) @ row.T) ** 2).sum() for weight, row in zip(weights, rows, strict=True)]
        return float(sum(lost))

    least = loss(outputs @ np.linalg.inv(inputs))
    found = loss(combine("wudi", vectors, steps=1000, learning_rate=3e-3).numpy())
    assert least <= found < least + 0.05 * (loss(rows.sum(0)) - least)


def test_equal_vectors_are_joined_without_noise_from_directions_that_are_not_there():
    one = some_vectors(1, (6, 10), 4)
    left, values, right = np.linalg.svd(plain(one)[0], full_matrices=False)
    equal = one.expand(3, 6, 10).clone()
    close(combine("tsv", equal), left[:, :2] @ np.diag(values[:2]) @ right[:2])
    close(combine("iso_c", equal), 3 * values.mean() * left @ right)


def test_a_site_that_changed_nothing_does_not_turn_the_others():
    vectors = some_vectors(2, (6, 10), 5)
    vectors[1] = 0
    left, values, right = np.linalg.svd(plain(vectors)[0], full_matrices=False)
    close(combine("tsv", vectors), left[:, :3] @ np.diag(values[:3]) @ right[:3])


def test_a_direction_of_no_strength_stays_one():
    thin = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 11.0)).expand(2, 6, 10)
    assert np.linalg.matrix_rank(combine("iso_c", thin).numpy(), tol=1e-9) == 1


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (9, 1), (64, 1, 3, 3)])
def test_what_is_no_matrix_is_averaged(name, shape):
    vectors = some_vectors(3, shape, 2)
    torch.testing.assert_close(combine(name, vectors), vectors.double().mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_heads_are_averaged_and_keep_their_rank(name):
    vectors = some_vectors(3, (5, 12), 2)
    found = combine(name, vectors, head=True)
    torch.testing.assert_close(found, vectors.double().mean(0), rtol=1e-12, atol=1e-12)
    assert np.linalg.matrix_rank(found.numpy()) == 5
