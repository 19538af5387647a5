"""From a folder to a local place or a Hub repo, in one step that happens or does not."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec.errors import InputError, RunError
from hf_datavec.hub.client import client, told
from hf_datavec.hub.references import Reference
from hf_datavec.staging import staged

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What a vector or model folder of ours holds. A closed list of names in the folder itself: whatever else lies
# there, pictures above all, stays at home; so does `training.json`, which counts images.
SENDABLE = (
    "vector.safetensors", "fisher.safetensors", "gram.safetensors", "features.safetensors", "datavec.json",
    "config.json", "preprocessor_config.json", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "README.md", "recipe.yaml", "recipe.lock.yaml", "search.json", "coefficients.json",
    "lineage.json",
    "evaluation.json", "cosines.png", "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip


def push(
    folder: Path,
    to: Reference,
    *,
    private: bool = True,
    message: str,
    create_pr: bool = False,
) -> str:
    """Copy a folder to a local place, or commit it to a Hub repo; returns where it went.

    A missing repo is created. All files go in one commit on the branch as it is now: if it moves meanwhile, or
    the connection breaks, the branch stays as it was, and the same push can be run again.

    Raises: InputError if the local place exists, the repo may not be written, or is public although a private
    one is wanted; RunError if the branch moved or the Hub fails.
    """
    if to.path is not None:
        with staged(to.path) as partial:
            for source in sendable(folder):
                shutil.copyfile(source, partial / source.name)
        return str(to.path)
    api = client()
    with told(to.shown):
        return _commit(api, folder, to, private=private, message=message, create_pr=create_pr)


def _commit(api: HfApi, folder: Path, to: Reference, *, private: bool, message: str, create_pr: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    repo, branch = str(to.repo), to.revision or "main"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
    except KeyError:  # the client takes any 409 for "it exists already", and looks for the address in it
        problem = f"the Hub reports a conflict for {to.shown} and does not say which"
        raise RunError(problem, hint="run it again") from None
    if to.revision:
        api.create_branch(repo, branch=branch, exist_ok=True)
    info = api.repo_info(repo, revision=branch)
    if private and not info.private:
        raise InputError(
            f"the Hub repo '{repo}' is public, but a private one is wanted",
            hint="make it private in its settings, choose another repo, or say --public (in a recipe: private: false)",
        )
    files = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in sendable(folder)]
    # The parent makes a lock of it: a commit that somebody else made in between refuses ours.
    parent = None if create_pr else info.sha
    commit = api.create_commit(
        repo, files, commit_message=message, revision=branch, parent_commit=parent, create_pr=create_pr
    )
    return str(commit.pr_url or commit.commit_url)


def sendable(folder: Path) -> list[Path]:
    """The files of a folder that a push sends, in order; links, sub-folders and unknown names stay behind."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.is_symlink() and any(fnmatch(path.name, pattern) for pattern in SENDABLE)
    ]
