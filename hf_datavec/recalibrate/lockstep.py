"""Forward passes of all batches in lockstep, so that a layer's statistics are those of all images at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_datavec.errors import RunError
from hf_datavec.models import Network, statistic_layers
from hf_datavec.recalibrate.pooling import Channels, Moments, across_processes, measure, pooled

if TYPE_CHECKING:
    import torch

# How many images are normalised together. Their activations at one layer are in memory at the same time, so
# the number is bounded; it is fixed, not an option, so that results do not depend on the machine.
JOINT = 512

Settle = Callable[[str, Moments], Channels]


@dataclass(frozen=True, slots=True)
class Pictures:
    """How many images there are, how they are had by index, and how many at a time.

    `load` gives preprocessed images, shape (n, channels, height, width); `notify` is told each time some are done.
    """

    count: int
    load: Callable[[Sequence[int]], torch.Tensor]
    batch_size: int = 64
    notify: Callable[[int], None] | None = None


def observe(network: Network, pictures: Pictures, *, settle: Settle | None = None) -> dict[str, Moments]:
    """The exact moments of every BatchNorm layer's input over all pictures, by the layer's name in the file.

    Every layer is normalised by the moments of all images together (of `JOINT` at a time), as one huge batch in
    train mode would do, so the result depends neither on the batch size nor on the number of processes. `settle`
    may choose other statistics to go on with, once it is told a layer's moments. The layers keep what they were
    last given; nothing else changes.
    """
    from accelerate import PartialState

    layers = statistic_layers(network)
    if not layers:
        return {}
    groups = -(-pictures.count // JOINT)
    found: dict[str, list[Moments]] = {}
    state = PartialState()
    with _only_measuring(network.module):
        for group in range(groups):
            first, end = pictures.count * group // groups, pictures.count * (group + 1) // groups
            mine = _share(range(first, end), state.process_index, state.num_processes)
            # A process without images still takes part in every exchange; its one guest image counts nothing.
            size = pictures.batch_size
            chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
            lockstep = _Lockstep(network, layers, settle or _as_measured, counted=bool(chunks))
            lockstep.run([partial(pictures.load, chunk) for chunk in chunks or [range(first, first + 1)]])
            for layer, moments in lockstep.measured.items():
                found.setdefault(layer, []).extend(moments)
            if pictures.notify is not None:
                pictures.notify(end - first)
    return {name: pooled(parts) for name, parts in found.items()}


def statistics(network: Network, pictures: Pictures) -> dict[str, Moments]:
    """Set all running statistics to the exact moments of the pictures, and return them; nothing else changes."""
    found = observe(network, pictures)
    assign(network, found)
    return found


def assign(network: Network, statistics: Mapping[str, Channels]) -> None:
    """Set the running statistics of layers, by their names in the file."""
    layers = statistic_layers(network)
    for name, channels in statistics.items():
        _assign(layers[name], channels)


def _assign(layer: Any, channels: Channels) -> None:
    layer.running_mean.copy_(channels.mean)
    layer.running_var.copy_(channels.variance)


def _as_measured(_: str, moments: Moments) -> Channels:
    return moments


def _share(indices: range, process: int, processes: int) -> range:
    """The contiguous part of the indices that a process looks at; each index belongs to exactly one."""
    return indices[len(indices) * process // processes : len(indices) * (process + 1) // processes]


@contextlib.contextmanager
def _only_measuring(module: Any) -> Iterator[None]:
    # Evaluation mode for all: dropout stays off, and a BatchNorm layer uses the statistics it was just given,
    # in whatever way its class does that (timm's layers add activations of their own).
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class _AbandonedError(Exception):
    """Ends the other forward passes when one has failed."""


@dataclass
class _Lockstep:
    """Several forward passes that all stop before each BatchNorm layer until its pooled moments are known.

    Each batch has a thread, but only one runs at a time, in turn: memory holds all batches' activations at
    one layer, computation is one batch's. The order is fixed, so the result is too.
    """

    network: Network
    layers: Mapping[str, Any]
    settle: Settle
    counted: bool = True
    measured: dict[str, list[Moments]] = field(default_factory=dict)

    def run(self, batches: list[Callable[[], torch.Tensor]]) -> None:
        self._turn, self._size = 0, len(batches)
        self._changed = threading.Condition()
        self._local = threading.local()
        self._arrived: list[tuple[str, Moments]] = []
        self._failure: BaseException | None = None
        hooks = [layer.register_forward_pre_hook(partial(self._stop, name=name)) for name, layer in self.layers.items()]
        threads = [
            threading.Thread(target=self._forward, args=(index, batch), daemon=True)
            for index, batch in enumerate(batches)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # a signal in the calling thread: the passes must not go on without it
            self._failure = error
            raise
        finally:
            for hook in hooks:
                hook.remove()
        if self._failure is not None:
            raise self._failure

    def _forward(self, index: int, batch: Callable[[], torch.Tensor]) -> None:
        import torch

        self._local.index = index
        try:
            self._await_turn(index)
            with torch.no_grad():
                self.network.logits(batch())
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread
            self._failure = self._failure or error
        finally:
            self._pass_turn(index)

    def _stop(self, layer: Any, inputs: tuple[Any, ...], *, name: str) -> None:
        index = self._local.index
        moments = measure(inputs[0])
        if not self.counted:
            moments = Moments(0.0, moments.mean * 0, moments.deviation * 0)
        self._arrived.append((name, moments))
        if index == self._size - 1:
            self._pool(name, layer)
        self._pass_turn(index)
        self._await_turn(index)

    def _pool(self, name: str, layer: Any) -> None:
        if len(self._arrived) != self._size or any(found != name for found, _ in self._arrived):
            raise RunError("the network takes another way for some images, so its layers have no common statistics")
        moments = across_processes(pooled([moments for _, moments in self._arrived]))
        self._arrived.clear()
        self.measured.setdefault(name, []).append(moments)
        _assign(layer, self.settle(name, moments))

    def _await_turn(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index or self._failure is not None)
        if self._failure is not None:
            raise _AbandonedError

    def _pass_turn(self, index: int) -> None:
        with self._changed:
            self._turn = (index + 1) % self._size
            self._changed.notify_all()
