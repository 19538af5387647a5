"""Restored BatchNorm statistics: exact, independent of batches and processes, and nothing else changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import WITH_BATCH_NORM, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from hf_datavec import hub, models, recalibrate
from hf_datavec.evaluate import predict
from hf_datavec.images import open_images
from hf_datavec.recalibrate import Pictures, lockstep

COUNT = 23


def pictures(count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 1.7 + 0.4


def restored(network: models.Network, batch_size: int, count: int = COUNT) -> dict[str, torch.Tensor]:
    own = models.Network(copy.deepcopy(network.module), network.labels, network.preprocess)
    images = pictures(count)
    recalibrate.statistics(own, Pictures(count, lambda indices: images[list(indices)], batch_size))
    return {name: value for name, value in own.module.state_dict().items() if "running" in name}


def one_huge_batch(network: models.Network) -> dict[str, torch.Tensor]:
    """The reference: all images as one batch in train mode, momentum 1, population variance, in float64."""
    module = copy.deepcopy(network.module).double()
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    corrections = {}

    def watch(layer: _BatchNorm, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].numel() // inputs[0].shape[1]
        corrections[layer] = (values - 1) / values

    for layer in layers:
        layer.train()
        layer.momentum = 1.0
        layer.register_forward_pre_hook(watch)
    with torch.no_grad():
        module(pixel_values=pictures().double())
    for layer in layers:
        layer.running_var *= corrections[layer]
    return {name: value for name, value in module.state_dict().items() if "running" in name}


@pytest.mark.parametrize("kind", WITH_BATCH_NORM)
def test_the_statistics_are_those_of_all_images_as_one_batch(kind, tmp_path):
    network = models.load(make_network(kind, tmp_path / "net"))
    expected = one_huge_batch(network)
    for name, value in restored(network, 7).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["test_efficientnet", "resnet"])
def test_the_batch_size_does_not_matter(kind, tmp_path):
    network = models.load(make_network(kind, tmp_path / "net"))
    reference = restored(network, COUNT)
    for batch_size in (1, 4, 22, 100):
        for name, value in restored(network, batch_size).items():
            torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)


def test_images_beyond_the_joint_number_are_pooled_by_the_law_of_total_variance(tmp_path, monkeypatch):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    monkeypatch.setattr(lockstep, "JOINT", 8)
    first = restored(network, 3)
    for name, value in restored(network, 8).items():
        torch.testing.assert_close(value, first[name], rtol=1e-5, atol=1e-6)
    # The first layer sees the pictures themselves, so there pooling groups must equal one pass over all.
    monkeypatch.setattr(lockstep, "JOINT", 512)
    whole = restored(network, 8)
    stem = next(name.rpartition(".")[0] for name in first)
    for part in ("running_mean", "running_var"):
        torch.testing.assert_close(first[f"{stem}.{part}"], whole[f"{stem}.{part}"], rtol=1e-6, atol=1e-7)


def test_modes_momenta_counters_and_weights_are_left_as_they_were(tmp_path):
    network = models.load(make_network("test_efficientnet", tmp_path / "net"))
    network.module.train()
    layers = [layer for layer in network.module.modules() if isinstance(layer, _BatchNorm)]
    layers[0].eval()
    layers[1].momentum = None
    modes = [part.training for part in network.module.modules()]
    momenta = [layer.momentum for layer in layers]
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    images = pictures()
    found = recalibrate.statistics(network, Pictures(COUNT, lambda indices: images[list(indices)], 6))
    assert len(found) == len(layers)
    assert [part.training for part in network.module.modules()] == modes
    assert [layer.momentum for layer in layers] == momenta
    assert not any(layer._forward_pre_hooks for layer in layers)
    for name, value in network.module.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(("running_mean", "running_var")), name


def test_dropout_stays_off_while_statistics_are_measured(tmp_path):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    convolution = next(part for part in network.module.modules() if isinstance(part, torch.nn.Conv2d))
    convolution.register_forward_hook(
        lambda part, inputs, output: torch.nn.functional.dropout(output, 0.5, part.training)
    )
    network.module.train()
    assert all(
        torch.equal(a, b) for a, b in zip(restored(network, 5).values(), restored(network, 5).values(), strict=True)
    )


def test_a_failing_image_ends_the_run_with_its_own_error(tmp_path):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    images = pictures()

    def load(indices):
        if 15 in indices:
            raise ValueError("image 15 is broken")
        return images[list(indices)]

    with pytest.raises(ValueError, match="image 15 is broken"):
        recalibrate.statistics(network, Pictures(COUNT, load, 4))


PROCESSES = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
from hf_datavec import hub, models
from hf_datavec.evaluate import predict
from hf_datavec.images import open_images
from hf_datavec.recalibrate import Pictures, lockstep
from test_recalibrate import COUNT, restored
state = PartialState(cpu=True)
network = models.load(Path(sys.argv[1]))
images = open_images(hub.parse(sys.argv[2]))
found = {"found": restored(network, 4), "one": restored(network, 4, count=1), "processes": state.num_processes}
found["probabilities"] = torch.tensor(predict(network, images, batch_size=4).probabilities)
if state.is_main_process:
    torch.save(found, sys.argv[3])
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_neither_statistics_nor_predictions(processes, tmp_path):
    folder = make_network("test_resnet", tmp_path / "net")
    images = make_images(tmp_path / "images", each=7)  # 21 images: shares are unequal, and none is counted twice
    network = models.load(folder)
    expected = predict(network, open_images(hub.parse(str(images))), batch_size=8).probabilities
    (tmp_path / "run.py").write_text(PROCESSES)
    launch = ["torch.distributed.run", "--nproc_per_node", processes, "--rdzv-backend", "c10d"]
    arguments = ["--rdzv-endpoint", "127.0.0.1:0", tmp_path / "run.py", folder, images, tmp_path / "out.pt"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, launch + arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "out.pt")
    assert result["processes"] == processes
    torch.testing.assert_close(result["probabilities"], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    for count, found in ((COUNT, result["found"]), (1, result["one"])):
        for name, value in restored(network, 4, count=count).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_only_running_statistics_change_in_the_file(study, run):
    recipe = write_recipe(study / "plain.yaml", base="./base", vectors=["./site-a"], output="./plain")
    assert run("merge", recipe).code == 0
    restoring = write_recipe(
        study / "r.yaml", base="./base", vectors=["./site-a"], output="./restored", recalibrate={"images": "./images"}
    )
    outcome = run("merge", restoring)
    assert outcome.code == 0, outcome.err
    assert "BatchNorm layers were re-estimated on 18 images of `images`." in outcome.out
    plain, after = load_file(study / "plain/model.safetensors"), load_file(study / "restored/model.safetensors")
    for name, value in after.items():
        assert torch.equal(value, plain[name]) != name.endswith(("running_mean", "running_var")), name


def test_moments_combine_the_sites_statistics_by_the_law_of_total_variance(tmp_path, run):
    base = make_network("test_resnet", tmp_path / "base")
    tuned = [load_file(tune(base, tmp_path / f"t{seed}", seed=seed) / "model.safetensors") for seed in (1, 2)]
    means = [name for name in tuned[0] if name.endswith("running_mean")]
    variances = [name.replace("running_mean", "running_var") for name in means]
    for tensors in tuned:
        tensors[variances[0]][0] = 0.0  # a dead channel: base + difference can round to below zero
    for number, tensors in enumerate(tuned, start=1):
        save_with(base, tmp_path / f"t{number}", tensors)
        make_vector(base, tmp_path / f"t{number}", tmp_path / f"v{number}", with_statistics=True)
    recipe = write_recipe(
        tmp_path / "r.yaml", base="./base", output="./fused", recalibrate={"mode": "moments"},
        vectors=[{"vector": "./v1", "weight": 3}, {"vector": "./v2", "weight": 1}], merge={"method": "linear"},
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    fused = load_file(tmp_path / "fused/model.safetensors")
    for mean, variance in zip(means, variances, strict=True):
        first, second = (tensors[mean].double() for tensors in tuned)
        expected = 0.75 * first + 0.25 * second
        within = 0.75 * tuned[0][variance].double() + 0.25 * tuned[1][variance].double()
        between = 0.75 * (first - expected) ** 2 + 0.25 * (second - expected) ** 2
        torch.testing.assert_close(fused[mean].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused[variance].double(), within + between, rtol=1e-5, atol=1e-6)
        assert bool((fused[variance] >= 0).all())
