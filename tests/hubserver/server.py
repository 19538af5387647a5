"""The server itself: a thread, a free port on the loopback interface, and a folder."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, cast

import uvicorn
from starlette.types import Receive, Scope, Send

from . import reading, writing  # noqa: F401 (entered into the table by being imported)
from .hub import Hub, Role, User
from .repository import Repository
from .traffic import Dropped, Exchange, Fault, Passage


class HubServer:
    """A Hub on loopback for the time of a `with` block, with its files in the folder `root`."""

    def __init__(self, root: Path | str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Without this every answer waits some 40 ms for the client's delayed acknowledgement.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = self._listener.getsockname()[1]
        # Two names of one interface: the client sends its token to the first only, as with a content network.
        self.hub = Hub(Path(root), f"http://127.0.0.1:{port}", f"http://localhost:{port}")
        self.endpoint, self.faults, self.log = self.hub.endpoint, list[Fault](), list[Exchange]()
        options: dict[str, Any] = {"http": "h11", "interface": "asgi3", "lifespan": "off", "log_config": None}
        config = uvicorn.Config(self._serve, **options, access_log=False, proxy_headers=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)

    def add_user(self, name: str, token: str, *, orgs: Iterable[str] = (), role: Role = "write") -> User:
        """A user with a token; organisations exist as soon as somebody belongs to them."""
        return self.hub.users.setdefault(token, User(name, (name, *orgs), role))

    def repository(self, id: str, kind: str = "models") -> Repository:
        """A repository for tests to look into."""
        return self.hub.repositories[kind, id.lower()]

    def set_branch(self, id: str, branch: str, commit: str, kind: str = "models") -> None:
        """Moves a branch to any known commit, like a forced push."""
        with self.hub.lock:
            self.repository(id, kind).refs[f"refs/heads/{branch}"] = self.repository(id, kind).commits[commit].id

    def exchanges(self, path: str = "", method: str | None = None) -> list[Exchange]:
        """The logged exchanges whose raw path contains a match of the pattern, in the order they began."""
        return [one for one in tuple(self.log) if re.search(path, one.path) and method in (None, one.method)]

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, method, path = dict(scope["headers"]), scope["method"], scope["raw_path"].decode("ascii")
        exchange = Exchange(method, path, headers[b"host"].decode("ascii"), b"authorization" in headers)
        self.log.append(exchange)
        striking = [fault for fault in tuple(self.faults) if fault.strikes(method, path)]
        try:
            await Passage(receive, send, exchange, striking).serve(self.hub, scope)
        except Dropped:
            # ASGI has no word for hanging up; what was written before still reaches the client.
            cast(Any, send).__self__.transport.close()
            await asyncio.sleep(0)

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.005)
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the thread and closes the port."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
