"""What a site's images say of its network's weights: diagonal Fisher information and Gram matrices of inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_datavec.methods import as_matrix
from hf_datavec.models import Network, stored_names

if TYPE_CHECKING:
    import torch

    Load = Callable[[Sequence[int]], torch.Tensor]


def parameters(network: Network, names: Mapping[str, str]) -> dict[str, Any]:
    """The network's parameters by the keys of `names`, whose values are the names in its file."""
    live, places = dict(network.module.named_parameters(remove_duplicate=False)), stored_names(network)
    return {key: live[places[name]] for key, name in names.items() if places.get(name) in live}


def fisher(
    network: Network,
    weights: Mapping[str, Any],
    load: Load,
    count: int,
    *,
    notify: Callable[[int], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information of some weights over `count` images, by name, in float32.

    `F = 1/n sum_x sum_y p(y|x) (d log p(y|x) / d theta)^2`: the expectation over the network's own predictions, so
    neither labels nor randomness are needed. One backward pass per image and class; the network is in evaluation
    mode, so images do not touch each other.

    Source: arXiv 2111.09832 (Fisher merging), with the expectation over y in full.
    """
    import torch

    names = list(weights)
    total = {name: torch.zeros_like(weights[name], dtype=torch.float64) for name in names}
    with _only_gradients_of(network, list(weights.values())):
        for index in range(count):
            logarithms = torch.log_softmax(network.logits(load([index]))[0], dim=0)
            for place, chance in enumerate(logarithms.detach().double().exp().tolist()):
                found = torch.autograd.grad(
                    logarithms[place],
                    list(weights.values()),
                    retain_graph=place < len(logarithms) - 1,
                    allow_unused=True,
                )
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        total[name].add_(gradient.double().square(), alpha=chance)
            notify(1)
    return {name: (value / count).float().cpu() for name, value in total.items()}


@contextlib.contextmanager
def _only_gradients_of(network: Network, weights: Sequence[Any]) -> Iterator[None]:
    wanted = {parameter: parameter.requires_grad for parameter in network.module.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(any(parameter is weight for weight in weights))
        yield
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


def gram(
    network: Network, weights: Mapping[str, Any], load: Load, count: int, *, batch_size: int = 32,
    notify: Callable[[int], None] = lambda _: None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The mean of x x^T over the inputs x of each linear or convolutional weight, by name, (in, in) in float32.

    An input of a convolution is one patch, in the order in which the kernel is flattened. Depthwise and grouped
    kernels have none, since each of their channels has inputs of its own.

    Source: arXiv 2212.09849 (RegMean); patches as in arXiv 1602.01407 (KFC).
    """
    import torch

    by_weight = {weight: name for name, weight in weights.items() if as_matrix(tuple(weight.shape))}
    total: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = {}

    def observe(weight: Any, inputs: torch.Tensor) -> None:
        name = by_weight[weight]
        products = inputs.T @ inputs
        total[name] = total[name] + products.double() if name in total else products.double()
        seen[name] = seen.get(name, 0) + len(inputs)

    with torch.no_grad(), _watching(by_weight, observe):
        for start in range(0, count, batch_size):
            batch = range(start, min(start + batch_size, count))
            network.logits(load(batch))
            notify(len(batch))
    return {name: (value / seen[name]).float().cpu() for name, value in total.items()}


def _watching(weights: Mapping[Any, str], observe: Callable[[Any, torch.Tensor], None]) -> Any:
    """Show `observe` the inputs (n, in) of every linear map and convolution by one of the weights.

    The functions are watched, not the layers: subclasses of layers pad their input themselves before they call them.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), named: dict[str, Any] | None = None
        ) -> Any:
            given = dict(zip(ARGUMENTS, arguments, strict=False)) | (named or {})
            weight = given.get("weight")
            watched = function in (functional.linear, functional.conv2d, torch.conv2d)
            if watched and weight is not None and weight in weights:
                found = _patches(given) if weight.dim() == 4 else given["input"].reshape(-1, weight.shape[1])
                if found is not None:
                    observe(weight, found)
            return function(*arguments, **(named or {}))

    return Watching()


# The parameters of torch's functions for linear maps and convolutions, in their order.
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _patches(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The patches (n, in * k * k) that a convolution multiplies by its kernel; None for one by groups."""
    from torch.nn import functional

    if given.get("groups", 1) != 1:
        return None
    size, dilation = given["weight"].shape[2:], _pair(given.get("dilation", 1))
    inputs, padding = given["input"], given.get("padding", 0)
    if padding == "same":
        around = [dilation[axis] * (size[axis] - 1) for axis in (1, 0)]
        inputs = functional.pad(inputs, [part for both in around for part in (both // 2, both - both // 2)])
    unpadded = isinstance(padding, str)
    found: torch.Tensor = functional.unfold(
        inputs, size, dilation=dilation, padding=0 if unpadded else _pair(padding), stride=_pair(given.get("stride", 1))
    )
    return found.transpose(1, 2).reshape(-1, found.shape[1])


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
