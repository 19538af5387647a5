"""The networks and predictions of one seed, of which the rows of a study's table are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_datavec import evaluate, models, probe, recalibrate
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.finetune import cross_entropy
from hf_datavec.plan import Plan
from hf_datavec.recipe import AUTO
from hf_datavec.study import trivial
from hf_datavec.study.kept import Kept
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import POOLED
from hf_datavec.study.restoring import Restorer
from hf_datavec.study.sections import Combining

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Kind = Literal["site", "probe", "fused", "ensemble", "pooled", "federated", "relay", "random", "control"]
PROBE_STEPS = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table before it is measured; `on` names the public images, unless they are those of `public:`.

    Those that matter stand in the first table of a report, the others in its appendix.
    """

    name: str
    kind: Kind
    mode: str = ""
    on: str = ""
    matters: bool = False

    @property
    def text(self) -> str:
        """Its name and how it is restored."""
        restored = f"{self.name}, {self.mode}" if self.mode else self.name
        return f"{restored} on {self.on}" if self.on else restored


@dataclass(frozen=True, slots=True)
class Chosen:
    """What stands in place of `auto` in one seed."""

    method: str
    scale: float
    mode: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row, how its probabilities are computed, and what it depends on that its name leaves out."""

    row: Row
    compute: Callable[[], Floats]
    more: str = ""
    merge: Combining | None = None

    @property
    def key(self) -> str:
        """What its probabilities are kept under."""
        return f"{self.row.text}, {self.more}" if self.more else self.row.text


@dataclass(frozen=True)
class Measuring:
    """One seed's networks, merged and measured; what was predicted before is read, not predicted again."""

    seed: Seed

    @cached_property
    def kept(self) -> Kept:
        return Kept(self.seed.folder / "predictions")

    def get(self, wanted: Wanted) -> Floats:
        """The probabilities (n, k) of a row on the test images, computed if they are not kept."""
        return self.kept.probabilities(wanted.key, wanted.compute)

    def predicted(self, network: models.Network) -> Floats:
        """A network's probabilities on the test images."""
        return evaluate.predict(network, self.seed.test).probabilities

    def loaded(self, folder: Path) -> Floats:
        """The probabilities of a model folder's network."""
        return self.predicted(models.load(folder, device=self.seed.place.device))

    def vectors(self) -> list[Path]:
        return self.seed.site_vectors()

    def fused(
        self,
        merge: Combining,
        mode: str,
        vectors: Sequence[Path] = (),
        weights: Sequence[float] = (),
        *,
        on: str = "",
    ) -> Floats:
        """The probabilities of a merge, of all sites unless vectors are given, after restoration."""
        return self.predicted(self.network(merge, mode, vectors, weights, on=on))

    def network(
        self,
        merge: Combining,
        mode: str,
        vectors: Sequence[Path] = (),
        weights: Sequence[float] = (),
        *,
        base: Path | None = None,
        on: str = "",
    ) -> models.Network:
        """The shared network, merged and restored; `on` names the public images."""
        plan = self.seed.plan(vectors or self.vectors(), merge, weights=weights, base=base)
        network = self.seed.merged(plan)
        if mode != "none":
            self.restorer(plan, on).apply(network, mode)
        return network

    def restorer(self, plan: Plan, on: str = "") -> Restorer:
        """What restores merges of a plan's vectors on some public images."""
        key = (plan.base.folder, on, *((one.name, one.weight) for one in plan.contributions))
        if key not in self._restorers:
            sites = recalibrate.sharing(plan.base, plan.contributions, device=self.seed.place.device)
            self._restorers[key] = Restorer(sites, self.seed.shown(on), self.seed.most(on))
        return self._restorers[key]

    @cached_property
    def _restorers(self) -> dict[tuple[object, ...], Restorer]:
        return {}

    def chosen(self, merge: Combining, mode: str, on: str = "") -> Chosen | None:
        """What stands in place of `auto` in a merge of all sites and its restoration, if anything was left open."""
        if AUTO not in (merge.method, merge.scale, mode):
            return None
        plan = self._plan(merge)
        found = plan.recipe.merge
        automatic = mode == AUTO and plan.base.has_statistics
        return Chosen(found.method, found.factor, self.restorer(plan, on).automatic if automatic else mode)

    def _plan(self, merge: Combining) -> Plan:
        if merge.name not in self._plans:
            self._plans[merge.name] = self.seed.plan(self.vectors(), merge)
        return self._plans[merge.name]

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        return {}

    def alone(self, vector: Path, mode: str, base: Path | None = None) -> Floats:
        """One trained network, with its own statistics or restored; it started as all do, or from a base of its own."""
        return self.predicted(self.network(Combining(), mode or "moments", [vector], base=base))

    def trained(self, name: str, share: float, base: Path) -> Floats:
        """A network on all data, trained from a base for a share of the epochs."""
        seed = self.seed
        return self.alone(seed.vector(name, POOLED, seed.settings(share=share), base=base), "", base)

    def probed(self, images: str) -> Floats:
        """The base with a head that was trained on some images."""
        base = open_checkpoint(self.seed.place.base)
        network, some = models.load(self.seed.place.base, device=self.seed.place.device), self.seed.images(images)
        balanced = self.seed.place.study.training.class_balanced
        loss = cross_entropy(some.label_rows(network.labels), len(network.labels), balanced=balanced)
        probe.fit(network, base, some, lambda logits, rows: loss({"logits": logits}, rows), steps=PROBE_STEPS)
        return self.predicted(network)

    def trivial(self) -> Floats:
        """A random forest on trivial features of all sites' images."""
        seed = self.seed
        labels = seed.place.network.labels
        return trivial.predicted(seed.images(POOLED), seed.test, labels, seed=seed.number)
