"""Pictures as four different scanners see them: what makes hospitals' images differ, in small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Pixels = NDArray[np.float64]  # one picture in 0..1, (height, width, 3)

SIDE = 40


def _faint(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Low contrast and noise."""
    return 0.5 + 0.58 * (pixels - 0.5) + 0.084 * random.standard_normal(pixels.shape)


def _inverted(pixels: Pixels, _: np.random.Generator) -> Pixels:
    """Dark ink on a light ground."""
    return 1 - pixels


def _blurred(pixels: Pixels, _: np.random.Generator) -> Pixels:
    """Out of focus, with a yellow cast."""
    import numpy as np
    from PIL import Image, ImageFilter

    picture = Image.fromarray((255 * pixels).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.9))
    cast, ground = np.array([1.0, 0.79, 0.58]), np.array([0.175, 0.07, 0.0])
    blurred: Pixels = np.asarray(picture) / 255.0 * cast + ground
    return blurred


def _shaded(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Lit from one side, with a blue cast; the side differs from picture to picture."""
    import numpy as np

    down, across = (np.linspace(-1, 1, length) for length in pixels.shape[:2])
    angle = random.uniform(0, 2 * np.pi)
    light = 0.25 + 0.2 * (np.cos(angle) * across[None, :] + np.sin(angle) * down[:, None])
    ink = 0.75 * pixels * np.array([0.65, 0.86, 1.0])
    shaded: Pixels = ink + 0.7 * light[:, :, None] * np.array([0.6, 0.8, 1.0])
    return shaded


SCANNERS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "faint": _faint,
    "inverted": _inverted,
    "blurred": _blurred,
    "shaded": _shaded,
}


def rescan(picture: Image, scanner: str, random: np.random.Generator) -> Image:
    """Any picture in RGB as a scanner shows it, of the same size."""
    import numpy as np
    from PIL import Image

    seen = SCANNERS[scanner](np.asarray(picture) / 255.0, random).clip(0, 1)
    return Image.fromarray((255 * seen).round().astype(np.uint8))


def enlarged(digit: NDArray[np.float64]) -> Image:
    """A digit (28, 28) in 0..1 as a grey picture of `SIDE` pixels."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((255 * digit).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def scan(digit: NDArray[np.float64], scanner: str, random: np.random.Generator) -> Pixels:
    """A digit (28, 28) in 0..1 as a scanner shows it, (SIDE, SIDE, 3) in 0..1."""
    import numpy as np

    pixels = np.repeat(np.asarray(enlarged(digit))[:, :, None] / 255.0, 3, axis=2)
    return SCANNERS[scanner](pixels, random).clip(0, 1)


def write_digits(folder: Path, digits: Pixels, labels: NDArray[np.int64], scanner: str, seed: int) -> None:
    """Add scanned digits to an image folder with a sub-folder per class."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    for number, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((255 * scan(digit, scanner, random)).round().astype(np.uint8))
        picture.save(place / f"{scanner}-{number:04}.png")
