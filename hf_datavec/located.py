"""YAML 1.2 as plain data that remembers where each key and value stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_datavec.errors import InputError

# A recipe is a page of text; these bounds only stop files that were built to exhaust memory.
LARGEST_FILE = 1_000_000
MOST_NODES = 100_000
# What is shown of a line in a message.
LONGEST_LINE = 160

# The only tags of mappings and sequences that carry no request to build something else.
PLAIN = {"mapping": "map", "sequence": "seq"}

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one line; line and column count from zero."""

    line: int
    column: int
    width: int


class LocatedError(InputError):
    """An error in a file, with its place for sorting."""

    def __init__(self, problem: str, *, hint: str | None, span: Span) -> None:
        super().__init__(problem, hint=hint)
        self.place = (span.line, span.column)


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a YAML file, the spans of its keys and values by their path, and its duplicate keys."""

    name: str
    lines: tuple[str, ...]
    data: Any
    keys: Mapping[KeyPath, Span]
    values: Mapping[KeyPath, Span]
    problems: tuple[LocatedError, ...] = ()

    def problem(
        self,
        path: KeyPath,
        message: str,
        *,
        at: Literal["key", "value"] = "value",
        about: KeyPath | None = None,
        hint: str | None = None,
    ) -> LocatedError:
        """An error whose text shows the line that holds `path`, or the nearest part of it that exists.

        `about` is what the message names when it is not `path` itself: a wrong key is a fault of its mapping.
        """
        span = self._span(path, at)
        text, column = _window(self.lines[span.line] if span.line < len(self.lines) else "", span.column)
        number = str(span.line + 1)
        where = dotted(path if about is None else about)
        head = f"{self.name}:{number}:{span.column + 1}: {where + ': ' if where else ''}{message}"
        gutter = " " * len(number)
        width = max(1, min(span.width, max(1, len(text) - column)))
        # Tabs stay tabs, so that the caret stands below its word whatever their width.
        indent = "".join("\t" if letter == "\t" else " " for letter in text[:column].ljust(column))
        shown = f"{head}\n  {number} | {text}\n  {gutter} | {indent}{'^' * width}"
        return LocatedError(shown, hint=hint, span=span)

    def _span(self, path: KeyPath, at: Literal["key", "value"]) -> Span:
        first, second = (self.keys, self.values) if at == "key" else (self.values, self.keys)
        while path:
            if path in first:
                return first[path]
            if path in second:
                return second[path]
            path = path[:-1]
            first, second = self.keys, self.values  # the place of the parent is its key
        return self.values.get((), Span(0, 0, 1))


def _window(line: str, column: int) -> tuple[str, int]:
    """The part of a long line around a column, and where the column is in it."""
    if len(line) <= LONGEST_LINE:
        return line, column
    start = max(0, column - LONGEST_LINE // 2)
    return line[start : start + LONGEST_LINE], column - start


def dotted(path: KeyPath) -> str:
    """The path as people write it: `merge.options`, `vectors[2].weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def read(path: Path) -> Document:
    """The document in a file.

    Raises: InputError for a file that is missing, not UTF-8 text or not YAML. Duplicate keys and foreign tags
    are kept in `problems`, so that they can be told together with what the schema finds.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file '{path}'") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"'{path}' has {len(content):,} bytes; a recipe has at most {LARGEST_FILE:,}")
    try:
        return parse(content.decode("utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text (byte {error.start})") from None


def parse(text: str, name: str) -> Document:
    """The document in a text; `name` is what its errors call it. Raises as `read` does."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    lines = tuple(text.splitlines())
    loader = YAML(typ="safe", pure=True)
    try:
        root = loader.compose(text)
        reader = _Reader(name, lines, loader)
        data = reader.convert(root, ()) if root is not None else None
    except RecursionError:
        raise InputError(f"{name}: values are nested too deeply, or an alias holds itself") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        span = Span(mark.line, mark.column, 1) if mark else Span(0, 0, 1)
        place = Document(name, lines, None, {}, {(): span})
        raise place.problem((), f"not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:
        raise InputError(f"{name}: not valid YAML: {error}") from None
    return Document(name, lines, data, reader.keys, reader.values, tuple(reader.problems))


@dataclass(slots=True)
class _Reader:
    name: str
    lines: tuple[str, ...]
    loader: Any
    keys: dict[KeyPath, Span] = field(default_factory=dict)
    values: dict[KeyPath, Span] = field(default_factory=dict)
    problems: list[LocatedError] = field(default_factory=list)
    nodes: int = 0

    def convert(self, node: Any, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise InputError(f"{self.name}: more than {MOST_NODES:,} values (aliases that multiply?)")
        self.values[path] = _span(node)
        if node.id != "scalar" and str(node.tag) != f"tag:yaml.org,2002:{PLAIN[node.id]}":
            return self._refuse_tag(node, path)
        if node.id == "mapping":
            return self._mapping(node, path)
        if node.id == "sequence":
            return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if key_node.id == "scalar" else "?"
            here = (*path, key)
            if key in data:
                first = self.keys[here].line + 1
                self.keys[here] = _span(key_node)
                message = f"duplicate key '{key}', first given in line {first}"
                self.problems.append(self._document().problem(here, message, at="key", about=path))
                continue
            self.keys[here] = _span(key_node)
            data[key] = self.convert(value_node, here)
        return data

    def _scalar(self, node: Any, path: KeyPath) -> Any:
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind == "timestamp":  # an unquoted date, say a revision name: text is what was meant
            return str(node.value)
        if kind not in ("str", "int", "float", "bool", "null"):
            return self._refuse_tag(node, path)
        try:
            return self.loader.constructor.construct_object(node)
        except (ValueError, KeyError):  # `!!int abc`, or a number of thousands of digits
            self.problems.append(self._document().problem(path, f"cannot be read as {kind}"))
            return None

    def _refuse_tag(self, node: Any, path: KeyPath) -> None:
        message = f"tag '{node.tag}' is not allowed here; plain values only"
        self.problems.append(self._document().problem(path, message))

    def _document(self) -> Document:
        return Document(self.name, self.lines, None, self.keys, self.values)


def _span(node: Any) -> Span:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Span(start.line, start.column, max(1, width))
