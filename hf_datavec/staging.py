"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hf_datavec.errors import InputError, RunError

Kept = Callable[[Path, BaseException], bool]

# How often a folder is taken away to which other threads of a process that ends are just adding a file.
TRIES = 5
# What this process is building now: hidden folder to whether an error's leavings are kept.
_unfinished: dict[Path, bool | Kept] = {}


def refuse_existing(output: Path) -> None:
    """Raise InputError when something already stands where a result shall be written."""
    if output.exists() or output.is_symlink():
        raise InputError(
            f"output '{output}' already exists",
            hint="nothing is overwritten: remove it, or choose another folder with -o",
        )


def partial_path(output: Path) -> Path:
    """The hidden sibling in which a folder is built; same file system, so that the rename is atomic."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def staged(output: Path, *, keep_unfinished: bool | Kept = False) -> Iterator[Path]:
    """Yield an empty hidden folder that is renamed to `output` when the block ends without an error.

    A killed run leaves at most the hidden `.NAME.partial`, which the next run of the same output replaces
    (or continues, with `keep_unfinished`, which may be asked whether what an error leaves is worth it).

    Raises: InputError if `output` exists; RunError if another process is writing it now.
    """
    output = Path(output).absolute()
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(output)
    with _locked(_lock_path(partial), output):
        _unfinished[partial] = keep_unfinished
        try:
            for left in _leavings(partial):
                shutil.rmtree(left)
            if partial.exists() and not keep_unfinished:
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            yield partial
            _flush(partial)
            refuse_existing(output)  # somebody may have made it while we worked
            os.rename(partial, output)
        except BaseException as error:
            _abandon(partial, error)
            raise
        finally:
            del _unfinished[partial]


def abandon_all(error: BaseException) -> None:
    """Do for every folder that is being built now what its block would do if it met the error; for a process that
    ends without leaving its blocks."""
    for partial in list(_unfinished):
        with contextlib.suppress(OSError):  # the others must go all the same
            _abandon(partial, error)
        with contextlib.suppress(OSError):
            _lock_path(partial).unlink(missing_ok=True)


def _abandon(partial: Path, error: BaseException) -> None:
    keep = _unfinished[partial]
    if not partial.exists() or (keep(partial, error) if callable(keep) else keep):
        return
    # Under another name first, so that threads which still write fail, instead of filling it again.
    away = partial.with_name(f"{partial.name}-{os.getpid()}")
    os.rename(partial, away)
    for _ in range(TRIES):
        shutil.rmtree(away, ignore_errors=True)
        if not away.exists():
            break


def _leavings(partial: Path) -> list[Path]:
    """Folders on their way out whose process was killed."""
    return list(partial.parent.glob(f"{glob.escape(partial.name)}-*"))


def _lock_path(partial: Path) -> Path:
    return partial.with_suffix(".lock")


@contextlib.contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    # The kernel drops the lock when the process dies, so a killed run never blocks the next one.
    busy = RunError(f"another run is writing '{output}' right now", hint="wait for it to end")
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_ino != os.stat(path).st_ino:
                raise busy  # a run that just ended removed the file that we locked; another may hold its successor
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    # After a power cut a renamed folder must not hold files whose bytes never reached the disk.
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # where quotas and file servers say no
        raise RunError(f"cannot write '{path}': {error.strerror}") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def flushing() -> Iterator[Callable[[Path], None]]:
    """Yield what brings a file to the disk beside other work, so that the last flush has little left to do.

    Raises: RunError of the disk at the end of the block.
    """
    with ThreadPoolExecutor(1, "flush") as pool:
        asked: list[Future[None]] = []

        def flush(path: Path) -> None:
            if all(one.done() for one in asked):  # a disk that is behind gets all the rest at the end
                asked.append(pool.submit(_sync, path))

        yield flush
    for one in asked:
        one.result()
