"""Output folders appear whole or not at all, whoever else is writing and whatever a dead run left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

from hf_datavec.errors import InputError, RunError
from hf_datavec.staging import flushing, partial_path, refuse_existing, staged

# Writes into a staged folder and holds it open until a line arrives on stdin.
HOLDER = """
import sys
from pathlib import Path
from hf_datavec.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "holder").write_text("holder")
    print("holding", flush=True)
    sys.stdin.readline()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, error: BaseException | None = None) -> None:
    """Write a file in a folder in a folder, and then maybe fail."""
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("content")
    if error is not None:
        raise error


def hold(output: Path) -> subprocess.Popen[str]:
    """Another process that is writing `output` now."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_the_folder_appears_when_the_block_ends_and_nothing_else_is_left(tmp_path):
    output = tmp_path / "out"
    with staged(output) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("content")
        assert not output.exists()
        assert folder.parent == tmp_path
        assert folder.name.startswith(".")
    assert names(tmp_path) == ["out"]
    assert (output / "deep" / "file").read_text() == "content"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143), InputError("x")])
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), staged(tmp_path / "out") as folder:
        fill(folder, error)
    assert names(tmp_path) == []


def test_missing_folders_above_the_output_are_made(tmp_path):
    with staged(tmp_path / "a" / "b" / "out"):
        pass
    assert names(tmp_path / "a" / "b") == ["out"]


def test_a_relative_output_stays_where_it_was_meant_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with staged(Path("out")) as folder:
        (folder / "file").write_text("content")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_stands_at_the_output_is_never_touched(kind, tmp_path):
    output, target = tmp_path / "out", tmp_path / "target"
    if kind == "folder":
        output.mkdir()
        (output / "mine").write_text("mine")
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(target)
        if kind == "link":
            target.mkdir()
    before = names(tmp_path)
    with pytest.raises(InputError) as caught:
        with staged(output):
            pytest.fail("the block must not run")
    assert str(caught.value) == (
        f"output '{output}' already exists\n"
        "  hint: nothing is overwritten: remove it, or choose another folder with -o"
    )  # fmt: skip
    assert names(tmp_path) == before
    with pytest.raises(InputError):
        refuse_existing(output)


@pytest.mark.parametrize("filled", [True, False])
def test_what_somebody_made_meanwhile_is_not_replaced(filled, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(InputError, match="already exists"), staged(output):
        fill(output) if filled else output.mkdir()
    assert names(tmp_path) == ["out"]
    assert names(output) == (["deep"] if filled else [])


def test_a_second_writer_is_refused_while_another_process_writes(tmp_path):
    output = tmp_path / "out"
    process = hold(output)
    try:
        with pytest.raises(RunError) as caught:
            with staged(output):
                pytest.fail("the block must not run")
        assert str(caught.value) == f"another run is writing '{output}' right now\n  hint: wait for it to end"
        assert (partial_path(output) / "holder").exists()
        with staged(tmp_path / "other") as folder:
            (folder / "file").write_text("content")
    finally:
        process.communicate("\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["other", "out"]
    assert names(output) == ["holder"]


def test_a_killed_writer_leaves_no_finished_folder_and_does_not_block_the_next(tmp_path):
    output = tmp_path / "out"
    process = hold(output)
    process.kill()
    process.wait()
    assert not output.exists()
    assert (partial_path(output) / "holder").exists()
    with staged(output) as folder:
        assert names(folder) == []
        (folder / "file").write_text("content")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["file"]


def test_a_stale_partial_folder_is_replaced(tmp_path):
    partial = partial_path(tmp_path / "out")
    (partial / "deep").mkdir(parents=True)
    (partial / "deep" / "old").write_text("old")
    with staged(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_an_unfinished_folder_is_kept_and_continued_where_that_is_asked_for(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged(output, keep_unfinished=True) as folder:
        fill(folder, KeyboardInterrupt())
    assert names(tmp_path) == [partial_path(output).name]
    with staged(output, keep_unfinished=True) as folder:
        assert names(folder) == ["deep"]
        (folder / "second").write_text("second")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["deep", "second"]


@pytest.mark.parametrize("name", ["a.b", "a.c", "a", "a.partial"])
def test_outputs_with_similar_names_have_partial_folders_and_locks_of_their_own(name, tmp_path):
    others = [other for other in ("a.b", "a.c", "a", "a.partial") if other != name]
    with staged(tmp_path / name):
        for other in others:
            with staged(tmp_path / other):
                pass
    assert names(tmp_path) == sorted([name, *others])


def test_files_are_flushed_beside_other_work_and_all_is_done_when_the_block_ends(tmp_path, monkeypatch):
    begun, go_on, flushed = Event(), Event(), []

    def sync(handle):
        begun.set()
        assert go_on.wait(20)
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    with flushing() as flush:
        flush(tmp_path / "first")
        assert begun.wait(20)
        flush(tmp_path / "second")  # the disk is behind; the end of a staged folder flushes what is missing
        assert not flushed
        go_on.set()
    assert flushed == [str(tmp_path / "first")]


def test_an_error_of_the_disk_in_the_background_is_not_lost(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "file").write_text("content")
    with pytest.raises(RunError, match="file': Input/output error"), flushing() as flush:
        flush(tmp_path / "file")
