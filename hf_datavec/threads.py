"""Work done ahead by several threads, and handed over in its order, so that results do not depend on their number."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")

# Coordinates that are computed in one go and handed over together: some milliseconds of work, so that waking threads
# costs nothing, and few enough that memory is used again and again.
PIECE = 2**20
# What tasks that run or wait to be handed over may hold together; a task that takes more runs alone. Some pieces for
# each of a few threads, and small beside the libraries themselves.
MOST_BYTES = 128 * 2**20
# Tasks for each thread that run or wait: one that runs, one that is done, and one that is about to start.
AHEAD = 3
# How long a thread may keep the interpreter from one that has only little to ask of it: a tenth of what Python says.
SWITCH_SECONDS = 0.0005
# Of mallopt(3): what is freed is kept for the next tensors, up to a GiB, and not given back and asked for again, which
# costs as much as a network's own arithmetic: M_TRIM_THRESHOLD and M_MMAP_MAX. And all threads have one memory, since
# each would keep as much as its largest tensor took, and a thread's own has no room in one piece for such tensors:
# M_ARENA_MAX.
KEPT = {-1: 2**30, -4: 0, -8: 1}


@dataclass(frozen=True, slots=True)
class Task(Generic[Result]):
    """Something to compute, the memory that it takes meanwhile, and what its result takes until it is let go."""

    compute: Callable[[], Result]
    nbytes: int
    result_nbytes: int | None = None  # as much as it took, when nothing is said

    @property
    def left(self) -> int:
        """What is taken when it is done."""
        return self.nbytes if self.result_nbytes is None else self.result_nbytes


def import_ahead(*modules: str) -> None:
    """Import large libraries beside other work, such as reading files, that does not need them yet."""

    def load() -> None:
        for module in modules:
            importlib.import_module(module)

    load_ahead(load)


def load_ahead(load: Callable[[], object]) -> Thread:
    """The same for what a function imports; returns the thread that does it."""

    def quietly() -> None:
        # Who needs what is loaded meets its error, too, and tells it.
        with without_collection(), contextlib.suppress(Exception):
            load()

    thread = Thread(target=quietly, name="imports")
    thread.start()
    return thread


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage: hardly anything that an import makes is any, and looking for it is a fifth of its time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def tune_process() -> None:
    """Make a process that computes faster; for programs, since it changes all of the process.

    Threads that hash hand the interpreter over sooner, and glibc keeps freed memory of any size, for all threads; other
    C libraries do as they do.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(AttributeError, OSError):
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        for option, value in KEPT.items():
            mallopt(option, value)


def numpy_on_one_thread() -> None:
    """Let numpy's products use the thread that asks for them; for programs, before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def in_order(tasks: Iterable[Task[Result]], *, threads: int | None = None, by_torch: bool = True) -> Iterator[Result]:
    """The results of tasks in their order, while later ones are computed by as many threads as torch may use.

    Within a task torch runs on one thread; tasks that are not done `by_torch` do not start it. An error of a task is
    raised in its turn, and those after it are dropped.
    """
    torch = importlib.import_module("torch") if by_torch else None
    before = torch.get_num_threads() if torch else allowed()
    count = threads or before
    pool = ThreadPoolExecutor(count, "tensors", partial(torch.set_num_threads, 1) if torch else None)
    waiting: deque[tuple[Task[Result], Future[Result]]] = deque()
    taken = 0  # by the result that was handed over last, which is still somewhere in use
    try:
        for task in tasks:
            while waiting and (len(waiting) >= AHEAD * count or _held(waiting) + taken + task.nbytes > MOST_BYTES):
                done, first = waiting.popleft()
                taken = done.left
                yield first.result()
            compute = partial(_given_back, task.compute) if task.nbytes > MOST_BYTES else task.compute
            waiting.append((task, pool.submit(compute)))
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        if torch:
            torch.set_num_threads(before)  # what a thread sets is what later threads begin with


def _given_back(compute: Callable[[], Result]) -> Result:
    """What a large task computes; what it has freed lies between what is in use, and is given back for the next."""
    try:
        return compute()
    finally:
        with contextlib.suppress(AttributeError, OSError):
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)


def _held(waiting: Iterable[tuple[Task[Result], Future[Result]]]) -> int:
    """The memory of tasks that run, and of results that nobody has taken yet."""
    return sum(task.left if future.done() else task.nbytes for task, future in waiting)


def allowed() -> int:
    """How many threads torch would use, which need not be started to know it."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told):
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
