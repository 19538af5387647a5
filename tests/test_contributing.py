"""The worked example of CONTRIBUTING.md works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from networks import write_recipe

import hf_datavec.methods as methods

ROOT = Path(__file__).parent.parent


def test_a_new_method_takes_one_file_and_one_test(study, run, monkeypatch):
    code, test = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    plugin = study / "methods"
    plugin.mkdir()
    (plugin / "midrange.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(plugin)])
    monkeypatch.setattr(methods, "_REGISTERED", dict(methods._REGISTERED))
    methods.all_methods.cache_clear()
    try:
        namespace: dict[str, object] = {}
        exec(test, namespace)
        namespace["test_midrange_is_the_middle_of_the_range"]()
        assert "midrange" in run("methods").out
        wrong = write_recipe(
            study / "wrong.yaml", base="./base", vectors=["./site-a"], output="./no",
            merge={"method": "midrange", "options": {"shrink": 2}},
        )  # fmt: skip
        assert "merge.options.shrink: expected a number of at most 1" in run("merge", wrong).err
        recipe = write_recipe(
            study / "r.yaml", base="./base", vectors=["./site-a", "./site-b"], output="./fused",
            merge={"method": "midrange", "options": {"shrink": 0.1}},
        )  # fmt: skip
        assert run("merge", recipe).code == 0
    finally:
        methods.all_methods.cache_clear()
        sys.modules.pop("hf_datavec.methods.midrange", None)
