"""Coefficients learned by entropy: they follow its slope, are kept whole, and a lock needs nothing to repeat them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from networks import digest, make_images, make_network, make_vector, tune, write_recipe
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from hf_datavec.adaptation import Settings, learn
from hf_datavec.models import load, stored_names

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["test_resnet", "vit"])
def adapting(request, tmp_path: Path) -> Path:
    """A base, two sites that moved it, and public images without labels."""
    make_network(request.param, tmp_path / "base")
    for seed, site in enumerate("ab", start=1):
        tune(tmp_path / "base", tmp_path / f"tuned-{site}", seed=seed, step=0.1)
        make_vector(tmp_path / "base", tmp_path / f"tuned-{site}", tmp_path / f"site-{site}")
    make_images(tmp_path / "classes", each=4)
    (tmp_path / "public").mkdir()
    for path in sorted((tmp_path / "classes").rglob("*.png")):
        shutil.copy(path, tmp_path / "public" / f"{path.parent.name}-{path.name}")
    return tmp_path


def parts_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    base = load_file(folder / "base" / WEIGHTS)
    vectors = [load_file(folder / f"site-{site}" / "vector.safetensors") for site in "ab"]
    return {name: (base[name], torch.stack([vector[name] for vector in vectors])) for name in vectors[0]}


def pixels_of(folder: Path, network) -> torch.Tensor:
    return torch.stack([network.preprocess(Image.open(path)) for path in sorted((folder / "public").iterdir())])


def entropy(network, parts, coefficients, pixels) -> float:
    """The mean entropy with these coefficients, in float64, BatchNorm by the statistics of the batch."""
    live, places = network.module.state_dict(), stored_names(network)
    for name, (base, vectors) in parts.items():
        moved = base.double() + sum(c * v.double() for c, v in zip(coefficients[name], vectors, strict=True))
        live[places[name]].copy_(moved)
    with torch.no_grad():
        chances = network.module(pixel_values=pixels.double()).logits.softmax(1)
    return float(-(chances * chances.log()).sum(1).mean())


def test_the_first_step_goes_against_the_slope_of_the_entropy(adapting):
    parts = parts_of(adapting)
    network = load(adapting / "base")
    pixels = pixels_of(adapting, network)
    found = learn(network, parts, lambda indices: pixels[list(indices)], 12, Settings(1, 0.01, 12, 0))
    naive = load(adapting / "base")
    naive.module.double()
    for layer in naive.module.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
    start = {name: [0.5, 0.5] for name in parts}
    assert found.entropies[0] == pytest.approx(entropy(naive, parts, start, pixels), rel=1e-5)
    checked = 0
    for name in list(parts)[:: max(1, len(parts) // 10)]:
        for site in range(2):
            sides = []
            for step in (1e-4, -1e-4):
                moved = {**start, name: [0.5 + step * (place == site) for place in range(2)]}
                sides.append(entropy(naive, parts, moved, pixels))
            slope = (sides[0] - sides[1]) / 2e-4
            if abs(slope) > 1e-5:  # Adam's first step has the same length whatever the slope, but noise has no sign
                checked += 1
                assert found.coefficients[name][site] == pytest.approx(0.5 - 0.01 * (1 if slope > 0 else -1), abs=1e-4)
    assert checked > 8


def test_entropy_falls_and_the_same_seed_gives_the_same_coefficients(adapting):
    parts = parts_of(adapting)
    results = []
    for seed in (0, 0, 1):
        network = load(adapting / "base")
        pixels = pixels_of(adapting, network)
        results.append(
            learn(network, parts, lambda indices, p=pixels: p[list(indices)], 12, Settings(8, 0.05, 6, seed))
        )
    assert results[0] == results[1] != results[2]
    assert results[0].entropies[-1] < results[0].entropies[0]


def recipe_of(folder: Path, name: str = "recipe.yaml", **more: object) -> Path:
    merge = {"method": "adamerging", "options": {"steps": 4, "learning_rate": 0.05}}
    restore = {"images": "./public", "mode": "none"}
    sections = {"base": "./base", "vectors": ["./site-b", "./site-a"], "output": "./fused", "merge": merge}
    return write_recipe(folder / name, **{**sections, "recalibrate": restore, **more})


def test_the_result_is_the_base_plus_what_the_file_of_coefficients_says(adapting, run):
    outcome = run("merge", recipe_of(adapting))
    assert outcome.code == 0, outcome.err
    told = json.loads((adapting / "fused" / "coefficients.json").read_text())
    assert len(told["entropies"]) == 4
    fused, parts = load_file(adapting / "fused" / WEIGHTS), parts_of(adapting)
    assert set(told["coefficients"]) == set(parts)
    for name, (base, vectors) in parts.items():
        by_site = dict(zip(told["sites"], told["coefficients"][name], strict=True))
        expected = base.double() + by_site["site-a"] * vectors[0].double() + by_site["site-b"] * vectors[1].double()
        torch.testing.assert_close(fused[name].double(), expected, rtol=0, atol=1e-6)
    assert any(row != [0.5, 0.5] for row in told["coefficients"].values())
    text = f"Coefficients for {len(parts)} tensors of 2 sites were learned in 4 steps on 12 unlabelled public images"
    assert text in (adapting / "fused" / "README.md").read_text()
    assert text in outcome.out


def test_the_lock_repeats_every_bit_without_the_images(adapting, run):
    assert run("merge", recipe_of(adapting)).code == 0
    shutil.rmtree(adapting / "public")
    outcome = run("merge", adapting / "fused" / "recipe.lock.yaml", "-o", "again")
    assert outcome.code == 0, outcome.err
    assert digest(adapting / "again" / WEIGHTS) == digest(adapting / "fused" / WEIGHTS)
    lock = adapting / "fused" / "recipe.lock.yaml"
    lock.write_text(lock.read_text().replace("  coefficients:\n", "  coefficients:\n    x: [1, 1]\n"))
    outcome = run("merge", lock, "-o", "no")
    assert outcome.code == 2
    assert "error: the lock's coefficients are not for these" in outcome.err


def test_tensors_with_another_method_are_left_to_it_and_a_scale_counts(adapting, run):
    merge = {
        "method": "adamerging", "options": {"steps": 2}, "scale": 0.5,
        "overrides": [{"tensors": ".*bias", "method": "sum", "scale": 1}],
    }  # fmt: skip
    assert run("merge", recipe_of(adapting, merge=merge)).code == 0
    told = json.loads((adapting / "fused" / "coefficients.json").read_text())["coefficients"]
    fused, parts = load_file(adapting / "fused" / WEIGHTS), parts_of(adapting)
    assert set(told) == {name for name in parts if not name.endswith("bias")}
    name = next(name for name in parts if name.endswith("bias"))
    expected = parts[name][0].double() + parts[name][1].double().sum(0)
    torch.testing.assert_close(fused[name].double(), expected, rtol=0, atol=1e-6)
    name = next(iter(told))
    moved = (fused[name] - parts[name][0]).norm() / (parts[name][1].sum(0).norm())
    assert 0.2 < float(moved) < 0.3  # half of the mean


@pytest.mark.parametrize("adapting", ["test_resnet"], indirect=True)
def test_learning_search_and_restoration_go_together(adapting, run):
    merge = {
        "method": "adamerging", "options": {"steps": 2},
        "scale": {"search": [0.0, 1.0], "images": "./classes", "metric": "accuracy"},
    }  # fmt: skip
    recipe = recipe_of(adapting, merge=merge, recalibrate={"images": "./public"})
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "were learned in 2 steps" in outcome.out
    assert "BatchNorm layers were re-estimated" in outcome.out
    again = run("merge", adapting / "fused" / "recipe.lock.yaml", "-o", "again")
    assert again.code == 0, again.err
    assert digest(adapting / "again" / WEIGHTS) == digest(adapting / "fused" / WEIGHTS)


def test_the_order_in_the_recipe_changes_no_bit_of_what_is_learned(adapting, run):
    for name, order in (("one", ["./site-a", "./site-b"]), ("two", ["./site-b", "./site-a"])):
        assert run("merge", recipe_of(adapting, vectors=order), "-o", name).code == 0
    assert digest(adapting / "one" / WEIGHTS) == digest(adapting / "two" / WEIGHTS)


def test_learning_without_images_is_refused_at_its_place(tmp_path, run):
    (tmp_path / "r.yaml").write_text("base: ./base\nvectors: [./a]\nmerge: {method: adamerging}\n")
    outcome = run("plan", tmp_path / "r.yaml")
    assert outcome.code == 2
    assert outcome.err == (
        "r.yaml:3:17: merge: the method 'adamerging' learns on public images, and there are no 'recalibrate.images'\n"
        "  3 | merge: {method: adamerging}\n"
        "    |                 ^^^^^^^^^^\n"
        "  hint: add recalibrate: {images: ./public-images}, with mode: none for a network without BatchNorm\n"
    )


@pytest.mark.parametrize("adapting", ["vit"], indirect=True)
def test_a_single_image_and_a_rate_that_diverges_are_refused(adapting, run):
    one = recipe_of(adapting, recalibrate={"images": "./public", "mode": "none", "count": 1})
    outcome = run("merge", one)
    assert (outcome.code, "coefficients cannot be learned on 1 image of" in outcome.err) == (2, True)
    far = {"method": "adamerging", "scale": 1e30, "options": {"steps": 2}}
    outcome = run("merge", recipe_of(adapting, merge=far))
    assert (outcome.code, "learning diverged: the coefficients are not finite" in outcome.err) == (1, True), outcome.err
    assert not (adapting / "fused").exists()
