"""The picture of the cosines between vectors."""

from __future__ import annotations

import pytest
from PIL import Image

from hf_datavec.geometry import Geometry
from hf_datavec.heatmap import LARGEST, SHADES, plot_cosines


def drawn(path, cosines, names=None):
    rows = tuple(tuple(map(float, row)) for row in cosines)
    plot_cosines(names or [f"s{n}" for n in range(len(rows))], Geometry((1.0,) * len(rows), rows), path)
    with Image.open(path) as picture:
        return picture.convert("RGB")


def alike(count, value=0.0):
    return [[1.0 if row == column else value for column in range(count)] for row in range(count)]


def covered(picture, color):
    return sum(pixel == color for pixel in picture.getdata())


def test_cells_have_the_colour_of_their_cosine(tmp_path):
    picture = drawn(tmp_path / "a.png", [[1, -1], [-1, 1]])
    cell = 96 * 96
    for color in (SHADES[0], SHADES[-1]):  # two cells each, but for the numbers in them
        assert 1.7 * cell < covered(picture, color) < 2.1 * cell
    assert covered(drawn(tmp_path / "b.png", [[1, 0], [0, 1]]), SHADES[3]) > 1.7 * cell


def test_a_picture_of_many_sites_is_no_larger_than_one_of_some(tmp_path):
    some, many = drawn(tmp_path / "some.png", alike(7)), drawn(tmp_path / "many.png", alike(120))
    assert many.width <= some.width
    assert many.height <= some.height
    assert covered(many, SHADES[-1]) > LARGEST * LARGEST / 120 * 0.5  # the diagonal can still be seen


def test_more_sites_than_pixels_can_be_drawn(tmp_path):
    picture = drawn(tmp_path / "a.png", alike(700))
    assert picture.width < 1000
    assert picture.height < 1000


def test_names_of_any_length_are_inside_the_picture(tmp_path):
    names = [
        "a hospital with a very long name, which nobody would want to type twice. " * 30,
        "B",
        "Charité, Łódź, Αθήνα",
    ]
    picture = drawn(tmp_path / "a.png", alike(3), names)
    edges = [picture.crop(box) for box in (
        (0, 0, 3, picture.height), (0, picture.height - 3, picture.width, picture.height),
        (picture.width - 3, 0, picture.width, picture.height),
    )]  # fmt: skip
    assert all(edge.getextrema() == ((255, 255),) * 3 for edge in edges)


@pytest.mark.parametrize("count", [2, 13])
def test_the_same_cosines_give_the_same_bytes(count, tmp_path):
    drawn(tmp_path / "a.png", alike(count, 0.25))
    drawn(tmp_path / "b.png", alike(count, 0.25))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_values_that_rounding_put_beyond_one_are_drawn_as_one(tmp_path):
    assert drawn(tmp_path / "a.png", [[1.0000001, -1.0000001], [-1.0000001, 1]]) == drawn(
        tmp_path / "b.png", [[1, -1], [-1, 1]]
    )
