"""Rounds: a fused model can be the base of the next one, and everything says so."""

from __future__ import annotations

import json

import pytest
from networks import tune, write_recipe
from ruamel.yaml import YAML

from hf_datavec import lineage
from hf_datavec.errors import InputError


@pytest.fixture
def second(study, run):
    """The small study after its first round, with a vector that was made from the fused model."""
    assert run("merge", "recipe.yaml").code == 0
    tune(study / "fused", study / "tuned-again", seed=9)
    assert run("diff", "./fused", "tuned-again", "-o", "site-a-2").code == 0
    write_recipe(study / "second.yaml", base="./fused", vectors=["./site-a-2"], merge={"scale": 0.5}, round=2)
    return study


def test_the_second_round_tells_of_the_first_in_manifest_lock_and_card(second, run):
    manifest = json.loads((second / "site-a-2" / "datavec.json").read_text())
    assert [(one["base"], one["sites"], one["method"]) for one in manifest["lineage"]] == [("base", 2, "sum")]
    assert "fused model of round 1, so this vector is for round 2" in (second / "site-a-2" / "README.md").read_text()
    assert run("merge", "second.yaml", "-o", "fused-2").code == 0
    rounds = lineage.read(second / "fused-2")
    assert [(one.base, one.sites, one.scale) for one in rounds] == [("base", 2, 1.0), ("fused", 1, 0.5)]
    assert rounds[1].digest == manifest["base"]["digest"]
    card = (second / "fused-2" / "README.md").read_text()
    assert "This is round 2: the base was fused before." in card
    assert "1. `sum`, scale 1, 2 sites, on `base`" in card
    assert YAML(typ="safe").load((second / "fused-2" / "recipe.lock.yaml").read_text())["round"] == 2
    assert run("merge", "fused-2/recipe.lock.yaml", "-o", "again").code == 0
    assert "round" not in (second / "fused" / "README.md").read_text().split("```yaml")[0]


def test_a_recipe_for_another_round_is_refused(second, run):
    write_recipe(second / "wrong.yaml", base="./base", vectors=["./site-a"], round=2)
    outcome = run("plan", "wrong.yaml")
    assert outcome.code == 2
    assert "the recipe says round 2, but its base" in outcome.err
    assert "makes this round 1" in outcome.err


def test_a_damaged_lineage_is_told(tmp_path):
    (tmp_path / lineage.LINEAGE_FILE).write_text('[{"base": 3}]')
    with pytest.raises(InputError, match=r"lineage\.json' is damaged"):
        lineage.read(tmp_path)
