"""Looking at what there is: how well a model does, how vectors lie to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_datavec import evaluate as evaluation
from hf_datavec import hub, models, report
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry, Gram
from hf_datavec.hub import Fetched
from hf_datavec.images import open_images
from hf_datavec.pipeline import device as devices
from hf_datavec.progress import progress
from hf_datavec.staging import refuse_existing
from hf_datavec.vector import TaskVector, open_vector


def evaluate(
    model: str, images: str, *, split: str | None = None, batch_size: int = 64, device: devices.Device = "auto"
) -> Evaluation:
    """Measure a model on labelled images. Raises: InputError, see `evaluate.predict`."""
    pictures = open_images(hub.parse(images), split=split)
    folder = hub.fetch(hub.parse(model)).folder
    pictures.label_rows(open_checkpoint(folder).labels)
    network = models.load(folder, device=devices.choose(device))
    return evaluation.evaluate_network(network, pictures, batch_size=batch_size)


@dataclass(frozen=True)
class Inspection:
    """Vectors side by side."""

    vectors: tuple[tuple[Fetched, TaskVector], ...]
    geometry: Geometry


def inspect(references: list[str], *, plot: Path | None = None) -> Inspection:
    """Norms and cosines of vectors over the weights that all of them hold.

    Raises: InputError for vectors of different networks.
    """
    fetched = [hub.fetch(hub.parse(text)) for text in references]
    vectors = [(one, open_vector(one.folder)) for one in fetched]
    first = vectors[0][1]
    names = [name for name, entry in first.manifest.stored.items() if entry.role == "weight"]
    if not names:
        raise InputError(f"the vector '{first.folder}' holds no weights")
    for one, vector in vectors[1:]:
        shapes = {name: entry.shape for name, entry in vector.manifest.stored.items()}
        if any(shapes.get(name) != first.manifest.tensors[name].shape for name in names):
            raise InputError(f"the vectors '{first.folder}' and '{one.folder}' belong to different networks")
    geometry = _geometry([vector for _, vector in vectors], names)
    if plot is not None:
        refuse_existing(plot)
        report.plot_cosines([one.reference.name for one in fetched], geometry, plot)
    return Inspection(tuple(vectors), geometry)


def _geometry(vectors: list[TaskVector], names: list[str]) -> Geometry:
    import torch

    gram = Gram()
    for name in progress(sorted(names), text="inspect", total=len(names), unit="tensor"):
        gram.add(torch.stack([vector.read(name).reshape(-1) for vector in vectors]))
    return gram.geometry()
