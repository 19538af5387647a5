"""Forward passes of all batches in lockstep, so that a layer's statistics are those of all images at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_datavec import processes
from hf_datavec.errors import RunError
from hf_datavec.images import evenly_spread
from hf_datavec.models import Network, statistic_layers
from hf_datavec.recalibrate.pooling import Channels, Images, Measured, across_processes, all_of, measure, summed

if TYPE_CHECKING:
    import torch

# How many images are normalised together. Their activations at one layer are in memory at the same time, so
# the number is bounded; it is fixed, not an option, so that results do not depend on the machine.
JOINT = 512
# For a network whose layers cannot be measured.
WAY_OUT = "restore with `mode: moments`, which needs no images, or with `mode: none`"

Settle = Callable[[str, Measured], Channels]


@dataclass(frozen=True, slots=True)
class Pictures:
    """How many images there are, how they are had by index, and how many at a time.

    `load` gives preprocessed images, shape (n, channels, height, width); `notify` is told each time some are done.
    Beyond `JOINT` images, those that are left are not looked at once the standard error of every layer's statistics
    is at most `tolerance`.
    """

    count: int
    load: Callable[[Sequence[int]], torch.Tensor]
    batch_size: int = 64
    notify: Callable[[int], None] | None = None
    tolerance: float = 0.0


def observe(
    network: Network,
    pictures: Pictures,
    *,
    settle: Settle | None = None,
    logits: list[torch.Tensor] | None = None,
) -> dict[str, Measured]:
    """The moments of every BatchNorm layer's input over all pictures, by the layer's name in the file.

    Every layer is normalised by the moments of all images together (of `JOINT` at a time), as one huge batch in
    train mode would do, so the result depends neither on the batch size nor on the number of processes. `settle`
    may choose other statistics to go on with, once it is told a layer's moments. The layers keep what they were
    last given; nothing else changes. `logits` gets what the network gave for each batch of this process.
    """
    layers = statistic_layers(network)
    if not layers:
        return {}
    groups = -(-pictures.count // JOINT)
    found: dict[str, list[Measured]] = {}
    with _only_measuring(network.module):
        for group in range(groups):
            # Every groups-th picture, so that the first group already is a sample of all classes.
            images, size = range(group, pictures.count, groups), pictures.batch_size
            # Whole batches are shared out, so that they are the same in any number of processes.
            chunks = processes.share([images[start : start + size] for start in range(0, len(images), size)])
            # A process without images still takes part in every exchange; its one guest image counts nothing.
            lockstep = _Lockstep(network, layers, settle or _as_measured, counted=bool(chunks))
            lockstep.run([partial(pictures.load, chunk) for chunk in chunks or [images[:1]]])
            if logits is not None and chunks:
                logits += lockstep.logits
            for layer, measured in lockstep.measured.items():
                found.setdefault(layer, []).extend(measured)
            if pictures.notify is not None:
                pictures.notify(len(images))
            if max(all_of(parts).error for parts in found.values()) <= pictures.tolerance:
                break
    return {name: all_of(parts) for name, parts in found.items()}


def fewer(pictures: Pictures, count: int) -> Pictures:
    """At most `count` of the pictures, evenly spread and without a bar."""
    if pictures.count <= count:
        return replace(pictures, notify=None)
    spread = evenly_spread(pictures.count, count)

    def load(indices: Sequence[int]) -> torch.Tensor:
        return pictures.load([spread[index] for index in indices])

    return replace(pictures, count=count, load=load, notify=None)


def looked_at(found: Mapping[str, Measured], pictures: Pictures) -> Pictures:
    """Just the pictures that were looked at, in the same groups, for a network that must be shown the same ones."""
    groups, used, seen = -(-pictures.count // JOINT), 0, 0
    images = next((one.images for one in found.values()), pictures.count)
    while seen < images:
        seen += len(range(used, pictures.count, groups))
        used += 1

    def load(indices: Sequence[int]) -> torch.Tensor:
        return pictures.load([index % used + index // used * groups for index in indices])

    return replace(pictures, count=images, load=load, tolerance=0.0) if used < groups else pictures


def statistics(network: Network, pictures: Pictures) -> dict[str, Measured]:
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


def _as_measured(_: str, measured: Measured) -> Channels:
    return measured


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


@dataclass
class _Lockstep:
    """Several forward passes that all stop before each BatchNorm layer until its pooled moments are known.

    They are greenlets of one thread, in turn: memory holds all batches' activations at one layer, computation is one
    batch's, and torch's own threads are those of the caller, not a set for each pass, which would wake each other. The
    order is fixed, so the result is too.
    """

    network: Network
    layers: Mapping[str, Any]
    settle: Settle
    counted: bool = True
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)

    def run(self, batches: Sequence[Callable[[], torch.Tensor]]) -> None:
        from greenlet import greenlet

        self._passes = [greenlet(partial(self._forward, batch)) for batch in batches]
        with self._plainly(), contextlib.ExitStack() as stack:
            for one in self._passes:
                stack.callback(_end, one)
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(partial(self._stop, name)).remove)
            # Each goes on to its next layer, whose moments it gives, or to its end.
            while any(stops := [one.switch() for one in self._passes]):
                self._pool(stops)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Modes of torch's that the thread is in, set for float32 without gradients, and as they were afterwards."""
        import torch

        device = torch.device(self.network.device or self.network.module.device).type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    def _forward(self, batch: Callable[[], torch.Tensor]) -> None:
        # Passes end in turn as well, so these are in the order of the batches.
        self.logits.append(self.network.logits(batch()))

    def _pool(self, stops: Sequence[tuple[str, Images] | None]) -> None:
        arrived = [stop for stop in stops if stop is not None]
        name = arrived[0][0]
        if len(arrived) != len(stops) or any(found != name for found, _ in arrived):
            raise RunError(
                "the network takes another way for some images, so its layers have no common statistics", hint=WAY_OUT
            )
        mine = [images for _, images in arrived] if self.counted else []
        measured = summed(across_processes(mine))
        self.measured.setdefault(name, []).append(measured)
        _assign(self.layers[name], self.settle(name, measured))

    def _stop(self, name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        """Before a layer: tell what it would see, and wait until it has been given its statistics."""
        from greenlet import getcurrent

        here = getcurrent()
        if here not in self._passes:
            raise RunError(
                "a layer is met outside the passes that measure it, perhaps in threads of the network's own",
                hint=WAY_OUT,
            )
        with self._plainly():  # the modes of a pass are its own
            here.parent.switch((name, measure(inputs[0])))


def _end(one: Any) -> None:
    """End a pass that waits at a layer, since another has failed; what it says to that is of no interest."""
    if one:
        with contextlib.suppress(Exception):
            one.throw()
