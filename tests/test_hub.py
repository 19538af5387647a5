"""Vectors travel through private repos: three sites, a coordinator, a consumer and a stranger, over real HTTP."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_people import SITES, Person, api, consortium, online
from hubserver import Fault, HubServer
from networks import digest, make_images, make_network, make_vector, save_with, tune, write_recipe
from safetensors.torch import load_file

from hf_datavec.manifest import Manifest

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A base and three tuned networks on disk, made once."""
    folder = tmp_path_factory.mktemp("networks")
    make_network("test_resnet", folder / "base")
    for seed, site in enumerate(SITES, start=1):
        tune(folder / "base", folder / f"tuned-{site}", seed=seed)
    make_images(folder / "images")
    return folder


@pytest.fixture(autouse=True)
def _online():
    with online():
        yield


@pytest.fixture
def hub(tmp_path):
    with consortium(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def published(hub, template, tmp_path):
    """The Hub with the base and three private vectors, each pushed by its own site with the real commands."""
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    pushed = coordinator.run("push", template / "base", "consortium/base")
    assert pushed.returncode == 0, pushed.stderr
    for name in SITES:
        site = Person(name, tmp_path / name, hub)
        made = site.run("diff", "consortium/base", template / f"tuned-{name}", "-o", "vector")
        assert made.returncode == 0, made.stderr
        sent = site.run("push", "vector", f"consortium/{name}")
        assert sent.returncode == 0, sent.stderr
    return hub


def recipe(folder: Path, **sections: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, object] = {
        "base": "consortium/base",
        "vectors": [f"consortium/{site}" for site in SITES],
        "output": "./fused",
    }
    return write_recipe(folder / "recipe.yaml", **{**defaults, **sections})


def test_sites_push_a_coordinator_merges_and_a_consumer_loads(published, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    shutil.copytree(template / "images", coordinator.folder / "images")
    recipe(
        coordinator.folder, merge={"method": "mean"}, recalibrate={"images": "./images"},
        evaluate={"images": "./images"}, push={"repo": "consortium/fused"},
    )  # fmt: skip
    merged = coordinator.run("merge", "recipe.yaml")
    assert merged.returncode == 0, merged.stderr
    for repo in ("base", *SITES, "fused"):
        assert api(published, "coordinator").model_info(f"consortium/{repo}").private
    consumer = Person("consumer", tmp_path / "consumer", published)
    loaded = consumer.run("evaluate", "consortium/fused", template / "images", "--json")
    assert loaded.returncode == 0, loaded.stderr
    ours = json.loads((coordinator.folder / "fused" / "evaluation.json").read_text())
    assert json.loads(loaded.stdout)["metrics"] == ours["metrics"]
    stranger = Person("stranger", tmp_path / "stranger", published)
    recipe(stranger.folder)
    for command, repo in (
        (("merge", "recipe.yaml"), "base"),
        (("plan", "recipe.yaml"), "base"),
        (("evaluate", "consortium/fused", template / "images"), "fused"),
        (("inspect", f"consortium/{SITES[0]}"), SITES[0]),
        (("diff", "consortium/base", template / "base", "-o", "v"), "base"),
    ):
        refused = stranger.run(*command)
        assert refused.returncode == 2
        assert refused.stderr == (
            f"error: there is no Hub repo 'consortium/{repo}', or you may not see it\n"
            "  hint: log in with `hf auth login` or set HF_TOKEN, and ask the owner for access\n"
        )
    refused = stranger.run("push", template / "base", "consortium/mine")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the Hub refuses access to 'consortium/mine' (403)")
    assert not (stranger.folder / "fused").exists()


def test_a_lock_gives_the_same_bytes_online_and_offline_whatever_happens_to_the_branch(published, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    recipe(coordinator.folder)
    assert coordinator.run("plan", "recipe.yaml", "--lock").returncode == 0
    lock = (coordinator.folder / "recipe.lock.yaml").read_text()
    assert lock.count("commit: ") == 4
    assert lock.count("digest: blake3:") == 4
    assert coordinator.run("merge", "recipe.yaml").returncode == 0
    first = (coordinator.folder / "fused" / WEIGHTS).read_bytes()
    other = make_vector(template / "base", template / f"tuned-{SITES[1]}", tmp_path / "other")
    client = api(published, "coordinator")
    before = client.model_info(f"consortium/{SITES[0]}").sha
    client.upload_folder(repo_id=f"consortium/{SITES[0]}", folder_path=other)
    assert client.model_info(f"consortium/{SITES[0]}").sha != before
    fresh = Person("coordinator", tmp_path / "fresh", published)
    shutil.copytree(coordinator.folder, fresh.folder, ignore=shutil.ignore_patterns("hf-home", "fused"))
    assert fresh.run("merge", "recipe.lock.yaml", "-o", "again").returncode == 0
    assert digest(fresh.folder / "again" / WEIGHTS) == digest(first)
    offline = fresh.run("merge", "recipe.lock.yaml", "-o", "offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert digest(fresh.folder / "offline" / WEIGHTS) == digest(first)
    moved = fresh.run("merge", "recipe.yaml", "-o", "moved")
    assert moved.returncode == 0, moved.stderr
    assert (fresh.folder / "moved" / WEIGHTS).read_bytes() != first
    # Force-pushed: the pinned commit is gone from the branch, but the Hub still has it.
    repository = published.repository(f"consortium/{SITES[0]}")
    published.set_branch(f"consortium/{SITES[0]}", "main", next(iter(repository.commits)))
    third = Person("coordinator", tmp_path / "third", published)
    shutil.copytree(coordinator.folder, third.folder, ignore=shutil.ignore_patterns("hf-home", "fused"))
    assert third.run("merge", "recipe.lock.yaml", "-o", "again").returncode == 0
    assert digest(third.folder / "again" / WEIGHTS) == digest(first)
    # Squashed away: the commit is nowhere, which is a clear refusal.
    del repository.commits[before]
    fourth = Person("coordinator", tmp_path / "fourth", published)
    shutil.copytree(coordinator.folder, fourth.folder, ignore=shutil.ignore_patterns("hf-home", "fused"))
    gone = fourth.run("merge", "recipe.lock.yaml", "-o", "again")
    assert gone.returncode == 2
    assert gone.stderr.startswith(f"error: the Hub repo 'consortium/{SITES[0]}' at '{before}' has no such revision")


def test_a_branch_that_moves_between_plan_and_download_changes_nothing(published, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    recipe(coordinator.folder)
    repo = f"consortium/{SITES[0]}"
    repository = published.repository(repo)
    first = next(iter(repository.commits))  # the commit that only has .gitattributes
    fault = Fault(f"^/{repo}/resolve/[0-9a-f]+/vector.safetensors", "call", skip=1,
                  action=lambda: published.set_branch(repo, "main", first))  # fmt: skip
    published.faults.append(fault)
    merged = coordinator.run("merge", "recipe.yaml")
    assert fault.fired == 1
    assert merged.returncode == 0, merged.stderr


def test_a_plan_of_a_large_base_moves_little(hub, tmp_path):
    """1 GB of base and eight vectors: headers come by range requests, nothing large is downloaded."""
    base = make_network("vit", tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    vectors = []
    client = api(hub, "coordinator")
    client.create_repo("consortium/base", private=True)
    big = tmp_path / "big"
    big.mkdir()
    large = {**tensors, "vit.embeddings.position_embeddings": tensors["vit.embeddings.position_embeddings"]}
    large["vit.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(250_000_000)
    save_with(base, big, large)
    assert (big / WEIGHTS).stat().st_size > 1_000_000_000
    client.upload_folder(repo_id="consortium/base", folder_path=big)
    commit = client.model_info("consortium/base").sha
    for number in range(8):
        vector = tmp_path / f"v{number}"
        make_vector(base, tune(base, tmp_path / f"t{number}", seed=number), vector)
        _claim(vector, commit)
        client.create_repo(f"consortium/v{number}", private=True)
        client.upload_folder(repo_id=f"consortium/v{number}", folder_path=vector)
        vectors.append(f"consortium/v{number}")
    hub.log.clear()
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    recipe(coordinator.folder, vectors=vectors)
    planned = coordinator.run("plan", "recipe.yaml", "--json")
    moved = sum(exchange.bytes_in + exchange.bytes_out for exchange in hub.log)
    assert moved < 2_000_000
    # The vectors are of a small stand-in, so the plan refuses them by shape: all eight, from headers alone.
    assert planned.returncode == 2
    assert planned.stderr.count("has shape [32, 16], expected [250000000]") == 8


def _claim(vector: Path, commit: str) -> None:
    """Make a manifest say that its base is the one on the Hub."""
    manifest = json.loads((vector / "datavec.json").read_text())
    manifest["base"] |= {"id": "consortium/base", "commit": commit}
    sealed = Manifest.model_validate_json(json.dumps(manifest)).sealed()
    sealed.write(vector)


def test_a_plan_says_what_a_merge_will_download(published, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    recipe(coordinator.folder)
    plan = json.loads(coordinator.run("plan", "recipe.yaml", "--json").stdout)
    assert plan["download_bytes"] > plan["read_bytes"] * 0.99
    assert plan["base_digest"].startswith("blake3:")
    assert "downloads" in coordinator.run("plan", "recipe.yaml").stdout
    assert not list(coordinator.folder.rglob("*.safetensors"))
    assert coordinator.run("merge", "recipe.yaml").returncode == 0
    assert json.loads((coordinator.folder / "recipe.yaml").read_text())["output"] == "./fused"


def test_vectors_of_another_base_are_refused_before_any_download(published, template, tmp_path):
    client = api(published, "coordinator")
    other = load_file(template / "base" / WEIGHTS)
    save_with(template / "base", tmp_path / "other", {**other, "fc.bias": other["fc.bias"] + 1})
    client.upload_folder(repo_id="consortium/base", folder_path=tmp_path / "other")
    published.log.clear()
    coordinator = Person("coordinator", tmp_path / "coordinator2", published)
    recipe(coordinator.folder)
    refused = coordinator.run("merge", "recipe.yaml")
    assert refused.returncode == 2
    assert refused.stderr.count("whose weights are not those of 'consortium/base'") == 3
    assert sum(exchange.bytes_out for exchange in published.log) < 1_000_000


def test_a_private_push_never_lands_in_a_public_repo(hub, template, tmp_path):
    api(hub, "coordinator").create_repo("consortium/open", private=False)
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    refused = coordinator.run("push", template / "base", "consortium/open")
    assert refused.returncode == 2
    assert "the Hub repo 'consortium/open' is public, but a private one is wanted" in refused.stderr
    assert WEIGHTS not in api(hub, "coordinator").list_repo_files("consortium/open")
    assert coordinator.run("push", template / "base", "consortium/open", "--public").returncode == 0


def test_a_push_can_go_to_a_branch_or_a_pull_request(hub, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    assert coordinator.run("push", template / "base", "consortium/base").returncode == 0
    branch = coordinator.run("push", template / "base", "consortium/base", "--revision", "v1")
    assert branch.returncode == 0, branch.stderr
    client = api(hub, "coordinator")
    main = client.model_info("consortium/base").sha
    save_with(template / "base", tmp_path / "changed", {
        name: value + 1 if name == "fc.bias" else value
        for name, value in load_file(template / "base" / WEIGHTS).items()
    })  # fmt: skip
    proposed = coordinator.run("push", tmp_path / "changed", "consortium/base", "--create-pr")
    assert proposed.returncode == 0, proposed.stderr
    assert client.model_info("consortium/base").sha == main
    refs = client.list_repo_refs("consortium/base", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "v1"]
    assert len(refs.pull_requests) == 1


def test_somebody_elses_commit_in_between_refuses_ours(hub, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    assert coordinator.run("push", template / "base", "consortium/base").returncode == 0
    changed = tmp_path / "changed"
    tune(template / "base", changed, seed=9)

    def meanwhile() -> None:
        repository = hub.repository("consortium/base")
        hub.set_branch("consortium/base", "main", next(iter(repository.commits)))

    hub.faults.append(Fault("/api/models/consortium/base/preupload/", "call", action=meanwhile))
    refused = coordinator.run("push", changed, "consortium/base")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: 'consortium/base' changed on the Hub while we worked")
    assert coordinator.run("push", changed, "consortium/base").returncode == 0


@pytest.mark.parametrize(
    "case",
    [
        (Fault("/commit/", "status", status=500), 1, "the Hub answered 500 for 'consortium/base'"),
        (Fault("/commit/", "status", status=429, retry_after=1), 1, "the Hub asks to slow down for 'consortium/base'"),
        (Fault("/commit/", "drop", side="answer"), 1, "the connection to the Hub broke for 'consortium/base'"),
        (Fault("/repos/create", "status", status=409), 1, "the Hub reports a conflict for 'consortium/base'"),
        (Fault("/repos/create", "status", status=403), 2, "the Hub refuses access to 'consortium/base' (403)"),
    ],
    ids=["500", "429", "lost answer", "409", "403"],
)
def test_a_push_that_fails_says_why_and_works_when_run_again(case, hub, template, tmp_path):
    fault, code, message = case
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    hub.faults.append(fault)
    failed = coordinator.run("push", template / "base", "consortium/base")
    assert failed.returncode == code
    assert message in failed.stderr
    hub.faults.clear()
    again = coordinator.run("push", template / "base", "consortium/base")
    assert again.returncode == 0, again.stderr
    client = api(hub, "coordinator")
    assert WEIGHTS in client.list_repo_files("consortium/base")
    assert len(client.list_repo_commits("consortium/base")) == 2


def test_altered_bytes_on_the_way_are_noticed(published, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    recipe(coordinator.folder)
    published.faults.append(Fault("^/storage/", "corrupt", method="GET", times=None))
    failed = coordinator.run("merge", "recipe.yaml")
    assert failed.returncode == 2
    assert "safetensors" in failed.stderr
    assert not (coordinator.folder / "fused").exists()


def put(hub: HubServer, folder: Path, repo: str) -> str:
    """Send a folder to a new private repo with the client alone; returns the repo."""
    client = api(hub, "coordinator")
    client.create_repo(repo, private=True)
    client.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def test_a_file_that_was_altered_on_the_way_is_fetched_again_by_the_next_run(hub, template, tmp_path):
    """Also when an earlier run died before it could tell, and left the file in the cache."""
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    made = make_vector(template / "base", template / f"tuned-{SITES[0]}", tmp_path / "vector")
    vector = put(hub, made, "consortium/vector")
    for path, name in (("^/storage/", "vector.safetensors"), (f"^/{vector}/resolve/.*json", "datavec.json")):
        hub.faults.append(Fault(path, "corrupt", method="GET"))
        failed = coordinator.run("inspect", vector, "--download")
        assert failed.returncode == 1
        assert failed.stderr == (
            f"error: files of the Hub repo '{vector}' were altered on the way: '{name}'\n"
            "  hint: run the same command again; what is complete is not sent or fetched twice\n"
        )
        right = coordinator.run("inspect", vector, "--download")
        assert right.returncode == 0, right.stderr
        for kept in (path.resolve() for path in (coordinator.folder / "hf-home").rglob(name)):
            content = kept.read_bytes()
            kept.write_bytes(b"\xff" + content[1:])
        again = coordinator.run("inspect", vector, "--download")
        assert (again.returncode, again.stdout) == (0, right.stdout)
        shutil.rmtree(coordinator.folder / "hf-home")


def test_an_answer_that_no_hub_gives_is_told_in_words(hub, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    hub.faults.append(Fault("^/api/models/consortium/base", "corrupt", method="GET", times=None))
    for command in (("push", template / "base", "consortium/base"), ("inspect", "consortium/base")):
        failed = coordinator.run(*command)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: the answer of the Hub for 'consortium/base' is not what a Hub says (")


def test_a_card_that_the_hub_does_not_take_is_told_in_words(hub, template, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(template / "base", folder)
    (folder / "README.md").write_text("---\nbase_model_relation: blend\n---\n")
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    refused = coordinator.run("push", folder, "consortium/base")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the Hub refuses 'consortium/base': Invalid metadata in README.md. - ")
    assert WEIGHTS not in api(hub, "coordinator").list_repo_files("consortium/base")


@pytest.mark.parametrize("aliases", [False, True])
def test_a_merge_whose_push_failed_is_pushed_by_running_it_again(hub, template, tmp_path, aliases):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    shutil.copytree(template / "images", coordinator.folder / "images")
    vectors = [
        put(hub, make_vector(template / "base", template / f"tuned-{site}", tmp_path / site), f"consortium/{site}")
        for site in SITES[:2]
    ]
    sections = {"base": put(hub, template / "base", "consortium/base"), "vectors": vectors}
    sections |= {"evaluate": {"images": "./images"}, "aliases": aliases}
    sections["recalibrate"] = {"images": "./images", "temperature": "labels"}
    recipe(coordinator.folder, push={"repo": "consortium/fused"}, **sections)
    whole = json.loads(coordinator.run("merge", "recipe.yaml", "-o", "aside/fused", "--no-push", "--json").stdout)
    hub.faults.append(Fault("^/api/models/consortium/fused/commit/", "status", status=403))
    assert coordinator.run("merge", "recipe.yaml").returncode == 2
    written = {path: path.stat().st_mtime_ns for path in (coordinator.folder / "fused").iterdir()}
    assert len(hub.repository("consortium/fused").commits) == 1
    refused = coordinator.run("merge", "recipe.yaml", "--no-push")
    assert "already exists" in refused.stderr
    again = coordinator.run("merge", "recipe.yaml", "--json")
    assert again.returncode == 0, again.stderr
    assert "already holds this merge; only the push is missing" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (coordinator.folder / "fused").iterdir()} == written
    told = json.loads(again.stdout)
    same = {key for key in whole if whole[key] == told[key]}
    assert set(whole) - same == {"output", "restoration", "pushed_to"}
    assert WEIGHTS in api(hub, "coordinator").list_repo_files("consortium/fused")
    # Weights that are not the recipe's are not pushed, nor is another recipe's result.
    weights = load_file(coordinator.folder / "fused" / WEIGHTS)
    save_with(
        coordinator.folder / "fused", coordinator.folder / "fused", {**weights, "fc.bias": weights["fc.bias"] + 1}
    )
    assert "already exists" in coordinator.run("merge", "recipe.yaml").stderr
    recipe(coordinator.folder, push={"repo": "consortium/fused"}, merge={"scale": 0.5}, **sections)
    other = coordinator.run("merge", "recipe.yaml")
    assert other.returncode == 2
    assert "already exists" in other.stderr


def test_a_server_without_xet_is_named(hub, template, tmp_path):
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    failed = coordinator.run("push", template / "base", "consortium/base", HF_HUB_DISABLE_XET="0")
    assert failed.returncode == 1
    assert failed.stderr == (
        "error: the server of 'consortium/base' has no xet storage\n"
        "  hint: set HF_HUB_DISABLE_XET=1 to send large files by LFS\n"
    )


def test_a_coordinator_finds_the_vectors_of_an_org_and_gets_a_recipe(published, template, tmp_path):
    """Only vectors that share a base go into the recipe; the others are named."""
    other = tmp_path / "other"
    base = load_file(template / "base" / WEIGHTS)
    save_with(template / "base", other, {**base, "fc.bias": base["fc.bias"] + 1})
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    assert coordinator.run("diff", other, template / f"tuned-{SITES[0]}", "-o", "stray").returncode == 0
    assert coordinator.run("push", "stray", "consortium/stray").returncode == 0
    listed = coordinator.run("list", "consortium", "--json")
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)
    assert [one["vector"].partition("@")[0] for one in found] == [
        *(f"consortium/{site}" for site in SITES),
        "consortium/stray",
    ]
    assert [one["fits"] for one in found] == [True, True, True, False]
    assert all(len(one["vector"].partition("@")[2]) == 40 for one in found)
    written = coordinator.run("recipe", "consortium", "-o", "all.yaml")
    assert written.returncode == 0, written.stderr
    assert "NO: another base" in written.stdout
    text = (coordinator.folder / "all.yaml").read_text()
    assert "stray" not in text
    merged = coordinator.run("merge", "all.yaml")
    assert merged.returncode == 0, merged.stderr
    stranger = Person("stranger", tmp_path / "stranger", published)
    refused = stranger.run("list", "consortium")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the Hub shows no task vectors of 'consortium'")


def test_hostile_repos_are_named_and_never_followed_or_executed(published, template, tmp_path):
    """A pickle beside the vector changes nothing; names that lead out, absurd headers and code are refused."""
    marker = tmp_path / "executed"
    client = api(published, "coordinator")
    vector = f"consortium/{SITES[0]}"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (marker,))

    good = published.repository(vector).refs["refs/heads/main"]
    coordinator = Person("coordinator", tmp_path / "coordinator", published)
    recipe(coordinator.folder)
    for name in ("pytorch_model.bin", "evil.py"):
        client.upload_file(repo_id=vector, path_in_repo=name, path_or_fileobj=pickle.dumps(Bomb()))
    assert coordinator.run("merge", "recipe.yaml", "-o", "with-pickle").returncode == 0
    fetched = list((coordinator.folder / "hf-home").rglob("*"))
    assert not [path for path in fetched if path.name in ("pytorch_model.bin", "evil.py")]

    def refused_with(files: dict[str, bytes], message: str, *, repo: str = vector, start: str = good) -> None:
        repository = published.repository(repo)
        commit = repository.resolve(start)
        content = {**commit.files, **{name: repository.add_blob(name, data) for name, data in files.items()}}
        added = repository.record(content, commit.id, "mallory", "hostile")
        published.set_branch(repo, "main", added.id)
        outcome = coordinator.run("merge", "recipe.yaml", "-o", "fused")
        assert outcome.returncode == 2, outcome.stderr
        assert message in outcome.stderr
        assert not (coordinator.folder / "fused").exists()
        published.set_branch(repo, "main", start)

    refused_with({"../outside.json": b"{}"}, "files whose names lead out of their folder: '../outside.json'")
    absurd = (5_000_000_000).to_bytes(8, "little") + b"{}" * 20
    refused_with({"vector.safetensors": absurd}, "'vector.safetensors' of the Hub repo 'consortium/hospital-a' is not")
    refused_with({"README.md": b"---\nbase_model: [\n---\n", "datavec.json": b"{"}, "datavec.json' is damaged")
    config = json.loads((template / "base" / "config.json").read_text())
    asking = json.dumps({**config, "auto_map": {"AutoModelForImageClassification": "evil.Net"}}).encode()
    start = published.repository("consortium/base").refs["refs/heads/main"]
    refused_with({"config.json": asking}, "asks to run code from its repo", repo="consortium/base", start=start)
    assert not marker.exists()


def test_a_link_in_a_folder_is_not_pushed(hub, template, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(template / "base", folder)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "evaluation.json").symlink_to(tmp_path / "secret.json")
    coordinator = Person("coordinator", tmp_path / "coordinator", hub)
    assert coordinator.run("push", folder, "consortium/base").returncode == 0
    assert "evaluation.json" not in api(hub, "coordinator").list_repo_files("consortium/base")


def test_hf_datavec_is_an_extension_of_the_hf_command_line(tmp_path):
    """Registered as `hf extensions install` does it: a manifest beside the installed command."""
    place = tmp_path / ".local/share/hf/extensions/hf-datavec"
    place.mkdir(parents=True)
    command = Path(sys.executable).parent / "hf-datavec"
    about = {
        "owner": "hf-datavec", "repo": "hf-datavec", "repo_id": "hf-datavec/hf-datavec", "short_name": "datavec",
        "executable_path": str(command), "type": "python", "installed_at": "2026-01-01T00:00:00+00:00",
        "description": "Fuse task vectors", "commit_sha": "0" * 40,
    }  # fmt: skip
    (place / "manifest.json").write_text(json.dumps(about))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    hf = [str(command.with_name("hf")), "datavec"]
    shown = subprocess.run([*hf, "methods", "--json"], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert {"sum", "mean", "linear"} <= set(json.loads(shown.stdout))
    wrong = subprocess.run(
        [*hf, "merge", "nowhere.yaml"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert wrong.stderr == "error: there is no file 'nowhere.yaml'\n"
