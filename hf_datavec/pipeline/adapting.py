"""Learning coefficients for the tensors whose method asks for it, before the merge itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import adaptation, models
from hf_datavec import survey as surveys
from hf_datavec.adaptation import Learned, Settings
from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError, RunError
from hf_datavec.images import ImageSet, evenly_spread
from hf_datavec.plan import Plan, Step
from hf_datavec.progress import progress
from hf_datavec.vector import refuse_nonfinite, rows_by_label

if TYPE_CHECKING:
    import torch

COEFFICIENTS_FILE = "coefficients.json"


@dataclass(frozen=True)
class Adaptation:
    """What was learned on which images, for the card and the file beside the model."""

    learned: Learned
    sites: tuple[str, ...]
    images: str
    digest: str
    count: int

    @property
    def text(self) -> str:
        """What was done, in a sentence."""
        first, last = self.learned.entropies[0], self.learned.entropies[-1]
        return (
            f"Coefficients for {len(self.learned.coefficients)} tensors of {len(self.sites)} sites were learned in "
            f"{len(self.learned.entropies)} steps on {self.count} unlabelled public images of `{self.images}` "
            f"(mean entropy of a batch {first:.3f} at first, {last:.3f} at last)."
        )

    def write(self, folder: Path) -> None:
        """Write coefficients and entropies beside the model."""
        data = {
            "images": self.images,
            "digest": self.digest,
            "sites": self.sites,
            "entropies": self.learned.entropies,
            "coefficients": self.learned.coefficients,
        }
        (folder / COEFFICIENTS_FILE).write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def adapt(plan: Plan, images: ImageSet, folder: Path, *, device: str) -> Adaptation:
    """Coefficients for a plan, learned on the images; `folder` holds the model to start from.

    Raises: InputError for a single image; RunError when predictions are not finite.
    """
    steps = [step for step in plan.steps if step.is_merged and step.method.learned]
    restore = plan.recipe.recalibrate
    assert restore is not None  # the recipe has been refused without images
    count = min(restore.count, len(images))
    if count < 2:
        hint = "name a folder with some hundreds, and raise recalibrate.count"
        raise InputError(f"coefficients cannot be learned on {count} image of '{images.text}'", hint=hint)
    network = models.load(folder, device=device)
    models.refuse_offloaded(network, "learning coefficients")
    chosen = steps[0].method.chosen(steps[0].options)
    if any(step.method.chosen(step.options) != chosen for step in steps):
        raise InputError(
            f"'{steps[0].method.name}' is given different options for some tensors; all are learned at once"
        )
    settings = Settings(chosen["steps"], chosen["learning_rate"], max(2, restore.batch_size), plan.recipe.merge.seed)
    bar = progress(range(settings.steps), text="adapt", total=settings.steps, unit="step")

    spread = evenly_spread(len(images), count)

    def load(indices: Sequence[int]) -> torch.Tensor:
        return images.tensors(network.preprocess, [spread[index] for index in indices])

    def notify() -> None:
        next(bar, None)

    learned = adaptation.learn(network, dict(_parts(plan, steps)), load, count, settings, notify=notify)
    if not all(math.isfinite(value) for row in learned.coefficients.values() for value in row):
        raise RunError(
            "learning diverged: the coefficients are not finite", hint="use a smaller learning_rate or scale"
        )
    names = tuple(one.name for one in plan.contributions)
    return Adaptation(learned, names, images.fetched.reference.identity, images.digest, count)


def _parts(plan: Plan, steps: list[Step]) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Base and scaled vectors of each tensor, heads with a row for each label of the result."""
    import torch

    factors = surveys.take(plan).factors
    for step in steps:
        base, rows = plan.base.tensors.read(step.name), []
        if step.role is Role.HEAD:
            base = rows_by_label(base, plan.base.labels, plan.labels)
        scale = 1.0 if math.isnan(step.scale) else step.scale
        for one, factor in zip(plan.contributions, factors, strict=True):
            row = one.source.read(step.name)
            refuse_nonfinite(row, step.name, one.name)
            row = rows_by_label(row, one.labels, plan.labels) if step.role is Role.HEAD else row
            rows.append(row * (factor * scale))
        yield step.name, (base, torch.stack(rows))
