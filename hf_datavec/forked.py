"""Work done by copies of this process, which do not wait for each other's interpreter as threads do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from hf_datavec.errors import DatavecError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of prctl(2): the signal that a process gets when the one that has started it ends, whatever ends it.
PR_SET_PDEATHSIG = 1


def possible() -> bool:
    """Whether this process can be copied: it may have children, and has no other thread of Python, which a copy would
    lack in the midst of its work, and no torch, which has threads of its own."""
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return sys.platform == "linux" and alone and not multiprocessing.current_process().daemon


@contextlib.contextmanager
def working(
    work: Callable[[Item], Result], items: Sequence[Item], *, processes: int
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Yield the items with what the work gives for each, as they are done; who is free takes the next.

    The copies exist when the block begins, and have ended when it ends; they know all that this process knows, and
    their results must be picklable. With one process, or one item, no copy is made.

    Raises: the error of the work that is met first; RunError when a copy has been killed.
    """
    if processes <= 1 or len(items) <= 1:
        yield ((item, work(item)) for item in items)
        return
    context = multiprocessing.get_context("fork")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(processes, len(items))):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(work, items, there, os.getpid()), daemon=True)
            process.start()
            there.close()
            workers[here] = process
        yield _results(items, workers)
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _results(items: Sequence[Item], workers: dict[Connection, BaseProcess]) -> Iterator[tuple[Item, Any]]:
    places = iter(range(len(items)))
    for connection in workers:
        with _noticing(workers[connection]):
            connection.send(next(places))
    for _ in items:
        connection = next(one for one in wait(list(workers)) if isinstance(one, Connection))
        with _noticing(workers[connection]):
            done, result, error = connection.recv()
            if error is None and (following := next(places, None)) is not None:
                connection.send(following)
        if error is not None:
            raise error
        yield items[done], result


@contextlib.contextmanager
def _noticing(process: BaseProcess) -> Iterator[None]:
    """Say so when a copy turns out to be gone."""
    try:
        yield
    except (EOFError, OSError):
        raise RunError(f"a process of this run was ended: {_how(process)}") from None


def _how(process: BaseProcess) -> str:
    """How a process ended that has closed its pipe."""
    process.join()
    code = process.exitcode or 0
    if code == -signal.SIGBUS:
        return "a file that it read was cut, or its disk is gone"
    return f"killed by signal {-code} (9: perhaps out of memory)" if code < 0 else f"exit code {code}"


def _work(work: Callable[[Any], Any], items: Sequence[Any], connection: Connection, parent: int) -> None:
    """What a copy does until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its copies
    _end_with_parent(parent)
    while True:
        place = connection.recv()
        try:
            told: tuple[int, Any, Exception | None] = (place, work(items[place]), None)
        except (DatavecError, OSError) as error:
            told = (place, None, error)
        except Exception:  # noqa: BLE001 - a mistake of ours, which may not survive being sent
            told = (place, None, RuntimeError(traceback.format_exc()))
        connection.send(told)


def _end_with_parent(parent: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before it could be asked for
        os._exit(1)
