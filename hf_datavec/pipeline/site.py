"""A site's steps: start from the study base, train, compute the vector, hand it over."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hf_datavec import finetune as training
from hf_datavec import hub, study_base, vector
from hf_datavec.card import licence, vector_card
from hf_datavec.checkpoint import Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.images import open_images
from hf_datavec.manifest import MANIFEST_FILE, Manifest
from hf_datavec.models import load
from hf_datavec.pipeline import device as devices
from hf_datavec.staging import partial_path, refuse_existing, staged
from hf_datavec.tuned import open_tuned

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
    pictures = open_images(hub.parse(images), split=split)
    pictures.label_rows(checkpoint.labels)
    network = load(checkpoint.folder, device=devices.choose(device))
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
) -> Manifest:
    """Write the vector (tuned minus base) with manifest and card to `output`; returns the manifest.

    Raises: InputError when the tuned network does not fit the base, or is not finite.
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
    with staged(output) as folder:
        manifest = vector.write(
            folder,
            vector.TunedDifferences(checkpoint, network),
            vector.base_identity(fetched, checkpoint),
            with_statistics=with_statistics,
            examples=record.get("examples") if share_counts else None,
            training=record.get("settings"),
        )
        (folder / "README.md").write_text(vector_card(manifest, license=licence(fetched.folder)), "utf-8")
    return manifest


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
