"""References to models, vectors and images, and the only door to the Hugging Face Hub.

A reference is an existing folder, anything that starts with `./ ../ ~ /`, or a Hub repo as `owner/name`,
`owner/name@revision` or `hf://owner/name@revision`. A local folder has exactly the layout of a repo.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_datavec.errors import InputError, RunError
from hf_datavec.staging import staged

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What a model or vector repo may give us: no pickle, no code.
READABLE = ("*.safetensors", "*.json", "*.yaml", "*.yml", "*.md")
# What we send: the above, plots and the licence.
SENDABLE = (*READABLE, "*.png", "*.txt", "LICENSE*")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RepoType = Literal["model", "dataset"]


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


@dataclass(frozen=True, slots=True)
class Fetched:
    """A folder on this machine and, for a Hub repo, the commit it holds."""

    reference: Reference
    folder: Path
    commit: str | None = None


def parse(text: str, *, relative_to: Path | None = None, revision: str | None = None) -> Reference:
    """The reference that a text stands for; local paths are relative to `relative_to` or the working folder.

    Raises: InputError when it is neither a folder nor a repo name.
    """
    here = relative_to or Path.cwd()
    looks_local = text.startswith(("./", "../", "~", "/")) or text in (".", "..")
    path = Path(os.path.normpath(here / Path(text).expanduser()))
    if looks_local or path.exists():
        if revision:
            raise InputError(f"'{text}' is a local folder and has no revision '{revision}'")
        return Reference(text, path=path)
    repo, _, pinned = text.removeprefix("hf://").partition("@")
    if not _REPO.fullmatch(repo):
        raise InputError(
            f"'{text}' is neither an existing folder nor a Hub repo such as 'owner/name' or 'owner/name@revision'",
            hint="start a local path with ./ or /",
        )
    if revision and pinned and revision != pinned:
        raise InputError(f"'{text}' and 'revision: {revision}' name two revisions; keep one")
    return Reference(text, repo=repo, revision=revision or pinned or None)


def fetch(reference: Reference, *, patterns: tuple[str, ...] = READABLE, repo_type: RepoType = "model") -> Fetched:
    """The folder of a reference; a Hub repo is resolved to a commit once and downloaded by that commit.

    Raises: InputError if there is no such folder, repo or revision, or no access to it.
    """
    if reference.path is not None:
        if not reference.path.exists():
            raise InputError(f"there is no folder '{reference.path}'")
        return Fetched(reference, reference.path)
    from huggingface_hub import HfApi

    _quiet()
    api = HfApi(library_name="hf-datavec")
    with _told(reference):
        commit = _commit(api, reference, repo_type)
        folder = api.snapshot_download(
            str(reference.repo), revision=commit, repo_type=repo_type, allow_patterns=list(patterns)
        )
    return Fetched(reference, Path(folder), commit)


def _commit(api: HfApi, reference: Reference, repo_type: RepoType) -> str:
    from huggingface_hub import constants

    revision = reference.revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if constants.HF_HUB_OFFLINE:  # the cache remembers which commit a branch was last seen at
        folder = api.snapshot_download(
            str(reference.repo), revision=revision, repo_type=repo_type, local_files_only=True
        )
        return Path(folder).name
    return str(api.repo_info(str(reference.repo), revision=revision, repo_type=repo_type).sha)


def push(folder: Path, to: Reference, *, private: bool = True, message: str) -> str:
    """Copy a folder to a local place or upload it to a Hub repo in one commit; returns where it went.

    Raises: InputError if the local place exists, or the Hub refuses the repo.
    """
    if to.path is not None:
        with staged(to.path) as partial:
            for source in sendable(folder):
                target = partial / source.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        return str(to.path)
    from huggingface_hub import HfApi

    _quiet()
    api = HfApi(library_name="hf-datavec")
    with _told(to):
        api.create_repo(str(to.repo), private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=str(to.repo),
            folder_path=folder,
            revision=to.revision,
            allow_patterns=list(SENDABLE),
            commit_message=message,
        )
    return str(commit.commit_url)


def sendable(folder: Path) -> list[Path]:
    """The files of a folder that a push sends, in order; links and hidden files stay behind."""
    from fnmatch import fnmatch

    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.is_symlink()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and any(fnmatch(path.name, pattern) for pattern in SENDABLE)
    ]


def _quiet() -> None:
    # A hospital's tool reports nothing to anybody unless asked to; both names are the client's own.
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        from huggingface_hub import constants

        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        constants.HF_HUB_DISABLE_TELEMETRY = True


@contextlib.contextmanager
def _told(reference: Reference) -> Iterator[None]:
    """Turn what the Hub's client raises into one message that names the repo and the next step."""
    from huggingface_hub import errors

    repo = f"'{reference.repo}'" + (f" at '{reference.revision}'" if reference.revision else "")
    login = "log in with `hf auth login` or set HF_TOKEN, and ask its owner for access"
    try:
        yield
    except errors.RevisionNotFoundError:
        raise InputError(f"the Hub repo '{reference.repo}' has no revision '{reference.revision}'") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"there is no Hub repo {repo}, or you may not see it", hint=login) from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"the Hub repo {repo} is not in the cache and the Hub cannot be reached",
            hint="check HF_HUB_OFFLINE and HF_ENDPOINT, or fetch it once while online",
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise InputError(f"the Hub refused access to {repo} ({status})", hint=login) from None
        raise RunError(f"the Hub answered {status} for {repo}", hint="try again later") from None
    except ConnectionError as error:
        if "xet" in str(error):
            raise RunError(
                f"the server of {repo} has no xet storage",
                hint="set HF_HUB_DISABLE_XET=1 to send large files by LFS",
            ) from None
        raise RunError(f"cannot reach the Hub for {repo}: {type(error).__name__}") from None
