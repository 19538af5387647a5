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
from hf_datavec.study import load, page
from hf_datavec.study.networks import Seed, Workplace
from hf_datavec.study.partition import divide
from hf_datavec.study.pictures import EMBEDDED, Table, open_table
from hf_datavec.study.results import Results, measure
from hf_datavec.study.sections import Study, Training

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
# What the kept vectors depend on; all else may change from run to run.
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
    study, here = load(path), path.absolute().parent
    folder = _output(study, path, output)
    table = open_table(study.data, here)
    divisions = {number: divide(study, table, number) for number in study.seeds}  # mistakes show before any training
    elsewhere = open_elsewhere(study, here)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_other(study, table, elsewhere, folder)
    _write_base(study, table, here, folder)
    place = Workplace(study, folder, table, elsewhere, devices.choose(device))
    seeds = [Seed(place, number, division) for number, division in divisions.items()]
    for seed in seeds:
        _record(seed)
    results = measure(seeds)
    results.write(folder)
    page.write(seeds, results, folder)
    return Outcome(folder, results)


def open_elsewhere(study: Study, here: Path) -> ImageSet | None:
    """The public images of a study, where they are a data set of their own."""
    if study.public.images is None:
        return None
    return open_images(hub.parse(study.public.images, relative_to=here), split=study.public.split)


def _output(study: Study, path: Path, output: Path | None) -> Path:
    if output is not None:
        return output.expanduser().absolute()
    if study.output is None:
        raise InputError(f"{path.name}: no 'output:' is given", hint="add output: ./results, or use -o DIR")
    return (path.absolute().parent / Path(study.output).expanduser()).resolve()


def _refuse_other(study: Study, table: Table, elsewhere: ImageSet | None, folder: Path) -> None:
    """Raise InputError when the folder holds something else; note down what it will hold otherwise."""
    described = _described(study, table, elsewhere)
    note = folder / STUDY_FILE
    if not note.exists():
        if any(folder.iterdir()):
            raise InputError(f"output '{folder}' is not empty", hint="choose another folder with -o")
        write_note(study, table, elsewhere, folder)
        return
    before = json.loads(note.read_text("utf-8"))
    # A study that was begun before a setting was known has what that is unless told.
    before["training"] = Training().model_dump(mode="json") | before.get("training", {})
    changed = [key for key in described if before.get(key) != described[key]]
    if changed:
        raise InputError(
            f"'{folder}' holds a study with other {' and '.join(changed)}",
            hint="choose another folder with -o, or take the change back to go on; seeds, merges, modes may change",
        )


def _described(study: Study, table: Table, elsewhere: ImageSet | None) -> dict[str, Any]:
    fixed = {key: study.model_dump(mode="json")[key] for key in FIXED}
    return fixed | {"images": table.images.digest, "public images": elsewhere and elsewhere.digest}


def write_note(study: Study, table: Table, elsewhere: ImageSet | None, folder: Path) -> None:
    """Note down which study a folder holds, so that what is kept there is used for no other."""
    text = json.dumps(_described(study, table, elsewhere), indent=2)
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
