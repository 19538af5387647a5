"""One repository: content by its digest on disk, immutable commits, and refs that move in one step."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from .refusals import Refusal

# What the Hub puts into a new repository, shortened to the formats a model repository meets in practice.
LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt gz h5 msgpack npy npz onnx ot parquet pickle pkl pt pth safetensors tar tgz zip zst"
)
INITIAL_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())


def timestamp() -> str:
    """Now, as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_blob_id(content: bytes) -> str:
    """The id git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit; `blob_id` is that of the LFS pointer when the content is in LFS."""

    path: str
    size: int
    sha256: str
    blob_id: str
    pointer_size: int | None = None

    @classmethod
    def in_lfs(cls, path: str, sha256: str, size: int) -> Self:
        """An entry for which git would hold a pointer only."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(path, size, sha256, git_blob_id(pointer), len(pointer))

    @property
    def etag(self) -> str:
        """The identity that clients compare and cache by."""
        return self.blob_id if self.pointer_size is None else self.sha256

    def described(self, digest: str) -> dict[str, Any]:
        """The size of the file and, in LFS, its sha256 under the name that an endpoint calls it by."""
        lfs = {digest: self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return {"size": self.size, **({"lfs": lfs} if self.pointer_size else {})}


Files = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Commit:
    """A state of the whole repository; its id is the digest of everything else, so it cannot change."""

    id: str
    parent: str | None
    author: str
    title: str
    message: str
    date: str
    files: Files


@dataclass(slots=True)
class Repository:
    """A model or dataset; `refs` leads from full names (refs/heads/main, refs/tags/v1, refs/pr/1) to commit ids."""

    folder: Path
    kind: str
    id: str
    creator: str
    private: bool
    created: str = field(default_factory=timestamp)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        entry = self.add_blob(".gitattributes", INITIAL_ATTRIBUTES.encode())
        self.refs["refs/heads/main"] = self.record({entry.path: entry}, None, self.creator, "initial commit").id

    @property
    def namespace(self) -> str:
        """The user or organisation that owns the repository."""
        return self.id.split("/")[0]

    def blob(self, sha256: str) -> Path:
        """Where content of that digest lies once it has arrived."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Refusal(400, f"Not a sha256: {sha256!r}")
        return self.folder / sha256

    def text(self, commit: Commit, path: str) -> str:
        """A text file of a commit, empty when there is none."""
        return self.blob(commit.files[path].sha256).read_text(errors="replace") if path in commit.files else ""

    def add_blob(self, path: str, content: bytes) -> Entry:
        """A regular entry whose content is now stored."""
        entry = Entry(path, len(content), hashlib.sha256(content).hexdigest(), git_blob_id(content))
        self.blob(entry.sha256).write_bytes(content)
        return entry

    def record(self, files: Files, parent: str | None, author: str, title: str, message: str = "") -> Commit:
        """A new commit, stored but on no branch yet."""
        content = (parent, author, title, message, timestamp(), {path: files[path] for path in sorted(files)})
        id = hashlib.sha1(repr(content).encode(), usedforsecurity=False).hexdigest()
        return self.commits.setdefault(id, Commit(id, *content))

    def ref_of(self, revision: str) -> str | None:
        """The full ref name a revision means, None when it is a commit id or unknown."""
        # A branch hides a tag of the same name, as on the Hub.
        candidates = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((ref for ref in candidates if ref in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref or commit id (seven digits are enough) stands for."""
        revision = self.refs.get(self.ref_of(revision) or "", revision)
        known = [id for id in self.commits if len(revision) >= 7 and id.startswith(revision)]
        if len(known) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[known[0]]
