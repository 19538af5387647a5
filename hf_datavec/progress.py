"""Progress on stderr: bars for people, now and then a line in the log of a long job, silence otherwise."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

from hf_datavec import processes

Item = TypeVar("Item")

log = logging.getLogger(__name__)

# Seconds between two lines in the log of a job that nobody watches; shorter ones say nothing at all.
LOG_EVERY = 60.0


def wanted() -> bool:
    """Whether progress bars are shown: on a terminal, unless HF_HUB_DISABLE_PROGRESS_BARS says no."""
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return sys.stderr.isatty() and not disabled and processes.is_main()


@cache
def _bar() -> Any:
    """tqdm without the thread that watches all bars: beside a thread a process is not copied (`forked`)."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

    return Bar


def progress(items: Iterable[Item], *, text: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """The same items, with a bar that says how many are done and how long the rest will take."""
    yield from _bar()(items, desc=text, total=total, unit=unit, disable=not wanted(), leave=False)


@contextlib.contextmanager
def byte_progress(total: int, *, text: str) -> Iterator[Callable[[int], None]]:
    """A function to tell of bytes that are done: a bar with the rate and the time left, or lines in the log."""
    with _bar()(total=total, desc=text, unit="B", unit_scale=True, disable=not wanted(), leave=False) as bar:
        begun = told = time.monotonic()
        done = 0

        def tell(more: int) -> None:
            nonlocal told, done
            bar.update(more)
            done += more
            now = time.monotonic()
            if bar.disable and now - told >= LOG_EVERY:
                told, left = now, (now - begun) * (total - done) / max(1, done)
                log.info("%s: %.1f of %.1f GB, %.0f minutes left", text, done / 1e9, total / 1e9, left / 60)

        yield tell


def quiet_transformers() -> None:
    """Switch the bars of transformers off, since every load of a small network would draw one, and its notices."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def quiet_datasets() -> None:
    """Switch the bars of datasets off where ours are off."""
    import datasets

    if not wanted():
        datasets.disable_progress_bars()
