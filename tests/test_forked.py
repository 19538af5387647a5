"""Sums made by copies of the process: the same bytes, the same messages, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import PATIENCE, environment
from networks import make_network, make_vector, tune, write_recipe

from hf_datavec import forked
from hf_datavec.staging import partial_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends copies with their parent")

# `hf-datavec` that makes copies however little there is to do, or with --threads none. With --fail it meets a full disk
# after so many parts; with --slowly not before all vectors are verified; with --killed it dies before they can be.
PROGRAM = """
import os, signal, sys
from hf_datavec.__main__ import run
from hf_datavec.pipeline import apart, ledger, weights
from hf_datavec.vector import TaskVector
weights.WORTH_COPIES = ledger.WORTH_KEEPING = 0
def given(option, values=0):
    if option not in sys.argv:
        return None
    place = sys.argv.index(option)
    found = sys.argv[place : place + 1 + values]
    del sys.argv[place : place + 1 + values]
    return found
if given("--threads"):
    apart.suits = lambda plan, device: False
slowly = given("--slowly")
if given("--killed"):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    TaskVector.verify_by = die
    TaskVector.verify = lambda *_, **__: signal.pause()
    real = weights.write_files
    weights.write_files = lambda *some, **more: (real(*some, **more), die())
if found := given("--fail", 1):
    left, enter = int(found[1]), ledger.Ledger.enter
    def enter_some(self, *arguments):
        global left
        left -= 1
        if slowly:
            self.vectors.wait()
        enter(self, *arguments)
        if not left:
            raise OSError(28, "No space left on device")
    ledger.Ledger.enter = enter_some
run()
"""
# What copies do in the tests of `forked` itself.
WORK = """
import os, signal, sys, time
from hf_datavec import forked
from hf_datavec.errors import DatavecError, InputError

def work(number):
    if number == {bad}:
        {action}
    return os.getpid(), number * number

try:
    with forked.working(work, range(6), processes=3) as results:
        found = dict(results)
    print(sorted(square for _, square in found.values()), len({{pid for pid, _ in found.values()}} - {{os.getpid()}}))
except DatavecError as error:
    print(type(error).__name__, error)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("nobody left")
"""


def outcome_of(bad: int, action: str = "pass") -> list[str]:
    program = WORK.format(bad=bad, action=action)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_copies_share_the_work():
    results, left = outcome_of(-1, "pass")
    assert results.startswith("[0, 1, 4, 9, 16, 25] ")
    assert 1 <= int(results.split()[-1]) <= 3
    assert left == "nobody left"


def test_the_error_of_a_copy_is_the_error_of_the_run():
    told = outcome_of(3, "raise InputError('site-a is wrong', hint='ask it')")
    assert told == ["InputError site-a is wrong", "  hint: ask it", "nobody left"]


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9 (9: perhaps out of memory)"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "a file that it read was cut, or its disk is gone"),
        ("os._exit(7)", "exit code 7"),
        # Between its result and the next piece of work.
        ("import threading; threading.Timer(0.2, os._exit, [7]).start(); signal.pause()", "exit code 7"),
    ],
)
def test_a_copy_that_is_killed_is_told(action, told):
    assert outcome_of(2, action) == [f"RunError a process of this run was ended: {told}", "nobody left"]


def test_a_mistake_in_a_copy_is_told_with_its_traceback():
    program = """
from hf_datavec import forked
def work(number):
    class Odd(Exception):
        pass
    raise Odd(lambda: 0)
try:
    with forked.working(work, [1, 2], processes=2) as results:
        list(results)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert "in work" in done.stdout
    assert "<locals>.Odd" in done.stdout
    assert done.stderr == ""


def test_a_copy_that_dies_when_it_is_free_is_told():
    program = """
import os, signal, sys, time
from hf_datavec import forked
from hf_datavec.errors import RunError
try:
    with forked.working(lambda number: os.getpid(), [1, 2, 3, 4], processes=2) as results:
        time.sleep(0.5)
        _, pid = next(results)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        print(len(list(results)))
except RunError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "a process of this run was ended: killed by signal 9 (9: perhaps out of memory)\n", (
        done.stderr
    )


def test_no_copies_are_made_in_a_daemon():
    program = """
import multiprocessing
from hf_datavec import forked
def tell():
    print(forked.possible(), flush=True)
tell()
process = multiprocessing.get_context("fork").Process(target=tell, daemon=True)
process.start()
process.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.split() == ["True", "False"]


def test_no_copies_are_made_beside_threads_or_torch():
    assert not forked.possible()  # torch is here
    with forked.working(lambda item: (os.getpid(), item), [1, 2], processes=1) as results:
        assert dict(results) == {1: (os.getpid(), 1), 2: (os.getpid(), 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, three sites of it and a recipe for every kind of sum."""
    folder = tmp_path_factory.mktemp("sums")
    base = make_network("vit", folder / "base")
    for seed in range(3):
        tune(base, folder / f"tuned-{seed}", seed=seed)
        make_vector(base, folder / f"tuned-{seed}", folder / f"site-{seed}")
    for method in ("mean", "ties", "dare_ties", "median"):
        sites = ["./site-0", "./site-1", {"model": "./tuned-2"} if method == "mean" else "./site-2"]
        write_recipe(folder / f"{method}.yaml", base="./base", vectors=sites, merge={"method": method})
    ranks = {"method": "ties", "options": {"density": 0.3, "scope": "vector"}}
    write_recipe(folder / "ranks.yaml", base="./base", vectors=["./site-0", "./site-1"], merge=ranks)
    return folder


def merge(folder: Path, recipe: str, output: str, *more: str, threads: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "merge", recipe, "-o", output, "--device", "cpu", *more]
    own = environment(OMP_NUM_THREADS=str(threads))
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=PATIENCE)


def written(folder: Path) -> dict[str, bytes]:
    # The card names the folder.
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("method", ["mean", "ties", "dare_ties", "median"])
def test_copies_write_what_threads_write(folder, run, monkeypatch, method):
    monkeypatch.chdir(folder)
    assert run("merge", f"{method}.yaml", "-o", f"{method}-threads", "--device", "cpu").code == 0
    for threads in (1, 3):
        done = merge(folder, f"{method}.yaml", f"{method}-{threads}", threads=threads)
        assert done.returncode == 0, done.stderr
        assert written(folder / f"{method}-{threads}") == written(folder / f"{method}-threads")


def altered(folder: Path, value: float, *, all_of_the_last: bool = False) -> bytes:
    """Another first value in a site's file, or another last tensor; returns the right bytes."""
    file = folder / "site-0" / "vector.safetensors"
    right = file.read_bytes()
    start = 8 + int.from_bytes(right[:8], "little")
    if all_of_the_last:
        tensors = json.loads(right[8:start])
        last = max(one["data_offsets"] for name, one in tensors.items() if name != "__metadata__")
        count = (last[1] - last[0]) // 4
        file.write_bytes(right[: start + last[0]] + count * np.float32(value).tobytes() + right[start + last[1] :])
        return right
    file.write_bytes(right[:start] + np.float32(value).tobytes() + right[start + 4 :])
    return right


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_vector_that_is_not_what_its_manifest_says_is_found_by_copies(folder, value):
    right = altered(folder, value)
    try:
        done = merge(folder, "mean.yaml", "wrong")
    finally:
        (folder / "site-0" / "vector.safetensors").write_bytes(right)
    assert done.returncode == 2
    assert "site-0/vector.safetensors' is not the file its datavec.json describes" in done.stderr
    assert not (folder / "wrong").exists()
    assert not partial_path(folder / "wrong").exists()


def test_parts_of_the_same_vectors_are_kept_and_those_of_others_are_not(folder):
    whole = merge(folder, "ties.yaml", "uninterrupted")
    assert whole.returncode == 0, whole.stderr
    wanted = written(folder / "uninterrupted")

    failed = merge(folder, "ties.yaml", "again", "--fail", "3")
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    book = next(partial_path(folder / "again").glob(".finished-*.jsonl")).read_text()
    assert all(json.loads(line)["vectors"] for line in book.splitlines())
    done = merge(folder, "ties.yaml", "again")
    assert "going on with an interrupted merge: 3 of " in done.stderr
    assert written(folder / "again") == wanted

    # The first part is made of a vector of which a value is another, and the site sends the right one again. Where
    # there is one copy parts are made in their order, so that the first is among those that were entered.
    right = altered(folder, 1.0)
    failed = merge(folder, "median.yaml", "other", "--fail", "3", threads=1)
    (folder / "site-0" / "vector.safetensors").write_bytes(right)
    assert failed.returncode == 2
    done = merge(folder, "median.yaml", "other")
    assert "going on with an interrupted merge: 2 of " in done.stderr
    assert merge(folder, "median.yaml", "median-whole").returncode == 0
    assert written(folder / "other") == written(folder / "median-whole")


def test_parts_that_hang_on_whole_vectors_are_kept_only_with_them(folder):
    """Ranks over whole vectors change with any of their values, also those of parts that were not reached."""
    right = altered(folder, 1.0, all_of_the_last=True)
    failed = merge(folder, "ranks.yaml", "ranks", "--fail", "3")
    (folder / "site-0" / "vector.safetensors").write_bytes(right)
    assert failed.returncode == 2
    done = merge(folder, "ranks.yaml", "ranks")
    assert done.returncode == 0, done.stderr
    assert "going on" not in done.stderr
    assert merge(folder, "ranks.yaml", "ranks-whole").returncode == 0
    assert written(folder / "ranks") == written(folder / "ranks-whole")


@pytest.mark.parametrize("way", ["copies", "threads"])
def test_what_an_earlier_run_has_verified_vouches_for_no_later_part(folder, way):
    output, more = f"trusted-{way}", ["--threads"] if way == "threads" else []
    assert merge(folder, "mean.yaml", output, "--threads", "--slowly", "--fail", "2").returncode == 1
    right = altered(folder, 1.0, all_of_the_last=True)
    assert merge(folder, "mean.yaml", output, *more, "--killed").returncode == -signal.SIGKILL
    (folder / "site-0" / "vector.safetensors").write_bytes(right)
    done = merge(folder, "mean.yaml", output)
    assert done.returncode == 0, done.stderr
    assert "going on with an interrupted merge: " in done.stderr
    assert merge(folder, "mean.yaml", f"{output}-whole").returncode == 0
    assert written(folder / output) == written(folder / f"{output}-whole")


def test_what_an_earlier_version_has_entered_is_no_obstacle(folder):
    partial = partial_path(folder / "old")
    partial.mkdir()
    (partial / ".merge-key").write_text("another")
    (partial / ".finished-0.jsonl").write_text('{"part": 0, "hashes": ["x"], "products": null}\n')
    done = merge(folder, "mean.yaml", "old")
    assert done.returncode == 0, done.stderr


def copies_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_copies_end_with_the_process_that_made_them(sent):
    program = """
import os, sys, time
from hf_datavec import forked
from hf_datavec.cli import signals
signals.listen()
with forked.working(lambda _: time.sleep(100), [1, 2], processes=2) as results:
    print("begun", flush=True)
    list(results)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert parent.stdout is not None
    parent.stdout.readline()
    deadline = time.monotonic() + PATIENCE
    while len(copies := copies_of(parent.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(copies) == 2
    parent.send_signal(sent)
    parent.communicate(timeout=PATIENCE)
    while any(map(alive, copies)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, copies))
