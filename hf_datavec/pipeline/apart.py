"""Sums written part by part, by copies of this process; what is read for them is hashed on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from hf_datavec import forked, fuse, processes, sums, writing
from hf_datavec.geometry import Gram
from hf_datavec.pipeline.ledger import Finished, Part, verified
from hf_datavec.plan import Plan
from hf_datavec.survey import Survey
from hf_datavec.vector import TaskVector

if TYPE_CHECKING:
    from numpy.typing import NDArray


def suits(plan: Plan, device: str) -> bool:
    """Whether a plan's parts can be made this way: nothing but sums, in one process that can be copied."""
    return processes.count() == 1 and sums.suffice(plan, device) and forked.possible()


@dataclass(frozen=True, slots=True)
class Making:
    """Makes one part after the other, reading every byte of the vectors once; what is not `cached` goes past the page
    cache."""

    plan: Plan
    survey: Survey
    cached: bool

    def __call__(self, part: Part) -> Finished:
        """Write a part. Raises: as `fuse.pieces` and `writing.write_into`."""
        hashing, gram = _Hashing(self.plan), Gram()
        names = {record.name for record in part.records}
        stream = fuse.sums_in_a_row(self.plan, names, self.survey, gram, hashing.see)
        pairs = writing.write_into(part.file, part.records, stream, cached=self.cached)
        return Finished(tuple(one for _, one in pairs), gram.taken(), hashing.found(part), self.survey.digest)


def kept(plan: Plan, survey: Survey, part: Part, claimed: Finished) -> Finished | None:
    """A part as an earlier run has entered it, if its bytes are in its file and the vectors are what they were."""
    if not verified(part, claimed):
        return None
    found = _Hashing(plan).found(part)
    same = claimed.vectors == found and claimed.survey == survey.digest
    return replace(claimed, vectors=found, survey=survey.digest) if claimed.trusted or same else None


def hashes(parts: Sequence[Finished]) -> list[Mapping[str, str]]:
    """Of each vector the hashes of its tensors in all parts."""
    of_parts = (part.vectors or () for part in parts)
    return [{name: one for found in of_one for name, one in found.items()} for of_one in zip(*of_parts, strict=True)]


class _Hashing:
    """Hashes the vectors' tensors as they go by, slice after slice."""

    def __init__(self, plan: Plan) -> None:
        sources = [one.source for one in plan.contributions]
        self._vectors = {place: one for place, one in enumerate(sources) if isinstance(one, TaskVector)}
        self._going: dict[tuple[int, str], tuple[Any, int]] = {}

    def see(self, name: str, rows: Sequence[NDArray[Any]]) -> None:
        """Hash the next values (d,) of a tensor from each site."""
        import numpy as np

        for place in self._vectors:
            # Reads memory several times as fast as hashing does, which then finds all near the core.
            np.dot(rows[place], rows[place])
        for place in self._vectors:
            hashed, seen = self._going.get((place, name)) or (blake3(), 0)
            hashed.update(rows[place].view("u1").data)
            self._going[place, name] = hashed, seen + rows[place].nbytes

    def found(self, part: Part) -> tuple[dict[str, str], ...]:
        """Of each vector the hashes of what it has of a part; what did not go by to its end is read for it."""
        return tuple(dict(self._of(place, vector, part)) for place, vector in self._vectors.items())

    def _of(self, place: int, vector: TaskVector, part: Part) -> Iterator[tuple[str, str]]:
        for name in (record.name for record in part.records if record.name in vector.tensors.records):
            hashed, seen = self._going.get((place, name)) or (None, 0)
            whole = seen == vector.tensors.records[name].nbytes
            yield name, hashed.hexdigest() if hashed and whole else vector.tensors.hash_of(name)
