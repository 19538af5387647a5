"""Task vectors and merges from Python, as a notebook uses them."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from networks import make_network, make_vector, save_with
from safetensors.torch import load_file

import hf_datavec
from hf_datavec import TaskVector
from hf_datavec.errors import InputError

WEIGHTS = "model.safetensors"


def weights(model) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that a saved file has."""
    return {name.removeprefix("timm_model."): value for name, value in model.state_dict().items()}


def test_a_vector_between_two_networks_gives_the_second_when_applied_to_the_first(study):
    vector = TaskVector.between(study / "base", study / "tuned-site-a", with_statistics=True)
    tuned = load_file(study / "tuned-site-a" / WEIGHTS)
    found = weights(vector.apply_to(study / "base"))
    assert found.keys() == tuned.keys()
    for name, value in tuned.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_sums_differences_and_multiples_are_those_of_the_tensors(study):
    first, second = (TaskVector.from_pretrained(study / site) for site in ("site-a", "site-b"))
    both = sum([first, second])
    weighted = 0.25 * first - second * 2
    for name in first.tensors:
        assert torch.equal(both.tensors[name], first.tensors[name] + second.tensors[name])
        assert torch.equal(weighted.tensors[name], 0.25 * first.tensors[name] - 2 * second.tensors[name])
    body = [value for name, value in first.tensors.items() if not name.startswith("fc.")]
    assert first.norm == pytest.approx(float(torch.cat([value.reshape(-1) for value in body]).norm()), rel=1e-5)


def test_a_computed_vector_is_saved_opened_and_merged_like_any_other(study, run):
    both = TaskVector.from_pretrained(study / "site-a") + TaskVector.from_pretrained(study / "site-b")
    both.save_pretrained(study / "both")
    again = TaskVector.from_pretrained(study / "both")
    assert again.norm == pytest.approx(both.norm, rel=1e-5)
    assert all(torch.equal(again.tensors[name], value) for name, value in both.tensors.items())
    merged = hf_datavec.merge(study / "recipe.yaml")
    fused = load_file(merged.output / WEIGHTS)
    applied = weights(again.apply_to(study / "base"))
    for name, value in fused.items():
        torch.testing.assert_close(applied[name], value, rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match="already exists"):
        both.save_pretrained(study / "both")


def test_heads_add_by_label(tmp_path):
    base = make_network("test_resnet", tmp_path / "base", labels=("cat", "dog"))
    kinds = {"one": ("cat", "dog", "owl"), "two": ("owl", "bat", "cat")}
    paths = []
    for seed, (name, labels) in enumerate(kinds.items(), start=1):
        make_network("test_resnet", tmp_path / name, labels=labels, seed=seed)
        paths.append(make_vector(base, tmp_path / name, tmp_path / f"vector-{name}"))
    first, second = (TaskVector.from_pretrained(path) for path in paths)
    both = first + second
    assert both.labels == ("cat", "dog", "owl", "bat")
    rows = {label: first.tensors["fc.bias"][row] for row, label in enumerate(first.labels)}
    more = {label: second.tensors["fc.bias"][row] for row, label in enumerate(second.labels)}
    expected = [float(rows.get(label, 0) + more.get(label, 0)) for label in both.labels]
    assert both.tensors["fc.bias"].tolist() == pytest.approx(expected)


def test_a_multiple_holds_no_statistics_and_no_counts(study):
    vector = TaskVector.between(study / "base", study / "tuned-site-a", with_statistics=True)
    assert any(name.endswith("running_var") for name in vector.tensors)
    assert not any(name.endswith("running_var") for name in (2 * vector).tensors)
    (2 * vector).save_pretrained(study / "double")
    base = load_file(study / "base" / WEIGHTS)
    applied = weights((2 * vector).apply_to(study / "base"))
    assert all(torch.equal(applied[name], base[name]) for name in base if name.endswith("running_var"))


def test_vectors_of_two_bases_are_not_added(study):
    base = load_file(study / "base" / WEIGHTS)
    save_with(study / "base", study / "other", {**base, "fc.bias": base["fc.bias"] + 1})
    other = TaskVector.between(study / "other", study / "tuned-site-a")
    with pytest.raises(InputError, match=r"the vectors belong to two bases: 'base' .* and 'other'"):
        TaskVector.from_pretrained(study / "site-a") + other
    with pytest.raises(InputError, match="was made from the base 'other', not from"):
        other.apply_to(study / "base")
    with pytest.raises(TypeError):
        TaskVector.from_pretrained(study / "site-a") + 1


def test_importing_the_package_imports_no_framework():
    import subprocess
    import sys

    heavy = "print(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub')))"
    done = subprocess.run([sys.executable, "-c", f"import sys, hf_datavec; {heavy}"], capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Base\n", "mit"),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\na: !!python/object:os.system {}\n---\n", None),
        ("# Base\n", None),
    ],
)
def test_a_vector_has_the_licence_of_its_base_if_that_states_one(card, expected, study, run):
    (study / "base" / "README.md").write_text(card)
    done = run("diff", "base", "tuned-site-a", "-o", "vector")
    assert (done.code, done.err) == (0, "")
    assert ModelCard.load(study / "vector" / "README.md").data.license == expected
