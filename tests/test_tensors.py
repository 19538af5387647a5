"""Safetensors on disk: what is written is what the safetensors library reads, and the digest means the content."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from networks import digest
from safetensors.torch import load_file, save_file

from hf_datavec.errors import InputError, RunError
from hf_datavec.headers import write_hollow
from hf_datavec.tensors import INDEX_FILE, Record, combined_digest, open_file, open_folder
from hf_datavec.writing import in_file_order, overwrite, write_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SHAPES = {"scalar": (), "empty": (0,), "empty matrix": (3, 0, 2), "one": (1,), "odd": (7,), "kernel": (4, 3, 3, 3)}


def of_type(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every kind of bit pattern that a type has."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-128, 128, shape, generator=generator).to(dtype)


def sample() -> dict[str, torch.Tensor]:
    """A tensor of every type and shape."""
    return {
        f"{dtype}.{shape}": of_type(DTYPES[dtype], SHAPES[shape], seed)
        for seed, (dtype, shape) in enumerate((dtype, shape) for dtype in DTYPES for shape in SHAPES)
    }


def layout_of(tensors: dict[str, torch.Tensor]) -> list[Record]:
    spelt = {dtype: name for name, dtype in DTYPES.items()}
    return [Record(name, spelt[value.dtype], tuple(value.shape), Path(), 0) for name, value in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor]) -> list[tuple[Record, str]]:
    layout = layout_of(tensors)
    return write_file(path, layout, ((record.name, tensors[record.name]) for record in in_file_order(layout)))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return sorted(found) == sorted(expected) and all(
        found[name].dtype == value.dtype and found[name].shape == value.shape and torch.equal(found[name], value)
        for name, value in expected.items()
    )


def digest_of(folder: Path, tensors: dict[str, torch.Tensor], **options: object) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", **options)
    return open_folder(folder).digest


def test_the_safetensors_library_reads_every_type_and_shape_back(tmp_path):
    write(tmp_path / "t.safetensors", sample())
    assert same(load_file(tmp_path / "t.safetensors"), sample())


def test_what_the_safetensors_library_writes_is_read_in_every_type_and_shape(tmp_path):
    save_file(sample(), tmp_path / "t.safetensors")
    stored = open_file(tmp_path / "t.safetensors")
    assert same({name: stored.read(name) for name in stored.records}, sample())
    for name, value in sample().items():
        record = stored.records[name]
        assert (record.shape, record.nbytes) == (tuple(value.shape), value.nbytes)


def test_a_copy_by_streaming_has_the_same_tensors_and_the_same_digest(tmp_path):
    save_file(sample(), tmp_path / "t.safetensors", metadata={"by": "the library"})
    source = open_file(tmp_path / "t.safetensors")
    hashes = write_file(
        tmp_path / "copy.safetensors",
        source.records.values(),
        ((record.name, source.read(record.name)) for record in in_file_order(source.records.values())),
    )
    copy = open_file(tmp_path / "copy.safetensors")
    assert same(load_file(tmp_path / "copy.safetensors"), sample())
    assert copy.digest == source.digest == combined_digest(hashes)


def test_nan_infinity_and_minus_zero_keep_their_bits(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 0x00000001, -1], dtype=torch.int32)
    write(tmp_path / "t.safetensors", {"odd": bits.view(torch.float32)})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["odd"].view(torch.int32), bits)


def test_tensors_are_aligned_to_their_own_size_and_the_records_say_where_they_are(tmp_path):
    tensors = sample()
    written = write(tmp_path / "t.safetensors", tensors)
    content = (tmp_path / "t.safetensors").read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0
    for record, _ in written:
        value = tensors[record.name]
        assert record.start % value.element_size() == 0
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[record.start : record.start + record.nbytes] == raw
    assert {record.name: record for record, _ in written} == open_file(tmp_path / "t.safetensors").records


def test_a_tensor_that_is_a_view_is_written_as_it_reads(tmp_path):
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": matrix.T, "column": matrix[:, 1], "grown": matrix[:1].expand(3, 4)}
    write(tmp_path / "t.safetensors", tensors)
    assert same(load_file(tmp_path / "t.safetensors"), tensors)


def test_the_order_of_the_layout_changes_no_byte(tmp_path):
    tensors = sample()
    write(tmp_path / "a", tensors)
    write(tmp_path / "b", dict(reversed(tensors.items())))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_file_without_tensors_is_a_file(tmp_path):
    write(tmp_path / "t.safetensors", {})
    assert load_file(tmp_path / "t.safetensors") == {}
    assert open_file(tmp_path / "t.safetensors").records == {}


@pytest.mark.parametrize(
    "stream",
    [
        [("a", torch.zeros(2)), ("c", torch.zeros(2))],  # another name
        [("a", torch.zeros(2))],  # too few
        [("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(2))],  # too many
        [("a", torch.zeros(2)), ("b", torch.zeros(3))],  # another shape
        [("a", torch.zeros(2)), ("b", torch.zeros(2).half())],  # another type
    ],
    ids=["name", "few", "many", "shape", "type"],
)
def test_a_stream_that_does_not_follow_the_layout_is_an_error(stream, tmp_path):
    layout = layout_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"stream yielded|argument 2|planned"):
        write_file(tmp_path / "t.safetensors", layout, iter(stream))


def test_an_integer_tensor_of_another_width_than_planned_is_an_error(tmp_path):
    layout = [Record("steps", "I64", (), Path(), 0)]
    with pytest.raises(ValueError, match="planned"):
        write_file(tmp_path / "t.safetensors", layout, [("steps", torch.tensor(7, dtype=torch.int32))])


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    with pytest.raises(RunError, match=r"cannot write '.*none/t.safetensors': No such file or directory"):
        write(tmp_path / "none" / "t.safetensors", {"a": torch.zeros(1)})


# The content digest


def test_the_digest_does_not_depend_on_shards_or_metadata(tmp_path):
    tensors = sample()
    whole = digest_of(tmp_path / "whole", tensors, metadata={"format": "pt"})
    assert whole == digest_of(tmp_path / "plain", tensors)
    assert whole == digest_of(tmp_path / "noted", tensors, metadata={"trained": "yesterday"})
    for count in (2, 5):
        folder = tmp_path / f"shards{count}"
        folder.mkdir()
        place = {name: f"model-{index % count + 1:05}.safetensors" for index, name in enumerate(sorted(tensors))}
        for shard in set(place.values()):
            save_file({name: value for name, value in tensors.items() if place[name] == shard}, folder / shard)
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
        stored = open_folder(folder)
        assert stored.digest == whole
        assert len(stored.files) == count
        assert same({name: stored.read(name) for name in stored.records}, tensors)


def flipped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.odd"].view(torch.uint8)[5] ^= 1


def negative_zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["zeros"] = -tensors["zeros"]


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.even"] = tensors.pop("F32.odd")


def retyped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["U8.odd"] = tensors["U8.odd"].view(torch.int8)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.kernel"] = tensors["F32.kernel"].reshape(4, 27)


def emptied_otherwise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.empty"] = tensors["F32.empty"].reshape(0, 5)


def retyped_empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.empty"] = tensors["F32.empty"].double()


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["F32.odd"], tensors["zeros"] = tensors["zeros"], tensors["F32.odd"]


def removed(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["F32.empty"]


def added(tensors: dict[str, torch.Tensor]) -> None:
    tensors["new"] = torch.zeros(0)


CHANGES = (
    flipped, negative_zero, renamed, retyped, reshaped, emptied_otherwise, retyped_empty, swapped, removed, added,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_digest_changes_with(change: Callable[[dict[str, torch.Tensor]], None], tmp_path):
    tensors = {**sample(), "zeros": torch.zeros(7)}
    before = digest_of(tmp_path / "before", tensors)
    assert before == digest_of(tmp_path / "again", {**sample(), "zeros": torch.zeros(7)})
    change(tensors)
    assert digest_of(tmp_path / "after", tensors) != before


def test_the_digest_is_the_one_that_is_documented(tmp_path):

    tensors = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3, dtype=torch.int64)}
    lines = b""
    for name, dtype, shape in (("a", "I64", ""), ("b.weight", "F32", "2x3")):
        inner = blake3(tensors[name].numpy().tobytes()).hexdigest()
        lines += f"{name}\0{dtype}\0{shape}\0{inner}\n".encode()
    assert digest_of(tmp_path / "m", tensors) == f"blake3:{blake3(lines).hexdigest()}"


# Overwriting


def test_overwriting_changes_the_named_tensors_and_no_other_byte(tmp_path):
    path = tmp_path / "t.safetensors"
    write(path, sample())
    stored = open_file(path)
    before = path.read_bytes()
    new = {"F32.kernel": torch.ones(4, 3, 3, 3), "BF16.odd": torch.full((7,), 1.5, dtype=torch.float64)}
    overwrite(stored.records, new)
    expected = {**sample(), "F32.kernel": torch.ones(4, 3, 3, 3), "BF16.odd": torch.full((7,), 1.5).bfloat16()}
    assert same(load_file(path), expected)
    after = path.read_bytes()
    assert len(after) == len(before)
    changed = {place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}
    inside = {
        place
        for name in new
        for place in range(stored.records[name].start, stored.records[name].start + stored.records[name].nbytes)
    }
    assert changed
    assert changed <= inside


def test_overwriting_with_another_shape_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "t.safetensors"
    write(path, {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="planned"):
        overwrite(open_file(path).records, {"a": torch.zeros(4)})
    assert same(load_file(path), {"a": torch.zeros(3)})


# Files that are not right


def header_file(path: Path, header: object, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8, [3])}, 8),  # fewer bytes than its shape needs
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),  # overlapping
        ({"a": entry(0, 8, [2])}, 12),  # bytes that belong to none
        ({"a": entry(4, 12, [2])}, 12),  # a gap
        ({"a": entry(0, 8, [2])}, 4),  # truncated
        ({"a": entry(0, 8, [-2])}, 8),  # a negative size
        ({"a": entry(0, 8, [2], dtype="F31")}, 8),  # no such type
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),  # no offsets
        ({"a": 5}, 0),
        ([], 0),
        ({"__metadata__": {"format": 5}}, 0),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(header, size, tmp_path):
    path = header_file(tmp_path / "t.safetensors", header, bytes(size))
    with pytest.raises(InputError) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"'{path}' is not a complete safetensors file: ")
    assert str(caught.value).endswith("\n  hint: copy or download the file again")


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "..", "a..b", "\\\\server\\x", "/etc/passwd", "a\nb", "", "a\x00b", "a\u202eb"]
)
def test_a_name_that_is_a_path_or_cannot_be_shown_is_refused(name, tmp_path):
    path = header_file(tmp_path / "t.safetensors", {name: entry(0, 4, [1])}, bytes(4))
    with pytest.raises(InputError) as caught:
        open_file(path)
    assert str(caught.value).startswith(f"'{path}' has a tensor named {name!r}, expected a name such as ")


def test_a_header_that_gives_one_name_two_places_is_refused(tmp_path):
    first, second = (json.dumps(entry(start, start + 4, [1])) for start in (0, 4))
    text = f'{{"a":{first},"a":{second}}}'.encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        open_file(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        json.dumps({"a": entry(0, 0, ["a", 3 * 10**8])}),
        json.dumps({"a": entry(0, 0, [2**62] * 300_000)}),
    ],
    ids=["lists", "objects", "text", "numbers"],
)
def test_a_header_that_is_meant_to_harm_is_refused_at_once(text, tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    begun = time.process_time()
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        open_file(path)
    assert time.process_time() - begun < 5


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read|is not a complete safetensors file"):
        open_file(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "..", 5, None, []])
def test_an_index_may_only_name_safetensors_files_beside_it(shard, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError) as caught:
        open_folder(folder)
    assert str(caught.value).startswith(f"'{folder / INDEX_FILE}' ")


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", "{}", '{"weight_map": 5}', '{"weight_map": []}', '{"weight_map": {"a": [1]}}', "\xff"]
)
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / INDEX_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        open_folder(tmp_path)
    assert str(caught.value).startswith(f"'{tmp_path / INDEX_FILE}' ")


def test_index_and_shards_must_agree(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(InputError, match="holds tensors that its index does not place there: 'b'"):
        open_folder(tmp_path)
    places = dict.fromkeys("abc", "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match="names tensors that no shard holds: 'c'"):
        open_folder(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    with pytest.raises(InputError, match=r"there is no file '.*y.safetensors'"):
        open_folder(tmp_path)


@pytest.mark.parametrize("change", ["longer header", "cut", "empty", "gone"])
@pytest.mark.parametrize("look", ["read", "array", "digest"])
def test_a_file_that_changes_after_its_header_was_read_is_not_read_by_that_header(change, look, tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    opened, content = open_file(path), path.read_bytes()
    if change == "longer header":
        save_file({"a": torch.ones(1000)}, path, metadata={"made": "again" * 20})
    elif change == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if change == "cut" else b"")
    with pytest.raises(RunError, match=r"was changed while it was being read|cannot read"):
        opened.digest if look == "digest" else getattr(opened, look)("a")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sizes are Linux's account of memory")
def test_a_file_larger_than_all_memory_is_mapped_and_read_in_parts(tmp_path):
    length = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    write_hollow(tmp_path / "large.safetensors", {"a": ("F32", [length], (0, 4 * length))})
    stored = open_file(tmp_path / "large.safetensors")
    assert stored.read("a")[length - 5 :].tolist() == [0.0] * 5
    assert stored.array("a")[length - 5 :].tolist() == [0.0] * 5


def test_what_is_written_to_a_tensor_does_not_reach_its_file(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(4)}, path)
    stored = open_file(path)
    stored.read("a").add_(1)
    assert load_file(path)["a"].tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="read-only"):
        stored.array("a")[0] = 5


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bool", "uint16", "uint32", "int8", "complex64"])
def test_tensors_of_any_type_are_read_as_the_library_reads_them(dtype, tmp_path):
    tensor = torch.tensor([[0, 1, 2], [3, 1, 0]]).to(getattr(torch, dtype))
    save_file({"a": tensor, "none": tensor[:0]}, tmp_path / "some.safetensors")
    stored = open_file(tmp_path / "some.safetensors")
    for name, expected in load_file(tmp_path / "some.safetensors").items():
        found = stored.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()
