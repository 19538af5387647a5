"""SIGTERM and Ctrl-C end the program and take unfinished folders away.

They raise nothing: an exception between any two steps of a library can leave a lock taken, for which its threads wait
for ever, and one that unwinds through C++ aborts the process.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import time
from types import FrameType

from hf_datavec import processes, staging

# Seconds that libraries have to put their things away before the process ends all the same.
PATIENCE = 5
SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


def listen() -> None:
    """From now on SIGTERM and SIGINT end this process; for programs, since it changes all of the process."""
    for number in SAID:
        # Where Ctrl-C is ignored, as in a job in the background, it stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    code = 128 + number
    for other in SAID:
        signal.signal(other, signal.SIG_IGN)
    try:
        staging.abandon_all(KeyboardInterrupt())
        if processes.is_main():
            # Not through sys.stderr, in the middle of whose work we may be.
            os.write(2, f"{SAID[signal.Signals(number)]}; nothing half written was left in place\n".encode())
        _thread.start_new_thread(_end_after, (PATIENCE, code))
        atexit._run_exitfuncs()  # temporary folders
    finally:
        os._exit(code)


def _end_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)
