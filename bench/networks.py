"""Make, once, the real networks that `bench/restoration.py` merges; what is finished is kept.

Run with `python bench/networks.py pad DATA --out DIR` and `python bench/networks.py digits --out DIR`. DATA is the
folder of PAD-UFES-20 (`metadata.csv` with file_name, label, patient_id). Needs the extra `demo`, and scikit-image
and scikit-learn for the sample photographs that serve as public images of another domain.

For each seed: patients (PAD) or digits are split over `test`, `public` and four sites, every site and a network on
all sites' images are fine-tuned from the ImageNet weights of EfficientNet-Lite0, and vectors are written with
their BatchNorm statistics.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hf_datavec.examples import AUGMENTS, Augment

SITES = tuple(f"site-{letter}" for letter in "abcd")
NETWORKS = {"all": (*SITES, "all-sites"), "sites": SITES, "pooled": ("all-sites",), "none": ()}
PARTS = {"test": 0.19, "public": 0.11}  # shares of the patients; the sites divide the rest
PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg",
                "rocket.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}  # fmt: skip
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
PATCHES = 300


@dataclass(frozen=True)
class Study:
    """One data set: its labels, how a seed's images are written, and how sites train."""

    name: str
    labels: tuple[str, ...]
    image_size: int
    write_images: Callable[[Path, int], None]
    epochs: float
    learning_rate: float
    warmup: float
    augment: Augment = "none"


def pad(data: Path) -> Study:
    """PAD-UFES-20 at 128 px: AdamW 3e-4, 12 epochs, warm-up over 0.3 of the steps, then a cosine, as one cycle."""
    with (data / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))

    def write_images(folder: Path, seed: int) -> None:
        import numpy as np

        patients = np.random.default_rng(seed).permutation(sorted({row["patient_id"] for row in rows}))
        ends = np.cumsum([int(share * len(patients)) for share in PARTS.values()])
        groups = [*np.split(patients, ends)[:-1], *np.array_split(patients[ends[-1] :], len(SITES))]
        for name, group in zip((*PARTS, *SITES), groups, strict=True):
            members = set(map(str, group))
            for row in rows:
                if row["patient_id"] in members:
                    for place in (name, "all-sites") if name in SITES else (name,):
                        copy(data / row["file_name"], folder / place / row["label"])

    labels = tuple(sorted({row["label"] for row in rows}))
    return Study("pad", labels, 128, write_images, 12, 3e-4, 0.3)


def digits() -> Study:
    """The demonstration's digits and scanners, trained as it trains them."""
    from hf_datavec.demo.material import LABELS, write_images
    from hf_datavec.scanners import SIDE

    return Study("digits", LABELS, SIDE, lambda folder, seed: write_images(folder, seed=seed), 6, 2e-3, 0.1)


def copy(source: Path, folder: Path) -> None:
    """Copy a file into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / source.name)


def write_photographs(folder: Path, *, seed: int = 0) -> None:
    """Square patches of the sample photographs of scikit-image and scikit-learn, at random places and sizes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    pictures = [
        Image.open(path).convert("RGB")
        for package, names in PHOTOGRAPHS.items()
        for path in (package_folder(package) / FOLDERS[package] / name for name in names)
    ]
    folder.mkdir(parents=True)
    for number in range(PATCHES):
        picture = pictures[number % len(pictures)]
        side = int(random.integers(96, min(320, *picture.size)))
        left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
        picture.crop((left, top, left + side, top + side)).save(folder / f"{number:04}.png")


def package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"needs the package with the module '{name}': pip install scikit-image scikit-learn")
    return Path(found.origin).parent


def make(study: Study, out: Path, seeds: Iterable[int], names: Iterable[str]) -> None:
    """Everything of a study below `out`, networks by the names of their images; what is there is not made again."""
    from hf_datavec.pipeline import site
    from hf_datavec.samples import write_network

    once(out / "imagenet", write_network)
    base = out / study.name / "base"
    if not base.exists():
        site.init(str(out / "imagenet"), study.labels, base, image_size=study.image_size)
    for seed in seeds:
        folder = out / study.name / f"seed-{seed}"
        once(folder / "images", lambda images, seed=seed: study.write_images(images, seed))
        for name in names:
            train(study, base, folder, name, seed)


def once(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a folder that then takes its name, unless it has been done."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(folder)


def train(study: Study, base: Path, folder: Path, name: str, seed: int) -> None:
    """The tuned network of one site, and its vector with statistics and image counts."""
    from hf_datavec.finetune import Settings
    from hf_datavec.pipeline import site

    tuned, vector = folder / "tuned" / name, folder / "vectors" / name
    begun = time.monotonic()
    if not tuned.exists():
        settings = Settings(
            epochs=study.epochs,
            learning_rate=study.learning_rate,
            warmup=study.warmup,
            seed=seed,
            weight_decay=0.01,
            augment=study.augment,
        )
        site.finetune(str(base), str(folder / "images" / name), tuned, settings=settings, device="cpu")
    if not vector.exists():
        site.diff(str(base), str(tuned), vector, with_statistics=True, share_counts=True)
    print(f"{time.strftime('%H:%M:%S')} {study.name} seed {seed} {name}: {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("pad", "digits", "photographs"))
    parser.add_argument("data", type=Path, nargs="?", help="folder of PAD-UFES-20")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--augment", choices=AUGMENTS, default="none", help="how training shows pictures")
    parser.add_argument(
        "--networks", choices=tuple(NETWORKS), default="all", help="which to train; none: divide images only"
    )
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(chosen.threads)
    if chosen.study == "photographs":
        once(chosen.out / "photographs", write_photographs)
        return
    if chosen.study == "pad" and chosen.data is None:
        parser.error("pad needs DATA, the folder of PAD-UFES-20")
    study = pad(chosen.data) if chosen.study == "pad" else digits()
    study = replace(study, augment=chosen.augment)
    make(study, chosen.out.absolute(), chosen.seeds, NETWORKS[chosen.networks])


if __name__ == "__main__":
    main()
