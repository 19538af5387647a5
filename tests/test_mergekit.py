"""A mergekit configuration is read as the recipe that does the same, or refused where none does."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
from networks import digest, make_network, tune
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
    assert run("plan", "merge.yml", "--lock").code == 0
    assert run("merge", "merge.lock.yaml", "-o", "again").code == 0
    assert digest(models / "again" / "model.safetensors") == digest(models / "fused" / "model.safetensors")


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


# What the methods give, against the formulas of mergekit's documentation written out for single tensors


def elected(parts):
    """Where the sign of a weighted difference is that of their sum."""
    return [part.sign() == torch.stack(parts).sum(0).sign() for part in parts]


def kept(values, first, count):
    """The values whose rank by magnitude, from the smallest, is from `first` on, `count` of them."""
    order = values.abs().flatten().argsort()
    mask = torch.zeros(values.numel(), dtype=torch.double)
    mask[order[first : first + count]] = 1
    return values * mask.reshape(values.shape)


def task_arithmetic(deltas, weights):
    return sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))


def ties(deltas, weights):
    parts = [
        weight * kept(d, d.numel() - d.numel() // 2, d.numel() // 2) for weight, d in zip(weights, deltas, strict=True)
    ]
    agree = elected(parts)
    total = sum(part * same for part, same in zip(parts, agree, strict=True))
    divisor = sum(weight * same for weight, same in zip(weights, agree, strict=True))
    return total / divisor.where(divisor != 0, torch.ones(()).double())


def breadcrumbs(deltas, weights):
    parts = []
    for weight, delta in zip(weights, deltas, strict=True):
        count, top = delta.numel() // 2, delta.numel() // 4
        parts.append(weight * kept(delta, delta.numel() - count - top, count))
    return sum(parts)


def breadcrumbs_ties(deltas, weights):
    parts = [breadcrumbs([delta], [weight]) for delta, weight in zip(deltas, weights, strict=True)]
    return sum(part * same for part, same in zip(parts, elected(parts), strict=True))


def model_stock(deltas, weights):
    a, b = (delta.flatten() for delta in deltas)
    cosine = ((a @ b) / (a.norm() * b.norm())).clamp(min=0)
    t = 2 * cosine / (1 + cosine)
    return t * (deltas[0] + deltas[1]) / 2


def nuslerp(deltas, weights):
    a, b = (delta.flatten() for delta in deltas)
    angle = torch.acos((a @ b) / (a.norm() * b.norm()))
    t = weights[1] / sum(weights)
    return (torch.sin((1 - t) * angle) * deltas[0] + torch.sin(t * angle) * deltas[1]) / torch.sin(angle)


def sce(deltas, weights):
    energies = [delta.square().mean() for delta in deltas]
    agree = elected(deltas)
    total = sum(energy * delta * same for energy, delta, same in zip(energies, deltas, agree, strict=True))
    return total / sum(energy * same for energy, same in zip(energies, agree, strict=True))


CASES = {
    "task_arithmetic": (task_arithmetic, {"lambda": 0.5}, True),
    "ties": (ties, {"density": 0.5, "int8_mask": True}, True),
    "breadcrumbs": (breadcrumbs, {"density": 0.5, "gamma": 0.25}, True),
    "breadcrumbs_ties": (breadcrumbs_ties, {"density": 0.5, "gamma": 0.25}, True),
    "model_stock": (model_stock, {}, False),
    "nuslerp": (nuslerp, {}, True),
    "sce": (sce, {"select_topk": 1.0}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_gives_what_the_method_says(name, models, run):
    formula, parameters, weighs = CASES[name]
    weights = (1.5, 0.5) if weighs else (1, 1)
    entries = [
        {"model": f"./{site}", **({"parameters": {"weight": weight}} if weighs else {})}
        for site, weight in zip("ab", weights, strict=True)
    ]
    config = {"models": entries, "merge_method": name, "base_model": "./base", "parameters": parameters}
    (models / "merge.yml").write_text(json.dumps(config))
    outcome = run("merge", "merge.yml", "-o", "fused")
    assert outcome.code == 0, outcome.err
    base, a, b, fused = (load_file(models / place / "model.safetensors") for place in ("base", "a", "b", "fused"))
    for tensor, found in fused.items():
        deltas = [tuned[tensor].double() - base[tensor].double() for tuned in (a, b)]
        expected = base[tensor].double() + parameters.get("lambda", 1) * formula(deltas, weights)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6, msg=tensor)


def options_of(method: str, parameters: dict[str, object], **more: object) -> dict[str, object]:
    entries = [{"model": f"./{site}", "parameters": {"weight": 1}} for site in "ab"]
    config = {"models": entries, "merge_method": method, "base_model": "./base", "parameters": parameters, **more}
    found = translate(json.dumps(config))
    recipes.check(found.document)
    return found.document.data["merge"]["options"]


def test_defaults_and_ends_of_ranges_are_those_of_mergekit():
    assert options_of("ties", {}) == {"density": 1.0, "normalize": True, "scope": "tensor"}
    assert options_of("dare_ties", {"density": 0.3}) == {"density": 0.3, "normalize": False, "rescale": True}
    plain = {"density": 1.0, "normalize": True, "rescale": True, "epsilon": 0.0}
    assert options_of("della", {}) == plain
    assert options_of("della", {"density": 0.5})["epsilon"] == 0.15
    assert options_of("breadcrumbs", {}) == {"density": 1.0, "gamma": 0.0, "normalize": False, "scope": "tensor"}
    assert options_of("breadcrumbs", {"density": 0.8, "gamma": 0.3})["gamma"] == 0.2
    text = PLAIN.replace("linear", "breadcrumbs") + "parameters: {density: 0.8, gamma: 0.3}\n"
    assert translate(text).notes == (
        "'gamma' is 0.2, what 'density' leaves of it in mergekit, up to one value of a tensor",
    )


def test_slerp_goes_from_the_base_model_to_the_other_one():
    text = "models: [{model: ./a}, {model: ./b}]\nmerge_method: slerp\nbase_model: ./b\nparameters: {t: 0.25}\n"
    assert refusal(text).splitlines()[0] == (
        "merge.yml:3:13: base_model: this base_model is one of the two ends; "
        "a recipe needs what all were fine-tuned from"
    )
    found = translate(text, base="./base")
    assert found.document.data["vectors"] == [{"model": "./b", "weight": 0.75}, {"model": "./a", "weight": 0.25}]
    assert (found.document.data["base"], found.document.data["merge"]["method"]) == ("./base", "nuslerp")
    assert found.notes == (recipes.mergekit.equivalents.TURNED,)
    wrong = text.replace("0.25", "2")
    assert "merge.yml:4:17: parameters: 't' must be a number from 0 to 1, found 2" in refusal(wrong, base="./base")
    third = text.replace("{model: ./b}]", "{model: ./b}, {model: ./c}]")
    assert "models: it goes from base_model to one other model, found 2" in refusal(third, base="./base")


def test_what_differs_is_said(models, run):
    config = PLAIN.replace("linear", "dare_linear") + "parameters: {density: 0.5}\n"
    (models / "merge.yml").write_text(config)
    outcome = run("plan", "merge.yml")
    assert "note: single values differ from mergekit's" in outcome.out
    assert "note: what is kept is divided by its chance to be kept" in outcome.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PLAIN.replace("linear", "ties").replace("weight: 3", "weight: 3, density: 0.3")
            + "parameters: {density: 0.5}\n",
            """\
            merge.yml:10:23: parameters.density: 'density' is 0.5 here and 0.3 elsewhere; a recipe has one
              10 | parameters: {density: 0.5}
                 |                       ^^^
              hint: give all models the same value""",
        ),
        (
            PLAIN.replace("linear", "ties") + "parameters: {rescale: true}\n",
            """\
            merge.yml:10:23: parameters.rescale: 'rescale: true' has no equal in a recipe
              10 | parameters: {rescale: true}
                 |                       ^^^^
              hint: leave it out; what a recipe does is as with 'false'""",
        ),
        (
            PLAIN.replace("linear", "ties") + "parameters: {density: 7}\n",
            """\
            merge.yml:10:23: merge.options.density: expected a number of at most 1.0, found 7
              10 | parameters: {density: 7}
                 |                       ^""",
        ),
        (
            PLAIN.replace("linear", "task_arithmetic") + "parameters: {lambda: .nan}\n",
            """\
            merge.yml:10:22: merge.scale: expected 'auto' or a finite number, found nan
              10 | parameters: {lambda: .nan}
                 |                      ^^^^""",
        ),
    ],
)  # fmt: skip
def test_parameters_that_have_no_equal_are_refused_at_their_place(text, message):
    assert refusal(text) == textwrap.dedent(message)
