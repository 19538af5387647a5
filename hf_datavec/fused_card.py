"""The card of a fused model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_datavec import lineage
from hf_datavec.agreement import Agreement
from hf_datavec.card import LEAK_WARNING, licence, metadata
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Geometry
from hf_datavec.hub import Fetched
from hf_datavec.lineage import Round
from hf_datavec.plan import Plan
from hf_datavec.search import Search
from hf_datavec.tables import markdown_table, metric_name, metric_rows, size
from hf_datavec.verdict import Verdict


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
    agreement: Agreement | None = None
    verdict: Verdict | None = None

    @property
    def locked(self) -> bool:
        """Whether the lock lies beside the card; with aliases it must not, since it names the sites' repos."""
        return not self.plan.recipe.aliases


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
{_verdict_text(fusion.verdict)}{_search_text(fusion.search)}{_agreement_text(fusion.agreement)}{_evaluation_text(fusion.evaluation)}
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
    data = metadata(
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
    shown = markdown_table((search.kind, metric_name(search.metric), ""), search.rows)
    return (
        f"\n## Search\n\nThe {search.kind} was chosen by {metric} on {search.count} labelled public images of "
        f"`{search.images}` (digest `{search.digest[:19]}`), in percent, with 95 % bootstrap intervals over images. "
        f"These images are no test set any more.\n\n{shown}\n"
    )


def _verdict_text(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    header = ("candidate", "restored by", "support in %", "same answer in %", "divergence", "")
    return f"\n## Choice\n\n{verdict.text} No label was looked at.\n\n{markdown_table(header, verdict.rows)}\n"


def _agreement_text(agreement: Agreement | None) -> str:
    if agreement is None:
        return ""
    caution = f"\n{agreement.caution}\n" if agreement.caution else ""
    if agreement.foreign:
        caution += "\nThese images are of another kind than the sites', so this tells little.\n"
    header = ("network", "support in %", "same answer in %", "divergence")
    return (
        "\n## Agreement with the sites\n\nHow the ensemble of the sites' networks sees answers to "
        f"{agreement.count} unlabelled public images of `{agreement.images}`: *support* is the mean probability that "
        "it gives to a network's answers, *divergence* the mean Kullback-Leibler divergence in nats at the temperature "
        f"that suits the network best. No accuracy.\n\n{markdown_table(header, agreement.rows)}\n{caution}"
    )


def _evaluation_text(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "\n## Evaluation\n\nNot evaluated.\n"
    rows = metric_rows(evaluation.metrics)
    return (
        f"\n## Evaluation\n\n{evaluation.count} images of {_pinned(evaluation.images, evaluation.commit)}, in percent, "
        f"with 95 % bootstrap intervals over images.\n\n{markdown_table(('metric', 'value'), rows)}\n"
    )
