"""Run `hf-datavec study` on the PAD-UFES-20 networks of `bench/networks.py`, seed by seed, and print one table of all.

    python bench/networks.py pad DATA --out NETWORKS
    python bench/evidence.py DATA NETWORKS --out DIR [--rounds] [--federated] [--least-squares]

DATA is the folder of PAD-UFES-20. Each seed becomes a study of its own, since its patients were divided before; the
studies, their results and their pages stay in DIR, and what is finished is not computed again. With `--rounds` also
two rounds of merging, and with `--federated` FedAvg over four, at the same epochs in all. With `--least-squares` heads
of the last round are fitted in closed form.
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
data: {{images: ./data-{seed}, label: label, group: patient_id}}
base: {imagenet}
image_size: 128
sites: {{make: column, column: part}}
test: {{column: part, values: [test]}}
public: {{images: {public}, count: 160}}
seeds: [{seed}]
training: {{epochs: 12, learning_rate: 0.0003, warmup: 0.3}}
merges: [{{method: sum, scale: 0.5}}]
restore: [statistics, relative]
budgets: [epochs]
curve: [0.5]
federated: {federated}
relay: {relay}
heads: {{{fit}, rounds: {heads}, merge: {{method: sum, scale: 0.5}}, restore: statistics}}
output: ./results-{seed}
"""
ONE = {"federated": "null", "relay": "null", "heads": "1"}
TWO = {"federated": "null", "relay": "{rounds: 2, merge: {method: sum, scale: 0.5}, restore: statistics}", "heads": "2"}


def write_study(data: Path, networks: Path, out: Path, seed: int, more: dict[str, str]) -> Path:
    """The study file of a seed, its images with who has them, and the vectors that are there already."""
    source = (networks / "pad" / f"seed-{seed}").absolute()
    images = out / f"data-{seed}"
    if not images.exists():
        copy_images(data, source / "images", images)
    vectors = out / f"results-{seed}" / f"seed-{seed}" / "vectors"
    for name in (*SITES, "all-sites"):
        place = vectors / ("pooled-epochs" if name == "all-sites" else name)
        if not place.exists():
            shutil.copytree(source / "vectors" / name, place)
    path = out / f"study-{seed}.yaml"
    imagenet = (networks / "imagenet").absolute()
    path.write_text(STUDY.format(seed=seed, imagenet=imagenet, public=source / "images" / "public", **more), "utf-8")
    return path


def copy_images(data: Path, parts: Path, images: Path) -> None:
    """All images of the sites and the test in one folder, with a table of who has which."""
    with (data / "metadata.csv").open() as file:
        rows = {Path(row["file_name"]).name: row for row in csv.DictReader(file)}
    partial = images.with_name(f".{images.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    with (partial / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "label", "patient_id", "part"))
        for part in ("test", *SITES):
            for path in sorted((parts / part).rglob("*.*")):
                row = rows[path.name]
                shutil.copyfile(path, partial / "images" / path.name)
                table.writerow((f"images/{path.name}", row["label"], row["patient_id"], part))
    partial.rename(images)


def run(path: Path, out: Path, seed: int) -> None:
    """Do the study. Its folder is told what the vectors that were put there belong to."""
    from hf_datavec.study import load
    from hf_datavec.study.pictures import open_table
    from hf_datavec.study.run import STUDY_FILE, open_elsewhere, run, write_note

    folder = out / f"results-{seed}"
    if not (folder / STUDY_FILE).exists():
        study = load(path)
        here = out.absolute()
        write_note(study, open_table(study.data, here), open_elsewhere(study, here), folder)
    run(path, device="cpu")


def print_table(out: Path, seeds: list[int]) -> None:
    """Mean and interval of each row over the seeds, and what each seed had."""
    from hf_datavec.study.comparison import over_seeds
    from hf_datavec.study.results import cell

    found = [json.loads((out / f"results-{seed}" / "results.json").read_text())["rows"] for seed in seeds]
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
    chosen = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen.out.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        more = {**(TWO if chosen.rounds else ONE), **({"federated": "{rounds: 4}"} if chosen.federated else {})}
        more["fit"] = "fit: least_squares" if chosen.least_squares else "steps: 60"
        path = write_study(chosen.data, chosen.networks, chosen.out, seed, more)
        run(path, chosen.out, seed)
    print_table(chosen.out, chosen.seeds)


if __name__ == "__main__":
    main()
