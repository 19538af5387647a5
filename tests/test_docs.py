"""The docs say what the program does: generated parts are fresh, recipes are valid, layers hold."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_datavec import recipe

ROOT = Path(__file__).parent.parent


def test_the_generated_parts_of_the_docs_are_fresh():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.documents().items():
        assert path.read_text("utf-8") == text, f"run `make docs`: {path.name} is stale"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("[!s]*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_ship_are_valid(path):
    assert recipe.load(path).vectors


def test_the_full_recipe_shows_every_key():
    text = (ROOT / "recipes" / "full.yaml").read_text()
    sections = (recipe.Recipe, recipe.VectorEntry, recipe.ModelEntry, recipe.Merge, recipe.Override)
    keys = {key for section in sections for key in section.model_fields} - {"lock"}
    for key in keys:
        assert re.search(rf"\b{key}:", text), key


def test_modules_import_only_from_the_layers_below_them():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Layers KEPT" in done.stdout


def test_help_is_shown_without_importing_anything_heavy():
    code = (
        "import sys; from hf_datavec.cli.options import parser; parser().format_help();"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_imports_no_framework(study):
    code = (
        "import sys; from hf_datavec.cli import main; assert main(['plan', 'recipe.yaml']) == 0;"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'accelerate', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=study, capture_output=True)


def test_the_readme_names_every_command():
    from hf_datavec.cli.options import parser

    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "commands.md").read_text()
    for name in parser()._subparsers._group_actions[0].choices:
        assert f"hf-datavec {name}" in text
