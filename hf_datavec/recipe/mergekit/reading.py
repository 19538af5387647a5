"""A configuration that is being read: the recipe so far, whence each part came, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_datavec.errors import did_you_mean
from hf_datavec.located import Document, KeyPath, LocatedError, Span


@dataclass(slots=True)
class Reading:
    """The recipe made so far, with the configuration's places for its parts."""

    document: Document
    problems: list[LocatedError]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Span] = field(default_factory=dict)
    values: dict[KeyPath, Span] = field(default_factory=dict)

    def at(self, path: KeyPath) -> Any:
        """The configuration's value at a path, or None."""
        value = self.document.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def refuse(
        self,
        path: KeyPath,
        message: str,
        *,
        at: Literal["key", "value"] = "value",
        about: KeyPath | None = None,
        hint: str | None = None,
    ) -> None:
        """Note a problem of the configuration at a place; a key is a fault of the mapping that holds it."""
        if about is None and at == "key":
            about = path[:-1]
        self.problems.append(self.document.problem(path, message, at=at, about=about, hint=hint))

    def refuse_unknown(self, path: KeyPath, known: Iterable[str], otherwise: str | None = None) -> None:
        """Note every key of a mapping that is not known."""
        for key in self.at(path) or ():
            if key not in known:
                hint = did_you_mean(key, known) or otherwise
                self.refuse((*path, key), f"unknown key '{key}'", at="key", hint=hint)

    def put(self, path: tuple[str, ...], value: Any, source: KeyPath) -> None:
        """Set a value of the recipe that stands where the configuration has it."""
        section = self.data
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = value
        self.mark(path, source)

    def mark(self, path: KeyPath, source: KeyPath) -> None:
        """Let messages about a place in the recipe show a place in the configuration."""
        for known, spans in ((self.document.keys, self.keys), (self.document.values, self.values)):
            if source in known:
                spans[path] = known[source]
