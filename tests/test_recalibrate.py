"""Restored BatchNorm statistics: exact, independent of batches and processes, and nothing else changes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import environment
from networks import WITH_BATCH_NORM, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from hf_datavec import hub, models, recalibrate
from hf_datavec.errors import RunError
from hf_datavec.evaluate import predict
from hf_datavec.images import open_images
from hf_datavec.recalibrate import Pictures, lockstep
from hf_datavec.recalibrate.pooling import measure, summed

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


def watched(network: models.Network) -> tuple[list[int], list[int]]:
    """The threads in which passes begin, and in which they end, however they end: filled as they do."""
    begun: list[int] = []
    ended: list[int] = []
    real = network.module.forward

    def forward(*some, **more):
        begun.append(threading.get_ident())
        try:
            return real(*some, **more)
        finally:
            ended.append(threading.get_ident())

    network.module.forward = forward
    return begun, ended


def test_all_passes_compute_in_the_thread_that_asks(tmp_path):
    """Else each would have threads of torch of its own, which wake each other."""
    network, images = models.load(make_network("test_resnet", tmp_path / "net")), pictures()
    begun, ended = watched(network)
    recalibrate.statistics(network, Pictures(COUNT, lambda indices: images[list(indices)], 4))
    assert begun == ended == [threading.get_ident()] * 6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_image_ends_the_run_with_its_own_error(tmp_path, error):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    images = pictures()
    begun, ended = watched(network)

    def load(indices):
        if 15 in indices:
            raise error("image 15 is broken")
        return images[list(indices)]

    with pytest.raises(error, match="image 15 is broken"):
        recalibrate.statistics(network, Pictures(COUNT, load, 4))
    # Three passes waited at their first layer for the fourth, which could not begin.
    assert len(begun) == len(ended) == 3
    assert not any(part._forward_pre_hooks for part in network.module.modules())


def test_what_an_ended_pass_says_does_not_hide_why_the_run_failed(tmp_path):
    network, images = models.load(make_network("test_resnet", tmp_path / "net")), pictures()
    real = network.module.forward

    def forward(*some, **more):
        try:
            return real(*some, **more)
        finally:
            raise OSError("no longer there")

    def load(indices):
        if 9 in indices:
            raise ValueError("image 9 is broken")
        return images[list(indices)]

    network.module.forward = forward
    with pytest.raises(ValueError, match="image 9 is broken"):
        recalibrate.statistics(network, Pictures(COUNT, load, 4))
    assert not any(part._forward_pre_hooks for part in network.module.modules())


def modes() -> list[bool]:
    return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]


@pytest.mark.parametrize(
    ("mode", "rounding"),
    # 8 bits: a value that is rounded the other way since a convolution of fewer images rounds otherwise.
    [(partial(torch.autocast, "cpu", torch.bfloat16), 2**-8), (torch.enable_grad, 1e-5), (torch.inference_mode, 1e-5)],
)
def test_modes_of_a_block_stay_in_its_pass(tmp_path, mode, rounding):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    block = network.module.timm_model.layer2
    inside, real = [], block.forward

    def forward(values):
        with mode():
            found = real(values).float()
            inside.append(modes())
        return found.clone()

    block.forward = forward
    whole, before = restored(network, COUNT), modes()
    found = restored(network, 4)
    assert modes() == before
    assert len(inside) == 7
    assert all(one == inside[0] for one in inside)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=rounding, atol=rounding / 10)


def test_statistics_do_not_depend_on_modes_of_the_caller(tmp_path):
    network = models.load(make_network("test_resnet", tmp_path / "net"))
    expected = restored(network, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        before = modes()
        found = restored(network, 4)
        assert modes() == before
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_images_that_take_another_way_through_the_network_are_refused(tmp_path):
    network, images = models.load(make_network("test_resnet", tmp_path / "net")), pictures()
    real = network.module.forward

    def forward(pixel_values):
        if len(pixel_values) < 4:
            real(pixel_values=pixel_values)  # goes on when the others have ended
        return real(pixel_values=pixel_values)

    network.module.forward = forward
    begun, ended = watched(network)
    with pytest.raises(RunError, match="takes another way for some images"):
        recalibrate.statistics(network, Pictures(COUNT, lambda indices: images[list(indices)], 4))
    assert len(begun) == len(ended) == 6


PROCESSES = """
import sys, torch
from pathlib import Path
from hf_datavec import hub, models, processes
from hf_datavec.evaluate import predict
from hf_datavec.images import open_images
from hf_datavec.recalibrate import Pictures, lockstep
from hf_datavec.recalibrate.pooling import measure, summed
from test_recalibrate import COUNT, restored
processes.join(cpu=True)
network = models.load(Path(sys.argv[1]))
images = open_images(hub.parse(sys.argv[2]))
found = {"found": restored(network, 4), "one": restored(network, 4, count=1), "processes": processes.count()}
found["probabilities"] = torch.tensor(predict(network, images, batch_size=4).probabilities)
if processes.is_main():
    torch.save(found, sys.argv[3])
processes.leave()  # a group that is still joined when Python ends can abort it
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_neither_statistics_nor_predictions(processes, tmp_path):
    folder = make_network("test_resnet", tmp_path / "net")
    images = make_images(tmp_path / "images", each=7)  # 21 images: shares are unequal, and none is counted twice
    network = models.load(folder)
    expected = predict(network, open_images(hub.parse(str(images))), batch_size=8).probabilities
    (tmp_path / "run.py").write_text(PROCESSES)
    launch = ["torch.distributed.run", "--nproc_per_node", processes, "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    arguments = [tmp_path / "run.py", folder, images, tmp_path / "out.pt"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    own = environment(PYTHONPATH=path)
    command = [sys.executable, "-m", *map(str, launch + arguments)]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
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


def varied(count: int) -> torch.Tensor:
    """Pictures that differ from each other in brightness and contrast, in the order of their brightness."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    spread = torch.rand(count, 1, 1, 1, generator=generator) + 0.5
    return noise * spread + torch.linspace(-1, 1, count)[:, None, None, None]


def seen_by(network: models.Network, images: torch.Tensor, tolerance: float, batch_size: int = 8):
    looked: list[int] = []

    def load(indices):
        looked.extend(indices)
        return images[list(indices)]

    found = recalibrate.observe(network, Pictures(len(images), load, batch_size, tolerance=tolerance))
    return found, looked


def test_the_standard_error_is_how_far_statistics_of_so_many_images_are_from_those_of_all():
    """Against the formula and against drawing again and again, in one channel of a layer that sees the pictures."""
    draws = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(40, 2, 1, 1, generator=generator)
        values = means + 2 * torch.randn(40, 2, 3, 3, generator=generator)
        draws.append(summed([measure(values[:13]), measure(values[13:])]))
    # One of image means, plus four within images: five in all.
    of_means = torch.stack([one.mean for one in draws]).std(0) / 5**0.5
    of_deviations = torch.stack([one.variance.sqrt() for one in draws]).std(0) / 5**0.5
    expected = max(float((of_means**2).mean() ** 0.5), float((of_deviations**2).mean() ** 0.5))
    errors = torch.tensor([one.error for one in draws])
    assert float(errors.mean()) == pytest.approx(expected, rel=0.1)
    assert [draws[0].images, draws[0].moments.count] == [40, 360]


def test_moments_of_a_layer_are_exact_for_every_shape_and_size_of_its_input():
    generator = torch.Generator().manual_seed(1)
    for shape in ((5, 3), (4, 2, 1, 1), (3, 7, 5), (2, 4, 300, 300), (3, 40, 64, 64), (2, 600, 2, 2)):
        values = torch.randn(shape, generator=generator) * 3 + 50
        found = summed([measure(values[:1]), measure(values[1:])])
        wide = values.double().movedim(1, 0).reshape(shape[1], -1)
        torch.testing.assert_close(found.mean, wide.mean(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.variance, wide.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_restoration_ends_when_the_statistics_have_converged(tmp_path, monkeypatch):
    monkeypatch.setattr(lockstep, "JOINT", 32)
    network, images = models.load(make_network("test_resnet", tmp_path / "net")), varied(160)
    _, everything = seen_by(network, images, 0.0)
    assert sorted(everything) == list(range(160))
    exact, _ = seen_by(network, images, 0.0)
    error_of_all = max(one.error for one in exact.values())
    found, looked = seen_by(network, images, error_of_all * 1.6)
    assert len(looked) == len(set(looked)) == next(iter(found.values())).images
    assert 32 < len(looked) < 160
    # It would not have been enough one group earlier, and every group is a sample of the whole.
    assert max(one.error for one in found.values()) <= error_of_all * 1.6
    fewer, _ = seen_by(network, images[sorted(looked[:-32])], 0.0)
    assert max(one.error for one in fewer.values()) > error_of_all * 1.6
    assert abs(sum(looked) / len(looked) - 79.5) < 3
    for name, one in found.items():
        shift = ((one.mean - exact[name].mean) ** 2 / exact[name].variance).mean().sqrt()
        assert float(shift) < 4 * error_of_all * 1.6, name
    for batch_size in (1, 5, 64):
        other, also = seen_by(network, images, error_of_all * 1.6, batch_size)
        assert also == looked
        for name, one in found.items():
            torch.testing.assert_close(one.mean, other[name].mean, rtol=1e-4, atol=1e-5)


def test_what_was_looked_at_can_be_looked_at_again_in_the_same_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(lockstep, "JOINT", 32)
    network, images = models.load(make_network("test_resnet", tmp_path / "net")), varied(150)
    whole = Pictures(150, lambda indices: images[list(indices)], 8, tolerance=0.5)
    found = recalibrate.observe(network, whole)
    assert next(iter(found.values())).images == 30
    again = recalibrate.observe(network, recalibrate.looked_at(found, whole))
    for name, one in found.items():
        assert torch.equal(one.mean, again[name].mean)
    assert recalibrate.looked_at(recalibrate.observe(network, Pictures(150, whole.load)), whole) is whole
    two = recalibrate.observe(
        network, Pictures(150, whole.load, 8, tolerance=max(o.error for o in found.values()) * 0.8)
    )
    chosen = recalibrate.looked_at(two, Pictures(150, whole.load, 8))
    for name, one in recalibrate.observe(network, chosen).items():
        torch.testing.assert_close(one.mean, two[name].mean, rtol=1e-6, atol=1e-7)


def test_a_merge_says_how_many_images_it_took(study, run, monkeypatch):
    monkeypatch.setattr(lockstep, "JOINT", 6)
    recipe = write_recipe(
        study / "r.yaml", base="./base", vectors=["./site-a"], output="./restored",
        recalibrate={"images": "./images", "tolerance": 1.0},
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "BatchNorm layers were re-estimated on 6 images of `images`, after which they had converged (" in outcome.out
    assert "recalibrate: after 6 of 18 images the statistics had converged (standard error 0." in outcome.err
