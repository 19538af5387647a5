"""Time what measuring BatchNorm statistics costs beside the forward passes themselves.

    python bench/recalibration.py

Random images in memory, taken by their places, round by round: plain passes in evaluation mode, plain passes in
training mode (which measure the statistics of each batch), and hf-datavec's, which measures those of all images. First
as programs: a process for each, of which only hf-datavec's is tuned as its command line is (`threads.tune_process`);
after a round to warm up, the seconds of the next. Then all three in turn in one process that is tuned, so that memory
costs all of them alike. Printed are ratios within a round: median, minimum and maximum. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_datavec import models
from hf_datavec.recalibrate.lockstep import Pictures, observe
from hf_datavec.samples import write_network
from hf_datavec.threads import tune_process

HERE = "hf-datavec"
MODES = ("evaluation mode", "training mode", HERE)


def efficientnet(folder: Path) -> models.Network:
    """EfficientNet-Lite0 with its ImageNet weights, out of a package."""
    write_network(folder / "efficientnet")
    return models.load(folder / "efficientnet", device=torch.device("cpu"))


def resnet(folder: Path) -> models.Network:
    """ResNet-18 with random weights."""
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    transformers.ViTImageProcessor().save_pretrained(folder / "resnet")
    return models.load(folder / "resnet", device=torch.device("cpu"))


def seconds(work: Callable[[], Any]) -> float:
    """What a piece of work takes by the clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def passes(network: models.Network, pictures: Pictures, *, training: bool) -> None:
    """Plain forward passes."""
    network.module.train(training)
    with torch.no_grad():
        for start in range(0, pictures.count, pictures.batch_size):
            network.logits(pictures.load(range(pictures.count)[start : start + pictures.batch_size]))
    network.module.eval()


def timed(mode: str, network: models.Network, pictures: Pictures) -> float:
    """Seconds of one of `MODES`."""
    if mode == HERE:
        return seconds(lambda: observe(network, pictures))
    return seconds(lambda: passes(network, pictures, training=mode != MODES[0]))


def as_programs(chosen: argparse.Namespace, name: str) -> list[float]:
    """The same of all modes, each by a process of its own."""
    options = [f"--{key}={getattr(chosen, key)}" for key in ("images", "side", "threads")]
    options.append(f"--batch-size={chosen.batch_size}")
    found = []
    for mode in MODES:
        command = [sys.executable, __file__, *options, "--only", mode, name]
        found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def told(rounds: list[list[float]]) -> str:
    """The ratios of hf-datavec to the others."""
    ratios = [[one[2] / one[place] for one in rounds] for place in range(2)]
    return " | ".join(f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in ratios)


def main() -> None:
    """Print one line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; else all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs=2, metavar=("MODE", "NETWORK"), help="print the seconds of one, and end")
    chosen = parser.parse_args()
    if not chosen.only or chosen.only[0] == HERE:
        tune_process()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    images = torch.randn(chosen.images, 3, chosen.side, chosen.side)
    pictures = Pictures(len(images), lambda places: images[list(places)], chosen.batch_size)
    with tempfile.TemporaryDirectory() as place:
        if chosen.only:
            network = NETWORKS[chosen.only[1]](Path(place))
            print([timed(chosen.only[0], network, pictures) for _ in range(2)][1])
            return
        print("| network | as programs: to evaluation mode | to training mode | ", end="")
        print("in one process: to evaluation mode | to training mode |\n" + "| --- " * 5 + "|")
        for name, make in NETWORKS.items():
            programs = [as_programs(chosen, name) for _ in range(chosen.rounds)]
            network = make(Path(place))
            inside = [[timed(mode, network, pictures) for mode in MODES] for _ in range(chosen.rounds + 1)]
            print(f"| {name} | {told(programs)} | {told(inside[1:])} |", flush=True)


NETWORKS: dict[str, Callable[[Path], models.Network]] = {"EfficientNet-Lite0": efficientnet, "ResNet-18": resnet}

if __name__ == "__main__":
    main()
