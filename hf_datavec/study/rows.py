"""The networks and predictions of one seed, of which the rows of a study's table are made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_datavec import agreement, distillation, evaluate, models, probe, recalibrate, temperature
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.finetune import cross_entropy
from hf_datavec.pipeline import deciding, judging
from hf_datavec.pipeline.judging import Judge
from hf_datavec.plan import Plan
from hf_datavec.recipe import AUTO, Override
from hf_datavec.study import trivial
from hf_datavec.study.choosing import Decided, choose, judge_of
from hf_datavec.study.kept import Kept
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import POOLED
from hf_datavec.study.restoring import Restorer
from hf_datavec.study.sections import Combining

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

log = logging.getLogger(__name__)

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
    """What stands in place of `auto` in one seed; `weights` are by site, where one site alone was chosen."""

    method: str
    scale: float
    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        more = {"options": dict(self.options), "weights": dict(self.weights)}
        return {"method": self.method, "scale": self.scale, "mode": self.mode, "text": self.text} | more

    @property
    def text(self) -> str:
        """What tables and recipes call it."""
        sites = [name for name, weight in self.weights.items() if weight]
        options = "".join(f", {key} {one}" for key, one in self.options.items())
        heads = f", heads by {self.overrides[0].method}" if self.overrides else ""
        return f"{sites[0]} alone" if sites else f"{self.method} x {self.scale:.4g}{options}{heads}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row, how its probabilities are computed, and what it depends on that its name leaves out."""

    row: Row
    compute: Callable[[], Floats]
    more: str = ""
    merge: Combining | None = None
    after: Literal["", "learned", "calibrated"] = ""  # what comes after the restoration

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
        found = self.decided(plan, mode, on)
        plan, mode = found.plan, found.mode
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

    def decided(self, plan: Plan, mode: str, on: str = "") -> Decided:
        """A plan and a mode with what the sites' networks support most in place of every `auto`."""
        merge = plan.recipe.merge
        names = tuple((one.name, one.weight) for one in plan.contributions)
        key = (plan.base.folder, on, mode, merge.model_dump_json(), names)
        if key not in self._decided:
            judge = self.judge(plan, on) if AUTO in (merge.method, merge.scale, mode) else None
            self._decided[key] = choose(self.seed, plan, mode, judge)
        return self._decided[key]

    def judge(self, plan: Plan, on: str = "") -> Judge:
        """The ensemble of a plan's sites on some public images."""
        key = (plan.base.folder, on, *(one.name for one in plan.contributions))
        if key not in self._judges:
            self._judges[key] = judge_of(self.seed, plan, on)
        return self._judges[key]

    @cached_property
    def _decided(self) -> dict[tuple[object, ...], Decided]:
        return {}

    @cached_property
    def _judges(self) -> dict[tuple[object, ...], Judge]:
        return {}

    def chosen(self, merge: Combining, mode: str, on: str = "") -> Chosen | None:
        """What stands in place of `auto` in a merge of all sites and its restoration, if anything was left open."""
        if AUTO not in (merge.method, merge.scale, mode):
            return None
        found = self.decided(self.seed.plan(self.vectors(), merge), mode, on)
        chosen = found.plan.recipe.merge
        weights = {one.name: one.weight for one in found.plan.contributions} if found.alone else {}
        return Chosen(chosen.method, chosen.factor, found.mode, chosen.options, weights, chosen.overrides)

    def _is_foreign(self, plan: Plan, judge: Judge) -> bool:
        """Whether the judge's images are of another kind than the sites'."""
        return deciding.domain_of(plan, judge, self.seed.place.device).foreign

    def taught(self, merge: Combining, mode: str, on: str, key: str) -> Floats:
        """The probabilities of `learned`; what calibrates them is kept under a key before they are."""
        network = self.learned(merge, mode, on)
        self.kept.numbers(key, partial(self._suited, network, merge, on))
        return self.predicted(network)

    def calibrated(self, taught: Wanted, merge: Combining, on: str, key: str) -> Floats:
        """The probabilities of a taught row at the temperature that suits the ensemble's on the public images."""
        import numpy as np

        probabilities = self.get(taught)

        def suited() -> float:
            return self._suited(self.learned(merge, taught.row.mode, on), merge, on)

        logits = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)) / self.kept.numbers(key, suited)
        result: Floats = np.exp(agreement.log_softmax(logits))
        return result

    def _suited(self, network: models.Network, merge: Combining, on: str) -> float:
        """The temperature of a network for the ensemble's answers to the public images, with the digits of a merge."""
        plan = self.seed.plan(self.vectors(), merge)
        judge = self.judge(plan, on)
        if self._is_foreign(plan, judge):
            return 1.0  # as a merge, which then scales nothing
        public = agreement.log_softmax(recalibrate.outputs(network, judge.pictures))
        return float(f"{temperature.fit_ensemble(public, judge.ensemble.probabilities):.4g}")

    def learned(self, merge: Combining, mode: str, on: str = "") -> models.Network:
        """The shared network, merged, restored, and taught by the sites' networks as the study's `distil:` says."""
        network, plan = self.network(merge, mode, on=on), self.seed.plan(self.vectors(), merge)
        settings, judge = self.seed.place.study.distil, self.judge(plan, on)
        if settings is not None and not self._is_foreign(plan, judge):  # as a merge does
            settings = settings.model_copy(update={"loss": "ensemble"})
            sites = judging.everyone(plan, self.seed.place.device)
            found = distillation.learn(
                network, judge.ensemble, judge.pictures, sites=sites, settings=settings, seed=self.seed.number
            )
            log.info("seed %d: %s", self.seed.number, found.text)
        return network

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
