"""The Python side of the commands: a task vector in memory, and the merge of a recipe."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec import hub, vector, vector_file
from hf_datavec.checkpoint import Role, open_checkpoint
from hf_datavec.errors import InputError
from hf_datavec.manifest import Manifest
from hf_datavec.models import load_module
from hf_datavec.pipeline import coordinator, lock, site
from hf_datavec.pipeline.coordinator import MergeResult
from hf_datavec.pipeline.device import Device
from hf_datavec.staging import staged
from hf_datavec.vector import rows_by_label
from hf_datavec.vector_card import vector_card

if TYPE_CHECKING:
    import torch

__all__ = ["MergeResult", "TaskVector", "merge"]

Text = str | os.PathLike[str]


def merge(
    recipe: Text, *, output: Text | None = None, push: bool = True, device: Device = "auto", token: str | None = None
) -> MergeResult:
    """Do what a recipe file says, as `hf-datavec merge` does; `result.output` is the folder of the fused model.

    Raises: InputError for a recipe that cannot be merged, RunError when the run fails; nothing half written is left.
    """
    with hub.identified(token):
        return coordinator.merge(Path(recipe), output=Path(output) if output else None, push=push, device=device)


class TaskVector:
    """What fine-tuning changed in a base network: tuned minus base weights, float32, in memory.

    Vectors of one base can be added, subtracted and scaled. Heads go by label: the result has the union of the
    labels, and a row that one side lacks counts as zero there. Results of arithmetic hold no BatchNorm statistics,
    since a sum or a multiple of those is no statistic, and no image counts.

    Source: arXiv 2212.04089, section 2.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        # Second moments that lie beside a stored vector do not come along.
        self._manifest = manifest.model_copy(update={"second_moments": None})
        self.tensors = dict(tensors)

    @property
    def base(self) -> str:
        """The base that the vector belongs to: a Hub repo, or the name of a folder."""
        return self._manifest.base.id

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the head's rows."""
        return self._manifest.labels

    @property
    def norm(self) -> float:
        """The length of the whole vector, without head and statistics."""
        return vector_file.norm(self.tensors[name] for name in self._named(Role.WEIGHT))

    def __repr__(self) -> str:
        return f"TaskVector(base={self.base!r}, labels={self.labels!r}, norm={self.norm:g})"

    @classmethod
    def from_pretrained(
        cls, pretrained_vector_name_or_path: Text, *, revision: str | None = None, token: str | bool | None = None
    ) -> TaskVector:
        """The vector in a folder or a Hub repo, checked against its manifest.

        Raises: InputError when it is missing or damaged, or may not be seen.
        """
        with hub.identified(token):
            fetched = hub.fetch(hub.parse(os.fspath(pretrained_vector_name_or_path), revision=revision))
        stored = vector.open_vector(fetched.folder)
        stored.verify()
        return cls(stored.manifest, {name: stored.read(name) for name in sorted(stored.manifest.stored)})

    @classmethod
    def between(
        cls, base: Text, tuned: Text, *, with_statistics: bool = False, token: str | bool | None = None
    ) -> TaskVector:
        """Tuned minus base, each a folder or a Hub repo; `tuned` may be a file of weights as well.

        Raises: InputError when the two do not belong together, or weights are not finite.
        """
        with tempfile.TemporaryDirectory(prefix="hf-datavec-") as scratch, hub.identified(token):
            folder = Path(scratch) / "vector"
            site.diff(os.fspath(base), os.fspath(tuned), folder, with_statistics=with_statistics)
            return cls.from_pretrained(folder)

    def save_pretrained(self, save_directory: Text) -> None:
        """Write the folder of the vector: tensors, manifest and card. Raises: InputError if it exists."""
        with staged(Path(save_directory)) as folder:
            manifest = vector_file.write_described(folder, self._manifest, self.tensors.__getitem__)
            (folder / "README.md").write_text(vector_card(manifest), "utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commit the vector to a Hub repo, which is created if missing; returns the commit's address.

        Raises: InputError without access, or for a public repo although `private`; RunError when the Hub fails.
        """
        message = commit_message or f"Add the task vector {repo_id.rpartition('/')[2]}"
        with tempfile.TemporaryDirectory(prefix="hf-datavec-") as scratch, hub.identified(token):
            folder = Path(scratch) / "vector"
            self.save_pretrained(folder)
            to = hub.parse(f"hf://{repo_id.removeprefix('hf://')}", revision=revision)
            return hub.push(folder, to, private=private, message=message, create_pr=create_pr)

    def apply_to(self, base: Text, *, scale: float = 1.0, token: str | bool | None = None) -> Any:
        """The base plus the scaled vector as a transformers model, in float32 and evaluation mode.

        BatchNorm statistics are the tuned network's if the vector holds them and is not scaled, else the base's.

        Raises: InputError when the vector was made from another base.
        """
        has_statistics = self._manifest.has_statistics and scale == 1.0
        with tempfile.TemporaryDirectory(prefix="hf-datavec-") as scratch, hub.identified(token):
            folder = Path(scratch)
            self.save_pretrained(folder / "vector")
            fetched = hub.fetch(hub.parse(os.fspath(base)))
            recipe = {
                "base": str(fetched.folder.absolute()),
                "vectors": ["./vector"],
                "merge": {"method": "sum", "scale": float(scale)},
                "recalibrate": {"mode": "moments" if has_statistics else "none"},
            }
            (folder / "recipe.yaml").write_text(lock.dump(recipe), "utf-8")
            result = coordinator.merge(folder / "recipe.yaml", output=folder / "model", push=False)
            return load_module(open_checkpoint(result.output)).eval()

    def __add__(self, other: TaskVector | int) -> TaskVector:
        if isinstance(other, int) and other == 0:  # where `sum` starts
            return self
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self._combined(other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, -1.0) if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, int | float):
            return NotImplemented
        return self._derived(
            self.labels, {name: factor * self.tensors[name] for name in self._named(Role.WEIGHT, Role.HEAD)}
        )

    __rmul__ = __mul__

    def _named(self, *roles: Role) -> list[str]:
        stored = self._manifest.stored
        return [name for name in sorted(stored) if stored[name].role in roles]

    def _combined(self, other: TaskVector, sign: float) -> TaskVector:
        if self._manifest.base.digest != other._manifest.base.digest:
            raise InputError(
                f"the vectors belong to two bases: '{self.base}' ({self._manifest.base.digest[:19]}...) and "
                f"'{other.base}' ({other._manifest.base.digest[:19]}...)",
                hint="only differences to the same weights can be added",
            )
        labels = (*self.labels, *(label for label in other.labels if label not in self.labels))
        return self._derived(
            labels,
            {
                name: self._read(name, labels).add(other._read(name, labels), alpha=sign)
                for name in self._named(Role.WEIGHT, Role.HEAD)
            },
        )

    def _read(self, name: str, labels: tuple[str, ...]) -> torch.Tensor:
        tensor = self.tensors[name]
        is_head = self._manifest.tensors[name].role is Role.HEAD
        return rows_by_label(tensor, self.labels, labels) if is_head and labels != self.labels else tensor

    def _derived(self, labels: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> TaskVector:
        """A new vector on the same base, described anew; it has no statistics and no counts."""
        entries = {
            name: entry.model_copy(
                update={
                    "shape": tuple(tensors[name].shape) if name in tensors else entry.shape,
                    "stored": name in tensors,
                }
            )
            for name, entry in self._manifest.tensors.items()
        }
        changed = {
            "labels": labels,
            "tensors": entries,
            "examples": None,
            "training": None,
            "content": "",
            "digest": "",
        }
        return TaskVector(self._manifest.model_copy(update=changed), tensors)
