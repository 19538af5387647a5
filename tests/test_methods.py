"""Laws that every registered merge method keeps, and naive transcriptions of their formulas as oracles."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import pytest
import torch
from annotated_types import Interval
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_datavec import fuse
from hf_datavec.methods import Method, all_methods, options_model

METHODS = sorted(all_methods())
SHAPES = ((), (0,), (1,), (64,), (64, 1, 3, 3))
AVERAGES = ("mean", "linear")
ORDERLESS = ("sum", "mean", "linear")

each_method = pytest.mark.parametrize("name", METHODS)
shapes = st.sampled_from(SHAPES)
counts = st.integers(1, 7)
seeds = st.integers(0, 2**31)
# Over the whole range that weights of networks have, and far beyond.
sizes = st.sampled_from((1e-30, 1e-6, 1.0, 1e6))
laws = settings(max_examples=30, deadline=None, derandomize=True)


def some_vectors(count: int, shape: tuple[int, ...], seed: int, size: float = 1.0) -> torch.Tensor:
    """Vectors (n, d) of a tensor of this shape."""
    values = math.prod(shape)
    return (size * torch.randn(count, values, generator=torch.Generator().manual_seed(seed))).float()


def some_weights(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + 0.1


def combine(
    name: str, vectors: torch.Tensor, weights: torch.Tensor | None = None, *, seed: int = 0,
    digests: Sequence[str] | None = None, tensor: str = "fc.weight", **options: object,
) -> torch.Tensor:  # fmt: skip
    """What a method makes of vectors, called as the engine calls it."""
    method = all_methods()[name]
    weights = torch.ones(len(vectors), dtype=torch.float64) if weights is None else weights
    extra = {}
    if method.kind == "tensor":
        digests = digests or [f"site {index}" for index in range(len(vectors))]
        extra["generators"] = [fuse._generator(seed, digest, tensor) for digest in digests]
    result: torch.Tensor = method.function(vectors, weights, **extra, **options)
    return result


# Laws


@each_method
@laws
@given(shape=shapes, count=counts, seed=seeds, size=sizes)
def test_the_result_is_finite_and_has_one_value_per_coordinate(name, shape, count, seed, size):
    result = combine(name, some_vectors(count, shape, seed, size), some_weights(count, seed))
    assert result.shape == (math.prod(shape),)
    assert result.is_floating_point()
    assert bool(torch.isfinite(result).all())


@each_method
@laws
@given(shape=shapes, count=counts, seed=seeds)
def test_the_same_input_gives_the_same_bits_and_is_left_as_it_was(name, shape, count, seed):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    before, weights_before = vectors.clone(), weights.clone()
    torch.manual_seed(seed)
    first = combine(name, vectors, weights)
    torch.rand(3)  # global random state must not matter
    assert torch.equal(first, combine(name, vectors, weights))
    assert torch.equal(vectors, before)
    assert torch.equal(weights, weights_before)


@each_method
@laws
@given(shape=shapes, count=counts, seed=seeds)
def test_zero_in_gives_zero_out(name, shape, count, seed):
    vectors = torch.zeros(count, math.prod(shape))
    assert not bool(combine(name, vectors, some_weights(count, seed)).any())


@each_method
@laws
@given(shape=shapes, count=counts, seed=seeds, power=st.integers(-20, 20))
def test_the_result_grows_with_the_vectors(name, shape, count, seed, power):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    # A power of two scales floats without rounding, so only the method's own rounding remains.
    scaled = combine(name, vectors * 2.0**power, weights)
    torch.testing.assert_close(scaled, combine(name, vectors, weights) * 2.0**power, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", AVERAGES)
@laws
@given(shape=shapes, count=counts, seed=seeds, size=sizes)
def test_the_average_of_equal_vectors_is_one_of_them(name, shape, count, seed, size):
    vector = some_vectors(1, shape, seed, size)
    equal = vector.repeat(count, 1)
    assert torch.equal(combine(name, equal).float(), vector[0])
    weighted = combine(name, equal, some_weights(count, seed))
    torch.testing.assert_close(weighted, vector[0].double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ORDERLESS)
@laws
@given(shape=shapes, count=counts, seed=seeds)
def test_the_order_of_the_vectors_does_not_matter(name, shape, count, seed):
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = combine(name, vectors[order], weights[order])
    torch.testing.assert_close(moved, combine(name, vectors, weights), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in METHODS if all_methods()[name].kind == "coordinate"])
@laws
@given(count=counts, seed=seeds, cut=st.integers(0, 64))
def test_a_coordinate_method_gives_the_same_for_slices_as_for_the_whole(name, count, seed, cut):
    vectors, weights = some_vectors(count, (64,), seed), some_weights(count, seed)
    parts = [combine(name, vectors[:, :cut], weights), combine(name, vectors[:, cut:], weights)]
    assert torch.equal(torch.cat(parts), combine(name, vectors, weights))


@pytest.mark.parametrize("name", [name for name in METHODS if not all_methods()[name].uses_weights])
@laws
@given(shape=shapes, count=counts, seed=seeds)
def test_a_method_that_uses_no_weights_gives_the_same_with_any(name, shape, count, seed):
    vectors = some_vectors(count, shape, seed)
    assert torch.equal(combine(name, vectors, some_weights(count, seed)), combine(name, vectors))


# Oracles: the formulas as loops over plain Python numbers


def naive_sum(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [math.fsum(vector[place] for vector in vectors) for place in range(len(vectors[0]))]


def naive_mean(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [total / len(vectors) for total in naive_sum(vectors, weights)]


def naive_weighted_sum(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [
        math.fsum(weight * vector[place] for weight, vector in zip(weights, vectors, strict=True))
        for place in range(len(vectors[0]))
    ]


def naive_linear(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [total / math.fsum(weights) for total in naive_weighted_sum(vectors, weights)]


ORACLES = {
    "sum": ("sum", {}, naive_sum),
    "mean": ("mean", {}, naive_mean),
    "linear": ("linear", {}, naive_linear),
    "linear, normalize: true": ("linear", {"normalize": True}, naive_linear),
    "linear, normalize: false": ("linear", {"normalize": False}, naive_weighted_sum),
}


@pytest.mark.parametrize("case", ORACLES)
@laws
@given(shape=shapes, count=counts, seed=seeds)
def test_the_result_is_what_the_formula_says(case, shape, count, seed):
    name, options, oracle = ORACLES[case]
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    expected = torch.tensor(oracle(vectors.double().tolist(), weights.tolist()), dtype=torch.float64)
    torch.testing.assert_close(combine(name, vectors, weights, **options), expected, rtol=1e-13, atol=1e-13)


def test_a_sum_that_float32_would_round_away_is_kept():
    vectors = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert combine("sum", vectors).tolist() == [1.0]
    assert combine("mean", vectors).tolist() == [1 / 3]


# The random control


@laws
@given(shape=shapes, seed=seeds, size=sizes)
def test_a_random_vector_is_as_long_as_the_one_it_stands_for(shape, seed, size):
    vectors = some_vectors(1, shape, seed, size)
    expected = math.sqrt(math.fsum(value**2 for value in vectors.double()[0].tolist()))
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


def test_random_directions_depend_on_seed_content_and_name_alone():
    vectors = some_vectors(1, (64,), 5)
    usual = combine("random", vectors, seed=1, digests=["a"], tensor="x")
    assert torch.equal(usual, combine("random", vectors, seed=1, digests=["a"], tensor="x"))
    others = [
        combine("random", vectors, seed=2, digests=["a"], tensor="x"),
        combine("random", vectors, seed=1, digests=["b"], tensor="x"),
        combine("random", vectors, seed=1, digests=["a"], tensor="y"),
        # parts are told apart, not merely strung together
        combine("random", vectors, seed=11, digests=["a"], tensor="x"),
    ]
    directions = [result / result.norm() for result in (usual, *others)]
    for index, one in enumerate(directions):
        for other in directions[index + 1 :]:
            assert abs(float(one @ other)) < 0.5  # of 64 dimensions: independent directions are nearly orthogonal
    other_vector = some_vectors(1, (64,), 6)
    moved = combine("random", other_vector, seed=1, digests=["a"], tensor="x")
    torch.testing.assert_close(moved / moved.norm(), directions[0], rtol=0, atol=1e-12)


def test_random_directions_are_spread_evenly():
    vectors = torch.ones(400, 64)
    total = combine("random", vectors)
    # A sum of n independent directions of length 8 has a mean square length of n * 64; four standard deviations.
    assert float(total.square().sum()) == pytest.approx(400 * 64, rel=4 * math.sqrt(2 / 64))


# Registration


@each_method
def test_every_method_says_what_it_is_and_where_it_comes_from(name):
    method = all_methods()[name]
    assert isinstance(method, Method)
    assert method.name == name == name.strip().lower()
    assert "tau_j" in method.formula
    assert "arXiv" in method.source or "doi" in method.source
    assert method.summary.endswith((".", ":")) or len(method.summary.split()) > 3
    assert method.summary == method.summary.strip() != ""
    assert method.kind in ("coordinate", "tensor")


@each_method
def test_every_method_takes_vectors_and_weights_and_only_named_options_after_them(name):
    parameters = list(inspect.signature(all_methods()[name].function).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["vectors", "weights"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])
    takes_generators = any(parameter.name == "generators" for parameter in parameters)
    assert takes_generators == (all_methods()[name].kind == "tensor")
    assert "generators" not in all_methods()[name].options


@each_method
def test_every_option_has_a_type_that_is_no_text_and_a_default_in_range(name):
    for option, parameter in all_methods()[name].options.items():
        assert parameter.annotation is not parameter.empty, option
        assert not isinstance(parameter.annotation, str), option
        assert parameter.default is not parameter.empty, option
    defaults = {option: parameter.default for option, parameter in all_methods()[name].options.items()}
    assert options_model(name).model_validate({}).model_dump() == defaults
    assert options_model(name).model_validate(defaults).model_dump() == defaults


@each_method
def test_every_method_refuses_options_that_it_lacks(name):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        options_model(name).model_validate({"unheard_of": 1})


@each_method
def test_every_option_refuses_values_of_another_kind_or_out_of_range(name):
    for option, parameter in all_methods()[name].options.items():
        wrong: list[object] = ["text", None, float("nan"), float("inf"), [1]]
        for bound in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(bound, Interval):
                wrong += [bound.ge - 1, bound.le + 1]  # type: ignore[operator]
        for value in wrong:
            with pytest.raises(ValidationError):
                options_model(name).model_validate({option: value})


def test_methods_are_listed_by_name_and_the_papers_rule_is_among_them():
    assert list(all_methods()) == sorted(all_methods())
    assert {"sum", "mean", "linear", "random"} <= set(all_methods())


def test_two_methods_cannot_have_one_name():
    from hf_datavec.methods import method

    with pytest.raises(ValueError, match="two merge methods are called 'sum'"):
        method("sum", formula="", source="", uses_weights=False)(lambda vectors, weights: vectors)
    assert all_methods()["sum"].formula == "sum_j tau_j"


def test_the_command_lists_every_method(run):
    import json

    told = json.loads(run("methods", "--json").out)
    assert list(told) == METHODS
    for name, method in all_methods().items():
        assert (told[name]["formula"], told[name]["source"]) == (method.formula, method.source)
        assert list(told[name]["options"]) == list(method.options)
    table = run("methods").out
    assert all(f"\n{name} " in table for name in METHODS)
