"""Methods x restoration modes on the real networks that `bench/networks.py` made.

Run with `python bench/restoration.py DIR --study pad` (DIR is the --out of networks.py); each cell is kept in
`DIR/STUDY/cells.jsonl`, so that an interrupted run goes on, and `--table` prints what is there as Markdown: accuracy
and balanced accuracy in percent, mean over seeds and the half-width of its 95 % interval (Student's t). `--hostile`
measures merges with one hostile vector of five instead, `--noise` noise on the shared statistics.

Public images: `in` held-out images of the sites' kind, `photos` patches of sample photographs, `other` the other
data set. A column says mode:images; `relative-base` is relative without any site's statistics.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from networks import SITES

COUNT = 160  # public images, as many as PAD-UFES-20 leaves beside sites and test
ROWS: Mapping[str, Mapping[str, Any]] = {
    "sum x 1.0": {"method": "sum"},
    "sum x 0.7": {"method": "sum", "scale": 0.7},
    "sum x 0.5": {"method": "sum", "scale": 0.5},
    "mean": {"method": "mean"},
    "ties 20 %, x 2": {"method": "ties", "scale": 2.0, "options": {"density": 0.2}},
    "iso_c": {"method": "iso_c"},
    "tsv": {"method": "tsv"},
    "median x 2": {"method": "median", "scale": 2.0},
    "random x 0.5": {"method": "random", "scale": 0.5},
}
HOSTILE = ("times 20", "negated", "noise")
ROBUST: Mapping[str, Mapping[str, Any]] = {
    "mean": {"method": "mean"},
    "median": {"method": "median"},
    "trimmed_mean": {"method": "trimmed_mean"},
    "geometric_median": {"method": "geometric_median"},
    "krum": {"method": "krum"},
    "multi_krum": {"method": "multi_krum"},
    "mean, clip: median": {"method": "mean", "clip": "median"},
    # At about the best scale, where a shorter step costs less.
    "median x 2": {"method": "median", "scale": 2.0},
    "trimmed_mean x 2": {"method": "trimmed_mean", "scale": 2.0},
    "geometric_median x 2": {"method": "geometric_median", "scale": 2.0},
    "multi_krum x 2": {"method": "multi_krum", "scale": 2.0},
}
EPSILONS = (1.0, 10.0, 100.0, 1000.0, 1e4, 1e6)
IMAGES = ("in", "photos", "other")


@dataclass
class Bench:
    """One seed of a study: its networks, images and what several cells share."""

    root: Path
    study: str
    seed: int

    @cached_property
    def folder(self) -> Path:
        return self.root / self.study / f"seed-{self.seed}"

    @cached_property
    def base(self) -> Any:
        from hf_datavec.checkpoint import open_checkpoint

        return open_checkpoint(self.root / self.study / "base")

    @cached_property
    def vectors(self) -> list[Path]:
        return [self.folder / "vectors" / site for site in SITES]

    def pixels(self, folder: Path, count: int | None = None) -> tuple[Any, Any]:
        """Preprocessed pictures of a folder, evenly spread, and their labels' rows where they have them."""
        import torch

        from hf_datavec import hub, models
        from hf_datavec.images import evenly_spread, open_images

        images = open_images(hub.parse(str(folder)))
        number = min(count or len(images), len(images))
        chosen = evenly_spread(len(images), number)
        known = images.label_column is not None and set(images.labels) <= set(self.base.labels)
        rows = images.label_rows(self.base.labels) if known else None
        pixels = images.tensors(models.preprocess(self.base), chosen)
        return pixels, torch.tensor([rows[index] for index in chosen]) if rows else None

    @cached_property
    def test(self) -> tuple[Any, Any]:
        return self.pixels(self.folder / "images" / "test")

    @cached_property
    def public(self) -> dict[str, tuple[Any, Any]]:
        other = "digits" if self.study == "pad" else "pad"
        folders = (
            self.folder / "images" / "public",
            self.root / "photographs",
            self.root / other / f"seed-{self.seed}" / "images" / "public",
        )
        return {name: self.pixels(folder, COUNT) for name, folder in zip(IMAGES, folders, strict=True)}

    def pictures(self, images: str) -> Any:
        from hf_datavec.recalibrate import Pictures

        pixels = self.public[images][0]
        return Pictures(len(pixels), lambda indices: pixels[list(indices)], 32)

    @cached_property
    def sites(self) -> Any:
        from hf_datavec.hub import Fetched, parse
        from hf_datavec.plan import Contribution
        from hf_datavec.recalibrate import Sites
        from hf_datavec.vector import open_vector

        members = tuple(
            Contribution(path.name, Fetched(parse(str(path)), path), open_vector(path), 1.0, path.name)
            for path in self.vectors
        )
        return Sites(self.base, members, shared=True)

    @cached_property
    def abroad(self) -> dict[str, Any]:
        from hf_datavec import recalibrate

        return {images: recalibrate.abroad(self.sites, self.pictures(images)) for images in IMAGES}

    @cached_property
    def goals(self) -> dict[str, Any]:
        from hf_datavec import recalibrate

        return {images: recalibrate.goals(self.sites, self.pictures(images)) for images in IMAGES}

    def probabilities(self, network: Any) -> Any:
        import torch

        pixels = self.test[0]
        with torch.no_grad():
            parts = [network.logits(pixels[start : start + 64]) for start in range(0, len(pixels), 64)]
        return torch.softmax(torch.cat(parts).double(), 1)

    def score(self, probabilities: Any) -> list[float]:
        """Accuracy and balanced accuracy in percent."""
        rows = self.test[1]
        hit = probabilities.argmax(1) == rows
        balanced = [float(hit[rows == row].double().mean()) for row in sorted(set(rows.tolist()))]
        return [100 * float(hit.double().mean()), 100 * sum(balanced) / len(balanced)]

    def fused(self, name: str, merge: Mapping[str, Any], vectors: list[Path] | None = None) -> Path:
        """The folder of a merge without restoration, made once."""
        from hf_datavec.pipeline.coordinator import merge as run

        place = self.folder / "fused" / name.replace(" ", "_")
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            recipe = place.parent / f"{place.name}.yaml"
            described = {"base": str(self.base.folder), "vectors": [str(path) for path in vectors or self.vectors]}
            recipe.write_text(json.dumps({**described, "merge": merge}), "utf-8")
            run(recipe, output=place, push=False, device="cpu")
        return place

    def cells(self, folder: Path, *, own: bool = False) -> Iterator[tuple[str, Callable[[], list[float]]]]:
        """Each column of a row with what computes it; `own`: only what one site's network can be asked for."""
        from hf_datavec import models, recalibrate

        network = models.load(folder)
        home = self.sites.home()
        alike = recalibrate.of_base(self.base)

        def scored(statistics: Mapping[str, Any]) -> list[float]:
            recalibrate.assign(network, statistics)
            return self.score(self.probabilities(network))

        yield "none", lambda: self.score(self.probabilities(models.load(folder)))
        if not own:
            yield "moments", lambda: scored(home)
        for images in IMAGES:
            seen: dict[str, Any] = {}

            def observed(images: str = images, seen: dict[str, Any] = seen) -> Any:
                return seen or seen.update(recalibrate.observe(network, self.pictures(images))) or seen

            def carried(start: Mapping[str, Any], images: str = images, observed: Any = observed) -> list[float]:
                found, abroad = observed(), self.abroad[images]
                return scored(
                    {name: recalibrate.carried_over(found[name], start[name], abroad[name]) for name in found}
                )

            yield f"statistics:{images}", lambda observed=observed: scored(observed())
            if own:
                continue
            yield f"relative:{images}", lambda carried=carried: carried(home)
            yield f"relative-base:{images}", lambda carried=carried: carried(alike)
            yield (
                f"repair:{images}",
                lambda images=images: scored(
                    recalibrate.repair(network, self.pictures(images), goals=self.goals[images])
                ),
            )
        if not own:
            yield "tune-labels:in", lambda: self.tuned(network, "in", labelled=True)
            yield "tune-entropy:in", lambda: self.tuned(network, "in", labelled=False)

    def tuned(self, network: Any, images: str, *, labelled: bool) -> list[float]:
        """Mode tune: re-estimated statistics, then 20 steps on the affine parameters."""
        from hf_datavec import models, recalibrate

        own = models.Network(copy.deepcopy(network.module), network.labels, network.preprocess)
        pictures = self.pictures(images)
        recalibrate.statistics(own, pictures)
        rows = self.public[images][1].tolist() if labelled else None
        recalibrate.tune(own, pictures, rows, parameters="affine", steps=20, learning_rate=3e-4)
        return self.score(self.probabilities(own))

    def divergences(self) -> dict[str, float]:
        """What the guard sees, by public images."""
        from hf_datavec import recalibrate

        return {images: recalibrate.compare(self.sites, self.pictures(images)).divergence for images in IMAGES}


@dataclass
class Cells:
    """Results on disk, one a line."""

    path: Path

    def read(self) -> dict[tuple[int, str, str], list[float]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(one["seed"], one["row"], one["column"]): one["found"] for one in map(json.loads, lines)}

    def keep(self, seed: int, row: str, column: str, found: Callable[[], list[float]]) -> None:
        """Compute and append a cell that is not there yet."""
        if (seed, row, column) not in self.read():
            entry = {"seed": seed, "row": row, "column": column, "found": found()}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def measure(bench: Bench, cells: Cells, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """All cells of one seed."""
    from hf_datavec import models

    for images, found in bench.divergences().items():
        cells.keep(bench.seed, "guard", images, lambda found=found: [found, found])
    for name, merge in rows.items():
        for column, compute in bench.cells(bench.fused(name, merge)):
            cells.keep(bench.seed, name, column, compute)
        print(f"{bench.study} seed {bench.seed}: {name}", flush=True)
    for site in SITES:
        for column, compute in bench.cells(bench.folder / "tuned" / site, own=True):
            cells.keep(bench.seed, site, column, compute)
    tuned = [bench.folder / "tuned" / site for site in SITES]
    cells.keep(
        bench.seed, "output ensemble of 4", "none",
        lambda: bench.score(sum(bench.probabilities(models.load(folder)) for folder in tuned)),
    )  # fmt: skip
    for row, folder in (("all data pooled", bench.folder / "tuned" / "all-sites"), ("base", bench.base.folder)):
        if folder.exists():
            cells.keep(
                bench.seed, row, "none", lambda folder=folder: bench.score(bench.probabilities(models.load(folder)))
            )


def honest(name: str, merge: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a robust merge is held against: itself on the four others; the mean for krum, which needs five sites."""
    return {**merge, "method": "mean"} if "krum" in name else merge


def fuse(bench: Bench, rows: list[str], *, robust: bool) -> None:
    """Write the fused networks that are not there yet."""
    for name in [] if robust else rows:
        bench.fused(name, ROWS[name])
    for name, merge in ROBUST.items() if robust else ():
        bench.fused(f"robust {name}", honest(name, merge))
        for kind in HOSTILE:
            bench.fused(f"robust {name} {kind}", merge, [*bench.vectors, hostile_vector(bench, kind)])


def hostile(bench: Bench, cells: Cells) -> None:
    """One hostile vector of five against the merge of the four others, restored on in-domain images."""
    from hf_datavec import models, recalibrate

    def restored(folder: Path) -> list[float]:
        network = models.load(folder)
        recalibrate.statistics(network, bench.pictures("in"))
        return bench.score(bench.probabilities(network))

    for name, merge in ROBUST.items():
        without = bench.fused(f"robust {name}", honest(name, merge))
        cells.keep(bench.seed, f"robust: {name}", "without it", lambda without=without: restored(without))
        for kind in HOSTILE:
            place = bench.fused(f"robust {name} {kind}", merge, [*bench.vectors, hostile_vector(bench, kind)])
            cells.keep(bench.seed, f"robust: {name}", kind, lambda place=place: restored(place))
        print(f"{bench.study} seed {bench.seed}: robust {name}", flush=True)


def noised(bench: Bench, cells: Cells) -> None:
    """What noise on the shared statistics costs the modes that use them, on the sum x 0.5."""
    from hf_datavec import models, noise, recalibrate
    from hf_datavec.recalibrate.sites import combined
    from hf_datavec.tuned import open_tuned
    from hf_datavec.vector import TunedDifferences

    network = models.load(bench.fused("sum x 0.5", ROWS["sum x 0.5"]))
    seen = recalibrate.observe(network, bench.pictures("photos"))
    own = recalibrate.of_base(bench.base)
    for epsilon in EPSILONS:
        parts = []
        for one in bench.sites.members:
            tuned = open_tuned(bench.folder / "tuned" / one.name, bench.base)
            exact = TunedDifferences(bench.base, tuned)
            noisy, record = noise.noised(
                exact, epsilon=epsilon, images=one.examples, batch_size=32, momentum=models.largest_momentum(network)
            )
            parts.append(
                {
                    name: recalibrate.Gaussian(
                        channels.mean + noisy.read(f"{name}.running_mean").double(),
                        channels.variance + noisy.read(f"{name}.running_var").double(),
                    )
                    for name, channels in own.items()
                }
            )
        home = combined(parts, [1.0] * len(parts))
        print(f"{bench.study} seed {bench.seed} epsilon {epsilon:g}: sigma {record.sigma:.3g}", flush=True)
        for mode in ("moments", "relative:photos"):
            abroad = bench.abroad["photos"] if mode != "moments" else {}
            found = {name: recalibrate.carried_over(seen[name], home[name], abroad[name]) for name in abroad} or home
            recalibrate.assign(network, found)
            cells.keep(bench.seed, f"epsilon {epsilon:g}", mode, lambda: bench.score(bench.probabilities(network)))


def hostile_vector(bench: Bench, kind: str) -> Path:
    """A vector made from the first site's: times 20, negated, or noise with its norm, tensor by tensor."""
    import torch
    from networks import once

    from hf_datavec import vector, vector_file

    true = vector.open_vector(bench.vectors[0])

    @dataclass
    class Differences:
        base: Any
        labels: tuple[str, ...]

        def read(self, name: str) -> Any:
            value = true.read(name)
            if kind != "noise" or bench.base.roles[name].value == "statistic":
                return value * {"times 20": 20.0, "negated": -1.0, "noise": 1.0}[kind]
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name) + value.numel()))
            return noise * value.norm() / noise.norm().clamp(min=1e-30)

    def write(folder: Path) -> None:
        folder.mkdir()
        vector_file.write(folder, Differences(bench.base, true.labels), true.manifest.base)

    place = bench.folder / f"hostile-{kind.replace(' ', '-')}"
    once(place, write)
    return place


def table(found: Mapping[tuple[int, str, str], list[float]], columns: tuple[str, ...], rows: tuple[str, ...]) -> str:
    """Mean over seeds and half the width of its 95 % interval, for accuracy / balanced accuracy."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        texts = [
            cell([value for (_, r, c), value in sorted(found.items()) if (r, c) == (row, column)]) for column in columns
        ]
        if any(text != "-" for text in texts):
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def cell(values: list[list[float]]) -> str:
    from hf_datavec.study.comparison import over_seeds

    found = [over_seeds(each) for each in zip(*values, strict=True)]
    parts = [f"{one.value:.1f}" + ("" if math.isnan(one.low) else f" ± {one.high - one.value:.1f}") for one in found]
    return " / ".join(parts) or "-"


def with_sites(found: dict[tuple[int, str, str], list[float]]) -> dict[tuple[int, str, str], list[float]]:
    """The cells with the mean and the best of the single sites, seed by seed."""
    extended = dict(found)
    for seed, column in sorted({(seed, column) for seed, row, column in found if row in SITES}):
        each = [found[seed, site, column] for site in SITES if (seed, site, column) in found]
        extended[seed, "single sites, mean", column] = [sum(values) / len(values) for values in zip(*each, strict=True)]
        extended[seed, "single sites, best", column] = max(each)
    return extended


def main() -> None:
    """Measure what is missing, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--study", choices=("pad", "digits"), default="pad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="of the table's merges")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--noise", action="store_true", help="measure noise on the shared statistics instead")
    parser.add_argument("--fuse-only", action="store_true", help="write the fused networks and stop")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    cells = Cells(chosen.folder / chosen.study / "cells.jsonl")
    if chosen.table:
        show(cells)
        return
    import torch

    torch.set_num_threads(chosen.threads)
    for seed in chosen.seeds:
        bench = Bench(chosen.folder.absolute(), chosen.study, seed)
        if chosen.fuse_only:
            fuse(bench, chosen.rows, robust=chosen.hostile)
        elif chosen.noise:
            noised(bench, cells)
        elif chosen.hostile:
            hostile(bench, cells)
        else:
            measure(bench, cells, {name: ROWS[name] for name in chosen.rows})


def show(cells: Cells) -> None:
    """Print all tables."""
    found = with_sites(cells.read())
    others = ("single sites, mean", "single sites, best", "output ensemble of 4", "all data pooled", "base")
    rows = (*ROWS, *others)
    modes = ("statistics", "relative", "relative-base", "repair")
    print(table(found, ("none", "moments", "tune-labels:in", "tune-entropy:in"), rows), end="\n\n")
    for mode in modes:
        print(table(found, tuple(f"{mode}:{images}" for images in IMAGES), rows), end="\n\n")
    print(table(found, ("moments", "relative:photos"), tuple(f"epsilon {one:g}" for one in EPSILONS)), end="\n\n")
    print(table(found, ("without it", *HOSTILE), tuple(f"robust: {name}" for name in ROBUST)), end="\n\n")
    for (seed, row, images), (value, _) in sorted(found.items()):
        if row == "guard":
            print(f"guard, seed {seed}, {images}: {value:.4f}")


if __name__ == "__main__":
    main()
