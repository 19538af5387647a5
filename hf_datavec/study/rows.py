"""The rows of a study's table: what is compared, and the probabilities that each gives the test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_datavec import evaluate, models, probe, recalibrate
from hf_datavec.checkpoint import open_checkpoint
from hf_datavec.finetune import cross_entropy
from hf_datavec.pipeline.judging import Judge
from hf_datavec.recipe import AUTO
from hf_datavec.study.choosing import choose
from hf_datavec.study.kept import Kept
from hf_datavec.study.networks import Seed
from hf_datavec.study.partition import FROM_BASE, POOLED
from hf_datavec.study.restoring import Restorer
from hf_datavec.study.rounds import FEDAVG, FEDAVG_MODE, Pace, heads_alone, kind, pace, relay, with_heads
from hf_datavec.study.sections import Combining, Heads, Study

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Kind = Literal["site", "probe", "fused", "ensemble", "pooled", "federated", "relay", "random", "control"]
# A single site's own statistics are right for it already, so only these modes change anything.
FOR_ONE = ("statistics", "tune")
PROBE_STEPS = 400


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table before it is measured."""

    name: str
    kind: Kind
    mode: str = ""

    @property
    def text(self) -> str:
        """Its name and how it is restored."""
        return f"{self.name}, {self.mode}" if self.mode else self.name


@dataclass(frozen=True)
class Measuring:
    """All rows of one seed; what was predicted before is read, not predicted again."""

    seed: Seed

    @cached_property
    def kept(self) -> Kept:
        return Kept(self.seed.folder / "predictions")

    def rows(self) -> Iterator[tuple[Row, Floats]]:
        """Every row with its probabilities (n, k) on the test images, in the order of the table."""
        yield from self._sites()
        yield from self._pooled()
        yield from self._merges()
        yield from self._rounds()

    def get(self, row: Row, compute: Callable[[], Floats], *, key: str = "") -> tuple[Row, Floats]:
        """A row with its probabilities, computed if they are not kept; `key` says what its name leaves out."""
        return row, self.kept.probabilities(f"{row.text}, {key}" if key else row.text, compute)

    def predicted(self, network: models.Network) -> Floats:
        """A network's probabilities on the test images."""
        return evaluate.predict(network, self.seed.test).probabilities

    def vectors(self) -> list[Path]:
        return self.seed.site_vectors()

    def fused(self, merge: Combining, mode: str, vectors: Sequence[Path] = (), weights: Sequence[float] = ()) -> Floats:
        """The probabilities of a merge, of all sites unless vectors are given, after restoration."""
        return self.predicted(self.network(merge, mode, vectors, weights))

    def network(
        self,
        merge: Combining,
        mode: str,
        vectors: Sequence[Path] = (),
        weights: Sequence[float] = (),
        *,
        base: Path | None = None,
    ) -> models.Network:
        """The shared network, merged and restored."""
        plan = self.seed.plan(vectors or self.vectors(), merge, weights=weights, base=base)
        plan, mode = choose(self.seed, plan, mode, self._judges)
        network = self.seed.merged(plan)
        if mode != "none":
            key = (plan.base.folder, *((one.name, one.weight) for one in plan.contributions))
            if key not in self._restorers:
                sites = recalibrate.sharing(plan.base, plan.contributions, device=self.seed.place.device)
                self._restorers[key] = Restorer(sites, self.seed.public, self.seed.place.study.public.count)
            self._restorers[key].apply(network, mode)
        return network

    @cached_property
    def _restorers(self) -> dict[tuple[object, ...], Restorer]:
        return {}

    @cached_property
    def _judges(self) -> dict[object, Judge]:
        return {}

    def _alone(self, vector: Path, mode: str, base: Path | None = None) -> Floats:
        """One trained network, with its own statistics or restored; it started as all do, or from a base of its own."""
        return self.predicted(self.network(Combining(), mode or "moments", [vector], base=base))

    def _trained(self, name: str, share: float, base: Path) -> Floats:
        """A network on all data, trained from a base for a share of the epochs."""
        seed = self.seed
        return self._alone(seed.vector(name, POOLED, seed.settings(share=share), base=base), "", base)

    def _sites(self) -> Iterator[tuple[Row, Floats]]:
        modes = ["", *(mode for mode in self.seed.place.study.restore if mode in FOR_ONE)]
        vectors = dict(zip(self.seed.sites, self.vectors(), strict=True))
        for mode in modes:
            each = []
            for site, vector in vectors.items():
                row, found = self.get(Row(site, "site", mode), partial(self._alone, vector, mode))
                each.append(found)
                yield row, found
            yield Row("output ensemble of the sites", "ensemble", mode), sum(each[1:], each[0]) / len(each)
        for site in self.seed.sites:
            yield self.get(Row(f"linear probe of {site}", "probe"), partial(self._probe, site))
        yield self.get(Row("linear probe, pooled", "probe"), partial(self._probe, POOLED))

    def _probe(self, images: str) -> Floats:
        """The base with a head that was trained on some images."""
        base = open_checkpoint(self.seed.place.base)
        network, some = models.load(self.seed.place.base, device=self.seed.place.device), self.seed.images(images)
        balanced = self.seed.place.study.training.class_balanced
        loss = cross_entropy(some.label_rows(network.labels), len(network.labels), balanced=balanced)
        probe.fit(network, base, some, lambda logits, rows: loss({"logits": logits}, rows), steps=PROBE_STEPS)
        return self.predicted(network)

    def _pooled(self) -> Iterator[tuple[Row, Floats]]:
        seed = self.seed
        study = seed.place.study
        # As many steps as the sites take on average; as many epochs as all rounds have together.
        shares = {"epochs": 1.0, "steps": 1 / len(seed.sites), "rounds": 1.0}
        texts = {budget: f"equal {budget}" for budget in shares}
        if study.relay and study.relay.epochs:
            epochs = study.relay.epochs * study.relay.rounds
            shares["rounds"], texts["rounds"] = epochs / study.training.epochs, f"{epochs:g} epochs"
        starts = {POOLED: ("", seed.base)}
        if study.start:
            # Heads first help sites of few images; all of them together may do better without (docs/evidence.md).
            starts[FROM_BASE] = (" from the base", seed.place.base)
        for kept, (words, base) in starts.items():
            for budget in study.budgets:
                name = f"{kept}-{budget}" + (f"/{texts[budget].split()[0]}" if budget == "rounds" else "")
                row = Row(f"all data pooled{words}, {texts[budget]}", "pooled")
                yield self.get(row, partial(self._trained, name, shares[budget], base))

    def _merges(self) -> Iterator[tuple[Row, Floats]]:
        study = self.seed.place.study
        for merge in study.merges:
            for mode in study.restore:
                # Results of studies that chose by geometry are no longer those of `auto`.
                key = "by agreement" if AUTO in (merge.method, merge.scale, mode) else ""
                yield self.get(Row(merge.name, "fused", mode), partial(self.fused, merge, mode), key=key)
        scale = next((merge.scale for merge in study.merges if not isinstance(merge.scale, str)), 1.0)
        control = Combining(method="random", scale=scale)
        for mode in study.restore:
            row = Row("random vectors", "random", mode)
            yield self.get(row, partial(self.fused, control, mode), key=control.name)

    def _rounds(self) -> Iterator[tuple[Row, Floats]]:
        study = self.seed.place.study
        if study.federated:
            count = study.federated.rounds
            row = Row(f"FedAvg, {count} rounds", "federated", FEDAVG_MODE)
            yield self.get(row, partial(self._relayed, count, FEDAVG, FEDAVG_MODE, Pace()))
        if study.relay:
            chosen = study.relay
            for count in range(2, chosen.rounds + 1):
                row = Row(f"{chosen.merge.name}{_before(count, study)}", "relay", chosen.restore)
                key = kind(study.heads) if study.heads and chosen.heads else ""
                yield self.get(row, partial(self._relayed, count, chosen.merge, chosen.restore, pace(study)), key=key)
        if study.heads:
            again = study.heads
            closed = again.fit == "least_squares"
            how = " by least squares" if closed else ""
            key = kind(again).replace("least-squares", "least squares") if closed else f"{again.steps} steps"
            for count in range(1, again.rounds + 1):
                row = Row(f"{again.merge.name}{_before(count, study)}, then heads{how}", "relay", again.restore)
                yield self.get(row, partial(self._with_heads, again, count), key=key)
            row = Row(f"heads alone{how or ', averaged'}", "control")
            yield self.get(row, partial(self._heads_alone, again), key=key)

    def _with_heads(self, heads: Heads, rounds: int) -> Floats:
        return self._loaded(with_heads(self.seed, heads, rounds))

    def _heads_alone(self, heads: Heads) -> Floats:
        return self._loaded(heads_alone(self.seed, heads))

    def _relayed(self, rounds: int, merge: Combining, mode: str, how: Pace) -> Floats:
        return self._loaded(relay(self.seed, rounds, merge, mode, how)[-1])

    def _loaded(self, folder: Path) -> Floats:
        return self.predicted(models.load(folder, device=self.seed.place.device))


def _before(rounds: int, study: Study) -> str:
    """The rounds of merging that a row has seen, where there are more than one."""
    if rounds == 1:
        return ""
    how = pace(study)
    each = f" of {how.epochs:g} epochs" if how.epochs else ""
    return f", {rounds} rounds{each}" + (" with heads between" if how.heads else "")
