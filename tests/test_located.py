"""YAML as plain data with places: every key and value is found again, and nothing but plain values is read."""

from __future__ import annotations

import pytest

from hf_datavec import located
from hf_datavec.errors import InputError
from hf_datavec.located import Span, dotted, parse

TEXT = """\
base: ./base
vectors:
  - ./a
  - {vector: ./b, weight: 2.5}
merge: {options: {density: 1e-3}, overrides: [{tensors: "fc.*"}, {tensors: x}]}
"""


def shown(document: located.Document, span: Span) -> str:
    """The text that a span covers."""
    return document.lines[span.line][span.column : span.column + span.width]


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("base",), "base", "./base"),
        (("vectors", 0), None, "./a"),
        (("vectors", 1, "vector"), "vector", "./b"),
        (("vectors", 1, "weight"), "weight", "2.5"),
        (("vectors", 1), None, "{vector: ./b, weight: 2.5}"),
        (("merge", "options", "density"), "density", "1e-3"),
        (("merge", "overrides", 0, "tensors"), "tensors", '"fc.*"'),
        (("merge", "overrides", 1, "tensors"), "tensors", "x"),
    ],
)
def test_keys_and_values_are_found_in_block_and_in_flow_style(path, key, value):
    document = parse(TEXT, "r.yaml")
    assert shown(document, document.values[path]) == value
    if key is not None:
        assert shown(document, document.keys[path]) == key


def test_a_problem_points_at_the_value_or_the_key():
    document = parse(TEXT, "r.yaml")
    path = ("vectors", 1, "weight")
    assert str(document.problem(path, "is wrong", hint="do so")) == (
        "r.yaml:4:27: vectors[1].weight: is wrong\n"
        "  4 |   - {vector: ./b, weight: 2.5}\n"
        "    |                           ^^^\n"
        "  hint: do so"
    )
    assert str(document.problem(path, "is wrong", at="key", about=path[:-1])) == (
        "r.yaml:4:19: vectors[1]: is wrong\n"
        "  4 |   - {vector: ./b, weight: 2.5}\n"
        "    |                   ^^^^^^"
    )  # fmt: skip


def test_a_path_that_is_not_there_points_at_the_nearest_part_that_is():
    document = parse(TEXT, "r.yaml")
    assert document.problem(("merge", "options", "nothing"), "is missing").place == (4, 8)
    assert document.problem(("nothing",), "is missing").place == (0, 0)


def test_the_gutter_is_as_wide_as_the_line_number():
    document = parse("\n" * 9 + "a: 1\n", "r.yaml")
    assert str(document.problem(("a",), "m")) == "r.yaml:10:4: a: m\n  10 | a: 1\n     |    ^"


def test_paths_are_written_as_people_write_them():
    assert dotted(("merge", "overrides", 2, "tensors")) == "merge.overrides[2].tensors"
    assert dotted(()) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("1e-3", 1e-3), ("1", 1), ("-2.5", -2.5), ("017", 17), ("0o17", 15), ("0x1f", 31), ('"1"', "1"),
        ("2024-01-02", "2024-01-02"), ("12:30:45", "12:30:45"), ("v1", "v1"), ("1.2.3", "1.2.3"),
        (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_says(text, value):
    found = parse(f"a: {text}\n", "r.yaml").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_an_alias_is_the_value_it_stands_for_at_its_own_path():
    document = parse("a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert document.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert ("c", "b") in document.values


def test_duplicate_keys_are_kept_as_problems_and_the_first_value_counts():
    document = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n", "r.yaml")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert [problem.place for problem in document.problems] == [(1, 10), (2, 0)]


@pytest.mark.parametrize("text", ["", "# only a remark\n", "---\n"])
def test_an_empty_file_has_no_data(text):
    assert parse(text, "r.yaml").data is None


def test_windows_line_ends_and_a_byte_order_mark_change_nothing():
    plain, windows = parse(TEXT, "r"), parse("\ufeff" + TEXT.replace("\n", "\r\n"), "r")
    assert windows.data == plain.data
    assert windows.values[("vectors", 1, "weight")] == plain.values[("vectors", 1, "weight")]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!binary aGVsbG8=",
        "a: !secret text",
        "a: !foo:int 5",
        "a: !!set {b, c}",
        "a: !custom {b: 1}",
        "a: !custom [b]",
    ],
)
def test_foreign_tags_are_problems_and_are_never_acted_on(text):
    problems = parse(text + "\n", "r.yaml").problems
    assert len(problems) == 1
    assert problems[0].place[0] == 0
    assert "is not allowed here; plain values only" in problems[0].problem


@pytest.mark.parametrize(
    "text", ["a: !!int abc", "a: !!bool maybe", "a: !!float x", "a: " + "9" * 5000], ids=lambda text: text[:12]
)
def test_a_scalar_that_is_not_what_it_claims_is_the_users_error(text):
    with pytest.raises(InputError, match=r"^r\.yaml"):
        raise next(iter(parse(text + "\n", "r.yaml").problems))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1, 2\n", "r.yaml:2:1"),
        ("a: 1\n\tb: 2\n", "r.yaml:2:1"),
        ("a: *x\n", "r.yaml:1:4"),
        ("a: 'open\n", "r.yaml:2:1"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1"),
        ("a: b: c\n", "r.yaml:1:5"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(text, place):
    with pytest.raises(InputError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value).startswith(f"{place}: not valid YAML: ")


def test_control_characters_are_refused():
    with pytest.raises(InputError, match=r"^r\.yaml: not valid YAML: .*#x0007"):
        parse("a: \x07\n", "r.yaml")


def test_aliases_that_multiply_are_refused():
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(InputError, match=r"r\.yaml: more than 100,000 values \(aliases that multiply\?\)"):
        parse("\n".join(levels) + "\n", "r.yaml")


@pytest.mark.parametrize(
    "text", ["a: &x [*x]\n", "[" * 3000, "a: " + "{a: " * 3000], ids=["alias of itself", "lists", "mappings"]
)
def test_nesting_without_end_is_refused(text):
    with pytest.raises(InputError, match=r"^r\.yaml"):
        parse(text, "r.yaml")


def test_files_that_are_missing_too_large_or_not_text_are_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        located.read(tmp_path / "none.yaml")
    assert str(caught.value) == f"there is no file '{tmp_path / 'none.yaml'}'"
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(InputError) as caught:
        located.read(path)
    assert str(caught.value) == f"'{path}' is not UTF-8 text (byte 6)"
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(InputError) as caught:
        located.read(path)
    assert str(caught.value) == f"'{path}' has 1,000,001 bytes; a recipe has at most 1,000,000"
    path.write_bytes(b"#" * 1_000_000)
    assert located.read(path).data is None
