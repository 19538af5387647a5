"""A fused network learns from the sites' networks, only if that brings it closer to them on held-out images."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import environment
from networks import LABELS, digest, make_images, make_network, make_vector, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec import agreement, distillation, ensemble, models
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.ensemble import Ensemble
from hf_datavec.errors import InputError
from hf_datavec.examples import shown
from hf_datavec.recalibrate import Pictures, Sites
from hf_datavec.recipe import Tune


def settings(**given) -> Tune:
    return Tune.model_validate({"loss": "ensemble", "learning_rate": 1e-2, "epochs": 8, "batch_size": 8, **given})


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """The images count as those of the sites, whose statistics are made up; else nothing would be learned."""
    monkeypatch.setattr("hf_datavec.recalibrate.domain.FOREIGN", math.inf)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_network("test_resnet", tmp_path_factory.mktemp("distillation") / "base")


@pytest.fixture(scope="module")
def pixels():
    """Pictures of one brightness each, so that what is learned of some holds for the others."""
    random = np.random.default_rng(0)
    shades = random.uniform(-1, 1, (40, 3, 1, 1))
    return torch.from_numpy(shades + 0.1 * random.normal(size=(40, 3, 16, 16))).float()


def pictures(pixels) -> Pictures:
    return Pictures(len(pixels), lambda indices: pixels[list(indices)], 8)


def teacher(pixels, labels=LABELS) -> Ensemble:
    """Two sites that tell the labels by colour."""
    colours = pixels.mean((2, 3)).double().numpy()
    parts = np.stack([agreement.log_softmax(sureness * colours) for sureness in (2.0, 3.0)])
    return Ensemble(labels, ("one", "two"), parts[:, None])


def learned(base, pixels, given=None, *, labels=LABELS, seed=0):
    network = models.load(base)
    checkpoint = open_checkpoint(base)
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    found = distillation.learn(
        network, teacher(pixels, labels), pictures(pixels), sites=Sites(checkpoint, (), False),
        settings=given or settings(), seed=seed,
    )  # fmt: skip
    moved = {name for name, value in network.module.state_dict().items() if not torch.equal(value, before[name])}
    return found, network, moved


def test_a_student_gets_closer_to_its_teacher_on_images_that_it_did_not_learn_from(base, pixels):
    found, network, moved = learned(base, pixels)
    assert not found.undone
    assert (found.images, found.held_out) == (40, 8)
    held = list(range(4, 40, 5))
    network.module.eval()
    with torch.no_grad():
        logits = network.logits(pixels[held]).double().numpy()
    assert found.after == agreement.match(teacher(pixels).teacher[held], logits)
    assert found.after.divergence < 0.7 * found.before.divergence
    assert found.text.startswith(
        "All weights then learned for 8 epochs from the ensemble of the sites' networks on 32 of 40 public images; on "
        "the other 8 the divergence fell from "
    )
    assert any(name.endswith("fc.weight") for name in moved)
    assert not any("running" in name or "tracked" in name for name in moved)


def test_learning_that_leads_away_from_the_teacher_is_undone(base, pixels):
    found, _, moved = learned(base, pixels, settings(learning_rate=1.0, epochs=1))
    assert found.after.divergence >= found.before.divergence
    assert found.undone
    assert moved == set()
    assert "Learning from the ensemble was undone: on 8 held-out images the divergence rose from" in found.text


def test_the_seed_decides_what_is_learned(base, pixels):
    one, again, other = (learned(base, pixels, settings(epochs=1), seed=seed)[1] for seed in (0, 0, 1))
    states = [network.module.state_dict() for network in (one, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize("parameters", ["head", "affine"])
def test_only_the_wanted_weights_learn(parameters, base, pixels):
    network = models.load(base)
    affine = {
        f"{name}.{part}"
        for name, layer in network.module.named_modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
        for part in ("weight", "bias")
    }
    head = {name for name in network.module.state_dict() if name.endswith(("fc.weight", "fc.bias"))}
    found, _, moved = learned(base, pixels, settings(parameters=parameters))
    assert not found.undone
    assert moved
    assert moved <= (head if parameters == "head" else affine)


def test_few_images_are_refused_and_a_diverging_loss_says_at_which_step(base, pixels):
    with pytest.raises(InputError, match="learning from the ensemble needs at least 10 images, got 5"):
        learned(base, pixels[:5])
    wild = settings().model_copy(update={"learning_rate": 1e30})
    with pytest.raises(InputError, match=r"learning diverged at step \d+ of 32 \(learning_rate 1e\+30\)"):
        learned(base, pixels, wild)


def test_a_label_that_the_teacher_does_not_know_is_no_target_and_labels_go_by_name(base, pixels):
    lessons = distillation._Lessons(
        lambda *_: pixels, teacher(pixels, ("owl", "cat", "yak")).teacher[None], ("owl", "cat", "yak")
    )
    targets = lessons.targets(("cat", "dog", "owl"))[0]
    whole = np.exp(teacher(pixels).teacher)
    assert np.allclose(targets[:, 1], 0)
    assert np.allclose(targets[:, 2], whole[:, 0] / whole[:, :2].sum(1))
    assert np.allclose(targets.sum(1), 1)


def random_parts(sites=3, images=6, labels=4):
    """Logarithms of probabilities; the second site lacks the last label, and the third knows two."""
    parts = np.full((sites, images, labels), np.nan)
    random = np.random.default_rng(0)
    for site, known in enumerate((4, 3, 2)):
        parts[site, :, :known] = agreement.log_softmax(3 * random.normal(size=(images, known)))
    return parts


@pytest.mark.parametrize("kind", ["logits", "probabilities", "confidence"])
def test_a_teacher_is_what_a_loop_over_sites_and_images_gives(kind):
    parts = random_parts()
    found = agreement.taught(kind, parts)
    for image in range(parts.shape[1]):
        said = []
        for label in range(parts.shape[2]):
            total, weight = 0.0, 0.0
            for one in parts[:, image]:
                if np.isnan(one[label]):
                    continue
                known = one[~np.isnan(one)]
                share = np.exp((np.exp(known) * known).sum()) if kind == "confidence" else 1.0
                total += share * (np.exp(one[label]) if kind == "probabilities" else one[label])
                weight += share
            said.append(total / weight if kind == "probabilities" else np.exp(total / weight))
        assert np.allclose(np.exp(found[image]), np.array(said) / sum(said))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "confidence"])
def test_a_label_of_no_site_and_a_silent_site_count_nothing(kind):
    parts = random_parts()
    more = np.concatenate([parts, np.full_like(parts[:1], np.nan)])
    assert np.allclose(agreement.taught(kind, more), agreement.taught(kind, parts))
    without = np.concatenate([parts, np.full_like(parts[:, :, :1], np.nan)], axis=2)
    found = np.exp(agreement.taught(kind, without))
    assert np.allclose(found[:, -1], 0)
    assert np.allclose(found[:, :-1], np.exp(agreement.taught(kind, parts)))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three sites on one base, one of which shares statistics."""
    folder = tmp_path_factory.mktemp("study")
    base = make_network("test_resnet", folder / "base")
    make_images(folder / "images", each=5)
    for number, site in enumerate(("a", "b", "c"), start=1):
        tuned = tune(base, folder / f"tuned-{site}", seed=number, step=0.05)
        make_vector(base, tuned, folder / f"site-{site}", with_statistics=site == "a")
    return folder


def recipe(study, folder, name="recipe", **sections):
    given = {"base": study / "base", "vectors": [study / f"site-{site}" for site in "abc"], **sections}
    restore = {"images": str(study / "images"), "batch_size": 5, **given.pop("recalibrate", {})}
    given = {"base": str(given["base"]), "vectors": [str(one) for one in given["vectors"]], "recalibrate": restore}
    return write_recipe(folder / f"{name}.yaml", **given, **sections_without(sections))


def sections_without(sections):
    return {name: value for name, value in sections.items() if name not in ("base", "vectors", "recalibrate")}


DISTIL = {"loss": "ensemble", "epochs": 2, "batch_size": 4, "learning_rate": 1e-3}


def test_a_merge_learns_after_any_mode_and_its_lock_gives_the_same_bytes(study, tmp_path, run):
    plain = run("merge", recipe(study, tmp_path, "plain", recalibrate={"mode": "statistics"}), "-o", "plain")
    assert plain.code == 0, plain.err
    path = recipe(study, tmp_path, recalibrate={"mode": "tune", "tune": {**DISTIL, "augment": "turns", "copies": 3}})
    outcome = run("merge", path, "-o", "fused", "--json")
    assert outcome.code == 0, outcome.err
    card, lock = ((tmp_path / "fused" / name).read_text() for name in ("README.md", "recipe.lock.yaml"))
    assert "The statistics of" in card
    assert "All weights then learned for 2 epochs from the ensemble of the sites' networks on 12 of 15" in card
    assert "loss: ensemble" in lock
    assert "copies: 3" in lock
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fused"))
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {name for name in after if "running" in name or "tracked" in name}
    # What is said of the agreement is of the network as it was written.
    told = json.loads(outcome.out)["agreement"]["fused"]["divergence"]
    assert told < json.loads((tmp_path / "plain" / "agreement.json").read_text())["fused"]["divergence"]
    again = run("merge", tmp_path / "fused" / "recipe.lock.yaml", "-o", "again")
    assert again.code == 0, again.err
    assert digest(tmp_path / "again" / "model.safetensors") == digest(tmp_path / "fused" / "model.safetensors")


def test_what_was_undone_is_said_and_leaves_the_restored_network(study, tmp_path, run):
    paths = [
        recipe(study, tmp_path, "plain", recalibrate={"mode": "relative"}),
        recipe(study, tmp_path, "undone", recalibrate={"mode": "relative", "tune": {**DISTIL, "learning_rate": 1.0}}),
    ]
    for path in paths:
        outcome = run("merge", path, "-o", path.stem)
        assert outcome.code == 0, outcome.err
    assert "warning: Learning from the ensemble was undone: on 3 held-out images the divergence rose" in outcome.err
    assert "Learning from the ensemble was undone" in (tmp_path / "undone" / "README.md").read_text()
    one, other = (digest(tmp_path / name / "model.safetensors") for name in ("plain", "undone"))
    assert one == other


SEARCHED = {"scale": {"search": [0.5, 1.0], "images": "./images"}}


@pytest.mark.parametrize(
    ("mode", "more"),
    [("none", {"dtype": "float16"}), ("statistics", {"merge": {"method": "auto"}}), ("relative", {"merge": SEARCHED})],
)
def test_learning_follows_whatever_was_chosen_and_its_lock_repeats_it(mode, more, study, tmp_path, run):
    (tmp_path / "images").symlink_to(study / "images")
    path = recipe(study, tmp_path, recalibrate={"mode": mode, "tune": DISTIL}, **more)
    for given, output in ((path, "fused"), (tmp_path / "fused" / "recipe.lock.yaml", "again")):
        outcome = run("merge", given, "-o", output)
        assert outcome.code == 0, outcome.err
    card = (tmp_path / "fused" / "README.md").read_text()
    told = re.findall("learned for 2 epochs from|Learning from the ensemble was undone", card)
    assert len(told) == 1
    # What `auto` takes can be as close as these few images let it be.
    assert told == ["learned for 2 epochs from"] or more.get("merge") == {"method": "auto"}
    one, again = (digest(tmp_path / name / "model.safetensors") for name in ("fused", "again"))
    assert one == again


def test_a_network_without_batch_norm_learns_as_well(tmp_path, run):
    base = make_network("vit", tmp_path / "base")
    make_images(tmp_path / "images", each=5)
    for number in (1, 2):
        make_vector(base, tune(base, tmp_path / f"tuned-{number}", seed=number, step=0.1), tmp_path / f"site-{number}")
    path = write_recipe(
        tmp_path / "recipe.yaml", base="./base", vectors=["./site-1", "./site-2"],
        recalibrate={"mode": "auto", "images": "./images", "tune": DISTIL},
    )  # fmt: skip
    outcome = run("merge", path, "-o", "fused")
    assert outcome.code == 0, outcome.err
    assert (
        "from the ensemble of the sites' networks on 12 of 15 public images"
        in outcome.err + (tmp_path / "fused" / "README.md").read_text()
    )


def test_each_variant_gets_the_answer_of_the_sites_to_that_very_picture(study):
    from hf_datavec.hub import parse
    from hf_datavec.images import open_images
    from hf_datavec.pipeline import judging
    from hf_datavec.pipeline.prepare import prepare

    plan = prepare(recipe(study, study, "variants")).plan
    judge = judging.judge(plan, open_images(parse(str(study / "images"))), "cpu")
    sites, given = judging.everyone(plan, "cpu"), settings(augment="crops", copies=3)
    load = distillation._loader(judge.pictures, given, 7)
    answers = distillation._answers(judge.ensemble, judge.pictures, sites, load, given)
    originals = judge.pictures.load(range(15))
    varied = torch.stack(
        [shown(originals[index], "crops", (7, place, index)) for place in (1, 2) for index in range(15)]
    )
    assert torch.equal(load(list(range(15)) * 2, [1] * 15 + [2] * 15), varied)
    expected = ensemble.of(sites, plan.labels, Pictures(30, lambda indices: varied[list(indices)], 5)).teacher
    assert np.allclose(answers[1:].reshape(30, -1), expected)
    assert np.array_equal(answers[0], judge.ensemble.teacher)


TWO = """
from pathlib import Path
from hf_datavec import processes
from hf_datavec.api import merge
merge("two.yaml", output=f"{processes.count()}/fused", device="cpu")
processes.leave()
"""


def test_one_and_two_processes_learn_the_same_bytes(study, tmp_path):
    recipe(study, tmp_path, "two", recalibrate={"mode": "auto", "tune": {**DISTIL, "augment": "turns", "copies": 2}})
    (tmp_path / "two.py").write_text(TWO)
    start = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    for more in ([], start):
        command = [sys.executable, *more, "two.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("model.safetensors", "README.md", "agreement.json"):
        one, other = (digest(tmp_path / count / "fused" / name) for count in "12")
        assert one == other, name


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"mode": "tune", "tune": {"loss": "ensemble", "steps": 3}}, "'steps': not for loss: ensemble"),
        ({"mode": "tune", "tune": {"epochs": 3, "mixup": False}}, "'epochs' and 'mixup': only for loss: ensemble"),
        ({"mode": "tune", "tune": {"parameters": "head"}}, "tune.parameters: 'head' is only for loss: ensemble"),
        ({"mode": "tune", "tune": {"loss": "ensemble", "copies": 3}}, "without 'augment' there is one variant"),
        ({"mode": "auto", "tune": {"loss": "entropy"}}, "is for mode 'tune' alone, but the mode is 'auto'"),
        ({"mode": "none", "images": None, "tune": {"loss": "ensemble"}}, "loss: ensemble learns on public images"),
        ({"mode": "tune", "tune": {"loss": "ensemble", "teacher": "mean"}}, "'mean' is not one of logits, probab"),
        ({"mode": "statistics", "count": 9, "tune": DISTIL}, "needs at least 10 images, got 9"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(section, problem, study, tmp_path, run):
    outcome = run("merge", recipe(study, tmp_path, recalibrate=section), "-o", "fused")
    assert outcome.code == 2
    assert problem in outcome.err
    assert not (tmp_path / "fused").exists()


def test_a_plan_says_what_learning_costs(study, tmp_path, run):
    path = recipe(study, tmp_path, recalibrate={"mode": "auto", "count": 100, "tune": {**DISTIL, "augment": "turns"}})
    assert (
        "then distils: 2 epochs on at most 100 images, 160 passes forward and back; each site's network answers to "
        "700 variants of them" in " ".join(run("plan", path).out.split())
    )
    told = json.loads(run("plan", path, "--json").out)["distils"]
    assert told == {"epochs": 2, "images": 100, "passes": 160, "variants": 700}
