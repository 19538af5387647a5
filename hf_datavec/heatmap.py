"""The picture of the cosines between vectors. Drawn by Pillow: every merge draws it, and matplotlib starts longer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.geometry import Geometry

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

# All lengths are pixels. Cells shrink when there are more rows than fit, so that a picture's memory is bounded.
CELL, LARGEST, MARGIN, BAR = 96, 600, 14, 22
TEXT, TITLE = 17, 20
LONGEST = 40  # letters of a name
# Below this size nobody reads what is written in a cell or beside it.
READABLE = 7
DEGREES = 35
# Blue, white and red, told apart by the colour-blind; from -1 to 1 (ColorBrewer's RdBu, reversed).
SHADES = ((5, 48, 97), (67, 147, 195), (209, 229, 240), (247, 247, 247), (253, 219, 199), (214, 96, 77), (103, 0, 31))


def plot_cosines(names: Sequence[str], geometry: Geometry, path: Path) -> None:
    """A heat map of the cosines between vectors, each cell with its number as long as numbers can be read."""
    from PIL import Image, ImageDraw

    side = min(CELL, LARGEST / max(1, len(names)))
    size = round(min(TEXT, 0.7 * side))
    labels = [_label(_short(name), size) for name in names] if size >= READABLE else []
    turned = [label.rotate(DEGREES, expand=True, resample=Image.Resampling.BICUBIC) for label in labels]
    left = MARGIN + max((label.width for label in labels), default=0) + MARGIN
    # What stands below a cell ends there and begins to the left of it.
    left = max([left, *(round(one.width - (place + 0.5) * side) + MARGIN for place, one in enumerate(turned))])
    top, extent = 3 * MARGIN + TITLE, round(side * len(names))
    bottom = top + extent + max((one.height for one in turned), default=0) + 2 * MARGIN
    scale = _label("-1.0", TEXT).width
    right = left + extent + 2 * MARGIN + BAR + MARGIN + scale + MARGIN
    picture = Image.new("RGB", (max(right, 300), max(bottom, top + CELL)), "white")
    draw = ImageDraw.Draw(picture)
    picture.paste(_colours(geometry).resize((extent, extent), Image.Resampling.NEAREST), (left, top))
    draw.text((left, MARGIN), "Cosine between task vectors", fill="black", font=_font(TITLE))
    _numbers(draw, geometry, (left, top), side)
    for place, (label, below) in enumerate(zip(labels, turned, strict=True)):
        middle = (place + 0.5) * side
        beside = (left - label.width - MARGIN // 2, round(top + middle - label.height / 2))
        picture.paste("black", beside, label)
        picture.paste("black", (round(left + middle - below.width) + size // 2, top + extent + MARGIN // 2), below)
    _bar(draw, (left + extent + 2 * MARGIN, top), max(extent, CELL))
    picture.save(path)


def _colours(geometry: Geometry) -> Image:
    """A pixel for each cosine."""
    from PIL import Image

    picture = Image.new("RGB", (len(geometry.cosines),) * 2)
    picture.putdata([_shade(value) for row in geometry.cosines for value in row])
    return picture


def _numbers(draw: ImageDraw, geometry: Geometry, corner: tuple[int, int], side: float) -> None:
    size = round(min(TEXT, 0.28 * side))
    for row, values in enumerate(geometry.cosines):
        for column, value in enumerate(values):
            if size >= READABLE:
                ink = "white" if abs(value) > 0.6 else "black"
                middle = (corner[0] + (column + 0.5) * side, corner[1] + (row + 0.5) * side)
                draw.text(middle, f"{value:.2f}", fill=ink, font=_font(size), anchor="mm")


def _bar(draw: ImageDraw, corner: tuple[int, int], height: int) -> None:
    """What the colours mean."""
    left, top = corner
    for line in range(height):
        draw.line((left, top + line, left + BAR, top + line), _shade(1 - 2 * line / (height - 1)))
    for value in (1.0, 0.5, 0.0, -0.5, -1.0):
        where = (left + BAR + MARGIN // 2, top + (1 - value) / 2 * (height - 1))
        draw.text(where, f"{value:.1f}", fill="black", font=_font(TEXT), anchor="lm")


def _shade(value: float) -> tuple[int, int, int]:
    place = (min(1.0, max(-1.0, value)) + 1) / 2 * (len(SHADES) - 1)
    low, high = list(pairwise(SHADES))[min(int(place), len(SHADES) - 2)]
    part = place - min(int(place), len(SHADES) - 2)
    red, green, blue = (round(one + part * (other - one)) for one, other in zip(low, high, strict=True))
    return red, green, blue


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _label(text: str, size: int) -> Image:
    """Where the ink of a text goes; no larger than the text."""
    from PIL import Image, ImageDraw

    _, _, right, bottom = _font(size).getbbox(text or " ")
    ink = Image.new("L", (round(right) + 2, round(bottom) + 2))
    ImageDraw.Draw(ink).text((0, 0), text, fill="white", font=_font(size))
    return ink


@cache
def _font(size: int) -> Any:
    """The letters of matplotlib's plots, which know Latin, Greek and Cyrillic names."""
    from PIL import ImageFont

    found = find_spec("matplotlib")
    letters = Path((found and found.origin) or "").parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    # Some distributions keep fonts elsewhere; Pillow's own letters are Latin.
    return ImageFont.truetype(str(letters), size) if letters.is_file() else ImageFont.load_default(size)
