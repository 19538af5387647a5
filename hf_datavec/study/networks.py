"""The networks of one seed: each is trained once, kept as a vector, and merged in memory."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_datavec import fuse, models, probe, second_moments
from hf_datavec import manifest as manifests
from hf_datavec.checkpoint import Checkpoint, open_checkpoint
from hf_datavec.finetune import Settings
from hf_datavec.images import ImageSet
from hf_datavec.pipeline import lock, site
from hf_datavec.pipeline.observing import Observed
from hf_datavec.pipeline.prepare import prepare
from hf_datavec.plan import Plan
from hf_datavec.recipe import AUTO
from hf_datavec.study.partition import POOLED, PUBLIC, TEST, Division
from hf_datavec.study.pictures import Part, Table, part
from hf_datavec.study.sections import Combining, Study
from hf_datavec.tensors import MODEL_FILE, Record
from hf_datavec.writing import in_file_order, write_file

log = logging.getLogger(__name__)

# The folder of a seed's own base, where heads come first.
START = "start"


@dataclass(frozen=True)
class Workplace:
    """What all seeds share: the study, its images, the base, and where everything is kept.

    `elsewhere` are the public images where they are another data set; `others` are the named sets of `more_public:`.
    `name` is the sub-folder of results and recipes: none for the study that the folder was made for.
    """

    study: Study
    folder: Path
    table: Table
    elsewhere: ImageSet | None
    others: Mapping[str, ImageSet]
    device: str
    name: str = ""

    @property
    def results(self) -> Path:
        """Where tables, plots and the report go."""
        return self.folder / self.name

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @cached_property
    def network(self) -> models.Network:
        """One network in memory, whose tensors are written over by every merge."""
        return models.load(self.base, device=self.device)

    @cached_property
    def names(self) -> dict[str, str]:
        """The network's names in memory by those in the file."""
        return models.stored_names(self.network)


@dataclass(frozen=True)
class Seed:
    """One seed's division of the images and its networks, below a folder of its own."""

    place: Workplace
    number: int
    division: Division
    parts: dict[str, Part] = field(default_factory=dict)
    others: dict[str, Part] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.place.folder / f"seed-{self.number}"

    @property
    def base(self) -> Path:
        """What its networks start from."""
        return self.folder / START if self.place.study.start else self.place.base

    @property
    def sites(self) -> tuple[str, ...]:
        return self.division.sites

    def images(self, name: str) -> Part:
        """The images of a part; `pooled` are those of all sites."""
        if name not in self.parts:
            if name == PUBLIC and self.place.elsewhere is not None:
                foreign = self.place.elsewhere
                self.parts[name] = part(foreign, range(len(foreign)))
            else:
                places = [place for one in (self.sites if name == POOLED else (name,)) for place in self._at(one)]
                scanners = [self.division.scanners.get(place) for place in places]
                self.parts[name] = part(self.place.table.images, places, scanners)
        return self.parts[name]

    def _at(self, name: str) -> tuple[int, ...]:
        return self.division.parts[name]

    @property
    def test(self) -> Part:
        return self.images(TEST)

    @property
    def public(self) -> Part:
        return self.images(PUBLIC)

    def shown(self, on: str) -> Part:
        """The public images of a name of `more_public:`, of none those of `public:`."""
        if not on:
            return self.public
        if on not in self.others:
            found = self.place.others[on]
            self.others[on] = part(found, range(len(found)))
        return self.others[on]

    def most(self, on: str) -> int:
        """How many public images restoration looks at, at most."""
        study = self.place.study
        return next((one.count for one in study.more_public if one.name == on), study.public.count)

    def settings(self, *, share: float = 1.0, probe: bool = True) -> Settings:
        """How a network trains for a share of the study's epochs."""
        chosen = self.place.study.training.model_dump()
        if not probe:
            chosen["probe_steps"] = 0
        if not share:
            chosen["augment"] = "none"  # heads see pictures as they are
        return Settings(**{**chosen, "epochs": chosen["epochs"] * share}, seed=self.number)

    def vector(
        self, name: str, images: str, settings: Settings, *, base: Path | None = None, with_gram: bool = False
    ) -> Path:
        """The vector of a network trained on some images; trained now, or gone on with, if it is not kept yet."""
        kept, tuned = self.folder / "vectors" / name, self.folder / "tuned" / name
        base = base or self.base
        if kept.exists():
            return kept
        device: Any = self.place.device.split(":")[0]
        if not tuned.exists():
            log.info("seed %d: %s trains for %g epochs", self.number, name, settings.epochs)
            site.train(open_checkpoint(base), self.images(images), tuned, settings=settings, device=device)
        own = self.images(images)
        site.diff(
            str(base),
            str(tuned),
            kept,
            with_statistics=has_statistics(base),
            share_counts=True,
            observed=Observed(("gram",), own, count=len(own), device=device) if with_gram else None,
        )
        shutil.rmtree(tuned)
        return kept

    def has(self, name: str) -> bool:
        """Whether the vector of a network is kept."""
        return (self.folder / "vectors" / name).exists()

    def site_vectors(self) -> list[Path]:
        """The sites' vectors in the order of the sites."""
        found = [self.vector(name, name, self.settings()) for name in self.sites]
        if self.place.study.features:
            for name, vector in zip(self.sites, found, strict=True):
                self._share_features(name, vector)
        return found

    def _share_features(self, name: str, vector: Path) -> None:
        """Put the sums of the base's features over a site's images beside its vector, if they are not there yet."""
        manifest = manifests.read(vector)
        if "features" in (manifest.second_moments or {}):
            return
        base, images = open_checkpoint(self.base), self.images(name)
        network = models.load(self.base, device=self.place.device)
        values = probe.feature_sums(network, base, images, manifest.labels)
        beside = {
            **(manifest.second_moments or {}),
            "features": second_moments.write(vector, "features", values, len(images)),
        }
        manifest.model_copy(update={"second_moments": beside}).sealed().write(vector)

    def plan(
        self, vectors: Sequence[Path], merge: Combining, *, base: Path | None = None, weights: Sequence[float] = ()
    ) -> Plan:
        """The plan of a merge of kept vectors, with `auto` where the study says so."""
        # The recipes that are kept for users are those of rows (`recipes`).
        file = self.folder / ".recipe.yaml"
        entries: list[Any] = [f"./{path.relative_to(self.folder)}" for path in vectors]
        if weights:
            entries = [{"vector": text, "weight": float(one)} for text, one in zip(entries, weights, strict=True)]
        start = os.path.relpath(base or self.base, self.folder)
        recipe = {"base": f"./{start}", "vectors": entries, "merge": self.combining(merge)}
        file.write_text(lock.dump(recipe), "utf-8")
        return prepare(file).plan

    def combining(self, merge: Combining) -> dict[str, Any]:
        """A merge as a recipe says it."""
        scale = {} if merge.method == AUTO else {"scale": merge.scale}
        options = {"options": merge.options} if merge.options else {}
        return {"method": merge.method, **scale, **options, "weights": merge.weights, "seed": self.number}

    def merged(self, plan: Plan) -> models.Network:
        """The shared network with the fused weights and the base's statistics."""
        import torch

        network = self.place.network
        tensors = network.module.state_dict()
        with torch.no_grad():
            for name, tensor in fuse.run(plan, device=self.place.device):
                tensors[self.place.names[name]].copy_(tensor)
        network.module.eval()
        return network

    def write(self, network: models.Network, base: Checkpoint, folder: Path) -> None:
        """Write the shared network as a model folder, as the base of a next round."""
        from hf_datavec import study_base
        from hf_datavec.staging import staged

        tensors = network.module.state_dict()
        layout = [Record(name, record.dtype, record.shape, folder, 0) for name, record in base.records.items()]
        with staged(folder) as place:
            stream = ((record.name, tensors[self.place.names[record.name]].cpu()) for record in in_file_order(layout))
            write_file(place / MODEL_FILE, layout, stream)
            study_base.copy_description(base, place, base.labels)


def has_statistics(base: Path) -> bool:
    """Whether a model folder's network keeps BatchNorm statistics."""
    return open_checkpoint(base).has_statistics
