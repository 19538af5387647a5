"""What all model cards have in common: metadata as the Hub reads it, licence, and a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hf_datavec.evaluate import Evaluation

# Where a card keeps its metadata: YAML between two lines of dashes at its beginning.
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)---[ \t]*\n", re.DOTALL)
LEAK_WARNING = (
    "Images never left their site. That is not the same as private: the difference of two sets of weights can "
    "reveal training data ([Dimitrov et al. 2022](https://openreview.net/forum?id=e7A0B99zJf) recover images from "
    "such updates). Nothing in this repo has been audited for it. Treat it as you treat the data's statistics."
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


def metadata(*, model_name: str | None = None, evaluation: Evaluation | None = None, **fields: Any) -> str:
    """The YAML at the beginning of a card; `fields` are those of `ModelCardData`."""
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
