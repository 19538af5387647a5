"""Ensemble distillation: the fused network learns what the sites' networks answer together to unlabelled public images.

Sources: arXiv 2006.07242 (FedDF, the ensemble of the clients' networks as the teacher), 1503.02531 (distillation),
2106.05237 (teacher and student see the same picture), 1710.09412 (mixup).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_datavec import agreement, ensemble, models, processes, recalibrate
from hf_datavec.agreement import Match
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.ensemble import Ensemble
from hf_datavec.errors import InputError, RunError
from hf_datavec.examples import shown
from hf_datavec.models import Network
from hf_datavec.progress import progress
from hf_datavec.recalibrate import HELD_OUT, Pictures, Sites
from hf_datavec.recipe import Trained, Tune

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hf_datavec.ensemble import Floats

    # Preprocessed pictures by their indices, and by which variant of each.
    Load = Callable[[Sequence[int], Sequence[int]], torch.Tensor]

# With fewer images one or two are held out, and these tell nothing.
FEWEST = 10
WEIGHT_DECAY = 0.01
# Of the distribution from which mixup draws how much of each of two pictures is in their mixture: Beta(1, 1).
MIXUP = 1.0
# Preprocessed pictures are kept when they fit: 512 of 3 x 224 x 224 take 308 MB.
KEPT_BYTES = 2**30
WHAT = {"all": "All weights", "head": "The last layer's weights", "affine": "The BatchNorm layers' weights"}


@dataclass(frozen=True, slots=True)
class Learned:
    """How the network related to its teacher on held-out images before and after learning from the other ones."""

    before: Match
    after: Match
    images: int
    held_out: int
    epochs: int
    parameters: Trained

    @property
    def undone(self) -> bool:
        """Whether the weights are again what they were, since the divergence did not fall."""
        return not self.after.divergence < self.before.divergence  # not `>=`: what is no number has not fallen

    @property
    def text(self) -> str:
        """What was done, in a sentence."""
        first, last = _shown(self.before.divergence), _shown(self.after.divergence)
        if self.undone:
            moved = "stayed at" if first == last else f"rose from {first} to"
            held = f"on {self.held_out} held-out images the divergence {moved} {last}"
            return f"Learning from the ensemble was undone: {held}."
        epochs = f"{self.epochs} epoch" + ("" if self.epochs == 1 else "s")
        same = f"agreement {100 * self.before.agreement:.0f} % to {100 * self.after.agreement:.0f} %"
        return (
            f"{WHAT[self.parameters]} then learned for {epochs} from the ensemble of the sites' networks on "
            f"{self.images - self.held_out} of {self.images} public images; on the other {self.held_out} the "
            f"divergence fell from {first} to {last} ({same})."
        )


def _shown(divergence: float) -> str:
    return f"{divergence:.2g}" if math.isfinite(divergence) else "a value that is not finite"


def refuse_few(images: int) -> None:
    """Raise InputError when there are too few images to learn from and to tell whether that helped."""
    if images < FEWEST:
        hint = "name a folder with some hundreds, and raise recalibrate.count"
        raise InputError(f"learning from the ensemble needs at least {FEWEST} images, got {images}", hint=hint)


def learn(
    network: Network, teacher: Ensemble, pictures: Pictures, *, sites: Sites, settings: Tune, seed: int
) -> Learned:
    """Train the network of the main process in place; every process must call it.

    `teacher` has looked at just these pictures. Every fifth is held out; when their divergence from the teacher, after
    a best temperature, does not fall, all weights get their old values back. Dropout is off and running statistics
    stay, so that each step sees the network as it will be used. One seed decides order, variants and mixtures.

    Raises: InputError for fewer than `FEWEST` pictures, for a loss that is not finite, when there is nothing to train,
    or when the network does not fit its device; RunError when no site's network gives finite answers.
    """
    refuse_few(pictures.count)
    models.refuse_offloaded(network, "learning from the ensemble")
    load = _loader(pictures, settings, seed)
    answers = _answers(teacher, pictures, sites, load, settings)
    return processes.on_main(
        lambda: _learned(network, sites.base, _Lessons(load, answers, teacher.labels), settings, seed)
    )


def _loader(pictures: Pictures, settings: Tune, seed: int) -> Load:
    """Pictures in any of their variants, which the seed decides; variant 0 is the picture as it is."""
    import torch

    kept: list[torch.Tensor] = []
    size = pictures.batch_size

    def fill() -> None:
        # Batch by batch, since the ensemble may hold the very batches that it has looked at.
        room = KEPT_BYTES
        for start in range(0, pictures.count, size):
            some = pictures.load(range(start, min(start + size, pictures.count)))
            room -= some.nbytes
            if room < 0:
                return
            kept.extend(some)

    def load(indices: Sequence[int], variants: Sequence[int]) -> torch.Tensor:
        if not kept:
            fill()
        one_by_one = (kept[index] if index < len(kept) else pictures.load([index])[0] for index in indices)
        pairs = zip(one_by_one, indices, variants, strict=True)
        return torch.stack(
            [one if not place else shown(one, settings.augment, (seed, place, index)) for one, index, place in pairs]
        )

    return load


def _answers(teacher: Ensemble, pictures: Pictures, sites: Sites, load: Load, settings: Tune) -> Floats:
    """The teacher's logarithms of probabilities for all variants of all pictures (variants, n, k)."""
    import numpy as np

    count, more = pictures.count, settings.variants - 1
    if not more:
        return teacher.taught(settings.teacher)[None]
    # Of variants nobody asks the pooled head, so that it has no say in the originals either.
    first = replace(teacher, head=None).taught(settings.teacher)
    places = [(index % count, 1 + index // count) for index in range(more * count)]

    def varied(indices: Sequence[int]) -> torch.Tensor:
        return load(*zip(*(places[index] for index in indices), strict=True))

    found = ensemble.of(sites, teacher.labels, Pictures(len(places), varied, pictures.batch_size))
    if found.is_silent:
        raise RunError("no site's network gives finite answers to the pictures' variants", hint="leave `augment` out")
    answers = found.taught(settings.teacher)
    return np.concatenate([first[None], answers.reshape(more, count, -1)])


@dataclass(frozen=True)
class _Lessons:
    """Pictures in variants, and the teacher's logarithms of probabilities (variants, n, labels)."""

    load: Load
    answers: Floats
    labels: tuple[str, ...]

    def match(self, network: Network, indices: Sequence[int], size: int) -> Match:
        """How a network relates to the teacher on some pictures as they are."""
        import numpy as np
        import torch

        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        with torch.no_grad():
            found = [network.logits(self.load(part, [0] * len(part))).double().cpu().numpy() for part in parts]
        logits = np.concatenate(found)
        if not np.isfinite(logits).all():
            return agreement.BROKEN
        return agreement.match(self.answers[0][indices], agreement.at_labels(logits, network.labels, self.labels))

    def targets(self, labels: tuple[str, ...]) -> Floats:
        """The probabilities (variants, n, k) of a network's labels; zero where the teacher does not know one."""
        import numpy as np

        found = np.stack([agreement.at_labels(part, self.labels, labels) for part in self.answers])
        return np.exp(agreement.log_softmax_of_known(found))


def _learned(network: Network, base: Checkpoint, lessons: _Lessons, settings: Tune, seed: int) -> Learned:
    import torch

    count = lessons.answers.shape[1]
    held = [index for index in range(count) if index % HELD_OUT == HELD_OUT - 1]
    used = [index for index in range(count) if index % HELD_OUT != HELD_OUT - 1]
    parameters = recalibrate.trained(network, settings.trained, head=_head(network, base, settings.trained))
    network.module.eval()
    start = [parameter.detach().clone() for parameter in parameters]
    before = lessons.match(network, held, settings.batch_size)
    # On a GPU, too, the same seed is to give the same weights, in float32.
    exactly = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(False), torch.enable_grad(), exactly:
        _train(network, parameters, (lessons, used), settings, seed)
    network.module.requires_grad_(False)
    after = lessons.match(network, held, settings.batch_size)
    found = Learned(before, after, count, len(held), settings.epochs, settings.trained)
    if found.undone:
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
    return found


def _head(network: Network, base: Checkpoint, parameters: Trained) -> set[str]:
    """The live names of the head's tensors, if they alone are trained."""
    if parameters != "head":
        return set()
    live = models.stored_names(network)
    return {live[name] for name in base.named(Role.HEAD)}


def _train(
    network: Network,
    parameters: list[torch.nn.Parameter],
    school: tuple[_Lessons, Sequence[int]],
    settings: Tune,
    seed: int,
) -> None:
    """AdamW on the cross-entropy with the teacher's probabilities, its rate falling to zero along a cosine."""
    import numpy as np
    import torch

    lessons, used = school
    targets = torch.from_numpy(lessons.targets(network.labels)).float()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    random, size = np.random.default_rng(seed), settings.batch_size
    steps, done = settings.epochs * -(-len(used) // size), 0
    for _ in progress(range(settings.epochs), text="distil", total=settings.epochs, unit="epoch"):
        order = random.permutation(used)
        for start in range(0, len(order), size):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            done += 1
            pixels, wanted = _batch(lessons.load, targets, order[start : start + size], random, mixup=settings.mixup)
            logits = network.logits(pixels)
            loss = -(wanted.to(logits.device) * logits.log_softmax(1)).sum(1).mean()
            if not math.isfinite(float(loss.detach())):
                problem = f"recalibrate: learning diverged at step {done} of {steps}"
                problem += f" (learning_rate {settings.learning_rate:g})"
                raise InputError(problem, hint="use a smaller learning_rate, or fewer epochs")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()


def _batch(
    load: Load, targets: torch.Tensor, indices: np.ndarray, random: np.random.Generator, *, mixup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in variants that are drawn, and their targets; with mixup each is mixed with another, targets alike."""
    variants = random.integers(len(targets), size=len(indices))
    pixels, wanted = load(indices.tolist(), variants.tolist()), targets[variants, indices]
    if mixup:
        share, other = float(random.beta(MIXUP, MIXUP)), random.permutation(len(indices))
        pixels = share * pixels + (1 - share) * pixels[other]
        wanted = share * wanted + (1 - share) * wanted[other]
    return pixels, wanted
