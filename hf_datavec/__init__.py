"""Fuse what sites learned from images they may not share.

`TaskVector` and `merge` are the Python side of the commands; they are imported when they are first asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["MergeResult", "TaskVector", "__version__", "merge"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("hf_datavec.api"), name)
    raise AttributeError(f"module 'hf_datavec' has no attribute {name!r}")
