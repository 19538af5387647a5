"""Fused weights on disk: laid out once, written in parts by as many processes as there are."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import forked, fuse, processes, tensors, threads, writing
from hf_datavec import survey as surveys
from hf_datavec.errors import RunError
from hf_datavec.geometry import Gram
from hf_datavec.pipeline import apart
from hf_datavec.pipeline.ledger import Finished, Ledger, Part, key_of, parts_of, verified
from hf_datavec.pipeline.verification import Verification
from hf_datavec.plan import Plan
from hf_datavec.progress import byte_progress
from hf_datavec.staging import flushing
from hf_datavec.survey import Survey
from hf_datavec.tables import size
from hf_datavec.tensors import Record

if TYPE_CHECKING:
    from hf_datavec.writing import Values

log = logging.getLogger(__name__)

# Cards, plots and configurations; more than any of them takes.
BESIDE = 16_000_000
# Below this copies of this process take longer to be made than they save.
WORTH_COPIES = 2**26


def _nothing() -> None:
    """What is done meanwhile where nothing is."""


def write(
    plan: Plan,
    folder: Path,
    device: str,
    gram: Gram,
    *,
    resume: Verification | None = None,
    read_again: bool = True,
    meanwhile: Callable[[], None] = _nothing,
) -> str:
    """Write the fused tensors into the same files as the base has; returns the content digest.

    Every process must call it. `gram` counts the vectors. With `resume`, the vectors' verification, parts that an
    interrupted run of the same merge has finished are looked at and kept, and all vectors are verified when this
    returns. A large result that this run does not `read_again` is written past the page cache. `meanwhile` is called
    when tensors are about to be combined.
    """
    by_file: dict[Path, list[Record]] = {}
    for step in plan.steps:
        by_file.setdefault(folder / step.record.file.name, []).append(step.record)
    ledger = Ledger(folder, key_of(plan, device.split(":")[0]), resume) if resume is not None else None
    cached = read_again or writing.worth_caching(step.record for step in plan.steps)
    files = dict(sorted(by_file.items()))
    written = write_files(plan, files, device, gram, ledger=ledger, cached=cached, meanwhile=meanwhile)
    if ledger is not None:
        ledger.vectors.wait()
        processes.on_main(ledger.trust)
    if [path.name for path in by_file] != [tensors.MODEL_FILE]:
        processes.on_main(lambda: _write_index(plan, folder, by_file))
    return tensors.combined_digest(written)


def write_files(
    plan: Plan,
    files: Mapping[Path, Sequence[Record]],
    device: str,
    gram: Gram,
    *,
    ledger: Ledger | None = None,
    cached: bool = True,
    meanwhile: Callable[[], None] = _nothing,
    hashed: bool = True,
    survey: Survey | None = None,
) -> list[tuple[Record, str]]:
    """Write what a plan makes into files; returns each record with the hash of its bytes, the same in every process.

    What nobody else will see need not be `hashed`: its hashes are empty then. With a `ledger` vectors are verified, and
    parts that an earlier run has entered are kept; what is not `cached` goes past the page cache; `meanwhile` is called
    when tensors are about to be combined. `survey` is what was measured already.
    Files and parts are laid out before it is decided who writes what, and what is summed is summed part by part, so
    that no byte depends on the number of processes.
    """
    parts = parts_of({path: writing.places(path, records) for path, records in files.items()})
    by_copies = ledger if ledger is not None and apart.suits(plan, device) else None
    if ledger is not None and by_copies is None:
        ledger.vectors.begin()
    survey = survey or processes.together(lambda: surveys.take(plan))
    for note in survey.notes(plan):
        log.info("note: %s", note)
    claimed = processes.on_main(ledger.claimed) if ledger is not None else {}
    found = _verified(plan, parts, claimed, survey=survey if by_copies else None)
    processes.on_main(lambda: _lay_out(files, ledger, found, reserve=not cached))
    if found:
        log.info("going on with an interrupted merge: %d of %d parts are finished", len(found), len(parts))
    mine = processes.share([part for part in parts if part.number not in found])
    if by_copies is not None:
        written = _written_apart(mine, by_copies, apart.Making(plan, survey, cached), meanwhile)
    else:
        written = _written(mine, ledger, _fusing(plan, device, survey), cached=cached, hashed=hashed)
        meanwhile()
    done = processes.together(lambda: dict(written))
    found |= dict(processes.gathered(list(done.items())))
    if by_copies is not None:
        by_copies.vectors.by_hashes(apart.hashes([found[part.number] for part in parts]))
    for part in parts:
        gram.count(found[part.number].products)
    return [pair for part in parts for pair in zip(part.records, found[part.number].hashes, strict=True)]


# From the names of tensors of one file, in its order, to the stream of their pieces; vectors are shown to the Gram.
Fusing = Callable[[set[str], Gram], Iterator[tuple[str, "Values"]]]


def _fusing(plan: Plan, device: str, survey: Survey) -> Fusing:
    def stream(names: set[str], gram: Gram) -> Iterator[tuple[str, Values]]:
        return fuse.pieces(plan, only=names, device=device, gram=gram, survey=survey)

    return stream


def _lay_out(
    files: Mapping[Path, Sequence[Record]], ledger: Ledger | None, kept: Mapping[int, Finished], *, reserve: bool
) -> None:
    if ledger is not None:
        ledger.begin(kept)
    for path, records in files.items():
        if not kept:
            path.unlink(missing_ok=True)  # a search may write again what a network still has mapped
        writing.lay_out(path, records, keep=bool(kept), reserve=reserve)


def _verified(
    plan: Plan, parts: Sequence[Part], claimed: Mapping[int, Finished], *, survey: Survey | None
) -> dict[int, Finished]:
    """Those of the claimed parts whose bytes are in their files.

    They were made of vectors that were verified then; with a `survey`, in one process, or of those that are here now.
    """
    some = [part for part in parts if part.number in claimed]
    if survey is not None:
        seen = {part.number: apart.kept(plan, survey, part, claimed[part.number]) for part in some}
        return {number: finished for number, finished in seen.items() if finished is not None}
    some = [part for part in some if claimed[part.number].trusted]
    good = processes.together(
        lambda: [part.number for part in processes.share(some) if verified(part, claimed[part.number])]
    )
    return {number: claimed[number] for number in processes.gathered(good)}


def _written_apart(
    mine: Sequence[Part], ledger: Ledger, making: apart.Making, meanwhile: Callable[[], None]
) -> Iterator[tuple[int, Finished]]:
    total = sum(part.nbytes for part in mine)
    copies = threads.allowed() if total >= WORTH_COPIES else 1
    # They are made before anything starts a thread here.
    with forked.working(making, mine, processes=copies) as made:
        meanwhile()
        with byte_progress(total, text="merge") as tell, flushing() as flush:
            for part, finished in made:
                if making.cached:
                    flush(part.file)
                ledger.enter(part, finished)
                tell(part.nbytes)
                yield part.number, finished


def _written(
    mine: Sequence[Part], ledger: Ledger | None, fusing: Fusing, *, cached: bool, hashed: bool
) -> Iterator[tuple[int, Finished]]:
    with byte_progress(sum(part.nbytes for part in mine), text="merge") as tell, flushing() as flush:
        for _, group in groupby(mine, key=lambda part: part.file):
            parts, seen = list(group), Gram()
            names = {record.name for part in parts for record in part.records}
            # One stream for all parts of a file: threads work ahead, also beyond the end of a part.
            stream = _telling(fusing(names, seen), tell)
            for part in parts:
                pairs = writing.write_into(part.file, part.records, stream, cached=cached, hashed=hashed)
                finished = Finished(tuple(one for _, one in pairs), seen.taken())
                if ledger is not None:  # else it is a trial, which no disk needs to hold
                    if cached:
                        flush(part.file)
                    ledger.enter(part, finished)
                yield part.number, finished


def _telling(stream: Iterator[tuple[str, Values]], tell: Callable[[int], None]) -> Iterator[tuple[str, Values]]:
    for name, tensor in stream:
        yield name, tensor
        tell(tensor.nbytes)


def _write_index(plan: Plan, folder: Path, by_file: Mapping[Path, list[Record]]) -> None:
    places = {record.name: path.name for path, records in by_file.items() for record in records}
    index = {"metadata": {"total_size": plan.write_bytes}, "weight_map": dict(sorted(places.items()))}
    (folder / tensors.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def refuse_too_large(plan: Plan, output: Path, there: Path) -> None:
    """Raise RunError when the disk of `output` has no room for the merge; what lies in `there` is used again."""
    needed = plan.write_bytes + BESIDE
    if plan.recipe.merge.searched:
        # A search keeps the combination in float64 beside the weights, and may replace these while they are mapped.
        needed += plan.write_bytes + sum(8 * _values(step.record) for step in plan.steps if step.is_merged)
    held = sum(path.stat().st_blocks * 512 for path in there.glob("*.safetensors")) if there.is_dir() else 0
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed - held > free:
        problem = f"the merge needs {size(needed - held)} on the disk of '{output}', but {size(free)} are free"
        raise RunError(problem, hint="make room, or write elsewhere with -o; nothing was written")


def _values(record: Record) -> int:
    return math.prod(record.shape)
