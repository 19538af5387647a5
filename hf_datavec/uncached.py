"""Bytes written in a row past the page cache: what nobody reads soon takes no memory, and is on its disk at once."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

# What is gathered before it is written: enough for a disk to run at full speed, and little beside all else in memory.
GATHERED = 2**22
# Places and lengths that go past the cache are multiples of this; what is left over at both ends goes the usual way.
ALIGNMENT = max(2**12, mmap.PAGESIZE)
# What a file system says that knows no such writing, or not at these places.
UNKNOWN = (errno.EINVAL, errno.ENOTSUP)


class Writing(Protocol):
    """Where bytes are appended."""

    def write(self, content: memoryview, /) -> object: ...


@contextlib.contextmanager
def appending(path: Path, start: int, *, cached: bool) -> Iterator[Writing]:
    """Yield what writes bytes one after the other into an existing file, from a place on.

    Raises: OSError as every writing does, at the latest at the end of the block.
    """
    direct = None if cached else _opened_past_cache(path)
    if direct is None:
        with open(path, "r+b") as handle:
            handle.seek(start)
            yield handle
        return
    try:
        with open(path, "r+b", buffering=0) as usual, ThreadPoolExecutor(1, "disk") as disk:
            gathering = _Gathering(disk, direct, usual.fileno(), start)
            yield gathering
            gathering.finish()
    finally:
        os.close(direct)


def reserve(path: Path, size: int) -> None:
    """Let the disk set room aside for a file that is written past the cache, which makes that faster.

    Raises: OSError when there is no room.
    """
    direct = _opened_past_cache(path)
    if direct is None:
        return
    try:
        os.posix_fallocate(direct, 0, size)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
    finally:
        os.close(direct)


def _opened_past_cache(path: Path) -> int | None:
    """The file opened so that writing to it passes the page cache by; None where that is unknown."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError as error:
        if error.errno in UNKNOWN:
            return None
        raise


class _Gathering:
    """Gathers bytes until whole aligned blocks of them can be written, one room while the other is on its way."""

    def __init__(self, disk: ThreadPoolExecutor, direct: int, usual: int, start: int) -> None:
        self._disk, self._direct, self._usual = disk, direct, usual
        # Memory of its own pages, as such writing demands; its first byte belongs to an aligned place in the file.
        self._room, self._other = (memoryview(mmap.mmap(-1, GATHERED)) for _ in range(2))
        self._place = start // ALIGNMENT * ALIGNMENT
        self._begin = self._end = start - self._place  # what of the room waits to be written
        self._going: Future[None] | None = None

    def write(self, content: memoryview) -> int:
        """Take bytes, and write those before them that fill the room."""
        done = 0
        while done < len(content):
            taken = min(len(content) - done, GATHERED - self._end)
            self._room[self._end : self._end + taken] = content[done : done + taken]
            self._end += taken
            done += taken
            if self._end == GATHERED:
                self._send()
        return done

    def finish(self) -> None:
        """Write what is left, and wait until all is written."""
        self._arrived()
        self._write(self._room, self._begin, self._end, self._place)

    def _send(self) -> None:
        self._arrived()
        self._going = self._disk.submit(self._write, self._room, self._begin, self._end, self._place)
        self._room, self._other = self._other, self._room
        self._place += GATHERED
        self._begin = self._end = 0

    def _arrived(self) -> None:
        if self._going is not None:
            self._going.result()

    def _write(self, room: memoryview, begin: int, end: int, place: int) -> None:
        """Write a room from `begin` to `end`: whole blocks past the cache, what is left over the usual way."""
        first, last = -(-begin // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        if first >= last:
            _write_at(self._usual, room[begin:end], place + begin)
            return
        _write_at(self._usual, room[begin:first], place + begin)
        try:
            _write_at(self._direct, room[first:last], place + first)
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
            _write_at(self._usual, room[first:last], place + first)
        _write_at(self._usual, room[last:end], place + last)


def _write_at(file: int, content: memoryview, place: int) -> None:
    while len(content):
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written
