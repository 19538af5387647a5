"""One face for image classifiers of transformers and timm, loaded from a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec import offloading, processes
from hf_datavec.checkpoint import Checkpoint, open_checkpoint
from hf_datavec.errors import InputError, RunError, listed
from hf_datavec.progress import quiet_transformers
from hf_datavec.tensors import Record, open_folder

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Network:
    """A classifier in memory, its labels, and how a picture becomes its input."""

    module: Any
    labels: tuple[str, ...]
    preprocess: Callable[[Image], torch.Tensor]
    # Where pictures go; None for where the weights are, all of them.
    device: torch.device | str | None = None

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, labels), for preprocessed pictures, shape (n, channels, height, width)."""
        import torch

        device = torch.device(self.device or self.module.device)
        if device.type == "cuda":
            pixels = pixels.pin_memory()  # so that the copy runs beside what the GPU still has to do
        pixels = pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
        result: torch.Tensor = self.module(pixel_values=pixels).logits
        return result


def refuse_offloaded(network: Network, what: str) -> None:
    """Raise InputError when a network is larger than its device, for what needs all weights at once."""
    if network.device is not None:
        hint = f"use a machine with more memory, or raise {offloading.LIMIT}"
        raise InputError(f"{what} needs the whole network on one device, and it does not fit", hint=hint)


def load(folder: Path, *, device: torch.device | str = "cpu") -> Network:
    """The network in a folder, in float32 and evaluation mode.

    Raises: InputError when tensors are missing, left over or of another shape, or it cannot be built.
    """
    import torch

    checkpoint = open_checkpoint(folder)
    if places := offloading.places(checkpoint, device):
        return Network(load_module(checkpoint, places).eval(), checkpoint.labels, preprocess(checkpoint), device)
    module = load_module(checkpoint)
    # Convolutions, depthwise ones above all, run up to twice as fast in this order, on CPUs too.
    module = module.to(device, memory_format=torch.channels_last).eval()
    return Network(module, checkpoint.labels, preprocess(checkpoint))


def made_of(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], *, device: torch.device | str) -> Network:
    """The network that a checkpoint's configuration describes, made of float32 tensors by their names in its files.

    What already lies on the device in the order that the network wants is taken as it is, without a copy. No file of
    tensors is looked at, and none needs to be there. Raises as `load`.
    """
    import torch

    module = load_module(checkpoint, tensors=tensors).to(device, memory_format=torch.channels_last).eval()
    return Network(module, checkpoint.labels, preprocess(checkpoint))


def load_module(
    checkpoint: Checkpoint,
    places: Mapping[str, int | str] | None = None,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """The bare module of a checkpoint, its parts in the places that `offloading.places` found. Raises as `load`.

    With `tensors` it is made of these instead of the checkpoint's.
    """
    import torch
    from transformers import AutoModelForImageClassification

    quiet_transformers()
    try:
        config = offloading.config(checkpoint)
        kind = AutoModelForImageClassification if tensors is None else _kind(config)
        module, info = kind.from_pretrained(
            checkpoint.folder if tensors is None else None,
            config=config, output_loading_info=True, dtype=torch.float32, local_files_only=True,
            **({"device_map": dict(places)} if places else {}),
            **({} if tensors is None else {"state_dict": dict(tensors)}),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"transformers cannot build the network in '{checkpoint.folder}': {reason}") from None
    wrong = {
        kind: {str(found[0]) if isinstance(found, tuple) else str(found) for found in info[kind]}
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    for kind, names in wrong.items():
        if names:
            raise InputError(
                f"'{checkpoint.folder}' does not load whole: {kind.replace('_', ' ')} {listed(names)}",
                hint="its tensors and its config.json belong to different networks",
            )
    return module


def _kind(config: Any) -> Any:
    """The class of the networks of a configuration, which alone takes tensors that are in no file."""
    import torch
    from transformers import AutoModelForImageClassification

    with torch.device("meta"):  # shapes without values
        return type(AutoModelForImageClassification.from_config(config))


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what loading a checkpoint takes, much of which depends on the kind of its network. Raises what that does.

    It may run beside other work: it changes nothing that this might see, such as torch's default type.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    quiet_transformers()
    preprocess(checkpoint)
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(offloading.config(checkpoint))]


def preprocess(checkpoint: Checkpoint) -> Callable[[Image], torch.Tensor]:
    """How a picture becomes a checkpoint's input. Raises: InputError when the folder does not say."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"'{checkpoint.folder}' does not say how pictures are prepared: {reason}",
            hint="a transformers model needs its preprocessor_config.json",
        ) from None
    if checkpoint.library == "timm":
        transforms: Callable[[Image], torch.Tensor] = processor.val_transforms
        return transforms

    def prepare(image: Image) -> torch.Tensor:
        pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return prepare


def normalization_layers(module: Any) -> list[Any]:
    """Every BatchNorm layer that keeps running statistics, subclasses such as timm's included."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def largest_momentum(network: Network) -> float:
    """The largest share of its running statistics that any BatchNorm layer replaces in a training step."""
    # None stands for the plain average of all batches, of which the first replaces everything.
    return max((float(layer.momentum or 1.0) for layer in normalization_layers(network.module)), default=1.0)


def stored(network: Network, names: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors in memory whose live names are wanted, under the names that the model's file uses.

    Live names differ from those in the file (timm's wrapper, renamed transformers modules), so the library's
    own saving code translates them.
    """
    return _translated(network, {name: value for name, value in network.module.state_dict().items() if names(name)})


def _translated(network: Network, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        network.module.save_pretrained(folder, state_dict={name: value.clone() for name, value in tensors.items()})
        written = open_folder(Path(folder))
        return {name: written.read(name).clone() for name in written.records}


def statistic_layers(network: Network) -> dict[str, Any]:
    """Every BatchNorm layer that keeps running statistics, by its name in the model's file."""
    layers = normalization_layers(network.module)
    live = [name for name, part in network.module.named_modules() if any(part is layer for layer in layers)]
    # Each layer's number is written in place of its statistics, and read back under the name in the file.
    numbered = {
        f"{name}.running_mean": network.module.get_submodule(name).running_mean.new_full((1,), number)
        for number, name in enumerate(live)
    }
    # Under torch.distributed, transformers writes files in the first process only, so that one tells the others.
    found = processes.on_main(lambda: _translated(network, numbered)) if numbered else {}
    numbers = {name: int(value) for name, value in found.items()}
    return {
        name.removesuffix(".running_mean"): network.module.get_submodule(live[number])
        for name, number in numbers.items()
    }


def refuse_other_tensors(folder: Path, planned: Mapping[str, Record], labels: tuple[str, ...]) -> None:
    """Open a folder that was just written, headers only. Raises: RunError when it is not what was planned."""
    try:
        found = open_checkpoint(folder)
    except InputError as error:
        raise RunError(f"the result does not load and was not kept: {error.problem}") from None
    wrong = [name for name in sorted(planned) if not _alike(found.records.get(name), planned[name])]
    if wrong or len(found.records) != len(planned) or found.labels != labels:
        raise RunError(f"the result is not as planned and was not kept: {listed(wrong) or 'other tensors or labels'}")


def _alike(found: Record | None, planned: Record) -> bool:
    return found is not None and (found.dtype, found.shape) == (planned.dtype, planned.shape)


def stored_names(network: Network) -> dict[str, str]:
    """The name of each tensor in memory, by the name that the model's file uses.

    Numbers are saved in place of the tensors by the library's own code, and read back under the names in the file.
    """
    import torch

    live = list(network.module.state_dict())
    numbered = {name: torch.tensor([number], dtype=torch.float64) for number, name in enumerate(live)}
    with tempfile.TemporaryDirectory() as folder:
        network.module.save_pretrained(folder, state_dict=numbered)
        stored = open_folder(Path(folder))
        return {name: live[int(stored.read(name)[0])] for name in stored.records}
