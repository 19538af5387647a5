"""The streaming engine: pieces, threads, order statistics by exchanges, numbers drawn by coordinate."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import digest, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec import fuse
from hf_datavec.draws import Draws
from hf_datavec.errors import InputError
from hf_datavec.geometry import Gram, products
from hf_datavec.methods.robust import ordered
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.plan import Plan
from hf_datavec.tensors import Record
from hf_datavec.threads import AHEAD, MOST_BYTES, Task, in_order
from hf_datavec.writing import write_file

SECTIONS = (
    {"method": "mean"},
    {"method": "ties", "clip": "median"},
    {"method": "breadcrumbs_ties", "options": {"scope": "tensor"}},
    {"method": "dare_ties", "overrides": [{"tensors": ".*bias", "method": "median"}]},
    {"method": "trimmed_mean", "scale": 0.7},
    {"method": "geometric_median"},
)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    base = make_network("test_resnet", folder / "base")
    for seed in range(4):
        tune(base, folder / f"tuned-{seed}", seed=seed + 1)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}")
    return folder


def planned(folder: Path, entry: str = "vector", **section: object) -> Plan:
    places = [{entry: f"./{'site' if entry == 'vector' else 'tuned'}-{n}"} for n in range(4)]
    return prepare(write_recipe(folder / "recipe.yaml", base="./base", vectors=places, merge=section)).plan


# Pieces and threads


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["method"])
def test_neither_the_size_of_pieces_nor_the_number_of_threads_changes_a_bit(section, sites, monkeypatch):
    plan, before = planned(sites, **section), torch.get_num_threads()
    expected, gram = {}, Gram()
    expected.update(fuse.run(plan, gram=gram))
    monkeypatch.setattr(fuse, "PIECE", 8192)
    monkeypatch.setattr(fuse, "slice_length", lambda sites: 2048)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        seen = Gram()
        found = dict(fuse.run(plan, gram=seen))
        assert torch.get_num_threads() == threads
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert seen.geometry().norms == pytest.approx(gram.geometry().norms, rel=1e-5)
    torch.set_num_threads(before)


def test_pieces_of_one_tensor_follow_each_other_and_are_small(sites, monkeypatch):
    monkeypatch.setattr(fuse, "PIECE", 5000)
    plan = planned(sites, method="mean")
    found: dict[str, list[torch.Tensor]] = {}
    for name, piece in fuse.pieces(plan):
        assert name not in found or next(reversed(found)) == name
        found.setdefault(name, []).append(piece)
    merged = {step.name for step in plan.steps if step.role.value == "weight"}
    assert max(len(piece) for name in merged for piece in found[name]) == 5000
    assert sum(len(piece) for pieces in found.values() for piece in pieces) == sum(
        value.numel() for value in load_file(sites / "base" / "model.safetensors").values()
    )


@pytest.mark.parametrize("method", ["mean", "ties", "median"])
def test_tuned_models_give_the_bits_of_their_vectors(method, sites):
    vectors, models = (dict(fuse.run(planned(sites, entry, method=method))) for entry in ("vector", "model"))
    # Sites are summed in the order of their content, which is another for models; sums in float64 hardly tell.
    for name, value in vectors.items():
        torch.testing.assert_close(models[name], value, rtol=1e-7, atol=0)


def test_a_base_in_float64_is_read_and_not_added_to(sites, tmp_path):
    wide = {name: value.double() for name, value in load_file(sites / "base" / "model.safetensors").items()}
    base = save_with(sites / "base", tmp_path / "base", wide)
    tuned = tune(base, tmp_path / "tuned-0", seed=5)
    for site in range(4):
        make_vector(base, tuned, tmp_path / f"site-{site}")
    before, plan = digest(base / "model.safetensors"), planned(tmp_path, method="mean")
    first, again = dict(fuse.run(plan)), dict(fuse.run(plan))
    assert all(torch.equal(first[name], again[name]) for name in wide)
    assert digest(base / "model.safetensors") == before
    vector = load_file(tmp_path / "site-0" / "vector.safetensors")
    weight = max(vector, key=lambda name: vector[name].numel())
    assert torch.equal(first[weight], wide[weight] + vector[weight].double())


def test_cosines_and_norms_are_those_of_the_vectors(sites):
    gram = Gram()
    dict(fuse.run(planned(sites, method="mean"), gram=gram))
    stored = [load_file(sites / f"site-{n}" / "vector.safetensors") for n in range(4)]
    names = sorted(name for name in stored[0] if not name.startswith("fc"))
    rows = torch.stack([torch.cat([one[name].reshape(-1) for name in names]) for one in stored]).double()
    norms = sorted(rows.norm(dim=1).tolist())
    assert sorted(gram.geometry().norms) == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 0.0])
def test_inner_products_of_huge_and_tiny_values_are_not_lost(size):
    vectors = size * torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    wide = vectors.double()
    torch.testing.assert_close(products(vectors), wide @ wide.T, rtol=1e-6, atol=0)
    assert not bool(products(torch.tensor([[1.0, float("nan")]])).isfinite())


def test_a_tensor_may_be_written_in_pieces(tmp_path):
    layout = [Record("a", "F32", (2, 3), tmp_path, 0), Record("b", "F32", (), tmp_path, 0)]
    values = torch.arange(6.0)
    whole = [("a", values.reshape(2, 3)), ("b", torch.tensor(7.0))]
    parts = [("a", values[:1]), ("a", values[1:4]), ("a", values[4:]), ("b", torch.tensor([7.0]))]
    hashes = [write_file(tmp_path / f"{place}", layout, stream) for place, stream in enumerate((whole, parts))]
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert [hashed for _, hashed in hashes[0]] == [hashed for _, hashed in hashes[1]]
    with pytest.raises(ValueError, match="more values of 'a' than planned"):
        write_file(tmp_path / "2", layout, [("a", values[:4]), ("a", values[:4])])


# Tasks


def test_results_come_in_the_order_of_their_tasks_and_no_more_wait_than_said():
    running, most, lock = [0], [0], threading.Lock()

    def compute(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002 * (number % 3))
        return number

    found = []
    for number in in_order((Task(partial(compute, n), 1) for n in range(50)), threads=3):
        with lock:
            running[0] -= 1
        found.append(number)
    assert found == list(range(50))
    assert 1 < most[0] <= 3 * AHEAD


def test_large_tasks_run_alone():
    together, most = [], []

    def compute() -> None:
        together.append(1)
        most.append(len(together))
        time.sleep(0.005)
        together.pop()

    for _ in in_order((Task(compute, MOST_BYTES) for _ in range(6)), threads=3):
        pass
    assert max(most) == 1


def test_tasks_that_leave_little_behind_make_room_for_the_next():
    """Each of six meets another, which it could not while the result of one that is done counted for all it took."""
    pairs = threading.Barrier(2, timeout=60)
    for _ in in_order((Task(pairs.wait, MOST_BYTES // 2, 0) for _ in range(6)), threads=2):
        pass


def test_an_error_of_a_task_comes_in_its_turn():
    def fail() -> int:
        raise InputError("the third")

    tasks = [Task(lambda: 1, 1), Task(lambda: 2, 1), Task(fail, 1), Task(lambda: 4, 1)]
    results = in_order(tasks, threads=2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(InputError, match="the third"):
        next(results)


# Order statistics and draws


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 16, 33])
def test_exchanges_sort_every_coordinate(count):
    vectors = torch.randn(count, 500, generator=torch.Generator().manual_seed(count))
    vectors[:, ::7] = vectors[:, ::7].round()  # equal values, too
    assert torch.equal(torch.stack(ordered(vectors, range(count), torch)), vectors.sort(0).values)


def test_exchanges_sort_every_pattern_of_zeros_and_ones():
    # By the 0-1 principle, a network that sorts these sorts everything.
    for count in range(1, 11):
        patterns = ((torch.arange(2**count)[None] >> torch.arange(count)[:, None]) & 1).float()
        ranked = patterns.sort(0).values
        assert torch.equal(torch.stack(ordered(patterns, range(count), torch)), ranked)
        for start in range(count):
            for stop in range(start + 1, count + 1):  # some ranks by fewer exchanges
                assert torch.equal(torch.stack(ordered(patterns, range(start, stop), torch)), ranked[start:stop])


def test_the_middle_of_four_takes_fewer_exchanges_than_their_order():
    calls = []
    library = SimpleNamespace(
        minimum=lambda one, two: calls.append(1) or torch.minimum(one, two),
        maximum=lambda one, two: calls.append(1) or torch.maximum(one, two),
    )
    for wanted, expected in ((range(4), 10), (range(1, 3), 8), (range(1), 3)):
        calls.clear()
        ordered(torch.randn(4, 10).unbind(0), wanted, library)
        assert len(calls) == expected


def test_numbers_belong_to_coordinates_wherever_a_slice_starts():
    whole = Draws(3, "digest", "name").uniform(1001)
    for start in (0, 1, 2, 333, 1000):
        assert torch.equal(Draws(3, "digest", "name", start).uniform(1001 - start), whole[start:])
    assert 0 <= float(whole.min()) < float(whole.max()) < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("chance", [0.0001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_kept_by_their_chance(chance, dtype):
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = Draws(1, "d", "n").keep(values, chance)
    expected = torch.where(Draws(1, "d", "n").uniform(20_000) < chance, values, 0.0)
    assert torch.equal(kept, expected)
    assert float((kept != 0).double().mean()) == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5)
