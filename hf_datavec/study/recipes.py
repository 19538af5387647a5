"""Kept recipes: for each merged and restored row one that `hf-datavec merge` makes its network by again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_datavec.pipeline import lock
from hf_datavec.recipe import AUTO
from hf_datavec.staging import staged
from hf_datavec.study.networks import Seed, has_statistics
from hf_datavec.study.partition import slug
from hf_datavec.study.pictures import Part
from hf_datavec.study.restoring import BATCH, labelled
from hf_datavec.study.rows import Chosen, Wanted
from hf_datavec.study.sections import LOOK_AT_IMAGES, Combining

PUBLIC_FOLDER = "public"


def write(seed: Seed, wanted: Wanted, chosen: Chosen | None) -> Path:
    """Write the recipe of a merged row, with what was chosen in place of `auto`."""
    row, merge = wanted.row, wanted.merge or Combining()
    folder = seed.folder / "recipes" / seed.place.name
    folder.mkdir(parents=True, exist_ok=True)
    mode, note = row.mode, ""
    vectors: list[Any] = [_near(path, folder) for path in seed.site_vectors()]
    overrides: dict[str, Any] = {}
    if chosen:
        update = {"method": chosen.method, "scale": chosen.scale, "options": dict(chosen.options)}
        merge, mode = merge.model_copy(update=update), chosen.mode
        note = f"# {AUTO} chose {chosen.text}, mode {mode}.\n"
        if chosen.weights:
            vectors = [{"vector": path, "weight": chosen.weights[Path(path).name]} for path in vectors]
        if chosen.overrides:
            overrides = {"overrides": [one.model_dump(exclude_none=True, mode="json") for one in chosen.overrides]}
    recipe: dict[str, Any] = {
        "base": _near(seed.base, folder),
        "vectors": vectors,
        "merge": {**seed.combining(merge), **overrides},
        "recalibrate": _restoring(seed, mode, row.on, folder),
    }
    if wanted.after and seed.place.study.distil is not None:
        settings = seed.place.study.distil.model_dump(exclude_defaults=True, exclude={"loss"}, mode="json")
        recipe["recalibrate"]["tune"] = {"loss": "ensemble", **settings}
    if wanted.after == "calibrated":
        recipe["recalibrate"]["temperature"] = "ensemble"
    if wanted.after and "images" not in recipe["recalibrate"]:
        recipe["recalibrate"] |= _images(seed, row.on, folder)
    file = folder / f"{slug(row.text)}.yaml"
    file.write_text(f"# Makes the network of the row '{row.text}' of seed {seed.number}.\n{note}{lock.dump(recipe)}")
    return file


def _near(path: Path, folder: Path) -> str:
    """A path as a recipe in a folder says it."""
    return os.path.relpath(path, folder)  # starts with `../`, which is local


def _restoring(seed: Seed, mode: str, on: str, folder: Path) -> dict[str, Any]:
    if mode not in LOOK_AT_IMAGES or not has_statistics(seed.base):
        return {"mode": mode if mode not in LOOK_AT_IMAGES else "none"}
    found: dict[str, Any] = {"mode": mode, **_images(seed, on, folder), "count": seed.most(on), "batch_size": BATCH}
    found["tolerance"] = 0.0  # a study looks at all of them
    if mode == "tune" and not labelled(seed.shown(on), seed.place.network.labels):
        found["tune"] = {"loss": "entropy"}
    return found


def _images(seed: Seed, on: str, folder: Path) -> dict[str, Any]:
    """Where the public images of a row are; those of the study's own images are written, since only it divides them."""
    study = seed.place.study
    foreign = seed.place.others.get(on) if on else seed.place.elsewhere
    if foreign is None:
        place = seed.folder / PUBLIC_FOLDER
        if not place.exists():
            _write_images(seed.public, place)
        return {"images": _near(place, folder)}
    split = next((one.split for one in study.more_public if one.name == on), None) if on else study.public.split
    reference, commit = foreign.fetched.reference, foreign.fetched.commit
    text = str(reference.path) if reference.path else f"{reference.repo}@{commit}" if commit else reference.text
    return {"images": text, **({"split": split} if split else {})}


def _write_images(images: Part, folder: Path) -> None:
    """Write pictures as PNG files in their order, with a table of their labels."""
    lines = []
    with staged(folder) as place:
        for index in range(len(images)):
            name = f"{index:06}.png"
            images.image(index).save(place / name)
            label = {"label": images.labels[index]} if images.label_column else {}
            lines.append(json.dumps({"file_name": name, **label}, ensure_ascii=False))
        (place / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
