"""What `auto` would take by each rule, and how good its warning is, on the networks of studies.

    hf-datavec study STUDY.yaml -o DIR
    python bench/choosing.py STUDY.yaml=DIR [STUDY.yaml=DIR ...]

Every candidate of `auto`, and further merges for the warning, is restored on the study's public images, held against
the ensemble of the sites' networks there, and measured on the labelled test images. The first table has the accuracy
of what each rule takes, seed by seed; the second that of merges with the sites' own statistics alone (`moments`); the
last lines have the misses and false alarms of the warning. Kept vectors serve; what is missing is trained.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Merges that only the warning is tried on, beside the candidates of `auto`.
MORE = (
    ("sum", 0.75, {}),
    ("sum", 1.0, {}),
    ("median", 1.0, {}),
    ("karcher_mean", 1.0, {}),
    ("pcb", 1.0, {"ratio": 0.5}),
    ("sce", 1.0, {}),
    ("ties", 1.0, {"density": 0.2}),
)
MODES = ("statistics", "relative", "moments")
BLIND = ("mean x 1", "sum x 0.5", "iso_c x 1", "tsv x 1")
# A merge that is so many points below the best site's own network should be warned of.
WORSE = 1.0


@dataclass(frozen=True)
class Case:
    """One merge of a seed: how the ensemble sees it, and what share of the test images it gets right, in percent."""

    name: str
    mode: str
    match: object
    accuracy: float
    warned: bool
    listed: bool  # whether `auto` would try it


def cases(seed) -> Iterator[Case]:  # type: ignore[no-untyped-def]
    """Every merge of a seed in every mode."""
    from hf_datavec import agreement, candidates
    from hf_datavec.recipe import AUTO, Recalibrate
    from hf_datavec.study.rows import Measuring
    from hf_datavec.study.sections import Combining

    measuring = Measuring(seed)
    plan = seed.plan(measuring.vectors(), Combining(method=AUTO))
    judge = measuring.judge(plan)
    restore = Recalibrate.model_validate({"mode": AUTO, "images": "public"})
    left_open = replace(plan, recipe=plan.recipe.model_copy(update={"recalibrate": restore}))
    listed = list(candidates.of(left_open))
    more = [candidates.Candidate(name, scale, options, MODES) for name, scale, options in MORE]
    for candidate in (*listed, *more):
        alone, base = candidate.site is not None, candidate.scale == 0
        for mode in candidate.modes if alone or base else MODES:
            made = candidates.planned(left_open, candidate, mode)
            network = seed.merged(made)
            if mode != "none":
                measuring.restorer(made).apply(network, mode)
            match = judge.match(network)
            warned = bool(agreement.cautions(match, judge.ensemble.sites))
            tried = candidate in listed and mode in candidate.modes
            yield Case(
                candidate.named(judge.ensemble.names), mode, match, accuracy_of(measuring, network), warned, tried
            )


def accuracy_of(measuring, network) -> float:  # type: ignore[no-untyped-def]
    """The share of the test images that a network gets right, in percent."""
    rows = measuring.seed.test.label_rows(measuring.seed.place.network.labels)
    return float(100 * (measuring.predicted(network).argmax(1) == rows).mean())


def best_site(found: list[Case]) -> float:
    """The accuracy of the best site's own network, with its own statistics where it shares them."""
    alone = [one for one in found if one.name.endswith(" alone")]
    own = [one for one in alone if one.mode != "statistics"] or alone
    return max(one.accuracy for one in own)


def main() -> None:
    """Print the tables for the studies of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY.yaml=DIR")
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from hf_datavec.study.run import opened

    rules = {
        "most support": lambda one: (-round(one.match.support, 4), round(one.match.divergence, 4)),
        "least divergence": lambda one: one.match.divergence,
        "same answers": lambda one: -one.match.agreement,
    }
    taken: list[str] = []
    blind: list[str] = []
    everything: list[tuple[bool, bool]] = []
    for text in chosen.studies:
        path, _, folder = text.partition("=")
        found = [list(cases(seed)) for seed in opened(Path(path), output=Path(folder), device="cpu")]
        cells = [
            ", ".join(f"{min((one for one in some if one.listed), key=rule).accuracy:.1f}" for some in found)
            for rule in rules.values()
        ]
        sites = ", ".join(f"{best_site(some):.1f}" for some in found)
        taken.append(f"| {Path(path).stem} | {' | '.join(cells)} | {sites} |")
        moments = {name: [one.accuracy for some in found for one in some if (one.name, one.mode) == (name, "moments")]
                   for name in BLIND}  # fmt: skip
        cells = [", ".join(f"{value:.1f}" for value in moments[name]) for name in BLIND]
        blind.append(f"| {Path(path).stem} | {' | '.join(cells)} |")
        for some in found:
            merges = [one for one in some if not one.name.endswith(" alone")]
            everything += [(one.accuracy < best_site(some) - WORSE, one.warned) for one in merges]
    print(f"| data | {' | '.join(rules)} | best site |\n{'| --- ' * 5}|\n" + "\n".join(taken))
    print(f"\n| data, `moments` | {' | '.join(BLIND)} |\n{'| --- ' * 5}|\n" + "\n".join(blind))
    worse, fine = ([warned for bad, warned in everything if bad is kind] for kind in (True, False))
    missed, false = sum(not one for one in worse), sum(fine)
    print(f"\nOf {len(everything)} merges {len(worse)} are more than {WORSE:g} point below the best site.")
    print(f"Not warned of: {100 * missed / max(1, len(worse)):.0f} % of those.")
    print(f"Warned of: {100 * false / max(1, len(fine)):.0f} % of the others.")


if __name__ == "__main__":
    main()
