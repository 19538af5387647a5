"""Runs the client's own tests against the loopback server and says how many agree.

The source distribution of huggingface_hub ships its tests, without conftest.py and data files. This script fetches
it with pip, writes a conftest.py, replaces the staging address, and runs the files that concern repositories:

    python -m hubserver.upstream [--keep FOLDER] [-k EXPRESSION]

It needs a package index, so it is not part of the normal test run. UPSTREAM.md explains the failures that remain.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from .server import HubServer

FILES = (
    "test_hf_api test_file_download test_snapshot_download test_hf_file_system test_commit_api test_lfs test_repocard "
    "test_hub_mixin test_cache_layout test_tree_cache test_verification test_commit_scheduler "
    "test_utils_pagination test_shared_blobs test_cli_discussions test_offline_utils test_hub_mixin_pytorch"
)

# Services beside repositories, which the server does not offer.
OTHER_SERVICES = (
    "TestActivityApi TestCollectionAPI TestAccessRequestAPI TestWebhookApi TestUserApi TestPaperApi TestSpaceAPI "
    "TestHfApiInferenceCatalog TestHfApiPublicProduction TestListAndPermanentlyDeleteLFSFiles TestDatasetViewer bucket"
)

CONFTEST = """
import os
import socket

import pytest

from huggingface_hub import HfApi, constants, get_session

from .testing_constants import ENDPOINT_STAGING, TOKEN
from .testing_utils import repo_name

resolve = socket.getaddrinfo


def on_this_machine(host, *rest, **options):
    if host not in ("127.0.0.1", "localhost", "::1", None, ""):
        raise RuntimeError(f"the test asks for the host {host}")
    return resolve(host, *rest, **options)


socket.getaddrinfo = on_this_machine
Client = type(get_session())
send, sent = Client.send, []


def counted(self, request, **options):
    if str(request.url).startswith(ENDPOINT_STAGING):
        sent.append(request.method)
    return send(self, request, **options)


Client.send = counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    sent.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("requests", len(sent)))


class RepoFactory:
    def __init__(self, api):
        self.api, self.made = api, []

    def __call__(self, repo_type="model", *, repo_id=None, token=TOKEN, **options):
        url = self.api.create_repo(repo_id or repo_name(), repo_type=repo_type, token=token, **options)
        self.made.append((url, token))
        return url


@pytest.fixture(scope="session")
def repo_factory():
    return RepoFactory(HfApi(endpoint=ENDPOINT_STAGING, token=TOKEN))


@pytest.fixture(scope="class")
def api():
    return HfApi(endpoint=ENDPOINT_STAGING, token=TOKEN)


@pytest.fixture
def new_repo_id(api):
    return f"{api.whoami()['name']}/{repo_name()}"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))


def pytest_configure(config):
    for name in "api transfer inference xet no_xet production deprecated git_lfs vcr".split():
        config.addinivalue_line("markers", name)
"""


# The data file most card tests load, from what they expect to find in it.
SAMPLE_CARD = """---
language:
- en
license: mit
library_name: pytorch-lightning
tags:
- pytorch
- image-classification
datasets:
- beans
metrics:
- acc
---

# my-cool-model

## Model description

You can embed local or remote images using `![](...)`
"""


def unpacked(folder: Path) -> Path:
    """The tests of the installed version, unpacked below `folder`."""
    release = f"huggingface_hub=={version('huggingface_hub')}"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    download = [*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), release]
    subprocess.run(download, check=True)
    needed = ("pytest-mock", "jedi", "parso")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "extra"), *needed], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("huggingface_hub-*/tests"))


def constants(tests: Path) -> dict[str, str]:
    """The users and tokens the tests sign in with."""
    return dict(re.findall(r'^(\w+) = "(.*)"$', (tests / "testing_constants.py").read_text(), re.MULTILINE))


def prepared(tests: Path, endpoint: str) -> Path:
    """The tests with a conftest.py and with the server's address as their staging address."""
    names = tests / "testing_constants.py"
    names.write_text(
        re.sub(r'^(ENDPOINT_STAGING) = ".*"$', rf'\1 = "{endpoint}"', names.read_text(), flags=re.MULTILINE)
    )
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "__init__.py").touch()
    (tests / "fixtures" / "cards").mkdir(parents=True, exist_ok=True)
    (tests / "fixtures" / "cards" / "sample_simple.md").write_text(SAMPLE_CARD)
    (tests.parent / "pytest.ini").write_text("[pytest]\n")
    return tests


def run(tests: Path, endpoint: str, keyword: str) -> ElementTree.Element:
    """The report of a pytest run."""
    report = tests.parent / "report.xml"
    environment = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
        "HF_HOME": str(tests.parent / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(tests.parent.parent / "extra"), "NO_PROXY": "*",
    }  # fmt: skip
    marks = "not production and not xet and not git_lfs"
    options = ["-q", "--continue-on-collection-errors", "-m", marks, "-k", keyword, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", f"--junitxml={report}", *options]
    files = [f"tests/{name}.py" for name in FILES.split() if (tests / f"{name}.py").exists()]
    with (tests.parent / "output.txt").open("w") as output:
        subprocess.run([*command, *files], cwd=tests.parent, env=environment, stdout=output, stderr=output, check=False)
    return ElementTree.parse(report).getroot()


def summary(report: ElementTree.Element) -> str:
    """Counts by file and the first line of every failure."""
    counts: dict[str, Counter[str]] = {}
    failures = []
    for case in report.iter("testcase"):
        place = case.get("classname", "").removeprefix("tests.")
        file = place.split(".")[0]
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        counts.setdefault(file, Counter())[outcome] += 1
        used = any(int(one.get("value", "0")) for one in case.iter("property") if one.get("name") == "requests")
        if outcome == "passed" and used:
            counts[file]["passed, having asked the server"] += 1
        if problem is not None and outcome == "failed":
            reason = " ".join((problem.get("message") or "").split())[:200]
            failures.append(f"| {place}.{case.get('name')} | {reason.replace('|', '/')} |")
    total = sum(counts.values(), Counter())
    columns = ("passed", "passed, having asked the server", "failed", "skipped")
    rows = [(file, *(str(counts[file][column]) for column in columns)) for file in sorted(counts)]
    rows.append(("total", *(str(total[column]) for column in columns)))
    head = [f"| file | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines = [*head, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", "| failing test | why |", "|---|---|", *failures])


def main() -> None:
    """Prints the summary of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="unpack here and leave everything in place")
    parser.add_argument("-k", default="", help="further narrow the tests, as for pytest")
    arguments = parser.parse_args()
    keyword = " and ".join(f"not {name}" for name in OTHER_SERVICES.split()) + (
        f" and ({arguments.k})" if arguments.k else ""
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = next(folder.glob("huggingface_hub-*/tests"), None)
        tests = known or unpacked(folder)
        names = constants(tests)
        with HubServer(Path(temporary) / "hub") as server:
            server.add_user(names["USER"], names["TOKEN"], orgs=["valid_org"], role="admin")
            server.add_user(names["OTHER_USER"], names["OTHER_TOKEN"], role="admin")
            enterprise = (names["ENTERPRISE_USER"], names["ENTERPRISE_TOKEN"])
            server.add_user(*enterprise, orgs=[names["ENTERPRISE_ORG"]], role="admin")
            print(summary(run(prepared(tests, server.endpoint), server.endpoint, keyword)))


if __name__ == "__main__":
    main()
