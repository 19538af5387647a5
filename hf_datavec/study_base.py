"""The common starting point of a study: a pretrained network whose head is agreed on and zero."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import PREPROCESSOR_FILE, Checkpoint, Role, relabelled, write_config
from hf_datavec.errors import InputError, listed
from hf_datavec.tensors import MODEL_FILE, Record
from hf_datavec.writing import in_file_order, write_file

if TYPE_CHECKING:
    import torch


def write(folder: Path, pretrained: Checkpoint, labels: tuple[str, ...], *, image_size: int | None = None) -> None:
    """Write the study base: the pretrained weights, one zero row per agreed label, matching configuration.

    A zero head makes every site's head difference the head itself, and no site starts nearer than another.

    Raises: InputError for labels that repeat, and for an image size that the network cannot change to.
    """
    refuse_labels(labels)
    layout = [
        Record(name, record.dtype, pretrained.shape_with(name, labels), record.file, 0)
        for name, record in pretrained.records.items()
    ]
    config = relabelled(pretrained.config, labels)
    preprocessor = _preprocessor(pretrained)
    if image_size is not None:
        config, preprocessor = resized(config, preprocessor, image_size)
    write_file(folder / MODEL_FILE, layout, _stream(pretrained, layout))
    write_config(folder, config)
    if preprocessor is not None:
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor, indent=2, sort_keys=True) + "\n", "utf-8")


def refuse_labels(labels: tuple[str, ...]) -> None:
    """Raise InputError for labels that repeat, are empty, or are fewer than two."""
    if len(labels) < 2 or not all(label.strip() for label in labels):
        raise InputError(f"--labels needs at least two names separated by commas, got {','.join(labels)!r}")
    repeated = {label for label in labels if labels.count(label) > 1}
    if repeated:
        raise InputError(f"--labels names {listed(repeated)} twice")


def _stream(pretrained: Checkpoint, layout: list[Record]) -> Iterator[tuple[str, torch.Tensor]]:
    for record in in_file_order(layout):
        tensor = pretrained.tensors.read(record.name)
        is_head = pretrained.roles[record.name] is Role.HEAD
        yield record.name, tensor.new_zeros(record.shape) if is_head else tensor


def _preprocessor(pretrained: Checkpoint) -> dict[str, Any] | None:
    path = pretrained.folder / PREPROCESSOR_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"'{path}' is not the JSON of an image processor", hint="copy the model again")
    return found


def resized(
    config: dict[str, Any], preprocessor: dict[str, Any] | None, size: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Configuration and preprocessor for pictures of `size` x `size` pixels, whole, without a centre crop.

    Raises: InputError for networks whose weights depend on the image size, such as ViT.
    """
    if "pretrained_cfg" in config:
        pretrained = {key: value for key, value in config["pretrained_cfg"].items() if not key.startswith("test_")}
        if pretrained.get("fixed_input_size") or not pretrained.get("input_size"):
            raise InputError(f"'{config['architecture']}' has a fixed image size, so --image-size cannot change it")
        pretrained |= {"input_size": [pretrained["input_size"][0], size, size], "crop_pct": 1.0}
        return {**config, "pretrained_cfg": pretrained}, preprocessor
    if "image_size" in config or preprocessor is None:
        raise InputError("the weights of this network depend on its image size, so --image-size cannot change it")
    square = {"height": size, "width": size}
    changed = {**preprocessor, "size": square, "do_center_crop": False}
    if isinstance(preprocessor.get("size"), dict) and "shortest_edge" in preprocessor["size"]:
        # These processors crop the rest of the longer edge.
        changed = {**preprocessor, "size": {"shortest_edge": size}}
        changed |= {key: 1.0 for key in ("crop_pct",) if key in preprocessor}
        changed |= {key: square for key in ("crop_size",) if key in preprocessor}
    return config, changed


def copy_description(source: Checkpoint, folder: Path, labels: tuple[str, ...], *, dtype: str | None = None) -> None:
    """Write the configuration and preprocessor of a model beside weights derived from it, of another type if given."""
    config = relabelled(source.config, labels)
    if dtype:
        # What `from_pretrained` loads by default; older configurations spell it the second way.
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    write_config(folder, config)
    preprocessor = source.folder / PREPROCESSOR_FILE
    if preprocessor.is_file():
        shutil.copyfile(preprocessor, folder / PREPROCESSOR_FILE)
