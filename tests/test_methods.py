"""Laws that every registered merge method keeps, whatever it computes."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from annotated_types import Interval
from combining import METHODS, combine, counts, laws, seeds, shapes, sizes, some_vectors, some_weights
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_datavec.methods import Method, all_methods, as_matrix, options_model, ranges

each_method = pytest.mark.parametrize("name", METHODS)
# Each site draws its own random numbers, so which site has which vector matters.
RANDOM = tuple(name for name in METHODS if all_methods()[name].asks_for("generators"))
# What n equal vectors give, as a multiple of one of them, when nothing is trimmed or dropped.
NOTHING_DROPPED = {
    "density": 1.0, "gamma": 0.0, "epsilon": 0.0, "select_topk": 1.0, "ratio": 1.0,
}  # fmt: skip
EQUAL = {
    "sum": lambda n: n, "task_arithmetic": lambda n: n, "dare_linear": lambda n: n, "della_linear": lambda n: n,
    "breadcrumbs": lambda n: n, "consensus": lambda n: 0 if n == 1 or 0.4 * (n - 1) > 1 else n,
    **dict.fromkeys(
        ("mean", "linear", "fedavg", "ties", "dare_ties", "della", "breadcrumbs_ties", "magmax", "emr", "median",
         "trimmed_mean", "geometric_median", "krum", "multi_krum", "model_stock", "slerp", "nuslerp", "karcher_mean",
         "sce", "fisher", "regmean", "adamerging", "ridge_head"),
        lambda n: 1,
    ),
}  # fmt: skip
# What they give is not a multiple of one of them; their own tests say what it is.
NO_MULTIPLE = ("random", "pcb", "tsv", "iso_c", "iso_cts", "wudi")
# Which measure a vector against absolute numbers of their papers: a hyperbolic tangent, a learning rate.
NOT_PROPORTIONAL = ("pcb", "wudi")


@each_method
@laws
@given(data=st.data(), shape=shapes, seed=seeds, size=sizes)
def test_the_result_is_finite_and_has_the_tensors_shape(name, data, shape, seed, size):
    count = data.draw(counts(name))
    result = combine(name, some_vectors(count, shape, seed, size), some_weights(count, seed))
    assert result.shape == shape
    assert result.dtype == torch.float64
    assert bool(torch.isfinite(result).all())


@each_method
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_the_same_input_gives_the_same_bits_and_is_left_as_it_was(name, data, shape, seed):
    count = data.draw(counts(name))
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
@given(data=st.data(), shape=shapes, seed=seeds)
def test_zero_in_gives_zero_out(name, data, shape, seed):
    count = data.draw(counts(name))
    assert not bool(combine(name, torch.zeros(count, *shape), some_weights(count, seed)).any())


@each_method
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_a_site_that_changed_nothing_and_equal_values_do_no_harm(name, data, shape, seed):
    count = data.draw(counts(name))
    vectors = some_vectors(count, shape, seed)
    vectors[0] = 0
    assert bool(torch.isfinite(combine(name, vectors)).all())
    constant = torch.full((count, *shape), 0.25)
    assert bool(torch.isfinite(combine(name, constant)).all())
    assert bool(torch.isfinite(combine(name, torch.cat([constant[:1], -constant[1:]]))).all())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_PROPORTIONAL])
@laws
@given(data=st.data(), shape=shapes, seed=seeds, power=st.integers(-20, 20))
def test_the_result_grows_with_the_vectors(name, data, shape, seed, power):
    count = data.draw(counts(name))
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    # A power of two scales floats without rounding, so only the method's own rounding remains.
    scaled, plain = combine(name, vectors * 2.0**power, weights), combine(name, vectors, weights) * 2.0**power
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12 * 2.0**power)


@each_method
def test_what_equal_vectors_give_is_stated_for_every_method(name):
    assert (name in EQUAL) != (name in NO_MULTIPLE)


@pytest.mark.parametrize("name", EQUAL)
@laws
@given(data=st.data(), shape=shapes, seed=seeds, size=sizes)
def test_equal_vectors_agree(name, data, shape, seed, size):
    options = {option: value for option, value in NOTHING_DROPPED.items() if option in all_methods()[name].options}
    count = data.draw(counts(name, **options))
    vector = some_vectors(1, shape, seed, size)
    found = combine(name, vector.expand(count, *shape).clone(), **options)
    torch.testing.assert_close(found, vector[0].double() * EQUAL[name](count), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RANDOM])
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_the_order_of_the_vectors_does_not_matter(name, data, shape, seed):
    count = data.draw(counts(name))
    vectors, weights = some_vectors(count, shape, seed), some_weights(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    moved = combine(name, vectors[order], weights[order])
    torch.testing.assert_close(moved, combine(name, vectors, weights), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if all_methods()[name].kind in ("coordinate", "site")])
@laws
@given(data=st.data(), seed=seeds, length=st.integers(1, 64))
def test_slices_give_the_same_bits_as_the_whole(name, data, seed, length):
    count = data.draw(counts(name))
    vectors, weights = some_vectors(count, (64,), seed), some_weights(count, seed)
    assert torch.equal(combine(name, vectors, weights, slices=length), combine(name, vectors, weights))


@pytest.mark.parametrize("name", [name for name in METHODS if not all_methods()[name].uses_weights])
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_a_method_that_uses_no_weights_gives_the_same_with_any(name, data, shape, seed):
    count = data.draw(counts(name))
    vectors = some_vectors(count, shape, seed)
    assert torch.equal(combine(name, vectors, some_weights(count, seed)), combine(name, vectors))


@pytest.mark.parametrize("name", [name for name in METHODS if all_methods()[name].uses_weights])
def test_a_method_that_uses_weights_gives_something_else_with_others(name):
    vectors = some_vectors(2, (6, 10), 3)
    assert not torch.equal(combine(name, vectors, torch.tensor([1.0, 3.0])), combine(name, vectors))


@each_method
@laws
@given(data=st.data(), shape=shapes, seed=seeds)
def test_clipped_vectors_give_what_shorter_vectors_give(name, data, shape, seed):
    count = data.draw(counts(name))
    vectors = some_vectors(count, shape, seed)
    factors = [2.0 ** -(place % 3) for place in range(count)]
    shortened = vectors * torch.tensor(factors).reshape(-1, *[1] * len(shape))
    # `combine` hands the method what the engine hands it: vectors that are clipped already, and by how much.
    found = combine(name, shortened, factors=[1.0] * count)
    from hf_datavec.combine import Sites, ready
    from hf_datavec.methods import applied

    method, options = applied(name, {}, shape)
    sites = Sites((1.0,) * count, tuple(f"site {index}" for index in range(count)), tuple(factors))
    combined = ready(method, options, list(vectors), sites, key="fc.weight")
    wide = shortened.double().reshape(count, shortened[0].numel())
    before = wide.clone()
    whole = combined(wide, 0).reshape(shape)
    torch.testing.assert_close(whole, found, rtol=1e-9, atol=1e-12)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_threads_changes_no_bit_and_stays_as_it_was(name):
    count = next(n for n in (5, 2) if all_methods()[name].refuse(n, {}) is None)
    vectors, before = some_vectors(count, (96, 800), 1), torch.get_num_threads()
    options = {"steps": 2} if name == "wudi" else {}
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(combine(name, vectors, **options))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


# Registration


@each_method
def test_every_method_says_what_it_is_and_where_it_comes_from(name):
    method = all_methods()[name]
    assert isinstance(method, Method)
    assert method.name == name == name.strip().lower()
    assert "tau_" in method.formula
    assert "arXiv" in method.source or "doi" in method.source
    assert method.summary == method.summary.strip() != ""
    assert method.summary.endswith((".", ":")) or len(method.summary.split()) > 3
    assert method.kind in ("coordinate", "tensor", "matrix", "site")
    assert method.otherwise is None or (method.kind == "matrix" and method.otherwise in METHODS)


@each_method
def test_every_method_takes_vectors_and_weights_and_only_named_options_after_them(name):
    method = all_methods()[name]
    parameters = list(inspect.signature(method.function).parameters.values())
    first = "products" if method.kind == "site" else "vectors"
    assert [parameter.name for parameter in parameters[:2]] == [first, "weights"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])
    assert method.asks_for("thresholds") == (method.ranks is not None)
    assert not {"generators", "thresholds"} & set(method.options)


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


def test_methods_are_listed_by_name_and_all_that_were_asked_for_are_among_them():
    assert list(all_methods()) == METHODS
    assert {
        "sum", "mean", "linear", "task_arithmetic", "fedavg", "model_stock", "slerp", "karcher_mean", "nuslerp", "ties",
        "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "magmax", "emr",
        "consensus", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "random",
    } <= set(METHODS)  # fmt: skip


def test_two_methods_cannot_have_one_name():
    from hf_datavec.methods import method

    with pytest.raises(ValueError, match="two merge methods are called 'sum'"):
        method("sum", formula="", source="", uses_weights=False)(lambda vectors, weights: vectors)
    assert all_methods()["sum"].formula == "sum_j tau_j"


def test_kernels_are_matrices_and_vectors_and_depthwise_kernels_are_not():
    assert as_matrix((6, 10)) == (6, 10)
    assert as_matrix((8, 4, 3, 3)) == (8, 36)
    for shape in ((), (0,), (5,), (1, 7), (7, 1), (64, 1, 3, 3), (4, 0), (1, 3, 3, 3)):
        assert as_matrix(shape) is None, shape


def test_the_command_lists_every_method(run):
    told = json.loads(run("methods", "--json").out)
    assert list(told) == METHODS
    for name, method in all_methods().items():
        assert (told[name]["formula"], told[name]["source"]) == (method.formula, method.source)
        assert list(told[name]["options"]) == list(method.options)
        assert told[name]["needs"] == list(method.needs)
    shown = run("methods").out
    for name, method in all_methods().items():
        assert f"{name}\n    {method.formula}\n" in shown
        assert all(text in shown for text in (*method.needs, *ranges(name), method.source))
    assert "    density = 0.2 (0.0001 to 1)\n    scope = vector (tensor or vector)\n" in shown
