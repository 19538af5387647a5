"""What a user can get wrong: one exact message, exit code 2, nothing on stdout, no traceback, nothing written."""

# ruff: noqa: E501 - messages stand here as they are printed

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from networks import make_images, make_vector, save_with, write_recipe
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_datavec.manifest import Manifest
from hf_datavec.tensors import open_file, open_folder

WEIGHTS = "model.safetensors"
VECTOR = "vector.safetensors"
MANIFEST = "datavec.json"
GOOD = {"base": "./base", "vectors": ["./site-a", "./site-b"], "output": "./fused"}

NOTE = "note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`\n"

Refused = Callable[..., str]


def said(text: str) -> str:
    """A message as it is written in a test: indented, with an empty first line."""
    return textwrap.dedent(text).lstrip("\n")


def contents(folder: Path) -> dict[str, str]:
    """Every entry below a folder, hidden ones included, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(study: Path, run, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must be refused in a finished study; returns the whole message, `tmp_path` as TMP."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*command: object) -> str:
        before = contents(study)
        outcome = run(*command)
        message = outcome.err.replace(str(study), "TMP")
        assert outcome.code == 2, message
        assert outcome.out == ""
        assert "Traceback" not in message
        assert contents(study) == before
        return message

    return call


def text_recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(said(text), "utf-8")
    return "recipe.yaml"


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if path.name == MANIFEST:
        seal(path)


def seal(path: Path) -> None:
    """Give a changed manifest the digest that belongs to it, where it is still one."""
    with contextlib.suppress(ValueError):
        path.write_text(Manifest.model_validate_json(path.read_text()).sealed().model_dump_json(exclude_none=True))


def rewrite_vector(
    folder: Path, changes: Mapping[str, torch.Tensor | None], *, consistent: bool = True, listing: bool = False
) -> None:
    """Set tensors of a vector (None: take out); `consistent`: the manifest has the new digest, `listing`: and names."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / VECTOR), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / VECTOR)
    manifest = json.loads((folder / MANIFEST).read_text())
    if consistent:
        manifest["content"] = open_file(folder / VECTOR).digest
    for name, tensor in changes.items() if listing else ():
        if tensor is None:
            del manifest["tensors"][name]
        else:
            entry = {"role": "weight", "shape": list(tensor.shape), "dtype": "F32", "stored": True}
            manifest["tensors"][name] = entry
    (folder / MANIFEST).write_text(json.dumps(manifest))
    seal(folder / MANIFEST)


def rewrite_model(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Set tensors of a model folder (None: take out)."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / WEIGHTS), **changes}
    save_with(folder, folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def with_value(path: Path, name: str, value: float, *, count: int = 1) -> dict[str, torch.Tensor]:
    """A tensor of a file, its first few values replaced."""
    tensor = load_file(path)[name].clone()
    tensor.view(-1)[:count] = value
    return {name: tensor}


def cut(path: Path, missing: int) -> None:
    path.write_bytes(path.read_bytes()[:-missing])


def absurd_header(path: Path) -> None:
    """A file that claims a header of 5 GB."""
    path.write_bytes((5_000_000_000).to_bytes(8, "little") + b'{"a":{}}' + bytes(64))


def shortened(folder: Path) -> str:
    """The digest of a model folder as messages show it."""
    return open_folder(folder).digest[:19] + "..."


# The recipe


def test_a_misspelt_option_is_shown_at_its_place_with_the_known_one_that_is_near(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors:
          - ./site-a
          - ./site-b
        merge:
          method: linear
          scale: 1.0
          options:
            normalise: false
        output: ./fused
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:9:5: merge.options: unknown key 'normalise'
          9 |     normalise: false
            |     ^^^^^^^^^
          hint: did you mean 'normalize'?
        """)


def test_a_misspelt_section_is_shown_at_its_place(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        recalibrat: {images: ./images}
        """)  # fmt: skip
    assert refused("plan", recipe) == said("""
        recipe.yaml:3:1: unknown key 'recalibrat'
          3 | recalibrat: {images: ./images}
            | ^^^^^^^^^^
          hint: did you mean 'recalibrate'?
        """)


def test_a_word_near_to_no_key_gets_the_list_of_all(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, zzz=1)
    assert refused("plan", recipe) == said("""
        recipe.yaml:8:3: unknown key 'zzz'
          8 |   "zzz": 1
            |   ^^^^^
          hint: known: aliases, base, dtype, evaluate, lock, merge, output, push, recalibrate, round, vectors
        """)


def test_a_duplicate_key_names_the_line_of_the_first(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge:
          scale: 1.0
          scale: 2.0
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:5:3: merge: duplicate key 'scale', first given in line 4
          5 |   scale: 2.0
            |   ^^^^^
        """)


def test_a_wrong_type_is_shown_with_what_was_expected(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge: {scale: "2"}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:16: merge.scale: expected 'auto' or a finite number, found '2'
          3 | merge: {scale: "2"}
            |                ^^^
        """)


def test_all_errors_are_told_at_once_in_the_order_of_their_lines(refused, study):
    recipe = text_recipe(study, """
        base: 5
        vectors: [{vector: ./site-a, weigth: 2}]
        merge:
          method: linear
          scale: .nan
          options: {normalize: 3}
          method: sum
        recalibrate: {mode: statistics, count: 0}
        outptu: ./fused
        dtype: int8
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:1:7: base: expected text, found 5
          1 | base: 5
            |       ^
        recipe.yaml:2:30: vectors[0]: unknown key 'weigth'
          2 | vectors: [{vector: ./site-a, weigth: 2}]
            |                              ^^^^^^
          hint: did you mean 'weight'?
        recipe.yaml:5:10: merge.scale: expected 'auto' or a finite number, found nan
          5 |   scale: .nan
            |          ^^^^
        recipe.yaml:6:24: merge.options.normalize: expected true or false, found 3
          6 |   options: {normalize: 3}
            |                        ^
        recipe.yaml:7:3: merge: duplicate key 'method', first given in line 4
          7 |   method: sum
            |   ^^^^^^
        recipe.yaml:8:40: recalibrate.count: expected a number of at least 1, found 0
          8 | recalibrate: {mode: statistics, count: 0}
            |                                        ^
        recipe.yaml:9:1: unknown key 'outptu'
          9 | outptu: ./fused
            | ^^^^^^
          hint: did you mean 'output'?
        recipe.yaml:10:8: dtype: 'int8' is not one of float32, float16, bfloat16
          10 | dtype: int8
             |        ^^^^
        """)


def test_an_option_of_the_wrong_kind_is_shown_at_its_value(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge: {method: linear, options: {normalize: 1}}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:46: merge.options.normalize: expected true or false, found 1
          3 | merge: {method: linear, options: {normalize: 1}}
            |                                              ^
        """)


def test_a_number_out_of_range_is_shown_with_its_range(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        recalibrate: {images: ./images, batch_size: 0}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:45: recalibrate.batch_size: expected a number of at least 1, found 0
          3 | recalibrate: {images: ./images, batch_size: 0}
            |                                             ^
        """)


def test_an_option_of_another_method_is_unknown(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge: {method: mean, options: {normalize: true}}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:33: merge.options: unknown key 'normalize'
          3 | merge: {method: mean, options: {normalize: true}}
            |                                 ^^^^^^^^^
          hint: the method 'mean' has no options
        """)


def test_an_unknown_method_is_refused_with_the_near_one(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge:
          overrides: [{tensors: "fc.*", method: liner}]
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:4:41: merge.overrides[0].method: there is no merge method 'liner'
          4 |   overrides: [{tensors: "fc.*", method: liner}]
            |                                         ^^^^^
          hint: did you mean 'linear'?
        """)


def test_a_missing_section_is_named(refused, study):
    recipe = text_recipe(study, """
        vectors: [./site-a]
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:1:1: 'base:' is missing
          1 | vectors: [./site-a]
            | ^
        """)


def test_a_recipe_without_an_output_says_where_to_give_one(refused, study):
    recipe = write_recipe(study / "recipe.yaml", base="./base", vectors=["./site-a"])
    assert refused("merge", recipe) == said("""
        error: recipe.yaml: no 'output:' is given
          hint: add output: ./fused, or use -o DIR
        """)


def test_a_weight_beside_example_weights_is_a_contradiction(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors:
          - {vector: ./site-a, weight: 2}
        merge: {method: linear, weights: examples}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:32: vectors[0].weight: a weight is given although merge.weights is 'examples'; keep one of the two
          3 |   - {vector: ./site-a, weight: 2}
            |                                ^
        """)


def test_statistics_without_images_say_what_to_name(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        recalibrate: {mode: statistics}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:1: recalibrate: mode 'statistics' needs 'images:'
          3 | recalibrate: {mode: statistics}
            | ^^^^^^^^^^^
          hint: name a folder or data set of public images, or use mode: moments or none
        """)


def test_an_override_that_is_no_regular_expression_is_shown_at_its_place(refused, study):
    recipe = text_recipe(study, """
        base: ./base
        vectors: [./site-a]
        merge: {overrides: [{tensors: "fc("}]}
        """)  # fmt: skip
    assert refused("merge", recipe) == said("""
        recipe.yaml:3:31: merge.overrides[0].tensors: not a regular expression: missing ), unterminated subpattern at position 2
          3 | merge: {overrides: [{tensors: "fc("}]}
            |                               ^^^^^
        """)


def test_an_override_that_matches_nothing_shows_what_a_name_looks_like(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, merge={"overrides": [{"tensors": "classifier", "scale": 0}]})
    assert refused("merge", recipe) == said("""
        error: the override 'classifier' matches no tensor of the base
          hint: a pattern must match a whole name such as 'bn1.bias'
        """)


def test_a_local_path_has_no_revision(refused, study):
    recipe = write_recipe(study / "recipe.yaml", base="./base", vectors=[{"vector": "./site-a", "revision": "v1"}])
    assert refused("plan", recipe) == said("""
        error: './site-a' is a local folder and has no revision 'v1'
        """)


# What is not there


def test_a_missing_recipe_is_named(refused):
    assert refused("merge", "nothing.yaml") == said("""
        error: there is no file 'nothing.yaml'
        """)


def test_a_folder_is_no_recipe(refused):
    assert refused("merge", "./base") == said("""
        error: cannot read 'base': Is a directory
        """)


def test_a_missing_base_is_named(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "base": "./bass"})
    assert refused("merge", recipe) == said("""
        error: there is no folder 'TMP/bass'
        """)


def test_every_missing_vector_is_named(refused, study):
    recipe = write_recipe(study / "recipe.yaml", base="./base", vectors=["./site-c", "./site-a", "./site-d"])
    assert refused("merge", recipe) == said("""
        error: there is no folder 'TMP/site-c'
        error: there is no folder 'TMP/site-d'
        """)


def test_a_word_that_is_neither_folder_nor_repo_says_how_to_write_a_path(refused, study):
    recipe = write_recipe(study / "recipe.yaml", base="bass", vectors=["./site-a"])
    assert refused("merge", recipe) == said("""
        error: 'bass' is neither an existing folder nor a Hub repo such as 'owner/name' or 'owner/name@revision'
          hint: start a local path with ./ or /
        """)


def test_a_folder_without_weights_is_no_model(refused, study):
    (study / "base" / WEIGHTS).unlink()
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base' has no model.safetensors
          hint: expected a transformers or timm model folder
        """)


def test_an_empty_folder_is_neither_model_nor_vector(refused, study):
    (study / "empty").mkdir()
    recipe = write_recipe(study / "recipe.yaml", base="./empty", vectors=["./site-a"])
    assert refused("merge", recipe) == said("""
        error: 'TMP/empty' has no config.json: it is no model folder
        """)
    recipe = write_recipe(study / "recipe.yaml", base="./base", vectors=["./empty"])
    assert refused("merge", recipe) == said("""
        error: 'TMP/empty' has no datavec.json: it is not a vector
        """)


# Vectors and bases that do not belong together


def test_a_vector_of_another_base_is_refused(refused, study):
    save_with(study / "base", study / "other", load_file(study / "tuned-site-a" / WEIGHTS))
    make_vector(study / "other", study / "tuned-site-b", study / "foreign")
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "vectors": ["./site-a", "./foreign"]})
    ours, theirs = shortened(study / "base"), shortened(study / "other")
    assert refused("merge", recipe).replace(ours, "OURS").replace(theirs, "THEIRS") == said("""
        error: the vector 'TMP/foreign' was made from the base 'other', not from 'base': digest THEIRS, expected OURS
          hint: all vectors of a merge start from one base; check `base:` in the recipe
        """)


def test_a_base_that_changed_after_the_vectors_were_made_is_refused(refused, study):
    before = shortened(study / "base")
    rewrite_model(study / "base", with_value(study / "base" / WEIGHTS, "fc.bias", 1.0))
    after = shortened(study / "base")
    assert refused("merge", "recipe.yaml").replace(before, "BEFORE").replace(after, "AFTER") == said("""
        error: the base 'base' has changed since the vector 'TMP/site-a' was made: digest BEFORE, expected AFTER
          hint: use the base as it was (pin its revision), or make the vector again from this one
        error: the base 'base' has changed since the vector 'TMP/site-b' was made: digest BEFORE, expected AFTER
          hint: use the base as it was (pin its revision), or make the vector again from this one
        """)


def test_a_vector_given_as_a_model_is_told_apart(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "vectors": [{"model": "./site-a"}]})
    assert refused("merge", recipe) == said("""
        error: 'TMP/site-a' has no config.json: it is a vector, not a model
          hint: write {vector: ...} for it
        """)
    assert refused("diff", "base", "site-a", "-o", "new") == said("""
        error: 'TMP/site-a' has no config.json: it is a vector, not a model
          hint: write {vector: ...} for it
        """)


def test_a_vector_given_as_the_base_is_told_apart(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "base": "./site-a"})
    assert refused("merge", recipe) == said("""
        error: 'TMP/site-a' has no config.json: it is a vector, not a model
          hint: write {vector: ...} for it
        """)


def test_a_model_given_as_a_vector_says_how_to_write_it(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "vectors": ["./tuned-site-a"]})
    assert refused("merge", recipe) == said("""
        error: 'TMP/tuned-site-a' has no datavec.json: it is a model: write {model: ...} for it
        """)


def test_weights_for_a_method_that_ignores_them_are_refused(refused, study):
    vectors = [{"vector": "./site-a", "weight": 2}, "./site-b"]
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "vectors": vectors})
    assert refused("merge", recipe) == said("""
        error: the method 'sum' ignores weights, but they differ (site-a: 2, site-b: 1)
          hint: use method: linear, or leave the weights out
        """)


def test_weights_that_sum_to_zero_have_no_average(refused, study):
    vectors = [{"vector": "./site-a", "weight": 0.5}, {"vector": "./site-b", "weight": -0.5}]
    recipe = write_recipe(study / "recipe.yaml", **{**GOOD, "vectors": vectors}, merge={"method": "linear"})
    assert refused("merge", recipe) == said("""
        error: 'linear' averages, but the weight of 'site-b' is below zero
          hint: use weights of at least 0; method: linear with options: {normalize: false} takes negative ones
        """)


def test_example_weights_need_every_site_to_declare_its_counts(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, merge={"method": "linear", "weights": "examples"})
    assert refused("merge", recipe) == said("""
        error: merge.weights is 'examples', but 'site-a' declares no example counts
          hint: the site can add them with `hf-datavec diff --share-counts`; or give each vector a weight
        error: merge.weights is 'examples', but 'site-b' declares no example counts
          hint: the site can add them with `hf-datavec diff --share-counts`; or give each vector a weight
        """)


def test_moments_need_statistics_in_every_vector(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, recalibrate={"mode": "moments"})
    assert refused("merge", recipe) == said("""
        error: mode 'moments' needs BatchNorm statistics, but the vector 'site-a' has none
          hint: the site can make one with `hf-datavec diff --with-statistics`; or use mode: statistics
        error: mode 'moments' needs BatchNorm statistics, but the vector 'site-b' has none
          hint: the site can make one with `hf-datavec diff --with-statistics`; or use mode: statistics
        """)


# Damaged and hostile vectors


def test_nan_in_a_vector_names_the_site_and_the_tensor(refused, study):
    rewrite_vector(study / "site-b", with_value(study / "site-b" / VECTOR, "fc.weight", float("nan"), count=3))
    assert refused("merge", "recipe.yaml") == said("""
        note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`
        error: 'site-b': tensor 'fc.weight' has 3 NaN or infinite values of 288
          hint: the training diverged or the file is damaged; a vector must be finite
        """)


def test_infinity_in_a_vector_names_the_site_and_the_tensor(refused, study):
    rewrite_vector(study / "site-a", with_value(study / "site-a" / VECTOR, "fc.bias", float("-inf")))
    assert refused("merge", "recipe.yaml") == said("""
        note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`
        error: 'site-a': tensor 'fc.bias' has 1 NaN or infinite values of 3
          hint: the training diverged or the file is damaged; a vector must be finite
        """)


def test_a_tensor_missing_from_the_vectors_file_is_named(refused, study):
    rewrite_vector(study / "site-a", {"fc.bias": None})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' lacks tensors that its manifest lists: 'fc.bias'
          hint: make the vector again with `hf-datavec diff`
        """)


def test_a_tensor_missing_from_file_and_manifest_is_named(refused, study):
    rewrite_vector(study / "site-a", {"fc.bias": None}, listing=True)
    assert refused("merge", "recipe.yaml") == said("""
        error: the vector 'TMP/site-a' lacks tensors of the base: 'fc.bias'
        """)


def test_an_extra_tensor_in_the_vectors_file_is_named(refused, study):
    rewrite_vector(study / "site-a", {"fc.extra": torch.zeros(2)})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' has tensors that its manifest does not list: 'fc.extra'
          hint: make the vector again with `hf-datavec diff`
        """)


def test_an_extra_tensor_in_file_and_manifest_is_named(refused, study):
    rewrite_vector(study / "site-a", {"fc.extra": torch.zeros(2)}, listing=True)
    assert refused("merge", "recipe.yaml") == said("""
        error: the vector 'TMP/site-a' has tensors that the base lacks: 'fc.extra'
        """)


def test_a_shape_other_than_the_manifests_is_shown_with_both(refused, study):
    rewrite_vector(study / "site-a", {"fc.bias": torch.zeros(4)})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors': tensor 'fc.bias' has shape [4], its manifest says [3]
        """)


def test_a_shape_other_than_the_bases_is_shown_with_both(refused, study):
    rewrite_vector(study / "site-a", {"conv1.0.weight": torch.zeros(2, 2)}, listing=True)
    assert refused("merge", "recipe.yaml") == said("""
        error: the vector 'TMP/site-a': tensor 'conv1.0.weight' has shape [2, 2], expected [16, 3, 3, 3]
        """)


def test_an_integer_vector_is_refused(refused, study):
    rewrite_vector(study / "site-a", {"fc.bias": torch.zeros(3, dtype=torch.int32)})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors': tensor 'fc.bias' has type I32, expected F32
          hint: make the vector again with `hf-datavec diff`
        """)


def test_a_truncated_vector_is_refused(refused, study):
    cut(study / "site-a" / VECTOR, 100)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' is not a complete safetensors file: Error while deserializing header: incomplete metadata, file not fully covered
          hint: copy or download the file again
        """)


def test_a_truncated_base_is_refused(refused, study):
    cut(study / "base" / WEIGHTS, 1)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/model.safetensors' is not a complete safetensors file: Error while deserializing header: incomplete metadata, file not fully covered
          hint: copy or download the file again
        """)


def test_an_empty_file_is_no_vector(refused, study):
    (study / "site-a" / VECTOR).write_bytes(b"")
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' is not a complete safetensors file: Error while deserializing header: header too small
          hint: copy or download the file again
        """)


def test_one_altered_bit_in_a_vector_is_noticed(refused, study):
    expected = open_file(study / "site-a" / VECTOR).digest[:19]
    content = bytearray((study / "site-a" / VECTOR).read_bytes())
    content[-1] ^= 1
    (study / "site-a" / VECTOR).write_bytes(content)
    found = open_file(study / "site-a" / VECTOR).digest[:19]
    assert refused("merge", "recipe.yaml").replace(found, "FOUND").replace(expected, "EXPECTED") == said("""
        note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`
        error: 'TMP/site-a/vector.safetensors' is not the file its datavec.json describes: digest FOUND..., expected EXPECTED...
          hint: the file was changed or damaged; ask the site to send it again
        """)


def test_an_absurd_header_length_is_refused_at_once(refused, study):
    absurd_header(study / "site-a" / VECTOR)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' is not a complete safetensors file: Error while deserializing header: header too large
          hint: copy or download the file again
        """)


def test_an_absurd_header_length_in_the_base_is_refused_at_once(refused, study):
    absurd_header(study / "base" / WEIGHTS)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/model.safetensors' is not a complete safetensors file: Error while deserializing header: header too large
          hint: copy or download the file again
        """)


def test_a_tensor_name_that_is_a_path_is_refused(refused, study):
    rewrite_vector(study / "site-a", {"../../evil": torch.zeros(1)}, consistent=False, listing=True)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/vector.safetensors' has a tensor named '../../evil', expected a name such as 'layer1.0.conv1.weight'
          hint: a name that is a path is never followed; ask where the file comes from
        """)


def test_a_tensor_name_that_is_a_path_is_refused_in_a_base(refused, study):
    rewrite_model(study / "base", {"../fc.weight": torch.zeros(1)})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/model.safetensors' has a tensor named '../fc.weight', expected a name such as 'layer1.0.conv1.weight'
          hint: a name that is a path is never followed; ask where the file comes from
        """)


def test_a_vector_folder_with_only_a_pickle_is_not_read(refused, study):
    torch.save(load_file(study / "site-a" / VECTOR), study / "site-a" / "vector.pth")
    (study / "site-a" / VECTOR).unlink()
    assert refused("merge", "recipe.yaml") == said("""
        error: there is no file 'TMP/site-a/vector.safetensors'
        """)


def test_a_base_folder_with_only_a_pickle_is_not_read(refused, study):
    torch.save(load_file(study / "base" / WEIGHTS), study / "base" / "pytorch_model.bin")
    (study / "base" / WEIGHTS).unlink()
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base' holds only pickle files ('pytorch_model.bin'), expected model.safetensors
          hint: a pickle can run code, so none is read from a folder; save the model with save_pretrained, or give `diff` the local .pth/.bin file itself
        """)


def test_a_shard_outside_the_folder_is_not_read(refused, study):
    shutil.move(study / "base" / WEIGHTS, study / "x.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(study / "x.safetensors"), "../x.safetensors")}
    (study / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/model.safetensors.index.json' names the file '../x.safetensors', expected a .safetensors file beside it
        """)


def test_an_index_whose_shards_are_no_names_is_refused(refused, study):
    (study / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"fc.bias": 5}}')
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/model.safetensors.index.json' names the file '5', expected a .safetensors file beside it
        """)


def test_a_configuration_that_asks_for_code_is_refused(refused, study):
    change_json(study / "base" / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/base/config.json' asks to run code from its repo (auto_map)
          hint: code from a repo is never run; use a model that transformers or timm ships
        """)


def test_a_configuration_that_is_not_json_is_refused(refused, study):
    (study / "base" / "config.json").write_text("{")
    assert refused("merge", "recipe.yaml") == said("""
        error: cannot read 'TMP/base/config.json': Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
        """)


@pytest.mark.parametrize(
    "fields", [{"pretrained_cfg": "x"}, {"label_names": 5}, {"label_names": None, "id2label": ["cat", "dog", "owl"]}],
    ids=["pretrained_cfg", "label_names", "id2label"],
)  # fmt: skip
def test_a_configuration_with_fields_of_the_wrong_kind_is_refused(fields, refused, study):
    change_json(study / "base" / "config.json", **fields)
    place = next(name for name, value in fields.items() if value is not None)
    message = refused("merge", "recipe.yaml")
    assert message.startswith("error: 'TMP/base/config.json'")
    assert place in message


def test_a_manifest_that_is_not_json_is_refused(refused, study):
    (study / "site-a" / MANIFEST).write_text("not json")
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/datavec.json' is damaged: the file: Invalid JSON: expected ident at line 1 column 2
        """)


def test_a_manifest_with_an_unknown_field_is_refused(refused, study):
    change_json(study / "site-a" / MANIFEST, wieght=1)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/datavec.json' is damaged: wieght: Extra inputs are not permitted
        """)


def test_a_manifest_that_lacks_a_field_is_refused(refused, study):
    manifest = json.loads((study / "site-a" / MANIFEST).read_text())
    del manifest["labels"]
    (study / "site-a" / MANIFEST).write_text(json.dumps(manifest))
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/datavec.json' is damaged: labels: Field required
        """)


@pytest.mark.parametrize("fields", [{}, {"unheard_of": 1}], ids=["same fields", "new fields"])
def test_a_manifest_of_a_newer_format_asks_for_an_upgrade(fields, refused, study):
    change_json(study / "site-a" / MANIFEST, format=2, **fields)
    assert refused("merge", "recipe.yaml") == said("""
        error: 'TMP/site-a/datavec.json' has format 2, this version reads 1
          hint: upgrade hf-datavec
        """)


def test_a_vector_that_names_a_label_twice_is_refused(refused, study):
    change_json(study / "site-a" / MANIFEST, labels=["cat", "cat", "owl"])
    message = refused("merge", "recipe.yaml")
    assert message.startswith("error: 'TMP/site-a/datavec.json'")
    assert "'cat'" in message


# Tuned models


def test_nan_in_a_tuned_model_is_refused(refused, study):
    changes = with_value(study / "tuned-site-a" / WEIGHTS, "fc.weight", float("nan"), count=2)
    rewrite_model(study / "tuned-site-a", changes)
    assert refused("diff", "base", "tuned-site-a", "-o", "new") == said("""
        error: 'tuned-site-a': tensor 'fc.weight' has 2 NaN or infinite values of 288
          hint: the training diverged or the file is damaged; a vector must be finite
        """)


def test_infinity_in_a_tuned_model_is_refused(refused, study):
    rewrite_model(study / "tuned-site-a", with_value(study / "tuned-site-a" / WEIGHTS, "fc.bias", float("inf")))
    assert refused("diff", "base", "tuned-site-a", "-o", "new") == said("""
        error: 'tuned-site-a': tensor 'fc.bias' has 1 NaN or infinite values of 3
          hint: the training diverged or the file is damaged; a vector must be finite
        """)


def test_a_tuned_model_of_other_shapes_is_refused_with_all_of_them(refused, study):
    rewrite_model(study / "tuned-site-a", {"conv1.0.weight": torch.zeros(1, 1), "fc.bias": torch.zeros(5)})
    assert refused("diff", "base", "tuned-site-a", "-o", "new") == said("""
        error: 'tuned-site-a': tensor 'conv1.0.weight' has shape [1, 1], expected [16, 3, 3, 3]
        error: 'tuned-site-a': tensor 'fc.bias' has shape [5], expected [3]
          hint: name the rows of its head with --labels
        """)


def test_a_tuned_model_that_lacks_a_tensor_is_refused(refused, study):
    rewrite_model(study / "tuned-site-a", {"conv1.0.weight": None})
    assert refused("diff", "base", "tuned-site-a", "-o", "new") == said("""
        error: 'tuned-site-a' lacks tensors of the base 'TMP/base': 'conv1.0.weight'
        """)


def test_a_tuned_model_with_an_extra_tensor_is_refused(refused, study):
    rewrite_model(study / "tuned-site-a", {"neck.weight": torch.ones(2, 7)})
    assert refused("diff", "base", "tuned-site-a", "-o", "new") == said("""
        error: 'tuned-site-a' has tensors that the base 'TMP/base' lacks: 'neck.weight'
          hint: a vector needs the very network of the base; was another architecture trained?
        """)


class MarkerWriter:
    """Unpickling this writes a file: the mark of executed code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_executed(writer, refused, study, tmp_path_factory):
    marker = tmp_path_factory.mktemp("marker") / "executed"
    evil = {"fc.bias": torch.zeros(3), "evil": MarkerWriter(marker)}
    if writer == "torch":
        torch.save(evil, study / "tuned.pth")
    else:
        (study / "tuned.pth").write_bytes(pickle.dumps(MarkerWriter(marker)))
    assert refused("diff", "base", "tuned.pth", "-o", "new") == said("""
        error: 'tuned.pth' cannot be read as a state dict of tensors only (UnpicklingError)
          hint: save it with torch.save(model.state_dict(), ...); pickles with other objects are refused
        """)
    assert not marker.exists()
    if writer == "pickle":  # the trap is a real one
        pickle.loads((study / "tuned.pth").read_bytes())
        assert marker.exists()


def test_a_file_that_is_no_model_is_refused(refused, study):
    (study / "tuned.onnx").write_bytes(b"onnx")
    assert refused("diff", "base", "tuned.onnx", "-o", "new") == said("""
        error: 'tuned.onnx' is no tuned model
          hint: expected a model folder, a .safetensors file or a state dict (.pth, .pt, .bin)
        """)


def test_sharing_counts_that_were_never_recorded_is_refused(refused):
    assert refused("diff", "base", "tuned-site-a", "--share-counts", "-o", "new") == said("""
        error: 'tuned-site-a' does not say how many images it was trained on
          hint: --share-counts needs the training.json that `hf-datavec finetune` writes
        """)


def test_labels_of_a_tuned_head_that_repeat_are_refused(refused):
    message = refused("diff", "base", "tuned-site-a", "--labels", "cat,cat,owl", "-o", "new")
    assert message.startswith("error: --labels names 'cat' twice")


def test_fewer_labels_than_rows_of_the_tuned_head_are_refused(refused):
    assert refused("diff", "base", "tuned-site-a", "--labels", "cat,owl", "-o", "new") == said("""
        error: 'tuned-site-a': tensor 'fc.bias' has shape [3], expected [2]
          hint: name the rows of its head with --labels
        error: 'tuned-site-a': tensor 'fc.weight' has shape [3, 96], expected [2, 96]
          hint: name the rows of its head with --labels
        """)


# Images


def text_as_picture(study: Path) -> None:
    (study / "images" / "dog" / "001.png").write_text("I am not a picture")


def half_a_picture(study: Path) -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=random, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(study / "images" / "dog" / "001.png")
    cut(study / "images" / "dog" / "001.png", 6000)


BROKEN = pytest.mark.parametrize(
    ("breaks", "reason"),
    [(text_as_picture, "cannot identify image file"), (half_a_picture, "image file is truncated")],
)


@BROKEN
def test_an_unreadable_test_image_is_named(breaks, reason, refused, study):
    breaks(study)
    message = refused("evaluate", "base", "images").replace(reason, "REASON")
    assert message == said("""
        error: cannot read the image 'TMP/images/dog/001.png': REASON
          hint: repair or remove the file and run again
        """)


@BROKEN
def test_an_unreadable_calibration_image_is_named(breaks, reason, refused, study):
    breaks(study)
    recipe = write_recipe(study / "recipe.yaml", **GOOD, recalibrate={"images": "./images", "batch_size": 4})
    warning, message = refused("merge", recipe).replace(reason, "REASON").split("\n", 1)
    assert warning.startswith("warning: No site shares BatchNorm statistics")
    assert message == said("""
        error: cannot read the image 'TMP/images/dog/001.png': REASON
          hint: repair or remove the file and run again
        """)


def test_an_unreadable_test_image_in_the_recipe_leaves_no_result(refused, study):
    text_as_picture(study)
    recipe = write_recipe(study / "recipe.yaml", **GOOD, evaluate={"images": "./images"})
    assert refused("merge", recipe) == said("""
        note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`
        error: cannot read the image 'TMP/images/dog/001.png': cannot identify image file
          hint: repair or remove the file and run again
        """)


def test_an_unreadable_training_image_is_named_and_leaves_nothing(refused, study):
    text_as_picture(study)
    assert refused("finetune", "base", "images", "--epochs", "1", "--device", "cpu", "-o", "new") == said("""
        error: cannot read the image 'TMP/images/dog/001.png': cannot identify image file
          hint: repair or remove the file and run again
        """)


def test_training_goes_ahead_once_the_unreadable_image_is_removed_as_the_message_says(study, run):
    text_as_picture(study)
    train = ("finetune", "base", "images", "--epochs", "1", "--device", "cpu", "-o", "new")
    assert run(*train).code == 2
    (study / "images" / "dog" / "001.png").unlink()
    outcome = run(*train)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in study.iterdir() if "new" in path.name] == ["new"]


def test_an_empty_image_folder_says_what_was_expected(refused, study):
    (study / "none").mkdir()
    assert refused("evaluate", "base", "none") == said("""
        error: the folder 'none' holds no images
          hint: expected .jpg, .jpeg, .png ... files
        """)


def test_an_empty_calibration_folder_says_what_was_expected(refused, study):
    (study / "none").mkdir()
    recipe = write_recipe(study / "recipe.yaml", **GOOD, recalibrate={"images": "./none"})
    assert refused("merge", recipe) == said("""
        error: the folder './none' holds no images
          hint: expected .jpg, .jpeg, .png ... files
        """)


def test_a_folder_without_pictures_is_refused(refused, study):
    (study / "texts").mkdir()
    (study / "texts" / "notes.txt").write_text("no picture here")
    message = refused("evaluate", "base", "texts")
    assert message == said("""
        error: 'texts' holds no images; its columns are 'text'
        """)


def test_a_missing_image_folder_is_named(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, recalibrate={"images": "./imagse"})
    assert refused("merge", recipe) == said("""
        error: there is no folder 'TMP/imagse'
        """)


def test_pictures_without_labels_cannot_be_evaluated_on(refused, study):
    (study / "flat").mkdir()
    for picture in sorted((study / "images").glob("*/*.png")):
        shutil.copyfile(picture, study / "flat" / f"{picture.parent.name}-{picture.name}")
    assert refused("evaluate", "base", "flat") == said("""
        error: the images in 'flat' have no labels
          hint: put each class in a folder of its own, or name a column 'label' (columns: 'image')
        """)


def test_a_split_of_a_folder_without_splits_is_refused(refused):
    assert refused("evaluate", "base", "images", "--split", "tset") == said("""
        error: 'images' has no splits, but 'tset' is asked for
          hint: leave split out
        """)


def test_a_label_that_the_model_lacks_is_refused_in_evaluate(refused, study):
    make_images(study / "zoo", labels=("cat", "newt"), each=2)
    assert refused("evaluate", "base", "zoo") == said("""
        error: the images in 'zoo' have labels that the model lacks: 'newt'; the model knows 'cat', 'dog', 'owl'
          hint: rename the classes, or start from a base that has them
        """)


def test_a_label_that_the_model_lacks_is_refused_in_finetune(refused, study):
    make_images(study / "zoo", labels=("cat", "owls"), each=2)
    assert refused("finetune", "base", "zoo", "-o", "new") == said("""
        error: the images in 'zoo' have labels that the model lacks: 'owls'; the model knows 'cat', 'dog', 'owl'
          hint: did you mean 'owl'?
        """)


def test_a_label_that_the_fused_model_will_lack_is_refused_before_merging(refused, study):
    make_images(study / "zoo", labels=("cat", "dgo"), each=2)
    recipe = write_recipe(study / "recipe.yaml", **GOOD, evaluate={"images": "./zoo"})
    assert refused("merge", recipe) == said("""
        error: the images in './zoo' have labels that the model lacks: 'dgo'; the model knows 'cat', 'dog', 'owl'
          hint: did you mean 'dog'?
        """)


# Options, outputs, results


def test_an_existing_output_is_never_overwritten(refused, study):
    (study / "fused").mkdir()
    assert refused("merge", "recipe.yaml") == said("""
        error: output 'TMP/fused' already exists
          hint: nothing is overwritten: remove it, or choose another folder with -o
        """)


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "recipe.yaml", "-o", "taken"),
        ("diff", "base", "tuned-site-a", "-o", "taken"),
        ("init", "base", "--labels", "a,b", "-o", "taken"),
        ("finetune", "base", "images", "-o", "taken"),
        ("push", "site-a", "./taken"),
    ],
    ids=lambda command: command[0],
)
def test_no_command_overwrites_a_file(command, refused, study):
    (study / "taken").write_text("mine")
    assert refused(*command).replace("TMP/", "") == said("""
        error: output 'taken' already exists
          hint: nothing is overwritten: remove it, or choose another folder with -o
        """)


def test_an_unknown_option_is_named(refused):
    assert refused("merge", "recipe.yaml", "--forec") == said("""
        usage: hf-datavec [-h] [--version] COMMAND ...
        hf-datavec: error: unrecognized arguments: --forec
        """)


def test_an_option_out_of_range_on_the_command_line_is_refused(refused):
    assert refused("evaluate", "base", "images", "--batch-size", "0").splitlines()[-1:] == [
        "hf-datavec evaluate: error: argument --batch-size: expected a whole number of at least 1, got 0"
    ]


def test_a_number_that_is_none_on_the_command_line_is_refused(refused):
    assert refused("evaluate", "base", "images", "--batch-size", "many").splitlines()[-1:] == [
        "hf-datavec evaluate: error: argument --batch-size: expected a whole number of at least 1, got many"
    ]


def test_init_refuses_labels_that_repeat(refused):
    assert refused("init", "base", "--labels", "cat,dog,cat", "-o", "new") == said("""
        error: --labels names 'cat' twice
        """)


@pytest.mark.parametrize("labels", ["cat", "cat,", ""])
def test_init_refuses_fewer_than_two_labels(labels, refused):
    assert refused("init", "base", "--labels", labels, "-o", "new").replace(repr(labels), "GIVEN") == said("""
        error: --labels needs at least two names separated by commas, got GIVEN
        """)


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "recipe.yaml", "--device", "cuda"),
        ("evaluate", "base", "images", "--device", "cuda"),
        ("finetune", "base", "images", "-o", "new", "--device", "cuda"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_refused(command, refused):
    assert refused(*command).removeprefix(NOTE) == said("""
        error: --device cuda: torch sees no GPU on this machine
          hint: use --device auto or cpu
        """)


def test_a_result_that_overflows_its_type_is_refused(refused, study):
    recipe = write_recipe(study / "recipe.yaml", **GOOD, merge={"scale": 1e7}, dtype="float16")
    message = refused("merge", recipe)
    assert message == said("""
        note: BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`
        error: the fused tensor 'bn1.bias' does not fit F16 (largest value 5.44e+05)
          hint: use a smaller scale, or dtype: float32
        """)


def test_a_folder_that_is_neither_model_nor_vector_is_not_pushed(refused):
    assert refused("push", "images", "./copy") == said("""
        error: 'TMP/images' has no config.json: it is no model folder
        """)


def test_a_missing_folder_is_not_pushed(refused):
    assert refused("push", "nothing", "./copy") == said("""
        error: 'nothing' is neither an existing folder nor a Hub repo such as 'owner/name' or 'owner/name@revision'
          hint: start a local path with ./ or /
        """)


def test_vectors_of_different_networks_are_not_compared(refused, study):
    rewrite_vector(study / "site-b", {"conv1.0.weight": torch.zeros(2, 2)}, listing=True)
    assert refused("inspect", "site-a", "site-b") == said("""
        error: the vectors 'TMP/site-a' and 'TMP/site-b' belong to different networks
        """)
