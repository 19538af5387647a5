"""A site's training, by transformers.Trainer on the study base."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_datavec import examples, held_out, probe
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.errors import InputError
from hf_datavec.models import Network, normalization_layers
from hf_datavec.progress import quiet_transformers, wanted
from hf_datavec.tensors import open_folder

if TYPE_CHECKING:
    import torch

    from hf_datavec.images import ImageSet

    Loss = Callable[..., torch.Tensor]

TRAINING_FILE = "training.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a site trains; `freeze` holds `backbone`, `statistics` or regular expressions over tensor names."""

    epochs: float = 10.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    class_balanced: bool = False
    augment: examples.Augment = "none"  # how pictures are shown, drawn for each epoch anew
    freeze: tuple[str, ...] = ()
    seed: int = 0
    probe_steps: int = 0  # of the head alone, before everything is trained; with no epochs, instead of it
    least_squares: bool = False  # likewise the head alone, in closed form
    hold_out: float = 0.0  # the share of each class that is not trained on but measured
    target: float = probe.TARGET  # what its outputs aim at for an image's label, the same at all sites


def train(network: Network, base: Checkpoint, images: ImageSet, settings: Settings, folder: Path) -> dict[str, int]:
    """Fine-tune in `folder`, which then holds the tuned tensors and a record; returns trained images per label.

    Checkpoints are kept below `folder` after every epoch; a run with the same settings goes on from the last.

    Raises: InputError for labels that the base lacks, unreadable images, or an unfinished run with other settings.
    """
    from transformers import Trainer

    quiet_transformers()
    whole = images
    images, rows, held = _divided(network, whole, settings)
    counts = Counter(network.labels[row] for row in rows)
    found = {label: counts[label] for label in network.labels}
    resume = _resume_from(folder, base, whole, settings)
    loss = cross_entropy(rows, len(network.labels), balanced=settings.class_balanced)
    if resume is None:
        _probe(network, base, images, settings, loss)
    _freeze(network, base, settings.freeze)
    shown = examples.dataset(network, images, rows, settings.augment, settings.seed)
    trainer = Trainer(
        model=network.module,
        args=_arguments(settings, folder / "checkpoints", network, len(rows)),
        train_dataset=shown,
        data_collator=examples.collate,
        # Given even when plain, since a network with a teacher's head computes no loss of its own.
        compute_loss_func=loss,
    )
    _without_console(trainer)
    trainer.add_callback(_epochs_told(shown))
    try:
        if settings.epochs > 0:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except InputError:
        if not _complete(folder):  # nothing to go on from: the next run, with other images, starts anew
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _refuse_diverged(network, folder)
    network.module.save_pretrained(folder)
    _check_names(folder, base)
    _record(folder, settings, found, held_out.measure(network, held) if held else None)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def _divided(network: Network, images: ImageSet, settings: Settings) -> tuple[ImageSet, list[int], ImageSet | None]:
    """The images to train on, the rows of their labels, and the images that are held out, if any are."""
    rows = images.label_rows(network.labels)
    if settings.hold_out == 0:
        return images, rows, None
    trained, held = held_out.split(rows, settings.hold_out, settings.seed)
    return images.part(trained), [rows[index] for index in trained], images.part(held)


def _probe(network: Network, base: Checkpoint, images: ImageSet, settings: Settings, loss: Loss) -> None:
    """The head alone first, so that the whole network does not start by following a head of zeros.

    Source: Kumar et al. 2022, arXiv 2202.10054.
    """
    if settings.least_squares:
        probe.fit_least_squares(network, base, images, settings.target)
    elif settings.probe_steps:
        alone = partial(_of_logits, loss)
        probe.fit(network, base, images, alone, steps=settings.probe_steps)


def _of_logits(loss: Loss, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return loss({"logits": logits}, rows)


def _refuse_diverged(network: Network, folder: Path) -> None:
    import torch

    broken = [name for name, value in network.module.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"the training diverged: '{_file_name(broken[0])}' and {len(broken) - 1} other tensors are not finite",
            hint="use a lower learning rate",
        )


def _arguments(settings: Settings, folder: Path, network: Network, images: int) -> Any:
    from transformers import TrainingArguments

    device = network.module.device.type
    # A batch of one has no variance for BatchNorm to divide by.
    alone = images % settings.batch_size == 1 and images > 1 and bool(normalization_layers(network.module))

    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,  # below one: a share of all steps
        lr_scheduler_type=settings.schedule,
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_drop_last=alone,
        dataloader_pin_memory=device == "cuda",
        use_cpu=device == "cpu",
        disable_tqdm=not wanted(),
    )


def cross_entropy(rows: list[int], labels: int, *, balanced: bool) -> Loss:
    """The loss; `balanced` lets every class present weigh alike, n / (classes * count), as in scikit-learn."""
    import torch

    counts = torch.bincount(torch.tensor(rows), minlength=labels).double()
    present = int((counts > 0).sum())
    even = torch.where(counts > 0, len(rows) / (present * counts.clamp(min=1)), torch.zeros(())).float()
    weights = even if balanced else torch.ones(labels)

    def loss(outputs: Any, targets: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(
            outputs["logits"], targets, weight=weights.to(targets.device), reduction="sum"
        )
        return each / (num_items_in_batch if num_items_in_batch is not None else len(targets))

    return loss


def _freeze(network: Network, base: Checkpoint, freeze: tuple[str, ...]) -> None:
    patterns = [pattern for pattern in freeze if pattern not in ("backbone", "statistics")]
    head = [name.partition(".")[0] for name in base.named(Role.HEAD)]
    names = dict(network.module.named_parameters())
    for pattern in patterns:
        try:
            matched = [name for name in names if re.fullmatch(pattern, _file_name(name))]
        except re.error as error:
            raise InputError(f"--freeze '{pattern}' is not a regular expression: {error}") from None
        if not matched:
            example = _file_name(next(iter(names)))
            raise InputError(
                f"--freeze '{pattern}' matches no parameter",
                hint=f"use backbone, statistics, or a pattern for whole names such as '{example}'",
            )
        for name in matched:
            names[name].requires_grad_(False)
    if "backbone" in freeze:
        for name, parameter in names.items():
            parameter.requires_grad_(_file_name(name).partition(".")[0] in head)
    if "statistics" in freeze:
        for layer in normalization_layers(network.module):
            # Trainer puts the whole network into train mode before each step; these layers stay as they are.
            layer.eval()
            layer.train = partial(_stay, layer)


def _stay(layer: Any, mode: bool = True) -> Any:  # noqa: ARG001 - stands in for Module.train
    return layer


def _file_name(live: str) -> str:
    return live.removeprefix("timm_model.")


def _without_console(trainer: Any) -> None:
    # Trainer prints its logs to stdout, which belongs to the command's result.
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _epochs_told(shown: Any) -> Any:
    """What tells the examples which epoch begins, after an interruption as well."""
    from transformers import TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002 - its interface
            shown.epoch = round(state.epoch)

    return Told()


def _resume_from(folder: Path, base: Checkpoint, images: ImageSet, settings: Settings) -> Path | None:
    """The last checkpoint of an unfinished run of the same work, after writing down what this run does."""
    # In JSON's own types, so that what is read back compares equal.
    described = {"settings": asdict(settings), "base": base.tensors.digest, "images": images.digest}
    work = json.loads(json.dumps({**described, "labels": images.labels}))
    note = folder / "unfinished.json"
    if note.exists():
        try:
            before = json.loads(note.read_text("utf-8"))
        except ValueError:
            before = None  # killed while it was written: nothing was trained yet
        if before != work and _complete(folder):
            output = folder.name.removeprefix(".").removesuffix(".partial")
            raise InputError(
                f"an unfinished training of '{output}' had other settings, base or images",
                hint=f"run it again as before to go on, or remove '{folder}' to start anew",
            )
    note.write_text(json.dumps(work), "utf-8")
    return max(_complete(folder), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _complete(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end."""
    found = (folder / "checkpoints").glob("checkpoint-*")
    return [path for path in found if _is_whole(path / "trainer_state.json")]


def _is_whole(path: Path) -> bool:
    """Whether there is a JSON file that was not cut off while it was written."""
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _check_names(folder: Path, base: Checkpoint) -> None:
    # transformers may rename tensors between versions; the vector needs the very names of the base's file.
    found = set(open_folder(folder).records)
    if found != set(base.records):
        strange = sorted(found ^ set(base.records))[:3]
        raise InputError(
            f"transformers saves this network under other tensor names than the base's file ({', '.join(strange)})",
            hint="load and save the base once with the installed transformers, and start the study from that",
        )


def _record(folder: Path, settings: Settings, found: dict[str, int], held: held_out.HeldOut | None) -> None:
    record = {"settings": asdict(settings), "examples": found, **({"held_out": asdict(held)} if held else {})}
    (folder / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (folder / "unfinished.json").unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any]:
    """What `train` wrote down beside a tuned network; empty for a network from elsewhere."""
    path = folder / TRAINING_FILE
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        raise InputError(f"'{path}' is not JSON", hint="remove it, or train again") from None
    return found if isinstance(found, dict) else {}
