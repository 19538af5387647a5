"""`method: auto` and `scale: auto` follow the vectors' geometry, and what they chose can be merged again."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_images, make_network, make_vector, save_with, tune, write_recipe
from ruamel.yaml import YAML
from safetensors.torch import load_file

from hf_datavec import agreement, automatic, candidates, models, offloading
from hf_datavec.agreement import BROKEN, Match
from hf_datavec.candidates import Candidate
from hf_datavec.geometry import Geometry
from hf_datavec.hub import parse as parse_reference
from hf_datavec.images import open_images
from hf_datavec.located import parse
from hf_datavec.pipeline import coordinator, judging
from hf_datavec.pipeline import site as site_steps
from hf_datavec.pipeline.observing import Observed
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.recipe import check
from hf_datavec.temperature import fit_ensemble
from hf_datavec.verdict import Trial, Verdict


def geometry_of(vectors: np.ndarray) -> Geometry:
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / norms[:, None] / norms
    return Geometry(tuple(map(float, norms)), tuple(tuple(map(float, row)) for row in cosines))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0.3, 5.0))
def test_the_scaled_sum_has_the_length_that_the_rule_wants(seed, count, shared):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 400)) + shared * random.normal(size=400)
    found = automatic.scale_of(geometry_of(vectors), "sum")
    length = np.linalg.norm(found.scale * vectors.sum(0))
    typical = math.sqrt(float((vectors**2).sum()) / count)
    assert length == pytest.approx(1.2 * typical, rel=1e-3)
    mean = automatic.scale_of(geometry_of(vectors), "mean")
    assert np.allclose(mean.scale * vectors.mean(0), found.scale * vectors.sum(0))


def test_vectors_that_cancel_out_are_not_blown_up():
    one = np.random.default_rng(0).normal(size=50)
    assert automatic.scale_of(geometry_of(np.stack([one, -one])), "sum").scale <= 1.0


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


@pytest.fixture
def agreeing(tmp_path, monkeypatch):
    """Three sites of which one shares no statistics, and unlabelled images; recipes are written by `by_agreement`.

    The images count as those of the sites, whose statistics are made up.
    """
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", math.inf)
    base = make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=6)
    for number, site in enumerate("abc", start=1):
        tuned = tune(base, tmp_path / f"tuned-{site}", seed=number, step=0.05)
        counts = {"cat": number, "dog": 2, "owl": 3}
        make_vector(base, tuned, tmp_path / f"site-{site}", with_statistics=site != "b", examples=counts)
    return tmp_path


def by_agreement(folder, name="recipe", **sections):
    given = {"base": "./base", "vectors": ["./site-a", "./site-b", "./site-c"], **sections}
    given.setdefault("merge", {"method": "auto"})
    given["recalibrate"] = {"images": "./images", "batch_size": 5, **given.get("recalibrate", {"mode": "auto"})}
    return write_recipe(folder / f"{name}.yaml", **given)


def logits_of(network, pictures):
    with torch.no_grad():
        return network.logits(pictures.tensors(network.preprocess, range(len(pictures)))).double().numpy()


def naive(folder, candidate, number, judge):
    """How the folder that a recipe of this candidate alone is merged into relates to the ensemble."""
    merge = {key: candidate[key] for key in ("method", "scale", "options") if key in candidate}
    vectors = ["./site-a", "./site-b", "./site-c"]
    if "site" in candidate:
        vectors = [{"vector": one, "weight": float(one.endswith(candidate["site"]))} for one in vectors]
    mode = {"mode": candidate["mode"]}
    path = by_agreement(folder, f"alone-{number}", vectors=vectors, merge=merge, recalibrate=mode)
    result = coordinator.merge(path, output=folder / f"alone-{number}", device="cpu")
    network = models.load(result.output)
    return judge.ensemble.match(
        logits_of(network, open_images(parse_reference(str(folder / "images")))), network.labels
    )


def test_auto_takes_the_candidate_that_a_loop_over_merges_finds_to_have_most_support(agreeing, run):
    outcome = run("merge", by_agreement(agreeing), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    choice = json.loads(outcome.out)["choice"]
    assert choice == json.loads((agreeing / "fused" / "search.json").read_text())["choice"]
    tried = choice["candidates"]
    kinds = {(one["method"], one.get("site"), one["scale"] == 0) for one in tried}
    methods = {method for method, site, base in kinds if not site and not base}
    assert methods == {"mean", "sum", "iso_c", "tsv", "ties", "fedavg"}
    assert {site for _, site, _ in kinds if site} == {"site-a", "site-b", "site-c"}
    assert ("sum", None, True) in kinds
    assert {one["mode"] for one in tried if one["scale"]} == {"statistics", "relative"}
    assert {one["mode"] for one in tried if not one["scale"]} == {"none"}
    pictures = open_images(parse_reference(str(agreeing / "images")))
    judge = judging.judge(prepare(agreeing / "recipe.yaml").plan, pictures, "cpu")
    for number, one in enumerate(tried):
        expected = naive(agreeing, one, number, judge)
        assert one["divergence"] == pytest.approx(expected.divergence, rel=1e-3, abs=1e-5), one
        assert one["agreement"] == pytest.approx(expected.agreement, abs=1e-9), one
        assert one["support"] == pytest.approx(expected.support, rel=1e-3, abs=1e-5), one
    ranked = min(tried, key=lambda one: (-round(one["support"], 4), round(one["divergence"], 4)))
    assert choice["found"] == ranked
    best = (agreeing / f"alone-{tried.index(choice['found'])}" / "model.safetensors").read_bytes()
    assert (agreeing / "fused" / "model.safetensors").read_bytes() == best


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"merge": {"method": "sum", "scale": "auto"}, "recalibrate": {"mode": "statistics"}},
        {"merge": {"method": "ties", "scale": "auto", "options": {"density": 0.3}}},
        {"merge": {"method": "mean"}},
        {"merge": {"method": "auto"}, "recalibrate": {"mode": "none"}},
        {"aliases": True},
    ],
)
def test_what_agreement_chose_stands_in_the_lock_which_repeats_it(agreeing, run, sections):
    outcome = run("merge", by_agreement(agreeing, **sections), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    chosen = found["choice"]["found"]
    assert "`auto` chose" in found["restoration"]
    assert "## Choice" in (agreeing / "fused" / "README.md").read_text()
    lock = agreeing / ("recipe.lock.yaml" if sections.get("aliases") else "fused/recipe.lock.yaml")
    locked = YAML(typ="safe").load(lock.read_text())
    assert (locked["merge"].get("method", "sum"), locked["merge"].get("scale", 1.0)) == (
        chosen["method"],
        chosen["scale"],
    )
    assert locked["recalibrate"].get("mode", "statistics") == chosen["mode"]
    assert locked["lock"]["calibration"]["digest"] == found["choice"]["digest"]
    again = run("merge", lock, "-o", "again", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["choice"] is None
    weights = (agreeing / "fused" / "model.safetensors").read_bytes()
    assert (agreeing / "again" / "model.safetensors").read_bytes() == weights


def test_the_scales_that_are_tried_follow_the_number_of_sites(agreeing, run):
    recipe = by_agreement(agreeing, merge={"scale": "auto"}, recalibrate={"mode": "statistics"})
    tried = json.loads(run("merge", recipe, "-o", "fused", "--json").out)["choice"]["candidates"]
    assert [one["scale"] for one in tried] == pytest.approx([1 / 3, 1 / 2, 2 / 3, 1])
    recipe = by_agreement(agreeing, merge={"method": "iso_c", "scale": "auto"})
    tried = json.loads(run("merge", recipe, "-o", "other", "--json").out)["choice"]["candidates"]
    assert [one["scale"] for one in tried] == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.5, 1.5]


def test_a_labelled_search_finds_the_scale_and_agreement_the_mode(agreeing, run):
    merge = {"scale": {"search": [0.25, 0.5, 1.0], "images": "./images", "batch_size": 5}}
    outcome = run("merge", by_agreement(agreeing, merge=merge), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {(one["scale"], one["mode"]) for one in found["choice"]["candidates"]} == {
        (0.5, "statistics"),
        (0.5, "relative"),
    }
    assert found["scale"] == found["search"]["found"]
    assert set(json.loads((agreeing / "fused" / "search.json").read_text())) >= {"searched", "choice"}


def test_sites_with_other_labels_are_asked_for_those_that_they_have(agreeing, run):
    other = make_network("test_resnet", agreeing / "other", labels=("owl", "yak"))
    tensors = load_file(agreeing / "tuned-c" / "model.safetensors")
    tensors |= {name: one for name, one in load_file(other / "model.safetensors").items() if name.startswith("fc.")}
    make_vector(agreeing / "base", save_with(other, agreeing / "tuned-d", tensors), agreeing / "site-d")
    outcome = run("merge", by_agreement(agreeing, vectors=["./site-a", "./site-b", "./site-d"]), "-o", "f", "--json")
    assert outcome.code == 0, outcome.err
    tried = json.loads(outcome.out)["choice"]["candidates"]
    # No site knows all labels, and neither does the base.
    assert not [one for one in tried if "site" in one or one["scale"] == 0]


def test_a_head_of_zeros_is_no_candidate(agreeing):
    tensors = load_file(agreeing / "base" / "model.safetensors")
    tensors |= {name: torch.zeros_like(one) for name, one in tensors.items() if name.startswith("fc.")}
    save_with(agreeing / "base", agreeing / "base", tensors)
    for site in "abc":
        make_vector(agreeing / "base", agreeing / f"tuned-{site}", agreeing / f"zero-{site}")
    path = by_agreement(agreeing, vectors=[f"./zero-{site}" for site in "abc"])
    assert all(one.scale for one in candidates.of(prepare(path).plan))


def test_a_network_without_batch_norm_is_chosen_as_well(tmp_path, run):
    base = make_network("vit", tmp_path / "base")
    make_images(tmp_path / "images", each=4)
    for number, site in enumerate("ab", start=1):
        tuned = tune(base, tmp_path / f"tuned-{site}", seed=number)
        make_vector(base, tuned, tmp_path / f"site-{site}")
    recipe = by_agreement(tmp_path, vectors=["./site-a", "./site-b"])
    outcome = run("merge", recipe, "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    assert {one["mode"] for one in json.loads(outcome.out)["choice"]["candidates"]} == {"none"}
    assert run("merge", "fused/recipe.lock.yaml", "-o", "again").code == 0
    weights = (tmp_path / "fused" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_a_site_that_is_blown_up_is_not_summed_in(agreeing, run):
    base, tuned = (load_file(agreeing / place / "model.safetensors") for place in ("base", "tuned-b"))
    far = {
        name: base[name] + 1000 * (one - base[name]) if one.is_floating_point() and "running" not in name else one
        for name, one in tuned.items()
    }
    make_vector(agreeing / "base", save_with(agreeing / "base", agreeing / "far", far), agreeing / "site-far")
    recipe = by_agreement(agreeing, vectors=["./site-a", "./site-far", "./site-c"])
    outcome = run("merge", recipe, "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["choice"]
    support = {(one["method"], one.get("site"), one["mode"]): one["support"] for one in found["candidates"]}
    assert found["found"]["support"] == max(support.values())
    divergence = {(one["method"], one.get("site"), one["mode"]): one["divergence"] for one in found["candidates"]}
    assert found["found"]["divergence"] < divergence["sum", None, "statistics"]


def test_of_candidates_that_are_as_good_as_equal_the_first_is_taken():
    listed = [Candidate("mean", 1.0), Candidate("sum", 0.5), Candidate("tsv", 1.0)]
    given = ((0.1, 0.7), (0.30001, 0.80001), (0.3, 0.8))
    trials = [Trial(one, "none", Match(far, 1.0, support)) for one, (far, support) in zip(listed, given, strict=True)]
    assert Verdict("images", "digest", 9, ("a",), tuple(trials)).best is trials[1]
    nearer = replace(trials[2], match=Match(0.2, 1.0, 0.8))
    assert Verdict("images", "digest", 9, ("a",), (*trials, nearer)).best is nearer
    broken = Verdict("images", "digest", 9, ("a",), (Trial(listed[0], "none", BROKEN, "broken"), trials[0]))
    assert broken.best is trials[0]
    assert broken.mean == trials[0].match


def test_a_site_alone_with_its_own_statistics_is_not_warned_of(agreeing, run):
    make_vector(agreeing / "base", agreeing / "tuned-b", agreeing / "shared-b", with_statistics=True)
    vectors = [{"vector": f"./{site}", "weight": weight} for site, weight in (("site-a", 0.0), ("shared-b", 1.0))]
    sections = {"base": "./base", "vectors": vectors, "recalibrate": {"mode": "moments"}}
    alone = write_recipe(agreeing / "alone.yaml", merge={"method": "linear"}, **sections)
    outcome = run("merge", alone, "-o", "alone")
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    ours, theirs = (load_file(agreeing / place / "model.safetensors") for place in ("alone", "tuned-b"))
    assert all(torch.allclose(ours[name], one, atol=1e-6) for name, one in theirs.items())


def test_plan_says_how_auto_will_choose(agreeing, run):
    outcome = run("plan", by_agreement(agreeing))
    assert outcome.code == 0, outcome.err
    assert "by agreement with the sites' networks on up to 512 images of ./images, of 18 candidates" in outcome.out


def test_an_interrupted_push_is_gone_on_with_after_a_choice(agreeing, run):
    recipe = by_agreement(agreeing, push={"repo": "./pushed"}, output="./fused")
    assert run("merge", recipe, "--no-push").code == 0
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "only the push is missing" in outcome.err
    assert (agreeing / "pushed" / "search.json").is_file()


def test_auto_chooses_alike_for_a_network_larger_than_its_memory(agreeing, run, monkeypatch):
    recipe = by_agreement(agreeing, merge={"scale": "auto"})
    expected = json.loads(run("merge", recipe, "-o", "whole", "--json").out)["choice"]
    size = (agreeing / "base" / "model.safetensors").stat().st_size
    monkeypatch.setenv(offloading.LIMIT, f"{size // 2000}KB")
    outcome = run("merge", recipe, "-o", "parts", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["choice"]
    pairs = list(zip(found["candidates"], expected["candidates"], strict=True))
    assert all(one["divergence"] == pytest.approx(other["divergence"], abs=1e-5) for one, other in pairs)
    assert found["found"]["scale"] == expected["found"]["scale"]


def test_without_public_images_auto_takes_one_method_whatever_the_vectors(study, run):
    write_recipe(study / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], merge={"method": "auto"})
    outcome = run("merge", "recipe.yaml", "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["method"], found["scale"]) == ("tsv", 1.0)
    write_recipe(study / "plain.yaml", base="./base", vectors=["./site-a", "./site-b"], merge={"method": "tsv"})
    assert run("merge", "plain.yaml", "-o", "plain").code == 0
    same = [(study / place / "model.safetensors").read_bytes() for place in ("fused", "plain")]
    assert same[0] == same[1]


def test_on_images_of_another_kind_the_sites_networks_do_not_judge(agreeing, run, monkeypatch):
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", 1e-9)
    outcome = run("merge", by_agreement(agreeing), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    choice = json.loads(outcome.out)["choice"]
    assert [(one["method"], one["mode"]) for one in choice["candidates"]] == [("sum", "relative")]
    assert choice["found"]["scale"] == pytest.approx(2 / 3)
    assert choice["foreign"] > 0
    card = (agreeing / "fused" / "README.md").read_text()
    assert "the public images are of another kind than the sites'" in card
    assert "so this tells little" in card
    assert "the fused network may be worse than a site's own" not in outcome.err
    again = run("merge", "fused/recipe.lock.yaml", "-o", "again")
    assert again.code == 0, again.err
    same = [(agreeing / place / "model.safetensors").read_bytes() for place in ("fused", "again")]
    assert same[0] == same[1]


def test_nothing_is_learned_or_calibrated_on_images_of_another_kind(agreeing, run, monkeypatch):
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", 1e-9)
    plain = by_agreement(agreeing, "plain", recalibrate={"mode": "auto"})
    learning = {"tune": {"loss": "ensemble", "epochs": 1}, "temperature": "ensemble"}
    taught = by_agreement(agreeing, "taught", recalibrate={"mode": "auto", **learning})
    for recipe, place in ((plain, "plain"), (taught, "taught")):
        outcome = run("merge", recipe, "-o", place)
        assert outcome.code == 0, outcome.err
    assert "warning: Nothing was learned from the ensemble" in outcome.err
    card = (agreeing / "taught" / "README.md").read_text()
    assert "Nothing was learned from the ensemble" in card
    assert "Confidence was not scaled, since the public images are of another kind than the sites'." in card
    again = run("merge", "taught/recipe.lock.yaml", "-o", "again")
    assert again.code == 0, again.err
    # Nor in a mode that does not look at the images.
    for name, learning in (("none", {}), ("none-taught", {"tune": {"loss": "ensemble", "epochs": 1}})):
        restore = {"mode": "none", **learning}
        recipe = by_agreement(agreeing, name, merge={"method": "mean"}, recalibrate=restore)
        assert run("merge", recipe, "-o", name).code == 0
    for one, other in (("plain", "taught"), ("plain", "again"), ("none", "none-taught")):
        same = [(agreeing / place / "model.safetensors").read_bytes() for place in (one, other)]
        assert same[0] == same[1], other


def test_auto_beside_overrides_tries_what_its_lock_can_repeat(agreeing, run):
    for merge in ({"method": "auto", "overrides": [{"tensors": r"fc\..*", "method": "mean"}]},):
        outcome = run("merge", by_agreement(agreeing, merge=merge), "-o", "fused", "--json")
        assert outcome.code == 0, outcome.err
        tried = {one["method"] for one in json.loads(outcome.out)["choice"]["candidates"]}
        assert "fedavg" not in tried
        assert "linear" not in tried
        again = run("merge", "fused/recipe.lock.yaml", "-o", "again")
        assert again.code == 0, again.err
    same = [(agreeing / place / "model.safetensors").read_bytes() for place in ("fused", "again")]
    assert same[0] == same[1]


@pytest.fixture
def sharing(tmp_path, monkeypatch):
    """Two sites that share one of three classes, with sums of the base's features beside their vectors."""
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", math.inf)
    base = make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=8)
    for number, (site, labels) in enumerate((("a", ("cat", "dog")), ("b", ("dog", "owl"))), start=1):
        tuned = tune(base, tmp_path / f"tuned-{site}", seed=number, step=0.05)
        own = tmp_path / f"images-{site}"
        for label in labels:
            shutil.copytree(tmp_path / "images" / label, own / label)
        observed = Observed(("features",), str(own), device="cpu")
        site_steps.diff(str(base), str(tuned), tmp_path / f"site-{site}", with_statistics=True, observed=observed)
    return tmp_path


def test_auto_may_take_the_base_with_the_head_of_the_sums_and_its_lock_repeats_it(sharing, run):
    vectors = ["./site-a", "./site-b"]
    outcome = run("merge", by_agreement(sharing, vectors=vectors), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    tried = json.loads(outcome.out)["choice"]["candidates"]
    assert [one["mode"] for one in tried if one.get("head") == "pooled"] == ["none"]
    assert "the base with a pooled head" in (sharing / "fused" / "README.md").read_text()
    # With statistics that a mode restores, a head on the untouched base would not fit.
    recipe = by_agreement(sharing, "fixed", vectors=vectors, recalibrate={"mode": "relative"})
    outcome = run("merge", recipe, "-o", "fixed", "--json")
    assert outcome.code == 0, outcome.err
    assert not any(one.get("head") for one in json.loads(outcome.out)["choice"]["candidates"])
    # Without public images, the head alone is left to choose, and it keeps the base's statistics.
    sections = {"merge": {"method": "auto"}, "recalibrate": {"mode": "auto"}}
    write_recipe(sharing / "blind.yaml", base="./base", vectors=vectors, **sections)
    outcome = run("merge", "blind.yaml", "-o", "blind", "--json")
    assert outcome.code == 0, outcome.err
    assert "the head that all sites' sums of features give" in json.loads(outcome.out)["restoration"]
    base, blind = (load_file(sharing / place / "model.safetensors") for place in ("base", "blind"))
    assert {name for name in base if not torch.equal(base[name], blind[name])} == {"fc.weight", "fc.bias"}
    assert run("merge", "blind/recipe.lock.yaml", "-o", "again").code == 0
    same = [(sharing / place / "model.safetensors").read_bytes() for place in ("blind", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize("aliases", [False, True])
def test_a_merge_with_a_pooled_head_is_only_pushed_when_it_is_complete(aliases, sharing, run, monkeypatch):
    # On images of another kind nothing but the pooled head is tried.
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", 1e-9)
    sections = {"merge": {"method": "auto"}, "recalibrate": {"mode": "auto"}, "push": {"repo": "./pushed"}}
    recipe = by_agreement(sharing, vectors=["./site-a", "./site-b"], output="./fused", aliases=aliases, **sections)
    assert run("merge", recipe, "--no-push").code == 0
    choice = json.loads((sharing / "fused" / "search.json").read_text())["choice"]
    assert choice["found"]["head"] == "pooled"
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "only the push is missing" in outcome.err
    assert (sharing / "pushed" / "model.safetensors").exists()


def test_a_head_that_the_recipe_gives_is_kept(sharing, run):
    merge = {"method": "auto", "overrides": [{"tensors": r"fc\..*", "method": "mean"}]}
    outcome = run(
        "merge", by_agreement(sharing, vectors=["./site-a", "./site-b"], merge=merge), "-o", "fused", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert not any(one.get("head") for one in json.loads(outcome.out)["choice"]["candidates"])


def test_the_pooled_head_has_a_say_as_large_as_the_sites_mixes_differ(sharing):
    recipe = by_agreement(sharing, vectors=["./site-a", "./site-b"])
    pictures = open_images(parse_reference(str(sharing / "images")))
    found = judging.judge(prepare(recipe).plan, pictures, "cpu").ensemble
    assert found.counts.tolist() in ([[8, 8, 0], [0, 8, 8]], [[0, 8, 8], [8, 8, 0]])
    assert agreement.skew(found.counts) == pytest.approx(0.25)
    sites = replace(found, head=None).teacher
    head = agreement.log_softmax(found.head)
    head = agreement.log_softmax(head / fit_ensemble(head, np.exp(sites)))
    assert np.allclose(found.teacher, agreement.log_softmax(0.75 * sites + 0.25 * head))
    assert not np.allclose(found.teacher, sites)
