"""A search finds what a loop over separate merges finds, reads each vector once, and leaves a lock that needs none."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import LABELS, NETWORKS, digest, make_images, make_network, make_vector, save_with, tune, write_recipe
from PIL import Image
from safetensors.torch import load_file

from hf_datavec import evaluate, fuse, models, vector
from hf_datavec.checkpoint import Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.metrics import Estimate
from hf_datavec.models import load
from hf_datavec.pipeline import weights
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.search import Search, Trial, over_weights, rank

WEIGHTS = "model.safetensors"
VALUES = [0.0, 0.25, 0.5, 1.0]


def moved(base: dict[str, torch.Tensor], seed: int, step: float) -> dict[str, torch.Tensor]:
    """Weights with noise on every tensor that a vector holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + step * torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and "running" not in name
        else value
        for name, value in sorted(base.items())
    }


def logits_of(network: Path, pictures: Path) -> torch.Tensor:
    loaded = load(network)
    with torch.no_grad():
        paths = sorted(pictures.rglob("*.png"))
        return loaded.logits(torch.stack([loaded.preprocess(Image.open(path)) for path in paths]))


def label_by(network: Path, source: Path, target: Path) -> Path:
    """The pictures of a folder, each in the folder of the label that a network gives it."""
    rows = logits_of(network, source).argmax(1).tolist()
    for number, (path, row) in enumerate(zip(sorted(source.rglob("*.png")), rows, strict=True)):
        folder = target / LABELS[row]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number:03}.png")
    return target


@pytest.fixture(scope="module")
def searched_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two vectors whose sum, halved, leads to the one network that labels all public images right."""
    folder = tmp_path_factory.mktemp("searched")
    make_network("test_resnet", folder / "right")
    pictures = make_images(folder / "pictures", each=8, seed=3)
    right = load_file(folder / "right" / WEIGHTS)
    right["fc.bias"] -= logits_of(folder / "right", pictures).mean(0)  # so that it gives every label to some pictures
    save_with(folder / "right", folder / "right", right)
    far = moved(right, 1, 0.3)
    first = moved(right, 2, 0.2)
    save_with(folder / "right", folder / "base", far)
    # tau_1 + tau_2 = 2 (right - base), so base + 0.5 (tau_1 + tau_2) = right
    save_with(folder / "right", folder / "tuned-a", first)
    second = {name: value + 2 * right[name] - first[name] - far[name] if value.is_floating_point() and "running"
              not in name else value for name, value in far.items()}  # fmt: skip
    save_with(folder / "right", folder / "tuned-b", second)
    for site in "ab":
        make_vector(folder / "base", folder / f"tuned-{site}", folder / f"site-{site}")
    label_by(folder / "right", pictures, folder / "public")
    assert len(list((folder / "public").iterdir())) > 1
    return folder


@pytest.fixture
def searching(searched_study: Path, tmp_path: Path) -> Path:
    shutil.copytree(searched_study, tmp_path, dirs_exist_ok=True)
    return tmp_path


def scale_recipe(folder: Path, name: str = "recipe.yaml", **more: object) -> Path:
    merge = {"method": "sum", "scale": {"search": VALUES, "images": "./public", "metric": "accuracy"}}
    sections = {"base": "./base", "vectors": ["./site-a", "./site-b"], "merge": merge, "output": "./fused", **more}
    return write_recipe(folder / name, **sections)


def test_the_scale_that_is_known_to_be_best_is_found(searching, run):
    outcome = run("merge", scale_recipe(searching), "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["scale"] == 0.5
    trials = result["search"]["trials"]
    assert [trial["scale"] for trial in trials] == VALUES
    assert [trial["value"] for trial in trials][2] == 1.0
    assert max(trial["value"] for trial in trials if trial["scale"] != 0.5) < 1.0
    assert json.loads((searching / "fused" / "search.json").read_text()) == result["search"]
    assert sorted(path.name for path in (searching / "fused").iterdir() if "safetensors" in path.name) == [WEIGHTS]


@pytest.mark.parametrize("restore", [None, {"mode": "statistics", "images": "./pictures", "batch_size": 7}])
def test_every_value_is_what_a_merge_of_its_own_measures(restore, searching, run):
    sections = {"recalibrate": restore} if restore else {}
    found = json.loads(run("merge", scale_recipe(searching, **sections), "--json").out)
    for trial in found["search"]["trials"]:
        name = f"alone-{trial['scale']}"
        alone = write_recipe(
            searching / f"{name}.yaml", base="./base", vectors=["./site-a", "./site-b"], output=f"./{name}",
            merge={"scale": trial["scale"]}, evaluate={"images": "./public"}, **sections,
        )  # fmt: skip
        expected = json.loads(run("merge", alone, "--json").out)["evaluation"]["metrics"]["accuracy"]
        assert {key: trial[key] for key in ("value", "low", "high")} == expected
        if trial["scale"] == found["scale"]:
            ours, theirs = ((searching / place / WEIGHTS).read_bytes() for place in ("fused", name))
            assert ours == theirs


def test_each_vector_is_read_once_whatever_the_number_of_values(searching, run, monkeypatch):
    reads: Counter[tuple[str, str]] = Counter()
    for way in ("read", "arrays"):
        original = getattr(vector.TaskVector, way)

        def counted(self: vector.TaskVector, name: str, original=original) -> object:
            reads[self.folder.name, name] += 1
            return original(self, name)

        monkeypatch.setattr(vector.TaskVector, way, counted)
    assert run("merge", scale_recipe(searching)).code == 0
    assert set(reads.values()) == {1}
    assert {site for site, _ in reads} == {"site-a", "site-b"}


def test_a_search_builds_one_network_and_writes_weights_once(searching, run, monkeypatch):
    done: Counter[str] = Counter()

    def counted(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            done[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(models, "load")
    counted(models, "made_of")
    counted(weights, "write")
    assert run("merge", scale_recipe(searching)).code == 0
    assert done == {"made_of": 1, "write": 1}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_made_of_tensors_in_memory_is_the_one_that_is_loaded(kind, tmp_path):
    checkpoint = open_checkpoint(make_network(kind, tmp_path / "base"))
    loaded = models.load(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    (tmp_path / "base" / WEIGHTS).unlink()
    made = models.made_of(checkpoint, tensors, device="cpu")
    found, expected = made.module.state_dict(), loaded.module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].stride() == expected[name].stride() for name in expected)
    assert made.labels == loaded.labels
    # What has its order already is not copied.
    places = {tensor.data_ptr() for tensor in tensors.values()}
    biases = [tensor for name, tensor in found.items() if name.endswith("bias")]
    assert all(tensor.data_ptr() in places for tensor in biases)


def test_a_network_of_which_a_tensor_is_missing_is_not_made(tmp_path):
    checkpoint = open_checkpoint(make_network("vit", tmp_path / "base"))
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    tensors.pop("classifier.bias")
    with pytest.raises(InputError, match=r"does not load whole: missing keys 'classifier\.bias'"):
        models.made_of(checkpoint, tensors, device="cpu")


@pytest.mark.parametrize("name", ["sum", "median", "iso_c", "geometric_median"])
def test_tensors_are_made_in_the_room_that_is_given_with_the_same_bits(name, searching):
    recipe = scale_recipe(searching, merge={"method": name, "scale": 0.7})
    plan = prepare(recipe).plan
    expected = dict(fuse.run(plan))
    rooms = {step.name: np.full(math.prod(step.record.shape), np.nan, np.float32) for step in plan.steps
             if step.role is Role.WEIGHT}  # fmt: skip
    inside = set()
    for found, piece in fuse.pieces(plan, into=rooms):
        if found in rooms and np.shares_memory(np.asarray(piece), rooms[found]):
            inside.add(found)
    assert inside == rooms.keys()
    for found, room in rooms.items():
        assert torch.equal(torch.from_numpy(room), expected[found].reshape(-1)), found


STATISTICS = {"recalibrate": {"mode": "statistics", "images": "./images", "count": 12}}
TUNED = {"recalibrate": {"mode": "tune", "images": "./images", "tune": {"parameters": "all", "steps": 2}}}
HALF = {"dtype": "bfloat16"}
CASES = ("restored", "restored-half", "tuned-half", "half")


@pytest.mark.parametrize("sections", [STATISTICS, STATISTICS | HALF, TUNED | HALF, HALF], ids=CASES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_trial_in_memory_has_the_bits_that_its_file_would_have(kind, sections, tmp_path, run, monkeypatch):
    base = make_network(kind, tmp_path / "base", labels=LABELS[:2])
    for number, labels in enumerate((LABELS[:2], LABELS[1:])):
        # Heads of other labels: the fused one has three rows, and the base two.
        shape_of = make_network(kind, tmp_path / f"own-{number}", labels=labels, seed=1)
        tune(shape_of, tmp_path / f"tuned-{number}", seed=number)
        make_vector(base, tmp_path / f"tuned-{number}", tmp_path / f"site-{number}")
    make_images(tmp_path / "images", each=5)
    original, seen = evaluate.evaluate_network, []

    def kept(network, images, **options):
        tensors, names = network.module.state_dict(), models.stored_names(network)
        seen.append((network, {name: tensors[live].clone() for name, live in names.items()}))
        return original(network, images, **options)

    monkeypatch.setattr(evaluate, "evaluate_network", kept)
    recipe = {"base": "./base", "vectors": ["./site-0", "./site-1"], **sections}
    merge = {
        "scale": {"search": [0.3, 0.7, 0.1], "images": "./images"},
        "overrides": [{"tensors": ".*bias", "scale": 2}],
    }
    outcome = run("merge", write_recipe(tmp_path / "r.yaml", **recipe, merge=merge), "-o", "fused")
    assert outcome.code == 0, outcome.err
    assert len({id(network) for network, _ in seen}) == 1
    assert seen[0][0].labels == LABELS
    assert len(seen) == 3
    for value, (_, tensors) in zip(merge["scale"]["search"], seen, strict=True):
        alone = write_recipe(tmp_path / "alone.yaml", **recipe, merge={**merge, "scale": value})
        assert run("merge", alone, "-o", f"alone-{value}").code == 0
        written = load_file(tmp_path / f"alone-{value}" / WEIGHTS)
        assert written.keys() == tensors.keys()
        for name, tensor in written.items():
            assert torch.equal(tensor.to(tensors[name].dtype), tensors[name]), name


def test_a_network_larger_than_its_device_is_written_and_loaded_for_each_value(searching, run, monkeypatch):
    in_memory = json.loads(run("merge", scale_recipe(searching), "--json").out)["search"]["trials"]
    whole = digest(searching / "fused" / WEIGHTS)
    monkeypatch.setenv("HF_DATAVEC_MAX_MEMORY", "20KB")
    loads: list[models.Network] = []
    original = models.load

    def load_and_tell(*arguments, **options):
        loads.append(original(*arguments, **options))
        return loads[-1]

    monkeypatch.setattr(models, "load", load_and_tell)
    outcome = run("merge", scale_recipe(searching), "--json", "-o", "again")
    assert outcome.code == 0, outcome.err
    assert [one.device is not None for one in loads] == [True] * len(VALUES)
    assert json.loads(outcome.out)["search"]["trials"] == in_memory
    assert digest(searching / "again" / WEIGHTS) == whole


def test_the_lock_of_a_search_pins_what_was_found_and_needs_no_images(searching, run):
    assert run("merge", scale_recipe(searching)).code == 0
    shutil.rmtree(searching / "public")
    lock = (searching / "fused" / "recipe.lock.yaml").read_text()
    assert "scale: 0.5\n" in lock
    assert "search:\n    reference: ../public\n    digest: blake3:" in lock
    outcome = run("merge", searching / "fused" / "recipe.lock.yaml", "-o", "again")
    assert outcome.code == 0, outcome.err
    assert digest(searching / "again" / WEIGHTS) == digest(searching / "fused" / WEIGHTS)


def test_a_lock_before_the_search_pins_the_images_that_it_will_look_at(searching, run):
    recipe = scale_recipe(searching)
    assert run("plan", recipe, "--lock").code == 0
    outcome = run("merge", searching / "recipe.lock.yaml", "--json", "-o", "one")
    assert json.loads(outcome.out)["scale"] == 0.5
    next((searching / "public").rglob("*.png")).unlink()
    outcome = run("merge", searching / "recipe.lock.yaml", "-o", "two")
    assert outcome.code == 2
    assert "'search images' (./public) is not what the lock pins" in outcome.err


def test_card_table_and_log_tell_the_curve(searching, run):
    outcome = run("merge", scale_recipe(searching))
    assert outcome.err.count("search: scale ") == len(VALUES)
    assert outcome.out.splitlines()[0].split("  ")[0] == "scale, on 24 images of public"
    chosen = [line for line in outcome.out.splitlines() if line.endswith("chosen")]
    assert [line.split()[:2] for line in chosen] == [["0.5", "100.0"]]
    card = (searching / "fused" / "README.md").read_text()
    assert "The scale was chosen by accuracy on 24 labelled public images of `public`" in card
    assert "| 0.5 | 100.0 (100.0 to 100.0) | chosen |" in card
    assert "`sum`, scale 0.5" in card


def test_overrides_with_a_scale_of_their_own_keep_it(searching, run):
    merge = {
        "scale": {"search": [0.0, 0.5], "images": "./public", "metric": "accuracy"},
        "overrides": [{"tensors": "fc\\..*", "scale": 0.25}, {"tensors": "conv1\\..*", "method": "mean"}],
    }
    assert run("merge", scale_recipe(searching, merge=merge)).code == 0
    fixed = {**merge, "scale": 0.5}
    found = json.loads((searching / "fused" / "search.json").read_text())["found"]
    assert run("merge", scale_recipe(searching, "fixed.yaml", merge={**fixed, "scale": found}), "-o", "fixed").code == 0
    assert digest(searching / "fused" / WEIGHTS) == digest(searching / "fixed" / WEIGHTS)
    before, after = load_file(searching / "base" / WEIGHTS), load_file(searching / "fused" / WEIGHTS)
    parts = [load_file(searching / f"site-{site}" / "vector.safetensors")["fc.weight"].double() for site in "ab"]
    expected = before["fc.weight"].double() + 0.25 * (parts[0] + parts[1])
    torch.testing.assert_close(after["fc.weight"], expected.float(), rtol=0, atol=1e-7)


def test_a_value_that_breaks_the_network_is_a_finding_and_no_end(searching, run):
    merge = {"scale": {"search": [1e30, 0.5], "images": "./public", "metric": "accuracy"}}
    outcome = run("merge", scale_recipe(searching, merge=merge), "--json")
    assert outcome.code == 0, outcome.err
    trials = json.loads(outcome.out)["search"]["trials"]
    assert trials[0] == {
        "scale": 1e30, "value": None, "low": None, "high": None, "problem": "the network gives NaN or infinite values",
    }  # fmt: skip
    assert trials[1]["value"] == 1.0
    merge["scale"]["search"] = [1e30]
    outcome = run("merge", scale_recipe(searching, merge=merge), "-o", "no")
    assert outcome.code == 1
    assert "none of 1 settings could be measured: the network gives NaN" in outcome.err
    assert not (searching / "no").exists()


def test_a_picture_that_cannot_be_read_is_a_fault_of_the_input(searching, run):
    broken = next((searching / "public").rglob("*.png"))
    broken.write_bytes(b"no picture")
    outcome = run("merge", scale_recipe(searching))
    assert outcome.code == 2
    assert f"none of 4 settings could be measured: cannot read the image '{broken}'" in outcome.err
    assert "  hint: repair or remove the file and run again" in outcome.err


def test_a_metric_that_the_images_cannot_tell_is_refused(searching, run):
    one = next(path for path in sorted((searching / "public").iterdir()))
    one.rename(searching / "single")
    (searching / "few").mkdir()
    (searching / "single").rename(searching / "few" / one.name)
    merge = {"scale": {"search": [0.5, 1.0], "images": "./few", "metric": "auroc"}}
    outcome = run("merge", scale_recipe(searching, merge=merge))
    assert outcome.code == 2
    assert "none of 2 settings could be measured: auroc is not defined on these images" in outcome.err


def test_a_plan_says_that_the_scale_is_not_known_yet(searching, run):
    recipe = scale_recipe(searching, evaluate={"images": "./public"})
    outcome = run("plan", recipe)
    assert "sum x ?" in outcome.out
    assert "search for scale" in outcome.out
    assert "by accuracy on ./public" in outcome.out
    assert "note: the search looks at the very images of `evaluate:`" in outcome.out
    data = json.loads(run("plan", recipe, "--json").out)
    assert {tensor["scale"] for tensor in data["tensors"]} == {None}


def test_images_that_are_missing_or_of_other_labels_are_refused_before_anything_is_written(searching, run):
    missing = {"scale": {"search": [1.0], "images": "./none"}}
    outcome = run("merge", scale_recipe(searching, merge=missing))
    assert (outcome.code, "there is no folder" in outcome.err) == (2, True)
    make_images(searching / "other", labels=("bat",))
    other = {"scale": {"search": [1.0], "images": "./other"}}
    outcome = run("merge", scale_recipe(searching, merge=other))
    assert (outcome.code, "have labels that the model lacks: 'bat'" in outcome.err) == (2, True)
    assert not (searching / "fused").exists()


def test_of_equal_values_the_smaller_scale_wins_and_of_calibration_errors_the_smaller_one():
    def best(metric: str, *pairs: tuple[float, float]) -> float:
        trials = tuple(Trial(scale, Estimate(value, 0, 1)) for scale, value in pairs)
        return Search("scale", metric, "x", "", 1, (), trials).best.setting

    assert best("accuracy", (1.0, 0.5), (0.2, 0.7), (0.1, 0.7), (0.0, 0.6)) == 0.1
    assert best("ece", (1.0, 0.5), (0.2, 0.3), (0.1, 0.3)) == 0.1
    assert best("brier", (1.0, 0.5), (0.2, 0.3), (0.1, 0.3)) == 0.1
    assert best("auroc", (0.1, float("nan")), (0.2, 0.1)) == 0.2


# Weights


def naive_weights(target, rounds: int) -> tuple[float, ...]:
    """The documented search, written out: double or halve one weight, go where it is best, stop without a gain."""

    def distance(weights):
        shares = [weight / sum(weights) for weight in weights]
        return sum((a - b) ** 2 for a, b in zip(shares, target, strict=True))

    weights = [1.0] * len(target)
    for _ in range(rounds):
        options = []
        for place in range(len(target)):
            for factor in (2.0, 0.5):
                options.append([w * factor if i == place else w for i, w in enumerate(weights)])
        best = min(options, key=lambda option: round(distance(option), 12))
        if distance(best) >= distance(weights) - 1e-12:
            break
        weights = best
    return tuple(weight / sum(weights) for weight in weights)


@pytest.mark.parametrize("target", [(0.7, 0.2, 0.1), (0.25, 0.25, 0.5), (0.01, 0.98, 0.01), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_weights_follow_the_documented_search_within_its_bound(target, rounds):
    seen = []

    def measure(weights):
        seen.append(weights)
        score = -sum((a - b) ** 2 for a, b in zip(weights, target, strict=True))
        return Trial(weights, Estimate(round(score, 12), 0, 0))

    trials = list(over_weights(3, rounds, measure, "accuracy"))
    assert [trial.setting for trial in trials] == seen
    assert len(set(seen)) == len(seen) <= 1 + 2 * 3 * rounds
    assert all(abs(sum(weights) - 1) < 1e-12 for weights in seen)
    best = min(trials, key=lambda trial: rank(trial, "accuracy")).setting
    assert best == pytest.approx(naive_weights(target, rounds))


def test_weights_move_away_from_a_site_that_harms_and_the_lock_keeps_them(searching, run):
    for name, step in (("good", 1e-4), ("bad", 0.2)):
        save_with(searching / "right", searching / name, moved(load_file(searching / "right" / WEIGHTS), 5, step))
        make_vector(searching / "right", searching / name, searching / f"v-{name}")
    merge = {"method": "linear", "weights": {"search": "coordinate", "rounds": 3, "images": "./public"}}
    vectors = ["./v-good", {"vector": "./v-bad", "name": "B"}]
    recipe = scale_recipe(searching, base="./right", merge=merge, vectors=vectors)
    outcome = run("merge", recipe, "--json")
    assert outcome.code == 0, outcome.err
    search = json.loads(outcome.out)["search"]
    first, found = search["trials"][0], search["found"]
    assert first["weights"] == {"v-good": 0.5, "B": 0.5}
    assert found["v-good"] > 0.5
    assert max(trial["value"] for trial in search["trials"]) > first["value"]
    assert len(search["trials"]) <= 1 + 2 * 2 * 3
    shutil.rmtree(searching / "public")
    outcome = run("merge", searching / "fused" / "recipe.lock.yaml", "-o", "again")
    assert outcome.code == 0, outcome.err
    assert digest(searching / "again" / WEIGHTS) == digest(searching / "fused" / WEIGHTS)
    weighed = [{"vector": "./v-good", "weight": found["v-good"]}, {"vector": "./v-bad", "weight": found["B"]}]
    merge = {"method": "linear"}
    given = scale_recipe(searching, "given.yaml", base="./right", merge=merge, vectors=weighed, output="./given")
    assert run("merge", given).code == 0
    assert digest(searching / "given" / WEIGHTS) == digest(searching / "fused" / WEIGHTS)


@pytest.mark.parametrize(
    ("merge", "vectors", "message"),
    [
        (
            {"method": "sum", "weights": {"search": "coordinate", "images": "./public"}}, ["./site-a", "./site-b"],
            "merge.weights: the method 'sum' takes no weights to search for",
        ),
        (
            {"method": "linear", "weights": {"search": "coordinate", "images": "./public"}}, ["./site-a"],
            "merge.weights: a single vector has no weights to search for",
        ),
        (
            {"method": "linear", "weights": {"search": "coordinate", "images": "./public"}},
            ["./site-a", {"vector": "./site-b", "weight": 2}],
            "vectors[1].weight: a weight is given although merge.weights is searched for; keep one of the two",
        ),
        (
            {"method": "linear", "weights": {"search": "coordinate", "images": "./public"},
             "scale": {"search": [1], "images": "./public"}}, ["./site-a", "./site-b"],
            "merge.weights: scale and weights are both searched for",
        ),
        (
            {"scale": {"search": [0.5, 1, 0.5], "images": "./public"}}, ["./site-a"],
            "merge.scale.search[2]: 0.5 is given twice",
        ),
        (
            {"scale": {"search": [], "images": "./public"}}, ["./site-a"],
            "merge.scale.search: expected at least one entry, found an empty list",
        ),
        (
            {"scale": {"search": [0.1 * n for n in range(101)], "images": "./public"}}, ["./site-a"],
            "merge.scale.search: expected at most 100 entries, found a list",
        ),
        (
            {"scale": {"search": ["1"], "images": "./public"}}, ["./site-a"],
            "merge.scale.search[0]: expected a number, found '1'",
        ),
        (
            {"scale": {"search": [1], "images": "./public", "metric": "f1"}}, ["./site-a"],
            "merge.scale.metric: 'f1' is not one of accuracy, balanced_accuracy, macro_f1, auroc, ece, brier",
        ),
        (
            {"scale": {"search": [1], "image": "./public"}}, ["./site-a"],
            "merge.scale: unknown key 'image'",
        ),
        (
            {"weights": {"search": "greedy", "images": "./public", "rounds": 0}}, ["./site-a"],
            "merge.weights.search: 'greedy' is not one of coordinate",
        ),
    ],
)  # fmt: skip
def test_a_search_that_makes_no_sense_is_refused_at_its_place(merge, vectors, message, tmp_path, run):
    outcome = run("plan", write_recipe(tmp_path / "r.yaml", base="./base", vectors=vectors, merge=merge))
    assert outcome.code == 2
    heads = [line for line in outcome.err.splitlines() if line.startswith("r.yaml:")]
    assert any(line.split(": ", 1)[1] == message for line in heads), outcome.err
