"""Finding a recipe's scale or weights: fuse, restore and measure for each setting, and take the best."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from hf_datavec import evaluate as evaluation
from hf_datavec import models, processes, variants
from hf_datavec import survey as surveys
from hf_datavec.checkpoint import Role
from hf_datavec.errors import DatavecError, InputError
from hf_datavec.evaluate import Evaluation
from hf_datavec.geometry import Gram
from hf_datavec.images import ImageSet
from hf_datavec.pipeline import weights
from hf_datavec.pipeline.trying import Tried
from hf_datavec.plan import Contribution, Plan
from hf_datavec.progress import progress
from hf_datavec.recipe import Measured, Merge, Override, ScaleSearch, WeightSearch
from hf_datavec.search import Search, Trial, Weights, over_weights
from hf_datavec.tensors import open_file
from hf_datavec.threads import load_ahead
from hf_datavec.vector import Combination, Nothing

log = logging.getLogger(__name__)

COMBINATION = "combination.safetensors"


@dataclass(frozen=True)
class Choice:
    """A plan with what was found, and the plan that makes its weights, perhaps from the combination at hand."""

    plan: Plan
    writing: Plan
    search: Search | None = None


@dataclass(frozen=True)
class Chooser:
    """Tries settings on labelled images."""

    images: ImageSet
    tried: Tried

    def choose(self, plan: Plan, gram: Gram) -> Choice:
        """The plan with the best scale or weights that the recipe's search finds.

        For a scale the vectors are read once, where `gram` sees them; their combination is kept in the folder until
        `clear` and only scaled and added each time. Weights need a combination of their own each.

        Raises: RunError or InputError when no setting can be measured, for the reason that the best of them met.
        """
        wanted = plan.recipe.merge.searched
        if isinstance(wanted, ScaleSearch):
            loading = load_ahead(lambda: _import_libraries(plan))
            combined = _combined(plan, self.tried.folder / COMBINATION, self.tried.device, gram)
            loading.join()  # two threads that import parts of one library may meet what is half made
            values = progress(wanted.search, text="search", total=len(wanted.search), unit="scale")
            trials = [
                self._trial(wanted, float(value), variants.scaled(plan, value), variants.scaled(combined, value))
                for value in values
            ]
            search = self._result("scale", wanted, plan, trials)
            best = search.best.setting
            assert isinstance(best, float)
            return Choice(variants.scaled(plan, best), variants.scaled(combined, best), search)
        assert isinstance(wanted, WeightSearch)  # nobody chooses without a search
        return self._choose_weights(wanted, plan)

    def _choose_weights(self, wanted: WeightSearch, plan: Plan) -> Choice:
        names = [one.name for one in plan.contributions]

        def measure(weights: Weights) -> Trial:
            tried = variants.weighted(plan, dict(zip(names, weights, strict=True)))
            return self._trial(wanted, weights, tried, tried)

        trials = list(over_weights(len(names), wanted.rounds, measure, wanted.metric))
        search = self._result("weights", wanted, plan, trials)
        best = search.best.setting
        assert isinstance(best, tuple)
        found = variants.weighted(plan, dict(zip(names, best, strict=True)))
        return Choice(found, found, search)

    def _trial(self, wanted: Measured, setting: float | Weights, plan: Plan, writing: Plan) -> Trial:
        try:
            found = processes.together(lambda: self._measured(wanted, plan, writing))
        except DatavecError as error:
            # A scale that is far too large breaks the network; that is a finding, and the others may be fine.
            log.info("search: %s: %s", _shown(setting), error.problem)
            return Trial(setting, None, error)
        estimate = found.metrics[wanted.metric]
        log.info("search: %s: %s %.4f", _shown(setting), wanted.metric, estimate.value)
        return Trial(setting, estimate)

    def _measured(self, wanted: Measured, plan: Plan, writing: Plan) -> Evaluation:
        network = self.tried.network(plan, writing)
        return evaluation.evaluate_network(network, self.images, batch_size=wanted.batch_size)

    def _result(self, kind: str, wanted: Measured, plan: Plan, trials: list[Trial]) -> Search:
        names = tuple(one.name for one in plan.contributions)
        images = self.images
        search = Search(
            kind, wanted.metric, images.fetched.reference.identity, images.digest, len(images), names, tuple(trials)
        )
        if not search.best.usable:
            error = search.best.error or InputError(f"{wanted.metric} is not defined on these images")
            problem = f"none of {len(trials)} settings could be measured: {error.problem}"
            raise type(error)(problem, hint=error.hint)
        return search


def _import_libraries(plan: Plan) -> None:
    """Import what trials need, which takes longer than combining some vectors does."""
    models.import_libraries(plan.base)
    importlib.import_module("evaluate")


def clear(folder: Path) -> None:
    """Remove the combination that a search left in a folder."""
    (folder / COMBINATION).unlink(missing_ok=True)


def _combined(plan: Plan, path: Path, device: str, gram: Gram) -> Plan:
    """The plan whose only contribution is what the methods of another make of its vectors, written to `path`.

    The combination is what a merge onto nothing gives; it is kept in float64, so that scaling and adding it gives
    the very bits of a merge in one go.
    """
    steps = [step for step in plan.steps if step.role in (Role.WEIGHT, Role.HEAD)]
    layout = [replace(step.record, dtype="F64") for step in steps]
    nothing = replace(plan.base, tensors=Nothing(plan.base.records))  # type: ignore[arg-type]
    bare = replace(
        plan,
        base=nothing,
        steps=tuple(replace(step, record=record, scale=1.0) for step, record in zip(steps, layout, strict=True)),
    )
    # Measured with the base at hand, which a head from sums of features is a difference to.
    survey = processes.together(lambda: surveys.take(plan))
    weights.write_files(bare, {path: layout}, device, gram, hashed=False, survey=survey)
    source = Combination(plan.labels, open_file(path))
    whole = Contribution("combination", plan.base_fetched, source, 1.0, "")
    overrides = tuple(Override(tensors=one.tensors, scale=one.scale) for one in plan.recipe.merge.overrides)
    merge = Merge(method="sum", overrides=overrides)
    return variants.with_merge(replace(plan, contributions=(whole,)), merge)


def _shown(setting: float | Weights) -> str:
    return (
        f"scale {setting:g}" if isinstance(setting, float) else f"weights {', '.join(f'{one:.3f}' for one in setting)}"
    )
