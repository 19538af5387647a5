"""Noise on shared statistics: as much as is said, recorded, and refused where it could not be what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from networks import make_network, tune
from safetensors.torch import load_file

from hf_datavec import manifest, noise


@pytest.fixture
def trained(tmp_path) -> Path:
    """A base, and a tuned network that says how it was trained."""
    base = make_network("test_resnet", tmp_path / "base")
    tune(base, tmp_path / "tuned", seed=1)
    record = {"settings": {"batch_size": 32}, "examples": {"cat": 300, "dog": 400, "owl": 300}}
    (tmp_path / "tuned/training.json").write_text(json.dumps(record))
    return tmp_path


def statistics(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / "vector.safetensors").items() if "running" in name}


def test_the_record_follows_from_the_weight_and_epsilon():
    found = noise.describe(channels=1000, epsilon=2.0, weight=0.01)
    assert found.sensitivity == pytest.approx(2 * 0.01 * noise.BOUND * math.sqrt(2000))
    rho = found.sensitivity**2 / (2 * found.sigma**2)
    assert rho + 2 * math.sqrt(rho * math.log(1 / found.delta)) == pytest.approx(2.0)


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.997])
@pytest.mark.parametrize(("images", "last"), [(640, 32), (650, 10), (642, 2), (641, 32), (32, 32), (33, 32)])
def test_no_image_weighs_more_in_a_running_average_than_said(momentum, images, last):
    # The weight of an image of the last batch of each epoch, by averaging as a BatchNorm layer does.
    steps, weighed = images // 32 + (0 < images % 32 == last), 0.0
    for _ in range(200):
        for step in range(1, steps + 1):
            weighed = (1 - momentum) * weighed + (momentum / last if step == steps else 0.0)
    said = noise.largest_weight(images, 32, momentum)
    assert weighed <= said * (1 + 1e-9)
    # A smaller last batch is counted as if it were no step of its own, so a little too much may be said.
    assert said == pytest.approx(weighed, rel=0.3)


def test_less_epsilon_more_weight_and_more_channels_ask_for_more_noise():
    usual = {"channels": 100, "epsilon": 1.0, "weight": 0.01}
    sigma = noise.describe(**usual).sigma
    for change in ({"epsilon": 0.5}, {"weight": 0.02}, {"channels": 200}):
        assert noise.describe(**{**usual, **change}).sigma > sigma
    assert noise.largest_weight(200, 32, 0.1) > noise.largest_weight(1000, 32, 0.1)


def test_noise_is_normal_and_comes_from_the_operating_system(monkeypatch):
    drawn = noise.gaussian(20000)
    assert drawn.dtype == torch.float64
    assert abs(float(drawn.mean())) < 0.05
    assert float(drawn.var()) == pytest.approx(1.0, abs=0.06)
    assert float((drawn.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.01)
    for extreme in (b"\0", b"\xff"):
        monkeypatch.setattr(noise.os, "urandom", lambda count, extreme=extreme: extreme * count)
        assert bool(torch.isfinite(noise.gaussian(3)).all())
    assert noise.gaussian(0).shape == (0,)


def test_a_network_that_forgets_faster_gets_more_noise(tmp_path, run):
    sigmas = []
    for kind in ("resnet", "mobilenet_v2"):  # a tenth of the average is replaced in each step, and 0.997 of it
        base = make_network(kind, tmp_path / kind)
        tuned = tune(base, tmp_path / f"{kind}-tuned", seed=1)
        record = {"settings": {"batch_size": 32}, "examples": {"cat": 960}}
        (tuned / "training.json").write_text(json.dumps(record))
        assert run("diff", base, tuned, "--with-statistics", "--noise", "1", "-o", f"{kind}-vector").code == 0
        found = manifest.read(tmp_path / f"{kind}-vector")
        channels = sum(entry.shape[0] for name, entry in found.tensors.items() if name.endswith("running_mean"))
        sigmas.append(found.noise.sigma / math.sqrt(channels))
    assert sigmas[1] / sigmas[0] == pytest.approx(9.97 * (1 - 0.9**30), rel=1e-6)


def test_noise_is_recorded_told_and_never_drawn_twice(trained, run):
    for number in (1, 2):
        options = ("--with-statistics", "--noise", "1e9", "-o", f"v{number}")
        assert run("diff", "base", "tuned", *options).code == 0
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    first, second, exact = (statistics(trained / name) for name in ("v1", "v2", "exact"))
    assert first.keys() == second.keys() == exact.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    record = manifest.read(trained / "v1").noise
    assert record is not None
    assert record.epsilon == 1e9
    assert manifest.read(trained / "exact").noise is None
    card = (trained / "v1/README.md").read_text()
    assert "for epsilon 1e+09 and delta 1e-05 against the change of one image, **given the weights**" in card
    assert "The vector as a whole has no such guarantee." in card
    assert "Gaussian noise" not in (trained / "exact/README.md").read_text()


def test_weights_carry_no_noise(trained, run):
    assert run("diff", "base", "tuned", "--with-statistics", "--noise", "1", "-o", "noised").code == 0
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    noised, exact = (load_file(trained / name / "vector.safetensors") for name in ("noised", "exact"))
    assert all(torch.equal(noised[name], exact[name]) for name in exact if "running" not in name)


def test_little_noise_changes_little_and_much_falls_back_to_the_base(trained, run):
    base = load_file(trained / "base/model.safetensors")
    for epsilon in ("1e11", "0.01"):
        outcome = run("diff", "base", "tuned", "--with-statistics", "--noise", epsilon, "-o", epsilon)
        assert outcome.code == 0, outcome.err
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    little, much, exact = (statistics(trained / name) for name in ("1e11", "0.01", "exact"))
    for name, value in exact.items():
        torch.testing.assert_close(little[name], value, rtol=1e-2, atol=2e-3)
        if name.endswith("running_var"):
            assert bool((base[name] + much[name] > 0).all())


def test_averages_beyond_the_bound_are_shortened_to_it():
    record = noise.describe(channels=8, epsilon=1.0, weight=0.01)
    values = torch.full((8,), 3.0 * noise.BOUND, dtype=torch.float64)
    assert noise._clipped(values, record).tolist() == pytest.approx([noise.BOUND] * 8)
    assert torch.equal(noise._clipped(values / 6, record), values / 6)


@pytest.mark.parametrize(
    ("options", "record", "message"),
    [
        (
            ("--noise", "1"),
            True,
            "error: --noise is for statistics, but none are included\n  hint: add --with-statistics",
        ),
        (
            ("--with-statistics", "--noise", "1"),
            False,
            "error: --noise needs the number of training images and the batch size\n"
            "  hint: they are in the training.json that `hf-datavec finetune` writes",
        ),
        (("--with-statistics", "--noise", "0"), True, "expected a number above 0, got 0"),
    ],
)
def test_noise_that_could_not_be_what_it_says_is_refused(options, record, message, trained, run):
    if not record:
        (trained / "tuned/training.json").unlink()
    outcome = run("diff", "base", "tuned", *options, "-o", "v")
    assert outcome.code == 2
    assert message in outcome.err
    assert not (trained / "v").exists()


def test_fewer_images_than_a_batch_are_refused(trained, run):
    record = {"settings": {"batch_size": 32}, "examples": {"cat": 10}}
    (trained / "tuned/training.json").write_text(json.dumps(record))
    outcome = run("diff", "base", "tuned", "--with-statistics", "--noise", "1", "-o", "v")
    assert outcome.code == 2
    assert "--noise needs at least as many images as a training batch holds, got 10 and 32" in outcome.err
