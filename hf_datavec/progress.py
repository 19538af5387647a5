"""Progress on stderr for people, silence for logs and pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def wanted() -> bool:
    """Whether progress bars are shown: on a terminal, unless HF_HUB_DISABLE_PROGRESS_BARS says no."""
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return sys.stderr.isatty() and not disabled


def progress(items: Iterable[Item], *, text: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """The same items, with a bar that says how many are done and how long the rest will take."""
    from tqdm import tqdm

    yield from tqdm(items, desc=text, total=total, unit=unit, disable=not wanted(), leave=False)


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
