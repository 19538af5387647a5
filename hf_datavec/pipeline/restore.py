"""Restoring a fused network: which way, on what, and what has to be said about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec import models, processes, recalibrate, tensors, writing
from hf_datavec.errors import InputError
from hf_datavec.images import ImageSet, evenly_spread
from hf_datavec.plan import FEW_IMAGES, Plan
from hf_datavec.progress import progress
from hf_datavec.recalibrate import Domain, Gaussian, Pictures, Sites
from hf_datavec.recipe import Recalibrate

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restoration:
    """How a merge is restored, decided before anything is written; `caution` is empty when all is well."""

    mode: str
    sites: Sites
    domain: Domain
    caution: str = ""
    # What the sites' networks show on the public images, which every setting of a search needs and none changes.
    kept: list[Any] = field(default_factory=list)


def decide(plan: Plan, public: ImageSet | None, device: str) -> Restoration:
    """The mode, `auto` resolved, after holding the public images against the sites'. Warns on the log."""
    sites = recalibrate.sharing(plan.base, plan.contributions, device=device)
    wanted = plan.recipe.recalibrate
    if not plan.base.has_statistics or wanted is None or wanted.mode == "none":
        return Restoration("none", sites, Domain(None))
    domain, blind = Domain(None), False
    if public is not None:
        domain = recalibrate.compare(sites, calibration_pictures(sites, public, wanted))
        if wanted.mode == "tune" and not wanted.distils:
            blind = _labelled(public, wanted, plan.labels) is None
    distilled = wanted.mode == "tune" and wanted.distils
    everyone = len(sites.members) == len(plan.contributions)
    mode = (
        recalibrate.automatic(sites.shared, everyone, domain, images=public is not None)
        if wanted.mode == "auto"
        else _start(domain, sites)
        if distilled
        else wanted.mode
    )
    found = [recalibrate.cautions(mode, sites, [one.weight for one in plan.contributions], domain)]
    if public is not None and (count := min(wanted.count, len(public))) < FEW_IMAGES:
        found.append(f"Statistics of {_counted(count, 'image')} are mostly chance; some hundreds are usual.")
    if blind:
        found.append("Tuning on entropy is checked by no label and can make the model worse.")
    elif mode == "tune":
        found.append("Tuning learns the public images' mix of classes: where the clinics' differs, it can do harm.")
    caution = " ".join(filter(None, found))
    if domain.divergence is not None and recalibrate.kind(domain) not in caution:
        log.info("recalibrate: the public images are %s", recalibrate.kind(domain))
    if wanted.mode == "auto":
        log.info("recalibrate: auto chooses '%s'", mode)
    if caution:
        log.warning("warning: %s", caution)
    return Restoration(mode, sites, domain, caution)


def _start(domain: Domain, sites: Sites) -> str:
    """The mode whose statistics fit the images, so that training need not make up for them."""
    return "relative" if domain.foreign and sites.shared else "statistics"


def restore(plan: Plan, folder: Path, public: ImageSet | None, chosen: Restoration, digest: str) -> tuple[str, str]:
    """Restore the network in the written folder; returns what to say about it and the new content digest."""
    if not plan.base.has_statistics:
        return "The network has no BatchNorm, so no statistics needed restoring.", digest
    if plan.recipe.recalibrate is None or chosen.mode == "none":
        return " ".join(filter(None, ("BatchNorm statistics are the base's.", chosen.caution))), digest
    text, restored = _found(plan, lambda: models.load(folder, device=chosen.sites.device), public, chosen)
    written = processes.on_main(lambda: _write(plan, folder, restored))
    return " ".join(filter(None, (text, chosen.caution))), written


def restored(
    plan: Plan, network: models.Network, public: ImageSet | None, chosen: Restoration
) -> Mapping[str, torch.Tensor]:
    """What restoring changes in a network with the plan's weights, which it is shown in: tensors by their names in the
    file."""
    if not plan.base.has_statistics or plan.recipe.recalibrate is None or chosen.mode == "none":
        return {}
    _, found = _found(plan, lambda: network, public, chosen)
    found = _changing(plan, found)
    _refuse_broken(found, {step.name: step.record for step in plan.steps})
    return found


def _found(
    plan: Plan, network_of: Callable[[], models.Network], public: ImageSet | None, chosen: Restoration
) -> tuple[str, dict[str, torch.Tensor]]:
    """A sentence about the restoration, and the restored tensors by their names in the file."""
    wanted = plan.recipe.recalibrate
    assert wanted is not None  # else nobody asks
    # A search may have given the sites other weights since.
    chosen = replace(chosen, sites=recalibrate.sharing(plan.base, plan.contributions, device=chosen.sites.device))
    if public is None:
        found = recalibrate.as_tensors(chosen.sites.home())
        return f"The statistics of {len(found) // 2} BatchNorm layers were combined from the sites' own.", found
    network = network_of()
    text = _on_images(network, public, wanted, chosen)
    if not text:
        problem = f"'{plan.base.folder}' stores running statistics, but none of its layers is a BatchNorm"
        raise InputError(problem, hint="use recalibrate: {mode: none}")
    return text, processes.on_main(lambda: models.stored(network, _wanted_names(chosen.mode)))


def _wanted_names(mode: str) -> Callable[[str], bool]:
    """Which tensors a mode may change, by their live names."""
    return lambda name: mode == "tune" or name.endswith(("running_mean", "running_var"))


def _on_images(network: models.Network, public: ImageSet, wanted: Recalibrate, chosen: Restoration) -> str:
    """Restore a network in memory; returns a sentence, empty when the network has no BatchNorm layer."""
    some = calibration_pictures(chosen.sites, public, wanted, network=network)
    mode = chosen.mode
    if mode == "tune":
        mode = _start(chosen.domain, chosen.sites)
    found = recalibrate.measured(mode, network, some, chosen.sites, kept=chosen.kept)
    recalibrate.assign(network, found.statistics)
    layers = len(found.statistics)
    if not layers:
        return ""
    named = _named(found, some, public)
    text = {
        "statistics": f"The statistics of {layers} BatchNorm layers were re-estimated on {named}.",
        "relative": f"The statistics of {layers} BatchNorm layers were carried over from "
        f"{_whose(chosen.sites)} by what merging changed on {named}.",
        "repair": f"The statistics of {layers} BatchNorm layers were set so that channels have the mean and spread "
        f"that they have in the sites' networks, with {_whose(chosen.sites)}, on {named}.",
    }[mode]
    if chosen.mode != "tune":
        return text
    # The steps depend on each other, so one process takes them; only its network is written.
    return f"{text} {processes.on_main(lambda: _tuned(network, public, some, wanted))}"


def _named(found: recalibrate.Found, pictures: Pictures, public: ImageSet) -> str:
    """The images that were looked at, and why no more of them."""
    of = f"`{public.fetched.reference.identity}`"
    if found.images == pictures.count:
        return f"{_counted(pictures.count, 'image')} of {of}"
    converged = f"had converged (standard error {found.error:.3f} standard deviations)"
    log.info("recalibrate: after %d of %d images the statistics %s", found.images, pictures.count, converged)
    return f"{_counted(found.images, 'image')} of {of}, after which they {converged}"


def _whose(sites: Sites) -> str:
    return "the sites' own statistics" if sites.shared else "the base's statistics"


def _tuned(network: models.Network, public: ImageSet, pictures: Pictures, wanted: Recalibrate) -> str:
    rows = _labelled(public, wanted, network.labels)
    if rows is not None:
        rows = [rows[index] for index in evenly_spread(len(public), pictures.count)]
    tuned = recalibrate.tune(
        network,
        pictures,
        rows,
        parameters=wanted.tuning.trained,
        steps=wanted.tuning.steps,
        learning_rate=wanted.tuning.learning_rate,
    )
    if tuned.why_undone:
        undone = f"Tuning was undone, since {tuned.why_undone}"
        log.warning("warning: %s", undone)
        return f"{undone}."
    what = "All weights" if wanted.tuning.trained == "all" else "The BatchNorm layers' weights"
    how = "the images' labels" if rows is not None else "the entropy of predictions, which no label checks"
    return f"{what} were then tuned by {_counted(wanted.tuning.steps, 'step')} on {how}."


def _labelled(public: ImageSet, wanted: Recalibrate, labels: tuple[str, ...]) -> list[int] | None:
    """The row of each image's label, None when tuning goes by entropy. Raises: InputError for missing labels."""
    if wanted.tuning.loss == "entropy" or (wanted.tuning.loss is None and public.label_column is None):
        return None
    try:
        return public.label_rows(labels)
    except InputError as error:
        hint = f"{error.hint}; or use tune: {{loss: entropy}}, which looks at no label"
        raise InputError(error.problem, hint=hint) from None


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def calibration_pictures(
    sites: Sites, public: ImageSet, wanted: Recalibrate, *, network: models.Network | None = None
) -> Pictures:
    """The calibration images as every network here takes them, prepared once each; a bar for the fused one's."""
    count = min(wanted.count, len(public))
    chosen = evenly_spread(len(public), count)
    preprocess = network.preprocess if network else models.preprocess(sites.base)
    with_bar = progress(range(count), text="recalibrate", total=count, unit="image") if network else iter(())

    def load(indices: Sequence[int]) -> torch.Tensor:
        return public.tensors(preprocess, [chosen[index] for index in indices])

    def notify(images: int) -> None:
        for _ in range(images):
            next(with_bar, None)

    return Pictures(count, load, wanted.batch_size, notify if network else None, wanted.tolerance)


def _write(plan: Plan, folder: Path, restored: Mapping[str, torch.Tensor]) -> str:
    """Put restored tensors into the written file; returns the new content digest."""
    digest = overwrite(plan, folder, restored)
    before = recalibrate.of_base(plan.base)
    after = {
        name: Gaussian(restored[f"{name}.running_mean"].double(), restored[f"{name}.running_var"].double())
        for name in before
    }
    change = recalibrate.median_change(before, after)
    log.info("BatchNorm means moved by %.2f standard deviations of the base's (median of all channels)", change)
    return digest


def overwrite(plan: Plan, folder: Path, values: Mapping[str, torch.Tensor]) -> str:
    """Put tensors into the written file; returns its new content digest. Raises: InputError for values not finite."""
    stored = tensors.open_folder(folder)
    changing = _changing(plan, values)
    _refuse_broken(changing, stored.records)
    writing.overwrite(stored.records, changing)
    return tensors.open_folder(folder).digest


def _changing(plan: Plan, restored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in restored.items() if plan.base.roles[name].value != "constant"}


def _refuse_broken(restored: Mapping[str, torch.Tensor], records: Mapping[str, tensors.Record]) -> None:
    """Raise InputError when restored tensors are NaN or infinite, or become so in the type they are stored in."""
    import torch

    for name, value in sorted(restored.items()):
        dtype = records[name].dtype
        if not bool(torch.isfinite(value.to(getattr(torch, tensors.TORCH_NAMES[dtype]))).all()):
            raise InputError(
                f"the restored statistics '{name}' are not finite in {dtype}",
                hint="the fused weights are too large: use a smaller scale, or dtype: float32",
            )
