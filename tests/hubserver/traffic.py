"""What passes between client and server: a log of it, and faults that tests switch on."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import anyio.to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import Refusal


@dataclass(slots=True)
class Fault:
    """Something to go wrong with requests whose method and raw path match; README.md tells what each kind does."""

    path: str
    kind: Literal["status", "drop", "slow", "corrupt", "call"]
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    side: Literal["request", "answer"] | None = None
    status: int = 503
    code: str = ""
    retry_after: int | None = None
    after: int = 0
    seconds: float = 0.0
    action: Callable[[], None] | None = None
    met: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """True when the fault hits this request, which is counted."""
        matches = self.method in (None, method) and re.search(self.path, path) is not None
        self.met += matches
        hit = matches and self.met > self.skip and (self.times is None or self.fired < self.times)
        self.fired += hit
        return hit


@dataclass(slots=True)
class Exchange:
    """A request and its answer, without headers or query so that no token can be in it; status 0 is no answer."""

    method: str
    path: str
    host: str
    signed_in: bool
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Dropped(Exception):  # noqa: N818 (done on purpose)
    """The connection is to be closed."""


@dataclass(slots=True)
class Passage:
    """One request on its way through the faults, counted in both directions before it is passed on."""

    receive: Receive
    send: Send
    exchange: Exchange
    faults: list[Fault]

    def altered(self, body: bytes, side: str, passed: int) -> tuple[bytes, bool]:
        """The part of a body that gets through, and whether the connection drops behind it."""
        usual = "request" if self.exchange.method in ("PUT", "POST") else "answer"
        active = [fault for fault in self.faults if side == (fault.side or usual)]
        if body and not passed and any(fault.kind == "corrupt" for fault in active):
            body = bytes([body[0] ^ 0xFF]) + body[1:]
        # Without a drop there is always room for one byte more than there is.
        room = min((fault.after - passed for fault in active if fault.kind == "drop"), default=len(body) + 1)
        return body[: max(room, 0)], room <= 0 or room < len(body)

    async def incoming(self) -> Message:
        """The next message from the client."""
        message = await self.receive()
        body, dropped = self.altered(message.get("body", b""), "request", self.exchange.bytes_in)
        self.exchange.bytes_in += len(body)
        if dropped:
            raise Dropped
        return {**message, "body": body}

    async def outgoing(self, message: Message) -> None:
        """Passes a message on to the client."""
        body = b"" if self.exchange.method == "HEAD" else message.get("body", b"")
        body, dropped = self.altered(body, "answer", self.exchange.bytes_out)
        if message["type"] == "http.response.start":
            if dropped:
                raise Dropped
            self.exchange.status = message["status"]
        else:
            self.exchange.bytes_out += len(body)
            message = {**message, "body": body, "more_body": message.get("more_body", False) or dropped}
        await self.send(message)
        if dropped:
            raise Dropped

    async def serve(self, app: ASGIApp, scope: Scope) -> None:
        """Lets the faults act and, unless one of them answers, the application."""
        unread = True
        for fault in self.faults:
            if fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
            if fault.kind == "call" and fault.action is not None:
                # In a thread of its own, so that the action may itself talk to this server.
                await anyio.to_thread.run_sync(fault.action)
            if fault.kind == "status":
                # Read to the end first: a client that is still sending would see a broken pipe instead.
                while unread:
                    unread = (await self.incoming()).get("more_body", False)
                later = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                app = Refusal(fault.status, f"Fault of the test: {fault.status}", fault.code, **later).response
        await app(scope, self.incoming, self.outgoing)
