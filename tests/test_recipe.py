"""The recipe: every key is read as it is written, and everything wrong is told at once with its place."""

# ruff: noqa: E501 - lines of a table of recipes and messages

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from hf_datavec import recipe as recipes
from hf_datavec.errors import InputError, InputErrors
from hf_datavec.located import parse
from hf_datavec.methods import all_methods
from hf_datavec.recipe import ModelEntry, Recipe, VectorEntry

MINIMAL = "base: ./base\nvectors: [./a]\n"
FULL = """\
# yaml-language-server: $schema=https://example.org/recipe.schema.json
base: consortium/derm-base@3f2a
vectors:
  - hospital-a/derm-vector@91bc
  - {vector: hospital-b/derm-vector, revision: v1, weight: 2.0, name: B}
  - {model: hospital-c/derm-tuned, weight: 1}
merge:
  method: linear
  scale: 0.5
  options: {normalize: no_thanks}
  weights: equal
  overrides:
    - {tensors: "classifier\\\\..*", method: mean}
    - {tensors: .*bias, scale: 0}
  seed: 7
recalibrate:
  images: consortium/public-skin@77aa
  split: train
  mode: statistics
  count: 512
  batch_size: 64
  tolerance: 0.02
  temperature: 1.83
evaluate:
  images: ./public-test
  split: test
  batch_size: 8
output: ./fused
dtype: float32
push: {repo: consortium/derm-fused, private: true}
aliases: true
lock:
  base: {reference: ./base, digest: "sha256:00"}
  vectors:
    - {reference: hospital-a/derm-vector@91bc, commit: 91bc, digest: "sha256:01"}
    - {reference: x/y, digest: "sha256:02"}
    - {reference: x/z, digest: "sha256:03"}
  tools: {torch: "2.6"}
""".replace("no_thanks", "false")


def read(text: str) -> Recipe:
    return recipes.check(parse(textwrap.dedent(text), "recipe.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(text)
    return str(caught.value)


def heads(text: str) -> list[str]:
    """The first line of each error that a recipe causes."""
    return [line for line in refusal(text).splitlines() if line.startswith("recipe.yaml:")]


def test_every_key_is_read_as_written():
    assert read(FULL).model_dump(exclude_none=True) == {
        "base": "consortium/derm-base@3f2a",
        "vectors": (
            "hospital-a/derm-vector@91bc",
            {"vector": "hospital-b/derm-vector", "revision": "v1", "weight": 2.0, "name": "B"},
            {"model": "hospital-c/derm-tuned", "weight": 1.0},
        ),
        "merge": {
            "method": "linear", "scale": 0.5, "options": {"normalize": False}, "weights": "equal", "seed": 7,
            "overrides": ({"tensors": "classifier\\..*", "method": "mean"}, {"tensors": ".*bias", "scale": 0.0}),
        },
        "recalibrate": {
            "images": "consortium/public-skin@77aa", "split": "train", "mode": "statistics", "count": 512,
            "batch_size": 64, "tolerance": 0.02, "temperature": 1.83,
        },
        "evaluate": {"images": "./public-test", "split": "test", "batch_size": 8},
        "output": "./fused",
        "dtype": "float32",
        "push": {"repo": "consortium/derm-fused", "private": True, "create_pr": False},
        "aliases": True,
        "lock": {
            "base": {"reference": "./base", "digest": "sha256:00"},
            "vectors": (
                {"reference": "hospital-a/derm-vector@91bc", "commit": "91bc", "digest": "sha256:01"},
                {"reference": "x/y", "digest": "sha256:02"},
                {"reference": "x/z", "digest": "sha256:03"},
            ),
            "tools": {"torch": "2.6"},
        },
    }  # fmt: skip


def test_entries_have_their_long_form():
    kinds = [type(entry) for entry in read(FULL).entries]
    assert kinds == [VectorEntry, VectorEntry, ModelEntry]
    assert read(MINIMAL).entries == (VectorEntry(vector="./a"),)


def test_a_short_recipe_sums_at_scale_one_and_restores_nothing():
    found = read(MINIMAL)
    assert (found.merge.method, found.merge.scale, found.merge.weights, found.merge.seed) == ("sum", 1.0, "equal", 0)
    assert found.recalibrate is found.evaluate is found.push is found.lock is found.dtype is None


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    with pytest.raises(Exception, match="frozen"):
        read(MINIMAL).base = "./other"


def test_no_is_text_and_a_number_may_be_written_with_an_exponent():
    found = read("base: no\nvectors: [on]\nmerge: {scale: 1e-3}\noutput: 2024-01-02\n")
    assert (found.base, found.vectors, found.merge.scale, found.output) == ("no", ("on",), 1e-3, "2024-01-02")
    assert heads(MINIMAL + "push: {repo: a/b, private: no}\n") == [
        "recipe.yaml:3:28: push.private: expected true or false, found 'no'"
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "- ./a\n", "just text\n", "5\n"])
def test_what_is_not_a_mapping_is_told_what_a_recipe_is(text):
    assert "a recipe is a mapping with `base:` and `vectors:`" in refusal(text).splitlines()[0]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("base: 1\nvectors: [./a]\n", "1:7: base: expected text, found 1"),
        ("base: ''\nvectors: [./a]\n", "1:7: base: expected some text, found ''"),
        ("base: ~\nvectors: [./a]\n", "1:7: base: expected text, found nothing"),
        ("base: x\nvectors: []\n", "2:10: vectors: expected at least one entry, found an empty list"),
        ("base: x\nvectors: ./a\n", "2:10: vectors: expected a list, found './a'"),
        ("base: x\nvectors: [~]\n", "2:11: vectors[0]: expected text, found nothing"),
        ("base: x\nvectors: [a, 3]\n", "2:14: vectors[1]: expected text, found 3"),
        ("base: x\nvectors: [[a]]\n", "2:11: vectors[0]: expected a mapping, found a list"),
        ("base: x\nvectors: [{name: A}]\n", "2:11: vectors[0]: 'vector:' is missing"),
        ("base: x\n", "1:1: 'vectors:' is missing"),
        (MINIMAL + "merge: sum\n", "3:8: merge: expected a mapping, found 'sum'"),
        (MINIMAL + "merge: {method: [sum]}\n", "3:17: merge.method: expected text, found a list"),
        (MINIMAL + "merge: {scale: true}\n", "3:16: merge.scale: expected 'auto' or a finite number, found true"),
        (MINIMAL + "merge: {scale: .inf}\n", "3:16: merge.scale: expected 'auto' or a finite number, found inf"),
        (MINIMAL + "merge: {seed: -1}\n", "3:15: merge.seed: expected a number of at least 0, found -1"),
        (MINIMAL + "merge: {options: [1]}\n", "3:18: merge.options: expected a mapping, found a list"),
        (MINIMAL + "merge: {weights: more}\n", "3:18: merge.weights: 'more' is not one of equal, examples"),
        (MINIMAL + "merge: {overrides: {}}\n", "3:20: merge.overrides: expected a list, found a mapping"),
        (MINIMAL + "merge: {overrides: [{scale: 1}]}\n", "3:21: merge.overrides[0]: 'tensors:' is missing"),
        (
            MINIMAL + "recalibrate: {images: x, count: 1.5}\n",
            "3:33: recalibrate.count: expected a whole number, found 1.5",
        ),
        (
            MINIMAL + "recalibrate: {mode: x}\n",
            "3:21: recalibrate.mode: 'x' is not one of none, statistics, moments, relative, repair, tune, auto",
        ),
        (MINIMAL + "evaluate: {}\n", "3:1: evaluate: 'images:' is missing"),
        (MINIMAL + "lock: {base: {digest: x}, vectors: [], tools: {}}\n", "3:8: lock.base: 'reference:' is missing"),
    ],
)
def test_a_wrong_value_is_shown_at_its_place_with_what_was_expected(text, head):
    assert heads(text) == [f"recipe.yaml:{head}"]


@pytest.mark.parametrize(
    ("line", "place", "hint"),
    [
        ("recalibrat: {}", "3:1: unknown key 'recalibrat'", "did you mean 'recalibrate'?"),
        ("merge: {scal: 1}", "3:9: merge: unknown key 'scal'", "did you mean 'scale'?"),
        ("recalibrate: {image: x}", "3:15: recalibrate: unknown key 'image'", "did you mean 'images'?"),
        ("evaluate: {images: x, batchsize: 1}", "3:23: evaluate: unknown key 'batchsize'", "did you mean 'batch_size'?"),
        ("push: {repo: a/b, privat: true}", "3:19: push: unknown key 'privat'", "did you mean 'private'?"),
        ("merge: {overrides: [{tensors: x, scle: 1}]}", "3:34: merge.overrides[0]: unknown key 'scle'", "did you mean 'scale'?"),
        ("merge: {method: linear, options: {normalise: true}}", "3:35: merge.options: unknown key 'normalise'", "did you mean 'normalize'?"),
        ("merge: {method: men}", "3:17: merge.method: there is no merge method 'men'", "did you mean 'mean'?"),
        ("dtype: float", "3:8: dtype: 'float' is not one of float32, float16, bfloat16", None),
    ],
)  # fmt: skip
def test_a_misspelt_word_gets_the_known_one_that_is_near(line, place, hint):
    lines = refusal(MINIMAL + line + "\n").splitlines()
    assert f"recipe.yaml:{place}" in lines
    if hint:
        assert f"  hint: {hint}" in lines


def test_misspelt_keys_of_vectors_and_models_know_their_own_keys():
    text = "base: x\nvectors:\n  - {vector: a, wight: 1}\n  - {model: a, revison: b}\n"
    assert re.findall("did you mean '(.*)'", refusal(text)) == ["weight", "revision"]


@pytest.mark.parametrize("key", ["<<: {dtype: float32}", "<text>: 1", "<: 1"])
def test_keys_with_angle_brackets_are_unknown_keys_like_others(key):
    assert heads(MINIMAL + key + "\n") == [f"recipe.yaml:3:1: unknown key '{key.partition(':')[0]}'"]


def test_errors_are_sorted_by_line_whatever_found_them():
    text = """\
    vectors: [./a, {vector: ./b, weight: x}]
    merge:
      overrides:
        - {tensors: x, method: mena}
        - {tensors: x, method: linear, options: {normalize: 1, extra: 2}}
      method: sum
      method: mean
    dtype: !x y
    bsae: ./base
    """
    found = heads(text)
    places = [tuple(map(int, line.split(":")[1:3])) for line in found]
    assert places == sorted(places)
    assert [line.partition(": ")[2] for line in found] == [
        "'base:' is missing",
        "vectors[1].weight: expected a number, found 'x'",
        "merge.overrides[0].method: there is no merge method 'mena'",
        "merge.overrides[1].options.normalize: expected true or false, found 1",
        "merge.overrides[1].options: unknown key 'extra'",
        "merge: duplicate key 'method', first given in line 6",
        "dtype: tag '!x' is not allowed here; plain values only",
        "unknown key 'bsae'",
    ]
    with pytest.raises(InputErrors) as caught:
        read(text)
    assert len(caught.value.errors) == len(found)


def test_options_of_an_override_are_those_of_its_own_method():
    with_own = "merge: {method: sum, overrides: [{tensors: x, method: linear, options: {normalize: true}}]}\n"
    assert read(MINIMAL + with_own).merge.overrides[0].options == {"normalize": True}
    inherited = "merge: {method: mean, overrides: [{tensors: x, options: {normalize: true}}]}\n"
    assert heads(MINIMAL + inherited) == ["recipe.yaml:3:58: merge.overrides[0].options: unknown key 'normalize'"]


def test_a_weight_contradicts_example_weights_and_a_broken_pattern_is_no_pattern():
    text = """\
    base: x
    vectors: [{vector: a, weight: 2}]
    merge: {method: linear, weights: examples, overrides: [{tensors: '['}]}
    """
    assert [line.partition(": ")[2] for line in heads(text)] == [
        "vectors[0].weight: a weight is given although merge.weights is 'examples'; keep one of the two",
        "merge.overrides[0].tensors: not a regular expression: unterminated character set at position 0",
    ]


@pytest.mark.parametrize("mode", ["none", "moments"])
def test_only_the_statistics_mode_needs_images(mode):
    assert read(MINIMAL + f"recalibrate: {{mode: {mode}}}\n").recalibrate.mode == mode
    assert heads(MINIMAL + "recalibrate: {}\n") == ["recipe.yaml:3:1: recalibrate: mode 'statistics' needs 'images:'"]


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("base: ./café\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text \\(byte 11\\)"):
        recipes.load(path)


def test_recipes_in_other_scripts_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: ./основа\nvectors: [{vector: ./a, name: 病院}]\n", "utf-8")
    found = recipes.load(path)
    assert (found.base, found.entries[0].name) == ("./основа", "病院")


def violations(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> Iterator[str]:
    """Why a value does not fit a schema; the few JSON Schema keywords that the recipe's schema uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    kinds = {
        "object": dict, "array": (list, tuple), "string": str, "boolean": bool, "number": (int, float),
        "integer": int, "null": type(None),
    }  # fmt: skip
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and all(any(violations(one, value, root)) for one in schema[keyword]):
            yield f"{value!r} fits none of {keyword}"
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is not one of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{value!r} is not {schema['const']}"
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{value} is out of range"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, inner in value.items():
            if name in known:
                yield from violations(known[name], inner, root)
            elif schema.get("additionalProperties") is False:
                yield f"{name} is unknown"
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from violations(schema.get("items", {}), inner, root)
        if len(value) < schema.get("minItems", 0):
            yield "too short"
    for branch in schema.get("allOf", ()):
        if not any(violations(branch["if"], value, root)):
            yield from violations(branch["then"], value, root)


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_the_schema_accepts_what_the_parser_accepts(text):
    schema = recipes.schema()
    read(text)
    assert list(violations(schema, parse(text, "r").data, schema)) == []


@pytest.mark.parametrize(
    "line",
    [
        "bsae: x", "dtype: int8", "merge: {method: sums}", "merge: {method: linear, options: {normalise: true}}",
        "merge: {method: linear, options: {normalize: 3}}", "merge: {method: mean, options: {normalize: true}}",
        "recalibrate: {count: 0}", "recalibrate: {mode: relatives}", "evaluate: {}", "push: {repo: 3}",
        "merge: {overrides: [{tensors: x, method: linear, options: {extra: 1}}]}", "merge: {seed: -1}",
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_parser_refuses(line):
    schema, text = recipes.schema(), f"{MINIMAL}{line}\n"
    refusal(text)
    assert list(violations(schema, parse(text, "r").data, schema)) != []


def test_the_schema_carries_every_methods_options_with_their_defaults():
    definitions = recipes.schema()["$defs"]
    for section in ("Merge", "Override"):
        branches = {
            branch["if"]["properties"]["method"]["const"]: branch["then"]["properties"]["options"]
            for branch in definitions[section]["allOf"]
        }
        assert list(branches) == list(all_methods())
        for name, method in all_methods().items():
            properties = branches[name].get("properties", {})
            assert list(properties) == list(method.options)
            assert branches[name]["additionalProperties"] is False
            for option, parameter in method.options.items():
                assert properties[option]["default"] == parameter.default
