"""What a merge has written so far, so that one that was interrupted need not begin anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from hf_datavec import processes, sums
from hf_datavec.errors import InputError
from hf_datavec.pipeline.verification import Verification
from hf_datavec.plan import Plan
from hf_datavec.tensors import MODEL_FILE, Record, hash_of
from hf_datavec.vector import tool_versions

# A part is written and entered as a whole. A sixteenth keeps some processes busy alike; above 256 MB an interruption
# would lose minutes. Neither depends on the number of processes, so neither does any byte.
PARTS = 16
LARGEST_PART = 2**28
# Below this a merge takes seconds, and a hidden folder is a nuisance, not a saving.
WORTH_KEEPING = 2**30

KEY_FILE = ".merge-key"
# Stands beside it once all vectors of the merge have been verified: parts that were made before may be of a wrong one.
TRUSTED_FILE = ".merge-verified"


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring tensors of one file, in the order of their bytes."""

    number: int
    file: Path
    records: tuple[Record, ...]

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records)


@dataclass(frozen=True, slots=True)
class Finished:
    """The hashes of a part's tensors, and the inner products of the vectors that it was made from."""

    hashes: tuple[str, ...]
    products: list[list[float]] | None
    # Of each task vector the hashes of what it has of the part's tensors, by name, and the digest of what was measured
    # of whole vectors before; None where nobody took them.
    vectors: tuple[dict[str, str], ...] | None = None
    survey: str | None = None
    # Whether all vectors were verified in the run that made it.
    trusted: bool = False


def parts_of(files: Mapping[Path, Sequence[Record]]) -> list[Part]:
    """The parts in which files are written."""
    total = sum(record.nbytes for records in files.values() for record in records)
    most = max(1, min(LARGEST_PART, total // PARTS))
    parts: list[Part] = []
    for file, records in files.items():
        held: list[Record] = []
        for record in records:
            if held and sum(one.nbytes for one in held) + record.nbytes > most:
                parts.append(Part(len(parts), file, tuple(held)))
                held = []
            held.append(record)
        parts.append(Part(len(parts), file, tuple(held)))
    return parts


def key_of(plan: Plan, device: str) -> str:
    """The digest of all that decides the bytes of a merge: what its lock pins of the weights, and the device."""
    decisive: dict[str, Any] = {
        "base": plan.base_digest,
        "vectors": [(one.digest, one.weight, one.labels) for one in plan.contributions],
        "merge": plan.recipe.merge.model_dump(mode="json"),
        "labels": plan.labels,
        "steps": [
            (*_bytes_of(step.record), step.method.name, repr(dict(step.options)), step.scale) for step in plan.steps
        ],
        "coefficients": dict(plan.coefficients),
        "tools": tool_versions(),
        "device": device,
        "by_torch": not sums.suffice(plan, device),
    }
    text = json.dumps(decisive, sort_keys=True, default=str)
    return f"blake3:{blake3(text.encode()).hexdigest()}"


def _bytes_of(record: Record) -> tuple[str, str, str]:
    return record.name, record.dtype, record.file.name


@dataclass(frozen=True, slots=True)
class Ledger:
    """The finished parts of the merge with a key; every process enters its own in a file of its own."""

    folder: Path
    key: str
    vectors: Verification

    def begin(self, kept: Mapping[int, Finished]) -> None:
        """Forget what earlier runs have entered but for the parts that are gone on with.

        What they said of their vectors holds for no part that this run makes.
        """
        forget(self.folder)
        (self.folder / KEY_FILE).write_text(self.key, "utf-8")
        for number, finished in kept.items():
            self._note(number, finished)

    def claimed(self) -> dict[int, Finished]:
        """What earlier runs of this very merge have entered, by the number of the part; to be verified."""
        if not self._says(KEY_FILE):
            return {}
        trusted = self._says(TRUSTED_FILE)
        found = {}
        for entry in _entries(self.folder):
            vectors = entry.get("vectors")
            found[entry["part"]] = Finished(
                tuple(entry["hashes"]), entry["products"], None if vectors is None else tuple(vectors),
                entry.get("survey"), trusted or entry.get("trusted", False),
            )  # fmt: skip
        return found

    def _says(self, note: str) -> bool:
        return (self.folder / note).is_file() and (self.folder / note).read_text("utf-8") == self.key

    def enter(self, part: Part, finished: Finished) -> None:
        """Remember a part whose bytes are in its file."""
        self._note(part.number, finished)
        if processes.is_main() and self.vectors.passed:
            self.trust()

    def _note(self, number: int, finished: Finished) -> None:
        entry = {"part": number, **asdict(finished)}
        with open(self.folder / f".finished-{processes.index()}.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")

    def trust(self) -> None:
        """Remember that all vectors are what their manifests say, and so are all parts."""
        place = self.folder / TRUSTED_FILE
        if not place.is_file():
            place.write_text(self.key, "utf-8")


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    for path in _books(folder):
        for line in path.read_text("utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the line that was being written when the run died
                continue


def _books(folder: Path) -> list[Path]:
    return sorted(folder.glob(".finished-*.jsonl"))


def _usable(folder: Path) -> bool:
    """Whether parts were entered of vectors that were verified, or of which it is known what they were."""
    noted = (folder / TRUSTED_FILE).is_file()
    return any(noted or entry.get("trusted") or entry.get("vectors") is not None for entry in _entries(folder))


def verified(part: Part, finished: Finished) -> bool:
    """Whether a part's bytes are those that were entered."""
    if not part.file.is_file() or len(part.records) != len(finished.hashes):
        return False
    end = max((record.start + record.nbytes for record in part.records), default=0)
    if part.file.stat().st_size < end:
        return False
    return all(hash_of(record) == one for record, one in zip(part.records, finished.hashes, strict=True))


def forget(folder: Path) -> None:
    """Remove all that was entered."""
    for path in (*_books(folder), folder / KEY_FILE, folder / TRUSTED_FILE):
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Leave in a staging folder only what a next run may go on with: weights and what was entered of them."""
    usable = (folder / KEY_FILE).is_file() and _usable(folder)
    for path in sorted(folder.iterdir()):
        entered = path.suffix == ".safetensors" or path.name in (KEY_FILE, TRUSTED_FILE) or path in _books(folder)
        if not (usable and entered):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def worth_keeping(folder: Path, error: BaseException) -> bool:
    """Whether a next run can go on with what a failed one leaves: large results, unless the input was wrong."""
    if isinstance(error, InputError) or not _usable(folder):
        return False
    files = list(folder.glob("*.safetensors"))
    return [path.name for path in files] != [MODEL_FILE] or files[0].stat().st_size >= WORTH_KEEPING
