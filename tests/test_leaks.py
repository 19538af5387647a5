"""A token that the suite prints or writes anywhere fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import leaks
from hub_people import TOKENS

PLANTED = """
import logging
import leaks

TOKEN = "hf_coordinator" + "SECRET"

def test_printed():
    print(TOKEN)

def test_logged():
    logging.getLogger("x").error("sent %s", TOKEN)

def test_said_by_a_command():
    leaks.hear("refused: " + TOKEN)

def test_raised():
    raise ValueError("no access with " + TOKEN)

def test_written(tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card/README.md").write_text(TOKEN)

def test_written_for_all(tmp_path_factory):
    (tmp_path_factory.mktemp("hub") / "lock.yaml").write_text(TOKEN)
"""
PLACES = [
    "Captured stdout call of test_it.py::test_printed",
    "Captured log call of test_it.py::test_logged",
    "output of test_it.py::test_said_by_a_command",
    "traceback of test_it.py::test_raised",
    "test_written0/card/README.md",
    "hub0/lock.yaml",
]
CLEAN = """
def test_kept_on_purpose(tmp_path):
    (tmp_path / "token").write_text("hf_coordinator" + "SECRET")

def test_of_weights(tmp_path):
    (tmp_path / "weights").write_text("hf_ SECRET" * 200_000)
"""


def run(source: str) -> subprocess.CompletedProcess[str]:
    """A test run with the plugin, outside the folder of this run, which is searched as well."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "leaks", "-p", "no:cacheprovider", "--basetemp=work"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_it.py").write_text(source)
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_run_with_leaks_fails_and_names_their_places_but_not_the_tokens():
    done = run(PLANTED)
    told = done.stdout.partition("tokens that leaked")[2].partition("short test summary")[0]
    places = told.splitlines()[1:-1]
    assert done.returncode == 1, done.stdout
    assert len(places) == len(PLACES), places
    assert all(any(place.endswith(one) for place in places) for one in PLACES), places
    assert not leaks.TOKEN.search(told)


def test_leaks_alone_fail_a_run_whose_tests_all_pass():
    done = run(PLANTED.replace("raise ValueError(", "str("))
    assert "6 passed" in done.stdout
    assert done.returncode == 1, done.stdout


def test_a_run_without_leaks_passes():
    done = run(CLEAN)
    assert done.returncode == 0, done.stdout
    assert "leaked" not in done.stdout


def test_every_token_of_the_consortium_has_the_form_that_is_searched_for():
    assert all(leaks.TOKEN.fullmatch(token) for token in TOKENS.values())
