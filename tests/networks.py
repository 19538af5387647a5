"""Small real networks and pictures that tests build their studies from; everything is seeded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_datavec import vector, vector_file
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.manifest import BaseIdentity
from hf_datavec.tuned import open_tuned

LABELS = ("cat", "dog", "owl")
SIDE = 32
TIMM = ("test_resnet", "test_efficientnet")
TRANSFORMERS = ("resnet", "vit", "convnext", "mobilenet_v2")
NETWORKS = (*TIMM, *TRANSFORMERS)
WITH_BATCH_NORM = (*TIMM, "resnet", "mobilenet_v2")


def digest(file: Path | bytes) -> str:
    """What tells one content from another, short enough for a failed comparison to be read."""
    return hashlib.sha256(file if isinstance(file, bytes) else Path(file).read_bytes()).hexdigest()


def make_network(kind: str, folder: Path, *, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Path:
    """A randomly initialised network of a kind of `NETWORKS` in a folder, saved by its own library."""
    torch.manual_seed(seed)
    if kind in TIMM or kind == "resnet18":
        model = timm.create_model(kind, num_classes=len(labels))
        data = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "interpolation": "bilinear"}
        model.pretrained_cfg = {**model.pretrained_cfg, **data}
        randomize(model)
        timm.models.save_for_hf(model, folder, model_config={"label_names": list(labels)}, safe_serialization=True)
        return folder
    model = transformers.AutoModelForImageClassification.from_config(_config(kind, labels))
    randomize(model)
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Give BatchNorm layers statistics and affine weights that are not the trivial ones."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2.0)
            layer.num_batches_tracked.fill_(7)
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.2)


def _config(kind: str, labels: tuple[str, ...]) -> transformers.PreTrainedConfig:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: row for row, label in enumerate(labels)}}
    if kind == "resnet":
        return transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **names)
    if kind == "vit":
        return transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=SIDE, patch_size=8, **names,
        )  # fmt: skip
    if kind == "convnext":
        return transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **names)
    return transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE, **names)


def tune(base: Path, folder: Path, *, seed: int, step: float = 0.02) -> Path:
    """A copy of a network whose float tensors have moved at random, as training would move them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            moved = tensor.float() + step * torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                moved = moved.abs()
            tensors[name] = moved.to(tensor.dtype)
    save_with(base, folder, tensors)
    return folder


def save_with(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder with the configuration of another and the given tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        if (source / name).exists():
            (folder / name).write_text((source / name).read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_vector(base: Path, tuned: Path, folder: Path, **options: object) -> Path:
    """The vector folder of a tuned network, without its card."""
    checkpoint = open_checkpoint(base)
    folder.mkdir(parents=True)
    differences = vector.TunedDifferences(checkpoint, open_tuned(tuned, checkpoint))
    vector_file.write(folder, differences, BaseIdentity(id=base.name, digest=checkpoint.tensors.digest), **options)
    return folder


def make_images(
    folder: Path, *, labels: tuple[str, ...] = LABELS, each: int = 6, seed: int = 0, side: int = SIDE
) -> Path:
    """A folder of small noisy pictures, one brightness per label, a sub-folder per label."""
    random = np.random.default_rng(seed)
    for place, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = random.normal(60 + 60 * place, 25, (side, side, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / label / f"{number:03}.png")
    return folder


def write_recipe(path: Path, **sections: object) -> Path:
    """A recipe file; JSON is YAML, so sections are plain data."""
    path.write_text(json.dumps(sections, indent=2), "utf-8")
    return path
