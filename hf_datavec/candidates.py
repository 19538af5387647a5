"""What `auto` tries: a short list of merges, each restored in some modes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_datavec import pooled_heads, variants
from hf_datavec.checkpoint import Role
from hf_datavec.choices import method_errors
from hf_datavec.methods import all_methods
from hf_datavec.plan import Plan
from hf_datavec.recipe import AUTO, Merge, Override, ScaleSearch

# For `method: auto`: method, scale and options; what is added here is tried. Of equals the first is taken. Scales of
# methods that are PER_SITE are divided by the number of sites.
METHODS: tuple[tuple[str, float, Mapping[str, Any]], ...] = (
    ("mean", 1.0, {}),
    ("sum", 2.0, {}),
    ("iso_c", 1.0, {}),
    ("tsv", 1.0, {}),
    ("ties", 1.0, {"density": 0.5}),
    ("fedavg", 1.0, {}),
)
# For `scale: auto`: of methods whose result grows with the number of sites, and of all others.
PER_SITE = ("sum", "task_arithmetic", "consensus", "random", "breadcrumbs", "dare_linear", "della_linear")
SCALES_PER_SITE = (1.0, 1.5, 2.0, 3.0)
SCALES = (0.5, 0.75, 1.0, 1.5)
# What makes the head of the sites' sums of features.
POOLED_HEAD = "ridge_head"
# For `mode: auto`; the second needs a site that shares its statistics.
MODES = ("statistics", "relative")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to combine the vectors, and the modes in which the result is restored.

    `site` is the place among the contributions of the one that alone counts. A candidate may stand for the base as it
    is, with scale 0, or with the head that the sites' sums of features give.
    """

    method: str
    scale: float
    options: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("none",)
    site: int | None = None
    head: bool = False

    def named(self, names: Sequence[str]) -> str:
        """What tables call it, for sites with these names."""
        if self.site is not None:
            return f"{names[self.site]} alone"
        if self.head:
            return "the base with a pooled head"
        if not self.scale:
            return "the base as it is"
        return f"{self.method} x {self.scale:.4g}" + "".join(f", {key} {one}" for key, one in self.options.items())


def wanted(plan: Plan) -> bool:
    """Whether a plan leaves its method, scale or mode to the agreement with the sites' networks."""
    return plan.is_judged and (plan.recipe.merge.automatic or _mode(plan) == AUTO)


def of(plan: Plan) -> tuple[Candidate, ...]:
    """The candidates for what a plan leaves open, in their order."""
    merge = plan.recipe.merge
    if merge.method == AUTO:
        found = [*_methods(plan), *_sites(plan), *heads(plan), *_bases(plan)]
    else:
        scales = _scales(merge, len(plan.contributions)) if merge.scale == AUTO else (_settled(merge),)
        found = [Candidate(merge.method, scale, merge.options, modes(plan)) for scale in scales]
    return tuple(found)


def abroad(plan: Plan) -> tuple[Candidate, ...]:
    """The only candidate for what a plan leaves open where public images are of another kind than the sites'.

    There the sites' networks are no judge; what was best with `relative` on such images is taken.
    """
    merge, count = plan.recipe.merge, len(plan.contributions)
    found = ("relative",) if _mode(plan) == AUTO else modes(plan)
    if merge.method != AUTO:
        per_site = merge.method in PER_SITE and not merge.options.get("normalize")
        scale = (2 / count if per_site else 1.0) if merge.scale == AUTO else _settled(merge)
        return (Candidate(merge.method, scale, merge.options, found),)
    return tuple(heads(plan)) or (Candidate("sum", min(1.0, 2 / count), {}, found),)


def modes(plan: Plan) -> tuple[str, ...]:
    """The modes in which candidates are restored: the recipe's, or those that `auto` tries."""
    if not plan.base.has_statistics:
        return ("none",)
    mode = _mode(plan)
    shared = any(one.has_statistics for one in plan.contributions)
    return (mode,) if mode != AUTO else MODES if shared else MODES[:1]


def _mode(plan: Plan) -> str:
    return plan.recipe.recalibrate.mode if plan.recipe.recalibrate else "none"


def _methods(plan: Plan) -> Iterator[Candidate]:
    """The methods of the list that can merge these sites; of a single site only its vector as it is."""
    sites = [(one.name, one.weight) for one in plan.contributions]
    if len(sites) == 1:
        yield Candidate("sum", 1.0, {}, modes(plan))
        return
    for name, scale, options in METHODS:
        candidate = Candidate(name, scale / (len(sites) if name in PER_SITE else 1), options, modes(plan))
        if fits(plan, candidate):
            yield candidate


def fits(plan: Plan, candidate: Candidate) -> bool:
    """Whether a candidate can merge these sites beside the recipe's overrides, and its lock could be merged again."""
    merge, counts = plan.recipe.merge, [one.examples for one in plan.contributions]
    counting = any(one.method and all_methods()[one.method].needs_counts for one in merge.overrides)
    needs = all_methods()[candidate.method].needs_counts
    if (needs and not all(counts)) or (counting and candidate.site is not None):
        return False
    weights = [float(count or 0) for count in counts] if needs else [one.weight for one in plan.contributions]
    if candidate.site is not None:
        weights = [float(place == candidate.site) for place in range(len(weights))]
    made = Merge(method=candidate.method, options=dict(candidate.options), overrides=merge.overrides)
    sites = zip((one.name for one in plan.contributions), weights, strict=True)
    return not any(method_errors(made, list(sites)))


def _sites(plan: Plan) -> Iterator[Candidate]:
    """Each site alone, if it knows all labels; with its own statistics where they are at hand."""
    everyone = all(one.has_statistics for one in plan.contributions)
    for place, one in enumerate(plan.contributions if len(plan.contributions) > 1 else ()):
        if set(one.labels) < set(plan.labels):
            continue
        found = modes(plan)
        if _mode(plan) == AUTO and plan.base.has_statistics:
            # What merging changed is nothing here, so that `relative` gives a site's own statistics as well.
            own = ("moments",) if everyone else ("relative",) if one.has_statistics else ()
            found = (*own, "statistics")
        alone = Candidate("linear", 1.0, {}, found, place)
        if fits(plan, alone):
            yield alone


def heads(plan: Plan) -> Iterator[Candidate]:
    """The base with the head of all sites' images, where all share sums of features."""
    names = plan.base.named(Role.HEAD)
    given = any(re.fullmatch(one.tensors, name) for one in plan.recipe.merge.overrides for name in names)
    if pooled_heads.possible(plan) and _may_keep(plan) and not given:
        yield Candidate("sum", 0.0, {}, ("none",), head=True)


def _may_keep(plan: Plan) -> bool:
    """Whether the base may stay as it is, its statistics with it: a head on the untouched base fits no others."""
    if any(one.scale is not None for one in plan.recipe.merge.overrides):
        return False  # something else than the head would move
    return not plan.base.has_statistics or _mode(plan) in (AUTO, "none")


def _bases(plan: Plan) -> Iterator[Candidate]:
    """The base as it is, if it has learned all labels; a head of zeros has learned none."""
    if plan.base_fetched.hollow or not _may_keep(plan) or not set(plan.labels) <= set(plan.base.labels):
        return
    if any(bool((plan.base.tensors.read(name) != 0).any()) for name in plan.base.named(Role.HEAD)):
        yield Candidate("sum", 0.0, {}, ("none",))


def _scales(merge: Merge, sites: int) -> tuple[float, ...]:
    summed = merge.method in PER_SITE or merge.options.get("normalize") is False
    if not summed or sites == 1 or merge.options.get("normalize"):
        return SCALES
    return tuple(sorted({*(scale / sites for scale in SCALES_PER_SITE), 1.0}))


def _settled(merge: Merge) -> float:
    """The recipe's scale; of a search's values the one in the middle, since the mode is chosen before the search."""
    if isinstance(merge.scale, ScaleSearch):
        return sorted(merge.scale.search)[len(merge.scale.search) // 2]
    return merge.factor


def resolved(plan: Plan, candidate: Candidate, mode: str) -> Plan:
    """The plan with what was chosen in place of `auto`; what a labelled search is to find stays open."""
    searching = isinstance(plan.recipe.merge.scale, ScaleSearch)
    return with_mode(plan, mode) if searching else planned(plan, candidate, mode)


def planned(plan: Plan, candidate: Candidate, mode: str) -> Plan:
    """The plan of a candidate in a mode."""
    update: dict[str, Any] = {"method": candidate.method, "options": dict(candidate.options), "scale": candidate.scale}
    if candidate.head:
        names = "|".join(re.escape(name) for name in plan.base.named(Role.HEAD))
        override = Override(tensors=names, method=POOLED_HEAD, scale=1.0)
        update["overrides"] = (override, *plan.recipe.merge.overrides)
    found = variants.with_merge(plan, plan.recipe.merge.model_copy(update=update))
    if candidate.site is not None:
        weights = {one.name: float(place == candidate.site) for place, one in enumerate(plan.contributions)}
        found = variants.weighted(found, weights)
    elif plan.recipe.merge.method == AUTO and all_methods()[candidate.method].needs_counts:
        found = variants.counted(found)
    return with_mode(found, mode)


def with_mode(plan: Plan, mode: str) -> Plan:
    """The same plan with a mode in place of `auto`."""
    restore = plan.recipe.recalibrate
    if restore is None or restore.mode != AUTO or not plan.base.has_statistics:
        return plan
    recipe = plan.recipe.model_copy(update={"recalibrate": restore.model_copy(update={"mode": mode})})
    return replace(plan, recipe=recipe)
