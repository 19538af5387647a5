"""No token in anything that the suite prints, logs or writes: a plugin of pytest that fails the run on a leak."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# The form that the tokens of `hub_people` have, and nothing else.
TOKEN = re.compile(r"hf_[a-z]+SECRET")
_BYTES = re.compile(TOKEN.pattern.encode())
# Messages, cards, locks and logs are small; what is larger is weights, and would only cost time.
LARGEST = 1_000_000
# Where `hf auth login` keeps a token on purpose, in the HF_HOME of somebody.
KEPT_ON_PURPOSE = ("token", "stored_tokens")

_found: list[str] = []
_folders: list[Path] = []


def hear(said: str, *, what: str = "output", test: str | None = None) -> str:
    """The same text, searched: a token in it fails the run and names the test."""
    if TOKEN.search(said):
        running = os.environ.get("PYTEST_CURRENT_TEST", "no test").partition(" (")[0]
        _found.append(f"{what} of {test or running}")
    return said


def files_with_tokens(folder: Path) -> Iterator[Path]:
    """The files below a folder that hold a token; links are not followed."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if name in KEPT_ON_PURPOSE or path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
                continue
            content = path.read_bytes()
            if b"SECRET" in content and _BYTES.search(content):
                yield path


@pytest.fixture(scope="session", autouse=True)
def _searched_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    _folders.append(tmp_path_factory.getbasetemp())


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for title, content in report.sections:
        hear(content, what=title, test=report.nodeid)
    if report.failed:
        hear(report.longreprtext, what="traceback", test=report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _found.extend(str(path) for folder in _folders for path in files_with_tokens(folder))
    if _found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _found:
        terminalreporter.section("tokens that leaked", red=True, bold=True)
        for place in dict.fromkeys(_found):
            terminalreporter.line(place)
