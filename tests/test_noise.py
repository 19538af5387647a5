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


def test_the_record_follows_from_images_batches_and_epsilon():
    found = noise.describe(channels=1000, epsilon=2.0, images=640, batch_size=32)
    # One image in the last batch of every epoch of 20 steps, each step replacing a tenth.
    weight = sum(0.1 / 32 * 0.9 ** (20 * epoch) for epoch in range(100))
    assert noise.largest_weight(640, 32) == pytest.approx(weight)
    assert found.sensitivity == pytest.approx(2 * weight * math.sqrt(2000))
    rho = found.sensitivity**2 / (2 * found.sigma**2)
    assert rho + 2 * math.sqrt(rho * math.log(1 / found.delta)) == pytest.approx(2.0)


def test_less_epsilon_fewer_images_and_more_channels_ask_for_more_noise():
    usual = {"channels": 100, "epsilon": 1.0, "images": 1000, "batch_size": 32}
    sigma = noise.describe(**usual).sigma
    for change in ({"epsilon": 0.5}, {"images": 200}, {"channels": 200}):
        assert noise.describe(**{**usual, **change}).sigma > sigma


def test_noise_is_recorded_told_and_never_drawn_twice(trained, run):
    for number in (1, 2):
        options = ("--with-statistics", "--noise", "50", "-o", f"v{number}")
        assert run("diff", "base", "tuned", *options).code == 0
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    first, second, exact = (statistics(trained / name) for name in ("v1", "v2", "exact"))
    assert first.keys() == second.keys() == exact.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    record = manifest.read(trained / "v1").noise
    assert record is not None
    assert record.epsilon == 50
    assert manifest.read(trained / "exact").noise is None
    card = (trained / "v1/README.md").read_text()
    assert "for epsilon 50 and delta 1e-05 against the change of one image, **given the weights**" in card
    assert "Gaussian noise" not in (trained / "exact/README.md").read_text()


def test_weights_carry_no_noise(trained, run):
    assert run("diff", "base", "tuned", "--with-statistics", "--noise", "1", "-o", "noised").code == 0
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    noised, exact = (load_file(trained / name / "vector.safetensors") for name in ("noised", "exact"))
    assert all(torch.equal(noised[name], exact[name]) for name in exact if "running" not in name)


def test_little_noise_changes_little_and_much_falls_back_to_the_base(trained, run):
    base = load_file(trained / "base/model.safetensors")
    for epsilon in ("1e9", "0.01"):
        outcome = run("diff", "base", "tuned", "--with-statistics", "--noise", epsilon, "-o", epsilon)
        assert outcome.code == 0, outcome.err
    assert run("diff", "base", "tuned", "--with-statistics", "-o", "exact").code == 0
    little, much, exact = (statistics(trained / name) for name in ("1e9", "0.01", "exact"))
    for name, value in exact.items():
        torch.testing.assert_close(little[name], value, rtol=1e-2, atol=2e-3)
        if name.endswith("running_var"):
            assert bool((base[name] + much[name] > 0).all())


def test_averages_beyond_the_bound_are_shortened_to_it():
    record = noise.describe(channels=8, epsilon=1.0, images=100, batch_size=10)
    values = torch.full((8,), 3.0, dtype=torch.float64)
    assert noise._clipped(values, record).tolist() == pytest.approx([1.0] * 8)
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
