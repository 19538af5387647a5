"""A few training steps of a fused network on public images."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.errors import InputError
from hf_datavec.models import Network, normalization_layers, refuse_offloaded
from hf_datavec.recalibrate.lockstep import Pictures
from hf_datavec.recipe import Trained

if TYPE_CHECKING:
    import torch

# One image in so many is held out to tell whether training helps.
HELD_OUT = 5


@dataclass(frozen=True, slots=True)
class Tuned:
    """The loss before and after, on held-out images where there are labels, else on all; why it was undone, if so."""

    before: float
    after: float
    why_undone: str = ""


def tune(
    network: Network,
    pictures: Pictures,
    rows: Sequence[int] | None,
    *,
    parameters: Trained,
    steps: int,
    learning_rate: float,
) -> Tuned:
    """Train in place; `rows` are the pictures' labels, None for the entropy of predictions.

    Batches go round the pictures in a fixed, interleaved order, with Adam; the running statistics stay as they are,
    so each step sees the network as it will be used. With labels, every fifth picture is held out, and a tuning that
    does not lower their loss, or makes fewer of them right, is undone.

    Source for the entropy of predictions: arXiv 2006.10726, eq. 1.

    Raises: InputError when the loss is not finite, or there is nothing to train.
    """
    refuse_offloaded(network, "tuning")
    chosen = trained(network, parameters)
    network.module.eval()
    everything = range(pictures.count)
    checked = [index for index in everything if index % HELD_OUT == HELD_OUT - 1] if rows is not None else everything
    used = [index for index in everything if index not in checked] if rows is not None else everything
    if not checked:
        raise InputError(
            f"tuning on labels needs at least {HELD_OUT} images, got {pictures.count}",
            hint="name a folder with some hundreds, and raise recalibrate.count",
        )
    before, right = _whole_loss(network, pictures, rows, checked)
    start = [parameter.detach().clone() for parameter in chosen]
    _train(network, pictures, rows, used, _Training(chosen, steps, learning_rate))
    after, still_right = _whole_loss(network, pictures, rows, checked)
    why = ""
    if rows is not None and not after < before:
        why = f"it raised the loss on held-out images from {before:.3g} to {after:.3g}"
    elif rows is not None and still_right < right:
        why = f"of {len(checked)} held-out images it left {still_right} right, {right} before"
    if why:
        for parameter, value in zip(chosen, start, strict=True):
            parameter.data.copy_(value)
    return Tuned(before, after, why)


@dataclass(frozen=True, slots=True)
class _Training:
    parameters: list[torch.nn.Parameter]
    steps: int
    learning_rate: float


def _train(
    network: Network, pictures: Pictures, rows: Sequence[int] | None, used: Sequence[int], training: _Training
) -> None:
    import torch

    optimizer = torch.optim.Adam(training.parameters, lr=training.learning_rate)
    batches = -(-len(used) // pictures.batch_size)
    for step in range(training.steps):
        # Every batches-th picture: folders list one class after the other.
        chosen = used[step % batches :: batches]
        loss = _loss(network.logits(pictures.load(chosen)), rows, chosen)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"recalibrate: tuning diverged at step {step + 1} of {training.steps} "
                f"(learning_rate {training.learning_rate:g})",
                hint="use a smaller learning_rate, or fewer steps",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _whole_loss(
    network: Network, pictures: Pictures, rows: Sequence[int] | None, indices: Sequence[int]
) -> tuple[float, int]:
    """The mean loss of some pictures, and how many of them are right; none without labels."""
    import torch

    total, right, size = 0.0, 0, pictures.batch_size
    with torch.no_grad():
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            logits = network.logits(pictures.load(part))
            total += len(part) * float(_loss(logits, rows, part))
            if rows is not None:
                right += sum(found == rows[index] for found, index in zip(logits.argmax(1).tolist(), part, strict=True))
    return total / len(indices), right


def trained(network: Network, parameters: Trained, *, head: Collection[str] = ()) -> list[torch.nn.Parameter]:
    """What is trained, with gradients switched on for it alone; `head` are the live names of the head's tensors.

    Raises: InputError when the network has none of them.
    """
    chosen = list(network.module.parameters())
    if parameters == "head":
        chosen = [value for name, value in network.module.named_parameters() if name in head]
    if parameters == "affine":
        layers = normalization_layers(network.module)
        chosen = [value for layer in layers for value in (layer.weight, layer.bias) if value is not None]
    for parameter in network.module.parameters():
        parameter.requires_grad_(any(parameter is one for one in chosen))
    if not chosen:
        which = "the last layer has" if parameters == "head" else "the BatchNorm layers have"
        raise InputError(f"{which} no weights to tune", hint="use tune: {parameters: all}")
    return chosen


def _loss(logits: torch.Tensor, rows: Sequence[int] | None, indices: Sequence[int]) -> torch.Tensor:
    import torch

    if rows is not None:
        targets = torch.tensor([rows[index] for index in indices], device=logits.device)
        return torch.nn.functional.cross_entropy(logits, targets)
    logarithms = torch.log_softmax(logits, dim=1)
    return -(logarithms.exp() * logarithms).sum(1).mean()
