"""Time merges by hf-datavec, mergekit, a naive script and plain copies, in turn, as whole processes.

    python bench/speed.py --network vit-large --methods mean ties dare_ties median trimmed_mean \
        --mergekit /tmp/mergekit/bin/mergekit-pytorch

Networks are made once below `--work` (base, fine-tunes, vectors) and kept. Every program starts as a process of its
own; a round runs each of them once on the same files, so that what slows one down slows the others down as well. Times
are shown as median, minimum and maximum over the rounds, ratios are those within a round. Seconds of all processors say
more than those that pass where other programs run as well. Memory is the peak of
what is not file pages (RssAnon) of a process and its children, looked
at every 10 ms. `floor` reads all inputs and writes a file as large as the
output through a small buffer, `torch` only imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "model.safetensors"
VIT = {"vit-base": (768, 12, 12, 3072), "vit-large": (1024, 24, 16, 4096)}
# 7 billion parameters of a ViT, written as holes: files of full length that take no room, all values zero.
SPARSE = {"vit-7b": (4096, 32, 32, 16384)}
NETWORKS = (*VIT, "resnet-50", *SPARSE)
# Fine-tunes move a weight by about this much.
STEP = 1e-3

FLOOR = """
import os, sys
buffer = memoryview(bytearray(2**20))
output, *inputs = sys.argv[1:]
with open(output, "wb", buffering=0) as target:
    for number, name in enumerate(inputs):
        with open(name, "rb", buffering=0) as source:
            while got := source.readinto(buffer):
                if number == 0:
                    target.write(buffer[:got])
"""
TORCH = "import torch"
# What a user would write in an afternoon; safetensors' own readers and writers, everything in float32.
NAIVE = """
import sys, torch
from safetensors.torch import load_file, save_file
method, output, base, *tuned = sys.argv[1:]
base = load_file(base)
tuned = [load_file(name) for name in tuned]
names = [name for name, value in base.items() if value.is_floating_point()]
count = len(tuned)
if method == "ties":
    vectors = [torch.cat([(one[name] - base[name]).flatten() for name in names]) for one in tuned]
    del tuned
    for vector in vectors:
        kept = int(0.2 * len(vector))
        vector[vector.abs() < vector.abs().kthvalue(len(vector) - kept + 1).values] = 0
    vectors = torch.stack(vectors)
    sign = vectors.sum(0).sign()
    agree = vectors.sign() == sign
    merged = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = dict(zip(names, merged.split([base[name].numel() for name in names])))
    result = {name: base[name] + parts[name].reshape(base[name].shape) for name in names}
else:
    result = {}
    for name in names:
        vectors = torch.stack([one[name] - base[name] for one in tuned])
        if method == "mean":
            merged = vectors.mean(0)
        elif method == "median":
            merged = vectors.quantile(0.5, dim=0) if vectors.numel() < 2**24 else vectors.sort(0).values[
                (count - 1) // 2 : count // 2 + 1].mean(0)
        elif method == "trimmed_mean":
            merged = vectors.sort(0).values[1:-1].mean(0)
        elif method == "dare_ties":
            vectors = vectors * torch.bernoulli(torch.full_like(vectors, 0.5)) / 0.5
            sign = vectors.sum(0).sign()
            agree = vectors.sign() == sign
            merged = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
        result[name] = base[name] + merged
save_file({**base, **result}, output, metadata={"format": "pt"})
"""
METHODS = ("mean", "ties", "dare_ties", "median", "trimmed_mean")
OPTIONS = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.5}}
# What mergekit calls the same; it has no coordinate-wise median or trimmed mean.
MERGEKIT = {"mean": "linear", "ties": "ties", "dare_ties": "dare_ties"}


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds that passed, seconds of all processors, and the peak of anonymous memory, in bytes, of one process."""

    seconds: float
    processor: float
    memory: float


def make(network: str, folder: Path, count: int, tuned: int) -> None:
    """Write what is missing of the base, `tuned` fine-tuned models and `count` vectors."""
    if not (folder / "base" / MODEL).exists():
        write_base(network, folder / "base")
    for number in range(count):
        model, vector = folder / f"tuned-{number}", folder / f"vector-{number}"
        if network in SPARSE:
            write_hollow_vector(folder, vector)
            continue
        if vector.exists() and (number >= tuned or model.exists()):
            continue
        if not model.exists():
            tune(folder / "base", model, number)
        if not vector.exists():
            command = [*ours("diff"), "base", model.name, "-o", vector.name]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if number >= tuned:
            shutil.rmtree(model)


def write_base(network: str, folder: Path) -> None:
    """A network with random weights, saved by transformers; of a sparse one the header and a hole."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    transformers.ViTImageProcessor().save_pretrained(folder)
    if network == "resnet-50":
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**names)).save_pretrained(folder)
        return
    hidden, layers, heads, intermediate = (VIT | SPARSE)[network]
    config = transformers.ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate, **names
    )
    if network in VIT:
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        return
    # One layer tells the names and shapes of all.
    config.num_hidden_layers = 1
    with tempfile.TemporaryDirectory() as small:
        transformers.ViTForImageClassification(config).save_pretrained(small)
        shapes = {name: shape for name, (shape, _) in read_header(Path(small) / MODEL).items()}
    config.num_hidden_layers = layers
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    wide = {}
    for name, shape in shapes.items():
        places = range(layers) if ".layer.0." in name or ".layers.0." in name else (0,)
        for layer in places:
            wide[name.replace(".layer.0.", f".layer.{layer}.").replace(".layers.0.", f".layers.{layer}.")] = shape
    write_hole(folder / MODEL, wide, "BF16", 2)


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shapes and types of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: (entry["shape"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}


def write_hole(path: Path, shapes: dict[str, list[int]], dtype: str, width: int) -> None:
    """A safetensors file of zeros that takes no room."""
    header, end = {}, 0
    for name in sorted(shapes):
        size = width
        for length in shapes[name]:
            size *= length
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_hollow_vector(folder: Path, vector: Path) -> None:
    """The vector of a sparse network to itself, by the package's own code, with a hole for its zeros."""
    if vector.exists():
        return
    subprocess.run([*ours("diff"), "base", "base", "-o", vector.name], cwd=folder, check=True)
    # The same bytes as holes: cp looks for zeros.
    file = vector / "vector.safetensors"
    subprocess.run(["cp", "--sparse=always", file, f"{file}.sparse"], check=True)
    os.replace(f"{file}.sparse", file)


def tune(base: Path, folder: Path, seed: int) -> None:
    """A copy of a network whose weights have moved at random."""
    import torch
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(seed)
    tensors = load_file(base / MODEL)
    for name, value in sorted(tensors.items()):
        if value.is_floating_point() and "running" not in name:
            tensors[name] = value + STEP * torch.randn(value.shape, generator=random)
    folder.mkdir()
    for file in base.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


def ours(command: str) -> list[str]:
    """The command line of hf-datavec."""
    return [sys.executable, "-m", "hf_datavec", command]


def programs(folder: Path, method: str, count: int, mergekit: str | None) -> dict[str, list[str]]:
    """The command of each program that is compared; each writes `out` or into it."""
    models = [f"tuned-{number}" for number in range(count) if (folder / f"tuned-{number}").exists()]
    files = [f"{name}/{MODEL}" for name in ("base", *models)]
    vectors = [f"vector-{number}/vector.safetensors" for number in range(count)]
    found = {
        "floor": [sys.executable, "-c", FLOOR, "out", f"base/{MODEL}", *vectors],
        "torch": [sys.executable, "-c", TORCH],
        "hf-datavec": [*ours("merge"), write_recipe(folder, method, vector=[f"./vector-{n}" for n in range(count)])],
    }
    found["hf-datavec"] += ["-o", "out"]
    if len(models) == count:
        recipe = write_recipe(folder, method, model=[f"./{name}" for name in models])
        found["hf-datavec, models"] = [*ours("merge"), recipe, "-o", "out"]
        found["naive"] = [sys.executable, "-c", NAIVE, method, "out", *files]
    if mergekit and method in MERGEKIT and len(models) == count:
        found["mergekit"] = [mergekit, "--quiet", write_mergekit(folder, method, files), "out"]
        if method == "mean":  # its fastest setting, where writing is most of the work
            found["mergekit, async"] = [*found["mergekit"], "--async-write"]
    return found


def write_recipe(folder: Path, method: str, **entries: list[str]) -> str:
    """A recipe over vectors or models."""
    ((kind, places),) = entries.items()
    path = folder / f"{kind}-{method}-{len(places)}.yaml"
    merge = {"method": method, "options": OPTIONS.get(method, {})}
    vectors = [{kind: place, "name": f"{kind}-{number}"} for number, place in enumerate(places)]
    path.write_text(json.dumps({"base": "./base", "vectors": vectors, "merge": merge}), "utf-8")
    return path.name


def tell_of_mergekit_yaml(folder: Path, method: str, options: argparse.Namespace) -> None:
    """Say how much of the network `mergekit-yaml` merges; it takes names from the live module, and is no comparison."""
    program = Path(options.mergekit).with_name("mergekit-yaml")
    if method not in MERGEKIT or not program.exists() or not (folder / "tuned-0").exists():
        return
    text = (
        folder / write_mergekit(folder, method, [f"base/{MODEL}", f"tuned-0/{MODEL}", f"tuned-1/{MODEL}"])
    ).read_text()
    (folder / "mergekit.yaml").write_text(text.replace(f"/{MODEL}", ""), "utf-8")
    run = timed([str(program), "--quiet", "mergekit.yaml", "out"], folder, keep=True)
    count = sum(len(read_header(file)) for file in (folder / "out").glob("*.safetensors"))
    print(f"mergekit-yaml: {count} of {len(read_header(folder / 'base' / MODEL))} tensors{'' if run else ', failed'}")
    remove(folder / "out")


def write_mergekit(folder: Path, method: str, files: list[str]) -> str:
    """mergekit's configuration of the same merge."""
    path = folder / f"mergekit-{method}.yaml"
    parameters = {"weight": 1.0, **OPTIONS.get(method, {})}
    models = [{"model": str(folder / name), "parameters": parameters} for name in files[1:]]
    config = {"merge_method": MERGEKIT[method], "models": models, "dtype": "float32"}
    if method != "mean":
        config |= {"base_model": str(folder / files[0]), "parameters": {"normalize": True}}
    path.write_text(json.dumps(config), "utf-8")
    return path.name


def timed(command: list[str], folder: Path, *, keep: bool = False) -> Run | None:
    """Run one program to its end, in a folder without output; nothing when it fails, which is told.

    With `keep` its output stays.
    """
    remove(folder / "out")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=told, stderr=subprocess.STDOUT)
        peak = [0.0]
        watcher = threading.Thread(target=watch, args=(process.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        process.returncode = status
        watcher.join()
        if status:
            told.seek(0)
            print(f"{' '.join(command)[:60]}... failed: {told.read().decode()[-1000:]}", flush=True)
            return None
    if not keep:
        remove(folder / "out")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak[0])


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def watch(pid: int, peak: list[float]) -> None:
    """Keep the largest anonymous memory of a process and its children until it ends; shared pages count for each."""
    while (own := anonymous(pid)) is not None:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            children = []
        peak[0] = max(peak[0], own + sum(anonymous(int(child)) or 0.0 for child in children))
        time.sleep(0.01)


def anonymous(pid: int) -> float | None:
    """The memory of a process that is not file pages, in bytes; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024.0 * int(found[0]) if found else None  # without, it waits to be asked for


def spread(values: list[float], digits: int = 2) -> str:
    """Median (minimum to maximum)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def compare(folder: Path, method: str, options: argparse.Namespace) -> None:
    """Run all programs for one method, and print its table."""
    found: dict[str, list[Any]] = {}
    chosen = programs(folder, method, options.vectors, options.mergekit)
    chosen = {name: command for name, command in chosen.items() if name not in options.without}
    for number in range(options.rounds):
        for name, command in chosen.items():
            if not name.startswith("mergekit") or number < options.mergekit_rounds:
                found.setdefault(name, []).append(timed(command, folder))
    found = {name: [run for run in runs if run] for name, runs in found.items() if all(runs)}
    if not {"floor", "hf-datavec"} <= set(found):
        raise SystemExit(f"{method}: floor and hf-datavec must both run, since all others are compared to them")
    print(f"\n{options.network}, {method}, base + {options.vectors}, {options.rounds} rounds")
    print("| program | seconds | to the floor | to hf-datavec | processor seconds | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        seconds = [run.seconds for run in runs]
        to_floor = [run.seconds / floor.seconds for run, floor in zip(runs, found["floor"], strict=False)]
        to_ours = [run.seconds / one.seconds for run, one in zip(runs, found["hf-datavec"], strict=False)]
        rest = (spread(to_floor), spread(to_ours), spread([run.processor for run in runs], 1))
        memory = max(run.memory for run in runs) / 1e6
        print(f"| {name} | {spread(seconds)} | {' | '.join(rest)} | {memory:.0f} |", flush=True)
    if options.mergekit:
        tell_of_mergekit_yaml(folder, method, options)


def grow(folder: Path, options: argparse.Namespace) -> None:
    """Merge growing numbers of vectors by each method, print the table, and draw it where `--plot` says."""
    found: dict[str, list[tuple[int, list[Run]]]] = {}
    for method in options.methods:
        for count in options.grow:
            command = [*ours("merge"), write_recipe(folder, method, vector=[f"./vector-{n}" for n in range(count)])]
            runs = [run for _ in range(options.rounds) if (run := timed([*command, "-o", "out"], folder))]
            found.setdefault(method, []).append((count, runs))
    print(f"\n{options.network}, base + n vectors, {options.rounds} rounds")
    print("| method | n | seconds | processor seconds | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    for method, rows in found.items():
        for count, runs in rows:
            times = spread([run.seconds for run in runs]), spread([run.processor for run in runs], 1)
            print(f"| {method} | {count} | {' | '.join(times)} | {max(run.memory for run in runs) / 1e6:.0f} |")
    if options.plot:
        draw(found, options.plot, options.network)


def draw(found: dict[str, list[tuple[int, list[Run]]]], path: Path, network: str) -> None:
    """Processor seconds over the number of vectors, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, rows in found.items():
        times = [statistics.median(run.processor for run in runs) for _, runs in rows]
        axes.plot([count for count, _ in rows], times, marker="o", label=method)
    axes.set_xlabel("vectors")
    axes.set_ylabel("processor seconds")
    axes.set_ylim(0)
    axes.set_title(f"{network}: cost of a merge by the number of vectors", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def machine() -> Iterator[str]:
    """What the times were measured on, and by which command."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    yield f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    yield f"command: python bench/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"


def main() -> None:
    """Make the networks, run the rounds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="vit-base")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["mean"])
    parser.add_argument("--vectors", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", help="mergekit-pytorch in an environment of its own")
    parser.add_argument("--mergekit-rounds", type=int, default=5)
    others = ("torch", "naive", "hf-datavec, models", "mergekit", "mergekit, async")
    parser.add_argument("--without", nargs="+", default=[], choices=others, help="programs to leave out")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hf-datavec-bench")
    parser.add_argument("--grow", type=int, nargs="+", help="numbers of vectors to merge, instead of a comparison")
    parser.add_argument("--plot", type=Path, help="with --grow: where to draw the result")
    options = parser.parse_args()
    folder = options.work.absolute() / options.network
    folder.mkdir(parents=True, exist_ok=True)
    make(options.network, folder, max(options.grow or [options.vectors]), 0 if options.grow else options.vectors)
    for line in machine():
        print(line)
    if options.grow:
        return grow(folder, options)
    for method in options.methods:
        compare(folder, method, options)


if __name__ == "__main__":
    main()
