"""Time what measuring BatchNorm statistics costs beside the forward passes themselves.

    python bench/recalibration.py

Random images in memory, one thread, all three in turn in one process, round by round: plain passes in evaluation
mode, plain passes in training mode (which measure the statistics of each batch), and hf-datavec's, which measures those
of all images. Printed are the ratios within a round: median, minimum and maximum. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_datavec import models
from hf_datavec.recalibrate.lockstep import Pictures, observe
from hf_datavec.samples import write_network


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
    """Processor time of a piece of work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def passes(network: models.Network, batches: tuple[torch.Tensor, ...], *, training: bool) -> None:
    """Plain forward passes."""
    network.module.train(training)
    with torch.no_grad():
        for batch in batches:
            network.logits(batch)
    network.module.eval()


def compare(network: models.Network, pictures: Pictures, batches: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """The time of measuring over those of plain passes in evaluation and in training mode."""
    plain = [seconds(lambda mode=mode: passes(network, batches, training=mode)) for mode in (False, True)]
    ours = seconds(lambda: observe(network, pictures))
    return ours / plain[0], ours / plain[1]


def main() -> None:
    """Print one line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(chosen.images, 3, chosen.side, chosen.side)
    batches = images.split(chosen.batch_size)
    pictures = Pictures(len(images), lambda places: images[list(places)], chosen.batch_size)
    print("| network | to evaluation mode | to training mode |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for name, make in (("EfficientNet-Lite0", efficientnet), ("ResNet-18", resnet)):
            network = make(Path(place))
            found = [compare(network, pictures, batches) for _ in range(chosen.rounds + 1)]
            ratios = zip(*found[1:], strict=True)  # the first round warms up
            cells = [f"{statistics.median(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in ratios]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
