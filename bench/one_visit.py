"""Print the tables of docs/evidence.md on one visit from the results of studies.

    hf-datavec study recipes/study-one-visit-scanners.yaml -o scanners
    python bench/one_visit.py scanners skew dominant ...

Each folder holds the `results.json` of a study whose first merge is `auto`, with `restore: [auto, relative]` and
`distil:`. Values are percent, the mean over seeds and in brackets each seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LEARNED = "auto, then learned from the ensemble"
SITE, ENSEMBLE, POOLED = "single site: best", "ensemble of the sites, logits", "all data pooled, equal epochs"
CALIBRATED = f"{LEARNED}, calibrated, auto"
TABLES = {
    "Better than my own site?": ("accuracy", (SITE, "mean x 1, auto", "auto, auto", f"{LEARNED}, auto")),
    "Better than an ensemble?": ("accuracy", (ENSEMBLE, "auto, auto", f"{LEARNED}, auto")),
    "The same, balanced accuracy": ("balanced_accuracy", (SITE, ENSEMBLE, "auto, auto", f"{LEARNED}, auto")),
    "How far from pooled?": ("accuracy", (POOLED, f"{LEARNED}, auto")),
    "Calibration error": ("ece", (ENSEMBLE, POOLED, f"{LEARNED}, auto", CALIBRATED)),
    "Foreign public images?": (
        "accuracy",
        ("mean x 1, relative on {on}", "auto, auto on {on}", f"{LEARNED}, auto on {{on}}"),
    ),
}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a study by name, without what `auto` chose."""
    found = json.loads((folder / "results.json").read_text("utf-8"))
    return {row["name"]: row for row in found["rows"]}


def cell(row: dict[str, Any] | None, metric: str) -> str:
    """A row's mean over seeds and the value of each."""
    if row is None:
        return "-"
    values = [100 * value for value in row["seeds"][metric]]
    each = ", ".join(f"{value:.1f}" for value in values)
    return f"{sum(values) / len(values):.1f} ({each})" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Print every table for the folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders of finished studies")
    parser.add_argument("--on", default="lesions", help="the name of the other public images in `more_public:`")
    chosen = parser.parse_args()
    studies = {folder.name: rows_of(folder) for folder in chosen.studies}
    for title, (metric, wanted) in TABLES.items():
        names = [name.format(on=chosen.on) for name in wanted]
        print(f"\n### {title}\n\n| data | {' | '.join(names)} |\n| --- {'| --- ' * len(names)}|")
        for folder, rows in studies.items():
            if any(name in rows for name in names):
                print(f"| {folder} | {' | '.join(cell(rows.get(name), metric) for name in names)} |")
    print("\n### What auto chose, by seed\n")
    for folder, rows in studies.items():
        for name, row in rows.items():
            if name.startswith("auto, auto") and row.get("chosen"):
                print(
                    f"* {folder}, {name}: " + "; ".join(f"{one['text']}, {one['mode']}" for one in row["chosen"] if one)
                )


if __name__ == "__main__":
    main()
