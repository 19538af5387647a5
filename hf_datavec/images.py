"""Image folders and data sets, as `datasets` reads them: pictures and label names by index."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from hf_datavec import hub
from hf_datavec.errors import InputError, did_you_mean, listed
from hf_datavec.progress import quiet_datasets

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label")
# What a data set repo may give us: pictures and tables, no code.
DATA_FILES = ("*.parquet", "*.arrow", "*.jpg", "*.jpeg", "*.png", "*.bmp", "*.tif", "*.tiff", "*.webp",
              "*.zip", "*.tar", "*.csv", "*.jsonl", "*.json", "*.md")  # fmt: skip
TABLES = (".parquet", ".arrow", ".csv", ".jsonl", ".tar", ".zip", ".h5", ".hdf5")
SPLITS = {"train", "validation", "val", "valid", "dev", "test"}
# Each holds a decoded picture; more than eight would wait for the interpreter.
DECODERS = min(8, os.cpu_count() or 1)
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """Pictures in a fixed order, with a label name each where the source has labels."""

    fetched: hub.Fetched
    rows: Any
    image_column: str
    label_column: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, indices: Sequence[int]) -> ImageSet:
        """The pictures of some indices as a set of their own."""
        return replace(self, rows=self.rows.select(indices))

    @property
    def text(self) -> str:
        """What messages call this set."""
        return self.fetched.reference.text

    def image(self, index: int) -> Image:
        """The picture in RGB, turned upright by its EXIF entry.

        Raises: InputError for a file that is no complete picture.
        """
        from PIL import Image, ImageOps

        entry = self.rows[index][self.image_column]
        name = entry["path"] or f"image {index} of '{self.text}'"
        try:
            source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
            with Image.open(source) as opened:
                return _eight_bit(ImageOps.exif_transpose(opened)).convert("RGB")
        except Image.DecompressionBombError as error:
            hint = "scale it down; such pictures would not fit into memory"
            raise InputError(f"the image '{name}' is too large: {str(error).split(',')[0]}", hint=hint) from None
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).split(" <")[0].split(" '")[0]
            raise InputError(
                f"cannot read the image '{name}': {reason}", hint="repair or remove the file and run again"
            ) from None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The label of each picture. Raises: InputError when the source has none."""
        if self.label_column is None:
            raise InputError(
                f"the images in '{self.text}' have no labels",
                hint="put each class in a folder of its own, or name a column 'label' "
                f"(columns: {listed(self.rows.features)})",
            )
        feature, values = self.rows.features[self.label_column], self.rows[self.label_column]
        if hasattr(feature, "int2str"):
            unlabelled = [index for index, value in enumerate(values) if value is None or value < 0]
            self._refuse_unlabelled(unlabelled)
            return tuple(feature.names[value] for value in values)
        self._refuse_unlabelled([index for index, value in enumerate(values) if value is None])
        return tuple(str(value) for value in values)

    def _refuse_unlabelled(self, indices: Sequence[int]) -> None:
        if indices:
            first = f"the first is number {indices[0]}"
            raise InputError(f"{len(indices)} of {len(self)} images in '{self.text}' have no label; {first}")

    @cached_property
    def digest(self) -> str:
        """BLAKE3 over the encoded pictures in their order; names and labels do not count."""
        whole = blake3()
        for entry in self.rows[self.image_column]:
            content = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
            whole.update(blake3(content).digest())
        return f"blake3:{whole.hexdigest()}"

    def label_rows(self, labels: tuple[str, ...]) -> list[int]:
        """For each picture the row of its label in a model's head.

        Raises: InputError for labels that the model lacks.
        """
        row_of = {label: row for row, label in enumerate(labels)}
        strange = set(self.labels) - set(labels)
        if strange:
            near = did_you_mean(min(strange), labels, listing=False)
            raise InputError(
                f"the images in '{self.text}' have labels that the model lacks: {listed(strange)}; "
                f"the model knows {listed(labels, most=12)}",
                hint=near or "rename the classes, or start from a base that has them",
            )
        return [row_of[label] for label in self.labels]

    def tensors(self, preprocess: Callable[[Image], torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The preprocessed pictures of some indices, shape (n, channels, height, width)."""
        import torch

        with ThreadPoolExecutor(DECODERS) as pool:  # reading and decoding release the interpreter lock
            return torch.stack(list(pool.map(lambda index: preprocess(self.image(index)), indices)))


def _eight_bit(image: Image) -> Image:
    """A picture with 8 bits a channel; 16-bit grey, as X-rays have it, is scaled, not cut off."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it stores 32-bit values, expected 8 or 16 bits a channel")
    return image


def open_images(reference: hub.Reference, *, split: str | None = None) -> ImageSet:
    """The images of a folder (sub-folders are classes, or a metadata.csv), a saved data set or a Hub data set.

    Raises: InputError for a missing or empty folder, an unknown split, a source without images.
    """
    import datasets

    quiet_datasets()
    fetched = hub.fetch(reference, patterns=DATA_FILES, repo_type="dataset")
    loaded = _load(fetched.folder, reference.text)
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _chosen(loaded, split, reference.text)
    elif split:
        raise InputError(f"'{reference.text}' has no splits, but '{split}' is asked for", hint="leave split out")
    columns = [name for name, feature in loaded.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise InputError(f"'{reference.text}' holds no images; its columns are {listed(loaded.features)}")
    rows = loaded.cast_column(columns[0], datasets.Image(decode=False))
    if not len(rows):
        raise InputError(f"'{reference.text}' holds no images")
    return ImageSet(fetched, rows, columns[0], _label_column(loaded))


def _load(folder: Path, text: str) -> Any:
    import datasets

    if not folder.is_dir():
        raise InputError(f"'{text}' is not a folder", hint="give the folder that holds the images")
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(folder))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    if not files:
        raise InputError(f"the folder '{text}' holds no images", hint=f"expected {', '.join(PICTURES[:3])} ... files")
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if pictures and not any(path.suffix in TABLES or path.name.startswith("metadata.") for path in files):
        return _from_pictures(folder, pictures, text)
    try:
        loaded = datasets.load_dataset(str(folder))
    except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"'{text}' cannot be read as images: {type(error).__name__}: {reason}") from None
    read = sum(len(rows) for rows in loaded.values())
    if pictures and read != len(pictures):
        raise InputError(
            f"'{text}' holds {len(pictures)} pictures, but {read} are read",
            hint="every picture needs a row in the metadata file; split folders are called train, validation or test",
        )
    return loaded


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _from_pictures(folder: Path, pictures: list[Path], text: str) -> Any:
    """A data set of a folder of class folders; with one more level when the first is called train, test, ...

    The library's own builder guesses splits from words in any file name and then leaves pictures out.
    """
    import datasets

    first = {path.relative_to(folder).parts[0] for path in pictures if path.parent != folder}
    beside = [path.name for path in pictures if path.parent == folder]
    if first and beside:
        raise InputError(
            f"'{text}' holds pictures beside its class folders: {listed(beside)}", hint="move them into a class folder"
        )
    if first and first <= SPLITS:
        parts = {
            name: [path for path in pictures if path.relative_to(folder).parts[0] == name] for name in sorted(first)
        }
        return datasets.DatasetDict({name: _rows(folder / name, paths) for name, paths in parts.items()})
    return _rows(folder, pictures)


def _rows(folder: Path, pictures: list[Path]) -> Any:
    import datasets

    features = {"image": datasets.Image(decode=False)}
    columns: dict[str, list[Any]] = {"image": [{"path": str(path), "bytes": None} for path in pictures]}
    if all(path.parent != folder for path in pictures):
        names = sorted({path.parent.name for path in pictures})
        features["label"] = datasets.ClassLabel(names=names)
        columns["label"] = [names.index(path.parent.name) for path in pictures]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _chosen(splits: Any, split: str | None, text: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise InputError(f"'{text}' has the splits {listed(splits)}", hint="choose one with split: NAME (or --split)")
    if split not in splits:
        raise InputError(f"'{text}' has no split '{split}'; it has {listed(splits)}", hint=did_you_mean(split, splits))
    return splits[split]


def _label_column(rows: Any) -> str | None:
    import datasets

    for name in LABEL_COLUMNS:
        if name in rows.features:
            return name
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return classes[0] if classes else None


def evenly_spread(available: int, count: int) -> list[int]:
    """The indices of `count` of the available images; folders list one class after the other, so from everywhere."""
    return [index * available // count for index in range(count)]
