"""SIGTERM and Ctrl-C as exceptions, so that unfinished folders are taken away on the way out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from hf_datavec import processes

# Seconds until a signal that came during an import is looked at again.
LATER = 0.05


def listen() -> None:
    """From now on SIGTERM and SIGINT raise in the main thread, but never in the middle of an import."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Where Ctrl-C is ignored, as in a job in the background, it stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    # An exception inside of Python's import system leaves its lock taken, and threads that import wait for ever;
    # inside of a C++ library's start it ends the process.
    if _importing(frame):
        again = threading.Timer(LATER, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if processes.is_main():
        sys.stderr.write("terminated; nothing half written was left in place\n")
    raise SystemExit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
