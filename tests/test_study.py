"""The study: its file is checked as a whole, patients stay on one side, and what is kept gives the same table."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_images, make_network, write_recipe
from PIL import Image
from ruamel.yaml import YAML

from hf_datavec import hub, models, study
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError, InputErrors
from hf_datavec.images import open_images
from hf_datavec.located import parse
from hf_datavec.metrics import Estimate
from hf_datavec.study import comparison, countdown, listing, partition, pictures, results, trivial
from hf_datavec.study import run as run_module
from hf_datavec.study.rounds import FEDAVG
from hf_datavec.study.sections import Study

ROOT = Path(__file__).parent.parent
# Until running statistics have left the base's, so that the public images look like the sites'.
LONG = {"epochs": 30, "learning_rate": 0.01}
MINIMAL = "data: {images: ./images}\nbase: ./pretrained\n"


def problems(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        study.check(parse(text, "study.yaml"))
    errors = caught.value.errors if isinstance(caught.value, InputErrors) else (caught.value,)
    return [str(error) for error in errors]


def test_everything_wrong_in_a_study_is_told_at_once_with_its_place():
    found = problems(
        "data: {images: ./x, lable: y}\nbase: demo\nsites: {make: random, count: 1}\n"
        "merges:\n  - {method: ties, options: {densty: 1}}\n  - {method: summ}\nrestore: [statistc]\nseeds: [0, 0.5]\n"
    )
    assert [message.split("\n")[0] for message in found] == [
        "study.yaml:1:21: data: unknown key 'lable'",
        "study.yaml:3:30: sites.count: expected a number of at least 2, found 1",
        "study.yaml:5:30: merges[0].options: unknown key 'densty'",
        "study.yaml:6:14: merges[1].method: there is no merge method 'summ'",
        "study.yaml:7:11: restore[0]: 'statistc' is not one of none, statistics, moments, relative, repair, tune, auto",
        "study.yaml:8:12: seeds[1]: expected a whole number, found 0.5",
    ]
    hints = [message.rpartition("hint: ")[2] for message in found if "hint" in message]
    assert hints == [
        "did you mean 'label'?",
        "did you mean 'density'?",
        "did you mean 'sum'?",
        "did you mean 'statistics'?",
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("sites: {make: dirichlet}", "sites: make: dirichlet needs 'alpha:'"),
        ("sites: {make: random, column: center}", "sites.column: is for make: column, but this is make: random"),
        ("sites: {count: 3, shares: [1, 2]}", "sites.shares: 2 entries for 3 sites"),
        ("test: {share: 0.2, column: split, values: [test]}", "test: needs either 'share:' or 'column:'"),
        ("public: {share: 0.1, images: ./other}", "public: needs either 'share:' or 'images:'"),
        ("public: {share: 0.9}", "public.share: test and public images leave none for the sites"),
        ("merges: [{scale: 0.5}, {scale: 0.5}]", "merges[1]: 'sum x 0.5' is given twice"),
        ("merges: [{method: fisher}]", "merges[0].method: a study has no images to learn 'fisher' on"),
        ("merges: [{scale: fast}]", "merges[0].scale: expected 'auto' or a finite number, found 'fast'"),
        (
            "merges: [{weights: examples}, {method: mean, weights: examples}]",
            "merges[1].weights: the method 'mean' ignores",
        ),
        ("sites: {count: 2}\nmerges: [{method: krum}]", "merges[0].method: the method 'krum'"),
        ("relay: {merge: {methd: sum}}", "relay.merge: unknown key 'methd'"),
        ("seeds: [1, 1]", "seeds: the seed 1 is given twice"),
        ("heads: {fit: least_squares, steps: 5}", "heads.steps: heads by least squares take no steps"),
        ("budgets: [rounds]", "budgets: 'rounds' are the epochs of all rounds of 'relay:'"),
        ("relay: {rounds: 2}\nbudgets: [rounds]", "budgets: 'rounds' are the epochs of all rounds of 'relay:'"),
        ("start: {}\ntraining: {probe_steps: 5}", "training.probe_steps: would throw away the heads of 'start:'"),
        ("relay: {heads: true}", "relay.heads: needs 'heads:'"),
        ("more_public: [{name: Photos, images: ./x}]", "more_public[0].name: expected lower-case words"),
        ("more_public: [{name: a, images: ./x}, {name: a, images: ./y}]", "more_public[1].name: 'a' is given twice"),
        (
            "more_public: [{name: a, images: ./x}]\nrestore: [none]",
            "more_public: no mode of 'restore:' looks at images",
        ),
        ("heads: {steps: 5, target: 5}", "heads.target: heads by steps aim at no output"),
    ],
)
def test_keys_that_contradict_or_lack_each_other_are_told(lines, said):
    assert any(said in message for message in problems(f"{MINIMAL}{lines}\n"))


def test_the_schema_knows_every_key_of_a_study(run):
    outcome = run("schema", "--study")
    found = json.loads(outcome.out)
    assert found["title"] == "hf-datavec study"
    assert set(found["properties"]) == set(Study.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("study-*.yaml")), ids=lambda path: path.stem)
def test_the_studies_beside_the_recipes_are_right_for_the_parser_and_the_schema(path):
    found = study.load(path)
    assert found.merges[0].method == "auto"
    assert not list(strange_keys(YAML(typ="safe").load(path.read_text()), study.schema(), study.schema()))


def strange_keys(data, part, whole):
    """The keys of data that a JSON Schema does not let in; enough of the standard for a study."""
    options = part.get("anyOf", [part])
    options = [whole["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in options]
    if isinstance(data, list):
        items = next(one["items"] for one in options if one.get("type") == "array")
        for entry in data:
            yield from strange_keys(entry, items, whole)
    elif isinstance(data, dict):
        found = next(one for one in options if one.get("type") == "object")
        for key, value in data.items():
            if key in found.get("properties", {}):
                yield from strange_keys(value, found["properties"][key], whole)
            elif found.get("additionalProperties") is not True:
                yield key
    elif "enum" in options[0] and data not in options[0]["enum"]:
        yield data


def a_table(groups: list[int], labels: list[int]) -> pictures.Table:
    return pictures.Table(None, tuple(f"class {label}" for label in labels), tuple(f"p{group}" for group in groups))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=200, max_size=400),
    st.integers(0, 2**31),
    st.sampled_from(
        [
            {"make": "random", "count": 3},
            {"make": "random", "count": 3, "shares": [4, 1, 1]},
            {"make": "dirichlet", "count": 3, "alpha": 0.5},
            {"make": "scanners", "count": 2, "scanners": ["faint", "inverted"]},
        ]
    ),
)
def test_no_patient_is_on_two_sides_and_no_image_is_lost(rows, seed, sites):
    table = a_table([group for group, _ in rows], [label for _, label in rows])
    wanted = Study.model_validate({"data": {"images": "x"}, "base": "y", "sites": sites})
    try:
        found = partition.divide(wanted, table, seed)
    except InputError:  # a part with too few images is refused, not made
        return
    assert sorted(place for places in found.parts.values() for place in places) == list(range(len(rows)))
    sides = {name: {table.groups[place] for place in places} for name, places in found.parts.items()}
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == len(set(table.groups))
    assert partition.divide(wanted, table, seed) == found


def test_a_small_alpha_gives_sites_other_classes_and_a_large_one_the_same():
    table = a_table(list(range(2000)), [index % 4 for index in range(2000)])

    def skew(alpha: float) -> float:
        wanted = Study.model_validate(
            {"data": {"images": "x"}, "base": "y", "sites": {"make": "dirichlet", "alpha": alpha}}
        )
        found = partition.divide(wanted, table, 1)
        shares = [
            np.bincount([place % 4 for place in found.parts[site]], minlength=4) / len(found.parts[site])
            for site in found.sites
        ]
        return float(np.std(shares, axis=0).mean())

    assert skew(100.0) < 0.03 < 0.15 < skew(0.2)


def test_sites_of_a_column_refuse_a_patient_who_is_at_two_of_them(clinic):
    wanted = Study.model_validate(
        {
            "data": {"images": "./images", "group": "patient"},
            "base": "y",
            "sites": {"make": "column", "column": "centre"},
        }
    )
    table = pictures.open_table(wanted.data, clinic)
    assert partition.divide(wanted, table, 0).sites == ("north", "south")
    moved = clinic / "images" / "metadata.csv"
    lines = moved.read_text().splitlines()
    patient = lines[1].split(",")[2]
    other = next(line for line in lines[2:] if line.split(",")[2] == patient)
    lines[lines.index(other)] = other.replace("north", "elsewhere").replace("south", "elsewhere")
    moved.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"the group '{patient}' has two values in 'centre'"):
        partition.divide(wanted, pictures.open_table(wanted.data, clinic), 0)


def test_sites_of_a_column_get_names_that_are_safe_folders():
    values = ["../up", "test", "Graz", ".hidden"]
    wanted = Study.model_validate(
        {"data": {"images": "x"}, "base": "y", "sites": {"make": "column", "column": "centre"}}
    )

    class WithCentres(pictures.Table):
        def column(self, name: str) -> tuple[str, ...]:
            return tuple(values[index % len(values)] for index in range(200))

    table = WithCentres(None, ("a",) * 200, tuple(map(str, range(200))))  # type: ignore[arg-type]
    assert partition.divide(wanted, table, 0).sites == ("_.._up", "_.hidden", "Graz", "site-test")
    values[3] = "..:up"
    with pytest.raises(InputError, match="would have one folder"):
        partition.divide(wanted, table, 0)


def test_a_scanner_shows_the_same_picture_alike_in_every_part():
    table = pictures.open_table(study.sections.Data(images="demo", count=40), Path())
    one = pictures.part(table.images, [3, 7], ["faint", "inverted"])
    other = pictures.part(table.images, [7, 3], ["inverted", "faint"])
    assert np.array_equal(np.asarray(one.image(0)), np.asarray(other.image(1)))
    plain = pictures.part(table.images, [3, 7])
    assert np.array_equal(255 - np.asarray(plain.image(1)), np.asarray(one.image(1)))
    assert len({one.digest, other.digest, plain.digest}) == 3


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(wins, losses):
    from scipy.stats import binomtest

    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert comparison.mcnemar(wins, losses) == pytest.approx(expected, abs=1e-12)


def test_intervals_over_seeds_are_those_of_student():
    from scipy.stats import t

    for count in (2, 3, 5, 11, 12, 40):
        assert comparison.student(count - 1) == pytest.approx(t.ppf(0.975, count - 1), abs=3e-3)
    values = [0.5, 0.7, 0.6]
    found = comparison.over_seeds(values)
    half = t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert (found.value, found.high - found.value) == pytest.approx((0.6, half), abs=1e-4)
    assert math.isnan(comparison.over_seeds([0.5]).low)


def test_a_paired_difference_counts_images_and_draws_whole_patients():
    references = np.array([0, 0, 1, 1, 1, 0])
    right, wrong = np.eye(2)[references], np.eye(2)[1 - references]
    first, second = right.copy(), right.copy()
    second[:2] = wrong[:2]
    first[5] = wrong[5]
    found = comparison.paired(first, second, references, ["a", "a", "b", "b", "c", "d"], seed=0)
    assert (found.only_first, found.only_second) == (2, 1)
    assert found.accuracy.value == pytest.approx(1 / 6)
    alone = comparison.paired(first, second, references, ["all"] * 6, seed=0)
    assert alone.accuracy.low == alone.accuracy.high == pytest.approx(1 / 6)


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """Small pictures of 30 patients at two centres, a pretrained network, and a study of them."""
    make_network("test_resnet", tmp_path / "pretrained", labels=("x", "y"))
    make_images(tmp_path / "raw", each=32)
    rows, images = [("file_name", "label", "patient", "centre")], tmp_path / "images"
    images.mkdir()
    for number, picture in enumerate(sorted((tmp_path / "raw").rglob("*.png"))):
        patient = number % 30
        name = f"{number:03}.png"
        picture.rename(images / name)
        rows.append((name, picture.parent.name, f"p{patient}", "north" if patient < 15 else "south"))
    with (images / "metadata.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    write_study(tmp_path)
    return tmp_path


def write_study(folder: Path, **changed: object) -> None:
    described = {
        "data": {"images": "./images", "label": "label", "group": "patient"},
        "base": "./pretrained",
        "sites": {"make": "random", "count": 2},
        "public": {"share": 0.2},
        "seeds": [0, 1],
        "training": {"epochs": 2, "learning_rate": 0.01},
        "merges": [{"method": "sum", "scale": 0.5}, {"method": "ties"}],
        "restore": ["none", "statistics", "relative"],
        "curve": [0.0, 1.0],
        "trivial": False,
        "federated": {"rounds": 2},
        "relay": {"rounds": 2},
        "heads": {"steps": 20, "rounds": 2},
        "output": "./results",
        **changed,
    }
    (folder / "study.yaml").write_text(json.dumps(described))


def test_a_study_has_every_row_and_its_kept_vectors_give_the_same_table(clinic, run):
    write_study(clinic, trivial=True)
    first = run("study", "study.yaml", "--device", "cpu")
    assert first.code == 0, first.err
    results = clinic / "results"
    text = (results / "README.md").read_text()
    found = json.loads((results / "results.json").read_text())
    names = [row["name"] for row in found["rows"]]
    for name in (
        "single site: mean", "single site: best", "single site, statistics: best", "linear probe, pooled",
        "output ensemble of the sites", "all data pooled, equal epochs", "all data pooled, equal steps",
        "sum x 0.5, none", "ties x 1, relative", "random vectors, statistics", "FedAvg, 2 rounds, moments",
        "sum x 0.5, 2 rounds, statistics", "sum x 0.5, then heads, statistics", "heads alone, averaged",
        "sum x 0.5, 2 rounds, then heads, statistics", "trivial features, random forest",
        "ensemble of the sites, logits", "ensemble of the sites, logits, statistics",
    ):  # fmt: skip
        assert name in names
        assert f"| {name} |" in text
    # What matters comes first, and only that is printed.
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Study", "## Settings", "## Conclusion", "## Rows that matter", "## Appendix", "### All other rows",
        "### Random control", "### Paired tests on the same test images",
    ]  # fmt: skip
    assert all(f"| {name} |" in first.out for name in ("sum x 0.5, statistics", "trivial features, random forest"))
    assert "sum x 0.5, none" not in first.out
    # Every label has its brightness, which needs no network; the report says so.
    trivial_row = found["rows"][names.index("trivial features, random forest")]
    assert (trivial_row["kind"], trivial_row["seeds"]["accuracy"]) == ("control", [1.0, 1.0])
    assert "A network that is not clearly above them may only use a shortcut." in text
    # Two seeds are shown as they are; of their interval, 13 times their spread, nobody learns anything.
    assert "±" not in text
    assert re.search(r"\| sum x 0\.5, statistics \| [\d.]+ \([\d.]+, [\d.]+\) \|", text)
    assert found["intervals"] is None
    assert all(row["mean"]["accuracy"]["low"] is None for row in found["rows"])
    for row in found["rows"]:
        assert row["pooled_images"]["low"] <= row["pooled_images"]["value"] <= row["pooled_images"]["high"]
        assert row["pooled_images"]["value"] == pytest.approx(np.mean(row["seeds"]["accuracy"]), abs=0.02)
        pooled = row["differences"]["all data pooled, equal epochs"]["seeds"]
        bar = found["rows"][names.index("all data pooled, equal epochs")]["seeds"]["accuracy"]
        assert [one["value"] for one in pooled] == pytest.approx(np.subtract(row["seeds"]["accuracy"], bar))
    assert re.search(r"seed 1: row \d+ of \d+ \(ties x 1, relative\), about \d+ s left", first.err)
    assert all(len(row["seeds"]["accuracy"]) == 2 for row in found["rows"])
    best, mean = (found["rows"][names.index(f"single site: {which}")]["seeds"] for which in ("best", "mean"))
    assert all(one >= other for one, other in zip(best["balanced_accuracy"], mean["balanced_accuracy"], strict=True))
    page = (results / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in names)
    assert page.count("src='data:image/png;base64,") == 8
    assert "http" not in re.sub(r"base64,[^']*", "", page)
    curves = json.loads((results / "curves.json").read_text())
    assert [curve["name"] for curve in curves["scales"]] == ["none", "statistics", "relative"]
    assert np.median(curves["drift"]["statistics"]) < np.median(curves["drift"]["none"])
    digests = {path: path.read_bytes() for path in sorted(results.rglob("vector.safetensors"))}
    for kept in results.rglob("predictions/*"):
        kept.unlink()
    again = run("study", "study.yaml", "--device", "cpu")
    assert again.code == 0
    assert "trains for" in first.err
    assert "trains for" not in again.err
    assert (results / "README.md").read_text() == text
    assert {path: path.read_bytes() for path in sorted(results.rglob("vector.safetensors"))} == digests


def test_a_row_is_what_merge_gives_for_its_recipe(clinic, run):
    write_study(
        clinic, seeds=[3], federated=None, relay=None, heads=None, restore=["none"], merges=[{"method": "ties"}]
    )
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    folder = clinic / "results" / "seed-3"
    assert run("merge", folder / "recipes" / "ties_x_1__none.yaml", "-o", "fused").code == 0
    assert_predicted_by(clinic / "fused", folder, "ties_x_1__none", clinic)


def test_auto_chooses_in_a_study_what_a_merge_chooses_on_its_public_images(clinic, run):
    only = {"federated": None, "relay": None, "heads": None, "seeds": [3], "training": LONG}
    write_study(clinic, **only, restore=["auto"], merges=[{"method": "auto"}])
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    folder = clinic / "results" / "seed-3"
    table = pictures.open_table(study.load(clinic / "study.yaml").data, clinic)
    (clinic / "public").mkdir()
    for number, place in enumerate(json.loads((folder / "parts.json").read_text())["public"]["images"]):
        table.images.image(place).save(clinic / "public" / f"{number:03}.png")
    # The kept recipe holds what was chosen; this one leaves all of it open again.
    kept = YAML(typ="safe").load((folder / "recipes" / "auto__auto.yaml").read_text())
    vectors = [one if isinstance(one, str) else one["vector"] for one in kept["vectors"]]
    restore = {"mode": "auto", "images": str(clinic / "public")}
    recipe = {"base": kept["base"], "vectors": vectors, "merge": {"method": "auto"}, "recalibrate": restore}
    path = write_recipe(folder / "recipes" / "on-images.yaml", **recipe)
    outcome = run("merge", path, "-o", "fused")
    assert outcome.code == 0, outcome.err
    assert "candidates the ensemble of the sites' networks gives" in outcome.err
    assert_predicted_by(clinic / "fused", folder, "auto__auto__", clinic)


def test_rows_of_learning_from_the_ensemble_are_what_merge_gives_for_their_recipes(clinic, run, monkeypatch):
    # After so few epochs the sites' statistics fit no images, and nothing is learned on those of another kind.
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", math.inf)
    only = {"federated": None, "relay": None, "heads": None, "seeds": [3], "budgets": ["epochs"]}
    training = {"epochs": 5, "learning_rate": 0.01}
    distil = {"epochs": 20, "learning_rate": 0.001, "mixup": False}
    # A scale that is too small leaves something to be learned.
    merges = [{"method": "sum", "scale": 0.3}, {"method": "ties"}]
    write_study(clinic, **only, training=training, restore=["statistics"], merges=merges, distil=distil)
    outcome = run("study", "study.yaml", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    found = json.loads((clinic / "results" / "results.json").read_text())["rows"]
    rows = {row["name"]: row["seeds"] for row in found}
    learned, calibrated = "then learned from the ensemble", "then learned from the ensemble, calibrated"
    names = [f"sum x 0.3, {name}, statistics" for name in (learned, calibrated)]
    # Only the first merge learns.
    assert [name for name in rows if learned in name] == names
    plain, after, scaled = (rows[name] for name in ("sum x 0.3, statistics", *names))
    assert after["brier"] != plain["brier"]
    # A temperature changes how sure answers are, not which they are.
    assert after["accuracy"] == scaled["accuracy"]
    assert after["brier"] != scaled["brier"]
    folder = clinic / "results" / "seed-3"
    for name in names:
        slug = partition.slug(name)
        outcome = run("merge", folder / "recipes" / f"{slug}.yaml", "-o", slug)
        assert outcome.code == 0, outcome.err
        # The names of kept files end after 60 letters.
        assert_predicted_by(clinic / slug, folder, f"{slug}__"[:60], clinic)


def assert_predicted_by(fused, folder, row, clinic):
    """Hold the probabilities that a study has kept of a row against those of a fused model."""
    kept = next(path for path in folder.glob("predictions/*.npy") if path.name.startswith(row))
    places = json.loads((folder / "parts.json").read_text())["test"]["images"]
    table = pictures.open_table(study.load(clinic / "study.yaml").data, clinic)
    network = models.load(fused)
    with torch.no_grad():
        pixels = table.images.tensors(network.preprocess, places)
        expected = torch.softmax(network.logits(pixels).double(), 1).numpy()
    assert np.allclose(np.load(kept), expected, atol=1e-6)


def test_fedavg_is_the_mean_of_the_sites_networks_by_image_counts(clinic, run):
    from safetensors.torch import load_file

    write_study(
        clinic,
        seeds=[0],
        relay=None,
        heads=None,
        restore=["none"],
        sites={"make": "random", "count": 2, "shares": [3, 1]},
    )
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    folder = clinic / "results" / "seed-0"
    place = next(folder.glob("rounds/*/round-1"))
    fused, base = load_file(place / "model.safetensors"), load_file(clinic / "results" / "base" / "model.safetensors")
    vectors = [
        load_file(path) for path in sorted(folder.glob(f"vectors/{place.parent.name}/round-1/*/vector.safetensors"))
    ]
    parts = json.loads((folder / "parts.json").read_text())
    sizes = [len(parts[site]["images"]) for site in ("site-1", "site-2")]
    assert sizes[0] > 2 * sizes[1]
    for name in ("conv1.weight", "fc.bias"):
        name = next(one for one in base if one.endswith(name))
        mean = sum(size * vector[name].double() for size, vector in zip(sizes, vectors, strict=True)) / sum(sizes)
        assert torch.allclose(fused[name].double(), base[name].double() + mean, atol=1e-6)
    assert FEDAVG.weights == "examples"


def test_a_round_of_heads_moves_the_head_alone_to_the_mean_of_the_sites_heads(clinic, run):
    from safetensors.torch import load_file

    write_study(clinic, seeds=[0], federated=None, relay=None, restore=["none"])
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    folder = clinic / "results" / "seed-0"
    first, second = (
        load_file(path / "model.safetensors") for path in sorted((folder / "rounds").glob("*-heads-20/round-*"))
    )
    vectors = [load_file(path) for path in sorted(folder.glob("vectors/*-heads-20/round-2/*/vector.safetensors"))]
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.rpartition("fc.")[2] for name in moved} == {"weight", "bias"}
    for name in moved:
        mean = (vectors[0][name].double() + vectors[1][name].double()) / 2
        assert torch.allclose(second[name].double(), first[name].double() + mean, atol=1e-6)
    # After two rounds of merging likewise.
    relayed = folder / "rounds" / "sum_x_0.5-statistics-2"
    merged, headed = (load_file(relayed / place / "model.safetensors") for place in ("round-2", "round-2-heads-20"))
    assert {name for name in merged if not torch.equal(merged[name], headed[name])} == moved


def test_a_round_of_heads_by_least_squares_gives_the_head_of_all_sites_images(clinic, run):
    from safetensors.torch import load_file

    heads = {"fit": "least_squares", "target": 6}
    write_study(clinic, seeds=[0], federated=None, relay=None, restore=["none"], heads=heads)
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    folder = clinic / "results" / "seed-0"
    first, second = (
        load_file(path / "model.safetensors") for path in sorted((folder / "rounds").glob("*-least-squares-6/round-*"))
    )
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.rpartition("fc.")[2] for name in moved} == {"weight", "bias"}
    rows = {row["name"] for row in json.loads((clinic / "results" / "results.json").read_text())["rows"]}
    assert {"sum x 0.5, then heads by least squares, statistics", "heads alone by least squares"} <= rows


def test_rounds_of_full_epochs_begin_with_what_the_sites_have_trained_anyway(clinic, run):
    write_study(
        clinic,
        seeds=[0],
        federated=None,
        relay={"rounds": 2, "epochs": 2, "heads": True},
        heads={"steps": 20, "rounds": 2},
        budgets=["epochs", "rounds"],
        restore=["statistics"],
    )
    outcome = run("study", "study.yaml", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    names = {row["name"] for row in json.loads((clinic / "results" / "results.json").read_text())["rows"]}
    assert {
        "sum x 0.5, 2 rounds of 2 epochs with heads between, statistics",
        "sum x 0.5, 2 rounds of 2 epochs with heads between, then heads, statistics",
        "sum x 0.5, then heads, statistics", "all data pooled, equal epochs", "all data pooled, 4 epochs",
    } <= names  # fmt: skip
    vectors = clinic / "results" / "seed-0" / "vectors"
    trained = {
        str(path.parent.relative_to(vectors)): json.loads(path.read_text())["training"]["epochs"]
        for path in vectors.rglob("datavec.json")
    }
    rounds = {name: epochs for name, epochs in trained.items() if "round-" in name and epochs}
    again = "sum_x_0.5-statistics-each-2-heads-20/round-2"
    assert rounds == {f"{again}/site-1": 2, f"{again}/site-2": 2}
    assert (trained["site-1"], trained["pooled-epochs"], trained["pooled-rounds/4"]) == (2, 2, 4)
    # The second round begins with the first one's fused model and the heads that the sites fitted to it.
    between = clinic / "results" / "seed-0" / "rounds" / again.replace("round-2", "round-1-heads-20")
    base = json.loads((vectors / again / "site-1" / "datavec.json").read_text())["base"]["digest"]
    assert base == open_checkpoint(between).tensors.digest


def test_heads_first_are_what_all_networks_of_a_seed_start_from(clinic, run):
    from safetensors.torch import load_file

    write_study(
        clinic, seeds=[0], federated=None, relay=None, restore=["none"], start={"steps": 20}, budgets=["epochs"],
        heads={"steps": 20},
    )  # fmt: skip
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    results = clinic / "results"
    folder = results / "seed-0"
    base, start = (load_file(place / "model.safetensors") for place in (results / "base", folder / "start"))
    moved = {name for name in base if not torch.equal(base[name], start[name])}
    assert {name.rpartition("fc.")[2] for name in moved} == {"weight", "bias"}
    heads = [load_file(folder / "vectors" / "start" / site / "vector.safetensors") for site in ("site-1", "site-2")]
    for name in moved:
        mean = (heads[0][name].double() + heads[1][name].double()) / 2
        assert torch.allclose(start[name].double(), base[name].double() + mean, atol=1e-6)
    digest = open_checkpoint(folder / "start").tensors.digest
    for name in ("site-1", "site-2", "pooled-epochs"):
        assert json.loads((folder / "vectors" / name / "datavec.json").read_text())["base"]["digest"] == digest
    # Pooled is there without them as well, and every fused row is held against both.
    untouched = json.loads((folder / "vectors" / "pooled-from-base-epochs" / "datavec.json").read_text())
    assert untouched["base"]["digest"] == open_checkpoint(results / "base").tensors.digest
    assert untouched["training"]["epochs"] == 2
    found = json.loads((results / "results.json").read_text())
    both = {"all data pooled, equal epochs", "all data pooled from the base, equal epochs"}
    assert both == {row["name"] for row in found["rows"] if row["kind"] == "pooled"}
    # The head that random vectors keep has a row: here all heads are fitted to the base by as many steps.
    alone = {row["name"]: row["seeds"] for row in found["rows"] if row["kind"] == "control"}
    assert alone["start: averaged heads on the untouched base"] == alone["heads alone, averaged"]
    assert "Random vectors keep the averaged head" in (results / "README.md").read_text()
    assert both <= {test["against"] for test in found["tests"] if test["row"] == "sum x 0.5, then heads, statistics"}
    recipe = {
        "base": str(results / "base"),
        "vectors": [str(folder / "vectors" / "pooled-from-base-epochs")],
        "recalibrate": {"mode": "moments"},
    }
    (clinic / "pooled.yaml").write_text(json.dumps(recipe))
    assert run("merge", "pooled.yaml", "-o", "pooled").code == 0
    assert_predicted_by(clinic / "pooled", folder, "all_data_pooled_from_the_base", clinic)
    # The recipe of a merge gives what the study has measured.
    assert run("merge", folder / "recipes" / "sum_x_0.5__none.yaml", "-o", "fused").code == 0
    assert_predicted_by(clinic / "fused", folder, "sum_x_0.5__none", clinic)


def test_kept_recipes_give_their_rows_and_a_second_study_file_keeps_the_first_ones_results(clinic, run):
    make_images(clinic / "photographs", each=8, seed=5)
    make_images(clinic / "drawings", each=4, seed=6)
    only = {"federated": None, "relay": None, "heads": None, "seeds": [0], "budgets": ["epochs"]}
    merges = [{"method": "auto"}, {"method": "ties", "scale": 0.7}]
    named = [{"name": "photographs", "images": "./photographs", "count": 20}]
    write_study(clinic, **only, merges=merges, restore=["statistics", "tune", "auto"], more_public=named)
    outcome = run("study", "study.yaml", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    results, folder = clinic / "results", clinic / "results" / "seed-0"
    found = json.loads((results / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {f"auto, {mode} on photographs" for mode in ("statistics", "tune", "auto")} < set(rows)
    assert rows["auto, statistics"]["seeds"] != rows["auto, statistics on photographs"]["seeds"]
    # A single seed has intervals over patients.
    assert found["intervals"] == "groups of test images"
    for row in found["rows"]:
        accuracy = row["mean"]["accuracy"]
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    chosen = rows["auto, auto"]["chosen"][0]
    assert chosen["method"] == "sum"
    assert 0 < chosen["scale"] <= 1
    assert chosen["mode"] in ("statistics", "relative")
    text = (results / "README.md").read_text()
    assert f"| auto, auto ({chosen['method']} x {chosen['scale']:g}, {chosen['mode']}) |" in text
    assert f"<td>auto, statistics (sum x {chosen['scale']:g})</td>" in (results / "report.html").read_text()
    recipes = {"auto__auto": "__", "auto__tune_on_photographs": "_", "ties_x_0.7__statistics": "-"}
    for number, (name, then) in enumerate(recipes.items()):
        assert run("merge", folder / "recipes" / f"{name}.yaml", "-o", f"fused-{number}").code == 0
        # What follows the name in the file tells the row from others that begin alike.
        assert_predicted_by(clinic / f"fused-{number}", folder, f"{name}{then}", clinic)
    # Another file of the same networks: other merges, other public images under the same name.
    before = {path: path.read_bytes() for path in results.iterdir() if path.is_file()}
    named[0]["images"] = "./drawings"
    write_study(clinic, **only, merges=[{"method": "mean"}], restore=["statistics"], more_public=named)
    (clinic / "study.yaml").rename(clinic / "drawn.yaml")
    again = run("study", "drawn.yaml", "--device", "cpu")
    assert again.code == 0, again.err
    assert "trains for" not in again.err
    assert "results/drawn" in again.err
    assert {path: path.read_bytes() for path in results.iterdir() if path.is_file()} == before
    other = {row["name"] for row in json.loads((results / "drawn" / "results.json").read_text())["rows"]}
    assert "mean x 1, statistics on photographs" in other
    assert not any(name.startswith("auto") for name in other)
    recipe = (folder / "recipes" / "drawn" / "mean_x_1__statistics_on_photographs.yaml").read_text()
    assert str(clinic / "drawings") in recipe


def test_a_folder_that_notes_no_study_file_down_belongs_to_the_next_one(clinic, run):
    described = json.loads((write_note(clinic) / "study.json").read_text())
    del described["study"]
    (clinic / "results" / "study.json").write_text(json.dumps(described))
    assert run_module._place_of("study", note(clinic, "study")) == ""
    assert run_module._place_of("other", note(clinic, "other")) == "other"
    assert run_module._place_of("seed-0", note(clinic, "seed-0")) == "study-seed-0"


def note(clinic: Path, stem: str) -> str:
    """The name of the study file that the folder of results was made for."""
    chosen = study.load(clinic / "study.yaml")
    table = pictures.open_table(chosen.data, clinic)
    (clinic / "results").mkdir(exist_ok=True)
    return run_module._note(chosen, table, None, clinic / "results", stem)


def write_note(clinic: Path) -> Path:
    note(clinic, "study")
    return clinic / "results"


def test_without_scikit_learn_the_row_of_trivial_features_is_left_out_and_the_report_says_so(clinic, run, monkeypatch):
    monkeypatch.setattr(trivial, "available", lambda: False)
    only = {"federated": None, "relay": None, "heads": None, "seeds": [0], "budgets": ["epochs"]}
    write_study(clinic, **only, merges=[{"method": "mean"}], restore=["none"], trivial=True)
    outcome = run("study", "study.yaml", "--device", "cpu")
    assert outcome.code == 0
    assert "trivial features, random forest |" not in outcome.out
    assert 'pip install "hf-datavec[study]"' in outcome.out


def test_trivial_features_are_colours_corners_black_borders_and_edges():
    picture = Image.new("RGB", (128, 128), (200, 100, 50))
    picture.paste((0, 0, 0), (0, 0, 64, 128))
    found = trivial.of_picture(picture)
    assert found.shape == (20,)
    assert found[:3] == pytest.approx([100, 50, 25], abs=2)
    assert found[6:9] == pytest.approx([0, 0, 0])
    assert found[9:12] == pytest.approx([200, 100, 50])
    assert found[18] == pytest.approx(0.5, abs=0.02)
    assert found[19] > 0
    assert trivial.of_picture(Image.new("RGB", (9, 9), (7, 7, 7)))[18:].tolist() == [1.0, 0.0]


def test_the_forest_gives_a_label_that_no_site_has_no_probability(tmp_path):
    images = open_images(hub.parse(str(make_images(tmp_path / "images", each=4))))
    train = pictures.part(images, [place for place, label in enumerate(images.labels) if label != "dog"])
    found = trivial.predicted(train, pictures.part(images, range(12)), ("cat", "dog", "owl"), seed=0)
    assert found.sum(1) == pytest.approx(np.ones(12))
    assert not found[:, 1].any()


def test_the_ensemble_of_logits_is_the_softmax_of_the_mean_logits():
    logits = np.random.default_rng(0).normal(0, 3, (3, 5, 4))
    softmax = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    mean = np.exp(logits.mean(0))
    assert np.allclose(listing._mean_of_logits(list(softmax)), mean / mean.sum(1, keepdims=True))
    certain = listing._mean_of_logits([np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])])
    assert np.allclose(certain, 0.5)


def test_cells_show_what_so_many_seeds_can_tell():
    interval = Estimate(0.5, 0.4, 0.61)
    assert results.cell(interval, (0.5,)) == "50.0 (40.0 to 61.0)"
    assert results.cell(comparison.over_seeds([0.5, 0.6]), (0.5, 0.6)) == "55.0 (50.0, 60.0)"
    assert results.cell(comparison.over_seeds([0.5, 0.5, 0.53]), (0.5, 0.5, 0.53)) == "51.0 ± 4.3"
    assert [results.probability(p) for p in (0.00012, 0.001, 0.25)] == ["< 0.001", "0.001", "0.250"]


def test_the_time_left_is_that_of_the_steps_that_are_work():
    left = countdown.Countdown(3, begun=time.monotonic() - 200)
    assert [left.step() for _ in range(3)] == ["about 7 min left", "about 2 min left", "the last one"]
    assert [countdown.shown(seconds) for seconds in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


def test_another_study_is_refused_in_the_same_folder(clinic, run):
    write_study(clinic, seeds=[0], federated=None, relay=None, heads=None)
    assert run("study", "study.yaml", "--device", "cpu").code == 0
    write_study(clinic, seeds=[0], federated=None, relay=None, heads=None, training={"epochs": 3})
    outcome = run("study", "study.yaml", "--device", "cpu")
    assert outcome.code == 2
    assert "holds a study with other training" in outcome.err


def test_a_killed_study_goes_on_and_gives_the_table_of_one_that_was_not(clinic, run):
    write_study(clinic, seeds=[0], federated=None, relay=None, heads=None)
    command = [sys.executable, "-m", "hf_datavec", "study", "study.yaml", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parents[2])}
    for folder in ("vectors/site-1", "predictions"):
        process = subprocess.Popen([*command, "-o", "killed"], cwd=clinic, env=environment, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        give_up = time.monotonic() + 300
        while not (clinic / "killed" / "seed-0" / folder).exists() and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (clinic / "killed" / "results.json").exists()
    assert run("study", "study.yaml", "-o", "killed", "--device", "cpu").code == 0
    assert run("study", "study.yaml", "-o", "whole", "--device", "cpu").code == 0
    assert (clinic / "killed" / "README.md").read_text() == (clinic / "whole" / "README.md").read_text()
