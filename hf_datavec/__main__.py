"""`hf-datavec` as a program; `python -m hf_datavec` is the same."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from hf_datavec.cli import main, signals
from hf_datavec.threads import tune_process


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    signals.listen()
    tune_process()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader has seen enough
            pass
        except OSError as error:  # a full disk behind `> file`
            code = code or 1
            os.write(2, f"error: cannot write the output: {error.strerror}\n".encode())
    # All work is done and every file closed. Taking torch apart object by object would take half a second more.
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    run()
