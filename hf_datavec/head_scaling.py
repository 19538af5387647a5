"""A temperature put into a head: weights and bias divided by it, so that every library's probabilities have it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import writing
from hf_datavec.checkpoint import Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.tensors import open_folder

if TYPE_CHECKING:
    import torch


def scale_folder(folder: Path, temperature: float) -> str:
    """Divide the head in a model's folder by a temperature, in place; returns the new content digest.

    The answers stay, but for ties that rounding to the head's type makes or breaks.

    Raises: InputError for a head that is no single linear layer, or that is not finite once it is divided.
    """
    import torch

    checkpoint = open_checkpoint(folder)
    names = checkpoint.named(Role.HEAD)
    if not checkpoint.has_linear_head:
        raise InputError(f"the head of '{folder}' is no single linear layer ({', '.join(names)})")
    found = {name: divided(checkpoint.tensors.read(name), temperature) for name in names}
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            problem = f"'{name}' divided by the temperature {temperature:g} is not finite in {tensor.dtype}"
            raise InputError(problem, hint="use a temperature nearer to 1")
    writing.overwrite(checkpoint.records, found)
    return open_folder(folder).digest


def divided(tensor: torch.Tensor, temperature: float) -> torch.Tensor:
    """The quotient, rounded once to the tensor's own type."""
    return (tensor.double() / temperature).to(tensor.dtype)
