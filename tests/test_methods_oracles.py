"""Methods that combine value by value equal their papers' formulas, written as loops over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from combining import combine, counts, laws, seeds, shapes, sizes, some_vectors, some_weights
from hypothesis import given
from hypothesis import strategies as st

from hf_datavec.draws import Draws
from hf_datavec.methods.signs import agreeing

Vectors = list[list[float]]


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def by_place(vectors: Vectors, rule: Callable[[list[float]], float]) -> list[float]:
    return [rule([vector[place] for vector in vectors]) for place in range(len(vectors[0]))]


# Linear methods


def naive_sum(vectors: Vectors, weights: list[float]) -> list[float]:
    return by_place(vectors, math.fsum)


def naive_mean(vectors: Vectors, weights: list[float]) -> list[float]:
    return [total / len(vectors) for total in naive_sum(vectors, weights)]


def naive_weighted_sum(vectors: Vectors, weights: list[float]) -> list[float]:
    return by_place(vectors, lambda values: math.fsum(w * v for w, v in zip(weights, values, strict=True)))


def naive_linear(vectors: Vectors, weights: list[float]) -> list[float]:
    return [total / math.fsum(weights) for total in naive_weighted_sum(vectors, weights)]


# TIES, arXiv 2306.01708, algorithm 1, and what borrows from it


def kept_largest(vector: list[float], density: float) -> list[float]:
    count = max(1, math.floor(density * len(vector) + 1e-9)) if vector else 0
    ranked = sorted(range(len(vector)), key=lambda place: -abs(vector[place]))
    return [value if place in ranked[:count] else 0.0 for place, value in enumerate(vector)]


def elect_and_merge(vectors: Vectors, weights: list[float], *, normalize: bool = True) -> list[float]:
    def rule(values: list[float]) -> float:
        weighted = [weight * value for weight, value in zip(weights, values, strict=True)]
        elected = sign(math.fsum(weighted))
        agreeing = [place for place, value in enumerate(weighted) if elected != 0 and sign(value) == elected]
        total = math.fsum(weighted[place] for place in agreeing)
        divisor = math.fsum(weights[place] for place in agreeing)
        if not normalize:
            return total
        return total / divisor if divisor else 0.0  # weights that add up to nothing have no average

    return by_place(vectors, rule)


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 4), min_size=1, max_size=9),
    st.tuples(*[st.sampled_from([1, 1, 0.5, -1, -2, 0])] * 4),
    st.booleans(),
)
def test_election_is_the_papers_for_weights_of_any_sign(places, weights, normalize):
    vectors = [[float(place[site]) for place in places] for site in range(4)]
    found = agreeing(torch.tensor(vectors), torch.tensor(weights, dtype=torch.float64), normalize=normalize)
    assert found.tolist() == pytest.approx(elect_and_merge(vectors, list(weights), normalize=normalize), abs=1e-12)


def naive_ties(density: float, **how: bool) -> Callable[[Vectors, list[float]], list[float]]:
    return lambda vectors, weights: elect_and_merge([kept_largest(v, density) for v in vectors], weights, **how)


def between(vector: list[float], density: float, gamma: float) -> list[float]:
    ranked = sorted(range(len(vector)), key=lambda place: -abs(vector[place]))
    top = min(math.floor(gamma * len(vector) + 1e-9), len(vector) - 1)
    kept = ranked[max(0, top) : max(0, top) + max(1, math.floor(density * len(vector) + 1e-9))]
    return [value if place in kept else 0.0 for place, value in enumerate(vector)]


def naive_magmax(vectors: Vectors, weights: list[float]) -> list[float]:
    return by_place(vectors, lambda values: max(values, key=abs))


def naive_emr(vectors: Vectors, weights: list[float]) -> list[float]:
    def rule(values: list[float]) -> float:
        elected = sign(math.fsum(values))
        return elected * max((abs(value) for value in values if sign(value) == elected), default=0.0)

    return by_place(vectors, rule)


def naive_consensus(threshold: float, votes: int) -> Callable[[Vectors, list[float]], list[float]]:
    def rule(values: list[float]) -> float:
        total = math.fsum(values)
        needing = sum(abs(value) > threshold * abs(total - value) for value in values)
        return total if needing >= votes else 0.0

    return lambda vectors, weights: by_place(vectors, rule)


# SCE, arXiv 2408.07990: select, calculate, erase


def naive_sce(select: float) -> Callable[[Vectors, list[float]], list[float]]:
    def whole(vectors: Vectors, weights: list[float]) -> list[float]:
        count = len(vectors)

        def variance(values: list[float]) -> float:
            mean = math.fsum(values) / count
            return math.fsum((value - mean) ** 2 for value in values) / count

        variances = by_place(vectors, variance)
        changed = max(1, math.floor(select * sum(value > 0 for value in variances) + 1e-9))
        lowest = sorted(variances, reverse=True)[changed - 1] if variances and select < 1 else -1.0
        chosen = [[v if s >= lowest else 0.0 for v, s in zip(vector, variances, strict=True)] for vector in vectors]
        energies = [math.fsum(value**2 for value in vector) / max(1, len(vector)) for vector in chosen]

        def fuse(values: list[float]) -> float:
            elected = sign(math.fsum(values))
            agreeing = [place for place in range(count) if elected != 0 and sign(values[place]) == elected]
            divisor = math.fsum(energies[place] for place in agreeing)
            return math.fsum(energies[place] * values[place] for place in agreeing) / divisor if divisor else 0.0

        return by_place(chosen, fuse)

    return whole


# PCB, arXiv 2410.02396, with its code's hyperbolic tangent; no tensor here is long enough for its clamp


def stretched(values: list[float]) -> list[float]:
    least, most = min(values), max(values)
    return [(value - least) / (most - least) if most > least else 0.0 for value in values]


def naive_pcb(ratio: float) -> Callable[[Vectors, list[float]], list[float]]:
    def whole(vectors: Vectors, weights: list[float]) -> list[float]:
        if not vectors[0]:
            return []
        totals, scales = naive_sum(vectors, weights), []
        for vector in vectors:
            balance = [math.exp(len(vectors) * size**2) for size in stretched([abs(value) for value in vector])]
            scores = [b * math.tanh(v * total) for b, v, total in zip(balance, vector, totals, strict=True)]
            lowest = sorted(scores, reverse=True)[max(1, math.floor(ratio * len(vector) + 1e-9)) - 1]
            kept = stretched([max(score, lowest) for score in scores])
            scales.append([1.0 if max(scores) == lowest == score else k for k, score in zip(kept, scores, strict=True)])

        def merged(place: int) -> float:
            divisor = math.fsum(scale[place] for scale in scales)
            total = math.fsum(scale[place] * vector[place] for scale, vector in zip(scales, vectors, strict=True))
            return total / divisor if divisor else 0.0

        return [merged(place) for place in range(len(vectors[0]))]

    return whole


# Median and trimmed mean, arXiv 1803.01498


def naive_median(vectors: Vectors, weights: list[float]) -> list[float]:
    def rule(values: list[float]) -> float:
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2

    return by_place(vectors, rule)


def naive_trimmed(out: int) -> Callable[[Vectors, list[float]], list[float]]:
    def rule(values: list[float]) -> float:
        kept = sorted(values)[out : len(values) - out]
        return math.fsum(kept) / len(kept)

    return lambda vectors, weights: by_place(vectors, rule)


def breadcrumbs(density: float, gamma: float) -> Callable[[Vectors, list[float]], list[float]]:
    return lambda vectors, weights: naive_weighted_sum([between(v, density, gamma) for v in vectors], weights)


def breadcrumbs_ties(density: float, gamma: float) -> Callable[[Vectors, list[float]], list[float]]:
    return lambda vectors, weights: elect_and_merge([between(v, density, gamma) for v in vectors], weights)


ORACLES = {
    "sum": ("sum", {}, naive_sum),
    "mean": ("mean", {}, naive_mean),
    "linear": ("linear", {}, naive_linear),
    "linear, normalize: true": ("linear", {"normalize": True}, naive_linear),
    "linear, normalize: false": ("linear", {"normalize": False}, naive_weighted_sum),
    "task_arithmetic": ("task_arithmetic", {}, naive_weighted_sum),
    "task_arithmetic, normalize: true": ("task_arithmetic", {"normalize": True}, naive_linear),
    "fedavg": ("fedavg", {}, naive_linear),
    "ties": ("ties", {}, naive_ties(0.2)),
    "ties, half": ("ties", {"density": 0.5, "scope": "tensor"}, naive_ties(0.5)),
    "ties, sum": ("ties", {"density": 0.7, "normalize": False}, naive_ties(0.7, normalize=False)),
    "breadcrumbs": ("breadcrumbs", {}, breadcrumbs(0.9, 0.01)),
    "breadcrumbs, more": ("breadcrumbs", {"density": 0.3, "gamma": 0.2}, breadcrumbs(0.3, 0.2)),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.2}, breadcrumbs_ties(0.3, 0.2)),
    "magmax": ("magmax", {}, naive_magmax),
    "emr": ("emr", {}, naive_emr),
    "consensus": ("consensus", {}, naive_consensus(0.4, 2)),
    "consensus, strict": ("consensus", {"threshold": 1.5, "votes": 1}, naive_consensus(1.5, 1)),
    "sce": ("sce", {}, naive_sce(1.0)),
    "sce, a tenth": ("sce", {"select_topk": 0.1}, naive_sce(0.1)),
    "pcb": ("pcb", {}, naive_pcb(0.1)),
    "pcb, half": ("pcb", {"ratio": 0.5}, naive_pcb(0.5)),
    "median": ("median", {}, naive_median),
    "trimmed_mean": ("trimmed_mean", {}, naive_trimmed(1)),
    "trimmed_mean, two": ("trimmed_mean", {"f": 2}, naive_trimmed(2)),
}


@pytest.mark.parametrize("case", ORACLES)
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_the_result_is_what_the_formula_says(case, data, shape, seed):
    name, options, oracle = ORACLES[case]
    count = data.draw(counts(name, **options))
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    plain = vectors.double().reshape(count, math.prod(shape)).tolist()
    expected = torch.tensor(oracle(plain, weights.tolist()), dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(combine(name, vectors, weights, **options), expected, rtol=1e-12, atol=1e-12)


def test_negative_weights_vote_for_the_other_side():
    vectors, weights = some_vectors(3, (64,), 1), torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
    expected = naive_ties(0.5, normalize=False)(vectors.double().tolist(), weights.tolist())
    found = combine("ties", vectors, weights, density=0.5, normalize=False)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_sum_that_float32_would_round_away_is_kept():
    vectors = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert combine("sum", vectors).tolist() == [1.0]
    assert combine("mean", vectors).tolist() == [1 / 3]


def test_the_sign_is_elected_by_total_magnitude_not_by_count():
    vectors = torch.tensor([[3.0], [-1.0], [-1.0]])
    assert combine("ties", vectors, density=1.0).tolist() == [3.0]
    assert combine("emr", vectors).tolist() == [3.0]


# What is kept


def kept_by(name: str, length: int, **options: object) -> int:
    values = torch.randperm(length, generator=torch.Generator().manual_seed(length)).float() + 1
    return int((combine(name, values[None], **options) != 0).sum())


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100, 4096])
def test_methods_keep_as_many_values_as_they_say(length):
    for density in (0.1, 0.29, 0.5, 0.9):
        expected = max(1, math.floor(density * length + 1e-9))
        assert kept_by("ties", length, density=density) == expected
        for gamma in (0.0, 0.01, 0.1):
            assert kept_by("breadcrumbs", length, density=density, gamma=gamma) == expected
            assert kept_by("breadcrumbs_ties", length, density=density, gamma=gamma) == expected


def test_breadcrumbs_on_64_values_drops_the_largest_and_keeps_the_next():
    values = torch.arange(1.0, 65.0)
    kept = combine("breadcrumbs", values[None], density=0.5, gamma=0.05)
    assert kept.nonzero().flatten().tolist() == list(range(29, 61))  # 3 of 64 are outliers, the next 32 stay


def test_values_as_large_as_the_boundary_stay_in():
    assert bool((combine("ties", torch.ones(1, 64), density=0.1) == 1).all())
    assert bool((combine("breadcrumbs", torch.ones(1, 64), density=0.5, gamma=0.1) == 1).all())


# Methods that draw: the formula with the very same draws


def draws(shape: tuple[int, ...], count: int) -> Vectors:
    found = []
    for index in range(count):
        random = Draws(0, f"site {index}", "fc.weight")
        found.append(random.uniform(math.prod(shape)).tolist())
    return found


def dropped(vectors: Vectors, drawn: Vectors, chances: Vectors) -> Vectors:
    return [
        [value / p if u < p else 0.0 for value, u, p in zip(*row, strict=True)]
        for row in zip(vectors, drawn, chances, strict=True)
    ]


def della_chances(vector: list[float], columns: int, density: float, epsilon: float) -> list[float]:
    found: list[float] = []
    for start in range(0, len(vector), columns):
        row = [abs(value) for value in vector[start : start + columns]]
        for value in row:
            rank = sum(other < value for other in row)
            step = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
            found.append(density - epsilon + step * rank if columns > 1 else density)
    return found


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@laws
@given(count=st.integers(1, 5), shape=shapes, seed=seeds)
def test_methods_that_draw_do_what_the_formula_says_with_what_they_drew(name, count, shape, seed):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    plain = vectors.double().reshape(count, math.prod(shape)).tolist()
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // rows
    if name.startswith("della"):
        chances = [della_chances(vector, columns, 0.5, 0.2) for vector in plain] if columns else plain
        found = combine(name, vectors, weights, density=0.5, epsilon=0.2)
    else:
        chances = [[0.3] * len(vector) for vector in plain]
        found = combine(name, vectors, weights, density=0.3)
    sparse = dropped(plain, draws((math.prod(shape),), count), chances)
    merged = naive_weighted_sum if name.endswith("linear") else elect_and_merge
    expected = torch.tensor(merged(sparse, weights.tolist()), dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_keeps_the_expectation_and_the_density(name):
    vectors = torch.ones(1, 200, 200)
    found = combine(name, vectors, density=0.25)
    kept = float((found != 0).double().mean())
    assert kept == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 40_000))
    assert float(found.mean()) == pytest.approx(1, abs=0.05)
    unscaled = combine(name, vectors, density=0.25, rescale=False)
    assert set(unscaled.unique().tolist()) == {0.0, 1.0}


def test_della_keeps_large_values_more_often_in_every_row_of_a_depthwise_kernel():
    kernel = torch.arange(1.0, 10.0).repeat(3000, 1).reshape(1, 3000, 1, 3, 3)
    kept = (combine("della_linear", kernel, density=0.5, epsilon=0.4).reshape(3000, 9) != 0).double().mean(0)
    for place, share in enumerate(kept.tolist()):
        assert share == pytest.approx(0.1 + 0.1 * place, abs=0.04)  # four standard deviations


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear", "random"])
def test_what_is_drawn_depends_on_seed_content_and_name_alone(name):
    vectors = some_vectors(1, (64,), 5)
    usual = combine(name, vectors, seed=1, digests=["a"], tensor="x")
    assert torch.equal(usual, combine(name, vectors, seed=1, digests=["a"], tensor="x"))
    for changed in (
        {"seed": 2, "digests": ["a"], "tensor": "x"},
        {"seed": 1, "digests": ["b"], "tensor": "x"},
        {"seed": 1, "digests": ["a"], "tensor": "y"},
        {"seed": 11, "digests": ["a"], "tensor": "x"},  # parts are told apart, not merely strung together
    ):
        assert not torch.equal(usual, combine(name, vectors, **changed))


# The random control


@laws
@given(shape=shapes, seed=seeds, size=sizes)
def test_a_random_vector_is_as_long_as_the_one_it_stands_for(shape, seed, size):
    vectors = some_vectors(1, shape, seed, size)
    expected = math.sqrt(math.fsum(value**2 for value in vectors.double().reshape(-1).tolist()))
    assert combine("random", vectors).norm().item() == pytest.approx(expected, rel=1e-12)


@laws
@given(count=st.integers(2, 7), seed=seeds)
def test_the_random_result_is_the_sum_of_each_vectors_own(count, seed):
    vectors = some_vectors(count, (64,), seed)
    digests = [f"site {index}" for index in range(count)]
    alone = [combine("random", vectors[index : index + 1], digests=[digests[index]]) for index in range(count)]
    for vector, one in zip(vectors, alone, strict=True):
        assert one.norm().item() == pytest.approx(vector.double().norm().item(), rel=1e-12)
    torch.testing.assert_close(combine("random", vectors, digests=digests), sum(alone), rtol=0, atol=1e-12)


def test_random_directions_are_independent_and_spread_evenly():
    usual = combine("random", some_vectors(1, (64,), 5), digests=["a"], tensor="x")
    moved = combine("random", some_vectors(1, (64,), 6), digests=["a"], tensor="x")
    torch.testing.assert_close(moved / moved.norm(), usual / usual.norm(), rtol=0, atol=1e-12)
    for other in (combine("random", some_vectors(1, (64,), 5), digests=["b"], tensor="x"),):
        assert abs(float(usual @ other)) < 0.5 * float(usual.norm() * other.norm())  # nearly orthogonal
    total = combine("random", torch.ones(400, 64))
    # A sum of n independent directions of length 8 has a mean square length of n * 64; four standard deviations.
    assert float(total.square().sum()) == pytest.approx(400 * 64, rel=4 * math.sqrt(2 / 64))
