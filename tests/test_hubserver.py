"""The server, seen through the real client: nothing of huggingface_hub is replaced."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hubserver import Fault, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    get_session,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever of its two HTTP libraries is in use

REPO = "clinic/model"
WEIGHTS = 40_000  # floats in the model of these tests


@pytest.fixture(autouse=True)
def client_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what is otherwise read from the environment at import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A server with a member of an organisation and a stranger."""
    with HubServer(tmp_path / "hub") as server:
        server.add_user("alice", "hf_alice", orgs=["clinic"])
        server.add_user("alice", "hf_alice_reads", orgs=["clinic"], role="read")
        server.add_user("mallory", "hf_mallory")
        yield server


@pytest.fixture
def api(server: HubServer) -> HfApi:
    """The client of the member."""
    return HfApi(endpoint=server.endpoint, token="hf_alice")


def safetensors(count: int = WEIGHTS) -> bytes:
    """A safetensors file of one tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{count}f", *range(count))


@pytest.fixture
def model(api: HfApi, tmp_path: Path) -> str:
    """The commit of a private repository with a model in it."""
    folder = tmp_path / "model"
    (folder / "nested").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [merge]\nbase_model: clinic/base\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "nested" / "a b%2F.txt").write_text("nested")
    api.create_repo(REPO, private=True)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    return str(commit.oid)


def test_a_private_repository_is_filled_and_read_back(api: HfApi, model: str, tmp_path: Path) -> None:
    folder = Path(api.snapshot_download(REPO, revision=model))
    assert (folder / "model.safetensors").read_bytes() == safetensors()
    assert (folder / "nested" / "a b%2F.txt").read_text() == "nested"
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.author) == (model, True, "clinic")
    assert {"merge", "license:mit", "base_model:clinic/base", "base_model:finetune:clinic/base"} <= set(info.tags or [])
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings or []}
    assert sizes["model.safetensors"] == (len(safetensors()), True)
    assert sizes["nested/a b%2F.txt"] == (6, False)
    assert ".gitattributes" in sizes
    assert api.whoami()["orgs"][0]["name"] == "clinic"
    assert [commit.title for commit in api.list_repo_commits(REPO)][-1] == "initial commit"


def test_files_are_unchanged_when_sent_again(api: HfApi, server: HubServer, model: str, tmp_path: Path) -> None:
    server.log.clear()
    again = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    assert again.oid == model
    assert sum(one.bytes_in for one in server.exchanges("^/storage/")) == 0
    assert server.exchanges("/commit/") == []


def test_a_pinned_snapshot_needs_no_server(api: HfApi, server: HubServer, model: str) -> None:
    folder = api.snapshot_download(REPO, revision=model)
    server.stop()
    assert api.snapshot_download(REPO, revision=model) == folder
    assert api.hf_hub_download(REPO, "README.md", revision=model).startswith(folder)


def test_the_client_needs_only_two_variables(server: HubServer, model: str, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "fresh")}
    script = f"import huggingface_hub; print(huggingface_hub.hf_hub_download({REPO!r}, 'README.md'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | settings | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).read_text().endswith("# A model\n")
    assert Path(done.stdout.strip()).parent.name == model


def test_a_header_is_read_without_the_tensors(api: HfApi, server: HubServer, model: str) -> None:
    server.log.clear()
    metadata = api.parse_safetensors_file_metadata(REPO, "model.safetensors", revision=model)
    assert metadata.tensors["w"].shape == [WEIGHTS]
    assert sum(one.bytes_out for one in server.exchanges("^/storage/")) == 100_001
    files = HfFileSystem(endpoint=server.endpoint, token="hf_alice", skip_instance_cache=True)
    with files.open(f"{REPO}@{model}/model.safetensors", block_size=2**10, cache_type="readahead") as file:
        file.seek(1000)
        assert file.read(100) == safetensors()[1000:1100]
    assert sum(one.bytes_out for one in server.exchanges("^/storage/")) < 103_000
    assert files.ls(f"{REPO}/nested", detail=False) == [f"{REPO}/nested/a b%2F.txt"]


def test_a_commit_on_a_stale_parent_is_refused(api: HfApi, model: str) -> None:
    api.upload_file(repo_id=REPO, path_in_repo="new.txt", path_or_fileobj=b"new", parent_commit=model)
    with pytest.raises(HfHubHTTPError) as refused:
        api.upload_file(repo_id=REPO, path_in_repo="late.txt", path_or_fileobj=b"late", parent_commit=model)
    assert refused.value.response.status_code == 412
    assert not api.file_exists(REPO, "late.txt")


def test_of_two_commits_on_one_parent_one_is_refused(api: HfApi, model: str) -> None:
    def commit(name: str) -> int:
        try:
            api.upload_file(repo_id=REPO, path_in_repo=name, path_or_fileobj=b"x", parent_commit=model)
        except HfHubHTTPError as refused:
            return refused.response.status_code
        return 200

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(commit, "abcd"))
    assert sorted(answers) == [200, 412, 412, 412]
    assert len(api.list_repo_files(REPO)) == 5


def test_a_commit_is_done_as_a_whole_or_not_at_all(api: HfApi, model: str) -> None:
    operations: list[Any] = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("missing.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, operations, commit_message="half")
    assert api.model_info(REPO).sha == model


def test_a_pull_request_leaves_main_alone(api: HfApi, model: str) -> None:
    made = api.upload_file(repo_id=REPO, path_in_repo="b.safetensors", path_or_fileobj=b"\0b", create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert api.model_info(REPO).sha == model
    assert api.file_exists(REPO, "b.safetensors", revision="refs/pr/1")
    pulls = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests or []
    assert [pull.ref for pull in pulls] == ["refs/pr/1"]
    proposed = api.get_discussion_details(REPO, 1)
    assert (proposed.status, proposed.is_pull_request, proposed.target_branch) == ("open", True, "refs/heads/main")
    draft = api.create_pull_request(REPO, title="later")
    api.upload_file(repo_id=REPO, path_in_repo="c.txt", path_or_fileobj=b"c", revision=draft.git_reference)
    assert (draft.num, draft.status, api.file_exists(REPO, "c.txt")) == (2, "draft", False)


def test_a_stranger_may_propose_but_not_write(api: HfApi) -> None:
    api.create_repo("clinic/public")
    addition: dict[str, Any] = {"path_in_repo": "x.bin", "path_or_fileobj": b"\0x", "token": "hf_mallory"}
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(repo_id="clinic/public", **addition)
    assert api.upload_file(repo_id="clinic/public", create_pr=True, **addition).pr_num == 1


def test_listing_follows_filters_and_rights(api: HfApi, model: str) -> None:
    for number in range(4):
        api.create_repo(f"clinic/vector-{number}")
    assert len(list(api.list_models(author="clinic"))) == 5
    assert len(list(api.list_models(author="clinic", token="hf_mallory"))) == 4
    assert [one.id for one in api.list_models(filter=["merge", "base_model:clinic/base"])] == [REPO]
    assert [one.id for one in api.list_models(search="VECTOR-3")] == ["clinic/vector-3"]
    assert len(list(api.list_models(author="clinic", limit=3))) == 3
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 5
    assert list(api.list_datasets(author="clinic")) == []


def test_strangers_cannot_tell_private_from_missing(api: HfApi, model: str) -> None:
    for repo in (REPO, "clinic/missing"):
        with pytest.raises(RepositoryNotFoundError) as stranger:
            api.model_info(repo, token="hf_mallory")
        assert stranger.value.response.status_code == 404
        with pytest.raises(RepositoryNotFoundError) as anonymous:
            api.hf_hub_download(repo, "README.md", token=False)
        assert anonymous.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as unknown:
        api.model_info(REPO, token="hf_unknown")
    assert unknown.value.response.status_code == 401
    assert not isinstance(unknown.value, RepositoryNotFoundError)


def test_reading_is_not_writing(api: HfApi, model: str) -> None:
    api.auth_check(REPO, token="hf_alice_reads")
    attempts = (
        lambda: api.auth_check(REPO, write=True, token="hf_alice_reads"),
        lambda: api.upload_file(repo_id=REPO, path_in_repo="x", path_or_fileobj=b"x", token="hf_alice_reads"),
        lambda: api.create_repo("clinic/other", token="hf_mallory"),
        lambda: api.delete_repo("clinic/public", token="hf_mallory"),
    )
    api.create_repo("clinic/public")
    for attempt in attempts:
        with pytest.raises(HfHubHTTPError) as refused:
            attempt()
        assert refused.value.response.status_code == 403


def test_refs_are_made_moved_and_removed(api: HfApi, server: HubServer, model: str) -> None:
    first = api.list_repo_commits(REPO)[-1].commit_id
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="site/a", revision=first)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="site/a")
    api.upload_file(repo_id=REPO, path_in_repo="x", path_or_fileobj=b"x", revision="site/a")
    assert not api.file_exists(REPO, "x")
    server.set_branch(REPO, "main", first)
    assert api.model_info(REPO).sha == first
    assert api.model_info(REPO, revision="v1").sha == model
    api.delete_branch(REPO, branch="site/a")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "x", revision="site/a")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "model.safetensors")


def test_a_bad_card_or_path_is_refused(api: HfApi, server: HubServer, model: str) -> None:
    bad_cards = ("- license", "license: [", "model-index: 3", "base_model_relation: blend")
    for bad in bad_cards:
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=f"---\n{bad}\n---\n".encode())
    lines = [
        {"key": "header", "value": {"summary": "escape"}},
        {"key": "file", "value": {"path": "../../x", "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    headers = {"authorization": "Bearer hf_alice"}
    answer = get_session().post(f"{server.endpoint}/api/models/{REPO}/commit/main", content=body, headers=headers)
    assert answer.status_code == 422
    for wanted in ({"name": "../x"}, {"name": "x", "type": "../x"}, {"name": "a--b"}):
        answer = get_session().post(f"{server.endpoint}/api/repos/create", json=wanted, headers=headers)
        assert answer.status_code == 400
    with pytest.raises(BadRequestError):
        api.create_branch(REPO, branch="refs/pr/7")


def test_storage_sees_no_token_and_the_log_keeps_none(api: HfApi, server: HubServer, model: str) -> None:
    api.snapshot_download(REPO)
    storage = server.exchanges("^/storage/")
    assert storage
    assert not any(one.signed_in for one in storage)
    assert {one.host.split(":")[0] for one in storage} == {"localhost"}
    assert "hf_alice" not in repr(server.log)
    assert "signature" not in repr(server.log)
    assert get_session().get(f"http://{storage[0].host}{storage[0].path}").status_code == 403


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412])
def test_a_refusal_can_be_ordered(api: HfApi, server: HubServer, model: str, status: int) -> None:
    fault = Fault(f"^/api/models/{REPO}$", "status", status=status)
    server.faults.append(fault)
    with pytest.raises(HfHubHTTPError) as refused:
        api.model_info(REPO)
    assert (refused.value.response.status_code, fault.fired) == (status, 1)
    assert api.model_info(REPO).sha == model


@pytest.mark.parametrize(("status", "retry_after"), [(429, 0), (500, None), (503, None)])
def test_the_client_comes_back_after_a_passing_failure(
    api: HfApi, server: HubServer, model: str, status: int, retry_after: int | None
) -> None:
    server.log.clear()
    server.faults.append(Fault("/tree/", "status", status=status, retry_after=retry_after))
    assert len(list(api.list_repo_tree(REPO))) == 4
    assert [one.status for one in server.exchanges("/tree/")] == [status, 200]


def test_two_refusals_of_one_request_give_one_answer(api: HfApi, server: HubServer, model: str) -> None:
    server.faults += [Fault("/branch/", "status", status=status) for status in (403, 409)]
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_branch(REPO, branch="x")
    assert (refused.value.response.status_code, [fault.fired for fault in server.faults]) == (409, [1, 1])


def test_a_request_to_slow_down_says_for_how_long(server: HubServer) -> None:
    server.faults.append(Fault("whoami", "status", status=429, retry_after=7))
    refused = get_session().get(f"{server.endpoint}/api/whoami-v2", headers={"authorization": "Bearer hf_alice"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")


def test_a_broken_download_is_resumed(
    api: HfApi, server: HubServer, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps what it received in steps of this size only, 10 MiB unless changed.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    server.log.clear()
    server.faults.append(Fault("^/storage/", "drop", method="GET", after=100_000))
    path = api.hf_hub_download(REPO, "model.safetensors", revision=model)
    assert Path(path).read_bytes() == safetensors()
    sent = [one.bytes_out for one in server.exchanges("^/storage/", "GET")]
    assert sent == [100_000, len(safetensors()) - 100_000]


def test_a_broken_upload_is_sent_again(api: HfApi, server: HubServer, model: str) -> None:
    content = bytes(1_000_000)
    server.faults.append(Fault("^/storage/", "drop", method="PUT", after=100_000))
    api.upload_file(repo_id=REPO, path_in_repo="b.bin", path_or_fileobj=content)
    assert Path(api.hf_hub_download(REPO, "b.bin")).read_bytes() == content
    assert [one.status for one in server.exchanges("^/storage/", "PUT")][-2:] == [0, 200]


def test_an_answer_can_get_lost_after_the_commit_was_made(api: HfApi, server: HubServer, model: str) -> None:
    server.faults.append(Fault("/commit/", "drop", side="answer"))
    with pytest.raises(httpx.RemoteProtocolError):
        api.upload_file(repo_id=REPO, path_in_repo="b.txt", path_or_fileobj=b"b")
    assert api.file_exists(REPO, "b.txt")


def test_a_slow_answer_runs_into_the_timeout(api: HfApi, server: HubServer, model: str) -> None:
    server.faults.append(Fault(f"^/api/models/{REPO}$", "slow", seconds=1.0))
    with pytest.raises(httpx.TimeoutException):
        api.model_info(REPO, timeout=0.2)


def test_the_client_does_not_notice_an_altered_download(api: HfApi, server: HubServer, model: str) -> None:
    server.faults.append(Fault("^/storage/", "corrupt", method="GET"))
    content = Path(api.hf_hub_download(REPO, "model.safetensors", revision=model)).read_bytes()
    assert len(content) == len(safetensors())
    assert content != safetensors()
    assert api.verify_repo_checksums(REPO, revision=model).mismatches


def test_an_altered_upload_is_refused(api: HfApi, server: HubServer, model: str) -> None:
    server.faults.append(Fault("^/storage/", "corrupt", method="PUT"))
    with pytest.raises(RuntimeError, match=re.escape("Error while uploading 'b.bin'")):
        api.upload_file(repo_id=REPO, path_in_repo="b.bin", path_or_fileobj=b"\0" * 1000)
    assert api.model_info(REPO).sha == model


def test_a_branch_can_move_between_two_requests(api: HfApi, server: HubServer, model: str) -> None:
    readme = b"---\nlicense: mit\n---\nlater"
    later = api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=readme).oid
    server.set_branch(REPO, "main", model)
    moved = Fault("/resolve/", "call", method="HEAD", skip=1, action=lambda: server.set_branch(REPO, "main", later))
    server.faults.append(moved)
    folder = Path(api.snapshot_download(REPO))
    assert folder.name == model
    assert (folder / "README.md").read_text().endswith("# A model\n")
    assert api.model_info(REPO).sha == later


def test_a_hostile_repository_can_be_made(api: HfApi, server: HubServer, model: str) -> None:
    repository = server.repository(REPO)
    entry = repository.add_blob("../../escape.txt", b"x")
    commit = repository.record({entry.path: entry}, model, "mallory", "A title")
    repository.refs["refs/heads/main"] = commit.id
    assert api.list_repo_files(REPO) == ["../../escape.txt"]
    assert [known.commit_id for known in api.list_repo_commits(REPO)][:2] == [commit.id, model]


def test_a_repository_is_removed_by_an_admin_or_who_made_it(api: HfApi, server: HubServer, model: str) -> None:
    server.add_user("bob", "hf_bob", orgs=["clinic"])
    server.add_user("carol", "hf_carol", orgs=["clinic"], role="admin")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_repo(REPO, token="hf_bob")
    api.delete_repo(REPO, token="hf_carol")
    assert not api.repo_exists(REPO)
    assert api.create_repo(REPO, repo_type="dataset", exist_ok=True).repo_type == "dataset"
    assert api.create_repo(REPO, repo_type="dataset", exist_ok=True).repo_id == REPO
