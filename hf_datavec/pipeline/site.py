"""A site's steps: start from the study base, train, compute the vector, hand it over."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_datavec import finetune as training
from hf_datavec import held_out, hub, study_base, vector, vector_file
from hf_datavec import noise as noising
from hf_datavec.card import licence
from hf_datavec.checkpoint import Checkpoint, Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import ImageSet, open_images
from hf_datavec.manifest import MANIFEST_FILE, Manifest, StatisticsNoise
from hf_datavec.models import largest_momentum, load, refuse_offloaded
from hf_datavec.pipeline import device as devices
from hf_datavec.pipeline.observing import Observed, measured
from hf_datavec.staging import partial_path, refuse_existing, staged
from hf_datavec.tuned import open_tuned
from hf_datavec.vector_card import vector_card

log = logging.getLogger(__name__)


def init(base: str, labels: Sequence[str], output: Path, *, image_size: int | None = None) -> Path:
    """Write the study base of some labels to `output`. Raises: InputError, see `study_base.write`."""
    refuse_existing(output)
    fetched = hub.fetch(hub.parse(base))
    pretrained = open_checkpoint(fetched.folder)
    with staged(output) as folder:
        study_base.write(folder, pretrained, tuple(labels), image_size=image_size)
    return output


def finetune(
    base: str,
    images: str,
    output: Path,
    *,
    settings: training.Settings,
    split: str | None = None,
    device: devices.Device = "auto",
) -> dict[str, int]:
    """Train the base on a site's images into `output`; returns images per label. An interrupted run goes on.

    Raises: InputError, see `finetune.train`.
    """
    refuse_existing(output)
    checkpoint = open_checkpoint(hub.fetch(hub.parse(base)).folder)
    return train(checkpoint, open_images(hub.parse(images), split=split), output, settings=settings, device=device)


def train(
    checkpoint: Checkpoint,
    pictures: ImageSet,
    output: Path,
    *,
    settings: training.Settings,
    device: devices.Device = "auto",
) -> dict[str, int]:
    """`finetune` for a base and images that are open already."""
    if settings.epochs == 0 and settings.probe_steps == 0 and not settings.least_squares:
        hint = "use --epochs, --probe-steps or --least-squares"
        raise InputError("no epochs and no probe steps: nothing would be trained", hint=hint)
    if settings.least_squares and settings.probe_steps:
        raise InputError("--least-squares and --probe-steps both fit the head", hint="leave one of them out")
    if settings.target != training.Settings().target and not settings.least_squares:
        raise InputError("--target is what --least-squares aim at, which is not given", hint="leave it out, or add it")
    if settings.least_squares and settings.class_balanced and settings.epochs == 0:
        hint = "leave --class-balanced out, or use --probe-steps"
        raise InputError("--least-squares counts every image alike, not every class", hint=hint)
    if settings.augment != "none" and settings.epochs == 0:
        raise InputError(
            "--augment is for epochs, of which there are none: heads see pictures as they are", hint="leave it out"
        )
    refuse_existing(output)
    held_out.split(pictures.label_rows(checkpoint.labels), settings.hold_out, settings.seed)  # refused early if at all
    network = load(checkpoint.folder, device=devices.choose(device))
    refuse_offloaded(network, "training")
    if partial_path(output.absolute()).exists():
        log.info("going on with the unfinished training of '%s'", output)
    with staged(output, keep_unfinished=True) as folder:
        examples = training.train(network, checkpoint, pictures, settings, folder)
        study_base.copy_description(checkpoint, folder, checkpoint.labels)
    return examples


def diff(
    base: str,
    tuned: str,
    output: Path,
    *,
    labels: tuple[str, ...] | None = None,
    with_statistics: bool = False,
    share_counts: bool = False,
    observed: Observed | None = None,
    noise: float | None = None,
) -> Manifest:
    """Write the vector (tuned minus base) with manifest and card to `output`; returns the manifest.

    `noise` is the epsilon that the statistics' noise is for. Raises: InputError when the tuned network does not fit
    the base, is not finite, or does not say what the noise must know.
    """
    refuse_existing(output)
    if labels is not None:
        study_base.refuse_labels(labels)
    fetched = hub.fetch(hub.parse(base))
    with hub.naming(fetched):
        checkpoint = open_checkpoint(fetched.folder)
    place = hub.fetch(hub.parse(tuned)).folder
    if (place.parent / MANIFEST_FILE).exists() and place.is_file():
        raise InputError(f"'{tuned}' is a file of a vector, not a tuned model")
    network = open_tuned(place, checkpoint, labels=labels, text=tuned)
    if with_statistics and not set(checkpoint.named(Role.STATISTIC)) <= set(network.names):
        raise InputError(f"'{tuned}' holds no BatchNorm statistics", hint="leave --with-statistics out")
    record = training.read_record(place) if place.is_dir() else {}
    if share_counts and not record.get("examples"):
        raise InputError(
            f"'{tuned}' does not say how many images it was trained on",
            hint="--share-counts needs the training.json that `hf-datavec finetune` writes",
        )
    if observed is not None and observed.runs_tuned and not place.is_dir():
        hint = "give the folder with config.json and model.safetensors"
        raise InputError(f"'{tuned}' is a file; second moments are measured on a model that can be run", hint=hint)
    exact = vector.TunedDifferences(checkpoint, network)
    differences, noised = (exact, None) if noise is None else _noised(exact, noise, record, with_statistics)
    with staged(output) as folder:
        beside = measured(observed, place, exact, folder) if observed else None
        manifest = vector_file.write(
            folder,
            differences,
            vector_file.base_identity(fetched, checkpoint),
            with_statistics=with_statistics,
            examples=record.get("examples") if share_counts else None,
            training=record.get("settings"),
            second_moments=beside,
            noise=noised,
            temperature=_temperature(record, tuned),
        )
        (folder / "README.md").write_text(vector_card(manifest, license=licence(fetched.folder)), "utf-8")
    return manifest


def _temperature(record: dict[str, Any], tuned: str) -> float | None:
    """The temperature of the held-out images in the record of a training, if there is one."""
    held = record.get("held_out")
    found = held.get("temperature") if isinstance(held, dict) else None
    if found is None or (isinstance(found, (int, float)) and 0 < found < math.inf):
        return None if found is None else float(found)
    hint = "train again with --hold-out, or remove held_out from it"
    raise InputError(f"'{tuned}': training.json has the temperature {found!r}, expected a number above 0", hint=hint)


def _noised(
    exact: vector.TunedDifferences, epsilon: float, record: dict[str, Any], with_statistics: bool
) -> tuple[vector_file.Differences, StatisticsNoise]:
    if not with_statistics:
        raise InputError("--noise is for statistics, but none are included", hint="add --with-statistics")
    images, batch_size = sum((record.get("examples") or {}).values()), record.get("settings", {}).get("batch_size")
    if not images or not batch_size:
        raise InputError(
            "--noise needs the number of training images and the batch size",
            hint="they are in the training.json that `hf-datavec finetune` writes",
        )
    # The base says how its layers average; some replace nearly all of it in each step.
    momentum = largest_momentum(load(exact.base.folder))
    return noising.noised(exact, epsilon=epsilon, images=images, batch_size=batch_size, momentum=momentum)


def push(folder: str, to: str, *, private: bool = True, revision: str | None = None, create_pr: bool = False) -> str:
    """Send a vector or model folder to a local place or a Hub repo; returns where it went.

    Raises: InputError for a folder that is neither, or is damaged.
    """
    source = hub.parse(folder)
    if source.path is None or not source.path.is_dir():
        raise InputError(f"there is no folder '{folder}' to push")
    if (source.path / MANIFEST_FILE).exists():
        vector.open_vector(source.path).verify()
        message = f"Add the task vector {source.name}"
    else:
        open_checkpoint(source.path)
        message = f"Add the model {source.name}"
    target = hub.parse(to, revision=revision)
    return hub.push(source.path, target, private=private, message=message, create_pr=create_pr)
