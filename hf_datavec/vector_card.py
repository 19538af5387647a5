"""The card of a task vector."""

from __future__ import annotations

from hf_datavec.card import LEAK_WARNING, metadata
from hf_datavec.checkpoint import Role
from hf_datavec.manifest import Manifest
from hf_datavec.second_moments import HEAD, REVEALED, WHAT, file_name
from hf_datavec.tables import markdown_table


def vector_card(manifest: Manifest, *, license: str | None = None) -> str:
    """The card of a vector repo; `license` is that of its base."""
    left_out = [entry_name for entry_name, entry in manifest.tensors.items() if not entry.stored]
    statistics = _statistics_text(manifest)
    entries = manifest.tensors.values()
    roles = [(role.value, str(sum(e.role is role for e in entries)), _stored(manifest, role)) for role in Role]
    commit = f" at commit `{manifest.base.commit}`" if manifest.base.commit else ""
    counts = (
        markdown_table(("label", "images"), [(label, str(n)) for label, n in manifest.examples.items()])
        if manifest.examples
        else "The site does not share how many images it has."
    )
    body = f"""
# Task vector on {manifest.base.id}

A task vector: what fine-tuning changed in `{manifest.base.id}` at one site (tuned minus base weights).
It is no model and does not load as one; `hf-datavec merge` adds several of them to the base.

* Base: `{manifest.base.id}`{commit}, content `{manifest.base.digest}`
* Labels: {", ".join(manifest.labels)}
* {statistics} {len(left_out)} of {len(manifest.tensors)} tensors are left out in all.

{markdown_table(("role", "tensors", "stored"), roles)}
{_temperature_text(manifest)}{_second_moments_text(manifest)}{_behind_text(manifest)}
## Images

{counts}

## Privacy

{LEAK_WARNING}

## Use

```yaml
base: {manifest.base.id}
vectors:
  - owner/this-repo
merge:
  method: mean
```
"""
    data = metadata(
        base_model=[manifest.base.id] if manifest.base.commit else None,
        base_model_relation="adapter" if manifest.base.commit else None,
        license=license,
        library_name="hf-datavec",
        pipeline_tag="image-classification",
        tags=["datavec", "task-vector"],
    )
    return f"---\n{data}\n---\n{body}"


def _temperature_text(manifest: Manifest) -> str:
    if manifest.temperature is None:
        return ""
    return (
        f"\nThe tuned network's probabilities fit best at temperature {manifest.temperature:g}, measured on images "
        "that the site did not train on. This number is all that the vector tells of them.\n"
    )


def _second_moments_text(manifest: Manifest) -> str:
    if not manifest.second_moments:
        return ""
    lines = [
        f"* `{file_name(kind)}`: {HEAD if entry.only else WHAT[kind]}; of {entry.images} images.\n"
        for kind, entry in manifest.second_moments.items()
    ]
    revealed = f"\n**{REVEALED}**\n" if "features" in manifest.second_moments else ""
    return (
        "\n## Second moments\n\nFor the methods `fisher`, `regmean` and `ridge_head` the site shares more than "
        "its vector. **These files summarise its private images.**\n\n" + "".join(lines) + revealed
    )


def _statistics_text(manifest: Manifest) -> str:
    if not manifest.has_statistics:
        return "BatchNorm running statistics are left out, since they summarise private images."
    text = "The site's BatchNorm running statistics are **included**; they summarise its private images."
    if (noise := manifest.noise) is None:
        return text
    return (
        f"{text} They carry Gaussian noise (sigma {noise.sigma:.3g} of the base's standard deviations), for epsilon "
        f"{noise.epsilon:g} and delta {noise.delta:g} against the change of one image, **given the weights**, which "
        "carry none, and **assuming** that one image moves the averages by its own contributions alone, whose root "
        f"mean square is at most {noise.bound:g}; nothing in training enforces that. The vector as a whole has no such "
        "guarantee."
    )


def _behind_text(manifest: Manifest) -> str:
    if not manifest.lineage:
        return ""
    count = len(manifest.lineage)
    return f"\nThe base is a fused model of round {count}, so this vector is for round {count + 1}.\n"


def _stored(manifest: Manifest, role: Role) -> str:
    entries = [entry for entry in manifest.tensors.values() if entry.role is role]
    return "yes" if entries and all(entry.stored for entry in entries) else "no"
