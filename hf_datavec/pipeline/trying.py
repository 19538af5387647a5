"""The network of one setting of a search after the other: built once, and set in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import fuse, models, offloading, processes
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.geometry import Gram
from hf_datavec.models import Network
from hf_datavec.plan import Plan
from hf_datavec.tensors import TORCH_NAMES, Record, StoredTensors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from hf_datavec.writing import Values

    # Writes and restores a fused model, from the plan that recipe and card tell, the plan that makes its weights,
    # and what the sites' vectors are shown to.
    Make = Callable[[Plan, Plan, Gram], object]
    # The tensors, by their names in the file, that restoring a network with a plan's weights gives it.
    Restored = Callable[[Plan, Network], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class InMemory:
    """A network in memory whose tensors are written over, by their names in the model's file."""

    network: Network
    tensors: Mapping[str, torch.Tensor]
    # Of tensors whose values lie in memory as they would in the file, these values (d,).
    rooms: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def take(self, pieces: Iterable[tuple[str, Values]]) -> None:
        """Give tensors the values that a file would give them: each whole, or flat and piece by piece in its order.

        Pieces that were made in `rooms` are there already.
        """
        import numpy as np
        import torch

        with torch.no_grad():
            for name, some in itertools.groupby(pieces, key=lambda piece: piece[0]):
                tensor = self.tensors[name]
                # One whose memory has another order than the file takes its values at once.
                flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)
                done = 0
                for _, piece in some:
                    values = (
                        piece
                        if isinstance(piece, torch.Tensor)
                        else torch.from_numpy(np.require(piece, requirements="W"))
                    ).reshape(-1)
                    place = flat[done : done + len(values)]
                    if place.data_ptr() != values.data_ptr():
                        place.copy_(values)
                    done += len(values)
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))


@dataclass
class Tried:
    """Makes networks of plans with the same tensors; `folder` holds all of the fused model but its weights."""

    folder: Path
    plan: Plan
    make: Make
    restored: Restored
    device: str

    def network(self, plan: Plan, writing: Plan) -> Network:
        """The restored network of a plan, its bits those that a merge writes; it is good until the next is asked for.

        A network that does not fit its device, or whose tensors are others in memory than in the file, is written and
        loaded each time. Every process must call it.
        """
        if self.kept is None:
            self.make(plan, writing, Gram())
            return models.load(self.folder, device=self.device)
        # Counters are the base's in every trial.
        merged = {step.name for step in writing.steps if step.role is not Role.CONSTANT}
        self.kept.take(fuse.pieces(writing, only=merged, device=self.device, into=self.kept.rooms))
        self.kept.take(_as_stored(plan, self.restored(plan, self.kept.network)))
        return self.kept.network

    @cached_property
    def kept(self) -> InMemory | None:
        """The network that takes the weights of each plan, where that is possible in every process."""
        records = {step.name: step.record for step in self.plan.steps}
        checkpoint = replace(
            self.plan.base, folder=self.folder, labels=self.plan.labels, tensors=StoredTensors(records)
        )
        # All go the same way, since writing takes exchanges that setting does not.
        if not all(processes.gathered([not offloading.places(checkpoint, self.device)])):
            return None
        network = _without_weights(self.plan, checkpoint, self.device)
        # As in `statistic_layers`, only the first process writes names that can be read back.
        names = processes.on_main(lambda: models.stored_names(network))
        live = network.module.state_dict()
        shapes = {name: tuple(live[place].shape) for name, place in names.items()}
        if shapes != {name: tuple(record.shape) for name, record in records.items()}:
            return None
        tensors = {name: live[place] for name, place in names.items()}
        rooms = {name: one.view(-1).numpy() for name, one in tensors.items() if _lies_as_stored(one, records[name])}
        return InMemory(network, tensors, rooms)


def _as_stored(plan: Plan, values: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors rounded to the types that they have in the file."""
    import torch

    types = {step.name: step.record.dtype for step in plan.steps}
    for name, value in values.items():
        yield name, value.to(getattr(torch, TORCH_NAMES[types[name]]))


def _without_weights(plan: Plan, checkpoint: Checkpoint, device: str) -> Network:
    """The network with the base's counters and whatever its memory holds for all else.

    That memory is no mapped file, of which the system would make a copy, page by page, for the first setting.
    """
    import torch

    tensors = {
        step.name: plan.base.tensors.read(step.name).clone()
        if step.role is Role.CONSTANT
        else torch.empty(step.record.shape)
        for step in plan.steps
    }
    return models.made_of(checkpoint, tensors, device=device)


def _lies_as_stored(tensor: torch.Tensor, record: Record) -> bool:
    same_type = str(tensor.dtype) == f"torch.{TORCH_NAMES.get(record.dtype)}"
    return same_type and tensor.device.type == "cpu" and tensor.is_contiguous()
