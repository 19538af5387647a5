"""Time commands beside what they cannot beat, in turn, as whole processes.

    python bench/commands.py --network vit-large
    python bench/commands.py --network vit-base --search

`python` starts and ends the interpreter. `plan` is of eight local vectors. `diff` is of one fine-tune, and `copies`
read its two networks and write a file as large as one of them through a small buffer. With `--search` a search over
ten scales, measured on two images, stands beside a merge without one and a program that loads one network and evaluates
it ten times on the same images; the last line holds the search against two merges and these evaluations.
Networks, rounds and what is shown are those of `bench/speed.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from speed import FLOOR, MODEL, NETWORKS, Run, machine, make, ours, spread, timed

VECTORS, PLANNED = 4, 8
SCALES = [number / 10 for number in range(1, 11)]
MERGES = 2  # that a search may cost beside its evaluations
SEARCH, EVALUATIONS = f"search over {len(SCALES)} scales", f"{len(SCALES)} evaluations"
# What any search must do: start, load one network, evaluate it once for every value; in a process that is tuned as the
# command line is.
EVALUATING = """
import sys
from pathlib import Path
from hf_datavec import hub, models
from hf_datavec.evaluate import evaluate_network
from hf_datavec.images import open_images
from hf_datavec.threads import tune_process
tune_process()
network, images = models.load(Path(sys.argv[1])), open_images(hub.parse(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    evaluate_network(network, images, batch_size=64)
"""


def programs(folder: Path, *, search: bool) -> dict[str, tuple[list[str], str]]:
    """The command of each program, and which one it is compared to."""
    entries = [f"./vector-{number % VECTORS}" for number in range(PLANNED)]
    wanted = {"base": "./base", "vectors": entries, "merge": {"method": "mean"}}
    if not search:
        files = [f"{name}/{MODEL}" for name in ("base", "tuned-0")]
        return {
            "python": ([sys.executable, "-c", "pass"], "python"),
            "--help": (ours("--help"), "python"),
            "plan of 8 vectors": ([*ours("plan"), write(folder / "plan.yaml", wanted)], "python"),
            "copies": ([sys.executable, "-c", FLOOR, "out", *files], "copies"),
            "diff": ([*ours("diff"), "base", "tuned-0", "-o", "out"], "copies"),
        }
    write_images(folder / "images")
    plain = wanted | {"vectors": entries[:VECTORS], "merge": {"method": "sum"}}
    scale = {"search": SCALES, "images": "./images", "metric": "accuracy"}
    searching = wanted | {"vectors": entries[:VECTORS], "merge": {"method": "sum", "scale": scale}}
    return {
        "merge": ([*ours("merge"), write(folder / "plain.yaml", plain), "-o", "out"], "merge"),
        "evaluate": ([*ours("evaluate"), "tuned-0", "images"], "merge"),
        EVALUATIONS: ([sys.executable, "-c", EVALUATING, "tuned-0", "images", str(len(SCALES))], "merge"),
        SEARCH: ([*ours("merge"), write(folder / "search.yaml", searching), "-o", "out"], "merge"),
    }


def write(path: Path, recipe: dict[str, object]) -> str:
    """A recipe in a file, and its name."""
    path.write_text(json.dumps(recipe), "utf-8")
    return path.name


def write_images(folder: Path) -> None:
    """One picture of each class."""
    from PIL import Image

    for label, colour in (("a", "red"), ("b", "blue")):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (224, 224), colour).save(folder / label / "0.png")


def main() -> None:
    """Make the networks, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="vit-base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--search", action="store_true", help="a search for a scale, instead of the other commands")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hf-datavec-bench")
    options = parser.parse_args()
    folder = options.work.absolute() / options.network
    folder.mkdir(parents=True, exist_ok=True)
    make(options.network, folder, VECTORS, VECTORS)
    chosen, found = programs(folder, search=options.search), dict[str, list[Run]]()
    for _ in range(options.rounds):
        for name, (command, _) in chosen.items():
            run = timed(command, folder)
            if run is None:
                raise SystemExit(1)
            found.setdefault(name, []).append(run)
    for line in machine():
        print(line)
    print("| program | seconds | ratio | processor seconds | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, (_, other) in chosen.items():
        runs = found[name]
        ratios = [run.seconds / beside.seconds for run, beside in zip(runs, found[other], strict=True)]
        times = spread([run.seconds for run in runs]), f"{spread(ratios)} {other}"
        memory = max(run.memory for run in runs) / 1e6
        print(f"| {name} | {' | '.join(times)} | {spread([run.processor for run in runs], 1)} | {memory:.0f} |")
    if options.search:
        print(f"\n{SEARCH} to {MERGES} merges and {EVALUATIONS}: {to_allowed(found, 'seconds')} in seconds, ", end="")
        print(f"{to_allowed(found, 'processor')} in processor seconds")


def to_allowed(found: dict[str, list[Run]], what: str) -> str:
    """A search's cost over that of two merges and the evaluations, round by round."""
    cost = {name: [getattr(run, what) for run in found[name]] for name in ("merge", EVALUATIONS, SEARCH)}
    rounds = zip(cost[SEARCH], cost["merge"], cost[EVALUATIONS], strict=True)
    return spread([search / (MERGES * merge + evaluations) for search, merge, evaluations in rounds])


if __name__ == "__main__":
    main()
