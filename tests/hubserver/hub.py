"""The users and repositories of a server, who may touch what, and the table that leads a request to its handler."""

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .refusals import Refusal
from .repository import Repository

Role = Literal["read", "write", "admin"]


@dataclass(frozen=True, slots=True)
class User:
    """The owner of a token, with what that token allows; the namespaces are the user's own and the organisations."""

    name: str
    namespaces: tuple[str, ...]
    role: Role


@dataclass(slots=True)
class Hub:
    """All repositories by kind and small-letter name, and the two host names the server answers to."""

    root: Path
    endpoint: str
    storage_endpoint: str
    users: dict[str, User] = field(default_factory=dict, repr=False)
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    grants: dict[str, Path] = field(default_factory=dict, repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def storage_address(self, blob: Path) -> str:
        """Where a blob is sent or fetched without a token: the key in the address stands for the right to do it."""
        key = secrets.token_urlsafe(16)
        self.grants[key] = blob
        return f"{self.storage_endpoint}/storage/{blob.name}?key={key}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            response = await answer(self, Request(scope, receive))
        except Refusal as refusal:
            response = refusal.response
        except (json.JSONDecodeError, UnicodeDecodeError):
            response = Refusal(400, "The request body is not JSON").response
        await response(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Call:
    """A request with its path taken apart and its user known; its properties refuse what the user may not do."""

    hub: Hub
    request: Request
    parts: Mapping[str, str]
    body: bytes
    user: User | None

    @property
    def writer(self) -> User:
        """The signed-in user, unless the token may only read."""
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user.role == "read":
            raise Refusal(403, "Forbidden: your token lacks the write role")
        return self.user

    def sees(self, repository: Repository) -> bool:
        """True for public repositories and those of the user's namespaces."""
        return not repository.private or (self.user is not None and repository.namespace in self.user.namespaces)

    @property
    def repository(self) -> Repository:
        """The repository of the path, for those who may read it; to others it looks missing."""
        repository = self.hub.repositories.get((self.parts["kind"], self.parts["id"].lower()))
        if repository is None or not self.sees(repository):
            # On plain http the client ignores a 401 without this code, so it is sent with both.
            refusal = (401, "Invalid username or password.") if self.user is None else (404, "Repository not found")
            raise Refusal(*refusal, "RepoNotFound")
        return repository

    @property
    def writable(self) -> Repository:
        """The repository of the path, for those who may change it."""
        if self.repository.namespace not in self.writer.namespaces:
            raise Refusal(403, f"Forbidden: you don't have the rights to change {self.repository.id}")
        return self.repository

    @property
    def proposable(self) -> Repository:
        """The repository of the path, for those who may change it or, with ?create_pr=1, for all who may read it."""
        return self.repository if self.flag("create_pr") and self.writer else self.writable

    @property
    def page(self) -> str:
        """The address of the repository for people, which clients parse for its kind and name."""
        return f"{self.hub.endpoint}/{'datasets/' if self.parts['kind'] == 'datasets' else ''}{self.parts['id']}"

    def json(self) -> Any:
        """What the body says."""
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        """True when a query parameter is switched on."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")


Handler = Callable[[Call], Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
PIECES = {
    "kind": "(?P<kind>models|datasets)",
    "prefix": "(?:(?P<kind>datasets)/)?",
    "id": "(?P<id>[^/]+(?:/[^/]+)?)",  # names without an owner are understood, but nothing is called that
    "path": "(?P<path>.*)",
}


def route(method: str, path: str) -> Callable[[Handler], Handler]:
    """Enters a handler for a method and a raw path, where %2F is still part of a segment."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda found: PIECES.get(found[1], f"(?P<{found[1]}>[^/]+)"), path))

    def enter(handler: Handler) -> Handler:
        ROUTES.append((method, pattern, handler))
        return handler

    return enter


async def answer(hub: Hub, request: Request) -> Response:
    """The response to a request of a known or no user, from the first handler whose path matches."""
    token, raw = request.headers.get("authorization"), request.scope["raw_path"].decode("ascii")
    user = hub.users.get(token.removeprefix("Bearer ")) if token else None
    if token and user is None:
        # A wrong token is refused even where none is needed, as on the Hub.
        raise Refusal(401, "Invalid credentials in Authorization header")
    # Answers to HEAD are those to GET; the protocol layer leaves their body out.
    method = "GET" if request.method == "HEAD" else request.method
    for known, pattern, handler in ROUTES:
        if known == method and (match := pattern.fullmatch(raw)):
            parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
            call = Call(hub, request, {"kind": "models", **parts}, await request.body(), user)
            # One at a time: from reading the head to moving the branch nobody else may write.
            with hub.lock:
                return handler(call)
    raise Refusal(404, "Sorry, we can't find the page you are looking for.")
