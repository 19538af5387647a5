"""A model folder as files: its configuration, labels, tensors and their roles; no framework is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from hf_datavec.errors import InputError, listed
from hf_datavec.tensors import FLOATS, Record, StoredTensors, Tensors, open_folder

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# Module names under which image classifiers of transformers and timm keep their last layer.
TRANSFORMERS_HEADS = (
    "classifier", "cls_classifier", "distillation_classifier", "classifier_distill",
    "head", "dist_head", "fc", "score",
)  # fmt: skip
TIMM_HEADS = ("classifier", "fc", "head", "head.fc", "head_dist")


# The kinds of the fields that are looked into here; a configuration comes from strangers.
FIELD_KINDS = {"pretrained_cfg": dict, "model_args": dict, "id2label": dict, "label_names": list}


class Role(StrEnum):
    """What a tensor is to a merge."""

    WEIGHT = "weight"
    HEAD = "head"
    STATISTIC = "statistic"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Checkpoint:
    """A transformers or timm image classifier as it lies in a folder."""

    folder: Path
    config: Mapping[str, Any]
    library: Literal["timm", "transformers"]
    labels: tuple[str, ...]
    tensors: StoredTensors
    roles: Mapping[str, Role]

    @property
    def records(self) -> Mapping[str, Record]:
        return self.tensors.records

    def named(self, *roles: Role) -> tuple[str, ...]:
        """The names of the tensors that have one of the roles, sorted."""
        return tuple(name for name in sorted(self.records) if self.roles[name] in roles)

    def shape_with(self, name: str, labels: tuple[str, ...]) -> tuple[int, ...]:
        """The shape that a tensor has when the head has these labels."""
        shape = self.records[name].shape
        return (len(labels), *shape[1:]) if self.roles[name] is Role.HEAD else shape

    @property
    def has_linear_head(self) -> bool:
        """Whether the head is a single linear layer, by the names and shapes of its tensors."""
        names = self.named(Role.HEAD)
        shapes = {name.rpartition(".")[2]: len(self.records[name].shape) for name in names}
        alone = len({name.rpartition(".")[0] for name in names}) == 1
        return alone and shapes in ({"weight": 2}, {"weight": 2, "bias": 1})

    @property
    def has_statistics(self) -> bool:
        """Whether the network has BatchNorm running statistics."""
        return bool(self.named(Role.STATISTIC))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, from headers alone.

    Raises: InputError when the folder is no image classifier of transformers or timm, or is damaged.
    """
    config = _read_config(folder)
    tensors = open_folder(folder)
    library: Literal["timm", "transformers"] = "timm" if "pretrained_cfg" in config else "transformers"
    head = head_names(config, tensors)
    if not head:
        raise InputError(
            f"'{folder}' has no classifier layer that could be recognised",
            hint="expected an image classifier of transformers or timm with its head",
        )
    rows = tensors.records[head[0]].shape[0]
    labels = _labels(config, rows, folder)
    return Checkpoint(folder, config, library, labels, tensors, tensor_roles(tensors, head, folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if (folder / "datavec.json").exists():
            problem = f"'{folder}' has no {CONFIG_FILE}: it is a vector, not a model"
            raise InputError(problem, hint="write {vector: ...} for it") from None
        if not folder.exists():
            raise InputError(f"there is no folder '{folder}'") from None
        raise InputError(f"'{folder}' has no {CONFIG_FILE}: it is no model folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    if not isinstance(config, dict) or not ({"architecture", "architectures", "model_type"} & set(config)):
        raise InputError(f"'{path}' is not the configuration of a transformers or timm model")
    for key, kind in FIELD_KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise InputError(f"'{path}': {key} is {type(config[key]).__name__}, expected {kind.__name__}")
    if "auto_map" in config:
        raise InputError(
            f"'{path}' asks to run code from its repo (auto_map)",
            hint="code from a repo is never run; use a model that transformers or timm ships",
        )
    return config


def head_names(config: Mapping[str, Any], tensors: Tensors) -> tuple[str, ...]:
    """The tensors of the last layer: those of the classifier module that have one row per label."""
    named = (config.get("pretrained_cfg") or {}).get("classifier")
    if isinstance(named, str):
        modules: tuple[str, ...] = (named,)
    elif named:
        modules = tuple(named)
    else:
        modules = TIMM_HEADS if "pretrained_cfg" in config else TRANSFORMERS_HEADS
    rows = _label_count(config)
    inside = [
        name
        for name, record in tensors.records.items()
        if record.dtype in FLOATS and record.shape and name.startswith(tuple(f"{module}." for module in modules))
    ]
    if rows is None and inside:  # transformers leaves the label count out when it is the default of two
        rows = tensors.records[max(inside)].shape[0]
    return tuple(sorted(name for name in inside if tensors.records[name].shape[0] == rows))


def _label_count(config: Mapping[str, Any]) -> int | None:
    for key in ("label_names", "id2label"):
        if config.get(key):
            return len(config[key])
    return config.get("num_classes") or config.get("num_labels")


def _labels(config: Mapping[str, Any], rows: int, folder: Path) -> tuple[str, ...]:
    if config.get("label_names"):
        labels = tuple(map(str, config["label_names"]))
    elif config.get("id2label"):
        try:
            by_row = {int(row): str(label) for row, label in config["id2label"].items()}
            labels = tuple(by_row[row] for row in range(len(by_row)))
        except (ValueError, KeyError):
            raise InputError(f"'{folder / CONFIG_FILE}': id2label must number the labels 0, 1, 2, ...") from None
    else:
        labels = tuple(f"LABEL_{row}" for row in range(rows))
    repeated = {label for label in labels if labels.count(label) > 1} if len(labels) <= 2000 else set()
    if repeated:
        raise InputError(f"'{folder / CONFIG_FILE}' gives a label twice: {listed(repeated)}")
    if len(labels) != rows:
        raise InputError(f"'{folder}' has {len(labels)} labels but a head of {rows} rows")
    return labels


def tensor_roles(tensors: Tensors, head: tuple[str, ...], where: Path) -> dict[str, Role]:
    """The role of each tensor, by its name and type in the file.

    Raises: InputError for a type that cannot be merged, such as an 8-bit float.
    """
    roles = {}
    for name, record in tensors.records.items():
        if name.endswith(("running_mean", "running_var")):
            roles[name] = Role.STATISTIC
        elif record.dtype in FLOATS:
            roles[name] = Role.HEAD if name in head else Role.WEIGHT
        elif record.dtype.startswith(("I", "U", "BOOL")):
            roles[name] = Role.CONSTANT
        else:
            raise InputError(f"'{where}': tensor '{name}' has type {record.dtype}, expected one of {', '.join(FLOATS)}")
    return roles


def relabelled(config: Mapping[str, Any], labels: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with other labels, as timm and transformers both read it."""
    changed = dict(config)
    if "pretrained_cfg" in config:
        changed["num_classes"] = len(labels)
        changed["label_names"] = list(labels)
        changed["pretrained_cfg"] = {**config["pretrained_cfg"], "num_classes": len(labels)}
        # timm 1.0.31 repeats num_classes here, and transformers then passes it twice and fails.
        arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        changed["model_args"] = arguments
        changed.pop("label_descriptions", None)
        return changed
    changed["id2label"] = {str(row): label for row, label in enumerate(labels)}
    changed["label2id"] = {label: row for row, label in enumerate(labels)}
    changed.pop("num_labels", None)
    return changed


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` as transformers writes it: sorted keys, two spaces."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
