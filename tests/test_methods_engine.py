"""Merge methods in the engine: surveys, clipping, heads, refusals, and every method on whole networks."""

from __future__ import annotations

import itertools
import math
import statistics
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from combining import METHODS, combine, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file, save_file

from hf_datavec import fuse, selection, survey
from hf_datavec.errors import InputError
from hf_datavec.methods import all_methods, as_matrix
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.plan import Plan
from hf_datavec.selection import magnitudes, sample, streamed
from hf_datavec.vector import refuse_nonfinite

WEIGHTS = "model.safetensors"
# Those that need no more than vectors; the others have tests of their own, with what sites push and what is learned.
ALONE = [name for name in METHODS if not all_methods()[name].from_sites and not all_methods()[name].learned]


# Ranks without sorting


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=seeds, length=st.integers(1, 3000), distinct=st.sampled_from((1, 3, 10**6)), parts=st.integers(1, 700))
def test_streamed_ranks_are_those_of_the_sorted_vector(seed, length, distinct, parts):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(distinct, generator=random)[torch.randint(distinct, (length,), generator=random)]
    values *= 10.0 ** torch.randint(-38, 38, (length,), generator=random)  # subnormal numbers, too
    ordered = values.abs().sort(descending=True).values.tolist()
    ranks = sorted({1, length, 1 + seed % length, length + 5})
    expected = [ordered[min(rank, length) - 1] for rank in ranks]
    # A sample that says little, and one that leads astray.
    slices = [part.numpy() for part in values.split(parts)]
    for some in (sample([(length, values.numpy().__getitem__)], length), np.full(3, 1e-3, np.float32)):
        assert streamed(lambda: slices, some, ranks, length) == expected
    assert magnitudes(values.numpy(), ranks) == expected


def test_a_vector_is_read_once_when_its_sample_is_like_it():
    values = torch.randn(2_000_000, generator=torch.Generator().manual_seed(2))
    tensors, reads = values.split([3, 1_500_000, 499_997]), []

    def slices():
        reads.append(1)
        return [part.numpy() for part in values.split(2**15)]

    some = sample([(len(tensor), tensor.numpy().__getitem__) for tensor in tensors], len(values))
    assert len(some) == pytest.approx(len(values) / 64, rel=0.05)
    found = streamed(slices, some, [400_000, 20_000], len(values))
    assert found == values.abs().sort(descending=True).values[[399_999, 19_999]].tolist()
    assert len(reads) == 1
    # Where values are few between, and where they lie far apart, too.
    wanted = [1, 3, 1_000_000, 1_820_000, 1_999_990, 2_000_000]
    assert (
        streamed(slices, some, wanted, len(values))
        == values.abs().sort(descending=True).values[[rank - 1 for rank in wanted]].tolist()
    )
    assert len(reads) == 2
    assert streamed(slices, np.zeros(5, np.float32), [400_000], len(values)) == found[:1]
    assert len(reads) == 5


def test_ranks_of_a_long_vector_are_streamed_and_exact():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    ordered = values.abs().sort(descending=True).values
    assert magnitudes(values.numpy(), [1, 777, 50_000]) == [float(ordered[rank - 1]) for rank in (1, 777, 50_000)]
    assert magnitudes(np.zeros(0, np.float32), [1]) == [0.0]


def vectors_of(kind: str, length: int) -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.standard_normal(length).astype(np.float32)
    if kind == "coarse":
        return values.round(1)
    if kind == "sparse":
        return np.where(random.random(length) < 0.3, values, np.float32(0))
    if kind == "rows":
        values *= np.repeat(10.0 ** random.integers(-6, 6, length // 500 + 1), 500)[:length]
    return values


@pytest.mark.parametrize("length", [70, 40_000, 300_000, 3_000_000])
@pytest.mark.parametrize("kind", ["normal", "coarse", "sparse", "rows", "equal"])
def test_ranks_take_no_more_memory_than_is_said(kind, length):
    values = np.full(length, 0.5, np.float32) if kind == "equal" else vectors_of(kind, length)
    ordered = np.sort(np.abs(values))[::-1]
    ranks = [max(1, length // 100), max(1, length * 9 // 10)]
    magnitudes(values[:10], [1])  # what numpy imports
    tracemalloc.start()
    try:
        found = magnitudes(values, ranks)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [float(ordered[rank - 1]) for rank in ranks]
    assert taken < selection.memory(length, 2) + 2**16


# A small study whose sites can be hostile


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with depthwise kernels and BatchNorm, and five vectors."""
    folder = tmp_path_factory.mktemp("sites")
    base = make_network("test_efficientnet", folder / "base")
    for seed in range(5):
        tune(base, folder / f"tuned-{seed}", seed=seed + 1)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}", examples={"cat": seed + 1})
    return folder


def planned(folder: Path, names: Sequence[str], **section: object) -> Plan:
    path = write_recipe(folder / "recipe.yaml", base="./base", vectors=[f"./{name}" for name in names], merge=section)
    return prepare(path).plan


def fused(folder: Path, names: Sequence[str], **section: object) -> dict[str, torch.Tensor]:
    return dict(fuse.run(planned(folder, names, **section)))


def sites_for(name: str, **options: object) -> list[str]:
    return [f"site-{n}" for n in range(next(n for n in (5, 2) if all_methods()[name].refuse(n, options) is None))]


def differences(folder: Path, names: Sequence[str], tensor: str) -> list[torch.Tensor]:
    return [load_file(folder / name / "vector.safetensors")[tensor] for name in names]


@pytest.mark.parametrize("name", ALONE)
def test_every_method_fuses_a_batchnorm_network_that_loads_and_computes(name, sites):
    options = {"steps": 5} if name == "wudi" else {}
    result = fused(sites, sites_for(name), method=name, scale=0.3, options=options)
    before = load_file(sites / "base" / WEIGHTS)
    assert set(result) == set(before)
    network = timm.create_model("test_efficientnet", num_classes=3)
    network.load_state_dict(result)
    logits = network.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert bool(torch.isfinite(logits).all())
    changed = [key for key in before if key.endswith("weight") and not torch.equal(before[key], result[key])]
    # Model stock leaves a tensor at the base on whose change random sites do not agree at all.
    assert len(changed) == sum(key.endswith("weight") for key in before) or (name == "model_stock" and changed)


@pytest.mark.parametrize("name", ALONE)
def test_the_order_in_the_recipe_changes_no_bit(name, sites):
    options = {"steps": 5} if name == "wudi" else {}
    names = sites_for(name)
    section = {"method": name, "options": options, "clip": "median"}
    first = fused(sites, names, **section)
    for order in (names[::-1], names[1:] + names[:1]):
        other = fused(sites, order, **section)
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ALONE)
def test_the_engine_does_what_the_method_does_on_the_tensors(name, sites):
    if all_methods()[name].surveys({}) or all_methods()[name].needs_counts:
        pytest.skip("tested on whole vectors below")
    options = {"steps": 5} if name == "wudi" else {}
    plan = planned(sites, sites_for(name), method=name, options=options)
    result = dict(fuse.run(plan))
    for step in plan.steps:
        if step.is_merged:
            vectors = torch.stack([one.source.read(step.name) for one in plan.contributions])
            head = step.role.value == "head"
            key = step.name + ("\0".join(plan.labels) if head else "")
            combined = combine(
                name, vectors, tensor=key, head=head, digests=[one.digest for one in plan.contributions], **options
            )
            expected = plan.base.tensors.read(step.name).double() + combined
            torch.testing.assert_close(result[step.name].double(), expected, rtol=1e-6, atol=1e-7)


# Surveys


def test_the_plan_says_how_often_vectors_are_read(sites):
    once = planned(sites, ["site-0", "site-1"], method="mean")
    stored = once.read_bytes - once.base.tensors.nbytes
    for section, passes in (
        ({"method": "mean", "clip": "median"}, 1),
        ({"method": "ties", "clip": "median"}, 2),
        ({"method": "geometric_median"}, 1),
        ({"method": "ties"}, 1),
        ({"method": "ties", "options": {"scope": "tensor"}}, 0),
        ({"method": "mean", "overrides": [{"tensors": "conv_stem.*", "method": "ties"}]}, 1),
    ):
        plan = planned(sites, ["site-0", "site-1"], **section)
        assert plan.survey_passes == passes, section
        assert plan.read_bytes == once.read_bytes + passes * stored


def test_no_vector_is_read_for_a_survey_that_nobody_needs(sites, monkeypatch):
    plan = planned(sites, ["site-0", "site-1"], method="mean")
    monkeypatch.setattr(survey, "_slices", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(survey, "_products", lambda *_: pytest.fail("read"))
    assert survey.take(plan).factors == (1.0, 1.0)


def test_ties_trims_the_whole_vector_as_the_paper_does(sites):
    names = ["site-0", "site-1", "site-2"]
    plan = planned(sites, names, method="ties", options={"density": 0.1})
    result = dict(fuse.run(plan))
    stored = [load_file(sites / name / "vector.safetensors") for name in names]
    trimmed = []
    for vector in stored:
        flat = torch.cat([vector[key].reshape(-1) for key in sorted(vector)])
        least = flat.abs().sort(descending=True).values[int(0.1 * len(flat)) - 1]
        trimmed.append({key: torch.where(value.abs() >= least, value, 0.0) for key, value in vector.items()})
    kept = sum(int((value != 0).sum()) for value in trimmed[0].values())
    assert kept == int(0.1 * sum(value.numel() for value in stored[0].values()))
    base = load_file(sites / "base" / WEIGHTS)
    for key in stored[0]:
        rows = torch.stack([vector[key] for vector in trimmed]).double()
        elected = rows.sum(0).sign()
        same = (rows.sign() == elected) & (elected != 0)
        mean = torch.where(same, rows, 0.0).sum(0) / same.sum(0).clamp(min=1)
        torch.testing.assert_close(result[key].double(), base[key].double() + mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("section", [{"method": "ties"}, {"method": "krum"}, {"method": "sum", "clip": "median"}])
def test_a_sharded_merge_takes_the_same_survey(section, sites):
    plan = planned(sites, [f"site-{n}" for n in range(5)], **section)
    whole = dict(fuse.run(plan))
    taken = survey.take(plan)
    names = sorted(whole)
    parts = {key: value for name in names for key, value in fuse.run(plan, only={name}, survey=taken)}
    assert all(torch.equal(whole[name], parts[name]) for name in names)


# Clipping


def test_clipping_shortens_what_is_longer_than_the_median(sites):
    names = [f"site-{n}" for n in range(3)]
    norms = []
    for name in names:
        tensors = load_file(sites / name / "vector.safetensors")
        norms.append(math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values())))
    plan = planned(sites, names, method="sum", clip="median")
    taken = survey.take(plan)
    by_name = {one.name: place for place, one in enumerate(plan.contributions)}
    for name, norm in zip(names, norms, strict=True):
        assert taken.norms[by_name[name]] == pytest.approx(norm, rel=1e-12)
        factor = min(1.0, statistics.median(norms) / norm)
        assert taken.factors[by_name[name]] == pytest.approx(factor, rel=1e-12)
    result = dict(fuse.run(plan))
    base = load_file(sites / "base" / WEIGHTS)
    for key, before in base.items():
        if "running" not in key and before.is_floating_point():
            vectors = differences(sites, names, key)
            total = sum(
                value.double() * min(1.0, statistics.median(norms) / norm)
                for value, norm in zip(vectors, norms, strict=True)
            )
            torch.testing.assert_close(result[key].double(), before.double() + total, rtol=1e-6, atol=1e-7)


def test_clipping_to_a_number_bounds_what_a_single_site_can_do(sites):
    result = fused(sites, ["site-0"], method="sum", clip=0.125)
    base = load_file(sites / "base" / WEIGHTS)
    moved = [(result[key].double() - base[key].double()).square().sum() for key in base if "tracked" not in key]
    assert math.sqrt(float(sum(moved))) == pytest.approx(0.125, rel=1e-4)


def test_clipping_to_more_than_any_norm_changes_no_bit(sites):
    for method in ("sum", "ties", "geometric_median"):
        plain = fused(sites, ["site-0", "site-1", "site-2"], method=method)
        clipped = fused(sites, ["site-0", "site-1", "site-2"], method=method, clip=1e6)
        assert all(torch.equal(plain[key], clipped[key]) for key in plain)


@pytest.mark.parametrize("clip", [0, -1.0, "mean", True, [1], {}])
def test_a_clip_that_is_no_length_is_refused(clip, sites, run):
    recipe = write_recipe(sites / "c.yaml", base="./base", vectors=["./site-0"], output="./no", merge={"clip": clip})
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert outcome.err.count("merge.clip: expected 'median' or a number above 0, found ") == 1
    assert "literal" not in outcome.err


def test_plan_merge_and_card_say_what_the_survey_does_and_found(sites, run):
    folder = sites / f"told-{run('methods').code}"
    vectors = [f"./site-{n}" for n in range(5)]
    section = {"method": "krum", "clip": "median"}
    recipe = write_recipe(sites / "told.yaml", base="./base", vectors=vectors, output="./told", merge=section)
    planned_as = run("plan", recipe).out
    assert "vectors to at most the median of their norms" in planned_as
    assert "whole vectors are read twice before the merge" in planned_as
    outcome = run("merge", recipe, "-o", folder)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("is clipped: its vector of norm") == 2
    assert "note: krum takes site-0 x " in outcome.err
    assert "`krum`, scale 1, vectors clipped to the median of their norms." in (folder / "README.md").read_text()


# A hostile site


def hostile(folder: Path, kind: str) -> Path:
    """A vector folder as a site would send it that wants to harm the merge."""
    base, tuned = load_file(folder / "base" / WEIGHTS), load_file(folder / "tuned-4" / WEIGHTS)
    random = torch.Generator().manual_seed(7)
    for key in sorted(base):
        if base[key].is_floating_point() and "running" not in key:
            own = tuned[key] - base[key]
            noise = torch.randn(own.shape, generator=random) * own.norm() / max(1, own.numel()) ** 0.5
            tuned[key] = base[key] + {"loud": 20 * own, "noise": 20 * noise}[kind]
    place = folder / f"hostile-{kind}"
    if not place.exists():
        save_with(folder / "base", folder / f"tuned-hostile-{kind}", tuned)
        make_vector(folder / "base", folder / f"tuned-hostile-{kind}", place)
    return place


@pytest.mark.parametrize("kind", ["loud", "noise"])
@pytest.mark.parametrize("method", ["median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "mean"])
def test_robust_methods_stay_near_the_honest_mean(kind, method, sites):
    honest = [f"site-{n}" for n in range(4)]
    mean = fused(sites, honest, method="mean")
    base = load_file(sites / "base" / WEIGHTS)

    def distance(result: dict[str, torch.Tensor]) -> float:
        keys = [key for key in base if base[key].is_floating_point()]
        return math.sqrt(sum(float((result[key] - mean[key]).double().square().sum()) for key in keys))

    length = distance(base)
    found = distance(fused(sites, [*honest, hostile(sites, kind).name], method=method))
    # Independent vectors of one length: one of them, krum's choice, is twice as far from the mean as that is long.
    assert (found > 4 * length) if method == "mean" else (found < 2 * length)
    clipped = distance(fused(sites, [*honest, hostile(sites, kind).name], method="mean", clip="median"))
    assert clipped < length


# Heads


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sites, four of which know two labels and one all three."""
    folder = tmp_path_factory.mktemp("mixed")
    base = make_network("test_resnet", folder / "base", labels=("cat", "dog"))
    kinds = [("cat", "dog"), ("dog", "cat"), ("cat", "dog"), ("cat", "dog", "owl"), ("cat", "dog")]
    for seed, labels in enumerate(kinds):
        other = make_network("test_resnet", folder / f"fresh-{seed}", labels=labels, seed=seed + 1)
        tensors = load_file(base / WEIGHTS)
        moved = {key: value for key, value in load_file(other / WEIGHTS).items() if "running" not in key}
        for key, value in moved.items():
            if key.startswith("fc."):
                tensors[key] = value
            elif value.is_floating_point():
                tensors[key] = tensors[key] + 0.02 * value
        save_with(other, folder / f"tuned-{seed}", tensors)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}", examples={"cat": 5 + seed})
    return folder


@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("slerp", "nuslerp")])
def test_every_method_fuses_heads_of_different_labels(name, mixed):
    result = fused(mixed, [f"site-{n}" for n in range(5)], method=name, options={"steps": 2} if name == "wudi" else {})
    assert result["fc.weight"].shape[0] == 3
    assert all(bool(torch.isfinite(value).all()) for value in result.values())
    if name not in ("random", "ties", "pcb", "breadcrumbs", "breadcrumbs_ties") and "dare" not in name:
        alone = load_file(mixed / "site-3" / "vector.safetensors")["fc.weight"][2].double()
        owl = result["fc.weight"][2].double()
        kept = owl[owl != 0]
        assert len(kept) > 0
        if "della" not in name:
            torch.testing.assert_close(owl, alone, rtol=1e-6, atol=1e-7)  # the only site that has it


def test_two_sites_of_which_one_lacks_a_row_can_be_turned_into_each_other(mixed):
    for name in ("slerp", "nuslerp"):
        owl = fused(mixed, ["site-2", "site-3"], method=name)["fc.weight"][2]
        alone = load_file(mixed / "site-3" / "vector.safetensors")["fc.weight"][2]
        torch.testing.assert_close(owl, alone, rtol=1e-6, atol=1e-7)


def test_site_shares_are_renormalised_over_the_sites_that_have_a_row():
    from hf_datavec.combine import Sites

    sites = Sites((1.0,) * 4, ("a", "b", "c", "d"), (1.0,) * 4, None, (0.5, 0.25, 0.25, 0.0))
    assert sites.chosen((1, 2)).shares == (0.5, 0.5)
    assert sites.chosen((0, 3)).shares == (1.0, 0.0)
    assert sites.chosen((3,)).shares == (1.0,)  # no share at all: they count alike


# Refusals, before anything is read


@pytest.mark.parametrize(
    ("count", "section", "words"),
    [
        (3, {"method": "slerp"}, "the method 'slerp' turns one vector into another: it takes exactly two sites"),
        (1, {"method": "nuslerp"}, "the method 'nuslerp' turns one vector into another: it takes exactly two sites"),
        (4, {"method": "krum"}, "the method 'krum' stands f = 1 hostile sites from 5 sites on, and there are 4"),
        (5, {"method": "multi_krum", "options": {"f": 2}}, "stands f = 2 hostile sites from 7 sites on"),
        (2, {"method": "trimmed_mean"}, "leaves out the 1 largest and 1 smallest of 2 values: at least 3 sites"),
        (1, {"method": "consensus"}, "asks for 2 sites that need a value (votes), but there are 1"),
        (2, {"method": "breadcrumbs", "options": {"density": 0.95, "gamma": 0.1}}, "together at most 1"),
        (2, {"method": "della", "options": {"density": 0.05}}, "from density - epsilon to density + epsilon"),
        (2, {"method": "sum", "overrides": [{"tensors": "classifier.*", "method": "krum"}]}, "the method 'krum' st"),
    ],
)
def test_what_a_method_cannot_merge_is_refused_by_the_plan(count, section, words, sites, run):
    vectors = [f"./site-{n}" for n in range(count)]
    recipe = write_recipe(sites / "r.yaml", base="./base", vectors=vectors, output="./no", merge=section)
    outcome = run("plan", recipe)
    assert outcome.code == 2
    assert words in outcome.err


def test_an_option_that_is_one_of_some_words_names_them(sites, run):
    section = {"method": "ties", "options": {"scope": "layer"}}
    recipe = write_recipe(sites / "s.yaml", base="./base", vectors=["./site-0"], output="./no", merge=section)
    assert "merge.options.scope: expected 'tensor' or 'vector', found 'layer'" in run("plan", recipe).err


def test_fedavg_weighs_by_declared_examples_and_refuses_sites_without(sites, tmp_path):
    names = ["site-0", "site-1", "site-4"]
    by_count = fused(sites, names, method="fedavg")
    base = load_file(sites / "base" / WEIGHTS)
    for key in base:
        if "running" not in key and base[key].is_floating_point():
            first, second, third = (value.double() for value in differences(sites, names, key))
            expected = base[key].double() + (1 * first + 2 * second + 5 * third) / 8
            torch.testing.assert_close(by_count[key].double(), expected, rtol=1e-6, atol=1e-7)
    if not (sites / "uncounted").exists():
        make_vector(sites / "base", sites / "tuned-0", sites / "uncounted")
    with pytest.raises(InputError, match="'fedavg' weighs sites, but 'uncounted' declares no example counts"):
        planned(sites, ["site-1", "uncounted"], method="fedavg")


def test_fedavg_refuses_weights_that_the_recipe_gives(sites, run):
    vectors = [{"vector": "./site-0", "weight": 2.0}, "./site-1"]
    recipe = write_recipe(sites / "w.yaml", base="./base", vectors=vectors, output="./no", merge={"method": "fedavg"})
    outcome = run("plan", recipe)
    assert outcome.code == 2
    assert "the method 'fedavg' weighs by example counts; keep one of the two" in outcome.err


@pytest.mark.parametrize("name", [name for name in ALONE if not all_methods()[name].uses_weights])
def test_every_method_without_weights_refuses_unequal_ones(name, sites):
    names = sites_for(name)
    vectors = [{"vector": f"./{site}", "weight": 1.0 + place} for place, site in enumerate(names)]
    recipe = write_recipe(sites / "u.yaml", base="./base", vectors=vectors, merge={"method": name})
    with pytest.raises(InputError, match=f"the method '{name}' ignores weights, but they differ"):
        prepare(recipe)


def test_matrix_methods_leave_vectors_depthwise_kernels_and_heads_to_the_mean(sites):
    plan = planned(sites, ["site-0", "site-1"], method="tsv")
    named = {step.name: step for step in plan.steps if step.is_merged}
    depthwise = [
        key for key in named if "conv_dw" in key and key.endswith("weight") and len(named[key].record.shape) == 4
    ]
    assert depthwise
    for key, step in named.items():
        matrix = as_matrix(step.record.shape) is not None and step.role.value == "weight"
        assert step.method.name == ("tsv" if matrix else "mean"), key
    assert named["conv_stem.weight"].method.name == "tsv"


def test_a_slice_is_all_that_sliced_methods_take_beside_a_tensors_rows():
    from hf_datavec.combine import needs_whole

    kinds = {name: needs_whole(method) for name, method in all_methods().items()}
    assert not kinds["ties"]
    assert not kinds["krum"]
    assert kinds["tsv"]
    assert all(itertools.starmap(lambda name, whole: whole or all_methods()[name].kind != "matrix", kinds.items()))


def test_a_result_with_nan_in_a_vector_is_refused_by_the_survey_too(sites):
    broken = sites / "site-nan"
    if not broken.exists():
        make_vector(sites / "base", sites / "tuned-0", broken)
        tensors = load_file(broken / "vector.safetensors")
        tensors["conv_stem.weight"].view(-1)[3] = float("nan")
        save_file(tensors, broken / "vector.safetensors")
    plan = planned(sites, ["site-1", "site-nan"], method="ties")
    with pytest.raises(InputError, match=r"'site-nan': tensor 'conv_stem.weight' has 1 NaN"):
        next(fuse.run(plan))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_values_are_refused_that_are_not_finite_and_none_that_are(dtype):
    largest = torch.finfo(dtype).max
    refuse_nonfinite(torch.tensor([largest, largest, -1.0], dtype=dtype), "fc.weight", "site-a")  # their sum is not
    for values in ([math.inf, -math.inf, 1.0], [largest, largest, math.inf, math.nan], [math.nan, math.nan]):
        count = sum(not math.isfinite(value) for value in values)
        with pytest.raises(InputError, match=f"has {count} NaN or infinite values of {len(values)}"):
            refuse_nonfinite(torch.tensor(values, dtype=dtype), "fc.weight", "site-a")


def test_looking_for_values_that_are_not_finite_takes_no_memory():
    values = torch.ones(2**20)
    with torch.profiler.profile(profile_memory=True) as seen:
        refuse_nonfinite(values, "fc.weight", "site-a")
    taken = [one.cpu_memory_usage for one in seen.events() if one.cpu_memory_usage > 0]
    assert taken  # the sum
    assert sum(taken) < 2**10
