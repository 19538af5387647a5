"""What the plots of a study show: curves over the scale, lines between networks, drift of BatchNorm, cosines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_datavec import cosines, recalibrate
from hf_datavec.geometry import Geometry
from hf_datavec.recalibrate import Channels
from hf_datavec.study.restoring import pictures
from hf_datavec.study.rows import Measuring
from hf_datavec.study.sections import Combining
from hf_datavec.vector import open_vector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# A curve by tuning would show the tuning, and one by `auto` repeats another.
NO_CURVE = ("tune", "auto")
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line of a plot."""

    text: str
    x: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]


def over_scales(measuring: Measuring) -> list[Curve]:
    """Accuracy and loss of the sum from the base to beyond the fused model, by restoration mode."""
    study = measuring.seed.place.study
    found = []
    for mode in dict.fromkeys(mode for mode in study.restore if mode not in NO_CURVE):
        points = []
        for scale in study.curve:
            merge = Combining(scale=scale)
            compute = partial(measuring.fused, merge, mode)
            points.append(_point(measuring, measuring.kept.probabilities(f"{merge.name}, {mode}", compute)))
        found.append(_curve(mode, study.curve, points))
    return found


def between_sites(measuring: Measuring) -> list[Curve]:
    """Accuracy and loss along the line between the first two sites, by restoration mode."""
    study, vectors = measuring.seed.place.study, measuring.vectors()[:2]
    merge = Combining(method="linear", options={"normalize": True})
    found = []
    for mode in dict.fromkeys(mode for mode in study.restore if mode not in NO_CURVE):
        points = []
        for share in STEPS:
            compute = partial(measuring.fused, merge, mode, vectors, (1 - share, share))
            points.append(_point(measuring, measuring.kept.probabilities(f"between sites, {mode}, {share:g}", compute)))
        found.append(_curve(mode, STEPS, points))
    return found


def _point(measuring: Measuring, probabilities: Floats) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the test images."""
    import numpy as np

    rows = np.array(measuring.seed.test.label_rows(measuring.seed.place.network.labels))
    chosen = probabilities[np.arange(len(rows)), rows]
    return float((probabilities.argmax(1) == rows).mean()), float(-np.log(np.maximum(chosen, 1e-300)).mean())


def _curve(text: str, x: Sequence[float], points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(text, tuple(x), tuple(one for one, _ in points), tuple(loss for _, loss in points))


def drift(measuring: Measuring) -> dict[str, list[float]]:
    """How far each BatchNorm layer's stored mean is from that of the test images, by restoration mode.

    In standard deviations of what the layer sees of the test images, the mean over channels; of the first merge.
    """
    study = measuring.seed.place.study
    merge = study.merges[0]
    modes = dict.fromkeys(mode for mode in study.restore if mode not in NO_CURVE)
    return {
        mode: measuring.kept.numbers(f"drift, {merge.name}, {mode}", partial(_drift, measuring, merge, mode))
        for mode in modes
    }


def _drift(measuring: Measuring, merge: Combining, mode: str) -> list[float]:
    network = measuring.network(merge, mode)
    stored = {
        name: recalibrate.Gaussian(layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in recalibrate.layers_of(network).items()
    }
    seen: Mapping[str, Channels] = recalibrate.observe(network, pictures(measuring.seed.test, network.preprocess))
    return [
        float(((stored[name].mean - one.mean).abs() / one.variance.clamp(min=1e-12).sqrt()).mean())
        for name, one in seen.items()
    ]


def geometry(measuring: Measuring) -> Geometry:
    """Norms and cosines of the sites' vectors."""
    vectors = [open_vector(path) for path in measuring.vectors()]
    return cosines.measured([(str(one.folder), one.parts) for one in vectors], vectors[0].weights, text="cosines")


def as_dict(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Curves as plain data for JSON."""
    return [{"name": one.text, "x": one.x, "accuracy": one.accuracy, "loss": one.loss} for one in curves]
