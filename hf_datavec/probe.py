"""A linear probe: the last layer alone, fitted to what the network makes of the images as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_datavec import models
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError
from hf_datavec.linear_head import SHARPNESS
from hf_datavec.methods import all_methods
from hf_datavec.progress import progress

if TYPE_CHECKING:
    import torch

    from hf_datavec.images import ImageSet

# The head sees normalised features of order one, and all images at once: the loss is convex, so a rate that is
# large for a network is right, and some hundreds of steps reach its bottom on small data.
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2
BATCH = 64
# What least squares aim at for an image's label, and zero for all others.
TARGET = SHARPNESS


def fit(
    network: models.Network,
    base: Checkpoint,
    images: ImageSet,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    steps: int,
) -> None:
    """Train a head of zeros in place, everything else as it is; `loss` takes logits (n, k) and rows (n,).

    From zeros, so that few steps are a mild fit, whatever head there was before. Full batches with AdamW and a cosine
    schedule, so no order of images and no seed matters.

    Raises: InputError for a network whose head is no single linear layer, and for unreadable or unlabelled images.
    """
    import torch

    head = linear_head(network, base)
    rows = torch.tensor(images.label_rows(network.labels), device=network.module.device)
    inputs = torch.cat(list(_inputs(network, head, images)))
    parameters = list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        for parameter, slope in zip(parameters, torch.autograd.grad(loss(head(inputs), rows), parameters), strict=True):
            parameter.grad = slope
        optimizer.step()
    optimizer.zero_grad()


def fit_least_squares(network: models.Network, base: Checkpoint, images: ImageSet, target: float) -> None:
    """Give the network, in place, the head whose outputs are nearest to `target` times one-hot labels, without a bias.

    The target T decides how sure its answers are, not which they are:
    `W = T Y^T X (a X^T X + (1-a) diag(X^T X))^-1` for inputs X (n, features), one-hot labels Y (n, k), and the
    `off_diagonal` a of `regmean`. So `regmean` of the heads of several sites, weighed by their numbers of examples,
    is the head of all their images together, however classes are spread over the sites.

    Source: arXiv 2405.16240 (analytic federated learning), with the diagonal of arXiv 2212.09849 (RegMean).
    Raises: InputError as `fit`.
    """
    import torch

    head = linear_head(network, base)
    rows = torch.tensor(images.label_rows(network.labels))
    inputs = torch.cat(list(_inputs(network, head, images))).cpu().double()
    targets = target * torch.nn.functional.one_hot(rows, len(network.labels)).double()
    off_diagonal = all_methods()["regmean"].options["off_diagonal"].default
    products = off_diagonal * (inputs.T @ inputs)
    own = inputs.square().sum(0)
    products.diagonal().copy_(own.where(own > 0, 1.0))  # of an input that is always zero nothing is learned
    found = torch.linalg.solve(products, inputs.T @ targets).T
    with torch.no_grad():
        head.weight.copy_(found)
        if head.bias is not None:
            head.bias.zero_()


def feature_sums(
    network: models.Network, base: Checkpoint, images: ImageSet, labels: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The sums of `linear_head.FeatureSums` over all images, by the names of its fields, a row for each of `labels`.

    Features are what the head sees; the network is in evaluation mode, so images do not touch each other.

    Raises: InputError as `fit`.
    """
    import torch

    head = linear_head(network, base)
    rows, length = torch.tensor(images.label_rows(labels)), head.in_features + 1
    products = torch.zeros(length, length, dtype=torch.float64)
    by_label = torch.zeros(len(labels), length, dtype=torch.float64)
    done = 0
    for inputs in _inputs(network, head, images, text="features"):
        extended = torch.nn.functional.pad(inputs.cpu().double(), (0, 1), value=1.0)
        products += extended.T @ extended
        by_label.index_add_(0, rows[done : done + len(inputs)], extended)
        done += len(inputs)
    return {"products": products, "by_label": by_label}


def linear_head(network: models.Network, base: Checkpoint) -> Any:
    """The linear layer that the head's tensors belong to. Raises: InputError for a head that is no single one."""
    import torch

    live = models.stored_names(network)
    owners = sorted({live[name].rpartition(".")[0] for name in base.named(Role.HEAD)})
    found = network.module.get_submodule(owners[0])
    if len(owners) > 1 or not isinstance(found, torch.nn.Linear):
        raise InputError(
            f"the head of '{base.folder}' is no single linear layer ({', '.join(owners)})",
            hint="leave --probe-steps, --least-squares or --with features out, or start from one with a linear head",
        )
    return found


def features(
    network: models.Network, base: Checkpoint, load: Callable[[Sequence[int]], torch.Tensor], count: int
) -> torch.Tensor:
    """What the head sees of `count` preprocessed pictures, shape (count, features). Raises: InputError as `fit`."""
    import torch

    return torch.cat(list(_seen(network, linear_head(network, base), load, count, text="features")))


def _inputs(
    network: models.Network, head: Any, images: ImageSet, *, text: str = "linear probe"
) -> Iterator[torch.Tensor]:
    """What the head sees of the images, batch by batch, shape (b, features)."""
    return _seen(network, head, partial(images.tensors, network.preprocess), len(images), text=text)


def _seen(
    network: models.Network,
    head: Any,
    load: Callable[[Sequence[int]], torch.Tensor],
    count: int,
    *,
    text: str,
) -> Iterator[torch.Tensor]:
    import torch

    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.module.eval()
    try:
        starts = range(0, count, BATCH)
        for start in progress(starts, text=text, total=len(starts), unit="batch"):
            with torch.no_grad():
                network.logits(load(_some(count, start)))
            yield seen.pop().detach()
    finally:
        handle.remove()


def _some(count: int, start: int) -> Sequence[int]:
    return range(start, min(count, start + BATCH))
