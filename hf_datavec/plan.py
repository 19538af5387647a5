"""From a recipe and headers to immutable steps: what a merge will do, or every reason why it cannot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_datavec import lineage
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.choices import chosen, first_match, method_errors, override_errors, used
from hf_datavec.combine import needs_whole, slice_length
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.headers import ITEM_BYTES
from hf_datavec.hub import Fetched
from hf_datavec.methods import FROM_SITES, Method, all_methods, applied, as_matrix
from hf_datavec.recipe import LockedInput, Merge, Recipe
from hf_datavec.tensors import TORCH_NAMES, Record
from hf_datavec.threads import MOST_BYTES, PIECE
from hf_datavec.vector import Combination, TaskVector, TunedDifferences, check_against, tool_versions

# Below this many images the moments of a channel are mostly chance.
FEW_IMAGES = 32
STORED_AS = {long: short for short, long in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Contribution:
    """One site's share in a merge."""

    name: str
    fetched: Fetched
    source: TaskVector | TunedDifferences | Combination
    weight: float
    digest: str  # empty for a tuned model of which only headers are at hand

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.labels

    @property
    def examples(self) -> int | None:
        """How many images the site declares to have trained on."""
        counts = self.source.manifest.examples if isinstance(self.source, TaskVector) else None
        return sum(counts.values()) if counts else None

    @property
    def has_statistics(self) -> bool:
        """Whether the site's own BatchNorm statistics can be read."""
        if isinstance(self.source, TaskVector):
            return self.source.manifest.has_statistics
        if isinstance(self.source, Combination):
            return False
        return set(self.source.base.named(Role.STATISTIC)) <= set(self.source.tuned.names)


@dataclass(frozen=True, slots=True)
class Step:
    """How one tensor of the result is made."""

    record: Record
    role: Role
    method: Method
    options: Mapping[str, Any]
    scale: float  # NaN as long as it is searched for

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def is_merged(self) -> bool:
        """Whether the tensor is combined from the sites' vectors."""
        return self.role in (Role.WEIGHT, Role.HEAD)

    @property
    def surveys(self) -> bool:
        """Whether its method measures whole vectors first."""
        return self.is_merged and self.method.surveys(self.options)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is handled as a whole: it is a head, or its method looks at all of it."""
        measured = (self.method.kind == "site" or self.method.ranks is not None) and not self.surveys
        return self.is_merged and (needs_whole(self.method) or self.role is Role.HEAD or measured)

    def peak_bytes(self, sites: int) -> int:
        """A bound on the memory that the tensor takes, or one piece of it where it is not handled as a whole."""
        values = math.prod(self.record.shape)
        if not self.is_merged:
            return self.record.nbytes
        # Of each value n float32 rows, their float64 copies when they are clipped or differences, the method's own, and
        # the combination, the base and the result in float64.
        each = sites * (4 + 8 + 8 * self.method.copies) + 3 * 8
        if not self.is_whole:
            return min(values, PIECE) * ITEM_BYTES[self.record.dtype] + min(values, slice_length(sites)) * each
        matrix = as_matrix(self.record.shape) if "gram" in self.method.from_sites else None
        # The sites' Gram matrices and their stack, and in float64 their sum, a factor and a copy of one.
        beside = matrix[1] ** 2 * (2 * 4 * sites + 3 * 8) if matrix else 0
        return values * (ITEM_BYTES[self.record.dtype] + each) + beside


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do, decided before a tensor is read; sites are in the order of their digests."""

    recipe: Recipe
    base: Checkpoint
    base_fetched: Fetched
    contributions: tuple[Contribution, ...]
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = field(default=())
    # What was learned: for each tensor one number per contribution.
    coefficients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        """What the merge reads: the base once, and every vector once and for each pass of the survey."""
        stored = sum(record.nbytes for contribution in self.contributions for record in _records(contribution))
        kinds = sorted({kind for step in self.steps if step.is_merged for kind in step.method.from_sites})
        beside = [one.source.beside for one in self.contributions if isinstance(one.source, TaskVector)]
        moments = sum(found.tensors[kind].nbytes for found in beside for kind in kinds)
        return self.base.tensors.nbytes + stored * (1 + self.survey_passes) + moments

    @property
    def surveys(self) -> bool:
        """Whether whole vectors are measured before the first tensor is combined."""
        return self.recipe.merge.clip is not None or any(step.surveys for step in self.steps)

    @property
    def survey_passes(self) -> int:
        """How often the vectors are read before the merge itself: for norms, for ranks and for inner products."""
        surveying = [step.method for step in self.steps if step.surveys]
        ranks, products = any(one.ranks for one in surveying), any(one.kind == "site" for one in surveying)
        return (self.recipe.merge.clip is not None) + ranks + products

    @property
    def download_bytes(self) -> int:
        """What has to come from the Hub before the merge can start."""
        return self.base_fetched.download_bytes + sum(one.fetched.download_bytes for one in self.contributions)

    @property
    def base_digest(self) -> str | None:
        """The base's content digest; of a hollow base what the vectors say it is, else None."""
        if not self.base_fetched.hollow:
            return self.base.tensors.digest
        said = {one.source.manifest.base.digest for one in self.contributions if isinstance(one.source, TaskVector)}
        return said.pop() if len(said) == 1 else None

    @property
    def write_bytes(self) -> int:
        return sum(step.record.nbytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """A bound on the memory of the merge itself beyond mapped files: some pieces, or a tensor of all sites."""
        sizes = [step.peak_bytes(len(self.contributions)) for step in self.steps]
        return max([min(sum(sizes), MOST_BYTES), *sizes])


def _records(contribution: Contribution) -> tuple[Record, ...]:
    source = contribution.source
    if isinstance(source, TaskVector):
        return tuple(source.tensors.records.values())
    if isinstance(source, Combination):
        return tuple(source.tensors.records.values())
    return tuple(source.tuned.tensors.records.values())


def make(recipe: Recipe, base: Fetched, checkpoint: Checkpoint, contributions: tuple[Contribution, ...]) -> Plan:
    """The plan of a merge. Raises: InputErrors with every reason why it cannot be done."""
    errors: list[InputError] = []
    for contribution in contributions:
        if isinstance(contribution.source, TaskVector):
            errors += check_against(contribution.source, checkpoint, base)
    errors += _lock_errors(recipe, base, checkpoint, contributions)
    errors += _round_errors(recipe, base, checkpoint)
    weighed, weight_errors = _weighed(recipe.merge, contributions)
    errors += weight_errors
    errors += method_errors(recipe.merge, [(one.name, one.weight) for one in weighed])
    errors += _second_moment_errors(recipe.merge, weighed)
    errors += _restoration_errors(recipe, checkpoint, contributions)
    errors += override_errors(recipe.merge, checkpoint.named(Role.WEIGHT, Role.HEAD))
    raise_all(errors)
    # The recipe's order must not matter, bit for bit, so sites are summed in the order of their content.
    sites = ordered(weighed)
    labels = fused_labels(checkpoint.labels, [one.labels for one in sites])
    steps = tuple(steps_of(recipe, checkpoint, labels))
    notes = tuple(_notes(recipe, checkpoint, sites))
    made = Plan(recipe, checkpoint, base, sites, labels, steps, notes)
    made = replace(made, coefficients=_locked_coefficients(made, contributions))
    raise_all(_average_errors(made))
    return made


def ordered(contributions: Iterable[Contribution]) -> tuple[Contribution, ...]:
    """Contributions in the order in which they are summed."""
    return tuple(sorted(contributions, key=lambda one: (one.digest, one.weight, one.name)))


def fused_labels(base: tuple[str, ...], sites: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The union of the sites' labels: those of the base in its order, then new ones by name."""
    known = {label for labels in sites for label in labels}
    return (*(label for label in base if label in known), *sorted(known - set(base)))


def _weighed(merge: Merge, contributions: tuple[Contribution, ...]) -> tuple[list[Contribution], list[InputError]]:
    counting = [name for name in used(merge) if all_methods()[name].needs_counts]
    if merge.weights != "examples" and not counting:
        return list(contributions), []
    why = "merge.weights is 'examples'" if merge.weights == "examples" else f"the method '{counting[0]}' weighs sites"
    errors = [
        InputError(
            f"{why}, but '{one.name}' declares no example counts",
            hint="the site can add them with `hf-datavec diff --share-counts`; or give each vector a weight",
        )
        for one in contributions
        if not one.examples
    ]
    weighed = [
        Contribution(one.name, one.fetched, one.source, float(one.examples or 1), one.digest) for one in contributions
    ]
    return weighed, errors


def _second_moment_errors(merge: Merge, contributions: Sequence[Contribution]) -> Iterator[InputError]:
    for name in used(merge):
        for kind in all_methods()[name].from_sites:
            for one in contributions:
                if not isinstance(one.source, TaskVector) or kind not in one.source.beside.entries:
                    problem = f"the method '{name}' needs {FROM_SITES[kind]}, but '{one.name}' brings none"
                    hint = f"the site can add them: hf-datavec diff --with {kind} --images IMAGES"
                    yield InputError(problem, hint=hint)


def _average_errors(plan: Plan) -> Iterator[InputError]:
    """Averages need weights of at least zero, and for each label a site whose weight is above."""
    averaging = {
        step.method.name
        for step in plan.steps
        if step.method.uses_weights and step.method.chosen(step.options).get("normalize", True)
    }
    restore = plan.recipe.recalibrate
    if restore and restore.mode not in ("none", "statistics") and plan.base.has_statistics:
        averaging.add(restore.mode)
    for name in sorted(averaging):
        negative = [one.name for one in plan.contributions if one.weight < 0]
        if negative:
            hint = "use weights of at least 0; method: linear with options: {normalize: false} takes negative ones"
            if restore and name == restore.mode:
                hint = "use weights of at least 0, or recalibrate: {mode: statistics}"
            yield InputError(f"'{name}' averages, but the weight of {listed(negative)} is below zero", hint=hint)
            continue
        lost = [
            label
            for label in plan.labels
            if not any(one.weight > 0 for one in plan.contributions if label in one.labels)
        ]
        if lost:
            hint = "give one of the sites that have it a weight above 0"
            yield InputError(f"'{name}' averages, but every weight for {listed(lost)} is zero", hint=hint)


def _restoration_errors(
    recipe: Recipe, base: Checkpoint, contributions: tuple[Contribution, ...]
) -> Iterator[InputError]:
    restore = recipe.recalibrate
    if not restore or restore.mode != "moments" or not base.has_statistics:
        return
    for one in contributions:
        if not one.has_statistics:
            hint = "the site can make one with `hf-datavec diff --with-statistics`; or use mode: statistics"
            problem = f"mode 'moments' needs BatchNorm statistics, but the vector '{one.name}' has none"
            yield InputError(problem, hint=hint)


def _lock_errors(
    recipe: Recipe, fetched: Fetched, base: Checkpoint, contributions: tuple[Contribution, ...]
) -> Iterator[InputError]:
    if recipe.lock is None:
        return
    pairs: list[tuple[str, LockedInput, str | None]] = []
    if not fetched.hollow:
        pairs.append(("base", recipe.lock.base, base.tensors.digest))
    if len(recipe.lock.vectors) != len(contributions):
        yield InputError(f"the lock lists {len(recipe.lock.vectors)} vectors, the recipe {len(contributions)}")
        return
    pairs += [(one.name, locked, one.digest) for one, locked in zip(contributions, recipe.lock.vectors, strict=True)]
    for name, locked, digest in pairs:
        if digest and locked.digest and locked.digest != digest:
            yield not_pinned(name, locked, digest)


def _round_errors(recipe: Recipe, base: Fetched, checkpoint: Checkpoint) -> Iterator[InputError]:
    behind = len(lineage.read(checkpoint.folder))
    if recipe.round is not None and recipe.round != behind + 1:
        yield InputError(
            f"the recipe says round {recipe.round}, but its base {base.reference.shown} makes this round {behind + 1}",
            hint="use the fused model of the round before as the base, with vectors that were made from it",
        )


def not_pinned(name: str, locked: LockedInput, digest: str) -> InputError:
    """The error that an input is not the one that was locked."""
    return InputError(
        f"'{name}' ({locked.reference}) is not what the lock pins: "
        f"digest {digest[:19]}..., expected {str(locked.digest)[:19]}...",
        hint="restore the pinned input, or merge the unlocked recipe",
    )


def _locked_coefficients(plan: Plan, listed: Sequence[Contribution]) -> Mapping[str, tuple[float, ...]]:
    """The coefficients in the lock, which has them in the recipe's order, in the order of the plan."""
    found = plan.recipe.lock.coefficients if plan.recipe.lock else None
    if not found:
        return {}
    learned = {step.name for step in plan.steps if step.is_merged and step.method.learned}
    if set(found) != learned or any(len(row) != len(listed) for row in found.values()):
        problem = f"the lock's coefficients are not for these {len(learned)} tensors and {len(listed)} vectors"
        raise InputError(problem, hint="merge the unlocked recipe, which learns them anew")
    place = {one.name: index for index, one in enumerate(listed)}
    return {name: tuple(row[place[one.name]] for one in plan.contributions) for name, row in found.items()}


def steps_of(recipe: Recipe, base: Checkpoint, labels: tuple[str, ...]) -> Iterator[Step]:
    """How each tensor of the base becomes one of a result with these labels."""
    merge = recipe.merge
    for name, record in sorted(base.records.items()):
        role = base.roles[name]
        shape = base.shape_with(name, labels)
        dtype = record.dtype
        if recipe.dtype and role is not Role.CONSTANT:
            dtype = STORED_AS[recipe.dtype]
        override = first_match(merge, name)
        named, options = chosen(merge, override)
        method, options = applied(named, options, shape, head=role is Role.HEAD)
        scale = merge.factor if override.scale is None else override.scale
        yield Step(Record(name, dtype, shape, record.file, 0), role, method, options, scale)


def _notes(recipe: Recipe, base: Checkpoint, contributions: tuple[Contribution, ...]) -> Iterator[str]:
    mode = recipe.recalibrate.mode if recipe.recalibrate else "none"
    if not base.has_statistics:
        if mode != "none":
            yield f"the network has no BatchNorm: recalibration ({mode}) is skipped"
    elif mode == "none":
        yield "BatchNorm statistics stay the base's; a fused network usually needs `recalibrate:`"
    if recipe.lock and recipe.lock.tools != tool_versions():
        yield f"the lock was made with {recipe.lock.tools}, this is {tool_versions()}: bytes may differ"
    if recipe.recalibrate and recipe.recalibrate.looks_at_images and recipe.recalibrate.count < FEW_IMAGES:
        yield f"recalibration on {recipe.recalibrate.count} images is unreliable; some hundreds are usual"
    if recipe.push and not recipe.push.private and not recipe.aliases:
        yield "the fused repo will be public, and its card names the sites' repos; aliases: true replaces them"
    yield from _search_notes(recipe)
    known = [set(one.labels) for one in contributions]
    single = [label for label in sorted(set().union(*known)) if len(known) > 1 and sum(label in k for k in known) == 1]
    if single:
        yield f"only one site has the label {listed(single)}: check the spelling if others should"
    seen: dict[str, str] = {}
    for one in contributions:
        if one.digest in seen:
            yield f"'{one.name}' and '{seen[one.digest]}' have the same content and both count"
        seen.setdefault(one.digest, one.name)


def _search_notes(recipe: Recipe) -> Iterator[str]:
    searched, test = recipe.merge.searched, recipe.evaluate
    if searched and test and (searched.images, searched.split) == (test.images, test.split):
        yield "the search looks at the very images of `evaluate:`, so what they say of the result is too good"
