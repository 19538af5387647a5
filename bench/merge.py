"""Time `hf-datavec merge` against the script a user would write, in turn, as whole processes.

Run with `make bench`, or `python bench/merge.py --rounds 5 --vectors 4`. It makes a ViT-B/16 (86 M parameters,
float32) and its fine-tunes in a temporary folder, runs the programs round by round on the same files, and prints
seconds, peak memory and the ratio per round, with minimum, median and maximum.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAIVE = """
import sys, torch
from transformers import AutoModelForImageClassification
base = AutoModelForImageClassification.from_pretrained("base")
start = base.state_dict()
fused = {name: value.clone() for name, value in start.items()}
for number in range(int(sys.argv[1])):
    tuned = AutoModelForImageClassification.from_pretrained(f"tuned-{number}").state_dict()
    for name in fused:
        fused[name] += (tuned[name] - start[name]) / int(sys.argv[1])
base.load_state_dict(fused)
base.save_pretrained("naive")
"""
BARE = """
import os, sys
from safetensors.torch import load_file, save_file
base = load_file("base/model.safetensors")
fused = {name: value.clone() for name, value in base.items()}
for number in range(int(sys.argv[1])):
    tuned = load_file(f"tuned-{number}/model.safetensors")
    for name in fused:
        fused[name] += (tuned[name] - base[name]) / int(sys.argv[1])
os.makedirs("bare", exist_ok=True)
save_file(fused, "bare/model.safetensors", metadata={"format": "pt"})
"""


def make(folder: Path, vectors: int) -> None:
    """Write base, tuned models, vectors and the recipe."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch
    import transformers
    from networks import make_vector, tune

    torch.manual_seed(0)
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    transformers.ViTForImageClassification(transformers.ViTConfig(**names)).save_pretrained(folder / "base")
    transformers.ViTImageProcessor().save_pretrained(folder / "base")
    for number in range(vectors):
        tune(folder / "base", folder / f"tuned-{number}", seed=number, step=1e-3)
        make_vector(folder / "base", folder / f"tuned-{number}", folder / f"vector-{number}")
    entries = "".join(f"  - ./vector-{number}\n" for number in range(vectors))
    (folder / "recipe.yaml").write_text(f"base: ./base\nvectors:\n{entries}merge: {{method: mean}}\n")


def timed(command: list[str], folder: Path, output: str) -> tuple[float, float]:
    """Seconds and peak megabytes of one process."""
    shutil.rmtree(folder / output, ignore_errors=True)
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.monotonic() - begun, usage.ru_maxrss / 1000


def spread(values: list[float]) -> str:
    return f"{min(values):6.2f} {statistics.median(values):6.2f} {max(values):6.2f}"


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vectors", type=int, default=4)
    options = parser.parse_args()
    count = str(options.vectors)
    programs = {
        "hf-datavec": ([sys.executable, "-m", "hf_datavec", "merge", "recipe.yaml", "-o", "fused"], "fused"),
        "from_pretrained": ([sys.executable, "-c", NAIVE, count], "naive"),
        "bare safetensors": ([sys.executable, "-c", BARE, count], "bare"),
    }
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.vectors)
        found: dict[str, list[tuple[float, float]]] = {program: [] for program in programs}
        for _ in range(options.rounds + 1):
            for program, (command, output) in programs.items():
                found[program].append(timed(command, Path(name), output))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.rounds} rounds after a warm-up"
    )
    print(f"{'':18}  seconds: min median max   ratio to hf-datavec    peak MB")
    for program, runs in found.items():
        seconds = [run[0] for run in runs[1:]]
        ratios = [run[0] / ours[0] for run, ours in zip(runs[1:], found["hf-datavec"][1:], strict=True)]
        print(f"{program:18}  {spread(seconds)}   {spread(ratios)}   {max(run[1] for run in runs):8.0f}")


if __name__ == "__main__":
    main()
