"""A mergekit configuration is read as the recipe that does the same, or refused where none does."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from networks import make_network, tune
from safetensors.torch import load_file

from hf_datavec import recipe as recipes
from hf_datavec.errors import InputError
from hf_datavec.located import parse

PLAIN = """\
models:
  - model: ./a
    parameters: {weight: 3}
  - model: ./b
    parameters:
      weight: 1.0
merge_method: linear
base_model: ./base
dtype: float32
"""


def translate(text: str, *, base: str | None = None) -> recipes.mergekit.Translation:
    return recipes.mergekit.translate(parse(textwrap.dedent(text), "merge.yml"), base=base)


def refusal(text: str, *, base: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        recipes.check(translate(text, base=base).document)
    return str(caught.value)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and two tuned models in full."""
    base = make_network("vit", tmp_path / "base")
    for seed, name in enumerate("ab", start=1):
        tune(base, tmp_path / name, seed=seed)
    return tmp_path


def test_a_plain_merge_becomes_a_recipe():
    found = translate(PLAIN)
    assert found.document.data == {
        "merge": {"method": "linear", "options": {"normalize": True}},
        "base": "./base",
        "vectors": [{"model": "./a", "weight": 3}, {"model": "./b", "weight": 1.0}],
        "dtype": "float32",
    }
    assert found.notes == ()


def test_merge_reads_a_configuration_and_averages_whole_models(models, run):
    (models / "merge.yml").write_text(PLAIN)
    outcome = run("merge", "merge.yml", "-o", "fused")
    assert outcome.code == 0, outcome.err
    a, b, fused = (load_file(models / name / "model.safetensors") for name in ("a", "b", "fused"))
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, (3 * a[name] + b[name]) / 4, rtol=0, atol=1e-6)
    assert run("plan", "merge.yml").code == 0


def test_a_converted_recipe_in_another_folder_is_commented_valid_and_gives_the_same_bytes(models, run):
    (models / "merge.yml").write_text(PLAIN + "tokenizer_source: base\n")
    outcome = run("convert", "merge.yml", "-o", "recipes/recipe.yaml")
    assert (outcome.code, outcome.out) == (0, "recipe: recipes/recipe.yaml\n")
    assert outcome.err == "note: 'tokenizer_source' is left out: an image classifier has no use for it\n"
    text = (models / "recipes" / "recipe.yaml").read_text()
    assert text.startswith("# Made from merge.yml, a mergekit configuration. Paths are relative to this file.\n# 'tok")
    found = recipes.load(models / "recipes" / "recipe.yaml")
    assert (found.base, [entry.model for entry in found.entries]) == ("../base", ["../a", "../b"])
    assert run("merge", "recipes/recipe.yaml", "-o", "one").code == 0
    assert run("merge", "merge.yml", "-o", "two").code == 0
    one, two = ((models / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_base_on_the_command_line_is_relative_to_the_working_folder(models, run):
    (models / "configs").mkdir()
    text = PLAIN.replace("base_model: ./base\n", "").replace("./a", "../a").replace("./b", "../b")
    (models / "configs" / "merge.yml").write_text(text)
    assert run("convert", "configs/merge.yml", "--base", "./base", "-o", "recipe.yaml").code == 0
    found = recipes.load(models / "recipe.yaml")
    assert (found.base, [entry.model for entry in found.entries]) == ("./base", ["./a", "./b"])


def test_references_to_the_hub_stay_as_they_are(tmp_path, run):
    (tmp_path / "merge.yml").write_text(PLAIN.replace("./", "owner/").replace("owner/a", "owner/a@v1"))
    assert run("convert", "merge.yml", "-o", "deep/down/recipe.yaml").code == 0
    found = recipes.load(tmp_path / "deep" / "down" / "recipe.yaml")
    assert (found.base, [entry.model for entry in found.entries]) == ("owner/base", ["owner/a@v1", "owner/b"])


def test_an_existing_file_is_not_overwritten(tmp_path, run):
    (tmp_path / "merge.yml").write_text(PLAIN)
    (tmp_path / "recipe.yaml").write_text("mine")
    outcome = run("convert", "merge.yml", "-o", "recipe.yaml")
    assert outcome.code == 2
    assert "already exists" in outcome.err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_weight_for_all_counts_the_base_as_one_more_model_as_mergekit_does():
    text = "models: [{model: ./a}, {model: ./b}]\nmerge_method: linear\nbase_model: ./base\nparameters: {weight: 1}\n"
    found = translate(text)
    assert [entry["model"] for entry in found.document.data["vectors"]] == ["./a", "./b", "./base"]
    assert found.notes == ("mergekit counts base_model as one more model; so does this recipe",)
    listed = translate(text.replace("{model: ./b}", "{model: ./base}"))
    assert [entry["model"] for entry in listed.document.data["vectors"]] == ["./a", "./base"]
    assert listed.notes == ()


def test_the_second_type_is_that_of_the_result():
    assert translate(PLAIN + "out_dtype: torch.bfloat16\n").document.data["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("weight: 1.0", "weight: [0.1, 0.3]"),
            """\
            merge.yml:6:15: models[1].parameters.weight: 'weight' is given per layer or per tensor
              6 |       weight: [0.1, 0.3]
                |               ^^^^^^^^^^
              hint: give one number; merge.overrides of a recipe treats single tensors differently""",
        ),
        (
            ("weight: 1.0", "weight: {value: 0.5, filter: mlp}"),
            """\
            merge.yml:6:15: models[1].parameters.weight: 'weight' is given per layer or per tensor
              6 |       weight: {value: 0.5, filter: mlp}
                |               ^^^^^^^^^^^^^^^^^^^^^^^^^
              hint: give one number; merge.overrides of a recipe treats single tensors differently""",
        ),
        (
            ("weight: 1.0", "wieght: 1.0"),
            """\
            merge.yml:6:7: models[1].parameters: unknown key 'wieght'
              6 |       wieght: 1.0
                |       ^^^^^^
              hint: did you mean 'weight'?""",
        ),
        (
            ("weight: 1.0", "weight: much"),
            """\
            merge.yml:6:15: vectors[1].weight: expected a number, found 'much'
              6 |       weight: much
                |               ^^^^""",
        ),
        (
            ("weight: 1.0", "normalize: true"),
            """\
            merge.yml:6:7: models[1].parameters: 'normalize' is a parameter of the merge, not of a model
              6 |       normalize: true
                |       ^^^^^^^^^
              hint: give it under the top 'parameters:'""",
        ),
        (
            ("    parameters:\n      weight: 1.0\n", ""),
            """\
            merge.yml:4:12: models[1]: no 'weight' is given
              4 |   - model: ./b
                |            ^^^""",
        ),
        (
            ("base_model: ./base\n", ""),
            """\
            merge.yml:7:15: no 'base_model:' is given; a recipe needs what all were fine-tuned from
              7 | merge_method: linear
                |               ^^^^^^
              hint: name it: hf-datavec convert --base MODEL, or base_model: MODEL""",
        ),
        (
            ("merge_method: linear", "merge_method: passthrough"),
            """\
            merge.yml:7:15: merge_method: a recipe has no equal of mergekit's method 'passthrough'
              7 | merge_method: passthrough
                |               ^^^^^^^^^^^
              hint: known: """,
        ),
        (
            ("merge_method: linear\n", ""),
            """\
            merge.yml:1:1: 'merge_method:' is missing
              1 | models:
                | ^""",
        ),
        (
            ("- model: ./b", "- model: ./b+lora"),
            """\
            merge.yml:4:12: models[1].model: './b+lora' is a model with a LoRA adapter, which a recipe cannot say
              4 |   - model: ./b+lora
                |            ^^^^^^^^
              hint: merge the adapter into its model first, for example with PEFT's merge_and_unload""",
        ),
        (
            ("- model: ./b", "- model: {path: ./b}"),
            """\
            merge.yml:4:12: models[1].model: expected the name of a model as text
              4 |   - model: {path: ./b}
                |            ^^^^^^^^^^^""",
        ),
        (
            ("dtype: float32", "dtype: float64"),
            """\
            merge.yml:9:8: dtype: 'float64' is not one of float32, float16, bfloat16
              9 | dtype: float64
                |        ^^^^^^^
              hint: did you mean 'float16'?""",
        ),
        (
            ("dtype: float32", "dtpye: float32"),
            """\
            merge.yml:9:1: unknown key 'dtpye'
              9 | dtpye: float32
                | ^^^^^
              hint: did you mean 'dtype'?""",
        ),
        (
            ("dtype: float32", "parameters: {normalize: false}"),
            """\
            merge.yml:9:25: parameters.normalize: without normalize the weights must add up to 1, found 4: \
they weigh the base as well
              9 | parameters: {normalize: false}
                |                         ^^^^^
              hint: use merge_method: task_arithmetic""",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say_is_refused_at_its_place(change, message):
    old, new = change
    assert old in PLAIN
    expected = textwrap.dedent(message)
    found = refusal(PLAIN.replace(old, new))
    assert found.startswith(expected) if expected.endswith(" ") else found == expected


@pytest.mark.parametrize("key", ["slices", "modules"])
def test_parts_of_models_are_refused_in_words(key):
    text = f"merge_method: linear\n{key}:\n  - sources: []\n"
    assert refusal(text).splitlines()[:2] == [
        f"merge.yml:2:1: '{key}:' joins parts of models, which a recipe cannot say",
        f"  2 | {key}:",
    ]


def test_all_faults_are_told_at_once_in_the_order_of_the_lines():
    text = PLAIN.replace("weight: 3", "weigth: 3").replace("weight: 1.0", "weight: []") + "merge: {}\n"
    heads = [line for line in refusal(text).splitlines() if line.startswith("merge.yml")]
    assert [head.split(":")[1] for head in heads] == ["3", "6", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just text", "a mergekit configuration is a mapping"),
        ("merge_method: linear\n", "'models:' must list the models to merge"),
        ("merge_method: linear\nmodels: []\n", "'models:' must list the models to merge"),
        ("merge_method: linear\nmodels: [./a]\n", "models[0]: expected a mapping with 'model:'"),
        ("merge_method: [linear]\nmodels: [{model: a/b}]\n", "a recipe has no equal of mergekit's method '['linear']'"),
        (PLAIN + "parameters: 3\n", "parameters: expected a mapping"),
        (PLAIN.replace("./base", "[./base]"), "base_model: expected the name of a model as text"),
        (PLAIN.replace("./base", "~"), "no 'base_model:' is given"),
        (PLAIN + "merge_method: ties\n", "duplicate key 'merge_method'"),
    ],
)
def test_odd_configurations_get_a_message_and_no_traceback(text, message):
    assert message in refusal(text)
