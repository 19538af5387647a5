"""The linear probe: the head alone, to the bottom of its loss, and then everything."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import LABELS, make_images, make_network
from safetensors.torch import load_file

from hf_datavec import hub, models, probe
from hf_datavec.checkpoint import Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import open_images


def test_a_probe_changes_the_head_alone_and_is_the_regression_on_the_features(tmp_path):
    base = make_network("test_resnet", tmp_path / "base")
    images = open_images(hub.parse(str(make_images(tmp_path / "images", each=8))))
    network, checkpoint = models.load(base), open_checkpoint(base)
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    probe.fit(network, checkpoint, images, torch.nn.functional.cross_entropy, steps=50)
    after = network.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "bias"}
    assert len(changed) == 2

    # The same by hand: features of the untouched network, full batches, AdamW, cosine, from zeros.
    fresh = models.load(base)
    seen = []
    head = fresh.module.timm_model.get_classifier()
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        fresh.logits(images.tensors(fresh.preprocess, range(len(images))))
    handle.remove()
    rows = torch.tensor(images.label_rows(LABELS))
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + np.cos(np.pi * step / 50))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(seen[0]), rows).backward()
        optimizer.step()
    found = network.module.timm_model.get_classifier()
    assert torch.allclose(found.weight, head.weight, atol=1e-5)


def test_finetune_starts_from_the_probe(tmp_path, run):
    make_network("test_resnet", tmp_path / "pretrained", labels=("a", "b"))
    make_images(tmp_path / "images", each=4)
    assert run("init", "./pretrained", "--labels", ",".join(LABELS), "-o", "base").code == 0
    heads = []
    for name, more in (("plain", ()), ("probed", ("--probe-steps", "40"))):
        options = ("--epochs", "1", "--learning-rate", "1e-9", "--device", "cpu", *more)
        assert run("finetune", "./base", "./images", "-o", name, *options).code == 0
        tensors = load_file(tmp_path / name / "model.safetensors")
        heads.append(next(value for key, value in tensors.items() if key.endswith("fc.weight")))
    assert heads[0].abs().max() < 1e-6 < heads[1].abs().max()
    assert json.loads((tmp_path / "probed" / "training.json").read_text())["settings"]["probe_steps"] == 40


def test_without_epochs_the_head_alone_is_trained(tmp_path, run):
    make_network("test_resnet", tmp_path / "pretrained", labels=("a", "b"))
    make_images(tmp_path / "images", each=4)
    assert run("init", "./pretrained", "--labels", ",".join(LABELS), "-o", "base").code == 0
    options = ("./base", "./images", "--epochs", "0", "--device", "cpu", "-o", "tuned")
    outcome = run("finetune", *options)
    assert outcome.code == 2
    assert "no epochs and no probe steps: nothing would be trained" in outcome.err
    assert run("finetune", *options, "--probe-steps", "20").code == 0
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert {name.rpartition("fc.")[2] for name in moved} == {"weight", "bias"}


def test_a_head_of_several_layers_is_told(tmp_path):
    base = make_network("test_resnet", tmp_path / "base")
    network, checkpoint = models.load(base), open_checkpoint(base)
    other = next(name for name in checkpoint.records if name.endswith("conv1.weight"))
    two = replace(checkpoint, roles={**checkpoint.roles, other: Role.HEAD})
    images = open_images(hub.parse(str(make_images(tmp_path / "images", each=2))))
    with pytest.raises(InputError, match="is no single linear layer"):
        probe.fit(network, two, images, torch.nn.functional.cross_entropy, steps=1)
