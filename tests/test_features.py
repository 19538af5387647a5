"""Sums of the base's features: how they travel, what they reveal, and the head of all sites' images made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_people import Person, consortium, online
from networks import LABELS, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file, save_file

from hf_datavec import hub, models
from hf_datavec import manifest as manifests
from hf_datavec.images import open_images
from hf_datavec.linear_head import FeatureSums, leave_one_site_out
from hf_datavec.second_moments import REVEALED
from hf_datavec.tensors import open_file
from hf_datavec.vector import open_vector

WEIGHTS = "model.safetensors"
SITES = ("a", "b", "c")
HEAD = {"tensors": "fc\\..*", "method": "ridge_head", "scale": 1}
MERGE = {"method": "sum", "scale": 0, "overrides": [HEAD]}


def share(folder: Path, site: str, *more: str, tuned: str = "") -> int:
    from hf_datavec.cli import main

    command = ["diff", f"{folder}/base", f"{folder}/{tuned or f'tuned-{site}'}", "-o", f"{folder}/site-{site}"]
    return main([*command, "--with", "features", "--images", f"{folder}/images-{site}", "--device", "cpu", *more])


@pytest.fixture(scope="module")
def shared_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make_network("test_resnet", folder / "base")
    for seed, site in enumerate(SITES, start=1):
        tune(folder / "base", folder / f"tuned-{site}", seed=seed, step=0.1)
        # One site has no image of the last label.
        make_images(folder / f"images-{site}", labels=LABELS[:2] if site == "b" else LABELS, each=3 + seed, seed=seed)
        assert share(folder, site) == 0
    make_vector(folder / "base", folder / "tuned-a", folder / "plain")
    return folder


@pytest.fixture
def shared(shared_template: Path, tmp_path: Path) -> Path:
    shutil.copytree(shared_template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def features_of(folder: Path, site: str) -> tuple[np.ndarray, list[str]]:
    """What the untouched base's head sees of a site's images, in float64, and their labels."""
    images = open_images(hub.parse(str(folder / f"images-{site}")))
    network = models.load(folder / "base")
    seen: list[torch.Tensor] = []
    network.module.timm_model.get_classifier().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network.logits(images.tensors(network.preprocess, range(len(images))))
    return seen[0].double().numpy(), list(images.labels)


def direct_head(features: np.ndarray, names: list[str], labels: tuple[str, ...], penalty: float) -> np.ndarray:
    """Ridge regression of one-hot labels on the features themselves: weights and a last column of intercepts."""
    targets = np.array([[float(name == label) for label in labels] for name in names])
    centred = features - features.mean(0)
    penalised = np.sqrt(penalty * (centred**2).sum() / features.shape[1]) * np.eye(features.shape[1])
    below = np.zeros((features.shape[1], len(labels)))
    found = np.linalg.lstsq(np.vstack([centred, penalised]), np.vstack([targets - targets.mean(0), below]))[0]
    return np.column_stack([found.T, targets.mean(0) - features.mean(0) @ found])


def test_a_site_shares_the_sums_of_the_untouched_bases_features(shared):
    for site in SITES:
        found = open_vector(shared / f"site-{site}")
        found.verify()
        features, names = features_of(shared, site)
        sums = found.beside.feature_sums(found.labels)
        assert sums.labels == LABELS
        assert sums.counts.tolist() == [names.count(label) for label in LABELS]
        assert found.manifest.second_moments["features"].images == sums.images == len(names)
        extended = np.column_stack([features, np.ones(len(features))])
        np.testing.assert_allclose(sums.products, extended.T @ extended, rtol=1e-5, atol=1e-5)
        for row, label in enumerate(LABELS):
            mine = extended[[name == label for name in names]].sum(0)
            np.testing.assert_allclose(sums.by_label[row], mine, rtol=1e-5, atol=1e-5)
    assert {record.dtype for record in found.beside.tensors["features"].records.values()} == {"F64"}


def test_all_images_count_whatever_the_count_of_other_kinds(shared, run):
    shutil.rmtree(shared / "site-a")
    options = ("--with", "gram,features", "--images", "images-a", "--count", "2", "--device", "cpu")
    outcome = run("diff", "base", "tuned-a", "-o", "site-a", *options)
    assert outcome.code == 0, outcome.err
    found = open_vector(shared / "site-a").manifest.second_moments
    assert {kind: entry.images for kind, entry in found.items()} == {"gram": 2, "features": 12}


@pytest.mark.parametrize("form", ["weights", "state dict"])
def test_a_file_of_weights_is_enough_since_features_are_the_bases(form, shared, run):
    shutil.copytree(shared / "site-a", shared / "before")
    shutil.rmtree(shared / "site-a")
    tensors = load_file(shared / "tuned-a" / WEIGHTS)
    if form == "weights":
        save_file(tensors, shared / "one.safetensors")
    else:
        torch.save(tensors, shared / "one.pth")
    assert share(shared, "a", tuned="one.safetensors" if form == "weights" else "one.pth") == 0
    again, before = (load_file(shared / place / "features.safetensors") for place in ("site-a", "before"))
    assert all(torch.equal(again[name], before[name]) for name in before)
    options = ("--with", "gram,features", "--images", "images-a")
    refused = run("diff", "base", "one.safetensors" if form == "weights" else "one.pth", "-o", "out", *options)
    assert refused.code == 2
    assert "is a file; second moments are measured on a model that can be run" in refused.err


def test_images_with_labels_that_the_vector_lacks_are_refused(shared, run):
    make_images(shared / "strange", labels=("cat", "wolf"), each=1)
    outcome = run("diff", "base", "tuned-a", "-o", "out", "--with", "features", "--images", "strange")
    assert outcome.code == 2
    assert "have labels that the model lacks: 'wolf'" in outcome.err
    assert not (shared / "out").exists()


def test_card_and_inspect_say_what_the_sums_reveal(shared, run):
    assert REVEALED.startswith("The sums of features show class counts, the mean feature of each class")
    assert "a class with one image shows that image's feature vector" in REVEALED
    card = (shared / "site-a" / "README.md").read_text()
    assert f"**{REVEALED}**" in card
    assert "`features.safetensors`: sums of the untouched base's features" in card
    assert REVEALED not in (shared / "plain" / "datavec.json").read_text()
    shown = run("inspect", "site-a", "plain")
    assert f"site-a shares more than its vector: features of 12 images. {REVEALED}" in shown.out
    assert "plain shares" not in shown.out
    told = json.loads(run("inspect", "site-a", "plain", "--json").out)
    assert [one["second_moments"] for one in told["vectors"]] == [{"features": 12}, {}]
    assert "class counts" in run("diff", "--help").out


def test_a_class_with_one_image_shows_that_images_feature(shared):
    """What card and docs warn of, so that it stays true that they must."""
    (only,) = make_images(shared / "images-d", labels=("owl",), each=1, seed=9).rglob("*.png")
    assert only.exists()
    tune(shared / "base", shared / "tuned-d", seed=9)
    assert share(shared, "d") == 0
    features, _ = features_of(shared, "d")
    by_label = load_file(shared / "site-d" / "features.safetensors")["by_label"]
    np.testing.assert_allclose(by_label[2, :-1].numpy(), features[0], rtol=1e-5, atol=1e-6)


# The merge


def fuse(shared: Path, run, *, sites=SITES, merge=MERGE, **more) -> dict[str, torch.Tensor]:
    vectors = [one if isinstance(one, dict) else f"./site-{one}" for one in sites]
    recipe = write_recipe(shared / "r.yaml", base="./base", vectors=vectors, merge=merge, output="./fused", **more)
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    return load_file(shared / "fused" / WEIGHTS)


def test_the_fused_head_is_the_ridge_regression_on_all_sites_images(shared, run):
    fused, base = fuse(shared, run), load_file(shared / "base" / WEIGHTS)
    sums, everything = [], []
    for site in SITES:
        features, names = features_of(shared, site)
        extended = np.column_stack([features, np.ones(len(features))])
        targets = np.array([[float(name == label) for label in LABELS] for name in names])
        sums.append(FeatureSums(LABELS, extended.T @ extended, targets.T @ extended))
        everything.append((features, names))
    penalty, _ = leave_one_site_out(sums)
    features = np.concatenate([found for found, _ in everything])
    expected = 3.0 * direct_head(features, [name for _, names in everything for name in names], LABELS, penalty)
    weight, bias = fused["fc.weight"].double().numpy(), fused["fc.bias"].double().numpy()
    size = abs(expected).max()
    np.testing.assert_allclose(weight, expected[:, :-1], rtol=0, atol=1e-4 * size)
    np.testing.assert_allclose(bias, expected[:, -1], rtol=0, atol=1e-4 * size)
    wanted = features @ expected[:, :-1].T + expected[:, -1]
    np.testing.assert_allclose(features @ weight.T + bias, wanted, rtol=0, atol=1e-4 * abs(wanted).max())
    for name, value in base.items():
        if not name.startswith("fc."):
            assert torch.equal(value, fused[name]), name


def test_sharpness_multiplies_the_heads_outputs(shared, run):
    three = fuse(shared, run)
    shutil.rmtree(shared / "fused")
    six = fuse(shared, run, merge={**MERGE, "overrides": [{**HEAD, "options": {"sharpness": 6.0}}]})
    torch.testing.assert_close(six["fc.weight"], 2 * three["fc.weight"], rtol=1e-5, atol=1e-6)


def test_order_and_weights_change_no_bit_of_the_head(shared, run):
    plain = fuse(shared, run)
    shutil.rmtree(shared / "fused")
    weighed = [{"vector": f"./site-{site}", "weight": weight} for site, weight in (("c", 3.0), ("a", 1.0), ("b", 0.5))]
    found = fuse(shared, run, sites=weighed, merge={"method": "linear", "overrides": [HEAD]})
    torch.testing.assert_close(found["fc.weight"], plain["fc.weight"], rtol=1e-6, atol=1e-7)
    other = next(name for name in plain if name.endswith("conv1.weight"))
    assert not torch.equal(found[other], plain[other])
    shutil.rmtree(shared / "fused")
    again = fuse(shared, run, sites=SITES[::-1])
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_the_lock_makes_the_same_weights_again_and_the_log_tells_the_penalty(shared, run):
    recipe = write_recipe(
        shared / "r.yaml", base="./base", vectors=[f"./site-{site}" for site in SITES], merge=MERGE, output="./fused"
    )
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "note: ridge_head takes the penalty" in outcome.err
    assert "ridge_head" in (shared / "fused" / "README.md").read_text()
    assert run("merge", "fused/recipe.lock.yaml", "-o", "again").code == 0
    assert (shared / "again" / WEIGHTS).read_bytes() == (shared / "fused" / WEIGHTS).read_bytes()


def test_labels_of_sites_are_matched_by_name(shared, run):
    """A site with labels of its own, in another order, and a label that the base lacks."""
    names = ("owl", "bat", "cat")
    tensors = load_file(shared / "tuned-c" / WEIGHTS)
    save_with(shared / "base", shared / "tuned-d", tensors)
    make_images(shared / "images-d", labels=names, each=4, seed=7)
    assert share(shared, "d", "--labels", ",".join(names)) == 0
    fused = fuse(shared, run, sites=("a", "d"))
    labels = (*LABELS, "bat")
    sums = [open_vector(shared / f"site-{site}") for site in ("a", "d")]
    penalty, _ = leave_one_site_out([one.beside.feature_sums(one.labels) for one in sums])
    found = [features_of(shared, site) for site in ("a", "d")]
    everything = np.concatenate([features for features, _ in found]), [name for _, some in found for name in some]
    expected = 3.0 * direct_head(*everything, labels, penalty)
    np.testing.assert_allclose(fused["fc.weight"].numpy(), expected[:, :-1], rtol=0, atol=1e-4 * abs(expected).max())
    np.testing.assert_allclose(fused["fc.bias"].numpy(), expected[:, -1], rtol=0, atol=1e-4 * abs(expected).max())


def test_a_searched_scale_leaves_the_head_as_it_is(shared, run):
    plain = fuse(shared, run)
    shutil.rmtree(shared / "fused")
    make_images(shared / "public", each=3, seed=5)
    search = {"search": [0.0, 0.5], "images": "./public", "metric": "accuracy"}
    found = fuse(shared, run, merge={**MERGE, "scale": search})
    torch.testing.assert_close(found["fc.weight"], plain["fc.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["vit", "test_efficientnet", "resnet"])
def test_networks_of_both_libraries_have_such_heads(kind, tmp_path, run):
    make_network(kind, tmp_path / "base")
    for seed, site in enumerate(SITES[:2], start=1):
        tune(tmp_path / "base", tmp_path / f"tuned-{site}", seed=seed)
        make_images(tmp_path / f"images-{site}", each=3, seed=seed)
        assert share(tmp_path, site) == 0
    sums = [open_vector(tmp_path / f"site-{site}") for site in SITES[:2]]
    heads = [name for name, entry in sums[0].manifest.stored.items() if entry.role.value == "head"]
    pattern = heads[0].rpartition(".")[0].replace(".", r"\.") + r"\..*"
    fused = fuse(tmp_path, run, sites=SITES[:2], merge={**MERGE, "overrides": [{**HEAD, "tensors": pattern}]})
    from hf_datavec.linear_head import pooled_head

    expected = pooled_head([one.beside.feature_sums(one.labels) for one in sums])
    weight = next(fused[name] for name in heads if fused[name].dim() == 2).numpy()
    np.testing.assert_allclose(weight, expected.weights, rtol=1e-5, atol=1e-6)


def test_features_travel_over_the_hub(shared, run):
    expected = fuse(shared, run, sites=("a", "b"))
    with online(), consortium(shared / "hub") as server:
        for name, source in (("base", "base"), ("a", "site-a"), ("b", "site-b")):
            sent = Person("hospital-a", shared / "site", server).run("push", shared / source, f"consortium/{name}")
            assert sent.returncode == 0, sent.stderr
        coordinator = Person("coordinator", shared / "coordinator", server)
        coordinator.folder.mkdir()
        sections = {"vectors": ["consortium/a", "consortium/b"], "output": "./fused", "merge": MERGE}
        recipe = write_recipe(coordinator.folder / "r.yaml", base="consortium/base", **sections)
        for command in ("plan", "merge"):
            done = coordinator.run(command, recipe)
            assert done.returncode == 0, done.stderr
    found = load_file(shared / "coordinator" / "fused" / WEIGHTS)
    torch.testing.assert_close(found["fc.weight"], expected["fc.weight"], rtol=0, atol=0)


# What cannot be merged


def refused(shared: Path, run, *, merge=MERGE, vectors=("./site-a", "./site-b"), command: str = "plan") -> str:
    recipe = write_recipe(shared / "r.yaml", base="./base", vectors=list(vectors), merge=merge, output="./fused")
    outcome = run(command, recipe)
    assert outcome.code == 2, outcome.err
    assert not (shared / "fused").exists()
    return outcome.err


def test_a_site_without_features_is_refused(shared, run):
    told = refused(shared, run, vectors=["./site-a", "./plain", {"model": "./tuned-b"}])
    for name in ("plain", "tuned-b"):
        assert (
            f"error: the method 'ridge_head' needs the sites' sums of features, but '{name}' brings none\n"
            "  hint: the site can add them: hf-datavec diff --with features --images IMAGES\n"
        ) in told


def test_tensors_that_are_no_head_are_refused_and_so_is_half_a_head(shared, run):
    told = refused(shared, run, merge={"method": "ridge_head"})
    assert "error: the method 'ridge_head' makes heads alone, but the recipe wants" in told
    assert '  hint: name the head alone: overrides: [{tensors: "fc\\\\..*", method: ridge_head, scale: 1}]' in told
    told = refused(shared, run, merge={**MERGE, "overrides": [{**HEAD, "tensors": "fc\\.weight"}]})
    assert "error: the method 'ridge_head' makes whole heads, but 'fc.bias' falls to another method" in told
    weight = {**HEAD, "tensors": "fc\\.weight", "options": {"sharpness": 5.0}}
    told = refused(shared, run, merge={**MERGE, "overrides": [weight, HEAD]})
    assert "is given different options for the tensors of one head" in told


def test_a_damaged_file_of_features_is_refused(shared, run):
    path = shared / "site-a" / "features.safetensors"
    whole = load_file(path)
    save_file({**whole, "products": whole["products"] * 1.5}, path)
    assert f"'{path}' is not the file its datavec.json describes: digest" in refused(shared, run, command="merge")
    save_file({name: value.float() for name, value in whole.items()}, path)
    assert f"'{path}' does not fit its vector: 'by_label', 'products'" in refused(shared, run)
    save_file({**whole, "by_label": whole["by_label"][:2].clone()}, path)
    assert f"'{path}' does not fit its vector: 'by_label'" in refused(shared, run)
    save_file({**whole, "more": whole["by_label"].clone()}, path)
    assert f"'{path}' does not fit its vector: 'more'" in refused(shared, run)
    save_file({"by_label": whole["by_label"]}, path)
    assert f"'{path}' does not fit its vector: 'products'" in refused(shared, run)
    path.unlink()
    assert f"there is no file '{path}'" in refused(shared, run)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("products", (0, 1), float("nan")), "tensor 'products' has NaN or infinite values"),
        (("by_label", (1, 2), float("inf")), "tensor 'by_label' has NaN or infinite values"),
        (("products", (-1, -1), 13.0), "the products are of 13 images, the labels of 12, and the manifest says 12"),
        (("by_label", (0, -1), 7.0), "the products are of 12 images, the labels of 15, and the manifest says 12"),
    ],
)
def test_sums_that_are_those_of_no_images_are_refused(wrong, message, shared, run):
    name, place, value = wrong
    path = shared / "site-a" / "features.safetensors"
    whole = load_file(path)
    whole[name][place] = value
    save_file(whole, path)
    # A site whose manifest fits its file, so that nothing but the value is wrong.
    made = manifests.read(shared / "site-a")
    entry = made.second_moments["features"].model_copy(update={"content": open_file(path).digest})
    made.model_copy(update={"second_moments": {"features": entry}}).sealed().write(shared / "site-a")
    assert f"'{path}': {message}" in refused(shared, run, command="merge")


def test_a_network_whose_features_are_not_finite_is_refused_at_the_site(shared, run):
    tensors = load_file(shared / "base" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    save_with(shared / "base", shared / "wild", {**tensors, name: tensors[name] * 1e38})
    outcome = run("diff", "wild", "wild", "-o", "out", "--with", "features", "--images", "images-a")
    assert outcome.code == 2
    assert "NaN or infinite values" in outcome.err
    assert not (shared / "out").exists()
