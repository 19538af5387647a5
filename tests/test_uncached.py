"""Writing past the page cache."""

import errno
import itertools
import os

import pytest

from hf_datavec import uncached
from hf_datavec.uncached import ALIGNMENT, GATHERED, appending


def blank(path, length):
    path.write_bytes(bytes(length))
    return path


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("start", [0, 8, ALIGNMENT, ALIGNMENT + 8, 3 * ALIGNMENT - 1])
@pytest.mark.parametrize("length", [0, 1, ALIGNMENT, 2 * ALIGNMENT + 9, GATHERED, 2 * GATHERED + ALIGNMENT + 5])
def test_bytes_arrive_at_their_place_whatever_it_is_and_however_many(cached, start, length, tmp_path):
    path = blank(tmp_path / "file", start + length + 7)
    content = os.urandom(length)
    with appending(path, start, cached=cached) as writing:
        pieces = [content[:3], content[3 : GATHERED + 11], content[GATHERED + 11 :]]
        for piece in pieces:
            writing.write(memoryview(piece))
    assert path.read_bytes() == bytes(start) + content + bytes(7)


def test_neighbouring_stretches_do_not_disturb_each_other(tmp_path):
    ends = [0, ALIGNMENT + 100, ALIGNMENT + 200, 5 * ALIGNMENT, 9 * ALIGNMENT + 1]
    content = os.urandom(ends[-1])
    path = blank(tmp_path / "file", len(content))
    for begin, end in itertools.pairwise(ends):
        with appending(path, begin, cached=False) as writing:
            writing.write(memoryview(content[begin:end]))
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs a system that can write past its cache")
@pytest.mark.parametrize("when", ["opening", "writing"])
def test_a_file_system_that_knows_no_such_writing_gets_the_bytes_the_usual_way(when, tmp_path, monkeypatch):
    path, content = blank(tmp_path / "file", 3 * GATHERED), os.urandom(3 * GATHERED)
    real_open, real_write, direct = os.open, os.pwrite, set()

    def opened(name, flags, *more):
        if flags & os.O_DIRECT and when == "opening":
            raise OSError(errno.EINVAL, "Invalid argument")
        found = real_open(name, flags & ~os.O_DIRECT, *more)
        if flags & os.O_DIRECT:
            direct.add(found)
        return found

    def written(file, *rest):
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(file, *rest)

    monkeypatch.setattr(uncached.os, "open", opened)
    monkeypatch.setattr(uncached.os, "pwrite", written)
    with appending(path, 0, cached=False) as writing:
        writing.write(memoryview(content))
    assert path.read_bytes() == content
    assert bool(direct) == (when == "writing")


def test_a_full_disk_is_told_at_the_end_of_the_block_at_the_latest(tmp_path, monkeypatch):
    path = blank(tmp_path / "file", 2 * GATHERED)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uncached.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"), appending(path, 0, cached=False) as writing:
        writing.write(memoryview(bytes(2 * GATHERED)))
