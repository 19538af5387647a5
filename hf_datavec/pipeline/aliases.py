"""What a fused model's folder says of its sites when their names are not to be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_datavec.pipeline import lock
from hf_datavec.pipeline.prepare import Prepared


def aliased(prepared: Prepared) -> Prepared:
    """The same merge with sites named site-1, site-2, ..., as the card tells it; unchanged without `aliases`.

    Numbers follow the digests of the vectors, so that not even the recipe's order is told.
    """
    if not prepared.recipe.aliases:
        return prepared
    plan = prepared.plan
    sites = [replace(one, name=f"site-{number}") for number, one in enumerate(plan.contributions, start=1)]
    recipe = prepared.recipe.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
    for secret in ("lock", "output", "push"):
        recipe.pop(secret, None)
    recipe["base"] = plan.base_fetched.reference.identity
    recipe["vectors"] = [{"vector": one.name, "weight": one.weight} for one in sites]
    # Written anew, not edited: a comment could name a hospital as well.
    text = "# The sites are shown by aliases, so this recipe cannot be merged as it stands.\n" + lock.dump(recipe)
    return replace(prepared, plan=replace(plan, contributions=tuple(sites)), text=text)


def aliases(prepared: Prepared, names: Sequence[str]) -> tuple[str, ...]:
    """The sites' names as the fused model's folder tells them."""
    pairs = zip(prepared.plan.contributions, aliased(prepared).plan.contributions, strict=True)
    told = {ours.name: theirs.name for ours, theirs in pairs}
    return tuple(told[name] for name in names)


def told(prepared: Prepared, text: str) -> str:
    """A text about the merge as the fused model's folder tells it; messages quote the names of sites."""
    ours = tuple(one.name for one in prepared.plan.contributions)
    for name, alias in zip(ours, aliases(prepared, ours), strict=True):
        text = text.replace(f"'{name}'", f"'{alias}'")
    return text
