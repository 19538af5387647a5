"""Whether a vector belongs to a base, or every reason why it does not."""

from __future__ import annotations

from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError, listed
from hf_datavec.hub import Fetched
from hf_datavec.vector import TaskVector


def check_against(vector: TaskVector, base: Checkpoint, fetched: Fetched) -> list[InputError]:
    """Every reason why a vector cannot be added to a base; empty when it fits.

    Of a hollow base the commit or the hashes of its files must be those that the manifest names; a base that can
    be told by neither is checked when its content is at hand.
    """
    theirs, base_id = vector.manifest.base, fetched.reference.identity
    if fetched.hollow:
        return [*_hollow_misfit(vector, fetched), *_misfits(vector, base)]
    if theirs.digest != base.tensors.digest:
        if theirs.id == base_id:
            problem = f"the base '{base_id}' has changed since the vector '{vector.folder}' was made"
            hint = "use the base as it was (pin its revision), or make the vector again from this one"
        else:
            problem = f"the vector '{vector.folder}' was made from the base '{theirs.id}', not from '{base_id}'"
            hint = "all vectors of a merge start from one base; check `base:` in the recipe"
        digests = f"digest {theirs.digest[:19]}..., expected {base.tensors.digest[:19]}..."
        return [InputError(f"{problem}: {digests}", hint=hint)]
    return _misfits(vector, base)


def _hollow_misfit(vector: TaskVector, fetched: Fetched) -> list[InputError]:
    theirs = vector.manifest.base
    if (theirs.id, theirs.commit) == (fetched.reference.repo, fetched.commit) or not theirs.files:
        return []
    ours = {name: value for name, value in fetched.hashes.items() if name.endswith(".safetensors")}
    if theirs.files == ours:
        return []
    where = f"'{theirs.id}'" + (f" at {theirs.commit[:12]}" if theirs.commit else "")
    return [
        InputError(
            f"the vector '{vector.folder}' was made from the base {where}, whose weights are not those of "
            f"{fetched.reference.shown}",
            hint="pin the base's revision in the recipe, or make the vector again from this base",
        )
    ]


def _misfits(vector: TaskVector, base: Checkpoint) -> list[InputError]:
    errors = []
    needed, stored = set(base.named(Role.WEIGHT, Role.HEAD)), vector.manifest.stored
    missing = needed - set(stored)
    extra = set(stored) - needed - set(base.named(Role.STATISTIC))
    if missing:
        errors.append(InputError(f"the vector '{vector.folder}' lacks tensors of the base: {listed(missing)}"))
    if extra:
        errors.append(InputError(f"the vector '{vector.folder}' has tensors that the base lacks: {listed(extra)}"))
    for name in sorted(set(stored) & set(base.records)):
        expected = base.shape_with(name, vector.labels)
        if stored[name].shape != expected:
            shapes = f"has shape {list(stored[name].shape)}, expected {list(expected)}"
            errors.append(InputError(f"the vector '{vector.folder}': tensor '{name}' {shapes}"))
    return errors
