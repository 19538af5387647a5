"""Every form in which images come, and labels matched by name."""

from __future__ import annotations

import csv
import io

import datasets
import numpy as np
import pytest
from networks import LABELS, make_images
from PIL import Image

from hf_datavec import hub
from hf_datavec.errors import InputError
from hf_datavec.images import open_images


def opened(path, split=None):
    return open_images(hub.parse(str(path)), split=split)


def with_metadata(source, folder):
    """The same pictures in one folder, with a table of names, labels and patients."""
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["file_name", "label", "patient_id"])
        for number, path in enumerate(sorted(source.rglob("*.png"))):
            name = f"{number:04}.png"
            (folder / name).write_bytes(path.read_bytes())
            table.writerow([name, path.parent.name, f"PAT_{number // 2}"])
    return folder


def test_every_form_gives_the_same_pictures_and_labels(tmp_path):
    source = make_images(tmp_path / "folders")
    loaded = datasets.load_dataset(str(source), split="train")
    loaded.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    loaded.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    with_metadata(source, tmp_path / "table")
    reference = opened(source)
    assert reference.labels == tuple(label for label in LABELS for _ in range(6))
    for form in ("saved", "parquet", "table"):
        found = opened(tmp_path / form)
        assert found.labels == reference.labels
        assert found.digest == reference.digest
        for index in (0, 7, 17):
            assert np.array_equal(np.asarray(found.image(index)), np.asarray(reference.image(index)))


def test_labels_are_matched_by_name_not_by_position(tmp_path):
    found = opened(make_images(tmp_path / "images", labels=("owl", "cat")))
    assert set(zip(found.labels, found.label_rows(("owl", "dog", "cat")), strict=True)) == {("owl", 0), ("cat", 2)}


def test_a_split_is_asked_for_when_there_are_several(tmp_path):
    for split in ("train", "test"):
        make_images(tmp_path / "images" / split, each=2 if split == "test" else 3)
    with pytest.raises(InputError, match=r"has the splits 'test', 'train'"):
        opened(tmp_path / "images")
    assert len(opened(tmp_path / "images", "test")) == 6
    with pytest.raises(InputError, match=r"has no split 'tests'; it has 'test', 'train'") as refused:
        opened(tmp_path / "images", "tests")
    assert refused.value.hint == "did you mean 'test'?"
    make_images(tmp_path / "plain")
    datasets.load_dataset(str(tmp_path / "plain"), split="train").save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="has no splits, but 'test' is asked for"):
        opened(tmp_path / "saved", "test")


def test_words_in_file_names_hide_no_picture(tmp_path):
    """The library's own builder reads 2 of these 7 pictures: it takes the names for splits."""
    for name in ("000", "001", "test_0", "test_1", "train-2", "val"):
        (tmp_path / "images [1]" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images [1]" / "cat" / f"{name}.png")
    (tmp_path / "images [1]" / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images [1]" / "test" / "a.png")
    found = opened(tmp_path / "images [1]")
    assert found.labels == ("cat",) * 6 + ("test",)


def test_a_site_may_have_one_class_only(tmp_path):
    assert set(opened(make_images(tmp_path / "images", labels=("dog",))).labels) == {"dog"}


def test_a_picture_beside_the_class_folders_is_named(tmp_path):
    make_images(tmp_path / "images")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "stray.png")
    with pytest.raises(InputError, match=r"holds pictures beside its class folders: 'stray.png'"):
        opened(tmp_path / "images")


def test_a_picture_that_the_metadata_leaves_out_is_not_lost_silently(tmp_path):
    folder = with_metadata(make_images(tmp_path / "source"), tmp_path / "table")
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(lines[:-4]))
    with pytest.raises(InputError, match=r"holds 18 pictures, but 14 are read|cannot be read as images"):
        opened(folder)


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(folder / "a.png")
    Image.fromarray(ramp).save(folder / "b.tiff")
    Image.fromarray(ramp.astype(np.float32) / 65535).save(folder / "c.tiff")
    found = opened(tmp_path / "images")
    for index in (0, 1):
        grey = np.asarray(found.image(index))[:, :, 0].reshape(-1)
        assert (grey[0], grey[-1]) == (0, 255)
        assert abs(float(grey.mean()) - 127.5) < 2
    with pytest.raises(InputError, match="stores 32-bit values, expected 8 or 16 bits"):
        found.image(2)


def test_pictures_of_every_kind_become_upright_rgb(tmp_path):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    Image.new("L", (8, 6), 100).save(folder / "a.png")
    Image.new("RGBA", (8, 6), (1, 2, 3, 0)).save(folder / "b.png")
    Image.new("P", (8, 6)).save(folder / "c.png")
    turned = Image.new("RGB", (8, 6), (200, 0, 0))
    turned.putpixel((0, 0), (0, 0, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: must be turned by 270 degrees
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    (folder / "d.png").write_bytes(buffer.getvalue())
    found = opened(tmp_path / "images")
    assert [found.image(index).mode for index in range(4)] == ["RGB"] * 4
    assert [found.image(index).size for index in range(4)] == [(8, 6)] * 3 + [(6, 8)]


def test_a_data_set_without_pictures_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(InputError, match="holds no images; its columns are 'label', 'text'"):
        opened(tmp_path / "text")


def test_missing_labels_are_counted(tmp_path):
    make_images(tmp_path / "images", each=1)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))})
    rows = {"image": [str(path) for path in sorted((tmp_path / "images").rglob("*.png"))], "label": [0, -1, 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"1 of 3 images in .* have no label; the first is number 1"):
        opened(tmp_path / "saved").label_rows(LABELS)
