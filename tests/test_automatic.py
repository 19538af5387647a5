"""`method: auto` and `scale: auto` follow the vectors' geometry, and what they chose can be merged again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_vector, write_recipe
from ruamel.yaml import YAML
from safetensors.torch import load_file

from hf_datavec import automatic
from hf_datavec.geometry import Geometry
from hf_datavec.located import parse
from hf_datavec.recipe import check


def geometry_of(vectors: np.ndarray) -> Geometry:
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / norms[:, None] / norms
    return Geometry(tuple(map(float, norms)), tuple(tuple(map(float, row)) for row in cosines))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0.3, 5.0))
def test_the_scaled_sum_has_the_length_that_the_rule_wants(seed, count, shared):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 400)) + shared * random.normal(size=400)
    found = automatic.choose(geometry_of(vectors), "sum")
    length = np.linalg.norm(found.scale * vectors.sum(0))
    typical = math.sqrt(float((vectors**2).sum()) / count)
    assert length == pytest.approx(1.2 * typical, rel=1e-3)
    mean = automatic.choose(geometry_of(vectors), "mean")
    assert np.allclose(mean.scale * vectors.mean(0), found.scale * vectors.sum(0))


def test_vectors_that_share_a_direction_are_summed_and_others_go_through_their_spectrum():
    random = np.random.default_rng(0)
    apart, shared = random.normal(size=(4, 4000)), random.normal(size=4000)
    assert automatic.choose(geometry_of(apart), "auto").method == "iso_c"
    assert automatic.choose(geometry_of(apart + 0.5 * shared), "auto").method == "sum"
    alone = automatic.choose(geometry_of(apart[:1]), "auto")
    assert (alone.method, alone.scale) == ("sum", 1.0)


def test_vectors_that_cancel_out_are_not_blown_up():
    one = np.random.default_rng(0).normal(size=50)
    assert automatic.choose(geometry_of(np.stack([one, -one])), "sum").scale <= 1.0


def test_a_site_with_most_of_the_images_is_weighed_by_them():
    chosen = automatic.by_sizes([850, 50, 50, 50])
    assert chosen is not None
    assert (chosen.method, chosen.scale) == ("fedavg", 1.0)
    assert "85 %" in chosen.text
    for alike in ([250] * 4, [60, 20, 20], [1], [850, None, 50], [None, None], [0, 0]):
        assert automatic.by_sizes(alike) is None


def test_a_merge_by_auto_counts_examples_where_one_site_has_most_and_its_lock_repeats_it(study, run):
    base = study / "base"
    for site, examples in (("site-a", {"cat": 90, "dog": 10}), ("site-b", {"cat": 10, "dog": 15})):
        make_vector(base, study / f"tuned-{site}", study / f"{site}-counted", examples=examples)
    vectors = ["./site-a-counted", "./site-b-counted"]
    write_recipe(study / "recipe.yaml", base="./base", vectors=vectors, merge={"method": "auto"})
    outcome = run("merge", "recipe.yaml", "-o", "fused")
    assert outcome.code == 0, outcome.err
    assert "One site has 80 % of all examples, so `auto` chose `fedavg`" in (study / "fused" / "README.md").read_text()
    write_recipe(study / "plain.yaml", base="./base", vectors=vectors, merge={"method": "fedavg"})
    assert run("merge", "plain.yaml", "-o", "plain").code == 0
    weights = (study / "plain" / "model.safetensors").read_bytes()
    assert (study / "fused" / "model.safetensors").read_bytes() == weights
    again = run("merge", "fused/recipe.lock.yaml", "-o", "again")
    assert again.code == 0, again.err
    assert (study / "again" / "model.safetensors").read_bytes() == weights


def test_a_given_weight_is_refused_beside_auto(study, run):
    vectors = [{"vector": f"./site-{site}", "weight": 1.0} for site in "ab"]
    write_recipe(study / "recipe.yaml", base="./base", vectors=vectors, merge={"method": "auto"})
    outcome = run("plan", "recipe.yaml")
    assert outcome.code == 2
    assert "vectors[0].weight: a weight is given although method: auto chooses how sites are weighed" in outcome.err


@pytest.mark.parametrize("merge", [{"method": "auto"}, {"method": "sum", "scale": "auto"}])
def test_a_merge_by_auto_says_what_it_chose_and_its_lock_repeats_it(study, run, merge):
    write_recipe(study / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], merge=merge)
    outcome = run("merge", "recipe.yaml", "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert "auto` chose" in found["restoration"]
    assert "auto` chose" in (study / "fused" / "README.md").read_text()
    locked = YAML(typ="safe").load((study / "fused" / "recipe.lock.yaml").read_text())["merge"]
    assert (locked.get("method", "sum"), locked.get("scale", 1.0)) == (found["method"], found["scale"])
    assert isinstance(found["scale"], float)
    assert run("merge", "fused/recipe.lock.yaml", "-o", "again").code == 0
    again, fused = (load_file(study / place / "model.safetensors") for place in ("again", "fused"))
    assert all(np.array_equal(again[name].numpy(), fused[name].numpy()) for name in fused)


def test_plan_tells_that_the_scale_is_open(study, run):
    write_recipe(study / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], merge={"method": "auto"})
    outcome = run("plan", "recipe.yaml")
    assert outcome.code == 0, outcome.err
    assert "sum x ?" in outcome.out


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ("{method: auto, options: {density: 1}}", "merge.options: method: auto has no options"),
        ("{method: auto, scale: 0.5}", "merge.scale: method: auto chooses the scale as well"),
        ("{method: auto, weights: examples}", "merge.weights: method: auto chooses how sites are weighed as well"),
        (
            "{method: auto, weights: {search: coordinate, images: ./images, metric: accuracy}}",
            "merge.weights: method: auto chooses how sites are weighed as well",
        ),
        (
            "{method: ties, scale: auto}",
            "merge.scale: 'auto' is known for sum, mean and for method: auto",
        ),
        ("{overrides: [{tensors: .*, method: auto}]}", "merge.overrides[0].method: 'auto' looks at whole vectors"),
        ("{scale: automatic}", "merge.scale: expected 'auto' or a finite number, found 'automatic'"),
    ],
)
def test_what_auto_cannot_do_is_told(merge, said):
    with pytest.raises(Exception, match=r"recipe\.yaml") as caught:
        check(parse(f"base: ./b\nvectors: [./a]\nmerge: {merge}\n", "recipe.yaml"))
    assert said in str(caught.value)
