"""A fine-tuned network in whatever form a site has it: a model folder, a safetensors file, a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import Checkpoint, Role, open_checkpoint
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.tensors import TORCH_NAMES, Record, Tensors, open_file

if TYPE_CHECKING:
    import torch

PICKLES = (".pth", ".pt", ".bin")
# Wrappers that training scripts put around a state dict, and prefixes that they put before every name.
NESTED = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "timm_model.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class Tuned:
    """The tensors of a tuned network under the base's names, and the labels of its head's rows."""

    text: str
    tensors: Tensors
    labels: tuple[str, ...]
    names: Mapping[str, str]  # base name -> name in `tensors`; they differ for weights tied to another

    def read(self, name: str) -> torch.Tensor:
        """The tuned tensor that stands for the base's tensor of this name."""
        return self.tensors.read(self.names[name])


def open_tuned(
    path: Path, base: Checkpoint, *, labels: tuple[str, ...] | None = None, text: str | None = None
) -> Tuned:
    """The tuned network at `path`, checked against the base by names, shapes and types; messages call it `text`.

    Raises: InputError for everything that does not fit, told at once.
    """
    text = text or str(path)
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        return fitted(text, checkpoint.tensors, labels or checkpoint.labels, base)
    if not path.exists():
        raise InputError(f"there is no folder or file '{text}'")
    if path.suffix == ".safetensors":
        return fitted(text, open_file(path), labels or base.labels, base)
    if path.suffix in PICKLES:
        return fitted(text, StateDict.load(path, text), labels or base.labels, base)
    raise InputError(
        f"'{text}' is no tuned model",
        hint=f"expected a model folder, a .safetensors file or a state dict ({', '.join(PICKLES)})",
    )


def fitted(text: str, tensors: Tensors, labels: tuple[str, ...], base: Checkpoint) -> Tuned:
    """The tuned network with each of its tensors assigned to one of the base's. Raises as `open_tuned`."""
    names = {name: name for name in tensors.records if name in base.records}
    missing = [name for name in base.records if name not in names and base.roles[name] in (Role.WEIGHT, Role.HEAD)]
    errors, lost = [], []
    for name in missing:
        twin = _tied_to(name, base, names)
        if twin:
            names[name] = twin
        else:
            lost.append(name)
    if lost:
        errors.append(InputError(f"'{text}' lacks tensors of the base '{base.folder}': {listed(lost)}"))
    extra = [name for name in tensors.records if name not in base.records and not _is_alias(name, tensors, names)]
    if extra:
        errors.append(
            InputError(
                f"'{text}' has tensors that the base '{base.folder}' lacks: {listed(extra)}",
                hint="a vector needs the very network of the base; was another architecture trained?",
            )
        )
    errors += _misshapen(text, tensors, labels, base, names)
    raise_all(errors)
    return Tuned(text, tensors, labels, names)


def _misshapen(
    text: str, tensors: Tensors, labels: tuple[str, ...], base: Checkpoint, names: Mapping[str, str]
) -> list[InputError]:
    errors = []
    for name in sorted(names):
        ours, theirs = base.records[name], tensors.records[names[name]]
        shape = (len(labels), *ours.shape[1:]) if base.roles[name] is Role.HEAD else ours.shape
        if theirs.shape != shape:
            problem = f"'{text}': tensor '{name}' has shape {list(theirs.shape)}, expected {list(shape)}"
            hint = "name the rows of its head with --labels" if base.roles[name] is Role.HEAD else None
            errors.append(InputError(problem, hint=hint))
        elif base.roles[name] is not Role.CONSTANT and theirs.dtype not in TORCH_NAMES:
            errors.append(InputError(f"'{text}': tensor '{name}' has type {theirs.dtype}, expected a float type"))
    return errors


def _tied_to(name: str, base: Checkpoint, names: Mapping[str, str]) -> str | None:
    """The one present tensor that the base holds the same values for: a tied weight that was saved once."""
    ours = base.records[name]
    if len(ours.shape) < 2:
        return None  # biases are often all zero in several layers without being tied
    mine = base.tensors.read(name)
    if bool((mine == mine.reshape(-1)[:1]).all()):
        return None  # likewise a weight that is one repeated value
    twins = [
        other
        for other in names
        if base.records[other].shape == ours.shape
        and base.records[other].dtype == ours.dtype
        and bool((base.tensors.read(other) == mine).all())
    ]
    return twins[0] if len(twins) == 1 else None


def _is_alias(name: str, tensors: Tensors, names: Mapping[str, str]) -> bool:
    """Whether an extra tensor is a second name for one that the base knows, with the same values."""
    shape = tensors.records[name].shape
    return len(shape) >= 2 and any(
        tensors.records[other].shape == shape and bool((tensors.read(other) == tensors.read(name)).all())
        for other in names.values()
    )


@dataclass(frozen=True)
class StateDict:
    """Named tensors in memory, from a local pickle that was read with `weights_only=True`."""

    records: Mapping[str, Record]
    values: Mapping[str, Any]

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.values[name]
        return tensor

    @classmethod
    def load(cls, path: Path, text: str) -> StateDict:
        """The state dict in a file; wrappers and prefixes that training scripts add are taken off.

        Raises: InputError for a file that holds anything but tensors.
        """
        import torch

        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises many types; all mean the same to the user
            raise InputError(
                f"'{text}' cannot be read as a state dict of tensors only ({type(error).__name__})",
                hint="save it with torch.save(model.state_dict(), ...); pickles with other objects are refused",
            ) from None
        for key in NESTED:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not content or not all(map(_is_entry, content.items())):
            raise InputError(f"'{text}' holds no state dict (names with dense tensors)")
        values = _without_prefix(content)
        spelt = {getattr(torch, long): short for short, long in TORCH_NAMES.items()}
        spelt |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL", torch.int8: "I8"}
        records = {
            name: Record(name, spelt.get(value.dtype, str(value.dtype)), tuple(value.shape), path, 0)
            for name, value in sorted(values.items())
        }
        return cls(records, values)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    import torch

    name, value = entry
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _without_prefix(content: Mapping[str, Any]) -> dict[str, Any]:
    for prefix in PREFIXES:
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    return dict(content)
