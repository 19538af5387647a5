"""Looking at what there is: how well a model does, how vectors lie to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_datavec import cosines, heatmap, hub, models, processes
from hf_datavec import evaluate as evaluation
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.hub import Fetched
from hf_datavec.images import ImageSet, open_images
from hf_datavec.pipeline import device as devices
from hf_datavec.staging import refuse_existing
from hf_datavec.vector import TaskVector, open_vector


def evaluate(
    model: str, images: str, *, split: str | None = None, batch_size: int = 64, device: devices.Device = "auto"
) -> Evaluation:
    """Measure a model on labelled images. Raises: InputError, see `evaluate.predict`."""
    place = devices.choose(device) if processes.count() > 1 else None  # where they meet
    pictures, folder = processes.first_on_each_machine(lambda: _fetched(model, images, split))
    network = processes.together(lambda: models.load(folder, device=place or devices.choose(device)))
    return evaluation.evaluate_network(network, pictures, batch_size=batch_size)


def _fetched(model: str, images: str, split: str | None) -> tuple[ImageSet, Path]:
    pictures = open_images(hub.parse(images), split=split)
    folder = hub.fetch(hub.parse(model)).folder
    pictures.label_rows(open_checkpoint(folder).labels)
    return pictures, folder


@dataclass(frozen=True)
class Inspection:
    """Vectors side by side; `cosines` are None when only headers and manifests were read."""

    vectors: tuple[tuple[Fetched, TaskVector], ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...] | None

    @property
    def download_bytes(self) -> int:
        """What cosines would have to fetch from the Hub."""
        return sum(fetched.download_bytes for fetched, _ in self.vectors)


def inspect(references: list[str], *, plot: Path | None = None, download: bool = False) -> Inspection:
    """Norms of vectors, and cosines over the weights that all of them hold.

    Of vectors on the Hub only headers and manifests are read, which tell no cosines, unless `download` or a plot
    asks for more.

    Raises: InputError for vectors of different networks.
    """
    if plot is not None:
        refuse_existing(plot)
    headers_only = not (download or plot)
    fetched = [hub.fetch(hub.parse(text), headers_only=headers_only) for text in references]
    with hub.naming(*fetched):
        vectors = [(one, open_vector(one.folder)) for one in fetched]
    names = _common_weights(vectors)
    if any(one.hollow for one in fetched):
        norms = tuple(vector.manifest.norm for _, vector in vectors)
        return Inspection(tuple(vectors), norms, None)
    readers = [(str(vector.folder), vector.parts) for _, vector in vectors]
    geometry = cosines.measured(readers, names, text="inspect")
    if plot is not None:
        heatmap.plot_cosines([one.reference.name for one in fetched], geometry, plot)
    return Inspection(tuple(vectors), geometry.norms, geometry.cosines)


def _common_weights(vectors: list[tuple[Fetched, TaskVector]]) -> dict[str, int]:
    """The weights and their numbers of values, which all vectors must share."""
    first_fetched, first = vectors[0]
    if not first.weights:
        raise InputError(f"the vector {first_fetched.reference.shown} holds no weights")
    for one, vector in vectors[1:]:
        shapes = {name: entry.shape for name, entry in vector.manifest.stored.items()}
        if any(shapes.get(name) != first.manifest.tensors[name].shape for name in first.weights):
            both = f"{first_fetched.reference.shown} and {one.reference.shown}"
            raise InputError(f"the vectors {both} belong to different networks")
    return first.weights
