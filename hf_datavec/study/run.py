"""The whole experiment: images divided, networks trained, everything merged and measured, results written."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_datavec import hub
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import ImageSet, open_images
from hf_datavec.pipeline import device as devices
from hf_datavec.pipeline import site
from hf_datavec.samples import write_network
from hf_datavec.staging import staged
from hf_datavec.study import document, load, page
from hf_datavec.study.measure import measure
from hf_datavec.study.networks import Seed, Workplace
from hf_datavec.study.partition import divide, slug
from hf_datavec.study.pictures import EMBEDDED, Table, open_table
from hf_datavec.study.results import Results
from hf_datavec.study.sections import Study, Training

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
# The key of the note that names the study file whose results lie in the folder itself.
NAME = "study"
# What the kept vectors depend on; all else may change from run to run, public images of `more_public:` as well.
FIXED = ("data", "base", "image_size", "sites", "test", "public", "start", "training")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the results lie, and what they are."""

    folder: Path
    results: Results


def run(path: Path, *, output: Path | None = None, device: devices.Device = "auto") -> Outcome:
    """Do what a study file says; whatever an earlier run of it has kept is not computed again.

    Raises: InputError for a study, images or a base that are wrong, and for a folder that holds another study.
    """
    seeds = opened(path, output=output, device=device)
    place = seeds[0].place
    results = measure(seeds)
    results.write(place.results)
    document.write(results, place.results)
    page.write(seeds, results, place.results)
    log.info("results: %s", place.results)
    return Outcome(place.results, results)


def opened(path: Path, *, output: Path | None = None, device: devices.Device = "auto") -> list[Seed]:
    """The seeds of a study file, their images divided and their base at hand; nothing is trained. Raises as `run`."""
    study, here = load(path), path.absolute().parent
    folder = _output(study, path, output)
    table = open_table(study.data, here)
    divisions = {number: divide(study, table, number) for number in study.seeds}  # mistakes show before any training
    elsewhere = open_elsewhere(study, here)
    others = {one.name: open_public(one.images, one.split, here) for one in study.more_public}
    folder.mkdir(parents=True, exist_ok=True)
    name = _place_of(path.stem, _note(study, table, elsewhere, folder, path.stem))
    _write_base(study, table, here, folder)
    place = Workplace(study, folder, table, elsewhere, others, devices.choose(device), name)
    place.results.mkdir(exist_ok=True)
    seeds = [Seed(place, number, division) for number, division in divisions.items()]
    for seed in seeds:
        _record(seed)
    return seeds


def open_elsewhere(study: Study, here: Path) -> ImageSet | None:
    """The public images of a study, where they are a data set of their own."""
    if study.public.images is None:
        return None
    return open_public(study.public.images, study.public.split, here)


def open_public(images: str, split: str | None, here: Path) -> ImageSet:
    """Public images that are a data set of their own; local paths are relative to `here`."""
    return open_images(hub.parse(images, relative_to=here), split=split)


def _output(study: Study, path: Path, output: Path | None) -> Path:
    if output is not None:
        return output.expanduser().absolute()
    if study.output is None:
        raise InputError(f"{path.name}: no 'output:' is given", hint="add output: ./results, or use -o DIR")
    return (path.absolute().parent / Path(study.output).expanduser()).resolve()


def _place_of(stem: str, first: str) -> str:
    """The sub-folder of a study's results: none for the one that the folder was made for.

    Another study of the same networks, which has other merges, must not replace its results.
    """
    if stem == first:
        return ""
    name = slug(stem)
    return f"study-{name}" if name in ("base", "pretrained") or name.startswith("seed-") else name


def _note(study: Study, table: Table, elsewhere: ImageSet | None, folder: Path, stem: str) -> str:
    """Note down which networks a folder holds; returns the name of the study file that it was made for.

    Raises: InputError when the folder holds something else.
    """
    described = _described(study, table, elsewhere)
    note = folder / STUDY_FILE
    if not note.exists():
        if any(folder.iterdir()):
            raise InputError(f"output '{folder}' is not empty", hint="choose another folder with -o")
        write_note(study, table, elsewhere, folder, stem=stem)
        return stem
    before = json.loads(note.read_text("utf-8"))
    # A study that was begun before a setting was known has what that is unless told.
    before["training"] = Training().model_dump(mode="json") | before.get("training", {})
    changed = [key for key in described if before.get(key) != described[key]]
    if changed:
        raise InputError(
            f"'{folder}' holds a study with other {' and '.join(changed)}",
            hint="choose another folder with -o, or take the change back to go on; seeds, merges, modes may change",
        )
    if NAME not in before:  # a folder of a version that noted no name down
        write_note(study, table, elsewhere, folder, stem=stem)
    return str(before.get(NAME, stem))


def _described(study: Study, table: Table, elsewhere: ImageSet | None) -> dict[str, Any]:
    fixed = {key: study.model_dump(mode="json")[key] for key in FIXED}
    return fixed | {"images": table.images.digest, "public images": elsewhere and elsewhere.digest}


def write_note(
    study: Study, table: Table, elsewhere: ImageSet | None, folder: Path, *, stem: str | None = None
) -> None:
    """Note down which study a folder holds, so that what is kept there is used for no other."""
    name = {NAME: stem} if stem is not None else {}
    text = json.dumps({**name, **_described(study, table, elsewhere)}, indent=2)
    (folder / STUDY_FILE).write_text(f"{text}\n", "utf-8")


def _write_base(study: Study, table: Table, here: Path, folder: Path) -> None:
    """The study base, made once: agreed labels, zero head."""
    labels = sorted(set(table.labels))
    if (folder / "base").exists():
        open_checkpoint(folder / "base")
        return
    pretrained = study.base
    if study.base == EMBEDDED:
        pretrained = str(folder / "pretrained")
        if not (folder / "pretrained").exists():
            with staged(folder / "pretrained") as place:
                place.rmdir()  # the writer makes it
                write_network(place)
    else:
        found = hub.parse(study.base, relative_to=here)
        pretrained = str(found.path) if found.path else study.base
    site.init(pretrained, labels, folder / "base", image_size=study.image_size)


def _record(seed: Seed) -> None:
    """Write down which image is where, so that anyone can check that no patient is on two sides."""
    parts = {
        name: {"images": list(places), "groups": sorted({seed.place.table.groups[place] for place in places})}
        for name, places in seed.division.parts.items()
    }
    seed.folder.mkdir(exist_ok=True)
    (seed.folder / "parts.json").write_text(json.dumps(parts) + "\n", "utf-8")
