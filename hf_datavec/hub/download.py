"""From a reference to a folder on this machine: whole, or with the headers of its large files only."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from hf_datavec.errors import InputError, InputErrors, listed
from hf_datavec.headers import write_hollow
from hf_datavec.hub.arrived import not_cached, refuse_altered
from hf_datavec.hub.client import client, told
from hf_datavec.hub.references import Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What a model or vector repo may give us: no pickle, no code.
READABLE = ("*.safetensors", "*.json", "*.yaml", "*.yml", "*.md")
# A configuration or manifest is text of some kilobytes; anything larger is not what it says.
LARGEST_TEXT = 50_000_000

RepoType = Literal["model", "dataset"]


class _Scratch:
    """A temporary folder that is removed with the object, or at the end of the program."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hf-datavec-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A folder on this machine and, for a Hub repo, the commit it holds and the hashes that the Hub tells.

    A hollow folder has the right headers but no tensor values; it goes when nobody holds its `scratch` any more.
    """

    reference: Reference
    folder: Path
    commit: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    scratch: _Scratch | None = None
    download_bytes: int = 0

    @property
    def hollow(self) -> bool:
        """Whether only headers and small files are here."""
        return self.scratch is not None


def fetch(
    reference: Reference,
    *,
    patterns: tuple[str, ...] = READABLE,
    repo_type: RepoType = "model",
    headers_only: bool = False,
) -> Fetched:
    """The folder of a reference; a Hub repo is resolved to a commit once and downloaded by that commit.

    With `headers_only` a Hub repo that is not in the cache yet gives a hollow folder: small files, and headers by
    range requests.

    Raises: InputError if there is no such folder, repo or revision, or no access to it; RunError if the Hub fails.
    """
    if reference.path is not None:
        if not reference.path.exists():
            raise InputError(f"there is no folder '{reference.path}'")
        return Fetched(reference, reference.path)
    from huggingface_hub import constants

    api = client()
    with told(reference.shown):
        if constants.HF_HUB_OFFLINE:
            return _from_cache(api, reference, repo_type, patterns)
        info = api.repo_info(
            str(reference.repo), revision=reference.revision or "main", repo_type=repo_type, files_metadata=True
        )
        files = _allowed(reference, getattr(info, "siblings", None) or [], patterns)
        missing = not_cached(reference, str(info.sha), files, repo_type)
        if headers_only and missing:
            return _hollow(api, reference, str(info.sha), files, sum(file.size or 0 for file in missing.values()))
        folder = api.snapshot_download(
            str(reference.repo), revision=info.sha, repo_type=repo_type, allow_patterns=list(files) or ["-"]
        )
        refuse_altered(Path(folder), reference, missing)
    return Fetched(reference, Path(folder), str(info.sha), _hashes(files))


def _from_cache(api: HfApi, reference: Reference, repo_type: RepoType, patterns: tuple[str, ...]) -> Fetched:
    """What the cache holds of a commit, or of a branch as it was last seen; for work without the network."""
    folder = api.snapshot_download(
        str(reference.repo),
        revision=reference.revision or "main",
        repo_type=repo_type,
        local_files_only=True,
        allow_patterns=list(patterns),
    )
    return Fetched(reference, Path(str(folder)), Path(str(folder)).name)


def _allowed(reference: Reference, siblings: list[Any], patterns: tuple[str, ...]) -> dict[str, Any]:
    """The files of a repo that may be fetched, by name. Raises: InputError for names that lead elsewhere."""
    files = {str(one.rfilename): one for one in siblings}
    strange = [name for name in files if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name]
    if strange:
        raise InputError(
            f"the Hub repo {reference.shown} has files whose names lead out of their folder: {listed(strange)}",
            hint="nothing was fetched; ask its owner where they come from",
        )
    return {name: one for name, one in files.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def _hashes(files: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(one.lfs["sha256"]) for name, one in sorted(files.items()) if one.lfs}


def _hollow(api: HfApi, reference: Reference, commit: str, files: Mapping[str, Any], missing_bytes: int) -> Fetched:
    """A folder in the system's temporary place with the small files and hollow safetensors of a repo."""
    scratch = _Scratch()
    folder = scratch.path
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            _write_hollow(api, reference, commit, file, target)
        elif (file.size or 0) > LARGEST_TEXT:
            raise InputError(
                f"'{name}' of the Hub repo {reference.shown} has {file.size:,} bytes, expected a small file"
            )
        elif not name.endswith(".md"):
            # Not into the shared cache: a snapshot that lacks its large files would later pass for a whole one.
            api.hf_hub_download(str(reference.repo), name, revision=commit, local_dir=folder)
            refuse_altered(folder, reference, {name: file})
    return Fetched(reference, folder, commit, _hashes(files), scratch, missing_bytes)


def _write_hollow(api: HfApi, reference: Reference, commit: str, file: Any, target: Path) -> None:
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = api.parse_safetensors_file_metadata(str(reference.repo), file.rfilename, revision=commit)
    except SafetensorsParsingError as error:
        reason = str(error).split(" (")[0].split("\n")[0]
        raise InputError(
            f"'{file.rfilename}' of the Hub repo {reference.shown} is not a safetensors file: {reason}"
        ) from None
    write_hollow(target, {name: (one.dtype, one.shape, one.data_offsets) for name, one in header.tensors.items()})


@contextlib.contextmanager
def naming(*fetched: Fetched) -> Iterator[None]:
    """Let errors from inside the block name Hub repos, not the cache or scratch folders that hold them."""
    try:
        yield
    except InputErrors as errors:
        raise InputErrors(_renamed(error, fetched) for error in errors.errors) from None
    except InputError as error:
        raise _renamed(error, fetched) from None


def _renamed(error: InputError, fetched: tuple[Fetched, ...]) -> InputError:
    problem = error.problem
    for one in fetched:
        if one.reference.repo:
            problem = problem.replace(str(one.folder), one.reference.repo)
    return error if problem == error.problem else InputError(problem, hint=error.hint)
