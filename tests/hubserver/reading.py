"""Handlers that read: accounts, descriptions, lists, trees, history, refs, and the files themselves."""

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from . import card
from .hub import Call, route
from .refusals import Refusal
from .repository import Commit, Repository, git_blob_id


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    """The account behind the token."""
    if (user := call.user) is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": user.role} for org in user.namespaces[1:]]
    auth = {"type": "access_token", "accessToken": {"displayName": user.name, "role": user.role}}
    return JSONResponse({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_card(call: Call) -> Response:
    """The errors and warnings of a README."""
    metadata, errors = card.read(call.json()["content"])
    lists = {"errors": errors, "warnings": [] if metadata or errors else ["empty or missing yaml metadata"]}
    listed = {key: [{"message": text} for text in texts] for key, texts in lists.items()}
    return JSONResponse(listed, 400 if errors else 200)


def description(repository: Repository, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """Everything known of a repository at a commit."""
    metadata, _ = card.read(repository.text(commit, "README.md"))
    library = {"library_name": "transformers"} if "config.json" in commit.files else {}
    details = {path: {"blobId": one.blob_id, **one.described("sha256")} for path, one in commit.files.items()}
    siblings = [{"rfilename": path, **(more if blobs else {})} for path, more in details.items()]
    described = {
        "id": repository.id, "author": repository.namespace, "sha": commit.id, "private": repository.private,
        "gated": False, "downloads": 0, "likes": 0, "createdAt": repository.created, "lastModified": commit.date,
        "tags": card.tags({**library, **metadata}), "cardData": metadata, "siblings": siblings,
    }  # fmt: skip
    named = ("pipeline_tag", "library_name", "model-index")
    described |= {**library, **{key: metadata[key] for key in named if key in metadata}}
    return {key: value for key, value in described.items() if value not in (None, {})}


@route("GET", "/api/{kind}/{id}(?:/revision/{revision})?")
def information(call: Call) -> Response:
    """A repository at its main branch or at the revision in the path, whole or the fields asked for."""
    commit, wanted = call.repository.resolve(call.parts.get("revision", "main")), call.request.query_params
    described, fields = description(call.repository, commit, blobs=call.flag("blobs")), wanted.getlist("expand")
    return JSONResponse({key: value for key, value in described.items() if not fields or key in ("id", *fields)})


@route("GET", "/api/{kind}/{id}/auth-check(?:/{write})?")
def check_rights(call: Call) -> Response:
    """Nothing, for those who may read or write."""
    return JSONResponse({"id": (call.writable if "write" in call.parts else call.repository).id})


@route("GET", "/api/{kind}")
def listing(call: Call) -> Response:
    """The repositories the user may see that pass every condition of the query, the latest change first."""
    query, found = call.request.query_params, []
    filters = {tag for value in query.getlist("filter") for tag in value.split(",")}
    hidden = set() if call.flag("full") else {"siblings"} if call.flag("cardData") else {"siblings", "cardData"}
    for (kind, name), repository in call.hub.repositories.items():
        described = description(repository, repository.resolve("main"))
        by_author = query.get("author", repository.namespace) == repository.namespace
        searched = by_author and query.get("search", "").lower() in name and filters <= {*described["tags"]}
        if kind == call.parts["kind"] and searched and call.sees(repository):
            found.append({key: value for key, value in described.items() if key not in hidden})
    found.sort(key=lambda one: str(one["lastModified"]), reverse=True)
    return JSONResponse(found[: int(query.get("limit", len(found)))])


def folders(commit: Commit) -> set[str]:
    """Every folder of a commit."""
    return {path[: slash.start()] for path in commit.files for slash in re.finditer("/", path)}


def described(commit: Commit, paths: Iterable[str]) -> Response:
    """The entries of files and folders as the tree endpoint lists them; what does not exist is left out."""
    known, items = folders(commit), []
    for path in paths:
        if entry := commit.files.get(path):
            items.append({"type": "file", "path": path, "oid": entry.blob_id, **entry.described("oid")})
        elif path in known:
            oid = git_blob_id(f"{commit.id} {path}".encode())
            items.append({"type": "directory", "path": path, "oid": oid, "size": 0})
    return JSONResponse(items)


@route("GET", "/api/{kind}/{id}/tree/{revision}(?:/{path})?")
def tree(call: Call) -> Response:
    """The files and folders below a folder."""
    commit, start = call.repository.resolve(call.parts["revision"]), call.parts.get("path", "").strip("/")
    paths, below, deep = [*folders(commit), *commit.files], f"{start}/" if start else "", call.flag("recursive")
    if start and not any(path.startswith(below) for path in paths):
        raise Refusal(404, f'{start} does not exist on "{call.parts["revision"]}"', "EntryNotFound")
    chosen = [path for path in paths if path.startswith(below) and (deep or "/" not in path[len(below) :])]
    return described(commit, sorted(chosen))


@route("POST", "/api/{kind}/{id}/paths-info/{revision}")
def paths_info(call: Call) -> Response:
    """The entries of the paths in the form."""
    return described(call.repository.resolve(call.parts["revision"]), parse_qs(call.body.decode()).get("paths", []))


@route("GET", "/api/{kind}/{id}/commits/{revision}")
def commits(call: Call) -> Response:
    """The history of a revision, newest first."""
    repository, items = call.repository, []
    commit: Commit | None = repository.resolve(call.parts["revision"])
    while commit:
        about = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        items.append({**about, "authors": [{"user": commit.author}]})
        commit = repository.commits.get(commit.parent or "")
    return JSONResponse(items)


@route("GET", "/api/{kind}/{id}/refs")
def refs(call: Call) -> Response:
    """Branches, tags and, when asked for, pull requests."""
    lists: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
    for ref, commit in call.repository.refs.items():
        _, sort, name = ref.split("/", 2)
        lists[sort].append({"name": ref if sort == "pr" else name, "ref": ref, "targetCommit": commit})
    pulls = {"pullRequests": lists["pr"]} if call.flag("include_prs") else {}
    return JSONResponse({"branches": lists["heads"], "converts": [], "tags": lists["tags"], **pulls})


@route("GET", "/api/{kind}/{id}/discussions/{number}")
def pull_request(call: Call) -> Response:
    """A pull request."""
    if call.parts["number"] not in call.repository.pull_requests:
        raise Refusal(404, "Discussion not found")
    return JSONResponse(call.repository.pull_requests[call.parts["number"]])


@route("GET", "/{prefix}{id}/resolve/{revision}/{path}")
def resolve(call: Call) -> Response:
    """A file at a revision: the bytes of a regular one, a redirect to storage for one in LFS."""
    commit = call.repository.resolve(call.parts["revision"])
    entry = commit.files.get(call.parts["path"])
    if entry is None:
        # The client remembers "this commit has no such file", so it must learn which commit that was.
        raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.id})
    headers, blob = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}, call.repository.blob(entry.sha256)
    if entry.pointer_size is None:
        return FileResponse(blob, headers=headers, filename=entry.path.split("/")[-1])
    # The client reads these and the commit from the redirect itself, which it does not follow on HEAD.
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return RedirectResponse(call.hub.storage_address(blob), 302, headers=headers)
