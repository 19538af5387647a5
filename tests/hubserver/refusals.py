"""Error answers, with the headers the client reads."""

import uuid

from starlette.responses import JSONResponse


class Refusal(Exception):  # noqa: N818 (an answer, not a fault of the server)
    """An error answer; the client picks its exception class by `code` (RepoNotFound, EntryNotFound, ...)."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Request-Id": uuid.uuid4().hex, **headers}
        # Header lines cannot carry what a branch or file name may contain.
        ascii_only = {name: value.encode("ascii", "replace").decode() for name, value in named.items() if value}
        self.response = JSONResponse({"error": message}, status, headers=ascii_only)
