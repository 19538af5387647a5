"""Restoration beyond re-estimation: what is carried over, repaired or tuned, and what is said about it."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from networks import make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from hf_datavec import hub, models, recalibrate
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import open_images
from hf_datavec.pipeline import restore
from hf_datavec.recalibrate import Domain, Gaussian, Pictures, Sites, lockstep
from hf_datavec.recalibrate.domain import divergence
from hf_datavec.recalibrate.relative import carried_over
from hf_datavec.vector import open_vector

KIND = "test_resnet"


@dataclass(frozen=True)
class Site:
    """What restoration needs of a contribution."""

    source: object
    weight: float
    has_statistics: bool = True
    labels: tuple[str, ...] = field(default=("cat", "dog", "owl"))


@pytest.fixture(scope="session")
def clinic_template(tmp_path_factory) -> Path:
    """Two sites whose statistics are those of their own images, and public images of their kind and of another."""
    folder = tmp_path_factory.mktemp("clinic")
    base = make_network(KIND, folder / "base")
    make_images(folder / "same", each=12, seed=9)
    make_images(folder / "other", each=12, seed=10)
    for path in sorted((folder / "other").rglob("*.png")):
        invert(path)
    for number in (1, 2):
        tuned = tune(base, folder / f"tuned-{number}", seed=number)
        images = open_images(hub.parse(str(make_images(folder / f"private-{number}", each=12, seed=number))))
        network = models.load(tuned)
        pixels = images.tensors(network.preprocess, range(len(images)))
        recalibrate.statistics(network, pictures(pixels))
        found = models.stored(network, lambda name: "running" in name)
        save_with(tuned, tuned, {**load_file(tuned / "model.safetensors"), **found})
        make_vector(base, tuned, folder / f"with-{number}", with_statistics=True)
        make_vector(base, tuned, folder / f"without-{number}")
    return folder


def invert(path: Path) -> None:
    from PIL import Image, ImageOps

    ImageOps.autocontrast(ImageOps.invert(Image.open(path)).convert("L")).convert("RGB").save(path)


def pictures(pixels: torch.Tensor, batch_size: int = 7) -> Pictures:
    return Pictures(len(pixels), lambda indices: pixels[list(indices)], batch_size)


@pytest.fixture(scope="session")
def sites(clinic_template) -> Sites:
    members = tuple(Site(open_vector(clinic_template / f"with-{number}"), float(number)) for number in (1, 2))
    return Sites(open_checkpoint(clinic_template / "base"), members, shared=True)


@pytest.fixture(scope="session")
def pixels(clinic_template) -> torch.Tensor:
    network = models.load(clinic_template / "base")
    images = open_images(hub.parse(str(clinic_template / "other")))
    return images.tensors(network.preprocess, range(20))


def fused(sites: Sites) -> models.Network:
    """The base plus the sum of both vectors; live names differ from those in the file by timm's wrapper."""
    network = models.load(sites.base.folder)
    live = network.module.state_dict()
    with torch.no_grad():
        for name in sites.base.named("weight", "head"):
            for one in sites.members:
                live[f"timm_model.{name}"] += one.source.read(name)
    return network


def one_batch(network: models.Network, pixels: torch.Tensor, *, own: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """By hooks on one whole batch in float64: the moments before and after each layer; `own` keeps its statistics."""
    module = copy.deepcopy(network.module).double()
    layers = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    found = {}

    def watch(name):
        def seen(layer, inputs):
            layer.training = not own
            value = inputs[0]
            statistics = (layer.running_mean, layer.running_var) if own else (None, None)
            after = torch.nn.functional.batch_norm(
                value, *statistics, layer.weight, layer.bias, training=not own, eps=layer.eps
            )
            moments = [f(one, dim=(0, 2, 3)) for one in (value, after) for f in (torch.mean, population)]
            found[name.removeprefix("timm_model.")] = tuple(one.detach() for one in moments)

        return seen

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        module(pixel_values=pixels.double())
    return found


def population(values: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    return values.var(dim=dim, correction=0)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_relative_is_its_formula_channel_by_channel(sites, pixels):
    network, total = fused(sites), 3.0
    home = sites.home()
    seen = recalibrate.observe(network, pictures(pixels))
    found = recalibrate.relative(seen, home=home, abroad=recalibrate.abroad(sites, pictures(pixels)))
    of_fused = one_batch(fused(sites), pixels, own=False)
    of_sites = [one_batch(one, pixels, own=False) for one, _ in sites.networks()]
    for name, restored in found.items():
        for channel in range(len(restored.mean)):
            means = [one[name][0][channel] for one in of_sites]
            mean = (1 * means[0] + 2 * means[1]) / total
            variance = sum(
                w / total * (one[name][1][channel] + (m - mean) ** 2)
                for w, one, m in zip((1, 2), of_sites, means, strict=True)
            )
            mu, v = home[name].mean[channel], home[name].variance[channel]
            close(restored.mean[channel], mu + (of_fused[name][0][channel] - mean) * (v / variance).sqrt())
            close(restored.variance[channel], v * of_fused[name][1][channel] / variance)


def test_relative_gives_the_sites_own_statistics_when_nothing_was_merged(sites, pixels):
    alone = Sites(sites.base, sites.members[:1], shared=True)
    network, own = next(alone.networks())
    abroad = recalibrate.abroad(alone, pictures(pixels))
    seen = recalibrate.observe(network, pictures(pixels))
    for name, restored in recalibrate.relative(seen, home=alone.home(), abroad=abroad).items():
        close(restored.mean, own[name].mean)
        close(restored.variance, own[name].variance)


def test_relative_is_re_estimation_when_the_pictures_are_the_sites_own(sites, pixels):
    abroad = recalibrate.abroad(sites, pictures(pixels))
    expected = recalibrate.observe(fused(sites), pictures(pixels))
    found = recalibrate.relative(expected, home=abroad, abroad=abroad)
    for name, restored in found.items():
        close(restored.mean, expected[name].mean)
        close(restored.variance, expected[name].variance)


def test_a_channel_that_is_still_in_either_place_keeps_what_it_had_at_home():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    still_abroad = carried_over(Gaussian(3 * one, one), Gaussian(one, 2 * one), Gaussian(zero, 1e-9 * one))
    assert (float(still_abroad.mean), float(still_abroad.variance)) == (1.0, 2.0)
    still_at_home = carried_over(Gaussian(3 * one, one), Gaussian(one, zero), Gaussian(zero, one))
    assert (float(still_at_home.mean), float(still_at_home.variance)) == (1.0, 0.0)
    below_zero = carried_over(Gaussian(one, -1e-12 * one), Gaussian(one, one), Gaussian(one, one))
    assert float(below_zero.variance) == 0.0


def test_repaired_channels_have_the_mean_and_spread_of_the_sites_networks(sites, pixels):
    network = fused(sites)
    found = recalibrate.repair(network, pictures(pixels), goals=recalibrate.goals(sites, pictures(pixels)))
    recalibrate.assign(network, found)
    of_sites = [one_batch(one, pixels, own=True) for one, _ in sites.networks()]
    for name, seen in one_batch(network, pixels, own=True).items():
        close(seen[2], (of_sites[0][name][2] + 2 * of_sites[1][name][2]) / 3)
        close(seen[3].sqrt(), (of_sites[0][name][3].sqrt() + 2 * of_sites[1][name][3].sqrt()) / 3)


def test_repair_leaves_a_channel_alone_that_its_layer_switches_off(sites, pixels):
    network = fused(sites)
    name = next(iter(recalibrate.observe(fused(sites), pictures(pixels))))
    with torch.no_grad():
        models.statistic_layers(network)[name].weight[0] = 0.0
    found = recalibrate.repair(network, pictures(pixels), goals=recalibrate.goals(sites, pictures(pixels)))
    assert all(bool(torch.isfinite(one.mean).all()) for one in found.values())
    close(found[name].mean[:1], one_batch(network, pixels, own=True)[name][0][:1])


@pytest.mark.parametrize("mode", ["relative", "repair"])
def test_the_batch_size_changes_no_carried_over_statistics(mode, sites, pixels, monkeypatch):
    reference = recalibrate.measured(mode, fused(sites), pictures(pixels, 20), sites).statistics
    for batch_size in (1, 6):
        for name, found in recalibrate.measured(
            mode, fused(sites), pictures(pixels, batch_size), sites
        ).statistics.items():
            close(found.mean, reference[name].mean)
            close(found.variance, reference[name].variance)
    monkeypatch.setattr(lockstep, "JOINT", 8)  # groups are pooled: the first layer sees the pictures themselves
    grouped = recalibrate.measured(mode, fused(sites), pictures(pixels, 3), sites).statistics
    close(next(iter(grouped.values())).mean, next(iter(reference.values())).mean)


@pytest.mark.parametrize("parameters", ["affine", "all"])
@pytest.mark.parametrize("labelled", [True, False])
def test_tuning_lowers_its_loss_and_moves_only_what_it_may(parameters, labelled, sites, pixels):
    networks = [fused(sites), fused(sites)]
    before = {name: value.clone() for name, value in networks[0].module.state_dict().items()}
    rows = [1] * len(pixels) if labelled else None
    options = {"parameters": parameters, "learning_rate": 1e-3}
    found = [recalibrate.tune(one, pictures(pixels, 20), rows, steps=15, **options) for one in networks]
    assert found[0] == found[1]
    assert found[0].after < found[0].before
    assert not found[0].why_undone
    affine = {
        f"{name}.{part}"
        for name, layer in networks[0].module.named_modules()
        if isinstance(layer, _BatchNorm)
        for part in ("weight", "bias")
    }
    moved = {name for name, value in networks[0].module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved & affine
    assert not any("running" in name for name in moved)
    assert (moved <= affine) == (parameters == "affine")


def test_a_tuning_that_does_not_help_held_out_images_is_undone(sites, pixels):
    network = fused(sites)
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    # The held-out fifth has other labels than all that is trained on, so training on these cannot help it.
    rows = [1 if index % 5 == 4 else 0 for index in range(len(pixels))]
    found = recalibrate.tune(network, pictures(pixels), rows, parameters="all", steps=30, learning_rate=1e-2)
    assert found.why_undone.startswith("it raised the loss on held-out images from ")
    assert found.after > found.before
    assert all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())


def test_a_tuning_that_makes_fewer_held_out_images_right_is_undone_though_their_loss_falls(sites, pixels, monkeypatch):
    measured = iter([(2.0, 3), (1.5, 2), (2.0, 3), (1.5, 3)])
    module = importlib.import_module("hf_datavec.recalibrate.tune")
    monkeypatch.setattr(module, "_whole_loss", lambda *_: next(measured))
    rows, options = [0, 1, 2, 0] * (len(pixels) // 4), {"parameters": "affine", "steps": 1, "learning_rate": 1e-2}
    for why in ("of 4 held-out images it left 2 right, 3 before", ""):
        network = fused(sites)
        before = {name: value.clone() for name, value in network.module.state_dict().items()}
        assert recalibrate.tune(network, pictures(pixels), rows, **options).why_undone == why
        same = all(torch.equal(value, before[name]) for name, value in network.module.state_dict().items())
        assert same == bool(why)


def test_a_diverging_tuning_says_at_which_step(sites, pixels):
    message = r"recalibrate: tuning diverged at step \d+ of 5 \(learning_rate 1e\+30\)"
    with pytest.raises(InputError, match=message):
        recalibrate.tune(fused(sites), pictures(pixels), None, parameters="all", steps=5, learning_rate=1e30)


def test_the_divergence_is_the_symmetric_one_of_two_gaussians():
    one = Gaussian(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([1.0, 4.0, 0.0]))
    other = Gaussian(torch.tensor([1.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 0.0]))
    each = []
    for m1, v1, m2, v2 in ((0.0, 1.0, 1.0, 1.0), (1.0, 4.0, 1.0, 1.0)):
        first, second = torch.distributions.Normal(m1, v1**0.5), torch.distributions.Normal(m2, v2**0.5)
        forth, back = (torch.distributions.kl_divergence(a, b) for a, b in ((first, second), (second, first)))
        each.append(float(forth + back))
    # The dead channel is alike in both, so it counts as zero.
    assert divergence(one, other) == pytest.approx(sorted([*each, 0.0])[1])


FOREIGN = "warning: The public images are of another kind than the sites'"
MIX = "warning: Tuning learns the public images' mix of classes"
APART = "warning: The sites' statistics belong to the sites' weights, not to the fused ones"
UNCHECKED = "warning: No site shares BatchNorm statistics"


def merged(run, folder: Path, *, vectors: str, **restore_section):
    recipe = write_recipe(
        folder / "r.yaml", base=str(folder / "base"), output="./fused", recalibrate=restore_section,
        vectors=[str(folder / f"{vectors}-{number}") for number in (1, 2)],
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    return outcome, (folder / "fused/README.md").read_text(), load_file(folder / "fused/model.safetensors")


@pytest.fixture
def clinic(clinic_template, tmp_path) -> Path:
    for path in clinic_template.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize(
    "case",
    [
        ("with", "same", "auto", "of 2 candidates the ensemble", ""),
        ("with", "other", "auto", "the public images are of another kind than the sites'", ""),
        ("without", "same", "auto", "were re-estimated on 36 images of `", UNCHECKED),
        ("with", None, "auto", "were combined from the sites' own.", APART),
        ("with", None, "moments", "were combined from the sites' own.", APART),
        ("without", None, "auto", "BatchNorm statistics are the base's.", "warning: There is nothing to restore from"),
        ("with", "same", "statistics", "were re-estimated", ""),
        ("with", "other", "statistics", "were re-estimated", FOREIGN),
        ("with", "other", "relative", "carried over from the sites' own statistics", ""),
        ("without", "other", "relative", "carried over from the base's statistics", UNCHECKED),
        ("with", "other", "repair", "the mean and spread that they have in the sites' networks", FOREIGN),
        ("with", "same", "repair", "the mean and spread that they have in the sites' networks", ""),
        ("without", "same", "repair", "with the base's statistics", UNCHECKED),
        ("with", "other", "tune", "weights were then tuned by 20 steps on the images' labels.", FOREIGN),
        ("with", "same", "tune", "weights were then tuned by 20 steps on the images' labels.", MIX),
    ],
)
def test_log_and_card_say_how_statistics_were_restored_and_what_speaks_against_it(case, clinic, run):
    vectors, images, mode, sentence, warned = case
    section = {"mode": mode} | ({"images": str(clinic / images)} if images else {})
    outcome, card, tensors = merged(run, clinic, vectors=vectors, **section)
    assert sentence in card
    # That these random networks answer otherwise than the sites' is told as well, and no matter of the restoration.
    told = [line for line in outcome.err.splitlines() if "warning:" in line and "The ensemble of" not in line]
    assert bool(told) == bool(warned)
    assert warned in outcome.err
    assert warned.removeprefix("warning: ") in card
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    assert all(bool((value >= 0).all()) for name, value in tensors.items() if name.endswith("running_var"))


def test_a_warning_comes_before_anything_is_written(clinic, run, monkeypatch):
    written = []
    original = restore.log.warning
    monkeypatch.setattr(
        restore.log, "warning", lambda *text: (written.append((clinic / ".fused.partial").exists()), original(*text))
    )
    merged(run, clinic, vectors="with", mode="statistics", images=str(clinic / "other"))
    assert written == [False]


def test_a_few_images_are_said_to_be_too_few_whatever_the_recipe_asks_for(clinic, run):
    few = clinic / "few"
    (few / "cat").mkdir(parents=True)
    (few / "cat/one.png").write_bytes((clinic / "same/cat/000.png").read_bytes())
    outcome, card, _ = merged(run, clinic, vectors="with", mode="relative", images=str(few))
    for text in (outcome.err, card):
        assert "Statistics of 1 image are mostly chance; some hundreds are usual." in text


@pytest.mark.parametrize(
    ("images", "kind"), [("same", "of the sites' kind"), ("other", "of another kind than the sites'")]
)
def test_the_guard_tells_what_it_found_in_every_mode(images, kind, clinic, run):
    for mode in ("auto", "relative"):
        outcome, _, _ = merged(run, clinic, vectors="with", mode=mode, images=str(clinic / images))
        assert f"recalibrate: the public images are {kind} (divergence " in outcome.err
        (clinic / "fused").rename(clinic / f"fused-{mode}")


def test_a_divergence_that_is_no_number_is_no_likeness():
    assert Domain(float("nan")).foreign
    assert Domain(0.2).foreign
    assert not Domain(0.1).foreign
    assert not Domain(None).foreign


def test_a_site_whose_variance_is_below_zero_is_named(clinic, run):
    tensors = load_file(clinic / "tuned-1/model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("running_var"))
    tensors[name][0] = -0.5
    make_vector(
        clinic / "base", save_with(clinic / "base", clinic / "bad", tensors), clinic / "v", with_statistics=True
    )
    recipe = write_recipe(
        clinic / "r.yaml", base="./base", output="./fused", vectors=["./v", "./with-2"], recalibrate={"mode": "moments"}
    )
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert "error: 'v' shares a variance of -0.5 for" in outcome.err
    assert "hint: the site's statistics are damaged" in outcome.err
    assert not any(path.name.startswith((".fused", "fused")) for path in clinic.iterdir())


@pytest.mark.parametrize(("what", "value"), [("running_var", 1e30), ("running_mean", -1e6)])
def test_a_site_whose_statistics_no_images_explain_is_named(what, value, clinic, run):
    tensors = load_file(clinic / "tuned-1/model.safetensors")
    tensors[next(name for name in sorted(tensors) if name.endswith(what))][0] = value
    make_vector(
        clinic / "base", save_with(clinic / "base", clinic / "bad", tensors), clinic / "v", with_statistics=True
    )
    for vectors, warned in ((["./with-1", "./v", "./with-2"], True), (["./with-1", "./with-2", "./with-1"], False)):
        named = [{"vector": path, "name": f"{number}-{path[2:]}"} for number, path in enumerate(vectors)]
        recipe = write_recipe(
            clinic / "r.yaml", base="./base", output=f"./fused-{warned}", vectors=named,
            recalibrate={"mode": "moments"},
        )  # fmt: skip
        outcome = run("merge", recipe)
        assert outcome.code == 0, outcome.err
        assert ("The statistics that '1-v' shares are so far from the other sites'" in outcome.err) == warned


def test_a_card_with_aliases_names_no_site_in_its_cautions(clinic, run):
    tensors = load_file(clinic / "tuned-1/model.safetensors")
    tensors[next(name for name in sorted(tensors) if name.endswith("running_var"))][0] = 1e30
    bad = save_with(clinic / "base", clinic / "bad", tensors)
    make_vector(clinic / "base", bad, clinic / "hospital", with_statistics=True)
    recipe = write_recipe(
        clinic / "r.yaml", base="./base", output="./fused", aliases=True, recalibrate={"mode": "moments"},
        vectors=["./with-1", "./hospital", "./with-2"],
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "The statistics that 'hospital' shares" in outcome.err  # the coordinator is told
    texts = [path.read_text() for path in (clinic / "fused").iterdir() if path.suffix in (".md", ".json", ".yaml")]
    assert any("The statistics that 'site-" in text for text in texts)
    assert not any("hospital" in text for text in texts)


def test_sites_that_share_stand_for_those_that_do_not(clinic, run):
    recipe = write_recipe(
        clinic / "r.yaml", base="./base", output="./fused", vectors=["./with-1", "./without-2"],
        recalibrate={"mode": "relative", "images": "./other"},
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 0, outcome.err
    assert "warning: Only 1 of 2 sites share statistics and stand for all." in outcome.err


def test_only_what_a_mode_may_change_is_changed_in_the_file(clinic, run):
    _, _, plain = merged(run, clinic, vectors="with", mode="none")
    for mode, tuned in (("relative", False), ("repair", False), ("tune", True)):
        (clinic / "fused").rename(clinic / f"before-{mode}")
        more = {"tune": {"loss": "entropy"}} if tuned else {}  # on labels these few images can undo it
        _, _, tensors = merged(run, clinic, vectors="with", mode=mode, images=str(clinic / "same"), **more)
        moved = {name for name, value in tensors.items() if not torch.equal(value, plain[name])}
        assert {name for name in plain if name.endswith(("running_mean", "running_var"))} <= moved
        assert any(not name.endswith(("running_mean", "running_var")) for name in moved) == tuned


@pytest.mark.parametrize(
    ("section", "problem", "hint"),
    [
        ({"mode": "relative"}, "recalibrate: mode 'relative' needs 'images:'", "mode: moments or none"),
        ({"mode": "repair"}, "recalibrate: mode 'repair' needs 'images:'", "mode: moments or none"),
        ({"mode": "tune"}, "recalibrate: mode 'tune' needs 'images:'", "mode: moments or none"),
        (
            {"mode": "auto", "tune": {"steps": 3}},
            "recalibrate.tune: is for mode 'tune' alone, but the mode is 'auto'",
            "remove it, or use mode: tune",
        ),
        (
            {"mode": "tune", "images": "./same", "tune": {"step": 3}},
            "recalibrate.tune: unknown key 'step'",
            "did you mean 'steps'?",
        ),
        (
            {"mode": "tune", "images": "./same", "tune": {"steps": 0}},
            "recalibrate.tune.steps: expected a number of at least 1, found 0",
            "",
        ),
        (
            {"mode": "tune", "images": "./flat", "tune": {"loss": "labels"}},
            "have no labels",
            "put each class in a folder of its own",
        ),
        (
            {"mode": "tune", "images": "./strange"},
            "have labels that the model lacks: 'wolf'",
            "or use tune: {loss: entropy}, which looks at no label",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(section, problem, hint, clinic, run):
    flat, strange = clinic / "flat", clinic / "strange/wolf"
    for folder in (flat, strange):
        folder.mkdir(parents=True)
        for path in sorted((clinic / "same/cat").iterdir())[:3]:
            (folder / path.name).write_bytes(path.read_bytes())
    recipe = write_recipe(clinic / "r.yaml", base="./base", output="./fused", vectors=["./with-1"], recalibrate=section)
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert problem in outcome.err
    assert hint in outcome.err
    assert not (clinic / "fused").exists()


def test_images_without_labels_are_tuned_on_by_entropy(clinic, run):
    flat = clinic / "flat"
    flat.mkdir()
    for path in sorted((clinic / "same/cat").iterdir()):
        (flat / path.name).write_bytes(path.read_bytes())
    section = {"mode": "tune", "images": str(flat), "tune": {"steps": 2, "parameters": "all"}}
    _, card, _ = merged(run, clinic, vectors="with", **section)
    assert "All weights were then tuned by 2 steps on the entropy of predictions, which no label checks." in card


@pytest.mark.parametrize("mode", ["relative", "repair"])
def test_a_search_shows_the_images_to_each_sites_network_once(mode, clinic, run, monkeypatch):
    built = []
    original = Sites.networks
    monkeypatch.setattr(Sites, "networks", lambda self: (built.append(1) or one for one in original(self)))
    found = []
    for scale in ({"search": [0.5, 1.0, 0.25], "images": str(clinic / "same")}, None):
        best = json.loads((clinic / "fused/search.json").read_text())["found"] if scale is None else scale
        recipe = write_recipe(
            clinic / "r.yaml", base="./base", output="./fused", vectors=["./with-1", "./with-2"],
            recalibrate={"mode": mode, "images": "./same"}, merge={"scale": best},
        )  # fmt: skip
        if scale is None:
            (clinic / "fused").rename(clinic / "searched")
        outcome = run("merge", recipe)
        assert outcome.code == 0, outcome.err
        found.append(load_file(clinic / "fused/model.safetensors"))
        # To see whether the images are of the sites' kind, for the ensemble, which tells `relative` all that it asks
        # for, and once more for `repair`, however many scales are tried.
        assert len(built) == {"relative": 4, "repair": 6}[mode]
        built.clear()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_plan_says_on_what_statistics_are_restored(clinic, run):
    recipe = {"base": "./base", "output": "./fused", "vectors": ["./with-1", "./without-2"]}
    write_recipe(clinic / "r.yaml", **recipe, recalibrate={"mode": "auto", "images": "./other"})
    assert "auto on ./other; 1 of 2 sites share statistics" in run("plan", "r.yaml").out
    told = json.loads(run("plan", "r.yaml", "--json").out)["recalibrate"]
    assert told == {"mode": "auto", "images": "./other", "statistics_of": ["with-1"], "temperature": "none"}
    write_recipe(clinic / "r.yaml", **recipe, recalibrate={"mode": "none", "images": "./other"})
    told = json.loads(run("plan", "r.yaml", "--json").out)["recalibrate"]
    assert told == {"mode": "none", "images": None, "statistics_of": [], "temperature": "none"}


def test_a_negative_weight_is_no_share_of_the_sites_data(clinic, run):
    recipe = write_recipe(
        clinic / "r.yaml", base="./base", output="./fused", recalibrate={"mode": "relative", "images": "./same"},
        vectors=[{"vector": "./with-1", "weight": 2}, {"vector": "./with-2", "weight": -1}],
        merge={"method": "linear", "options": {"normalize": False}},
    )  # fmt: skip
    outcome = run("merge", recipe)
    assert outcome.code == 2
    assert "'relative' averages, but the weight of 'with-2' is below zero" in outcome.err
    assert "or recalibrate: {mode: statistics}" in outcome.err


def test_the_rule_of_auto_is_the_one_in_the_documentation():
    same, other, unknown = Domain(0.01), Domain(0.5), Domain(None)
    assert recalibrate.automatic(True, True, same, images=True) == "statistics"
    assert recalibrate.automatic(True, True, other, images=True) == "relative"
    assert recalibrate.automatic(False, False, unknown, images=True) == "statistics"
    assert recalibrate.automatic(True, True, unknown, images=False) == "moments"
    assert recalibrate.automatic(True, False, unknown, images=False) == "none"
    assert recalibrate.automatic(False, False, unknown, images=False) == "none"


def test_the_lock_keeps_how_tuning_was_set(clinic, run):
    section = {"mode": "tune", "images": "./same", "tune": {"steps": 3, "loss": "entropy"}}
    merged(run, clinic, vectors="with", **{**section, "images": str(clinic / "same")})
    locks = [*clinic.glob("*.lock.yaml"), *(clinic / "fused").glob("*.lock.yaml")]
    assert locks
    assert all("steps: 3" in path.read_text() and "loss: entropy" in path.read_text() for path in locks)
    assert json.loads((clinic / "fused/config.json").read_text())
