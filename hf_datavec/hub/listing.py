"""The vector repos of an organisation, or of a local folder that holds some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_datavec.errors import InputError
from hf_datavec.hub.client import client, told
from hf_datavec.hub.references import Reference

# The tag that a vector's card carries; it is what makes a repo show up here.
TAG = "task-vector"


@dataclass(frozen=True, slots=True)
class Listed:
    """One vector repo: where it lies, pinned, and when it last changed (ISO 8601, empty for a folder)."""

    reference: Reference
    changed: str


def vectors_of(owner: str) -> list[Listed]:
    """The vector repos of an org by name, or the vector folders in a local folder.

    Raises: InputError when there is no such org or folder, or it shows no vector.
    """
    folder = Path(owner).expanduser()
    if owner.startswith(("./", "../", "/", "~")) or folder.is_dir():
        return _in_folder(owner, folder)
    if "/" in owner:
        raise InputError(f"'{owner}' is no organisation", hint="give its name alone, or a folder as ./folder")
    api = client()
    with told(f"'{owner}'"):
        found = list(api.list_models(author=owner, filter=TAG, full=True))
    if not found:
        raise InputError(
            f"the Hub shows no task vectors of '{owner}'",
            hint="check the name, and that you are logged in as one of its members (`hf auth login`)",
        )
    return [
        Listed(Reference(f"{one.id}@{one.sha}", repo=one.id, revision=one.sha), _date(one.last_modified))
        for one in sorted(found, key=lambda one: str(one.id))
    ]


def _date(moment: object) -> str:
    return moment.isoformat() if hasattr(moment, "isoformat") else str(moment or "")


def _in_folder(owner: str, folder: Path) -> list[Listed]:
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}'")
    found = sorted(path.parent for path in folder.glob("*/datavec.json"))
    if not found:
        raise InputError(f"the folder '{owner}' holds no vector folders", hint="give the folder above them")
    return [Listed(Reference(str(path), path=path.absolute()), "") for path in found]
