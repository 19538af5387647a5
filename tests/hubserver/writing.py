"""Handlers that write: repositories, branches and tags, large files, commits and pull requests."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from starlette.responses import FileResponse, JSONResponse, Response

from . import card
from .hub import Call, route
from .refusals import Refusal
from .repository import Entry, Repository, timestamp

NAME = r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REGULAR_LIMIT = 10 * 2**20  # larger files go to LFS whatever their name


def named(call: Call) -> Call:
    """The call with the repository of its body, as if the path had named it."""
    wanted = call.json()
    kind, owner, name = wanted.get("type") or "model", wanted.get("organization") or call.writer.name, wanted["name"]
    if kind not in ("model", "dataset") or not re.fullmatch(NAME, owner) or not re.fullmatch(NAME, name):
        raise Refusal(400, f"Invalid repository name or type: {kind} {owner}/{name}")
    return replace(call, parts={"kind": f"{kind}s", "id": f"{owner}/{name}"})


@route("POST", "/api/repos/create")
def create(call: Call) -> Response:
    """A new repository, or 409 with its address when it exists."""
    call, wanted = named(call), call.json()
    kind, id = call.parts["kind"], call.parts["id"]
    if id.split("/")[0] not in call.writer.namespaces:
        raise Refusal(403, f"You don't have the rights to create a {kind[:-1]} called {id}")
    if (kind, id.lower()) in call.hub.repositories:
        return JSONResponse({"error": f"You already created this {kind[:-1]} repo", "url": call.page}, 409)
    folder, private = call.hub.root / kind / quote(id.lower(), safe=""), wanted.get("visibility") == "private"
    call.hub.repositories[kind, id.lower()] = Repository(folder, kind, id, call.writer.name, private)
    return JSONResponse({"url": call.page, "name": id, "id": id})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    """Nothing, once the repository is gone; an admin may remove any, others what they made."""
    repository = named(call).writable
    if call.writer.role != "admin" and repository.creator != call.writer.name:
        raise Refusal(403, f"Forbidden: only an admin or {repository.creator} can delete {repository.id}")
    del call.hub.repositories[repository.kind, repository.id.lower()]
    shutil.rmtree(repository.folder)
    return Response()


@route("POST", "/api/{kind}/{id}/(?P<sort>branch|tag)/{name}")
def add_ref(call: Call) -> Response:
    """Nothing, once the branch of that name or the tag in the body exists; 409 when it did before."""
    repository, wanted, name = call.writable, call.json(), call.parts["name"]
    ref, revision = f"refs/heads/{name}", wanted.get("startingPoint") or "main"
    if call.parts["sort"] == "tag":
        ref, revision = f"refs/tags/{wanted['tag']}", name
    commit = repository.resolve(revision)
    if re.search(r"[\s~^:?*\[\\\x7f]|\.\.|@\{|//|/$|\.lock$|^refs/heads/refs/", ref):
        raise Refusal(400, f"Invalid reference name: {ref}")
    if ref in repository.refs:
        raise Refusal(409, f"Reference {ref} already exists")
    repository.refs[ref] = commit.id
    return Response(status_code=201)


@route("DELETE", "/api/{kind}/{id}/(?P<sort>branch|tag)/{name}")
def remove_ref(call: Call) -> Response:
    """Nothing, once the branch or tag is gone; main cannot go."""
    ref = f"refs/{'tags' if call.parts['sort'] == 'tag' else 'heads'}/{call.parts['name']}"
    if ref == "refs/heads/main":
        raise Refusal(403, f"Cannot delete {ref}")
    if call.writable.refs.pop(ref, None) is None:
        raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return Response(status_code=204)


@route("POST", "/api/{kind}/{id}/preupload/{revision}")
def preupload(call: Call) -> Response:
    """For every file: regular or LFS, and the identity of what the branch holds now."""
    repository, answers = call.proposable, []
    present = repository.resolve(call.parts["revision"])
    lines = [line.split() for line in repository.text(present, ".gitattributes").splitlines()]
    patterns = [pieces[0] for pieces in lines if "filter=lfs" in pieces]
    for file in call.json()["files"]:
        names = (file["path"], file["path"].split("/")[-1])  # a pattern without a slash covers every folder
        ruled = any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        # An empty file cannot be an LFS object, whatever its name.
        large = file["size"] and (ruled or file["size"] > REGULAR_LIMIT or b"\0" in base64.b64decode(file["sample"]))
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": present.files[names[0]].etag} if names[0] in present.files else {}))
    return JSONResponse({"files": answers})


@route("POST", r"/{prefix}{id}\.git/info/lfs/objects/batch")
def announce(call: Call) -> Response:
    """For every LFS object the address to send it to, or none when the repository has it."""
    # Whoever may read may send, as a pull request may follow; nothing is in the repository until a commit.
    repository, objects = call.repository, []
    for wanted in call.json()["objects"]:
        answer, blob = {"oid": wanted["oid"], "size": wanted["size"]}, repository.blob(wanted["oid"])
        if call.writer and not blob.is_file():
            verify, upload = f"{call.page}.git/info/lfs/objects/verify", call.hub.storage_address(blob)
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects})


@route("GET", "/storage/{oid}")
@route("PUT", "/storage/{oid}")
def store(call: Call) -> Response:
    """An object, or the range of it that was asked for; what is sent is kept when its digest is right."""
    # The client sends no token here: that is another host, which must not learn it.
    blob = call.hub.grants.get(call.request.query_params.get("key", ""))
    if blob is None:
        raise Refusal(403, "AccessDenied")
    if call.request.method == "PUT":
        if hashlib.sha256(call.body).hexdigest() != blob.name:
            raise Refusal(400, f"BadDigest: the content is not {blob.name}")
        blob.write_bytes(call.body)
        return Response()
    return FileResponse(blob, headers={"ETag": f'"{blob.name}"'}, media_type="application/octet-stream")


@route("POST", r"/{prefix}{id}\.git/info/lfs/objects/verify")
def verify(call: Call) -> Response:
    """Nothing when the LFS object is there in full."""
    blob, size = call.repository.blob(call.json()["oid"]), call.json()["size"]
    if not blob.is_file() or blob.stat().st_size != size:
        raise Refusal(404, f"Object {blob.name} of {size} bytes does not exist on the server")
    return JSONResponse({})


def added(repository: Repository, path: str, value: dict[str, Any]) -> Entry:
    """The entry of a file that comes with the commit or, when it is in LFS, came to storage before."""
    if "oid" in value:
        blob = repository.blob(value["oid"])
        if not blob.is_file():
            raise Refusal(400, f"LFS pointer of {path} points to nothing: {blob.name}")
        return Entry.in_lfs(path, blob.name, blob.stat().st_size)
    content = base64.b64decode(value["content"])
    if path == "README.md" and (errors := card.read(content.decode(errors="replace"))[1]):
        raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return repository.add_blob(path, content)


def apply(operations: Iterable[dict[str, Any]], files: dict[str, Entry], repository: Repository) -> None:
    """Changes the files by all operations; any that cannot be done refuses the commit as a whole."""
    for operation in operations:
        path = operation["value"]["path"].rstrip("/")
        if {"", ".", "..", ".git"} & {*path.split("/")} or path.startswith("..\\"):
            raise Refusal(422, f"Invalid path in repo: {path!r}")
        if operation["key"] in ("file", "lfsFile"):
            files[path] = added(repository, path, operation["value"])
            continue
        # Deleting "a file" that is a folder removes the folder, as on the Hub.
        below = [name for name in files if f"{name}/".startswith(f"{path}/")]
        if operation["key"] not in ("deletedFile", "deletedFolder") or not below:
            raise Refusal(404, f"Cannot do {operation['key']}: nothing is called {path}", "EntryNotFound")
        for name in below:
            del files[name]


@route("POST", "/api/{kind}/{id}/commit/{revision}")
def commit(call: Call) -> Response:
    """The id and page of a commit that holds all operations, on the branch or on a new pull request."""
    repository, revision = call.proposable, call.parts["revision"]
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next((dict(line["value"]) for line in lines if line["key"] == "header"), dict[str, Any]())
    if not header.get("summary"):
        raise Refusal(400, "Invalid commit payload: a header with a summary is needed")
    head, ref = repository.resolve(revision), repository.ref_of(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise Refusal(404, f"Invalid rev id: {revision} is not a branch", "RevisionNotFound")
    if header.get("parentCommit") not in (None, head.id):
        raise Refusal(412, "The branch was updated since you opened this page. Please refresh and try again.")
    files, title, message = dict(head.files), header["summary"], header.get("description") or ""
    apply([line for line in lines if line["key"] != "header"], files, repository)
    made = repository.record(files, head.id, call.writer.name, title, message)
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{call.page}/commit/{made.id}"}
    if call.flag("create_pr"):
        answer["pullRequestUrl"] = f"{call.page}/discussions/{open_pull_request(call, title, made.id, ref)}"
    else:
        repository.refs[ref] = made.id
    return JSONResponse(answer)


def open_pull_request(call: Call, title: str, head: str, base: str, *, status: str = "open") -> int:
    """The number N of a new pull request whose commits are on refs/pr/N."""
    number, repository = len(call.repository.pull_requests) + 1, call.repository
    repository.refs[f"refs/pr/{number}"] = head
    repository.pull_requests[str(number)] = {
        "num": number, "title": title, "status": status, "isPullRequest": True, "createdAt": timestamp(),
        "author": {"name": call.writer.name}, "repo": {"name": repository.id, "type": repository.kind[:-1]},
        "changes": {"base": base}, "events": [], "filesWithConflicts": [], "diff": "",
    }  # fmt: skip
    return number


@route("POST", "/api/{kind}/{id}/discussions")
def create_pull_request(call: Call) -> Response:
    """The number of a pull request in draft, to which commits can be added."""
    wanted, base = call.json(), "refs/heads/main"
    if not wanted.get("pullRequest"):
        raise Refusal(400, "This server knows no discussions but pull requests")
    number = open_pull_request(call, wanted["title"], call.repository.refs[base], base, status="draft")
    return JSONResponse({"num": number, "pullRequest": True})
