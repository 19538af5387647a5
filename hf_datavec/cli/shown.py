"""How results look: rows of tables, plain data for JSON."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from hf_datavec import candidates
from hf_datavec.ensemble import MOST_IMAGES
from hf_datavec.recalibrate import HELD_OUT
from hf_datavec.recipe import WeightSearch
from hf_datavec.second_moments import REVEALED
from hf_datavec.tables import metric_name, metric_rows, size, table

if TYPE_CHECKING:
    from hf_datavec.evaluate import Evaluation
    from hf_datavec.manifest import Manifest
    from hf_datavec.pipeline.discovery import Found
    from hf_datavec.pipeline.measure import Inspection
    from hf_datavec.plan import Plan
    from hf_datavec.search import Search
    from hf_datavec.verdict import Verdict

# Bytes a second from a solid-state disk or a warm page cache, at the slow end; for the plan's estimate.
READ_RATE = 1e9


def short(digest: str | None) -> str:
    """The first digits of a digest, as tables show it."""
    return digest.partition(":")[2][:12] if digest else "digest not known yet"


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data for JSON."""
    return {
        "base": plan.base_fetched.reference.identity,
        "base_digest": plan.base_digest,
        "vectors": [
            {
                "name": one.name,
                "weight": one.weight,
                "digest": one.digest,
                "labels": one.labels,
                "examples": one.examples,
            }
            for one in plan.contributions
        ],
        "labels": plan.labels,
        "tensors": [
            {"name": step.name, "role": step.role.value, "method": step.method.name, "scale": _number(step.scale)}
            for step in plan.steps
            if step.role.value in ("weight", "head")
        ],
        "download_bytes": plan.download_bytes,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "peak_bytes": plan.peak_bytes,
        "survey_passes": plan.survey_passes,
        "recalibrate": _restoration(plan),
        "distils": _distilling(plan) if plan.recipe.distils else None,
        "auto": _choice_line(plan) if candidates.wanted(plan) else None,
        "notes": plan.notes,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _restoration(plan: Plan) -> dict[str, Any]:
    """How statistics are restored, as far as headers tell: the mode, on which images, with which sites' statistics."""
    wanted = plan.recipe.recalibrate
    temperature = wanted.temperature if wanted else "none"
    if wanted is None or not plan.base.has_statistics:
        return {"mode": "none", "images": None, "statistics_of": [], "temperature": temperature}
    shared = [one.name for one in plan.contributions if one.has_statistics]
    return {
        "mode": wanted.mode,
        "images": wanted.images if wanted.looks_at_images else None,
        "statistics_of": shared if wanted.mode != "none" else [],
        "temperature": temperature,
    }


def _restoration_line(plan: Plan) -> str:
    found = _restoration(plan)
    if found["mode"] == "none":
        return "none"
    on = f" on {found['images']}" if found["images"] else ""
    return f"{found['mode']}{on}; {len(found['statistics_of'])} of {len(plan.contributions)} sites share statistics"


def _choice_line(plan: Plan) -> str:
    """How what the recipe leaves open will be decided, as far as headers tell."""
    wanted = plan.recipe.recalibrate
    assert wanted is not None  # the images are there
    most, count = min(wanted.count, MOST_IMAGES), sum(len(one.modes) for one in candidates.of(plan))
    return f"by agreement with the sites' networks on up to {most} images of {wanted.images}, of {count} candidates"


def _distilling(plan: Plan) -> dict[str, int]:
    """What learning from the sites' networks costs at most, as far as headers tell: images that are looked at, passes
    of one image through the fused network and back, and variants of images that each site's network answers to."""
    wanted = plan.recipe.recalibrate
    assert wanted is not None  # else nothing is learned
    images, tune = min(wanted.count, MOST_IMAGES), wanted.tuning
    passes = tune.epochs * (images - images // HELD_OUT)
    return {"epochs": tune.epochs, "images": images, "passes": passes, "variants": images * (tune.variants - 1)}


def _distilling_line(plan: Plan) -> str:
    found = _distilling(plan)
    variants = f"; each site's network answers to {found['variants']} variants of them" if found["variants"] else ""
    return (
        f"then distils: {found['epochs']} epochs on at most {found['images']} images, "
        f"{found['passes']} passes forward and back{variants}"
    )


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """A plan as the rows of a table."""
    lines = [("base", f"{plan.base_fetched.reference.identity} ({plan.base.library}, {short(plan.base_digest)})")]
    lines += [
        (f"vector {one.name}", f"weight {one.weight:g}, {len(one.labels)} labels, {short(one.digest)}")
        for one in sorted(plan.contributions, key=lambda one: one.name)
    ]
    methods = Counter(
        f"{step.method.name} x {'?' if _number(step.scale) is None else f'{step.scale:g}'}"
        for step in plan.steps
        if step.role.value in ("weight", "head")
    )
    lines += [(text, f"{count} tensors") for text, count in methods.items()]
    if plan.recipe.merge.searched:
        searched = plan.recipe.merge.searched
        what = "weights" if isinstance(searched, WeightSearch) else "scale"
        lines.append((f"search for {what}", f"by {searched.metric.replace('_', ' ')} on {searched.images}"))
    if candidates.wanted(plan):
        lines.append(("auto", _choice_line(plan)))
    if plan.recipe.merge.clip is not None:
        most = "the median of their norms" if plan.recipe.merge.clip == "median" else f"norm {plan.recipe.merge.clip:g}"
        lines.append(("clip", f"vectors to at most {most}"))
    if plan.surveys:
        passes = ("once", "twice", "three times")[plan.survey_passes - 1]
        lines.append(("survey", f"whole vectors are read {passes} before the merge"))
    lines += [
        ("labels", ", ".join(plan.labels[:12]) + (" ..." if len(plan.labels) > 12 else "")),
        ("recalibrate", _restoration_line(plan)),
    ]
    if (temperature := _restoration(plan)["temperature"]) != "none":
        lines.append(("temperature", str(temperature)))
    if plan.recipe.distils:
        lines.append(("", _distilling_line(plan)))
    if plan.download_bytes:
        lines.append(("downloads", size(plan.download_bytes)))
    lines += [
        ("reads", f"{size(plan.read_bytes)}, about {plan.read_bytes / READ_RATE:.1f} s at 1 GB/s"),
        ("writes", size(plan.write_bytes)),
        ("memory of the merge", size(plan.peak_bytes)),
    ]
    return lines


def evaluation_table(found: Evaluation) -> str:
    """Metrics with their intervals."""
    return table((f"{found.count} images of {found.images}", "% (95 % interval)"), metric_rows(found.metrics))


def choice_table(found: Verdict) -> str:
    """What `auto` tried and chose."""
    header = (
        f"on {found.count} images of {found.images}",
        "restored by",
        "support in %",
        "same answer in %",
        "divergence",
        "",
    )
    return table(header, found.rows)


def search_table(found: Search) -> str:
    """What a search tried and chose."""
    name = metric_name(found.metric)
    header = name if name.endswith("x 100") else f"{name} in %"
    return table((f"{found.kind}, on {found.count} images of {found.images}", header, ""), found.rows)


def found_table(found: list[Found]) -> str:
    """Vectors side by side, and which fit together."""
    rows = [
        (
            one.listed.reference.identity,
            one.manifest.base.id,
            short(one.manifest.base.digest),
            one.listed.changed[:10] or "-",
            ", ".join(one.manifest.labels[:6]) + (" ..." if len(one.manifest.labels) > 6 else ""),
            str(sum(one.manifest.examples.values())) if one.manifest.examples else "not shared",
            "yes" if one.fits else "NO: another base",
        )
        for one in found
    ]
    return table(("vector", "base", "base digest", "changed", "labels", "images", "fits"), rows)


def found_data(one: Found) -> dict[str, Any]:
    """One listed vector as plain data for JSON."""
    return {
        "vector": one.listed.reference.text,
        "base": one.manifest.base.model_dump(exclude_none=True),
        "changed": one.listed.changed or None,
        "labels": one.manifest.labels,
        "examples": one.manifest.examples,
        "fits": one.fits,
    }


def inspection_data(found: Inspection) -> dict[str, Any]:
    """Vectors side by side as plain data for JSON; cosines are null when the tensors were not read."""
    return {
        "vectors": [
            {
                "name": fetched.reference.name,
                "commit": fetched.commit,
                "norm": norm,
                "base": vector.manifest.base.model_dump(),
                "labels": vector.labels,
                "roles": _roles(vector.manifest),
                "statistics": vector.manifest.has_statistics,
                "training": vector.manifest.training,
                "second_moments": {kind: one.images for kind, one in (vector.manifest.second_moments or {}).items()},
                "bytes": vector.tensors.nbytes,
            }
            for norm, (fetched, vector) in zip(found.norms, found.vectors, strict=True)
        ],
        "cosines": found.cosines,
    }


def inspection_text(found: Inspection) -> str:
    """Vectors side by side as tables."""
    names = [fetched.reference.name for fetched, _ in found.vectors]
    rows = [
        (
            name,
            f"{norm:.4f}",
            size(vector.tensors.nbytes),
            vector.manifest.base.id,
            short(vector.manifest.base.digest),
            ", ".join(f"{count} {role}" for role, count in _roles(vector.manifest).items()),
            str(len(vector.labels)),
            str(sum(vector.manifest.examples.values())) if vector.manifest.examples else "not shared",
        )
        for name, norm, (_, vector) in zip(names, found.norms, found.vectors, strict=True)
    ]
    text = table(("vector", "norm", "size", "base", "base digest", "tensors", "labels", "images"), rows)
    if found.cosines is None:
        if len(names) > 1:
            text += f"\n\nonly headers were read; --download fetches {size(found.download_bytes)} and shows the cosines"
    elif len(names) > 1:
        cosines = [(name, *(f"{value:.3f}" for value in row)) for name, row in zip(names, found.cosines, strict=True)]
        text += "\n\n" + table(("cosine", *names), cosines)
    return text + "".join(
        _shared(name, vector.manifest) for name, (_, vector) in zip(names, found.vectors, strict=True)
    )


def _shared(name: str, manifest: Manifest) -> str:
    """What a vector brings beside it, in words."""
    kinds: dict[str, int] = {kind: entry.images for kind, entry in (manifest.second_moments or {}).items()}
    if not kinds:
        return ""
    text = ", ".join(f"{kind} of {images} images" for kind, images in sorted(kinds.items()))
    return f"\n\n{name} shares more than its vector: {text}." + (f" {REVEALED}" if "features" in kinds else "")


def _roles(manifest: Manifest) -> dict[str, int]:
    """How many stored tensors there are of each role."""
    counts: dict[str, int] = {}
    for entry in manifest.stored.values():
        counts[entry.role.value] = counts.get(entry.role.value, 0) + 1
    return counts
