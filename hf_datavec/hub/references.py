"""The one grammar of references to models, vectors and images."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hf_datavec.errors import InputError

# The Hub allows 96 characters for owner and for name.
LONGEST_NAME = 96
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where something lies: a local path, or a Hub repo with an optional revision."""

    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The last part: the folder's or the repo's own name."""
        return self.path.name if self.path else str(self.repo).rpartition("/")[2]

    @property
    def identity(self) -> str:
        """The repo, or the folder's own name: what may be published, since it holds no local path."""
        return self.repo or self.name

    @property
    def shown(self) -> str:
        """The folder, or the repo and its revision, as messages name them."""
        return f"'{self.path or self.repo}'" + (f" at '{self.revision}'" if self.revision else "")


def parse(text: str, *, relative_to: Path | None = None, revision: str | None = None) -> Reference:
    """The reference that a text stands for; local paths are relative to `relative_to` or the working folder.

    An existing folder, and anything that starts with `./ ../ ~ /`, is local; `owner/name`,
    `owner/name@revision` and `hf://owner/name@revision` are the Hub.

    Raises: InputError when it is neither a folder nor a repo name.
    """
    here = relative_to or Path.cwd()
    looks_local = text.startswith(("./", "../", "~", "/")) or text in (".", "..")
    try:
        path = Path(os.path.normpath(here / Path(text).expanduser()))
        exists = path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a name of thousands of letters, a NUL
        raise InputError(f"'{text[:60]}' is no usable path: {error}", hint="check the reference") from None
    if not text:
        raise InputError("a reference is empty", hint="expected a folder or owner/name")
    if looks_local or (exists and not text.startswith("hf://")):
        if revision:
            raise InputError(f"'{text}' is a local folder and has no revision '{revision}'")
        return Reference(text, path=path)
    repo, _, pinned = text.removeprefix("hf://").partition("@")
    if not _REPO.fullmatch(repo) or max(map(len, repo.split("/"))) > LONGEST_NAME:
        raise InputError(
            f"'{text[:99]}' is neither an existing folder nor a Hub repo such as 'owner/name' or 'owner/name@revision'",
            hint="start a local path with ./ or /",
        )
    if revision and pinned and revision != pinned:
        raise InputError(f"'{text}' and 'revision: {revision}' name two revisions; keep one")
    return Reference(text, repo=repo, revision=revision or pinned or None)
