"""The network of one setting of a search after the other: written and loaded once, and from then on set in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import fuse, models, processes
from hf_datavec.checkpoint import Role
from hf_datavec.geometry import Gram
from hf_datavec.models import Network
from hf_datavec.plan import Plan
from hf_datavec.tensors import TORCH_NAMES

if TYPE_CHECKING:
    import torch

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

    def take(self, pieces: Iterable[tuple[str, Values]]) -> None:
        """Give tensors the values that a file would give them: each whole, or flat and piece by piece in its order."""
        import torch

        with torch.no_grad():
            for name, some in itertools.groupby(pieces, key=lambda piece: piece[0]):
                tensor = self.tensors[name]
                # One whose memory has another order than the file takes its values at once.
                flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)
                done = 0
                for _, piece in some:
                    values = torch.as_tensor(piece).reshape(-1)
                    flat[done : done + len(values)].copy_(values)
                    done += len(values)
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))


@dataclass
class Tried:
    """Makes networks in a folder that holds everything of the fused model but its weights."""

    folder: Path
    make: Make
    restored: Restored
    device: str
    kept: InMemory | None = field(default=None, init=False)

    def network(self, plan: Plan, writing: Plan) -> Network:
        """The restored network of a plan, its bits those that a merge writes; it is good until the next is asked for.

        A network that does not fit its device, or whose tensors are others in memory than in the file, is written and
        loaded each time. Every process must call it.
        """
        if self.kept is None:
            self.make(plan, writing, Gram())
            network = models.load(self.folder, device=self.device)
            self.kept = _in_memory(network, plan)
            return network
        # Counters are the base's in every trial.
        merged = {step.name for step in writing.steps if step.role is not Role.CONSTANT}
        self.kept.take(fuse.pieces(writing, only=merged, device=self.device))
        self.kept.take(_as_stored(plan, self.restored(plan, self.kept.network)))
        return self.kept.network


def _as_stored(plan: Plan, values: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors rounded to the types that they have in the file."""
    import torch

    types = {step.name: step.record.dtype for step in plan.steps}
    for name, value in values.items():
        yield name, value.to(getattr(torch, TORCH_NAMES[types[name]]))


def _in_memory(network: Network, plan: Plan) -> InMemory | None:
    """The network with its tensors by their names in the file, where that is possible in every process."""
    # All go the same way, since writing takes exchanges that setting does not.
    if not all(processes.gathered([network.device is None])):
        return None
    # As in `statistic_layers`, only the first process writes names that can be read back.
    names = processes.on_main(lambda: models.stored_names(network))
    live = network.module.state_dict()
    shapes = {name: tuple(live[place].shape) for name, place in names.items()}
    if shapes != {step.name: tuple(step.record.shape) for step in plan.steps}:
        return None
    return InMemory(network, {name: live[place] for name, place in names.items()})
