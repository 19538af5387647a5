"""Images that a site does not train on: which ones, and what its network makes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec import temperature
from hf_datavec.errors import InputError
from hf_datavec.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_datavec.images import ImageSet
    from hf_datavec.models import Network

log = logging.getLogger(__name__)

BATCH = 64
# Below this many images, one more that is right moves the accuracy by more than ten points.
FEW = 10


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How many images were held out, the share of them that is right, and the temperature that fits their labels."""

    images: int
    accuracy: float
    temperature: float


def split(rows: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices to train on and those to hold out, both in order; `rows` are the labels' rows.

    Of each class the share is held out, rounded, but never all of it. The seed decides which.

    Raises: InputError when a share above zero holds out nothing.
    """
    import numpy as np

    held: list[int] = []
    for label in sorted(set(rows)):
        members = [index for index, row in enumerate(rows) if row == label]
        count = min(math.floor(share * len(members) + 0.5), len(members) - 1)
        # A generator for each class, so that images of another class change nothing.
        order = np.random.default_rng((seed, label)).permutation(len(members))
        held += [members[place] for place in order[:count]]
    if share > 0 and not held:
        problem = f"--hold-out {share:g} of {len(rows)} images in {len(set(rows))} classes holds out none"
        raise InputError(problem, hint="use a larger share, or leave it out")
    chosen = set(held)
    return [index for index in range(len(rows)) if index not in chosen], sorted(held)


def measure(network: Network, images: ImageSet) -> HeldOut:
    """What a network makes of held-out images. Raises: InputError for unreadable or unlabelled images."""
    import numpy as np

    if len(images) < FEW:
        log.warning("warning: only %d images were held out: what they tell is mostly chance", len(images))
    network.module.eval()
    rows = np.array(images.label_rows(network.labels))
    found = np.concatenate(list(_log_probabilities(network, images)))
    fitted = float(f"{temperature.fit_labels(found, rows):.4g}")
    return HeldOut(len(rows), float((found.argmax(1) == rows).mean()), fitted)


def _log_probabilities(network: Network, images: ImageSet) -> Iterator[NDArray[np.float64]]:
    import torch

    starts = range(0, len(images), BATCH)
    for start in progress(starts, text="held out", total=len(starts), unit="batch"):
        with torch.no_grad():
            some = range(start, min(start + BATCH, len(images)))
            logits = network.logits(images.tensors(network.preprocess, some))
        yield torch.log_softmax(logits.double(), dim=1).cpu().numpy()
