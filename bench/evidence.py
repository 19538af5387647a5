"""Run `hf-datavec study` on the PAD-UFES-20 networks of `bench/networks.py`, seed by seed, and print one table of all.

    python bench/networks.py pad DATA --out NETWORKS
    python bench/evidence.py DATA NETWORKS --out DIR [--rounds] [--federated] [--least-squares]

DATA is the folder of PAD-UFES-20. Each seed becomes a study of its own, since its patients were divided before; the
studies, their results and their pages stay in DIR, and what is finished is not computed again. With `--rounds` also
two rounds of merging, and with `--federated` FedAvg over four, at the same epochs in all. With `--least-squares` heads
of the last round are fitted in closed form.

    python bench/networks.py pad DATA --out NETWORKS --networks none
    python bench/evidence.py DATA NETWORKS --out DIR --heads-first [--batch-size 8] [--again] [--on public]

The second form trains as the first does not: a round of heads comes first, and pictures are shown in other positions.
The study trains its networks itself; `--again` adds a second round of as many epochs. With `--on public` the rows of a
study that is finished are measured on the labelled public images, with `--on both` on these and the test images.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from pathlib import Path

SITES = tuple(f"site-{letter}" for letter in "abcd")
METRICS = ("accuracy", "balanced_accuracy", "auroc", "ece")
STUDY = """\
data: {{images: ./{data}, label: label, group: patient_id}}
base: {imagenet}
image_size: 128
sites: {{make: column, column: part}}
test: {{column: part, values: [{on}]}}
public: {{images: {public}, count: 160}}
seeds: [{seed}]
{training}
merges: [{merges}]
restore: [statistics, relative]
budgets: [{budgets}]
curve: [0.5]
federated: {federated}
relay: {relay}
heads: {{{fit}, rounds: {heads}, merge: {{method: sum, scale: 0.5}}, restore: statistics}}
output: ./{results}
"""
SUM = "{method: sum, scale: 0.5}"
ONE = {
    "training": "training: {{epochs: 12, learning_rate: 0.0003, warmup: 0.3}}",
    "merges": SUM, "budgets": "epochs", "federated": "null", "relay": "null", "heads": "1",
}  # fmt: skip
TWO = {"relay": f"{{rounds: 2, merge: {SUM}, restore: statistics}}", "heads": "2"}
HEADS_FIRST = {
    "training": "start: {{steps: 60}}\n"
    "training: {{epochs: 12, learning_rate: 0.0003, warmup: 0.3, augment: turns, batch_size: {batch}}}",
    "merges": f"{SUM}, {{method: sum, scale: 1.0}}, {{method: auto}}", "budgets": "epochs, steps",
}  # fmt: skip
AGAIN = {
    "relay": f"{{rounds: 2, epochs: 12, heads: true, merge: {SUM}, restore: statistics}}", "heads": "2",
    "budgets": "epochs, rounds",
}  # fmt: skip
# The parts of the images that a table is about.
ON = {"test": ("test",), "public": ("public",), "both": ("test", "public")}


def write_study(data: Path, networks: Path, out: Path, seed: int, *, on: str, more: dict[str, str]) -> Path:
    """The study file of a seed, its images with who has them, and what is there already."""
    source = (networks / "pad" / f"seed-{seed}").absolute()
    folder = out / results(seed, on)
    images = out / f"{folder.name.replace('results', 'data')}"
    if not images.exists():
        copy_images(data, source / "images", images, ON[on])
    finished = out / results(seed, "test") / f"seed-{seed}"
    for name in (*SITES, "all-sites"):
        place = folder / f"seed-{seed}" / "vectors" / ("pooled-epochs" if name == "all-sites" else name)
        given = source / "vectors" / name
        if on == "test" and given.exists() and not place.exists() and "start" not in more["training"]:
            shutil.copytree(given, place)
    for kept in ("start", "vectors", "rounds"):
        if on != "test" and (finished / kept).exists():
            shutil.copytree(finished / kept, folder / f"seed-{seed}" / kept, dirs_exist_ok=True)
    path = out / f"{folder.name.replace('results', 'study')}.yaml"
    imagenet, public = (networks / "imagenet").absolute(), source / "images" / "public"
    values = {
        "imagenet": imagenet,
        "public": public,
        "on": ", ".join(ON[on]),
        "results": folder.name,
        "data": images.name,
    }
    path.write_text(STUDY.format(seed=seed, **values, **more), "utf-8")
    return path


def results(seed: int, on: str) -> str:
    """The name of the folder of a seed's results."""
    return f"results-{seed}" if on == "test" else f"results-{on}-{seed}"


def copy_images(data: Path, parts: Path, images: Path, on: tuple[str, ...]) -> None:
    """All images of the sites and of those that are measured on in one folder, with a table of who has which."""
    with (data / "metadata.csv").open() as file:
        rows = {Path(row["file_name"]).name: row for row in csv.DictReader(file)}
    partial = images.with_name(f".{images.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    with (partial / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "label", "patient_id", "part"))
        for part in (*on, *SITES):
            for path in sorted((parts / part).rglob("*.*")):
                row = rows[path.name]
                shutil.copyfile(path, partial / "images" / path.name)
                table.writerow((f"images/{path.name}", row["label"], row["patient_id"], part))
    partial.rename(images)


def run(path: Path, out: Path, folder: Path) -> None:
    """Do the study. Its folder is told what the vectors that were put there belong to."""
    from hf_datavec.study import load
    from hf_datavec.study.pictures import open_table
    from hf_datavec.study.run import STUDY_FILE, open_elsewhere, run, write_note

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STUDY_FILE).exists():
        study = load(path)
        here = out.absolute()
        write_note(study, open_table(study.data, here), open_elsewhere(study, here), folder)
    run(path, device="cpu")


def print_table(out: Path, seeds: list[int], on: str) -> None:
    """Mean and interval of each row over the seeds, and what each seed had."""
    from hf_datavec.study.comparison import over_seeds
    from hf_datavec.study.results import cell

    found = [json.loads((out / results(seed, on) / "results.json").read_text())["rows"] for seed in seeds]
    print("| row | " + " | ".join(name.replace("_", " ") for name in METRICS) + " |")
    print("| --- " * (len(METRICS) + 1) + "|")
    for row in found[0]:
        of_seeds = [next(one["seeds"] for one in rows if one["name"] == row["name"]) for rows in found]
        cells = []
        for metric in METRICS:
            values = [one[metric][0] for one in of_seeds]
            each = ", ".join(f"{100 * value:.1f}" for value in values)
            cells.append(f"{cell(over_seeds(values))} ({each})" if metric in METRICS[:2] else cell(over_seeds(values)))
        print(f"| {row['name']} | {' | '.join(cells)} |")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of PAD-UFES-20")
    parser.add_argument("networks", type=Path, help="what bench/networks.py has made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", action="store_true", help="two rounds, too; ten minutes a seed")
    parser.add_argument("--federated", action="store_true", help="FedAvg over four rounds, too; ten minutes a seed")
    parser.add_argument("--least-squares", action="store_true", help="heads in closed form, not by 60 steps")
    parser.add_argument("--heads-first", action="store_true", help="train with heads first and pictures turned")
    parser.add_argument("--batch-size", type=int, default=32, help="of networks that train with heads first")
    parser.add_argument("--budgets", nargs="+", choices=("epochs", "steps"), help="of all data pooled")
    parser.add_argument("--again", action="store_true", help="a second round of 12 epochs, too")
    parser.add_argument("--on", choices=tuple(ON), default="test", help="the images that rows are measured on")
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen.out.mkdir(parents=True, exist_ok=True)
    more = {**ONE, **(TWO if chosen.rounds else {}), **(HEADS_FIRST if chosen.heads_first else {})}
    more |= {**(AGAIN if chosen.again else {}), **({"federated": "{rounds: 4}"} if chosen.federated else {})}
    more |= {"budgets": ", ".join(chosen.budgets)} if chosen.budgets else {}
    more["training"] = more["training"].format(batch=chosen.batch_size)
    more["fit"] = "fit: least_squares" if chosen.least_squares else "steps: 60"
    for seed in chosen.seeds:
        path = write_study(chosen.data, chosen.networks, chosen.out, seed, on=chosen.on, more=more)
        run(path, chosen.out, chosen.out / results(seed, chosen.on))
    print_table(chosen.out, chosen.seeds, chosen.on)


if __name__ == "__main__":
    main()
