"""The pictures as training sees them: in other positions, the same ones for a seed, and as they are unless asked."""

from __future__ import annotations

import json

import pytest
import torch
from launching import assert_goes_on, kill_after_an_epoch
from networks import make_images, make_network

from hf_datavec import examples, hub, models
from hf_datavec.images import open_images

WEIGHTS = "model.safetensors"


def positions(pixels, augment, count):
    """What a picture is shown as in many epochs, by its values."""
    return {tuple(examples.shown(pixels, augment, (0, epoch, 0)).flatten().tolist()) for epoch in range(count)}


def test_turns_are_the_eight_positions_of_a_square_and_four_of_what_is_none():
    square, wide = torch.arange(27.0).reshape(3, 3, 3), torch.arange(18.0).reshape(3, 2, 3)
    every = {
        tuple(torch.rot90(one, turns, (-2, -1)).flatten().tolist())
        for one in (square, square.flip(-1))
        for turns in range(4)
    }
    assert positions(square, "turns", 200) == every
    assert len(every) == 8
    flips = {tuple(wide.flip(sides).flatten().tolist()) for sides in ((), (-1,), (-2,), (-1, -2))}
    assert positions(wide, "turns", 200) == flips


@pytest.mark.parametrize("augment", examples.AUGMENTS)
def test_a_key_always_draws_the_same_and_another_epoch_or_image_or_seed_another(augment):
    pixels = torch.rand(3, 16, 12, generator=torch.Generator().manual_seed(0))
    before = pixels.clone()
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(4)]
    first, again = ([examples.shown(pixels, augment, key) for key in keys] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(pixels, before)
    assert all(one.shape == pixels.shape for one in first)
    different = len({tuple(one.flatten().tolist()) for one in first})
    assert {"none": different == 1, "turns": different == 4, "crops": different > 50}[augment]


def test_a_crop_is_part_of_the_picture_and_at_least_half_of_it():
    steps = torch.arange(100.0)
    pixels = torch.stack([steps[None, :].expand(100, 100), steps[:, None].expand(100, 100), torch.ones(100, 100)])
    for epoch in range(50):
        across, down, ones = examples.shown(pixels, "crops", (0, epoch, 0))
        wide, high = float(across.max() - across.min()) + 1, float(down.max() - down.min()) + 1
        assert float(across.min()) >= 0
        assert float(across.max()) <= 99.001
        assert 0.48 <= wide * high / 100**2 <= 1
        assert wide == pytest.approx(high, abs=1)  # its own proportions
        torch.testing.assert_close(ones, torch.ones(100, 100))


def test_examples_are_shown_anew_in_each_epoch_and_kept_as_they_are(tmp_path):
    network = models.load(make_network("test_resnet", tmp_path / "base"))
    images = open_images(hub.parse(str(make_images(tmp_path / "images", each=2))))
    rows = images.label_rows(network.labels)
    plain, turned = (examples.dataset(network, images, rows, augment, seed=0) for augment in ("none", "turns"))
    kept = [plain[index]["pixel_values"] for index in range(len(plain))]
    seen = []
    for epoch in range(6):
        turned.epoch = epoch
        for index, pixels in enumerate(kept):
            example = turned[index]
            assert example["labels"] == rows[index]
            assert torch.equal(example["pixel_values"], examples.shown(pixels, "turns", (0, epoch, index)))
        seen.append(turned[0]["pixel_values"])
    assert any(not torch.equal(seen[0], other) for other in seen)
    batch = examples.collate([turned[0], turned[1]])
    assert batch["pixel_values"].shape == (2, *kept[0].shape)
    assert batch["labels"].tolist() == rows[:2]


def test_finetune_shows_pictures_as_it_is_told_and_says_so(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=4)
    weights = {}
    for name, more in {"plain": (), "none": ("--augment", "none"), "turns": ("--augment", "turns")}.items():
        outcome = run("finetune", "base", "images", "-o", name, "--epochs", 1, "--device", "cpu", *more)
        assert outcome.code == 0, outcome.err
        weights[name] = (tmp_path / name / WEIGHTS).read_bytes()
    assert weights["plain"] == weights["none"] != weights["turns"]
    assert run("diff", "base", "turns", "-o", "vector").code == 0
    assert json.loads((tmp_path / "vector" / "datavec.json").read_text())["training"]["augment"] == "turns"


def test_an_interrupted_training_goes_on_with_the_positions_that_it_would_have_had(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=12)
    options = ["--epochs", "8", "--batch-size", "4", "--device", "cpu", "--augment", "crops"]
    kill_after_an_epoch(["finetune", "base", "images", "-o", "tuned", *options], tmp_path, "tuned")
    assert_goes_on(run, tmp_path, options)
