"""The images as training sees them: prepared once, kept, and shown in another position each time if wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hf_datavec.images import ImageSet
    from hf_datavec.models import Network

Augment = Literal["none", "turns", "crops"]
AUGMENTS: tuple[str, ...] = get_args(Augment)
# Preprocessed pictures are kept when they fit; decoding them again each epoch can cost as much as training.
KEPT_BYTES = 2**30
# A crop has at least this share of the picture's area: half of a photograph of one thing still shows that thing.
SMALLEST_CROP = 0.5


def dataset(network: Network, images: ImageSet, rows: list[int], augment: Augment, seed: int) -> Any:
    """Examples for transformers.Trainer; set its `epoch` before each, since positions are drawn for each epoch anew."""
    from torch.utils.data import Dataset

    class Examples(Dataset[dict[str, Any]]):
        def __init__(self) -> None:
            self.kept: dict[int, torch.Tensor] = {}
            self.kept_bytes = 0
            self.epoch = 0

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            pixels = self.kept.get(index)
            if pixels is None:
                pixels = network.preprocess(images.image(index))
                if self.kept_bytes + pixels.nbytes <= KEPT_BYTES:
                    self.kept[index] = pixels
                    self.kept_bytes += pixels.nbytes
            return {"pixel_values": shown(pixels, augment, (seed, self.epoch, index)), "labels": rows[index]}

    return Examples()


def shown(pixels: torch.Tensor, augment: Augment, key: tuple[int, ...]) -> torch.Tensor:
    """A picture (channels, height, width) in the position that a key draws, of the same shape.

    The key says it all (seed, epoch, index), so that a training that was interrupted goes on with the same positions.
    """
    import numpy as np

    if augment == "none":
        return pixels
    random = np.random.default_rng(key)
    if augment == "crops":
        pixels = _cropped(pixels, random)
    return _turned(pixels, int(random.integers(8)))


def _turned(pixels: torch.Tensor, position: int) -> torch.Tensor:
    """One of the eight positions of a square, of which a picture that is not square has four."""
    import torch

    height, width = pixels.shape[-2:]
    sides = [side for bit, side in ((1, -1), (2, -2)) if position & bit]
    flipped = torch.flip(pixels, sides)
    return flipped.transpose(-2, -1) if position & 4 and height == width else flipped


def _cropped(pixels: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """A part of a picture of its own proportions, anywhere in it, enlarged to its size."""
    import torch

    side = float(random.uniform(SMALLEST_CROP, 1)) ** 0.5
    height, width = pixels.shape[-2:]
    part = [max(1, round(side * length)) for length in (height, width)]
    top, left = (int(random.integers(whole - some + 1)) for whole, some in zip((height, width), part, strict=True))
    some = pixels[None, :, top : top + part[0], left : left + part[1]]
    return torch.nn.functional.interpolate(some, (height, width), mode="bilinear", align_corners=False)[0]


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of examples."""
    import torch

    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]).to(
            memory_format=torch.channels_last
        ),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
