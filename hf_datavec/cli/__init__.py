"""The command line: options in, results on stdout, progress and messages on stderr, an exit code out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from hf_datavec import processes
from hf_datavec.errors import DatavecError, InputError

# The commands that share their work out; the others read little, or train, where more processes change the result.
SHARED = ("merge", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the run failed, 2 the input is wrong."""
    from hf_datavec.cli.options import parser

    _prepare()
    options = parser().parse_args(arguments)
    try:
        _refuse_several_processes(options.command)
        return int(processes.together(lambda: options.run(options)) or 0)
    except DatavecError as error:
        if processes.tells(error):
            sys.stderr.write("".join(f"{_told(one)}\n" for one in (getattr(error, "errors", None) or (error,))))
        return error.exit_code
    except BrokenPipeError:  # `hf-datavec methods | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder without permission
        where = f" '{error.filename}'" if error.filename else ""
        if processes.tells(error):
            sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        return 1
    except KeyboardInterrupt:  # who calls this function, and not the program, listens to no signal
        if processes.is_main():
            sys.stderr.write("interrupted; nothing half written was left in place\n")
        return 130
    finally:
        processes.leave()


def _refuse_several_processes(command: str) -> None:
    if processes.count() > 1 and command not in SHARED:
        error = InputError(
            f"hf-datavec was started as {processes.count()} processes, but {command} runs as one",
            hint=f"start it without torchrun or accelerate launch; {' and '.join(SHARED)} take any number",
        )
        raise processes.known(error)


def _told(error: DatavecError) -> str:
    # An error in a file begins with its place, as compilers have it, so that editors can jump there.
    return str(error) if hasattr(error, "place") else f"error: {error}"


def _prepare() -> None:
    # A hospital's tool reports nothing to anybody unless its user says so; the client reads these at import.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    warnings.filterwarnings("ignore")  # of libraries, about their own insides
    logger = logging.getLogger("hf_datavec")
    if not logger.handlers:
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    # Looked up at each message, so that redirected streams are respected.
    def emit(self, record: logging.LogRecord) -> None:
        if processes.is_main():
            sys.stderr.write(self.format(record) + "\n")
