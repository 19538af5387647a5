"""How well a network does on labelled images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_datavec import metrics, processes
from hf_datavec.errors import RunError
from hf_datavec.metrics import Estimate
from hf_datavec.progress import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_datavec.images import ImageSet
    from hf_datavec.models import Network


@dataclass(frozen=True)
class Predictions:
    """Probabilities (n, labels) and reference rows (n,) in the order of the images."""

    labels: tuple[str, ...]
    probabilities: NDArray[np.float64]
    references: NDArray[np.int64]


def _without_nan(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in pairs}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one network on one set of images; `commit` pins those of a Hub data set."""

    images: str
    count: int
    metrics: dict[str, Estimate]
    examples: dict[str, int]
    commit: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON; a metric that is not defined is null."""
        return asdict(self, dict_factory=_without_nan)


def predict(network: Network, images: ImageSet, *, batch_size: int = 64) -> Predictions:
    """The network's probabilities for every image; under several processes each looks at its share.

    Raises: InputError for unreadable images, missing labels, and labels that the network lacks.
    """
    import numpy as np

    references = np.array(images.label_rows(network.labels), dtype=np.int64)
    # Whole batches are shared out, never padded: each image counts once, in the same batch in any number of processes.
    mine = processes.share(range(0, len(images), batch_size))
    parts = processes.together(lambda: list(_probabilities(network, images, mine, batch_size)))
    return Predictions(network.labels, np.concatenate(processes.gathered(parts)), references)


def _probabilities(
    network: Network, images: ImageSet, starts: Sequence[int], batch_size: int
) -> Iterator[NDArray[np.float64]]:
    import torch

    for start in progress(starts, text="evaluate", total=len(starts), unit="batch"):
        with torch.no_grad():
            indices = range(start, min(start + batch_size, len(images)))
            logits = network.logits(images.tensors(network.preprocess, indices))
        if not bool(torch.isfinite(logits).all()):
            raise RunError(
                "the network gives NaN or infinite values",
                hint="its weights or BatchNorm statistics are broken: a smaller scale, or recalibration, may help",
            )
        yield torch.softmax(logits.double(), dim=1).cpu().numpy()


def score(predictions: Predictions, images: str, commit: str | None = None) -> Evaluation:
    """The metrics of predictions, gathered and computed by the `evaluate` library's own machinery."""
    import numpy as np

    found = _metric().compute(predictions=predictions.probabilities, references=predictions.references)
    counts = np.bincount(predictions.references, minlength=len(predictions.labels))
    examples = {label: int(count) for label, count in zip(predictions.labels, counts, strict=True)}
    return Evaluation(images, len(predictions.references), found, examples, commit)


def _metric() -> Any:
    """An `evaluate.Metric` over probabilities; built here, since `evaluate.load` would download and run a script."""
    import datasets
    import evaluate
    import numpy as np

    class ImageClassification(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            )
            return evaluate.MetricInfo(
                description="Accuracy, balanced accuracy, macro F1, AUROC, ECE and Brier score with intervals.",
                citation="",
                inputs_description="class probabilities and reference rows",
                features=features,
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, Estimate]:
            return metrics.measure(np.asarray(predictions, dtype=np.float64), np.asarray(references))

    return ImageClassification(keep_in_memory=True)


def evaluate_network(network: Network, images: ImageSet, *, batch_size: int = 64) -> Evaluation:
    """Predict and score in one go. Raises as `predict`."""
    fetched = images.fetched
    return score(predict(network, images, batch_size=batch_size), fetched.reference.identity, fetched.commit)
