"""Sums without torch: the same values as by torch, and torch wherever numpy cannot do it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec import fuse, sums
from hf_datavec.draws import Draws
from hf_datavec.errors import InputError
from hf_datavec.geometry import FEW, Gram, products, products_of_rows
from hf_datavec.methods import all_methods
from hf_datavec.methods.signs import agreeing, agreeing_rows
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.plan import Plan

KNOWN = sorted(name for name, method in all_methods().items() if method.factors)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    base = make_network("test_resnet", folder / "base")
    for seed in range(3):
        tune(base, folder / f"tuned-{seed}", seed=seed + 1)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}", examples={"cat": 7 * seed + 1})
    return folder


def planned(folder: Path, *, entry: str = "vector", dtype: str | None = None, **section: object) -> Plan:
    weighing = section["method"] in ("linear", "task_arithmetic")
    places = [
        {entry: f"./{'site' if entry == 'vector' else 'tuned'}-{n}", **({"weight": weight} if weighing else {})}
        for n, weight in enumerate((0.3, 1.0, 2.5))
    ]
    more = {"dtype": dtype} if dtype else {}
    return prepare(write_recipe(folder / "recipe.yaml", base="./base", vectors=places, merge=section, **more)).plan


def by_torch(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], Gram]:
    gram = Gram()
    with monkeypatch.context() as patched:
        patched.setattr(sums, "suffice", lambda plan, device: False)
        return dict(fuse.run(plan, gram=gram)), gram


def test_the_linear_methods_and_those_by_order_and_sign_are_sums():
    assert KNOWN == [
        "dare_ties", "fedavg", "linear", "mean", "median", "sum", "task_arithmetic", "ties", "trimmed_mean"
    ]  # fmt: skip


@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("entry", ["vector", "model"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_sums_are_those_of_torch(method, entry, dtype, sites, monkeypatch):
    if method == "fedavg" and entry == "model":
        pytest.skip("models declare no counts")
    plan = planned(sites, entry=entry, dtype=dtype, method=method, scale=0.7)
    assert sums.suffice(plan, "cpu")
    gram = Gram()
    found, (expected, seen) = dict(fuse.run(plan, gram=gram)), by_torch(plan, monkeypatch)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        # torch multiplies and adds in one step, and rounds to float16 by way of float32: few values differ, by one ulp.
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        torch.testing.assert_close(found[name], tensor, rtol=eps, atol=1e-7 * eps)
        assert int((found[name] != tensor).sum()) <= 1 + tensor.numel() / 100
    assert gram.geometry().norms == pytest.approx(seen.geometry().norms, rel=1e-5)
    assert np.allclose(gram.geometry().cosines, seen.geometry().cosines, atol=1e-5)


@pytest.mark.parametrize("method", KNOWN)
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_method_by_numpy_is_its_function(method, count):
    rows = torch.randn(count, 1000, generator=torch.Generator().manual_seed(0))
    rows[:, :300] = rows[:, :300].round()  # equal values, zeros, and sums of zero, too
    known = all_methods()[method]
    weights = [0.5, 1.0, 3.0, 0.1, 1.0, 1.0, 2.0][:count] if known.rows is None else [1.0] * count
    for options in ({}, {"normalize": False}) if "normalize" in known.options else ({},):
        chosen, drawing = known.chosen(options), known.asks_for("generators")
        given = (
            {"thresholds": [(0.9,), (1e-30,), (0.0,), (1.3,), (0.5,), (9.0,), (0.1,)][:count]} if known.ranks else {}
        )
        of_rows = {**chosen, **given, **(drawn(count) if drawing else {})}
        total = sums.combine(known, [row.numpy() for row in rows], weights, of_rows, np.empty((2, 1000)))
        given = {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}
        of_tensors = {**chosen, **given, **(drawn(count) if drawing else {})}
        expected = known.function(rows, torch.tensor(weights, dtype=torch.float64), **of_tensors)
        torch.testing.assert_close(torch.from_numpy(total), expected, rtol=1e-14, atol=1e-14)


def drawn(count: int) -> dict[str, list[Draws]]:
    return {"generators": [Draws(1, f"site {number}", "tensor", 5) for number in range(count)]}


def test_more_sites_than_a_byte_counts_agree():
    rows = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) + 1
    found = agreeing_rows((row.numpy().copy() for row in rows), len(rows), normalize=True)
    expected = agreeing(rows, torch.ones(300, dtype=torch.float64), normalize=True)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("chance", [0.0001, 0.5, 1.0])
def test_rows_keep_what_tensors_keep(chance):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    kept = Draws(1, "site", "tensor", 3).keep_of(values.numpy(), chance)
    assert torch.equal(torch.from_numpy(kept), Draws(1, "site", "tensor", 3).keep(values, chance))
    assert np.count_nonzero(kept) == pytest.approx(5000 * chance, abs=150)


@pytest.mark.parametrize(
    "section",
    [
        {"method": "mean", "clip": "median"},
        {"method": "breadcrumbs"},
        {"method": "ties", "options": {"scope": "tensor"}},
    ],
)
def test_what_needs_more_than_sums_is_done_by_torch(section, sites):
    assert not sums.suffice(planned(sites, **section), "cpu")


def test_a_sign_is_voted_for_by_weights_with_torch(sites):
    places = [{"vector": f"./site-{n}", "weight": weight} for n, weight in enumerate((1.0, 2.0))]
    recipe = write_recipe(sites / "recipe.yaml", base="./base", vectors=places, merge={"method": "ties"})
    assert not sums.suffice(prepare(recipe).plan, "cpu")


def test_a_gpu_and_types_that_numpy_lacks_are_left_to_torch(sites, tmp_path):
    assert not sums.suffice(planned(sites, method="mean"), "cuda:0")
    assert not sums.suffice(planned(sites, method="mean", dtype="bfloat16"), "cpu")
    halves = {name: value.bfloat16() for name, value in load_file(sites / "base" / "model.safetensors").items()}
    base = save_with(sites / "base", tmp_path / "base", halves)
    for site in range(3):
        make_vector(base, tune(base, tmp_path / f"tuned-{site}", seed=site), tmp_path / f"site-{site}")
    plan = planned(tmp_path, method="sum")
    assert not sums.suffice(plan, "cpu")
    assert {value.dtype for value in dict(fuse.run(plan)).values()} == {torch.bfloat16}


def test_what_is_not_finite_is_told_by_name(sites, tmp_path):
    plan = planned(sites, method="sum", scale=1e9, dtype="float16")
    with pytest.raises(InputError, match=r"the fused tensor '.*' does not fit F16 \(largest value"):
        dict(fuse.run(plan))


@pytest.mark.parametrize("tensor", ["layer4.0.conv2.weight", "fc.bias"])
@pytest.mark.parametrize("method", ["mean", "median", "trimmed_mean", "ties", "dare_ties"])
def test_a_value_that_is_not_finite_is_told_even_where_it_would_be_left_out(tensor, method, sites, tmp_path):
    for name in ("base", "tuned-0", "tuned-2"):
        shutil.copytree(sites / name, tmp_path / name)
    tensors = load_file(sites / "tuned-1" / "model.safetensors")
    tensors[tensor].view(-1)[0] = float("inf")
    save_with(sites / "tuned-1", tmp_path / "tuned-1", tensors)
    with pytest.raises(InputError, match=rf"tuned-1': tensor '{tensor}' has 1 NaN or infinite value"):
        dict(fuse.run(planned(tmp_path, entry="model", method=method)))


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces and slices so short that small networks have many whole ones."""
    for module in (fuse, sums):
        monkeypatch.setattr(module, "PIECE", 2**10)
    monkeypatch.setattr(sums, "slice_length", lambda sites: 2**7)


def test_norms_and_cosines_of_large_tensors_are_estimated_from_some_of_their_slices(sites, short_pieces, monkeypatch):
    plan, gram, products = planned(sites, method="mean"), Gram(), []
    monkeypatch.setattr(sums, "products_of_rows", lambda rows: products.append(len(rows[0])) or products_of_rows(rows))
    found, (expected, seen) = dict(fuse.run(plan, gram=gram)), by_torch(plan, monkeypatch)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert sum(products) < 0.35 * sum(tensor.numel() for tensor in expected.values())
    assert gram.geometry().norms == pytest.approx(seen.geometry().norms, rel=0.02)
    assert np.allclose(gram.geometry().cosines, seen.geometry().cosines, atol=0.02)


@pytest.mark.parametrize("method", ["mean", "median", "trimmed_mean", "dare_ties"])
def test_a_value_that_is_not_finite_is_told_where_no_products_are_taken(method, sites, short_pieces, tmp_path):
    for name in ("base", "tuned-0", "tuned-2"):
        shutil.copytree(sites / name, tmp_path / name)
    tensors = load_file(sites / "tuned-1" / "model.safetensors")
    tensors["layer4.0.conv2.weight"].view(-1)[300] = float("inf")  # in the third slice of the first piece
    save_with(sites / "tuned-1", tmp_path / "tuned-1", tensors)
    with pytest.raises(InputError, match=r"tuned-1': tensor 'layer4.0.conv2.weight' has 1 NaN or infinite value"):
        dict(fuse.run(planned(tmp_path, entry="model", method=method)))


@pytest.mark.parametrize("count", [2, FEW, FEW + 1])
def test_products_of_rows_are_those_of_tensors(count):
    rows = torch.randn(count, 1000, generator=torch.Generator().manual_seed(1))
    expected = products(rows).numpy()
    assert np.allclose(products_of_rows([row.numpy() for row in rows]), expected, rtol=1e-5, atol=1e-3)
    large = products_of_rows([1e25 * row.double().numpy().astype(np.float32) for row in rows])
    assert np.isfinite(large).all()
    assert np.isnan(products_of_rows([np.full(10, np.nan, np.float32)] * count)).all()
