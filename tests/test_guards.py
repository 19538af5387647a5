"""What is kept back, noticed late or refused early, so that no wrong result looks like a right one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from networks import digest, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_datavec import uncached, writing
from hf_datavec.errors import InputError
from hf_datavec.vector import TaskVector

WEIGHTS = "model.safetensors"


def test_a_push_never_sends_images_or_counts(study, run):
    make_images(study / "tuned-site-a" / "patients")
    make_images(study / "tuned-site-a", labels=("x",), each=1)
    (study / "tuned-site-a" / "scan.png").write_bytes(b"x")
    (study / "tuned-site-a" / "training.json").write_text('{"examples": {"cat": 3}}')
    assert run("push", "tuned-site-a", "./pushed").code == 0
    assert {path.name for path in (study / "pushed").rglob("*")} == {"config.json", WEIGHTS}


@pytest.mark.parametrize("kind", ["test_resnet", "resnet"])
def test_the_dtype_of_the_recipe_is_what_from_pretrained_loads(kind, tmp_path, run):
    original = load_file(make_network(kind, tmp_path / "full") / WEIGHTS)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in original.items()}
    base = save_with(tmp_path / "full", tmp_path / "base", half)
    config = json.loads((base / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    make_vector(base, tune(base, tmp_path / "tuned", seed=1), tmp_path / "site")
    for dtype in ("float32", "float16"):
        recipe = write_recipe(tmp_path / "r.yaml", base="./base", vectors=["./site"], dtype=dtype, output=f"./{dtype}")
        assert run("merge", recipe).code == 0
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / dtype)
        assert loaded.dtype == getattr(torch, dtype)


def test_a_base_whose_configuration_is_of_another_network_gives_no_result_once_it_is_loaded(study, run):
    other = json.loads((make_network("test_efficientnet", study / "other") / "config.json").read_text())
    ours = json.loads((study / "base" / "config.json").read_text())
    (study / "base" / "config.json").write_text(json.dumps({**ours, "architecture": other["architecture"]}))
    for section in ({"recalibrate": {"images": "./images"}}, {"evaluate": {"images": "./images"}}):
        recipe = write_recipe(study / "r.yaml", base="./base", vectors=["./site-a"], output="./fused", **section)
        outcome = run("merge", recipe)
        assert outcome.code == 2
        assert "does not load whole" in outcome.err or "cannot build the network" in outcome.err
        assert not (study / "fused").exists()


def test_statistics_that_overflow_are_refused(study, run):
    recipe = write_recipe(
        study / "r.yaml", base="./base", vectors=["./site-a"], output="./fused",
        merge={"scale": 1e18}, recalibrate={"images": "./images"},
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert "are not finite in F32" in outcome.err
    assert not (study / "fused").exists()


def test_a_manifest_edited_by_hand_is_refused(study, run):
    path = study / "site-a" / "datavec.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "labels": manifest["labels"][::-1]}))
    outcome = run("merge", "recipe.yaml")
    assert outcome.code == 2
    assert "datavec.json' was changed after it was written" in outcome.err


def test_wrong_images_and_push_targets_are_refused_by_the_plan(study, run):
    (study / "taken").mkdir()
    recipe = write_recipe(
        study / "r.yaml", base="./base", vectors=["./site-a"], output="./fused", push={"repo": "./taken"},
        recalibrate={"images": "./nowhere"}, evaluate={"images": "./nowhere2"},
    )  # fmt: skip
    for command in ("plan", "merge"):
        outcome = run(command, recipe)
        assert outcome.code == 2
        assert [line.partition("/no")[2] for line in outcome.err.splitlines()[:2]] == ["where'", "where2'"]
        assert f"error: output '{study / 'taken'}' already exists" in outcome.err
    assert not (study / "fused").exists()


def test_the_lock_in_a_result_makes_it_again_elsewhere(study, run):
    assert run("merge", "recipe.yaml").code == 0
    refused = run("merge", "fused/recipe.lock.yaml")
    assert refused.code == 2
    assert "no 'output:' is given" in refused.err
    assert run("merge", "fused/recipe.lock.yaml", "-o", "again").code == 0
    assert digest(study / "again" / WEIGHTS) == digest(study / "fused" / WEIGHTS)


def test_two_vectors_of_one_name_are_refused(study, run):
    entries = [{"vector": "./site-a", "name": "A"}, {"vector": "./site-b", "name": "A"}]
    outcome = run("plan", write_recipe(study / "r.yaml", base="./base", vectors=entries))
    assert outcome.code == 2
    assert outcome.err.startswith("error: two vectors are named 'A'\n")


def test_a_weighted_difference_is_allowed_and_an_average_with_negative_weights_is_not(study, run):
    entries = [{"vector": "./site-a", "weight": 1}, {"vector": "./site-b", "weight": -1}]
    for normalize, code in ((False, 0), (True, 2)):
        recipe = write_recipe(
            study / "r.yaml", base="./base", vectors=entries, output=f"./f{code}",
            merge={"method": "linear", "options": {"normalize": normalize}},
        )  # fmt: skip
        assert run("merge", recipe).code == code


def test_an_evaluation_on_one_class_is_valid_json(study, run):
    make_images(study / "one", labels=("dog",))
    outcome = run("evaluate", "base", "one", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["metrics"]["auroc"]["value"] is None
    assert "not defined" in run("evaluate", "base", "one").out


def test_a_training_that_diverges_leaves_nothing(study, run):
    outcome = run("finetune", "base", "images", "-o", "tuned", "--epochs", 3, "--batch-size", 4, "--lr", 1e30)
    assert outcome.code == 2
    assert "the training diverged" in outcome.err
    assert not list(study.glob(".tuned*"))
    assert not (study / "tuned").exists()


def test_a_last_batch_of_one_image_is_no_failure(study, run):
    make_images(study / "seven", labels=("cat",), each=7)
    outcome = run("finetune", "base", "seven", "-o", "tuned", "--epochs", 1, "--batch-size", 2)
    assert outcome.code == 0, outcome.err


def test_several_processes_are_refused_with_one_message(study):
    command = [sys.executable, "-m", "hf_datavec", "plan", "recipe.yaml"]
    done = subprocess.run(command, cwd=study, env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf-datavec was started as 2 processes, but plan runs as one\n")


def test_a_vector_that_was_altered_is_told_even_where_its_values_end_the_merge_first(study, run):
    file = study / "site-b" / "vector.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(content)
    outcome = run("merge", "recipe.yaml")
    assert outcome.code == 2
    assert "vector.safetensors' is not the file its datavec.json describes" in outcome.err
    assert "NaN" not in outcome.err
    assert not (study / "fused").exists()
    assert not list(study.glob(".fused*"))


def test_a_merge_waits_until_all_vectors_are_verified(study, run, monkeypatch):
    def late(*_, **__):
        time.sleep(1)
        raise InputError("too late")

    monkeypatch.setattr(TaskVector, "verify", late)
    outcome = run("merge", "recipe.yaml")
    assert (outcome.code, outcome.err.split("\n")[-2]) == (2, "error: too late")
    assert not (study / "fused").exists()


def test_a_large_result_that_nobody_reads_again_is_the_same_bytes_written_past_the_cache(study, run, monkeypatch):
    assert run("merge", "recipe.yaml").code == 0
    monkeypatch.setattr(writing, "MOST_CACHED", 1000)
    seen = []
    real = uncached.appending
    monkeypatch.setattr(uncached, "appending", lambda *a, cached: seen.append(cached) or real(*a, cached=cached))
    assert run("merge", "recipe.yaml", "-o", "again").code == 0
    assert run("diff", "base", "tuned-site-a", "-o", "vector").code == 0
    assert set(seen) == {False}
    same = [(study / name / "model.safetensors").read_bytes() for name in ("fused", "again")]
    assert same[0] == same[1]
    assert (study / "vector/vector.safetensors").read_bytes() == (study / "site-a/vector.safetensors").read_bytes()
    restoring = write_recipe(
        study / "r.yaml", base="./base", vectors=["./site-a"], output="./restored", recalibrate={"images": "./images"}
    )
    seen.clear()
    assert run("merge", restoring).code == 0
    assert set(seen) == {True}
