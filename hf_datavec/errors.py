"""What can go wrong because of the user's input, and how it is said."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DatavecError(Exception):
    """A failure with one clear message; it leaves the command line with `exit_code` and no traceback."""

    exit_code = 1

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(problem)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes; pickle would call `__init__`, whose parameters differ from class to class.
        return _again, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        return f"{self.problem}\n  hint: {self.hint}" if self.hint else self.problem


def _again(kind: type[DatavecError], arguments: tuple[Any, ...], state: dict[str, Any]) -> DatavecError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class RunError(DatavecError):
    """The run failed although the input was right (a full disk, a server that went away): exit code 1."""


class InputError(DatavecError):
    """Something the user gave is wrong: a recipe, a vector, a reference, an option. Exit code 2."""

    exit_code = 2


class InputErrors(InputError):  # noqa: N818 - the plural says what it is
    """Several wrong things, found in one pass and told together."""

    def __init__(self, errors: Iterable[InputError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


def raise_all(errors: Iterable[InputError]) -> None:
    """Raise nothing for no error, the error itself for one, all of them together for several."""
    found = tuple(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise InputErrors(found)


def did_you_mean(word: str, known: Iterable[str], *, listing: bool = True) -> str | None:
    """The hint that names the nearest known word; else, with `listing`, all of them when they are few."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    # Beyond a dozen a list stops helping and hides the message itself.
    return f"known: {', '.join(words)}" if listing and 0 < len(words) <= 12 else None


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(f"'{name}'" for name in ordered[:most])
    return shown if len(ordered) <= most else f"{shown} and {len(ordered) - most} more"
