"""SIGTERM and Ctrl-C end the program and take unfinished folders away.

They raise nothing: an exception between any two steps of a library can leave a lock taken, for which its threads wait
for ever, and one that unwinds through C++ aborts the process.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import time
from types import FrameType

from hf_datavec import processes, staging

# Seconds for taking things away, also by libraries, before the process ends all the same: a disk may have gone, and
# nobody may read the message.
PATIENCE = 15
SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


def listen() -> None:
    """From now on SIGTERM and SIGINT end this process; for programs, since it changes all of the process."""
    for number in SAID:
        # Where Ctrl-C is ignored, as in a job in the background, it stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _leave_to_the_parent() -> None:
    """A forked process takes nothing away."""
    for number in SAID:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    code = 128 + number
    _thread.start_new_thread(_end_after, (PATIENCE, code))
    for other in SAID:
        signal.signal(other, signal.SIG_IGN)
    try:
        with contextlib.suppress(Exception):
            staging.abandon_all(KeyboardInterrupt())
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()  # temporary folders
        if processes.is_main():
            # Not through sys.stderr, in the middle of whose work we may be.
            os.write(2, f"{SAID[signal.Signals(number)]}; nothing half written was left in place\n".encode())
    finally:
        os._exit(code)


def _end_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)
