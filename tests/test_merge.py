"""What a fused model is: exact, independent of order and hashing, loadable, whole or absent."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import (
    LABELS,
    NETWORKS,
    TIMM,
    digest,
    make_images,
    make_network,
    make_vector,
    save_with,
    tune,
    write_recipe,
)
from safetensors.torch import load_file

from hf_datavec.models import load

WEIGHTS = "model.safetensors"


def merge(folder: Path, run, *, name: str = "fused", **sections: object) -> dict[str, torch.Tensor]:
    recipe = write_recipe(folder / f"{name}.yaml", base="./base", output=f"./{name}", **sections)
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    return load_file(folder / name / WEIGHTS)


def ulps(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> float:
    """The largest error in units in the last place of the larger of base and expected value."""
    scale = torch.maximum(expected.abs(), base.abs()).numpy()
    return float(np.max(np.abs(found.numpy() - expected.numpy()) / np.spacing(scale), initial=0.0))


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_vector_at_scale_one_gives_back_the_tuned_weights(kind, tmp_path, run):
    base = make_network(kind, tmp_path / "base")
    tuned = load_file(tune(base, tmp_path / "tuned", seed=1) / WEIGHTS)
    make_vector(base, tmp_path / "tuned", tmp_path / "site")
    fused, before = merge(tmp_path, run, vectors=["./site"]), load_file(base / WEIGHTS)
    assert set(fused) == set(tuned)
    for name, tensor in fused.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(tensor, before[name]), name
        else:
            assert ulps(tensor, tuned[name], before[name]) <= 1, name


@pytest.mark.parametrize("kind", ["test_resnet", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_their_type_and_one_vector_gives_back_the_tuned_weights(kind, dtype, tmp_path, run):
    original = load_file(make_network(kind, tmp_path / "full") / WEIGHTS)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in original.items()}
    base = save_with(tmp_path / "full", tmp_path / "base", half)
    tuned = load_file(tune(base, tmp_path / "tuned", seed=1) / WEIGHTS)
    make_vector(base, tmp_path / "tuned", tmp_path / "site")
    fused = merge(tmp_path, run, vectors=["./site"])
    for name, tensor in fused.items():
        if "running" not in name and tensor.is_floating_point():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, tuned[name]), name


def test_the_dtype_of_the_recipe_is_the_dtype_of_the_result(study, run):
    fused = merge(study, run, vectors=["./site-a"], dtype="float16")
    assert {value.dtype for name, value in fused.items() if "tracked" not in name} == {torch.float16}
    assert (
        fused["bn1.num_batches_tracked" if "bn1.num_batches_tracked" in fused else _tracked(fused)].dtype == torch.int64
    )


def _tracked(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("num_batches_tracked"))


def test_the_mean_of_equal_vectors_is_one_of_them(study, run):
    one = merge(study, run, name="one", vectors=["./site-a"])
    for count in (2, 3, 7):
        many = merge(study, run, name=f"mean{count}", vectors=["./site-a"] * count, merge={"method": "mean"})
        assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_order_of_vectors_changes_no_bit(study, run):
    tune(study / "base", study / "tuned-c", seed=3)
    make_vector(study / "base", study / "tuned-c", study / "site-c")
    sites = ["./site-a", "./site-b", "./site-c"]
    for method in ("sum", "mean", "random"):
        results = [
            merge(study, run, name=f"{method}{number}", vectors=list(order), merge={"method": method})
            for number, order in enumerate(itertools.permutations(sites))
        ]
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_the_hash_seed_and_a_second_run_change_no_byte(study):
    contents = set()
    write_recipe(
        study / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], merge={"method": "random"},
        recalibrate={"images": "./images", "batch_size": 5},
    )  # fmt: skip
    for seed in ("0", "1", "1"):
        command = [sys.executable, "-m", "hf_datavec", "merge", "recipe.yaml", "-o", "fused", "--device", "cpu"]
        subprocess.run(command, cwd=study, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        contents.add((study / "fused" / WEIGHTS).read_bytes())
        subprocess.run(["rm", "-r", study / "fused"], check=True)
    assert len(contents) == 1


def test_sum_scale_and_weights_do_what_their_formulas_say(study, run):
    base = load_file(study / "base" / WEIGHTS)
    first, second = (load_file(study / site / "vector.safetensors") for site in ("site-a", "site-b"))
    weighted = [{"vector": "./site-a", "weight": 3}, {"vector": "./site-b", "weight": 1}]
    cases = {
        "sum": ({"method": "sum", "scale": 0.5}, ["./site-a", "./site-b"], lambda a, b: 0.5 * (a + b)),
        "mean": ({"method": "mean"}, ["./site-a", "./site-b"], lambda a, b: (a + b) / 2),
        "linear": ({"method": "linear"}, weighted, lambda a, b: 0.75 * a + 0.25 * b),
        "raw": ({"method": "linear", "options": {"normalize": False}}, weighted, lambda a, b: 3 * a + b),
    }
    for name, (section, vectors, formula) in cases.items():
        fused = merge(study, run, name=name, vectors=vectors, merge=section)
        for tensor in first:
            expected = base[tensor].double() + formula(first[tensor].double(), second[tensor].double())
            torch.testing.assert_close(fused[tensor], expected.float(), rtol=0, atol=0)


def test_example_counts_weigh_the_linear_mean(study, run):
    for site, counts in (("a", {"cat": 1, "dog": 2, "owl": 0}), ("b", {"cat": 9, "dog": 0, "owl": 0})):
        make_vector(study / "base", study / f"tuned-site-{site}", study / f"counted-{site}", examples=counts)
    counted = merge(
        study, run, name="counted", vectors=["./counted-a", "./counted-b"],
        merge={"method": "linear", "weights": "examples"},
    )  # fmt: skip
    given = merge(
        study, run, name="given", merge={"method": "linear"},
        vectors=[{"vector": "./counted-a", "weight": 3}, {"vector": "./counted-b", "weight": 9}],
    )  # fmt: skip
    assert all(torch.equal(counted[name], given[name]) for name in given)


def test_overrides_apply_to_whole_names_and_the_first_match_wins(study, run):
    base, vector = load_file(study / "base" / WEIGHTS), load_file(study / "site-a" / "vector.safetensors")
    overrides = [
        {"tensors": r"fc\.bias", "scale": 0},
        {"tensors": r"fc\..*", "scale": 2},
        {"tensors": r".*", "method": "mean", "scale": 1},
    ]
    fused = merge(study, run, vectors=["./site-a"] * 2, merge={"method": "sum", "overrides": overrides})
    assert torch.equal(fused["fc.bias"], base["fc.bias"])
    double = base["fc.weight"].double() + 2 * 2 * vector["fc.weight"].double()
    assert torch.equal(fused["fc.weight"], double.float())
    other = next(name for name in vector if name.startswith("conv"))
    assert torch.equal(fused[other], (base[other].double() + vector[other].double()).float())


def test_a_tuned_model_in_the_recipe_equals_its_vector(study, run):
    by_vector = merge(study, run, name="v", vectors=["./site-a", "./site-b"])
    by_model = merge(study, run, name="m", vectors=["./site-a", {"model": "./tuned-site-b", "name": "B"}])
    assert all(torch.equal(by_vector[name], by_model[name]) for name in by_vector)


def test_heads_are_matched_by_label_and_the_union_is_fused(tmp_path, run):
    base = make_network("test_resnet", tmp_path / "base", labels=("cat", "dog"))
    kinds = {"one": ("dog", "cat"), "two": ("cat", "newt"), "three": ("asp", "newt")}
    for seed, (name, labels) in enumerate(kinds.items(), start=1):
        other = make_network("test_resnet", tmp_path / f"fresh-{name}", labels=labels, seed=seed)
        tensors = load_file(base / WEIGHTS)
        tensors |= {key: value for key, value in load_file(other / WEIGHTS).items() if key.startswith("fc.")}
        save_with(other, tmp_path / f"tuned-{name}", tensors)
        make_vector(base, tmp_path / f"tuned-{name}", tmp_path / name)
    fused = merge(tmp_path, run, vectors=["./one", "./two", "./three"], merge={"method": "mean"})
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog", "asp", "newt"]
    heads = {name: load_file(tmp_path / f"tuned-{name}" / WEIGHTS)["fc.weight"].double() for name in kinds}
    expected = torch.stack(
        [
            (heads["one"][1] + heads["two"][0]) / 2,  # cat
            heads["one"][0],  # dog, which only one site has
            heads["three"][0],  # asp, which the base lacks: it starts from zero
            (heads["two"][1] + heads["three"][1]) / 2,  # newt
        ]
    )
    torch.testing.assert_close(fused["fc.weight"].double(), expected, rtol=0, atol=1e-7)


def test_a_sharded_base_gives_a_sharded_result_with_the_same_weights(study, run):
    from transformers import AutoModelForImageClassification

    whole = merge(study, run, name="whole", vectors=["./site-a", "./site-b"])
    load(study / "base").module.save_pretrained(study / "sharded", max_shard_size="300KB")
    (study / "sharded" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((study / "sharded").glob("*.safetensors"))) > 1
    recipe = write_recipe(study / "s.yaml", base="./sharded", vectors=["./site-a", "./site-b"], output="./parts")
    assert run("merge", recipe).code == 0
    parts = {key: value for file in (study / "parts").glob("*.safetensors") for key, value in load_file(file).items()}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    reloaded = AutoModelForImageClassification.from_pretrained(study / "parts").state_dict()
    assert all(torch.equal(reloaded[f"timm_model.{name}"], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", [*TIMM, "resnet18", "resnet", "mobilenet_v2", "vit"])
def test_every_way_of_loading_gives_the_same_logits_labels_and_preprocessing(kind, tmp_path, run):
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_model_data_config
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    base = make_network(kind, tmp_path / "base")
    for seed in (1, 2):
        tune(base, tmp_path / f"t{seed}", seed=seed)
        make_vector(base, tmp_path / f"t{seed}", tmp_path / f"v{seed}")
    make_images(tmp_path / "images", side=47)
    merge(tmp_path, run, vectors=["./v1", "./v2"], recalibrate={"images": "./images"}, merge={"method": "mean"})
    picture = Image.fromarray(load_sample_image("flower.jpg"))  # a real photograph, 640 x 427
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "fused").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "fused")
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
        assert pixels.shape[-1] == 32
        if kind in (*TIMM, "resnet18"):
            plain = timm.create_model(f"local-dir:{tmp_path / 'fused'}", pretrained=True).eval()
            transform = create_transform(**resolve_model_data_config(plain), is_training=False)
            torch.testing.assert_close(plain(transform(picture).unsqueeze(0)), logits, rtol=0, atol=1e-5)
    assert [model.config.id2label[row] for row in range(3)] == list(LABELS)
    scores = {
        found["label"]: found["score"]
        for found in pipeline("image-classification", model=str(tmp_path / "fused"))(picture, top_k=3)
    }
    expected = dict(zip(LABELS, logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, abs=1e-5)


def test_networks_without_batch_norm_skip_recalibration_and_say_so(tmp_path, run):
    for kind in ("vit", "convnext"):
        folder = tmp_path / kind
        base = make_network(kind, folder / "base")
        make_vector(base, tune(base, folder / "tuned", seed=1), folder / "site")
        recipe = write_recipe(
            folder / "r.yaml", base="./base", vectors=["./site"], output="./fused", recalibrate={"images": "./none"}
        )
        outcome = run("merge", recipe)
        assert outcome.code == 0, outcome.err
        assert "note: the network has no BatchNorm: recalibration (statistics) is skipped\n" in outcome.err
        assert "The network has no BatchNorm, so no statistics needed restoring." in outcome.out


def test_a_lock_gives_the_same_bytes_and_refuses_a_changed_input(study, run):
    recipe = write_recipe(
        study / "recipe.yaml", base="./base", vectors=["./site-a", {"vector": "./site-b", "name": "B"}],
        output="./fused", recalibrate={"images": "./images"},
    )  # fmt: skip
    assert run("plan", recipe, "--lock").code == 0
    assert run("merge", recipe).code == 0
    original = (study / "fused" / WEIGHTS).read_bytes()
    for lock, output in (("recipe.lock.yaml", "again"), ("fused/recipe.lock.yaml", "third")):
        outcome = run("merge", study / lock, "-o", study / output)
        assert outcome.code == 0, outcome.err
        assert digest(study / output / WEIGHTS) == digest(original)
    tensors = load_file(study / "base" / WEIGHTS)
    save_with(study / "base", study / "base", {**tensors, "fc.bias": tensors["fc.bias"] + 1})
    for site in ("a", "b"):
        subprocess.run(["rm", "-r", study / f"site-{site}"], check=True)
        make_vector(study / "base", study / f"tuned-site-{site}", study / f"site-{site}")
    outcome = run("merge", study / "recipe.lock.yaml", "-o", study / "no")
    assert outcome.code == 2
    assert "'base' (./base) is not what the lock pins" in outcome.err
    assert not (study / "no").exists()


def test_a_lock_refuses_other_calibration_images(study, run):
    recipe = write_recipe(
        study / "recipe.yaml", base="./base", vectors=["./site-a"], output="./fused", recalibrate={"images": "./images"}
    )
    assert run("plan", recipe, "--lock").code == 0
    make_images(study / "images", seed=9)
    outcome = run("merge", study / "recipe.lock.yaml")
    assert outcome.code == 2
    assert "'calibration images' (./images) is not what the lock pins" in outcome.err
    assert not (study / "fused").exists()
