"""A Hub on loopback with a consortium, and people who each work at a machine of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import leaks
from hubserver import HubServer
from huggingface_hub import HfApi, constants

SITES = ("hospital-a", "hospital-b", "hospital-c")
TOKENS = {name: f"hf_{name.replace('-', '')}SECRET" for name in (*SITES, "coordinator", "consumer", "stranger")}


@contextmanager
def consortium(folder: Path) -> Iterator[HubServer]:
    """A running Hub where the sites and the coordinator may write for `consortium`, the consumer may read."""
    with HubServer(folder) as server:
        for name in (*SITES, "coordinator"):
            server.add_user(name, TOKENS[name], orgs=["consortium"])
        server.add_user("consumer", TOKENS["consumer"], orgs=["consortium"], role="read")
        server.add_user("stranger", TOKENS["stranger"])
        yield server


@contextmanager
def online() -> Iterator[None]:
    """Let this process use the network: the test run as a whole is offline."""
    before = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = before


def api(server: HubServer, name: str) -> HfApi:
    """The client of one of the people."""
    return HfApi(endpoint=server.endpoint, token=TOKENS[name])


class Command(subprocess.Popen[str]):
    """A running command; what it says is searched for tokens."""

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        out, err = super().communicate(input, timeout)
        return leaks.hear(out), leaks.hear(err)


@dataclass
class Person:
    """Somebody with a token, a cache and a working folder; runs `hf-datavec` as a process of its own."""

    name: str
    folder: Path
    server: HubServer
    said: list[str] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": self.server.endpoint,
            "HF_TOKEN": TOKENS[self.name],
            "HF_HOME": str(self.folder / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            **more,
        }

    def start(self, *arguments: object, **more: str) -> Command:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hf_datavec", *map(str, arguments)]
        return Command(
            command, cwd=self.folder, env=self.environment(**more), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=300)
        assert not any(token in out + err for token in TOKENS.values()), "a token was shown"
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def python(self, source: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python source to its end, as a notebook would."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, cwd=self.folder, env=self.environment(**more), text=True, capture_output=True)
        assert not any(token in done.stdout + done.stderr for token in TOKENS.values()), "a token was shown"
        return done

    def killed(self, after: float, *arguments: object) -> int | None:
        """Run a command and kill it after some seconds; None if it ended before."""
        process = self.start(*arguments)
        deadline = time.monotonic() + after
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        ended = process.poll()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return ended
