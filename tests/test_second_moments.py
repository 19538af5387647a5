"""Fisher information and Gram matrices: what they are, how they travel, and the methods that weigh by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hub_people import Person, consortium, online
from networks import LABELS, NETWORKS, digest, make_images, make_network, make_vector, tune, write_recipe
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_datavec import curvature
from hf_datavec.methods import as_matrix
from hf_datavec.methods.curvature import fisher_average, regmean
from hf_datavec.models import load, stored_names
from hf_datavec.vector import open_vector

WEIGHTS = "model.safetensors"


def pixels_of(network, images: Path) -> torch.Tensor:
    return torch.stack([network.preprocess(Image.open(path)) for path in sorted(images.rglob("*.png"))])


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_tensor_of_a_file_is_found_in_memory(kind, tmp_path):
    folder = make_network(kind, tmp_path / "model")
    network = load(folder)
    live, names = network.module.state_dict(), stored_names(network)
    stored = load_file(folder / WEIGHTS)
    assert set(names) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(live[names[name]].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("kind", ["test_resnet", "vit"])
def test_fisher_information_is_the_expected_square_of_the_gradient(kind, tmp_path):
    """Differences of log p in place of gradients: the definition, one weight at a time."""
    network = load(make_network(kind, tmp_path / "model"))
    pixels = pixels_of(network, make_images(tmp_path / "images", each=1))
    names = sorted(load_file(tmp_path / "model" / WEIGHTS))
    weights = curvature.parameters(network, {name: name for name in names})
    found = curvature.fisher(network, weights, lambda indices: pixels[list(indices)], 3)
    assert set(found) == set(weights) == {name for name in names if "running" not in name and "tracked" not in name}
    module = network.module.double()
    step = 1e-5
    for name in list(weights)[:: max(1, len(weights) // 12)]:
        place = torch.unravel_index(found[name].argmax(), found[name].shape)
        with torch.no_grad():
            chances = module(pixel_values=pixels.double()).logits.softmax(1)
            sides = []
            for sign in (1, -1):
                weights[name].data[place] += sign * step
                sides.append(module(pixel_values=pixels.double()).logits.log_softmax(1))
                weights[name].data[place] -= sign * step
        slopes = (sides[0] - sides[1]) / (2 * step)
        expected = sum(
            float(chances[image, label] * slopes[image, label] ** 2) for image in range(3) for label in range(3)
        )
        assert float(found[name][place]) == pytest.approx(expected / 3, rel=1e-3, abs=1e-12), name


def naive_patches(inputs: torch.Tensor, layer: torch.nn.Conv2d) -> torch.Tensor:
    """Every patch that a kernel is laid upon, read value by value."""
    padded = torch.nn.functional.pad(inputs, [layer.padding[1]] * 2 + [layer.padding[0]] * 2)
    rows = []
    for picture in padded:
        for top in range(0, picture.shape[1] - layer.kernel_size[0] + 1, layer.stride[0]):
            for left in range(0, picture.shape[2] - layer.kernel_size[1] + 1, layer.stride[1]):
                patch = picture[:, top : top + layer.kernel_size[0], left : left + layer.kernel_size[1]]
                rows.append(patch.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["test_resnet", "vit", "test_efficientnet"])
def test_gram_matrices_are_the_products_of_what_each_layer_is_given(kind, tmp_path):
    network = load(make_network(kind, tmp_path / "model"))
    pixels = pixels_of(network, make_images(tmp_path / "images", each=2))
    names = {live: name for name, live in stored_names(network).items()}
    weights = curvature.parameters(network, {name: name for name in names.values()})
    found = curvature.gram(network, weights, lambda indices: pixels[list(indices)], 6, batch_size=4)
    inputs: dict[str, torch.Tensor] = {}
    layers = {}
    for live, layer in network.module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and as_matrix(tuple(layer.weight.shape)):
            name = names[f"{live}.weight"]
            layers[name] = layer

            def keep(_, given, name=name):
                inputs[name] = given[0].detach()

            layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        network.logits(pixels)
    assert set(found) == {name for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    assert len(found) > 3
    for name, products in found.items():
        layer = layers[name]
        is_kernel = isinstance(layer, torch.nn.Conv2d)
        rows = naive_patches(inputs[name], layer) if is_kernel else inputs[name].reshape(-1, layer.in_features)
        expected = sum(torch.outer(row, row) for row in rows.double()) / len(rows)
        torch.testing.assert_close(products.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# The methods


def test_fisher_averages_each_weight_by_its_information():
    generator = torch.Generator().manual_seed(0)
    vectors, information = torch.randn(3, 50, generator=generator), torch.rand(3, 50, generator=generator) * 1e-20
    information[:, 7] = 0  # no prediction depends on it
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    found = fisher_average(vectors, weights, fisher=information)
    for place in range(50):
        above = math.fsum(float(weights[j]) * float(information[j, place]) * float(vectors[j, place]) for j in range(3))
        below = math.fsum(float(weights[j]) * float(information[j, place]) for j in range(3))
        mean = math.fsum(float(weights[j]) * float(vectors[j, place]) for j in range(3)) / 3.5
        assert float(found[place]) == pytest.approx(above / below if place != 7 else mean, rel=1e-9)


def some_inputs(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_regmean_without_shrinking_is_least_squares_over_all_sites():
    """The paper's problem itself: the map nearest to each site's own outputs, solved on the stacked inputs."""
    inputs = [some_inputs(30, 6, seed) for seed in range(3)]
    maps = [some_inputs(4, 6, 10 + seed) for seed in range(3)]
    outputs = torch.cat([x @ tau.T for x, tau in zip(inputs, maps, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    gram = torch.stack([x.T @ x for x in inputs])
    found = regmean(torch.stack(maps), torch.ones(3, dtype=torch.float64), gram=gram, off_diagonal=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_regmean_weighs_and_shrinks_as_its_formula_says():
    gram = torch.stack([(x := some_inputs(30, 6, seed)).T @ x for seed in range(2)])
    maps = torch.stack([some_inputs(4, 6, 10 + seed) for seed in range(2)])
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    total, pull = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for j in range(2):
        shrunk = torch.tensor(
            [[float(gram[j, a, b]) * (1.0 if a == b else 0.9) for b in range(6)] for a in range(6)],
            dtype=torch.float64,
        )
        total += weights[j] * shrunk
        pull += weights[j] * maps[j] @ shrunk
    found = regmean(maps, weights, gram=gram, off_diagonal=0.9)
    torch.testing.assert_close(found, pull @ torch.linalg.inv(total), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("off_diagonal", [0.95, 1.0])
def test_regmean_leaves_the_mean_where_no_site_has_inputs(off_diagonal):
    x = some_inputs(3, 6, 1)  # fewer inputs than columns, and one column that is dead
    x[:, 2] = 0
    maps = torch.stack([some_inputs(4, 6, 10 + seed) for seed in range(2)])
    found = regmean(
        maps, torch.ones(2, dtype=torch.float64), gram=torch.stack([x.T @ x] * 2), off_diagonal=off_diagonal
    )
    torch.testing.assert_close(found, maps.mean(0), rtol=1e-9, atol=1e-9)


def test_equal_vectors_are_the_result_whatever_the_second_moments():
    vector = some_inputs(4, 6, 1).expand(3, 4, 6)
    gram = torch.stack([(x := some_inputs(30, 6, seed)).T @ x for seed in range(3)])
    weights = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(regmean(vector, weights, gram=gram), vector[0], rtol=1e-12, atol=0)
    information = some_inputs(3, 24, 2).square()
    found = fisher_average(vector.reshape(3, 24), weights, fisher=information)
    torch.testing.assert_close(found, vector[0].reshape(24), rtol=1e-12, atol=0)


# The way from a site to a merge


@pytest.fixture(scope="module")
def informed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_datavec.cli import main

    folder = tmp_path_factory.mktemp("informed")
    make_network("test_resnet", folder / "base")
    for seed, site in enumerate("ab", start=1):
        tune(folder / "base", folder / f"tuned-{site}", seed=seed, step=0.1)
        make_images(folder / f"images-{site}", each=2, seed=seed)
        place = str(folder)
        command = ["diff", f"{place}/base", f"{place}/tuned-{site}", "-o", f"{place}/site-{site}"]
        assert main([*command, "--with", "fisher,gram", "--images", f"{place}/images-{site}", "--count", "4"]) == 0
    make_vector(folder / "base", folder / "tuned-a", folder / "plain")
    return folder


@pytest.fixture
def informed(informed_template: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(informed_template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_site_writes_second_moments_and_says_what_they_are(informed):
    found = open_vector(informed / "site-a")
    found.verify()
    assert {kind: entry.images for kind, entry in found.manifest.second_moments.items()} == {"fisher": 4, "gram": 4}
    assert set(found.beside.tensors["fisher"].records) == set(found.tensors.records)
    card = (informed / "site-a" / "README.md").read_text()
    assert "**These files summarise its private images.**" in card
    assert "`gram.safetensors`" in card
    assert "Second moments" not in (informed / "plain" / "datavec.json").read_text()


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_merge_weighs_by_what_the_sites_pushed(method, informed, run):
    weighed = [{"vector": "./site-a", "weight": 3}, {"vector": "./site-b", "weight": 1}]
    recipe = write_recipe(
        informed / "r.yaml", base="./base", vectors=weighed, output="./fused", merge={"method": method}
    )
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    base, fused = load_file(informed / "base" / WEIGHTS), load_file(informed / "fused" / WEIGHTS)
    kind = {"fisher": "fisher", "regmean": "gram"}[method]
    vectors = [load_file(informed / f"site-{site}" / "vector.safetensors") for site in "ab"]
    moments = [load_file(informed / f"site-{site}" / f"{kind}.safetensors") for site in "ab"]
    weights, apart = torch.tensor([3.0, 1.0], dtype=torch.float64), 0
    for name in vectors[0]:
        taus = torch.stack([vector[name].double() for vector in vectors])
        mean = (3 * taus[0] + taus[1]) / 4
        if method == "fisher":
            f = [w * moment[name].double() for w, moment in zip(weights, moments, strict=True)]
            total = f[0] + f[1]
            expected = torch.where(total > 0, (f[0] * taus[0] + f[1] * taus[1]) / total, mean)
        elif name in moments[0]:
            g = [
                w * (0.95 * moment[name].double() + 0.05 * moment[name].double().diagonal().diag())
                for w, moment in zip(weights, moments, strict=True)
            ]
            flat = taus.reshape(2, taus.shape[1], -1)
            total = g[0] + g[1]
            alive = total.diagonal() > 0
            expected = mean.reshape(flat[0].shape).clone()
            rest = flat[0][:, alive] @ g[0][alive][:, alive] + flat[1][:, alive] @ g[1][alive][:, alive]
            expected[:, alive] = rest @ torch.linalg.inv(total[alive][:, alive])
            expected = expected.reshape(mean.shape)
        else:
            expected = mean
        apart += int(not torch.allclose(expected, mean, atol=1e-3))
        torch.testing.assert_close(fused[name].double(), base[name].double() + expected, rtol=0, atol=2e-6, msg=name)
    assert apart > 3


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_the_order_in_the_recipe_changes_no_bit(method, informed, run):
    results = set()
    for order in (["./site-a", "./site-b"], ["./site-b", "./site-a"]):
        merge = {"method": method, "clip": "median"}
        recipe = write_recipe(informed / "r.yaml", base="./base", vectors=order, merge=merge)
        assert run("merge", recipe, "-o", order[0].replace("site", "fused")).code == 0
        results.add((informed / order[0].replace("site", "fused") / WEIGHTS).read_bytes())
    assert len(results) == 1


def test_heads_of_sites_with_other_labels_keep_their_information_by_row(informed, run):
    few = make_network("test_resnet", informed / "few", labels=LABELS[:2], seed=5)
    tensors = {**load_file(informed / "tuned-a" / WEIGHTS), **{
        name: value[:2].clone() for name, value in load_file(informed / "tuned-a" / WEIGHTS).items()
        if name.startswith("fc.")
    }}  # fmt: skip
    save_file(tensors, few / WEIGHTS, metadata={"format": "pt"})
    outcome = run("diff", "base", "few", "-o", "site-few", "--with", "fisher", "--images", "images-a")
    assert outcome.code == 0, outcome.err
    recipe = write_recipe(
        informed / "r.yaml", base="./base", vectors=["./site-few", "./site-b"], output="./fused",
        merge={"method": "fisher"},
    )  # fmt: skip
    assert run("merge", recipe).code == 0
    base, fused = load_file(informed / "base" / WEIGHTS), load_file(informed / "fused" / WEIGHTS)
    vectors = [load_file(informed / site / "vector.safetensors")["fc.weight"] for site in ("site-few", "site-b")]
    moments = [load_file(informed / site / "fisher.safetensors")["fc.weight"] for site in ("site-few", "site-b")]
    alone = base["fc.weight"][2] + vectors[1][2]
    torch.testing.assert_close(fused["fc.weight"][2], alone, rtol=0, atol=1e-6)
    total = moments[0] + moments[1][:2]
    shared = (moments[0] * vectors[0] + moments[1][:2] * vectors[1][:2]) / total
    changed = (fused["fc.weight"] - base["fc.weight"])[:2]
    torch.testing.assert_close(changed[total > 0], shared[total > 0], rtol=0, atol=1e-5)
    assert int((total > 0).sum()) > 100


def test_a_method_without_the_files_that_it_needs_is_refused(informed, run):
    recipe = write_recipe(
        informed / "r.yaml", base="./base", vectors=["./site-a", "./plain", {"model": "./tuned-b"}], output="./fused",
        merge={"method": "fisher"},
    )  # fmt: skip
    outcome = run("plan", recipe)
    assert outcome.code == 2
    assert outcome.err == (
        "error: the method 'fisher' needs the sites' Fisher information, but 'plain' brings none\n"
        "  hint: the site can add them: hf-datavec diff --with fisher --images IMAGES\n"
        "error: the method 'fisher' needs the sites' Fisher information, but 'tuned-b' brings none\n"
        "  hint: the site can add them: hf-datavec diff --with fisher --images IMAGES\n"
    )


def test_files_that_are_damaged_missing_or_of_another_network_are_refused(informed, run):
    recipe = write_recipe(
        informed / "r.yaml", base="./base", vectors=["./site-a", "./site-b"], output="./fused",
        merge={"method": "fisher"},
    )  # fmt: skip
    path = informed / "site-a" / "fisher.safetensors"
    whole = load_file(path)
    save_file({**whole, "fc.bias": whole["fc.bias"] * 2}, path)
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert f"'{path}' is not the file its datavec.json describes: digest" in outcome.err
    save_file({**whole, "fc.bias": torch.zeros(7)}, path)
    assert f"'{path}' does not fit its vector: 'fc.bias'" in run("merge", recipe).err
    del whole["fc.bias"]
    save_file(whole, path)
    assert f"'{path}' does not fit its vector: 'fc.bias'" in run("plan", recipe).err
    path.unlink()
    assert f"there is no file '{path}'" in run("plan", recipe).err
    assert not (informed / "fused").exists()


def test_second_moments_travel_with_the_vector(informed, run):
    assert run("push", "site-a", "./sent").code == 0
    assert {path.name for path in (informed / "sent").iterdir()} >= {"fisher.safetensors", "gram.safetensors"}
    manifest = json.loads((informed / "sent" / "datavec.json").read_text())
    assert set(manifest["second_moments"]) == {"fisher", "gram"}


def test_second_moments_travel_over_the_hub(informed):
    with online(), consortium(informed / "hub") as server:
        for name, source in (("base", "base"), ("a", "site-a"), ("b", "site-b")):
            site = Person("hospital-a", informed / "site", server)
            sent = site.run("push", informed / source, f"consortium/{name}")
            assert sent.returncode == 0, sent.stderr
        coordinator = Person("coordinator", informed / "coordinator", server)
        coordinator.folder.mkdir()
        vectors = ["consortium/a", "consortium/b"]
        sections = {"vectors": vectors, "output": "./fused", "merge": {"method": "regmean"}}
        recipe = write_recipe(coordinator.folder / "r.yaml", base="consortium/base", **sections)
        for command in ("plan", "merge"):
            done = coordinator.run(command, recipe)
            assert done.returncode == 0, done.stderr
    local = write_recipe(informed / "r.yaml", base="./base", **{**sections, "vectors": ["./site-a", "./site-b"]})
    from hf_datavec.cli import main

    assert main(["merge", str(local)]) == 0
    fused = informed / "coordinator" / "fused" / WEIGHTS
    assert digest(fused) == digest(informed / "fused" / WEIGHTS)


def test_the_same_images_give_the_same_files(informed, run):
    command = ("diff", "base", "tuned-a", "--with", "fisher,gram", "--images", "images-a", "--count", "4")
    assert run(*command, "-o", "again").code == 0
    for name in ("fisher.safetensors", "gram.safetensors"):
        assert digest(informed / "again" / name) == digest(informed / "site-a" / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--with", "fisher"), "error: --with and --images belong together"),
        (("--images", "images-a"), "error: --with and --images belong together"),
        (
            ("--with", "fischer", "--images", "images-a"),
            "expected some of fisher, gram, features, each once, got fischer",
        ),
        (
            ("--with", "gram,gram", "--images", "images-a"),
            "expected some of fisher, gram, features, each once, got gram,gram",
        ),
        (("--with", "gram", "--images", "nowhere"), "neither an existing folder nor a Hub repo"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, informed, run):
    outcome = run("diff", "base", "tuned-a", "-o", "out", *arguments)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err
    assert not (informed / "out").exists()


def test_a_state_dict_cannot_be_run_and_is_refused(informed, run):
    torch.save(load_file(informed / "tuned-a" / WEIGHTS), informed / "tuned.pth")
    outcome = run("diff", "base", "tuned.pth", "-o", "out", "--with", "gram", "--images", "images-a")
    assert outcome.code == 2
    assert "'tuned.pth' is a file; second moments are measured on a model that can be run" in outcome.err
