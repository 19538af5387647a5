"""Networks larger than their device: parts wait in slower places, results are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import WITH_BATCH_NORM, make_images, make_network, make_vector, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec import models, offloading, recalibrate
from hf_datavec.errors import InputError
from hf_datavec.recalibrate import Pictures
from hf_datavec.tensors import open_folder


def too_little(folder: Path) -> str:
    """A limit that holds some of a network's weights."""
    return f"{open_folder(folder).nbytes * 6 // 10_000}KB"


@pytest.mark.parametrize("kind", [*WITH_BATCH_NORM, "vit"])
def test_a_network_larger_than_its_memory_gives_the_same_results(kind, tmp_path, monkeypatch):
    folder = make_network(kind, tmp_path / "net")
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pictures = Pictures(9, lambda indices: images[list(indices)], 4)
    whole = models.load(folder)
    monkeypatch.setenv(offloading.LIMIT, too_little(folder))
    parts = models.load(folder)
    away = [name for name, value in parts.module.named_parameters() if value.is_meta]
    assert away, "nothing had to wait elsewhere, so this test would show nothing"
    assert not any(value.is_meta for value in whole.module.parameters())
    torch.testing.assert_close(parts.logits(images), whole.logits(images), rtol=1e-6, atol=1e-6)
    expected, found = recalibrate.statistics(whole, pictures), recalibrate.statistics(parts, pictures)
    assert set(found) == set(expected)
    for name, one in expected.items():
        torch.testing.assert_close(found[name].mean, one.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[name].variance, one.variance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["statistics", "relative", "repair"])
def test_a_merge_restores_and_measures_a_network_larger_than_its_memory(mode, tmp_path, run, monkeypatch):
    base = make_network("test_resnet", tmp_path / "base")
    for number, site in enumerate("ab", start=1):
        make_vector(base, tune(base, tmp_path / f"t{site}", seed=number), tmp_path / site, with_statistics=True)
    make_images(tmp_path / "images")
    for output, limit in (("whole", "1GB"), ("parts", too_little(base))):
        recipe = write_recipe(
            tmp_path / f"{output}.yaml", base="./base", vectors=["./a", "./b"], output=f"./{output}",
            recalibrate={"images": "./images", "mode": mode}, evaluate={"images": "./images"},
        )  # fmt: skip
        monkeypatch.setenv(offloading.LIMIT, limit)
        outcome = run("merge", recipe, "--device", "cpu")
        assert outcome.code == 0, outcome.err
    whole, parts = (load_file(tmp_path / output / "model.safetensors") for output in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)  # another layout in memory
    one, other = (json.loads((tmp_path / output / "evaluation.json").read_text()) for output in ("whole", "parts"))
    assert one["metrics"]["accuracy"] == other["metrics"]["accuracy"]


def test_what_needs_all_weights_at_once_says_so(tmp_path, monkeypatch):
    folder = make_network("test_resnet", tmp_path / "net")
    monkeypatch.setenv(offloading.LIMIT, too_little(folder))
    network = models.load(folder)
    pictures = Pictures(9, lambda indices: torch.zeros(len(indices), 3, 32, 32))
    with pytest.raises(InputError) as caught:
        recalibrate.tune(network, pictures, None, parameters="all", steps=1, learning_rate=0.1)
    assert str(caught.value) == (
        "tuning needs the whole network on one device, and it does not fit\n"
        "  hint: use a machine with more memory, or raise HF_DATAVEC_MAX_MEMORY"
    )


def test_a_limit_that_is_no_size_is_refused(tmp_path, monkeypatch):
    folder = make_network("test_resnet", tmp_path / "net")
    monkeypatch.setenv(offloading.LIMIT, "much")
    with pytest.raises(InputError) as caught:
        models.load(folder)
    assert str(caught.value) == "HF_DATAVEC_MAX_MEMORY is 'much', expected a size\n  hint: for example 8GB or 500MB"
