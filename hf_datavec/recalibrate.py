"""BatchNorm statistics after a merge: measured on public images, or combined from the sites' own.

A fused network's activations are distributed like those of none of its parents, so the running statistics
that came with the base no longer fit (arXiv 2211.08403, section 4). Weights are never changed here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import RunError
from hf_datavec.models import Network, normalization_layers

if TYPE_CHECKING:
    import torch

    from hf_datavec.plan import Contribution

# How many images are normalised together. Their activations at one layer are in memory at the same time, so
# the number is bounded; it is fixed, not an option, so that results do not depend on the machine.
JOINT = 512


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, in float64."""

    count: float
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """The population variance."""
        return self.deviation / max(self.count, 1.0)


def pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of the union of disjoint sets, in the order given (Chan et al. 1979, eq. 2.1)."""
    total = parts[0]
    for part in parts[1:]:
        count = total.count + part.count
        if not part.count:
            continue
        shift = part.mean - total.mean
        share = part.count / count
        deviation = total.deviation + part.deviation + shift**2 * (total.count * share)
        total = Moments(count, total.mean + shift * share, deviation)
    return total


def measure(values: torch.Tensor) -> Moments:
    """The moments per channel of a BatchNorm layer's input, shape (n, channels, ...)."""
    import torch

    channels = values.detach().transpose(0, 1).reshape(values.shape[1], -1).double()
    variance, mean = torch.var_mean(channels, dim=1, correction=0)
    return Moments(float(channels.shape[1]), mean, variance * channels.shape[1])


def statistics(
    network: Network,
    load: Callable[[Sequence[int]], torch.Tensor],
    *,
    count: int,
    batch_size: int = 64,
    notify: Callable[[int], None] | None = None,
) -> int:
    """Set the running statistics to the exact moments of `count` images; returns how many layers were set.

    `load` gives the preprocessed images of some indices, shape (n, channels, height, width). Every layer is
    normalised by the moments of all images together (of `JOINT` at a time), as one huge batch in train mode
    would do, so the result depends neither on the batch size nor on the number of processes. Nothing but
    `running_mean` and `running_var` changes. `notify` is told the number of images each time some are done.
    """
    from accelerate import PartialState

    layers = normalization_layers(network.module)
    if not layers:
        return 0
    groups = -(-count // JOINT)
    found: dict[Any, list[Moments]] = {}
    state = PartialState()
    with _only_measuring(network.module):
        for group in range(groups):
            first, end = count * group // groups, count * (group + 1) // groups
            mine = _share(range(first, end), state.process_index, state.num_processes)
            # A process without images still takes part in every exchange; its one guest image counts nothing.
            chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
            lockstep = _Lockstep(network, layers, counted=bool(chunks))
            lockstep.run([partial(load, chunk) for chunk in chunks or [range(first, first + 1)]])
            for layer, moments in lockstep.measured.items():
                found.setdefault(layer, []).extend(moments)
            if notify is not None:
                notify(end - first)
    for layer, parts in found.items():
        _assign(layer, pooled(parts))
    return len(found)


def _share(indices: range, process: int, processes: int) -> range:
    """The contiguous part of the indices that a process looks at; each index belongs to exactly one."""
    return indices[len(indices) * process // processes : len(indices) * (process + 1) // processes]


def _assign(layer: Any, moments: Moments) -> None:
    layer.running_mean.copy_(moments.mean)
    layer.running_var.copy_(moments.variance)


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
    layers: list[Any]
    counted: bool = True
    measured: dict[Any, list[Moments]] = field(default_factory=dict)

    def run(self, batches: list[Callable[[], torch.Tensor]]) -> None:
        self._turn, self._size = 0, len(batches)
        self._changed = threading.Condition()
        self._local = threading.local()
        self._arrived: list[tuple[Any, Moments]] = []
        self._failure: BaseException | None = None
        hooks = [layer.register_forward_pre_hook(self._stop) for layer in self.layers]
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

    def _stop(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        index = self._local.index
        moments = measure(inputs[0])
        if not self.counted:
            moments = Moments(0.0, moments.mean * 0, moments.deviation * 0)
        self._arrived.append((layer, moments))
        if index == self._size - 1:
            self._pool(layer)
        self._pass_turn(index)
        self._await_turn(index)

    def _pool(self, layer: Any) -> None:
        if len(self._arrived) != self._size or any(found is not layer for found, _ in self._arrived):
            raise RunError("the network takes another way for some images, so its layers have no common statistics")
        moments = _across_processes(pooled([moments for _, moments in self._arrived]))
        self._arrived.clear()
        self.measured.setdefault(layer, []).append(moments)
        _assign(layer, moments)

    def _await_turn(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index or self._failure is not None)
        if self._failure is not None:
            raise _AbandonedError

    def _pass_turn(self, index: int) -> None:
        with self._changed:
            self._turn = (index + 1) % self._size
            self._changed.notify_all()


def _across_processes(mine: Moments) -> Moments:
    from accelerate import PartialState

    if PartialState().num_processes == 1:
        return mine
    import torch
    from accelerate.utils import gather

    count = torch.full_like(mine.mean, mine.count)
    rows = gather(torch.stack([count, mine.mean, mine.deviation]).unsqueeze(0))
    return pooled([Moments(float(row[0, 0]), row[1], row[2]) for row in rows if float(row[0, 0])])


def moments(base: Checkpoint, contributions: Sequence[Contribution]) -> dict[str, torch.Tensor]:
    """The statistics of the mixture of the sites' data, by file name: law of total variance, in float64.

    `mu = sum_j w_j mu_j`, `var = sum_j w_j (var_j + (mu_j - mu)^2)`, weights normalised to one. A channel
    that is dead at a site can have a stored variance below zero by rounding, so each var_j is clamped at zero.
    """
    import torch

    total = sum(one.weight for one in contributions)
    weights = [one.weight / total for one in contributions]
    result: dict[str, torch.Tensor] = {}
    for name in base.named(Role.STATISTIC):
        if not name.endswith("running_mean"):
            continue
        variance_name = name.removesuffix("running_mean") + "running_var"
        means = _site_values(base, contributions, name)
        variances = _site_values(base, contributions, variance_name)
        mean = torch.zeros_like(means[0])
        for weight, value in zip(weights, means, strict=True):
            mean += weight * value
        variance = torch.zeros_like(mean)
        for weight, value, own in zip(weights, means, variances, strict=True):
            variance += weight * (own.clamp(min=0) + (value - mean) ** 2)
        result[name], result[variance_name] = mean, variance
    return result


def _site_values(base: Checkpoint, contributions: Sequence[Contribution], name: str) -> list[torch.Tensor]:
    own = base.tensors.read(name).double()
    return [own + one.source.read(name).double() for one in contributions]


def median_change(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """How far the channels' means moved: the median, in standard deviations of the statistics before."""
    import torch

    shifts = []
    for name, mean in sorted(after.items()):
        if name.endswith("running_mean") and name in before:
            spread = before[name.removesuffix("running_mean") + "running_var"].double().clamp(min=1e-12).sqrt()
            shifts.append(((mean.double() - before[name].double()) / spread).abs())
    return float(torch.cat(shifts).median()) if shifts else 0.0
