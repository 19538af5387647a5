"""Model cards as the Hub reads them: YAML metadata and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_datavec import lineage
from hf_datavec.checkpoint import Role
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry
from hf_datavec.hub import Fetched
from hf_datavec.lineage import Round
from hf_datavec.manifest import Manifest
from hf_datavec.plan import Plan
from hf_datavec.search import Search
from hf_datavec.second_moments import WHAT, file_name
from hf_datavec.tables import markdown_table, metric_rows, size

# Where a card keeps its metadata: YAML between two lines of dashes at its beginning.
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)---[ \t]*\n", re.DOTALL)
LEAK_WARNING = (
    "Images never left their site. That is not the same as private: the difference of two sets of weights can "
    "reveal training data ([Dimitrov et al. 2022](https://openreview.net/forum?id=e7A0B99zJf) recover images from "
    "such updates). Nothing in this repo has been audited for it. Treat it as you treat the data's statistics."
)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a merge did, as the card tells it."""

    name: str
    plan: Plan
    geometry: Geometry
    restoration: str
    evaluation: Evaluation | None
    recipe: str
    calibration: Fetched | None = None
    plots: tuple[tuple[str, str], ...] = ()
    search: Search | None = None
    rounds: tuple[Round, ...] = ()

    @property
    def locked(self) -> bool:
        """Whether the lock lies beside the card; with aliases it must not, since it names the sites' repos."""
        return not self.plan.recipe.aliases


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
{_second_moments_text(manifest)}{_behind_text(manifest)}
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
    data = _metadata(
        base_model=[manifest.base.id] if manifest.base.commit else None,
        base_model_relation="adapter" if manifest.base.commit else None,
        license=license,
        library_name="hf-datavec",
        pipeline_tag="image-classification",
        tags=["datavec", "task-vector"],
    )
    return f"---\n{data}\n---\n{body}"


def _second_moments_text(manifest: Manifest) -> str:
    if not manifest.second_moments:
        return ""
    lines = [
        f"* `{file_name(kind)}`: {WHAT[kind]}; of {entry.images} images.\n"
        for kind, entry in manifest.second_moments.items()
    ]
    return (
        "\n## Second moments\n\nFor methods that weigh single weights (`fisher`, `regmean`) the site shares more than "
        "its vector. **These files summarise its private images.**\n\n" + "".join(lines)
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


def _clip(clip: str | float) -> str:
    return "the median of their norms" if clip == "median" else f"norm {clip}"


def fused_card(fusion: Fusion) -> str:
    """The card of a fused model."""
    plan = fusion.plan
    library = plan.base.library
    merge = plan.recipe.merge
    options = "".join(f", {name} {value}" for name, value in merge.options.items())
    options += f", vectors clipped to {_clip(merge.clip)}" if merge.clip else ""
    body = f"""
# {fusion.name}

An image classifier fused from the task vectors of {len(plan.contributions)} sites by
[hf-datavec](https://arxiv.org/abs/2408.13038): `{merge.method}`, scale {merge.scale:g}{options}. {fusion.restoration}

## Load it

{_usage(plan, fusion.name)}

Labels: {", ".join(plan.labels)}

## Sites

{_site_table(fusion)}
{"".join(f"{chr(10)}![{text}]({file}){chr(10)}" for file, text in fusion.plots)}
{_search_text(fusion.search)}{_evaluation_text(fusion.evaluation)}
## How it was made

{_rounds_text(fusion.rounds)}{_calibration_text(fusion)}\
{size(plan.read_bytes)} read, {size(plan.write_bytes)} written. {_lock_text(fusion)}

```yaml
{fusion.recipe.strip()}
```

## Privacy

{LEAK_WARNING}
"""
    sources = [plan.base_fetched, *(() if plan.recipe.aliases else (one.fetched for one in plan.contributions))]
    data = _metadata(
        base_model=_repos(sources),
        license=licence(plan.base.folder),
        datasets=_data_sets(fusion),
        base_model_relation="merge",
        library_name=library,
        pipeline_tag="image-classification",
        tags=["merge", "datavec", "task-arithmetic", "hf-datavec"],
        model_name=fusion.name,
        evaluation=fusion.evaluation,
    )
    return f"---\n{data}\n---\n{body}"


def _repos(sources: Sequence[Fetched]) -> list[str] | None:
    """The Hub repos among sources, each once; the Hub refuses a card that names anything else."""
    found = [one.reference.repo for one in sources if one.reference.repo]
    return [found[0], *sorted(set(found[1:]) - {found[0]})] if found else None


def _data_sets(fusion: Fusion) -> list[str] | None:
    found = {fusion.calibration.reference.repo} if fusion.calibration else set()
    if fusion.evaluation and fusion.evaluation.commit:
        found.add(fusion.evaluation.images)
    return sorted(name for name in found if name) or None


def _pinned(name: str, commit: str | None) -> str:
    return f"`{name}` at commit `{commit}`" if commit else f"`{name}`"


def _calibration_text(fusion: Fusion) -> str:
    if fusion.calibration is None:
        return ""
    images = _pinned(fusion.calibration.reference.identity, fusion.calibration.commit)
    return f"Calibration images: {images}.\n\n"


def _rounds_text(rounds: tuple[Round, ...]) -> str:
    text = lineage.told(rounds)
    return f"{text}\n" if text else ""


def _lock_text(fusion: Fusion) -> str:
    if not fusion.locked:
        return "The sites are shown by aliases; the coordinator keeps the lock that pins them."
    return (
        "`recipe.lock.yaml` pins base, vectors and images by digest; with them at hand, `hf-datavec merge\n"
        "recipe.lock.yaml -o again` makes the same weights again."
    )


def licence(folder: Path) -> str | None:
    """The licence that the card in a folder states; what is derived from it is shared under the same."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = FRONT_MATTER.match((folder / "README.md").read_text("utf-8"))
        stated = YAML(typ="safe", pure=True).load(found[1])["license"] if found else None
    except (OSError, ValueError, TypeError, KeyError, YAMLError):
        return None  # a card that cannot be read states nothing
    return stated if isinstance(stated, str) else None


def _usage(plan: Plan, name: str) -> str:
    lines = [
        "```python",
        "from transformers import pipeline",
        "",
        f'classify = pipeline("image-classification", model="owner/{name}")  # or a local folder',
        'classify("picture.jpg")',
        "```",
    ]
    if plan.base.library == "timm":
        load = f'model = timm.create_model("hf-hub:owner/{name}", pretrained=True).eval()  # or local-dir:PATH'
        lines += ["", "```python", "import timm", "", load, "```"]
    return "\n".join(lines)


def _site_table(fusion: Fusion) -> str:
    norms = fusion.geometry.norms or (float("nan"),) * len(fusion.plan.contributions)
    rows = [
        (one.name, f"{one.weight:g}", f"{norm:.3f}", str(one.examples or "not shared"), ", ".join(one.labels))
        for one, norm in zip(fusion.plan.contributions, norms, strict=True)
    ]
    return markdown_table(("site", "weight", "norm of its vector", "images", "labels"), sorted(rows))


def _search_text(search: Search | None) -> str:
    if search is None:
        return ""
    metric = search.metric.replace("_", " ")
    return (
        f"\n## Search\n\nThe {search.kind} was chosen by {metric} on {search.count} labelled public images of "
        f"`{search.images}` (digest `{search.digest[:19]}`), in percent, with 95 % bootstrap intervals over images. "
        f"These images are no test set any more.\n\n{markdown_table((search.kind, metric, ''), search.rows)}\n"
    )


def _evaluation_text(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "\n## Evaluation\n\nNot evaluated.\n"
    rows = metric_rows(evaluation.metrics)
    return (
        f"\n## Evaluation\n\n{evaluation.count} images of {_pinned(evaluation.images, evaluation.commit)}, in percent, "
        f"with 95 % bootstrap intervals over images.\n\n{markdown_table(('metric', 'value'), rows)}\n"
    )


def _metadata(*, model_name: str | None = None, evaluation: Evaluation | None = None, **fields: Any) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if evaluation is not None:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name=evaluation.images,
                dataset_revision=evaluation.commit,
                metric_type=name,
                metric_value=round(estimate.value, 4),
                metric_args={
                    "interval_95": [round(estimate.low, 4), round(estimate.high, 4)],
                    "images": evaluation.count,
                },
            )
            for name, estimate in evaluation.metrics.items()
            if estimate.value == estimate.value
        ]
    return str(ModelCardData(model_name=model_name, eval_results=results, **fields)).strip()
