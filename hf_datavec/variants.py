"""The same plan with another `merge:`, as a search tries them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from hf_datavec.plan import Plan
from hf_datavec.planning import ordered, steps_of
from hf_datavec.recipe import Merge


def scaled(plan: Plan, scale: float) -> Plan:
    """The same plan with a scale that was found."""
    return with_merge(plan, plan.recipe.merge.model_copy(update={"scale": scale}))


def weighted(plan: Plan, weights: Mapping[str, float]) -> Plan:
    """The same plan with weights that were found, by the contributions' names."""
    found = with_merge(plan, plan.recipe.merge.model_copy(update={"weights": "equal"}))
    return replace(found, contributions=ordered(replace(one, weight=weights[one.name]) for one in plan.contributions))


def counted(plan: Plan) -> Plan:
    """The same plan with sites weighed by their numbers of examples, which all of them declare."""
    return replace(
        plan, contributions=ordered(replace(one, weight=float(one.examples or 1)) for one in plan.contributions)
    )


def tempered(plan: Plan, temperature: float | Literal["none"]) -> Plan:
    """The same plan with the temperature that its confidence was scaled by."""
    if plan.recipe.recalibrate is None:
        return plan
    restore = plan.recipe.recalibrate.model_copy(update={"temperature": temperature})
    return replace(plan, recipe=plan.recipe.model_copy(update={"recalibrate": restore}))


def with_merge(plan: Plan, merge: Merge) -> Plan:
    """The same plan with another `merge:`, made into steps anew."""
    recipe = plan.recipe.model_copy(update={"merge": merge})
    return replace(plan, recipe=recipe, steps=tuple(steps_of(recipe, plan.base, plan.labels)))
