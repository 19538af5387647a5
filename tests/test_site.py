"""A site's side: the study base, training, and vectors from any form of tuned network."""

from __future__ import annotations

import json

import pytest
import torch
from launching import assert_goes_on, kill_after_an_epoch
from networks import LABELS, NETWORKS, digest, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file, save_model

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("kind", NETWORKS)
def test_init_replaces_the_head_by_a_zero_one_and_keeps_everything_else(kind, tmp_path, run):
    from hf_datavec.models import load

    pretrained = load_file(make_network(kind, tmp_path / "pretrained", labels=("a", "b", "c", "d")) / WEIGHTS)
    outcome = run("init", "./pretrained", "--labels", "mole, melanoma", "-o", "base")
    assert (outcome.code, outcome.out) == (0, "base\n")
    base = load_file(tmp_path / "base" / WEIGHTS)
    assert set(base) == set(pretrained)
    changed = {name for name in base if base[name].shape != pretrained[name].shape}
    assert changed
    assert all(name.startswith(("classifier", "fc", "head")) for name in changed)
    assert all(bool((base[name] == 0).all()) and len(base[name]) == 2 for name in changed)
    assert all(torch.equal(base[name], pretrained[name]) for name in base if name not in changed)
    network = load(tmp_path / "base")
    assert network.labels == ("mole", "melanoma")
    assert torch.equal(network.logits(torch.randn(1, 3, 32, 32)), torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["test_efficientnet", "resnet"])
def test_init_sets_the_image_size_for_all_sites(kind, tmp_path, run):
    from PIL import Image

    from hf_datavec.models import load

    make_network(kind, tmp_path / "pretrained")
    assert run("init", "./pretrained", "--labels", "a,b", "--image-size", 48, "-o", "base").code == 0
    assert load(tmp_path / "base").preprocess(Image.new("RGB", (100, 80))).shape == (3, 48, 48)


def test_init_refuses_another_image_size_for_a_network_that_depends_on_it(tmp_path, run):
    make_network("vit", tmp_path / "pretrained")
    outcome = run("init", "./pretrained", "--labels", "a,b", "--image-size", 48, "-o", "base")
    assert outcome.code == 2
    assert outcome.err == (
        "error: the weights of this network depend on its image size, so --image-size cannot change it\n"
    )
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("kind", ["test_resnet", "resnet", "vit"])
def test_finetune_learns_and_its_vector_merges(kind, tmp_path, run):
    make_network(kind, tmp_path / "pretrained")
    make_images(tmp_path / "images", each=10)
    make_images(tmp_path / "test", each=6, seed=1)
    assert run("init", "./pretrained", "--labels", ",".join(LABELS), "-o", "base").code == 0
    outcome = run("finetune", "base", "images", "-o", "tuned", "--epochs", 12, "--batch-size", 6, "--lr", 3e-3)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "tuned model: tuned"
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert record["examples"] == {"cat": 10, "dog": 10, "owl": 10}
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir())[0] == "config.json"
    assert not (tmp_path / "tuned" / "checkpoints").exists()
    accuracy = json.loads(run("evaluate", "tuned", "test", "--json").out)["metrics"]["accuracy"]["value"]
    assert accuracy >= 0.8
    assert run("diff", "base", "tuned", "-o", "site", "--share-counts").code == 0
    manifest = json.loads((tmp_path / "site" / "datavec.json").read_text())
    assert manifest["examples"] == record["examples"]
    assert manifest["training"]["learning_rate"] == 3e-3
    recipe = write_recipe(
        tmp_path / "r.yaml", base="./base", vectors=["./site"], output="./fused",
        recalibrate={"images": "./images"}, evaluate={"images": "./test"},
    )  # fmt: skip
    found = json.loads(run("merge", recipe, "--json").out)
    assert found["evaluation"]["metrics"]["accuracy"]["value"] >= 0.8


def test_the_same_seed_trains_the_same_network_and_another_seed_another(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=4)
    weights = []
    for number, seed in enumerate((3, 3, 4)):
        outcome = run("finetune", "base", "images", "-o", f"t{number}", "--epochs", 1, "--seed", seed)
        assert outcome.code == 0, outcome.err
        weights.append((tmp_path / f"t{number}" / WEIGHTS).read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_frozen_parts_do_not_move(tmp_path, run):
    base = load_file(make_network("test_resnet", tmp_path / "base") / WEIGHTS)
    make_images(tmp_path / "images", each=4)

    def moved(*options: object) -> set[str]:
        output = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        outcome = run("finetune", "base", "images", "-o", output, "--epochs", 1, "--batch-size", 4, *options)
        assert outcome.code == 0, outcome.err
        tuned = load_file(output / WEIGHTS)
        return {name for name in base if not torch.equal(base[name], tuned[name])}

    everything = moved()
    assert any(name.endswith("running_mean") for name in everything)
    kept = moved("--freeze", "statistics")
    assert kept
    assert not any(name.endswith(("running_mean", "running_var", "tracked")) for name in kept)
    assert any(name.startswith("conv") for name in kept)
    head_only = moved("--freeze", "backbone", "--freeze", "statistics")
    assert head_only == {"fc.weight", "fc.bias"}
    assert "fc.bias" not in moved("--freeze", r"fc\.bias")
    assert "fc.weight" in moved("--freeze", r"fc\.bias")
    outcome = run("finetune", "base", "images", "-o", "no", "--freeze", "fc")
    assert outcome.code == 2
    assert "--freeze 'fc' matches no parameter" in outcome.err


def test_a_class_balanced_loss_weighs_rare_classes_up():
    from hf_datavec.finetune import cross_entropy

    rows = [0] * 9 + [1]
    logits = torch.zeros(10, 3, requires_grad=True)
    cross_entropy(rows, 3, balanced=True)({"logits": logits}, torch.tensor(rows), num_items_in_batch=10).backward()
    pull = -logits.grad[torch.arange(10), torch.tensor(rows)]
    torch.testing.assert_close(pull[:9].sum(), pull[9])
    ln3 = torch.log(torch.tensor(3.0))
    torch.testing.assert_close(
        cross_entropy(rows, 3, balanced=True)({"logits": logits.detach()}, torch.tensor(rows)), ln3
    )


def test_an_interrupted_training_goes_on_and_ends_like_an_uninterrupted_one(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=12)
    options = ["--epochs", "12", "--batch-size", "4", "--device", "cpu"]
    kill_after_an_epoch(["finetune", "base", "images", "-o", "tuned", *options], tmp_path, "tuned")
    other = run("finetune", "base", "images", "-o", "tuned", *options[:-4], "--lr", "0.5")
    assert other.code == 2
    assert "an unfinished training of 'tuned' had other settings, base or images" in other.err
    assert_goes_on(run, tmp_path, options)


def test_a_checkpoint_that_was_cut_off_while_it_was_written_is_no_place_to_go_on_from(tmp_path, run):
    make_network("test_resnet", tmp_path / "base")
    make_images(tmp_path / "images", each=16)
    options = ["--epochs", "12", "--batch-size", "4", "--device", "cpu"]
    kill_after_an_epoch(["finetune", "base", "images", "-o", "tuned", *options], tmp_path, "tuned")
    for state in (tmp_path / ".tuned.partial").glob("checkpoints/*/trainer_state.json"):
        state.write_text(state.read_text()[:20])
    assert_goes_on(run, tmp_path, options)


def forms(base, tuned, folder):
    """The same tuned network as sites' own code leaves it."""
    tensors = load_file(tuned / WEIGHTS)
    torch.save(tensors, folder / "plain.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, folder / "wrapped.bin")
    torch.save({"model": tensors, "epoch": 3}, folder / "checkpoint.pt")
    (folder / "alone.safetensors").write_bytes((tuned / WEIGHTS).read_bytes())
    return [tuned, *(folder / name for name in ("plain.pth", "wrapped.bin", "checkpoint.pt", "alone.safetensors"))]


def test_every_form_of_a_tuned_network_gives_the_same_vector(study, run):
    contents = set()
    for number, form in enumerate(forms(study / "base", study / "tuned-site-a", study)):
        outcome = run("diff", "base", form, "-o", f"v{number}")
        assert outcome.code == 0, outcome.err
        contents.add(digest(study / f"v{number}" / "vector.safetensors"))
    assert contents == {digest(study / "site-a" / "vector.safetensors")}


def test_a_vector_leaves_statistics_and_counters_out_unless_asked(study, run):
    outcome = run("diff", "base", "tuned-site-a", "-o", "bare")
    assert outcome.code == 0
    assert "statistic" in outcome.out
    assert "left out" in outcome.out
    assert run("diff", "base", "tuned-site-a", "-o", "full", "--with-statistics").code == 0
    names = set(load_file(study / "base" / WEIGHTS))
    bare, full = (set(load_file(study / place / "vector.safetensors")) for place in ("bare", "full"))
    assert names - bare == {name for name in names if name.endswith(("running_mean", "running_var", "tracked"))}
    assert names - full == {name for name in names if name.endswith("tracked")}
    card = (study / "bare" / "README.md").read_text()
    assert "library_name: hf-datavec" in card
    assert "- task-vector" in card
    assert "BatchNorm running statistics are left out" in card
    assert "are **included**" in (study / "full" / "README.md").read_text()


def test_a_vector_never_loads_as_a_model(study, run):
    from transformers import AutoModelForImageClassification

    with pytest.raises((OSError, ValueError)):
        AutoModelForImageClassification.from_pretrained(study / "site-a")
    assert run("evaluate", "site-a", "images").code == 2


def test_tied_weights_are_found_whichever_file_holds_both_names(tmp_path, run):
    base = make_network("vit", tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    first, second = (f"vit.encoder.layer.{layer}.intermediate.dense.weight" for layer in (0, 1))
    tensors[second] = tensors[first].clone()
    save_with(base, base, tensors)
    tuned = load_file(tune(base, tmp_path / "tuned", seed=1) / WEIGHTS)
    tuned[second] = tuned[first].clone()
    save_with(base, tmp_path / "tuned", tuned)
    once = {name: value for name, value in tuned.items() if name != second}
    save_with(base, tmp_path / "once", once)
    shared = {**tuned, second: tuned[first]}
    torch.save(shared, tmp_path / "shared.pth")
    made = []
    for number, form in enumerate(("tuned", "once", "shared.pth")):
        outcome = run("diff", "base", form, "-o", f"v{number}")
        assert outcome.code == 0, outcome.err
        made.append((tmp_path / f"v{number}" / "vector.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_second_name_for_a_known_tensor_is_no_extra_tensor(study, run):
    tensors = load_file(study / "tuned-site-a" / WEIGHTS)
    tensors["alias.weight"] = tensors["fc.weight"]
    torch.save(tensors, study / "alias.pth")
    assert run("diff", "base", "alias.pth", "-o", "v").code == 0
    tensors["alias.weight"] = tensors["fc.weight"] + 1
    torch.save(tensors, study / "extra.pth")
    outcome = run("diff", "base", "extra.pth", "-o", "w")
    assert outcome.code == 2
    assert f"'extra.pth' has tensors that the base '{study / 'base'}' lacks: 'alias.weight'" in outcome.err


def test_a_base_that_shares_tensors_between_layers_round_trips(tmp_path, run):
    """safetensors' own `save_model` stores a shared tensor once; base and tuned then both lack the second name."""
    import timm

    folder = make_network("test_resnet", tmp_path / "net")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    base = save_with(folder, tmp_path / "base", {"fc.weight": torch.zeros(3, 8)})
    save_model(model, str(base / WEIGHTS))
    torch.save(model.state_dict(), tmp_path / "both.pth")
    assert len(torch.load(tmp_path / "both.pth")) == len(load_file(base / WEIGHTS)) + 1
    outcome = run("diff", "base", "both.pth", "-o", "v")
    assert outcome.code == 0, outcome.err
    assert all(bool((value == 0).all()) for value in load_file(tmp_path / "v" / "vector.safetensors").values())


def test_labels_name_the_rows_of_a_head_that_a_state_dict_cannot_name(tmp_path, run):
    base = make_network("test_resnet", tmp_path / "base", labels=("cat", "dog"))
    tensors = load_file(base / WEIGHTS)
    tensors["fc.weight"], tensors["fc.bias"] = torch.randn(3, tensors["fc.weight"].shape[1]), torch.randn(3)
    torch.save(tensors, tmp_path / "own.pth")
    refused = run("diff", "base", "own.pth", "-o", "v")
    assert refused.code == 2
    assert "name the rows of its head with --labels" in refused.err
    assert run("diff", "base", "own.pth", "-o", "v", "--labels", "dog,cat,owl").code == 0
    head = load_file(tmp_path / "v" / "vector.safetensors")["fc.weight"]
    before = load_file(base / WEIGHTS)["fc.weight"]
    torch.testing.assert_close(head[0], tensors["fc.weight"][0] - before[1])
    torch.testing.assert_close(head[2], tensors["fc.weight"][2])


def test_push_copies_to_a_local_folder_exactly_what_a_repo_would_hold(study, run):
    (study / "site-a" / ".secret").write_text("x")
    (study / "site-a" / "notes.pkl").write_bytes(b"x")
    assert run("push", "site-a", "hub/consortium/site-a").code == 2  # no folder and no `owner/name`
    outcome = run("push", "site-a", "./hub/consortium/site-a")
    assert outcome.code == 0, outcome.err
    found = {path.name for path in (study / "hub/consortium/site-a").iterdir()}
    assert found == {"datavec.json", "vector.safetensors"}
    assert run("push", "site-a", "./hub/consortium/site-a").code == 2
    assert run("push", "fused", "./hub/none").code == 2


def test_inspect_tells_norms_and_cosines(study, run):
    outcome = run("inspect", "site-a", "site-b", "--json", "--plot", "cosines.png")
    found = json.loads(outcome.out)
    first, second = (load_file(study / site / "vector.safetensors") for site in ("site-a", "site-b"))
    flat = [
        torch.cat([value.reshape(-1) for name, value in sorted(v.items()) if not name.startswith("fc.")]).double()
        for v in (first, second)
    ]
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert found["cosines"][0][1] == pytest.approx(cosine, abs=1e-5)
    assert [one["norm"] for one in found["vectors"]] == pytest.approx([float(f.norm()) for f in flat], rel=1e-5)
    assert (study / "cosines.png").read_bytes().startswith(b"\x89PNG")


def test_the_vector_of_one_site_is_the_same_when_made_twice(study, run):
    made = make_vector(study / "base", study / "tuned-site-a", study / "twice")
    for name in ("vector.safetensors", "datavec.json"):
        assert digest(made / name) == digest(study / "site-a" / name)


def test_a_folder_of_vectors_is_listed_and_made_a_recipe(study, run):
    (study / "vectors").mkdir()
    for site in ("site-a", "site-b"):
        assert run("push", site, f"./vectors/{site}").code == 0
    found = json.loads(run("list", "./vectors", "--json").out)
    assert [one["fits"] for one in found] == [True, True]
    refused = run("recipe", "./vectors", "-o", "all.yaml")
    assert refused.code == 2
    assert "say where with --base" in refused.err
    assert run("recipe", "./vectors", "-o", "all.yaml", "--base", "base").code == 0
    assert run("merge", "all.yaml").code == 0
    assert run("recipe", "./vectors", "-o", "all.yaml", "--base", "base").code == 2
    assert run("list", "./images").code == 2
