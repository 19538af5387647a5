"""From a recipe and headers to immutable steps: what a merge will do, or every reason why it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from hf_datavec import lineage, pooled_heads
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.choices import chosen, first_match, method_errors, override_errors, used
from hf_datavec.errors import InputError, listed, raise_all
from hf_datavec.fitting import check_against
from hf_datavec.hub import Fetched
from hf_datavec.methods import FROM_SITES, all_methods, applied
from hf_datavec.plan import FEW_IMAGES, Contribution, Plan, Step
from hf_datavec.recipe import LockedInput, Merge, Recipe
from hf_datavec.tensors import TORCH_NAMES, Record
from hf_datavec.vector import TaskVector, tool_versions

STORED_AS = {long: short for short, long in TORCH_NAMES.items()}


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
    errors += _target_errors(contributions)
    errors += _restoration_errors(recipe, checkpoint, contributions)
    errors += _temperature_errors(recipe, contributions)
    errors += override_errors(recipe.merge, checkpoint.named(Role.WEIGHT, Role.HEAD))
    raise_all(errors)
    # The recipe's order must not matter, bit for bit, so sites are summed in the order of their content.
    sites = ordered(weighed)
    labels = fused_labels(checkpoint.labels, [one.labels for one in sites])
    steps = tuple(steps_of(recipe, checkpoint, labels))
    notes = tuple(_notes(recipe, checkpoint, sites))
    made = Plan(recipe, checkpoint, base, sites, labels, steps, notes)
    made = replace(made, coefficients=_locked_coefficients(made, contributions))
    raise_all([*_average_errors(made), *pooled_heads.errors(made)])
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
            yield from _uneven_errors(name, kind, contributions)


def _target_errors(contributions: Sequence[Contribution]) -> Iterator[InputError]:
    """Heads by least squares that aim at different outputs, whose merge would be nobody's."""
    found: dict[float, list[str]] = {}
    for one in contributions:
        training = one.source.manifest.training if isinstance(one.source, TaskVector) else None
        if training and training.get("least_squares") and isinstance(training.get("target"), (int, float)):
            found.setdefault(float(training["target"]), []).append(one.name)
    if len(found) > 1:
        said = ", ".join(f"{target:g} ({listed(names)})" for target, names in sorted(found.items()))
        hint = "finetune --least-squares needs the same --target at all sites"
        yield InputError(f"the sites' heads by least squares aim at different outputs: {said}", hint=hint)


def _uneven_errors(method: str, kind: str, contributions: Sequence[Contribution]) -> Iterator[InputError]:
    """Sites whose second moments are of fewer tensors than another's; without them nobody's would count."""
    brought = {
        one.name: set(one.source.beside.tensors[kind].records)
        for one in contributions
        if isinstance(one.source, TaskVector) and kind in one.source.beside.entries
    }
    everything = set[str]().union(*brought.values())
    for name, found in brought.items():
        if missing := sorted(everything - found):
            problem = f"the method '{method}' needs {FROM_SITES[kind]}, but '{name}' lacks those of {listed(missing)}"
            hint = "other sites bring them; merge rounds of heads with each other, and whole vectors with each other"
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


def _temperature_errors(recipe: Recipe, contributions: tuple[Contribution, ...]) -> Iterator[InputError]:
    if not recipe.recalibrate or recipe.recalibrate.temperature != "sites":
        return
    for one in contributions:
        if one.temperature is None:
            hint = "the site can measure one with `hf-datavec finetune --hold-out 0.2` and `diff`; or use ensemble"
            yield InputError(f"temperature 'sites' needs one of each site, but '{one.name}' declares none", hint=hint)


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
    if recipe.recalibrate and recipe.recalibrate.temperature != "none" and not base.has_linear_head:
        yield f"the head is no single linear layer: temperature ({recipe.recalibrate.temperature}) is skipped"
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
