"""A merge that is killed at any moment leaves the whole result or none, and never stands in the next one's way."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from networks import write_recipe

from hf_datavec.models import load
from hf_datavec.staging import partial_path

KILLED = 12
TERMINATED = 3
# A merge of the small study takes seconds, most of them imports; beyond this something hangs.
PATIENCE = 120


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of a whole run until it begins to write, and from then until its result is in place."""

    before: float
    writing: float

    def corrected(self, ended: str, *, during_writing: bool) -> Timing:
        """Shorter where a merge was further than it should have been: the machine was busier when it was timed."""
        if during_writing:
            return replace(self, writing=self.writing * (0.7 if ended == "after" else 1))
        return replace(self, before=self.before * (1 if ended == "before" else 0.7))


def start(study: Path, *, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """A merge of the study's recipe in a process of its own."""
    command = [sys.executable, "-m", "hf_datavec", "merge", "recipe.yaml", "--device", "cpu"]
    # Tests that run in the background ignore Ctrl-C, and a child would inherit that.
    return subprocess.Popen(
        command, cwd=study, stdout=subprocess.DEVNULL, stderr=stderr,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_until(done: Callable[[], bool]) -> float:
    begun = time.monotonic()
    while not done():
        assert time.monotonic() - begun < PATIENCE, "the merge does not get on"
        time.sleep(0.002)
    return time.monotonic() - begun


def recipe_with_long_writing(study: Path) -> None:
    """A recipe whose run goes on for a while after it began to write: it recalibrates."""
    write_recipe(
        study / "recipe.yaml", base="./base", vectors=["./site-a", "./site-b"], output="./fused",
        recalibrate={"images": "./images", "batch_size": 3},
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def clear(study: Path) -> None:
    subprocess.run(["rm", "-rf", study / "fused"], check=True)


def test_a_merge_killed_at_any_moment_leaves_the_whole_result_or_none(study, run):
    recipe_with_long_writing(study)
    fused, partial = study / "fused", partial_path(study / "fused")
    others = sorted(path.name for path in study.iterdir())

    process = start(study)
    before = wait_until(lambda: partial.exists() or process.poll() is not None)
    writing = wait_until(lambda: fused.exists() or process.poll() is not None)
    assert process.wait(PATIENCE) == 0
    whole, timing = contents(fused), Timing(before, writing)
    assert "model.safetensors" in whole
    clear(study)

    chance = random.Random(0)
    signals = [signal.SIGKILL] * KILLED + [signal.SIGTERM] * TERMINATED
    ended: list[str] = []
    for number, sent in enumerate(signals):
        during_writing = number % 3 != 0
        ended.append(interrupt(study, timing, sent, during_writing=during_writing, chance=chance))
        timing = timing.corrected(ended[-1], during_writing=during_writing)
        if fused.exists():
            assert contents(fused) == whole
            load(fused)
        elif sent == signal.SIGTERM:
            left = [path.name for path in study.glob(".fused*")]
            assert not left, "a process that is asked to stop takes away what it began"
        clear(study)
        outcome = run("merge", "recipe.yaml", "--device", "cpu")
        assert outcome.code == 0, outcome.err
        assert contents(fused) == whole
        assert sorted(path.name for path in study.iterdir()) == sorted([*others, "fused"])
        clear(study)
    # Otherwise the moments would not have been spread, and the test would have shown nothing.
    assert ended.count("before") >= 2, ended
    assert ended.count("in writing") >= 4, ended


def interrupt(study: Path, timing: Timing, sent: signal.Signals, *, during_writing: bool, chance: random.Random) -> str:
    """Start a merge, send it a signal at a random moment, and say what it was doing then."""
    partial = partial_path(study / "fused")
    process = start(study)
    try:
        if during_writing:
            wait_until(lambda: partial.exists() or process.poll() is not None)
            time.sleep(chance.uniform(0, timing.writing))
        else:
            time.sleep(chance.uniform(0, timing.before))
        seen = partial.exists()
        process.send_signal(sent)
        code = process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    if code == 0:
        assert (study / "fused").exists()
        return "after"
    # During the first imports nobody listens yet, and SIGTERM ends the process at once.
    assert code == -sent or (sent == signal.SIGTERM and code == 128 + sent), code
    if (study / "fused").exists():
        return "after"  # in place, and the process was about to end
    return "in writing" if seen else "before"


def test_a_merge_that_is_interrupted_from_the_keyboard_says_so_and_leaves_nothing(study):
    recipe_with_long_writing(study)
    partial = partial_path(study / "fused")
    before = sorted(path.name for path in study.iterdir())
    process = start(study, stderr=subprocess.PIPE)
    wait_until(lambda: partial.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert told.splitlines()[-1] == b"interrupted; nothing half written was left in place"
    assert b"Traceback" not in told
    assert sorted(path.name for path in study.iterdir()) == before


# Stopped where an exception would leave a lock taken that another thread wants, while a third one goes on writing.
STOPPED_ANYWHERE = """
import os, signal, sys, tempfile, threading
from pathlib import Path
from hf_datavec.cli import signals
from hf_datavec.staging import staged

signals.listen()
lock = threading.Lock()

class Entering:
    def __enter__(self):
        lock.acquire()
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_):
        lock.release()

def wait():
    with lock:
        pass

def write(folder):
    number = 0
    while True:
        number += 1
        try:
            (folder / str(number)).write_text("x")
        except FileNotFoundError:
            return

scratch = tempfile.TemporaryDirectory(dir=".")
with staged(Path("result")) as folder:
    threading.Thread(target=write, args=(folder,)).start()
    threading.Timer(0.5, wait).start()
    with Entering():
        pass
    sys.exit("the signal was not heard")
"""


def test_a_program_that_is_asked_to_stop_ends_wherever_it_is(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED_ANYWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "terminated; nothing half written was left in place\n"
    assert list(tmp_path.iterdir()) == []


def test_a_program_whose_message_nobody_reads_ends_all_the_same(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65536)
    os.set_blocking(writing, True)
    program = STOPPED_ANYWHERE.replace("signals.listen()", "signals.PATIENCE = 2; signals.listen()")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=writing)
    try:
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_takes_nothing_of_its_parents_away(tmp_path):
    program = """
import os, signal
from pathlib import Path
from hf_datavec.cli import signals
from hf_datavec.staging import staged

signals.listen()
with staged(Path("result")) as folder:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert folder.is_dir()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
