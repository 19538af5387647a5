"""The linear probe: the head alone, to the bottom of its loss, and then everything."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import LABELS, make_images, make_network, write_recipe
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


def test_merged_least_squares_are_those_of_all_images_however_classes_are_spread(tmp_path, run):
    make_network("test_resnet", tmp_path / "pretrained", labels=("a", "b"))
    assert run("init", "./pretrained", "--labels", ",".join(LABELS), "-o", "base").code == 0
    # One site has no image of the last class, the other ten times as many of it as of the first.
    counts = {"north": dict(zip(LABELS, (12, 7, 0), strict=True)), "south": dict(zip(LABELS, (2, 3, 20), strict=True))}
    for number, (site, each) in enumerate(counts.items()):
        for label, count in each.items():
            for place in (site, "all"):
                folder = make_images(tmp_path / place / f"{site}-{label}", labels=(label,), each=count, seed=number)
                for picture in (folder / label).glob("*.png"):
                    into = tmp_path / place / label
                    into.mkdir(exist_ok=True)
                    picture.rename(into / f"{site}-{picture.name}")
                (folder / label).rmdir()
                folder.rmdir()
    for place in (*counts, "all"):
        options = ("--epochs", "0", "--least-squares", "--device", "cpu")
        assert run("finetune", "./base", f"./{place}", *options, "-o", f"tuned-{place}").code == 0
    assert run("finetune", "./base", "./all", *options, "--target", "6", "-o", "surer").code == 0
    for site in counts:
        asked = ("--share-counts", "--with", "gram", "--images", f"./{site}", "--count", "1000", "--device", "cpu")
        assert run("diff", "./base", f"./tuned-{site}", *asked, "-o", f"vector-{site}").code == 0
        # Nothing but the head has moved, so its second moments are all that is shared.
        (name,) = load_file(tmp_path / f"vector-{site}" / "gram.safetensors")
        assert name.endswith("fc.weight")
        assert (
            "the products of the head's inputs with each other; of"
            in (tmp_path / f"vector-{site}/README.md").read_text()
        )
    merge = {"method": "regmean", "weights": "examples"}
    asked = ("--share-counts", "--with", "gram", "--images", "./all", "--count", "1000", "--device", "cpu")
    assert run("diff", "./base", "./surer", *asked, "-o", "vector-surer").code == 0
    write_recipe(tmp_path / "recipe.yaml", base="./base", vectors=["./vector-north", "./vector-surer"], merge=merge)
    refused = run("merge", "recipe.yaml", "-o", "fused")
    assert refused.code == 2
    assert "aim at different outputs: 3 ('vector-north'), 6 ('vector-surer')" in refused.err
    sites = [f"./vector-{site}" for site in counts]
    write_recipe(tmp_path / "recipe.yaml", base="./base", vectors=sites, merge=merge, recalibrate={"mode": "none"})
    assert run("merge", "recipe.yaml", "-o", "fused").code == 0
    fused, together, north = (
        load_file(tmp_path / place / "model.safetensors")[name] for place in ("fused", "tuned-all", "tuned-north")
    )
    surer = load_file(tmp_path / "surer" / "model.safetensors")[name]
    assert torch.allclose(surer, 2 * together, rtol=1e-5, atol=1e-6 * float(together.abs().max()))
    assert torch.allclose(fused, together, atol=1e-3 * float(together.abs().max()))
    assert not torch.allclose(north, together, atol=0.1 * float(together.abs().max()))


def test_a_target_without_least_squares_is_refused(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=2)
    outcome = run("finetune", "./base", "./images", "--epochs", "0", "--probe-steps", "2", "--target", "5", "-o", "out")
    assert outcome.code == 2
    assert "--target is what --least-squares aim at, which is not given" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--probe-steps", "5"), "--least-squares and --probe-steps both fit the head"),
        (("--class-balanced", "--epochs", "0"), "--least-squares counts every image alike, not every class"),
    ],
)
def test_what_least_squares_cannot_go_with_is_refused(more, problem, tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=2)
    outcome = run("finetune", "./base", "./images", "--least-squares", *more, "-o", "tuned")
    assert outcome.code == 2
    assert problem in outcome.err
    assert not (tmp_path / "tuned").exists()


def test_a_round_of_heads_is_not_merged_with_whole_vectors_by_regmean(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=4)
    ways = {"head": ("--epochs", "0", "--least-squares"), "whole": ("--epochs", "1", "--learning-rate", "0.01")}
    for site, options in ways.items():
        more = ("--batch-size", "4", "--warmup", "0", "--device", "cpu")
        assert run("finetune", "./base", "./images", *options, *more, "-o", f"tuned-{site}").code == 0
        asked = ("--share-counts", "--with", "gram", "--images", "./images", "--device", "cpu")
        assert run("diff", "./base", f"./tuned-{site}", *asked, "-o", f"vector-{site}").code == 0
    merge = {"method": "regmean", "weights": "examples"}
    write_recipe(tmp_path / "recipe.yaml", base="./base", vectors=["./vector-head", "./vector-whole"], merge=merge)
    outcome = run("merge", "recipe.yaml", "-o", "fused")
    assert outcome.code == 2
    assert "'vector-head' lacks those of" in outcome.err
    assert not (tmp_path / "fused").exists()


def test_fewer_images_than_the_head_was_fitted_to_are_told(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=4)
    assert run("finetune", "./base", "./images", "--epochs", "0", "--least-squares", "-o", "tuned").code == 0
    asked = ("--with", "gram", "--images", "./images", "--count", "5", "--device", "cpu")
    outcome = run("diff", "./base", "./tuned", *asked, "-o", "vector")
    assert outcome.code == 0
    assert "the Gram matrix is of 5 of 12 images; --count 12 makes it that of all" in outcome.err
