"""What the Hub's readers see: cards, aliases, headers without downloads, and the Python side against a Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub_people import SITES, TOKENS, Person, api, consortium, online
from huggingface_hub import ModelCard, constants
from networks import make_images, make_network, tune, write_recipe

from hf_datavec.recipe import load

REPOS = [f"consortium/{site}" for site in SITES]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a base under a licence, three vectors, and public images as a data set."""
    folder = tmp_path_factory.mktemp("hub")
    base = make_network("test_resnet", folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    make_images(folder / "images")
    with consortium(folder / "server") as server, online():
        client = api(server, "coordinator")
        client.create_repo("consortium/base", private=True)
        client.upload_folder(repo_id="consortium/base", folder_path=base)
        client.create_repo("consortium/public", repo_type="dataset", private=True)
        client.upload_folder(repo_id="consortium/public", folder_path=folder / "images", repo_type="dataset")
        coordinator = Person("coordinator", folder / "maker", server)
        for seed, site in enumerate(SITES, start=1):
            tuned = tune(base, folder / f"tuned-{site}", seed=seed)
            made = coordinator.run("diff", "consortium/base", tuned, "-o", f"vector-{site}")
            assert made.returncode == 0, made.stderr
            sent = coordinator.run("push", f"vector-{site}", f"consortium/{site}")
            assert sent.returncode == 0, sent.stderr
        yield server


def merged(person: Person, **sections: object):
    images = {"images": "consortium/public"}
    defaults = {"base": "consortium/base", "vectors": REPOS, "output": "./fused"}
    person.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(person.folder / "recipe.yaml", **{**defaults, "recalibrate": images, "evaluate": images, **sections})
    done = person.run("merge", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return done


def checked(server, readme: Path, monkeypatch) -> ModelCard:
    """The card after the client's own validator has seen it."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.repocard.constants.ENDPOINT", server.endpoint)
    card = ModelCard.load(readme)
    card.validate()
    return card


def test_the_card_of_a_fused_repo_says_what_the_hub_reads(hub, tmp_path, monkeypatch):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    merged(coordinator, push={"repo": "consortium/fused"})
    card = checked(hub, coordinator.folder / "fused/README.md", monkeypatch)
    commit = api(hub, "coordinator").dataset_info("consortium/public").sha
    data = card.data.to_dict()
    assert data["base_model"] == ["consortium/base", *sorted(REPOS)]
    assert data["base_model_relation"] == "merge"
    assert data["library_name"] == "timm"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["consortium/public"]
    assert {result.dataset_revision for result in card.data.eval_results} == {commit}
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "balanced_accuracy"}
    assert card.text.count(f"`consortium/public` at commit `{commit}`") == 2
    files = api(hub, "consumer").list_repo_files("consortium/fused")
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", card.text):
        assert picture in files
    source = """
import timm, torch
from transformers import AutoModelForImageClassification
first = AutoModelForImageClassification.from_pretrained("consortium/fused").eval()
second = timm.create_model("hf-hub:consortium/fused", pretrained=True).eval()
pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(torch.equal(first(pixel_values=pixels).logits, second(pixels)))
"""
    for name, code, said in (("consumer", 0, "True\n"), ("stranger", 1, "")):
        loaded = Person(name, tmp_path / name, hub).python(source)
        assert (loaded.returncode, loaded.stdout) == (code, said), loaded.stderr
    lock = load(coordinator.folder / "fused/recipe.lock.yaml").lock
    assert lock.calibration.commit == lock.evaluation.commit == commit


def test_the_card_of_a_vector_repo_says_what_the_hub_reads(hub, tmp_path, monkeypatch):
    consumer = api(hub, "consumer")
    readme = Path(consumer.hf_hub_download(REPOS[0], "README.md", local_dir=tmp_path))
    card = checked(hub, readme, monkeypatch)
    data = card.data.to_dict()
    assert data["library_name"] == "hf-datavec"
    assert (data["base_model"], data["base_model_relation"]) == (["consortium/base"], "adapter")
    assert {"datavec", "task-vector"} <= set(data["tags"])
    assert data["license"] == "apache-2.0"
    assert "model-index" not in data
    assert "* Labels: " in card.text
    assert "does not share how many images" in card.text


def test_aliases_leave_no_name_of_a_site_in_the_folder(hub, tmp_path, monkeypatch):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    named = [{"vector": REPOS[0], "name": "Saint Elsewhere"}, *REPOS[1:]]
    merged(coordinator, vectors=named, aliases=True, push={"repo": "consortium/open", "private": False})
    folder = coordinator.folder / "fused"
    told = "\n".join(path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".md", ".yaml", ".json"))
    assert not re.search("hospital|elsewhere", told, re.IGNORECASE)
    assert "site-1" in told
    assert "site-3" in told
    assert checked(hub, folder / "README.md", monkeypatch).data.base_model == ["consortium/base"]
    assert "recipe.lock.yaml" not in api(hub, "coordinator").list_repo_files("consortium/open")
    again = coordinator.run("merge", "recipe.lock.yaml", "-o", "again", "--no-push")
    assert again.returncode == 0, again.stderr
    same = [(coordinator.folder / name / "model.safetensors").read_bytes() for name in ("fused", "again")]
    assert same[0] == same[1]


def test_a_public_push_without_aliases_says_what_it_tells(hub, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    coordinator.folder.mkdir(parents=True)
    write_recipe(
        coordinator.folder / "recipe.yaml", base="consortium/base", vectors=REPOS, output="./fused",
        push={"repo": "consortium/open", "private": False},
    )  # fmt: skip
    planned = coordinator.run("plan", "recipe.yaml")
    assert "its card names the sites' repos; aliases: true replaces them" in planned.stdout


def test_inspect_reads_headers_alone_unless_asked_for_cosines(hub, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    hub.log.clear()
    seen = coordinator.run("inspect", *REPOS, "--json")
    assert seen.returncode == 0, seen.stderr
    found = json.loads(seen.stdout)
    assert not list(coordinator.folder.rglob("*.safetensors"))
    assert not any(exchange.status == 200 and "/storage/" in exchange.path for exchange in hub.log)
    assert found["cosines"] is None
    assert found["vectors"][0]["roles"].keys() == {"weight", "head"}
    assert "only headers were read; --download fetches" in coordinator.run("inspect", *REPOS).stdout
    whole = json.loads(coordinator.run("inspect", *REPOS, "--json", "--download").stdout)
    assert len(whole["cosines"]) == 3
    for before, after in zip(found["vectors"], whole["vectors"], strict=True):
        assert before["norm"] == pytest.approx(after["norm"], rel=1e-5)
    # What is in the cache needs no download, so now the cosines come by themselves.
    assert json.loads(coordinator.run("inspect", *REPOS, "--json").stdout)["cosines"] == whole["cosines"]


def test_a_plan_counts_as_download_only_what_the_cache_lacks(hub, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    coordinator.folder.mkdir(parents=True)
    write_recipe(coordinator.folder / "recipe.yaml", base="consortium/base", vectors=REPOS, output="./fused")
    assert json.loads(coordinator.run("plan", "recipe.yaml", "--json").stdout)["download_bytes"] > 0
    assert coordinator.run("merge", "recipe.yaml").returncode == 0
    assert json.loads(coordinator.run("plan", "recipe.yaml", "--json").stdout)["download_bytes"] == 0


def test_vectors_and_merges_go_through_the_hub_from_python(hub, tmp_path):
    """With a token given by hand, which beats the stranger's in the environment."""
    person = Person("stranger", tmp_path / "notebook", hub)
    person.folder.mkdir()
    write_recipe(
        person.folder / "recipe.yaml", base="consortium/base", vectors=["consortium/doubled@v1"], output="./fused"
    )
    source = f"""
import os
from hf_datavec import TaskVector, merge
token = os.environ["OTHER"]
vector = TaskVector.from_pretrained("{REPOS[0]}", token=token)
url = (2 * vector).push_to_hub("consortium/doubled", revision="v1", commit_message="Twice", token=token)
again = TaskVector.from_pretrained("consortium/doubled", revision="v1", token=token)
print(again.base, again.norm / vector.norm)
print(merge("recipe.yaml", token=token).output.name)
print(type(again.apply_to("consortium/base", scale=0.5, token=token)).__name__)
try:
    TaskVector.from_pretrained("{REPOS[0]}")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = person.python(source, OTHER=TOKENS["coordinator"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[0] == "consortium/base"
    assert float(lines[0].split()[1]) == pytest.approx(2, rel=1e-5)
    assert lines[1:3] == ["fused", "TimmWrapperForImageClassification"]
    assert lines[3].startswith(f"InputError there is no Hub repo '{REPOS[0]}', or you may not see it")
    commits = api(hub, "coordinator").list_repo_commits("consortium/doubled", revision="v1")
    assert commits[0].title == "Twice"
    assert api(hub, "coordinator").model_info("consortium/doubled").private
