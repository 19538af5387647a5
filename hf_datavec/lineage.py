"""Rounds of merging: which fused models a network comes from, one entry for each merge behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from hf_datavec.errors import InputError

LINEAGE_FILE = "lineage.json"


class Round(BaseModel):
    """One merge: the base it started from, how many sites it fused and how. No site is named; the lock does that."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: str
    digest: str
    sites: Annotated[int, Field(ge=1)]
    method: str
    scale: float
    restoration: str


ROUNDS = TypeAdapter(tuple[Round, ...])


def read(folder: Path) -> tuple[Round, ...]:
    """The rounds behind the network in a folder, the first one first; none for a network that nobody fused.

    Raises: InputError when the file is there and damaged.
    """
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return ()
    try:
        return ROUNDS.validate_json(path.read_text("utf-8"), strict=False)
    except ValueError:
        raise InputError(f"'{path}' is damaged", hint="copy the fused model again") from None


def write(folder: Path, rounds: Sequence[Round]) -> None:
    """Write the rounds beside a fused network."""
    text = json.dumps([one.model_dump() for one in rounds], indent=2)
    (folder / LINEAGE_FILE).write_text(text + "\n", "utf-8")


def told(rounds: Sequence[Round]) -> str:
    """The rounds as a Markdown list, empty for a single one: every model is fused once."""
    if len(rounds) < 2:
        return ""
    lines = [
        f"{number}. `{one.method}`, scale {one.scale:g}, {one.sites} sites, on `{one.base}` (`{one.digest[:19]}`)"
        for number, one in enumerate(rounds, start=1)
    ]
    return "\n".join([f"This is round {len(rounds)}: the base was fused before.", "", *lines, ""])
