"""Divergence from an ensemble ignores confidence, labels go by name, and what is broken has no say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec import agreement, ensemble, images, models, recalibrate
from hf_datavec.agreement import BROKEN, SLACK, Agreement, Match, cautions
from hf_datavec.ensemble import Ensemble
from hf_datavec.hub import parse
from hf_datavec.pipeline import judging
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.recalibrate import Pictures
from hf_datavec.temperature import LEAST, MOST


def random_logits(seed: int, count: int = 40, labels: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, labels)) * 2


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 5.0), st.floats(-3, 3))
def test_a_network_that_is_only_more_or_less_sure_does_not_diverge(seed, sureness, shift):
    logits = random_logits(seed)
    teacher = agreement.log_softmax(logits)
    assert agreement.divergence(teacher, sureness * logits + shift) < 1e-9
    assert agreement.agreement(teacher, sureness * logits + shift) == 1.0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_divergence_is_the_least_of_many_temperatures(seed):
    teacher, student = agreement.log_softmax(random_logits(seed)), random_logits(seed + 1)
    found = agreement.divergence(teacher, student)
    tried = []
    for one in np.geomspace(LEAST, MOST, 800):
        scaled = student / one
        log_shares = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        tried.append((np.exp(teacher) * (teacher - log_shares)).sum(1).mean())
    assert found <= min(tried) + 1e-12
    assert found == pytest.approx(min(tried), abs=1e-4)


def test_answers_of_a_thousand_times_the_size_are_beyond_what_a_temperature_mends():
    logits = random_logits(0)
    assert agreement.divergence(agreement.log_softmax(logits), 1000 * logits) > 1


def test_labels_go_by_name_and_a_site_has_no_say_on_those_it_lacks():
    first, second = random_logits(1, labels=3), random_logits(2, labels=2)
    labels = ("cat", "dog", "owl")
    parts = np.stack(
        [
            agreement.at_labels(agreement.log_softmax(first), ("owl", "cat", "dog"), labels),
            agreement.at_labels(agreement.log_softmax(second), ("dog", "cat"), labels),
        ]
    )
    found = agreement.pooled(parts)
    one, two = agreement.log_softmax(first), agreement.log_softmax(second)
    mean = np.stack([(one[:, 1] + two[:, 1]) / 2, (one[:, 2] + two[:, 0]) / 2, one[:, 0]], axis=1)
    assert np.allclose(found, mean - np.log(np.exp(mean).sum(1, keepdims=True)))


def test_a_student_is_held_against_the_labels_that_it_has():
    teacher = agreement.log_softmax(random_logits(3))
    without = teacher.copy()
    without[:, 1] = np.nan
    assert agreement.match(teacher, without).divergence < 1e-9
    assert agreement.match(teacher, np.full_like(teacher, np.nan)) == BROKEN
    assert agreement.match(teacher, np.where(np.arange(4) == 0, np.inf, teacher)) == BROKEN


def test_a_site_with_two_views_has_no_more_say_than_one_with_one():
    one, two = (agreement.log_softmax(random_logits(seed)) for seed in (4, 5))
    silent = np.full_like(one, np.nan)
    found = Ensemble(("a", "b", "c", "d"), ("one", "two"), np.stack([np.stack([one, one]), np.stack([silent, two])]))
    mean = (one + two) / 2
    assert np.allclose(found.teacher, mean - np.log(np.exp(mean).sum(1, keepdims=True)))
    assert np.allclose(found.probabilities.sum(1), 1)
    assert np.array_equal(found.of_site("two"), two)


def test_sites_that_declare_their_images_answer_for_the_mix_of_all_sites():
    """Two sites saw the same pictures of two classes, one of them nine of ten of the first class."""
    likelihoods = np.random.default_rng(0).random((50, 2))
    counts = np.array([[89.0, 9.0], [9.0, 89.0]])
    each = np.stack([agreement.log_softmax(np.log(likelihoods * (row + 1))) for row in counts])
    even = agreement.log_softmax(np.log(likelihoods))
    found = Ensemble(("a", "b"), ("one", "two"), each[:, None], counts).teacher
    assert np.allclose(found, even)
    uneven = np.array([[89.0, 9.0], [89.0, 9.0]])
    same = np.stack([each[0], each[0]])
    assert np.allclose(Ensemble(("a", "b"), ("one", "two"), same[:, None], uneven).teacher, each[0])


def test_support_is_the_mean_probability_of_the_answers():
    teacher, student = (agreement.log_softmax(random_logits(seed)) for seed in (6, 7))
    expected = [
        math.exp(one[answers.tolist().index(max(answers))]) for one, answers in zip(teacher, student, strict=True)
    ]
    assert agreement.match(teacher, student).support == pytest.approx(sum(expected) / len(expected))
    assert agreement.match(teacher, 5 * student).support == agreement.match(teacher, student).support


def test_a_caution_comes_for_a_network_whose_answers_have_little_support_and_says_what_to_do():
    sites = [Match(0.1, 0.9, 0.8), Match(0.2, 0.8, 0.7), None, Match(0.3, 0.7, 0.6)]
    assert cautions(Match(0.2, 0.8, 0.8 - SLACK), sites) == ""
    assert cautions(Match(0.2, 0.8, 0.8), sites, Match(0.3, 0.8, 0.8)) == ""
    far = cautions(Match(1.0, 0.3, 0.5), sites)
    assert "a mean probability of 50.0 %, less than the best site's 80.0 %" in far
    assert "Use method: auto or mean, a smaller scale, or recalibrate: {mode: relative}" in far
    assert "less than the plain mean's 90.0 %" in cautions(Match(0.2, 0.8, 0.8), sites, Match(0.05, 0.9, 0.9))
    assert "not finite" in cautions(BROKEN, sites)
    assert "not finite" in cautions(BROKEN, [None])


def test_on_images_of_another_kind_only_a_network_far_below_every_site_is_warned_of():
    sites = (Match(0.1, 0.9, 0.8), Match(0.2, 0.8, 0.6))
    told = Agreement("images", "digest", 9, ("a", "b"), Match(0.5, 0.5, 0.4), sites)
    assert told.caution
    assert replace(told, foreign=True).caution == ""
    assert replace(told, foreign=True, fused=Match(0.9, 0.1, 0.2)).caution
    assert "so this tells little" in replace(told, foreign=True).text


def test_a_member_with_logits_a_thousand_times_as_large_does_not_outvote_the_others():
    members = np.stack([agreement.log_softmax(random_logits(seed)) for seed in (8, 9, 10)])
    loud = members.copy()
    loud[1] = agreement.log_softmax(1000 * random_logits(9))
    assert np.array_equal(agreement.no_louder(members), members)
    spread = np.sqrt(((members - members.mean(2, keepdims=True)) ** 2).mean((1, 2)))
    tamed = agreement.no_louder(loud)
    found = np.sqrt(((tamed - tamed.mean(2, keepdims=True)) ** 2).mean((1, 2)))
    assert found[1] <= agreement.LOUDEST * max(spread) + 1e-9
    assert np.array_equal(tamed[[0, 2]], members[[0, 2]])
    single = members.copy()
    single[:2, :, 1:] = np.nan
    single[:2, :, 0] = 0.0
    assert np.array_equal(agreement.no_louder(single), single, equal_nan=True)
    silent = members.copy()
    silent[2] = np.nan
    assert np.array_equal(agreement.no_louder(silent), silent, equal_nan=True)


@pytest.fixture
def sites(tmp_path):
    """Three sites on one base: one shares statistics, one lacks a label and one has a label of its own."""
    base = make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=6)
    for number, (site, shares) in enumerate((("a", True), ("b", False)), start=1):
        tuned = tune(base, tmp_path / f"tuned-{site}", seed=number)
        make_vector(base, tuned, tmp_path / f"site-{site}", with_statistics=shares)
    other = make_network("test_resnet", tmp_path / "other", labels=("owl", "cat", "yak"))
    tensors = load_file(tmp_path / "tuned-a" / "model.safetensors")
    head = load_file(other / "model.safetensors")
    tensors |= {name: value for name, value in head.items() if name.startswith("fc.")}
    make_vector(base, save_with(other, tmp_path / "tuned-c", tensors), tmp_path / "site-c")
    return tmp_path


def recipe(folder, **sections):
    given = {"base": "./base", "vectors": ["./site-a", "./site-b", "./site-c"], **sections}
    given.setdefault("recalibrate", {"images": "./images", "batch_size": 5})
    return write_recipe(folder / "recipe.yaml", **given)


def judged(folder):
    prepared = prepare(recipe(folder))
    found = judging.judge(prepared.plan, images.open_images(parse(str(folder / "images"))), "cpu")
    assert found is not None
    return found, prepared.plan


def test_the_ensemble_is_what_a_loop_over_the_sites_networks_gives(sites):
    found, plan = judged(sites)
    pictures = images.open_images(parse(str(sites / "images")))
    labels = plan.labels
    assert set(labels) == {"cat", "dog", "owl", "yak"}
    each = []
    for one in plan.contributions:
        network = models.load(sites / f"tuned-{one.name[-1]}")
        load = partial(pictures.tensors, network.preprocess)
        pixels = load(range(len(pictures)))
        views = []
        for public in (False, True):
            if public:
                recalibrate.statistics(network, Pictures(len(pictures), load))
            elif not one.has_statistics:
                continue
            with torch.no_grad():
                log_shares = torch.log_softmax(network.logits(pixels).double(), 1).numpy()
            views.append({label: log_shares[:, row] for row, label in enumerate(network.labels)})
        each.append({label: np.mean([view[label] for view in views], 0) for label in views[0]})
    mean = np.stack([np.mean([one[label] for one in each if label in one], 0) for label in labels], 1)
    expected = mean - np.log(np.exp(mean).sum(1, keepdims=True))
    assert np.allclose(found.ensemble.teacher, expected, atol=1e-4)


def test_the_images_of_each_label_that_sites_declare_are_known(sites):
    for site, examples in (("a", {"cat": 5, "dog": 1, "owl": 2}), ("b", {"cat": 0, "dog": 7, "owl": 2})):
        make_vector(sites / "base", sites / f"tuned-{site}", sites / f"counted-{site}", examples=examples)
    plan = prepare(recipe(sites, vectors=["./counted-a", "./counted-b"])).plan
    order = ["counted-a", "counted-b"]
    counts = ensemble.declared(plan.contributions, plan.labels)
    found = dict(zip([one.name for one in plan.contributions], counts, strict=True))
    assert [found[name].tolist() for name in order] == [[5, 1, 2], [0, 7, 2]]
    assert ensemble.declared(prepare(recipe(sites)).plan.contributions, plan.labels) is None


def test_a_merge_tells_how_far_it_is_from_the_ensemble(sites, run):
    outcome = run("merge", recipe(sites, merge={"method": "mean"}), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)["agreement"]
    assert told == json.loads((sites / "fused" / "agreement.json").read_text())
    found, _ = judged(sites)
    network = models.load(sites / "fused")
    with torch.no_grad():
        pictures = images.open_images(parse(str(sites / "images")))
        logits = network.logits(pictures.tensors(network.preprocess, range(len(pictures))))
    expected = found.ensemble.match(logits.double().numpy(), network.labels)
    assert told["fused"]["divergence"] == pytest.approx(expected.divergence, abs=1e-4)
    assert told["fused"]["agreement"] == pytest.approx(expected.agreement)
    assert told["fused"]["support"] == pytest.approx(expected.support, abs=1e-4)
    assert set(told["sites"]) == {"site-a", "site-b", "site-c"}
    card = (sites / "fused" / "README.md").read_text()
    assert "## Agreement with the sites" in card
    support, agrees, diverges = (told["fused"][name] for name in ("support", "agreement", "divergence"))
    assert f"| fused | {100 * support:.1f} | {100 * agrees:.1f} | {diverges:.3f} |" in card
    assert "agreement: On 18 public images the ensemble of the sites' networks gives" in outcome.err


def test_a_site_that_is_blown_up_is_warned_of_before_the_model_appears(sites, run):
    base = load_file(sites / "base" / "model.safetensors")
    tuned = load_file(sites / "tuned-b" / "model.safetensors")
    far = {
        name: base[name] + 1000 * (value - base[name]) if value.is_floating_point() and "running" not in name else value
        for name, value in tuned.items()
    }
    make_vector(sites / "base", save_with(sites / "base", sites / "far", far), sites / "site-far")
    # None shares statistics: those of random networks would call the images foreign, where nobody is warned.
    vectors = ["./site-b", "./site-far", "./site-c"]
    outcome = run("merge", recipe(sites, vectors=vectors), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)["agreement"]
    assert "gives the fused network's answers a mean probability of" in told["caution"]
    assert "`hf-datavec inspect` shows vectors that are unlike the others" in outcome.err
    assert told["caution"] in (sites / "fused" / "README.md").read_text()


def test_a_broken_site_has_no_say(sites, run):
    network = load_file(sites / "tuned-b" / "model.safetensors")
    broken = {
        name: torch.full_like(value, 3e38) if value.is_floating_point() and "running" not in name else value
        for name, value in network.items()
    }
    make_vector(sites / "base", save_with(sites / "base", sites / "broken", broken), sites / "site-broken")
    merge = {"method": "linear"}
    vectors = [{"vector": f"./site-{name}", "weight": weight} for name, weight in (("a", 1), ("broken", 0), ("c", 1))]
    outcome = run("merge", recipe(sites, vectors=vectors, merge=merge), "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    assert "the network of 'site-broken', public statistics gives NaN or infinite values" in outcome.err
    assert json.loads(outcome.out)["agreement"]["sites"]["site-broken"] is None


def test_aliases_name_no_site_in_what_is_said_of_agreement(sites, run):
    assert run("merge", recipe(sites, aliases=True), "-o", "fused").code == 0
    told = json.loads((sites / "fused" / "agreement.json").read_text())
    assert sorted(told["sites"]) == ["site-1", "site-2", "site-3"]


def test_pictures_are_prepared_once_for_all_networks():
    asked = []

    def load(indices):
        asked.append(list(indices))
        return torch.zeros(len(indices), 1)

    held = ensemble.held(Pictures(1000, load))
    assert held.count == ensemble.MOST_IMAGES
    for _ in range(3):
        held.load(range(4))
    assert asked == [[0, 1, 3, 5]]
