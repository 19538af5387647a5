"""The vectors of an organisation: which there are, which fit together, and a recipe for those."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_datavec import hub
from hf_datavec import manifest as manifests
from hf_datavec.errors import InputError
from hf_datavec.manifest import MANIFEST_FILE, Manifest
from hf_datavec.pipeline import lock
from hf_datavec.staging import refuse_existing


@dataclass(frozen=True)
class Found:
    """One vector: where it lies, when it changed, what its manifest says, and whether it shares the common base."""

    listed: hub.Listed
    manifest: Manifest
    fits: bool


def vectors_of(owner: str) -> list[Found]:
    """The vectors of a Hub org or a local folder; the common base is the one that most of them start from.

    Raises: InputError when there are none, or a manifest is damaged.
    """
    listed = hub.vectors_of(owner)
    manifests_of = [_manifest(one) for one in listed]
    counts = Counter(manifest.base.digest for manifest in manifests_of)
    # Of several bases with as many vectors the first by digest, so that two runs agree.
    common = min(counts, key=lambda digest: (-counts[digest], digest))
    return [
        Found(one, manifest, manifest.base.digest == common) for one, manifest in zip(listed, manifests_of, strict=True)
    ]


def _manifest(listed: hub.Listed) -> Manifest:
    fetched = hub.fetch(listed.reference, patterns=(MANIFEST_FILE,), headers_only=True)  # its folder lives with it
    with hub.naming(fetched):
        return manifests.read(fetched.folder)


def write_recipe(owner: str, output: Path, *, base: str | None = None) -> list[Found]:
    """Write a recipe with every vector that shares the common base, each pinned; returns all that were found.

    Raises: InputError when `output` exists, or the base is a local folder and `base` does not say which.
    """
    refuse_existing(output)
    found = vectors_of(owner)
    fitting = [one for one in found if one.fits]
    recipe: dict[str, Any] = {
        "base": _base(fitting[0].manifest, base, output.absolute().parent),
        "vectors": [_pinned(one.listed.reference, output.absolute().parent) for one in fitting],
        "merge": {"method": "mean"},
        "output": "./fused",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(lock.dump(recipe), "utf-8")
    return found


def _base(manifest: Manifest, given: str | None, folder: Path) -> str:
    if given:
        reference = hub.parse(given)
        return given if reference.path is None else lock.relative(reference.path, folder)
    if manifest.base.commit is None:
        raise InputError(
            f"the vectors start from the local folder '{manifest.base.id}', wherever that is",
            hint="say where with --base",
        )
    return f"{manifest.base.id}@{manifest.base.commit}"


def _pinned(reference: hub.Reference, folder: Path) -> str:
    return reference.text if reference.path is None else lock.relative(reference.path, folder)
