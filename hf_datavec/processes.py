"""One run as several processes, as torchrun and `accelerate launch` start them: who does what, and how all end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from hf_datavec.errors import DatavecError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

# The main process may download or learn for hours while the others wait. A peer that dies is noticed at once by its
# closed connection, so the limit guards against nothing but a network that swallows packets.
LONGEST_WAIT = timedelta(days=1)
# The names under which launchers tell the number of processes and the place among them; Accelerate reads the same.
COUNT_NAMES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
INDEX_NAMES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


class LostError(RunError):
    """Another process of this run is gone."""


def _told(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), otherwise)


def count() -> int:
    """How many processes this run has."""
    return max(1, _told(COUNT_NAMES, 1))


def index() -> int:
    """This process's place among them, from zero."""
    return _told(INDEX_NAMES, 0) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that speaks and writes what is written once."""
    return index() == 0


def join(*, cpu: bool) -> None:
    """Meet the other processes, if there are any; `cpu` keeps all of them off accelerators."""
    if count() > 1:
        # Its functions keep the group they find as their default when they are first imported. A group that is kept is
        # not taken down by `leave`, and its threads abort a Python that ends.
        import torch.distributed.nn.functional  # noqa: F401
        from accelerate import PartialState

        try:
            PartialState(cpu=cpu, timeout=LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            problem = f"the {count()} processes of this run cannot meet: {_first_line(error)}"
            raise known(RunError(problem)) from None


def leave() -> None:
    """Part from the other processes, so that they need not wait for a connection to break."""
    if count() > 1:
        from accelerate import PartialState

        if PartialState._shared_state:
            with contextlib.suppress(RuntimeError):  # of a peer that is gone already
                PartialState().destroy_process_group()


def together(work: Callable[[], Result]) -> Result:
    """What the work gives in this process, once it is done in all of them; every process must call it.

    The work may hold other exchanges. Raises: in every process the error of the first process that has one.
    """
    if count() == 1:
        return work()
    result, failure = _tried(work)
    _exchange(None, failure)
    return cast("Result", result)


def on_main(work: Callable[[], Result]) -> Result:
    """What the work gives in the main process, told to all; every process must call it. Raises as `together`."""
    if count() == 1:
        return work()
    result, failure = _tried(work) if is_main() else (None, None)
    return cast("Result", _exchange(result, failure)[0])


def gathered(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in the order of the processes; every process must call it. Raises as `together`."""
    if count() == 1:
        return list(items)
    return [item for some in _exchange(list(items), None) for item in some]


def first_on_each_machine(work: Callable[[], Result]) -> Result:
    """What the work gives in this process, done by one process of each machine before the others, which then find
    what it has downloaded. Raises as `together`."""
    if count() == 1:
        return work()
    from accelerate import PartialState

    mine = PartialState().is_local_main_process
    kept: list[Result] = []
    together(lambda: kept.append(work()) if mine else None)
    together(lambda: None if mine else kept.append(work()))
    return kept[0]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's contiguous part of the items; each item belongs to exactly one process."""
    return items[len(items) * index() // count() : len(items) * (index() + 1) // count()]


def _tried(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        if getattr(error, "known_to_all", False):
            raise
        return None, error


def _exchange(told: Any, failure: Exception | None) -> list[Any]:
    """What each process tells. Raises: in all of them the first failure of any.

    Everything that processes tell each other goes through here and may be a failure, so one that fails between two
    exchanges ends the others at their next one, whatever that is for.
    """
    from accelerate.utils import gather_object

    try:
        outcomes = gather_object([(told, _message(failure))])
    except RuntimeError as error:
        raise known(LostError(f"another process of this run has ended: {_first_line(error)}")) from None
    first = next((message for _, message in outcomes if message is not None), None)
    if first is None:
        return [value for value, _ in outcomes]
    if failure is not None and not isinstance(failure, (DatavecError, OSError)):
        raise known(failure)  # a mistake of ours: its traceback is here
    raise known(first)


def _message(failure: Exception | None) -> Exception | None:
    """What the others are told of a failure."""
    if failure is None or isinstance(failure, (DatavecError, OSError)):
        return failure
    return RunError(f"process {index()} of {count()} failed: {_first_line(failure)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def known(error: Exception) -> Exception:
    """The error, marked as one that every process has."""
    error.known_to_all = True  # type: ignore[attr-defined]
    return error


def tells(error: BaseException) -> bool:
    """Whether this process tells of an error: the main one, or the only one that knows of it."""
    return is_main() or not getattr(error, "known_to_all", False)
