"""The control of trivial features: what can be told from colours and edges alone, without any network."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from hf_datavec.study.pictures import Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Floats = NDArray[np.float64]

NAME = "trivial features, random forest"
MISSING = f"The row '{NAME}' is left out, since scikit-learn is missing: pip install \"hf-datavec[study]\""
# Small enough to be cheap; colours, corners and borders are still there.
SIDE = 64
# Sensors show black borders as a few levels above zero.
BLACK = 16
TREES = 300


def available() -> bool:
    """Whether scikit-learn, which grows the forest, is installed."""
    return importlib.util.find_spec("sklearn") is not None


def predicted(train: Part, test: Part, labels: tuple[str, ...], *, seed: int) -> Floats:
    """The probabilities (n, labels) that a random forest on trivial features of `train` gives the images of `test`."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(TREES, random_state=seed)
    forest.fit(features(train), train.label_rows(labels))
    found = np.zeros((len(test), len(labels)))
    found[:, forest.classes_] = forest.predict_proba(features(test))
    return found


def features(images: Part) -> Floats:
    """The trivial features of every image, shape (n, 20)."""
    import numpy as np

    return np.stack([of_picture(images.image(index)) for index in range(len(images))])


def of_picture(picture: Image) -> Floats:
    """Colour means and deviations, colours of the four corners, share of black pixels, edge strength."""
    import numpy as np

    pixels = np.asarray(picture.resize((SIDE, SIDE)), dtype=np.float64)
    corner = SIDE // 8
    corners = [
        pixels[rows, columns].mean((0, 1))
        for rows in (slice(corner), slice(-corner, None))
        for columns in (slice(corner), slice(-corner, None))
    ]
    black = (pixels < BLACK).all(2).mean()
    down, right = np.gradient(pixels.mean(2))
    edges = (np.abs(down) + np.abs(right)).mean()
    result: Floats = np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1)), *corners, [black, edges]])
    return result
