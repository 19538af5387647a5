"""The confidence of a fused network: a temperature that is given, fitted or declared, put into its head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec import head_scaling, models, recalibrate, temperature, variants
from hf_datavec.ensemble import MOST_IMAGES, Ensemble
from hf_datavec.errors import RunError
from hf_datavec.images import ImageSet, evenly_spread
from hf_datavec.pipeline.restore import calibration_pictures
from hf_datavec.plan import FEW_IMAGES, Plan
from hf_datavec.recalibrate import Pictures
from hf_datavec.recipe import AUTO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

log = logging.getLogger(__name__)

WAY_OUT = "weights or BatchNorm statistics are broken: a smaller scale, or recalibration, may help"


@dataclass(frozen=True, slots=True)
class Scaled:
    """The plan with the temperature in place of how it is found, what to say about it, and the new content digest."""

    plan: Plan
    text: str
    digest: str

    @property
    def temperature(self) -> float | None:
        """What the head was divided by, if it was."""
        return given(self.plan)


def given(plan: Plan) -> float | None:
    """The temperature that a plan's recipe has as a number."""
    wanted = plan.recipe.recalibrate
    return None if wanted is None or isinstance(wanted.temperature, str) else float(wanted.temperature)


def scale(
    plan: Plan,
    folder: Path,
    images: ImageSet | None,
    ensemble: Ensemble | None,
    where: tuple[str, str],
    *,
    foreign: bool = False,
) -> Scaled:
    """Find the temperature that the recipe asks for and divide the head of the written model by it.

    `images` are the calibration images, which the `ensemble` has looked at, None where nothing is fitted on them;
    `where` are the device and the content digest so far. On `foreign` images the ensemble is no teacher.

    Raises: InputError for labels that are missing, RunError for a network that gives NaN.
    """
    device, digest = where
    wanted = plan.recipe.recalibrate
    if wanted is None or wanted.temperature == "none":
        return Scaled(plan, "", digest)
    if not plan.base.has_linear_head:
        return _skipped(plan, "its head is no single linear layer", digest)
    kind = _kind(plan, images)
    if kind is None:
        return _skipped(plan, "there are no calibration images, and not every site declares a temperature", digest)
    if kind == "ensemble" and foreign:
        return _skipped(plan, "the public images are of another kind than the sites'", digest)
    if isinstance(kind, str):
        found, how = _declared(plan) if kind == "sites" else _fitted(plan, folder, images, ensemble, device)
        found = float(f"{found:.4g}")  # more digits would be noise; the lock has these
    else:
        found, how = float(kind), "as the recipe says"
    text = f"Confidence was scaled by temperature {found:g}, {how}."
    log.info("recalibrate: %s", text)
    return Scaled(variants.tempered(plan, found), text, head_scaling.scale_folder(folder, found))


def _skipped(plan: Plan, why: str, digest: str) -> Scaled:
    text = f"Confidence was not scaled, since {why}."
    log.info("note: %s", text)
    return Scaled(variants.tempered(plan, "none"), text, digest)


def _kind(plan: Plan, images: ImageSet | None) -> float | str | None:
    """The temperature, or where it comes from; None when `auto` finds nothing to go by."""
    wanted = plan.recipe.recalibrate
    assert wanted is not None  # else nobody asks
    if wanted.temperature != AUTO:
        return wanted.temperature
    if images is not None:
        return "ensemble"
    return "sites" if all(one.temperature is not None for one in plan.contributions) else None


def _declared(plan: Plan) -> tuple[float, str]:
    """The mean of the sites' temperatures, by their numbers of images where all declare these."""
    declared = [one.temperature or 1.0 for one in plan.contributions]  # sites without one have been refused
    counts = [one.examples for one in plan.contributions]
    known = [float(count) for count in counts if count]
    by_counts = len(known) == len(counts)
    found = temperature.weighted_mean(declared, known if by_counts else [1.0] * len(counts))
    how = "weighed by their numbers of images" if by_counts else "all alike"
    return found, f"the mean of what {_counted(len(declared), 'site')} declared, {how}"


def _fitted(
    plan: Plan, folder: Path, images: ImageSet | None, ensemble: Ensemble | None, device: str
) -> tuple[float, str]:
    import numpy as np

    wanted = plan.recipe.recalibrate
    assert wanted is not None  # else nothing is fitted
    assert images is not None  # a recipe without has been refused
    sites = recalibrate.sharing(plan.base, plan.contributions, device=device)
    pictures = calibration_pictures(sites, images, wanted)
    if wanted.temperature != "labels":
        pictures = recalibrate.fewer(pictures, MOST_IMAGES)  # those that the ensemble has looked at
    found = log_probabilities(models.load(folder, device=device), pictures)
    on = f"{_counted(pictures.count, 'image')} of `{images.fetched.reference.identity}`"
    if wanted.temperature == "labels":
        rows = np.array(images.label_rows(plan.labels))[evenly_spread(len(images), pictures.count)]
        result, how = temperature.fit_labels(found, rows), f"fitted to the labels of {on}"
        if pictures.count < FEW_IMAGES:
            log.warning("warning: a temperature of %s is mostly chance; some hundreds are usual", on)
    else:
        if ensemble is None:
            raise RunError(
                "no site's network gives finite answers, so no temperature can be fitted", hint=f"their {WAY_OUT}"
            )
        result = temperature.fit_ensemble(found, ensemble.probabilities)
        how = f"fitted to the ensemble of {_counted(len(ensemble.names), 'site')} on {on}"
    if result in (temperature.LEAST, temperature.MOST):
        log.warning("warning: the temperature %g is an end of its range; the images may tell nothing of it", result)
    return result, how


def log_probabilities(network: models.Network, pictures: Pictures) -> Floats:
    """A network's log-probabilities (n, labels) for pictures. Raises: RunError for NaN or infinite logits."""
    import numpy as np

    return np.concatenate(list(_batches(network, pictures)))


def _batches(network: models.Network, pictures: Pictures) -> Iterator[Floats]:
    import torch

    for start in range(0, pictures.count, pictures.batch_size):
        with torch.no_grad():
            some = range(start, min(start + pictures.batch_size, pictures.count))
            logits = network.logits(pictures.load(some)).double()
        if not bool(torch.isfinite(logits).all()):
            problem = "a network gives NaN or infinite values, so no temperature can be fitted"
            raise RunError(problem, hint=f"its {WAY_OUT}")
        yield torch.log_softmax(logits, dim=1).cpu().numpy()


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
