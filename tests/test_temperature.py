"""Temperatures: fitted to labels, to a teacher and to a confidence, and put into a head."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import assert_goes_on, kill_after_an_epoch
from networks import make_images, make_network, make_vector, tune, write_recipe
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from hf_datavec import head_scaling, held_out, hub, models, temperature
from hf_datavec import manifest as manifests
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import open_images
from hf_datavec.scanners import SCANNERS
from hf_datavec.study.pictures import part
from hf_datavec.temperature import LEAST, MOST, fit_ensemble, fit_labels

oracle = settings(max_examples=25, deadline=None, derandomize=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(1, keepdims=True) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]


def some_logits(count: int, classes: int, seed: int = 0) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(count, classes))


def sampled(probabilities: np.ndarray, seed: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(seed).random((len(probabilities), 1))
    return (probabilities.cumsum(1) < drawn).sum(1).clip(max=probabilities.shape[1] - 1)


def loss(log_probabilities: np.ndarray, rows: np.ndarray, found: float) -> float:
    """The mean negative log-likelihood, naively."""
    scaled = log_softmax(log_probabilities / found)
    return -sum(float(scaled[place, row]) for place, row in enumerate(rows)) / len(rows)


@pytest.mark.parametrize("truth", [0.3, 0.8, 1.0, 1.83, 4.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_temperature_that_labels_were_drawn_at_is_found_again(truth, classes):
    logits = some_logits(20_000, classes)
    rows = sampled(softmax(logits / truth))
    assert fit_labels(log_softmax(logits), rows) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("truth", [0.1, 0.5, 1.0, 2.5, 15.0])
def test_the_temperature_of_a_teacher_is_found_exactly(truth):
    logits = some_logits(100, 4)
    teacher = softmax(logits / truth)
    assert fit_ensemble(log_softmax(logits), teacher) == pytest.approx(truth, rel=1e-6)


@oracle
@given(count=st.integers(1, 60), classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_no_other_temperature_has_a_lower_loss(count, classes, seed):
    logits = log_softmax(some_logits(count, classes, seed))
    rows = sampled(softmax(logits / 2), seed)
    found = fit_labels(logits, rows)
    assert LEAST <= found <= MOST
    best = min(loss(logits, rows, one) for one in np.geomspace(LEAST, MOST, 200))
    assert loss(logits, rows, found) <= best + 1e-9
    assert fit_ensemble(logits, np.eye(classes)[rows]) == pytest.approx(found, rel=1e-9)


def test_labels_that_are_all_told_or_all_missed_give_an_end_of_the_range():
    logits = log_softmax(some_logits(50, 3) + 20 * np.eye(3)[np.arange(50) % 3])
    assert fit_labels(logits, logits.argmax(1)) == LEAST
    assert fit_labels(logits, logits.argmin(1)) == MOST


@pytest.mark.parametrize("classes", [1, 3])
def test_logits_that_are_alike_ask_for_no_temperature(classes):
    logits = np.full((7, classes), -math.log(classes))
    rows = np.zeros(7, dtype=np.int64)
    assert fit_labels(logits, rows) == 1
    assert fit_ensemble(logits, np.full((7, classes), 1 / classes)) == 1


def test_a_probability_of_zero_makes_no_nan():
    logits = np.array([[0.0, -math.inf], [-math.inf, 0.0], [-0.1, -2.4]])
    assert LEAST <= fit_labels(logits, np.array([0, 0, 1])) <= MOST
    assert LEAST <= fit_ensemble(logits, np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])) <= MOST


def test_what_is_added_to_all_logits_of_an_image_changes_nothing():
    logits = some_logits(30, 4)
    rows = sampled(softmax(logits / 2))
    shift = np.arange(30.0)[:, None]
    assert fit_labels(logits + shift, rows) == pytest.approx(fit_labels(logits, rows), rel=1e-9)


def test_temperatures_are_averaged_as_factors():
    assert temperature.weighted_mean([2.0, 8.0], [1, 1]) == pytest.approx(4)
    assert temperature.weighted_mean([2.0, 8.0], [300, 100]) == pytest.approx(2 ** (6 / 4))


WEIGHTS = "model.safetensors"


def merged(folder: Path, run, name: str, **restore: object) -> dict:
    """What `merge --json` says of a merge of both sites into a folder of this name."""
    recipe = write_recipe(
        folder / f"{name}.yaml", base="./base", vectors=["./site-a", "./site-b"], output=f"./{name}",
        recalibrate={"images": "./images", **restore}, evaluate={"images": "./images"},
    )  # fmt: skip
    outcome = run("merge", recipe, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def log_probabilities(folder: Path, images: Path) -> np.ndarray:
    network, some = models.load(folder), open_images(hub.parse(str(images)))
    with torch.no_grad():
        logits = network.logits(some.tensors(network.preprocess, range(len(some))))
    return torch.log_softmax(logits.double(), 1).numpy()


def locked(folder: Path) -> str:
    return (folder / "recipe.lock.yaml").read_text()


@pytest.mark.parametrize("kind", ["test_resnet", "resnet", "vit", "mobilenet_v2"])
def test_a_scaled_head_divides_all_logits_by_the_temperature(kind, tmp_path):
    folder = make_network(kind, tmp_path / "net")
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = models.load(folder).logits(pixels).clone()
        digest = head_scaling.scale_folder(folder, 2.5)
        after = models.load(folder).logits(pixels)
    assert digest == open_checkpoint(folder).tensors.digest
    assert torch.allclose(after, before / 2.5, rtol=1e-4, atol=1e-6)
    assert torch.equal(after.argmax(1), before.argmax(1))


def test_a_temperature_that_the_type_of_the_head_cannot_bear_is_refused_and_nothing_is_written(tmp_path):
    folder = make_network("vit", tmp_path / "net")
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="is not finite in"):
        head_scaling.scale_folder(folder, 1e-45)
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_number_scales_the_head_alone_and_every_library_sees_it(study, run):
    plain, scaled = merged(study, run, "plain"), merged(study, run, "scaled", temperature=1.83)
    assert (plain["temperature"], scaled["temperature"]) == (None, 1.83)
    before, after = load_file(study / "plain" / WEIGHTS), load_file(study / "scaled" / WEIGHTS)
    head = set(open_checkpoint(study / "base").named("head"))
    for name in before:
        expected = (before[name].double() / 1.83).float() if name in head else before[name]
        assert torch.equal(after[name], expected), name
    assert scaled["digest"] == open_checkpoint(study / "scaled").tensors.digest != plain["digest"]
    sentence = "Confidence was scaled by temperature 1.83, as the recipe says."
    assert sentence in scaled["restoration"]
    assert sentence in (study / "scaled" / "README.md").read_text()
    expected = log_softmax(log_probabilities(study / "plain", study / "images") / 1.83)
    assert np.allclose(log_probabilities(study / "scaled", study / "images"), expected, atol=1e-5)
    same = ("accuracy", "balanced_accuracy", "macro_f1")
    metrics = [one["evaluation"]["metrics"] for one in (plain, scaled)]
    assert all(metrics[0][name] == metrics[1][name] for name in same)
    assert metrics[0]["brier"] != metrics[1]["brier"]
    picture = sorted((study / "images" / "cat").iterdir())[0]
    classify = pipeline("image-classification", model=str(study / "scaled"))
    by_transformers = max(one["score"] for one in classify(str(picture)))
    model = timm.create_model(f"local-dir:{study / 'scaled'}", pretrained=True).eval()
    pixels = models.preprocess(open_checkpoint(study / "scaled"))(Image.open(picture).convert("RGB"))
    with torch.no_grad():
        by_timm = float(model(pixels[None]).softmax(1).max())
    ours = math.exp(log_probabilities(study / "scaled", study / "images")[0].max())
    assert by_transformers == pytest.approx(ours, abs=1e-4)
    assert by_timm == pytest.approx(ours, abs=1e-4)


def test_labels_give_the_temperature_of_the_least_loss_and_better_scores(study, run):
    plain, scaled = merged(study, run, "plain"), merged(study, run, "scaled", temperature="labels")
    some = open_images(hub.parse(str(study / "images")))
    rows = np.array(some.label_rows(("cat", "dog", "owl")))
    expected = fit_labels(log_probabilities(study / "plain", study / "images"), rows)
    assert scaled["temperature"] == pytest.approx(expected, rel=1e-3)
    assert "fitted to the labels of 18 images of " in scaled["restoration"]
    brier = [one["evaluation"]["metrics"]["brier"]["value"] for one in (plain, scaled)]
    assert brier[1] < brier[0]


def test_the_ensemble_of_the_sites_is_the_teacher_where_there_are_no_labels(study, run):
    make_images(study / "flat", each=4, labels=("all",), seed=3)
    for path in (study / "flat" / "all").iterdir():
        path.rename(study / "flat" / path.name)
    (study / "flat" / "all").rmdir()
    plain = merged(study, run, "plain", images="./flat")
    scaled = merged(study, run, "scaled", images="./flat", temperature="ensemble")
    assert plain["temperature"] is None
    # The vectors leave the sites' statistics out, so their networks run with those of the public images.
    restoring = {"images": "./flat", "mode": "statistics", "tolerance": 0}
    for name in ("site-a", "site-b"):
        sections = {"base": "./base", "vectors": [f"./{name}"], "output": f"./alone-{name}", "recalibrate": restoring}
        assert run("merge", write_recipe(study / f"{name}.yaml", **sections)).code == 0
    sites = [log_probabilities(study / f"alone-{name}", study / "flat") for name in ("site-a", "site-b")]
    expected = fit_ensemble(log_probabilities(study / "plain", study / "flat"), softmax(sum(sites) / 2))
    assert scaled["temperature"] == pytest.approx(expected, rel=1e-3)
    assert "fitted to the ensemble of 2 sites on 4 images of " in scaled["restoration"]


@pytest.mark.parametrize("wanted", ["labels", "ensemble", "auto"])
def test_the_lock_holds_the_temperature_and_gives_the_same_bytes(wanted, study, run):
    first = merged(study, run, "fused", temperature=wanted)
    assert f"temperature: {first['temperature']}\n" in locked(study / "fused")
    outcome = run("merge", "fused/recipe.lock.yaml", "-o", "again", "--json")
    assert outcome.code == 0, outcome.err
    again = json.loads(outcome.out)
    assert (again["digest"], again["temperature"]) == (first["digest"], first["temperature"])
    assert (study / "again" / WEIGHTS).read_bytes() == (study / "fused" / WEIGHTS).read_bytes()


def declare(study: Path, site: str, **options: object) -> None:
    """Make a site's vector anew, with what it declares."""
    import shutil

    shutil.rmtree(study / site)
    make_vector(study / "base", study / f"tuned-{site}", study / site, **options)


def test_the_sites_temperatures_are_averaged_by_their_images(study, run):
    declare(study, "site-a", temperature=2.0, examples={"cat": 300})
    declare(study, "site-b", temperature=8.0, examples={"cat": 100})
    found = merged(study, run, "weighed", temperature="sites", mode="none")
    assert found["temperature"] == pytest.approx(2 ** (6 / 4), rel=1e-3)
    assert "the mean of what 2 sites declared, weighed by their numbers of images" in found["restoration"]
    declare(study, "site-b", temperature=8.0)
    assert merged(study, run, "alike", temperature="sites", mode="none")["temperature"] == 4
    # Without images `auto` goes by what the sites declare.
    recipe = {"base": "./base", "vectors": ["./site-a", "./site-b"], "output": "./auto"}
    write_recipe(study / "auto.yaml", **recipe, recalibrate={"mode": "none", "temperature": "auto"})
    assert json.loads(run("merge", "auto.yaml", "--json").out)["temperature"] == 4


def test_auto_leaves_confidence_alone_without_images_and_declarations_and_says_so(study, run):
    declare(study, "site-a", temperature=2.0)
    recipe = {"base": "./base", "vectors": ["./site-a", "./site-b"], "output": "./fused"}
    write_recipe(study / "auto.yaml", **recipe, recalibrate={"mode": "none", "temperature": "auto"})
    outcome = run("merge", "auto.yaml", "--json")
    assert json.loads(outcome.out)["temperature"] is None
    assert "Confidence was not scaled, since there are no calibration images" in outcome.err


def test_a_site_that_declares_no_temperature_is_named(study, run):
    declare(study, "site-a", temperature=2.0)
    recipe = {"base": "./base", "vectors": ["./site-a", "./site-b"], "output": "./fused"}
    write_recipe(study / "recipe.yaml", **recipe, recalibrate={"mode": "none", "temperature": "sites"})
    for command in ("plan", "merge"):
        outcome = run(command, "recipe.yaml")
        assert outcome.code == 2
        assert "temperature 'sites' needs one of each site, but 'site-b' declares none" in outcome.err
        assert "hf-datavec finetune --hold-out 0.2" in outcome.err


def test_temperatures_are_fitted_for_networks_without_batch_norm_as_well(tmp_path, run):
    base = make_network("vit", tmp_path / "base")
    for number, site in enumerate(("site-a", "site-b"), start=1):
        tune(base, tmp_path / f"tuned-{site}", seed=number)
        make_vector(base, tmp_path / f"tuned-{site}", tmp_path / site)
    make_images(tmp_path / "images")
    found = merged(tmp_path, run, "fused", temperature="labels")
    assert found["temperature"] is not None
    assert "calibration:" in locked(tmp_path / "fused")
    assert "Calibration images: " in (tmp_path / "fused" / "README.md").read_text()
    missing = write_recipe(
        tmp_path / "missing.yaml", base="./base", vectors=["./site-a"], output="./x",
        recalibrate={"images": "./nowhere", "mode": "none", "temperature": "ensemble"},
    )  # fmt: skip
    assert "there is no folder" in run("plan", missing).err


def test_labels_need_labels_and_fits_need_images(study, run):
    for path in sorted((study / "images").rglob("*.png")):
        path.rename(study / "images" / f"{path.parent.name}-{path.name}")
    for label in ("cat", "dog", "owl"):
        (study / "images" / label).rmdir()
    sections = {"base": "./base", "vectors": ["./site-a"], "output": "./fused"}
    write_recipe(study / "recipe.yaml", **sections, recalibrate={"images": "./images", "temperature": "labels"})
    outcome = run("merge", "recipe.yaml")
    assert outcome.code == 2
    assert "have no labels" in outcome.err
    assert "or use temperature: ensemble, which looks at no label" in outcome.err
    write_recipe(study / "recipe.yaml", **sections, recalibrate={"mode": "none", "temperature": "ensemble"})
    outcome = run("plan", "recipe.yaml")
    assert outcome.code == 2
    assert "recalibrate.temperature: 'ensemble' is fitted on public images, and there are no 'images:'" in outcome.err


@pytest.mark.parametrize("value", ["warm", 0, -1.5, True, [1]])
def test_a_temperature_that_is_none_is_refused_in_one_sentence(value, study, run):
    write_recipe(
        study / "recipe.yaml", base="./base", vectors=["./site-a"], output="./fused",
        recalibrate={"mode": "none", "temperature": value},
    )  # fmt: skip
    outcome = run("plan", "recipe.yaml")
    assert outcome.code == 2
    assert "expected 'none', 'labels', 'ensemble', 'sites', 'auto' or a number above 0, found " in outcome.err
    assert outcome.err.count("recipe.yaml:") == 1


def test_a_head_that_is_no_single_linear_layer_is_left_alone_with_a_note(study, run):
    base = open_checkpoint(study / "base")
    assert base.has_linear_head
    distilled = study / "deit"
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, patch_size=16)
    timm.models.save_for_hf(model, distilled, model_config={"label_names": list("abc")}, safe_serialization=True)
    assert not open_checkpoint(distilled).has_linear_head
    tune(distilled, study / "tuned", seed=1)
    make_vector(distilled, study / "tuned", study / "site")
    write_recipe(
        study / "recipe.yaml", base="./deit", vectors=["./site"], output="./fused",
        recalibrate={"mode": "none", "temperature": 2.0},
    )  # fmt: skip
    outcome = run("merge", "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["temperature"] is None
    assert "the head is no single linear layer: temperature (2.0) is skipped" in outcome.err
    assert "Confidence was not scaled, since its head is no single linear layer." in outcome.err
    assert "temperature" not in locked(study / "fused")


def test_a_manifest_without_a_temperature_keeps_its_digest_and_one_with_is_sealed(study):
    plain = manifests.read(study / "site-a")
    assert "temperature" not in (study / "site-a" / "datavec.json").read_text()
    declare(study, "site-a", temperature=1.5)
    found = manifests.read(study / "site-a")
    assert found.temperature == 1.5
    assert found.digest != plain.digest
    assert found.model_copy(update={"temperature": None}).own_digest() == plain.digest
    for wrong in ("0", "-1.0", '"2"', "1e999"):
        text = (study / "site-a" / "datavec.json").read_text()
        (study / "site-b" / "datavec.json").write_text(text.replace('"temperature": 1.5', f'"temperature": {wrong}'))
        with pytest.raises(InputError, match="is damaged: temperature"):
            manifests.read(study / "site-b")


def test_a_share_of_each_class_is_held_out_and_one_of_each_is_trained_on():
    rows = [0] * 20 + [1] * 10 + [2] * 3 + [3]
    trained, held = held_out.split(rows, 0.3, seed=0)
    assert sorted(trained + held) == list(range(len(rows)))
    assert [sum(rows[index] == label for index in held) for label in range(4)] == [6, 3, 1, 0]
    assert held_out.split(rows, 0.3, seed=0) == (trained, held)
    assert held_out.split(rows, 0.3, seed=1) != (trained, held)
    most, _ = held_out.split(rows, 0.99, seed=0)
    assert sorted(rows[index] for index in most) == [0, 1, 2, 3]
    assert held_out.split(rows, 0, seed=0) == (list(range(len(rows))), [])
    with pytest.raises(InputError, match="of 4 images in 2 classes holds out none"):
        held_out.split([0, 0, 1, 1], 0.1, seed=0)


def test_a_site_measures_itself_on_what_it_holds_out_and_its_vector_declares_the_temperature(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=20)
    options = ("--epochs", 2, "--batch-size", 6, "--hold-out", 0.25)
    outcome = run("finetune", "base", "images", "-o", "tuned", *options)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert record["examples"] == {"cat": 15, "dog": 15, "owl": 15}
    assert record["settings"]["hold_out"] == 0.25
    some = open_images(hub.parse(str(tmp_path / "images")))
    rows = some.label_rows(("cat", "dog", "owl"))
    _, held = held_out.split(rows, 0.25, 0)
    found = log_probabilities(tmp_path / "tuned", tmp_path / "images")[held]
    answers = np.array(rows)[held]
    assert record["held_out"]["images"] == 15
    assert record["held_out"]["accuracy"] == pytest.approx((found.argmax(1) == answers).mean())
    assert record["held_out"]["temperature"] == pytest.approx(fit_labels(found, answers), rel=2e-3)
    declared = record["held_out"]["temperature"]
    assert f"held out: 15 images, {100 * record['held_out']['accuracy']:.1f} % right, temperature" in outcome.out
    assert "only" not in outcome.err
    outcome = run("diff", "base", "tuned", "-o", "site")
    assert f"temperature: {declared:g}\n" in outcome.out
    assert manifests.read(tmp_path / "site").temperature == declared
    assert f"temperature {declared:g}, measured on images" in (tmp_path / "site" / "README.md").read_text()
    record["held_out"]["temperature"] = -1
    (tmp_path / "tuned" / "training.json").write_text(json.dumps(record))
    outcome = run("diff", "base", "tuned", "-o", "other")
    assert outcome.code == 2
    assert "training.json has the temperature -1, expected a number above 0" in outcome.err


def test_a_training_without_a_held_out_share_measures_and_declares_nothing(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images")
    assert "held out" not in run("finetune", "base", "images", "-o", "tuned", "--epochs", 1).out
    assert "held_out" not in json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert "temperature" not in run("diff", "base", "tuned", "-o", "site").out
    assert manifests.read(tmp_path / "site").temperature is None
    assert "temperature" not in (tmp_path / "site" / "README.md").read_text()


def test_few_held_out_images_are_warned_of_and_none_or_all_are_refused(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images")
    outcome = run("finetune", "base", "images", "-o", "tuned", "--epochs", 1, "--hold-out", 0.3)
    assert outcome.code == 0, outcome.err
    assert "warning: only 6 images were held out: what they tell is mostly chance" in outcome.err
    outcome = run("finetune", "base", "images", "-o", "none", "--epochs", 1, "--hold-out", 0.01)
    assert outcome.code == 2
    assert "holds out none" in outcome.err
    assert not list(tmp_path.glob(".none*"))
    outcome = run("finetune", "base", "images", "-o", "all", "--hold-out", 1)
    assert outcome.code == 2
    assert "expected a share from 0 to below 1, got 1" in outcome.err


def test_a_training_that_goes_on_holds_out_the_same_images_and_refuses_another_share(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=16)
    options = ["--epochs", "12", "--batch-size", "4", "--device", "cpu", "--hold-out", "0.25"]
    kill_after_an_epoch(["finetune", "base", "images", "-o", "tuned", *options], tmp_path, "tuned")
    other = run("finetune", "base", "images", "-o", "tuned", *options[:-1], "0.5")
    assert other.code == 2
    assert "had other settings, base or images" in other.err
    assert_goes_on(run, tmp_path, options)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("tuned", "whole")]
    assert records[0]["examples"] == records[1]["examples"]
    assert records[0]["held_out"] == pytest.approx(records[1]["held_out"], rel=1e-2)


def test_the_parts_of_a_part_are_those_of_the_whole(tmp_path):
    whole = open_images(hub.parse(str(make_images(tmp_path / "images"))))
    scanned = part(whole, range(18), [next(iter(SCANNERS)) if index % 2 else None for index in range(18)])
    some = scanned.part([3, 8, 17]).part([0, 2])
    assert (some.places, some.labels) == ((3, 17), (whole.labels[3], whole.labels[17]))
    preprocess = models.preprocess(open_checkpoint(make_network("test_resnet", tmp_path / "base")))
    assert torch.equal(some.tensors(preprocess, range(2)), scanned.tensors(preprocess, [3, 17]))
