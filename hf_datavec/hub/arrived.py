"""Whether files arrived as the Hub has them; the client itself compares sizes only."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_datavec.errors import RunError, listed
from hf_datavec.hub.client import AGAIN
from hf_datavec.hub.references import Reference
from hf_datavec.progress import progress


def not_cached(reference: Reference, commit: str, files: Mapping[str, Any], repo_type: str = "model") -> dict[str, Any]:
    """The files that a download will have to send.

    A file that was altered on its way, or whose check was never reached, would be found in the cache by every later
    run; it is taken out and counts as missing.
    """
    from huggingface_hub import try_to_load_from_cache

    missing = {}
    for name, file in files.items():
        found = try_to_load_from_cache(str(reference.repo), name, revision=commit, repo_type=repo_type)
        if not isinstance(found, str):
            missing[name] = file
        elif not _as_sent(Path(found), file):
            _forget(Path(found))
            missing[name] = file
    return missing


def refuse_altered(folder: Path, reference: Reference, files: Mapping[str, Any]) -> None:
    """Remove downloaded files that differ from the hashes that the Hub tells. Raises: RunError that names them."""
    shown = progress(sorted(files.items()), text="check", total=len(files), unit="file")
    altered = [name for name, file in shown if not _as_sent(folder / name, file)]
    for name in altered:
        _forget(folder / name)
    if altered:
        problem = f"files of the Hub repo {reference.shown} were altered on the way: {listed(altered)}"
        raise RunError(problem, hint=AGAIN)


def _as_sent(path: Path, file: Any) -> bool:
    expected = file.lfs["sha256"] if file.lfs else file.blob_id
    return expected is None or _digest(path.resolve(), path.stat().st_mtime_ns, bool(file.lfs)) == expected


@functools.cache  # a merge looks at each input twice, for its plan and for itself
def _digest(path: Path, _changed: int, in_lfs: bool) -> str:
    """The sha256 of a file in LFS, else the name git gives to it; what is not in LFS is small."""
    if in_lfs:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _forget(path: Path) -> None:
    """Remove a file of the cache with everything its link leads over."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
