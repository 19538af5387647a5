"""What a merge will do, decided before a tensor is read: immutable steps over contributions, with their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_datavec import selection
from hf_datavec.checkpoint import Checkpoint, Role
from hf_datavec.combine import needs_whole, slice_length
from hf_datavec.headers import ITEM_BYTES
from hf_datavec.hub import Fetched
from hf_datavec.methods import Method, as_matrix
from hf_datavec.recipe import Recipe
from hf_datavec.tensors import Record
from hf_datavec.threads import MOST_BYTES, PIECE
from hf_datavec.vector import Combination, TaskVector, TunedDifferences

# Below this many images the moments of a channel are mostly chance.
FEW_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Contribution:
    """One site's share in a merge."""

    name: str
    fetched: Fetched
    source: TaskVector | TunedDifferences | Combination
    weight: float
    digest: str  # empty for a tuned model of which only headers are at hand

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.labels

    @property
    def examples(self) -> int | None:
        """How many images the site declares to have trained on."""
        counts = self.source.manifest.examples if isinstance(self.source, TaskVector) else None
        return sum(counts.values()) if counts else None

    @property
    def temperature(self) -> float | None:
        """The temperature that the site declares for its tuned network."""
        return self.source.manifest.temperature if isinstance(self.source, TaskVector) else None

    @property
    def has_statistics(self) -> bool:
        """Whether the site's own BatchNorm statistics can be read."""
        if isinstance(self.source, TaskVector):
            return self.source.manifest.has_statistics
        if isinstance(self.source, Combination):
            return False
        return set(self.source.base.named(Role.STATISTIC)) <= set(self.source.tuned.names)


@dataclass(frozen=True, slots=True)
class Step:
    """How one tensor of the result is made."""

    record: Record
    role: Role
    method: Method
    options: Mapping[str, Any]
    scale: float  # NaN as long as it is searched for

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def is_merged(self) -> bool:
        """Whether the tensor is combined from the sites' vectors."""
        return self.role in (Role.WEIGHT, Role.HEAD)

    @property
    def surveys(self) -> bool:
        """Whether its method measures whole vectors first."""
        return self.is_merged and self.method.surveys(self.options)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is handled as a whole: it is a head, or its method looks at all of it."""
        return self.is_merged and (self._combines_all or self._measures)

    @property
    def _combines_all(self) -> bool:
        return needs_whole(self.method) or self.role is Role.HEAD

    @property
    def _measures(self) -> bool:
        """Whether the tensor is measured first, and then combined slice by slice."""
        return (self.method.kind == "site" or self.method.ranks is not None) and not self.surveys

    def ranks(self, length: int) -> tuple[int, ...]:
        """The ranks whose magnitudes its method asks for, of vectors of a length."""
        ranks = self.method.ranks
        return ranks(length, **self.method.chosen(self.options)) if ranks else ()

    @property
    def result_bytes(self) -> int:
        """What the result takes, or one piece of it where the tensor is not handled as a whole."""
        if not self.is_merged or self.is_whole:
            return self.record.nbytes
        return min(math.prod(self.record.shape), PIECE) * ITEM_BYTES[self.record.dtype]

    def peak_bytes(self, sites: int, computed: int) -> int:
        """A bound on the memory that the tensor takes, or one piece of it where it is not handled as a whole.

        Of the sites' vectors so many are `computed` from models; the others are files that are mapped.
        """
        values = math.prod(self.record.shape)
        if not self.is_merged:
            return self.record.nbytes
        # Of each value n float32 rows, their float64 copies when they are clipped or differences, the method's own, and
        # the combination, the base and the result in float64.
        each = sites * (4 + 8 + 8 * self.method.copies) + 3 * 8
        if self._combines_all:
            matrix = as_matrix(self.record.shape) if "gram" in self.method.from_sites else None
            # The sites' Gram matrices and their stack, and in float64 their sum, a factor and a copy of one.
            beside = matrix[1] ** 2 * (2 * 4 * sites + 3 * 8) if matrix else 0
            if "features" in self.method.from_sites and len(self.record.shape) > 1:
                # Sums of all sites and of some, their decomposition, and what it works in, in float64.
                beside = (self.record.shape[1] + 1) ** 2 * 8 * (sites + 6)
            return self.result_bytes + values * each + beside
        # What measures is done before slices are combined.
        most = min(values, slice_length(sites)) * each
        if self._measures:
            most = max(most, selection.memory(values, len(self.ranks(values))))
        return self.result_bytes + most + (4 * values * computed if self._measures else 0)


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do, decided before a tensor is read; sites are in the order of their digests."""

    recipe: Recipe
    base: Checkpoint
    base_fetched: Fetched
    contributions: tuple[Contribution, ...]
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = field(default=())
    # What was learned: for each tensor one number per contribution.
    coefficients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        """What the merge reads: the base once, and every vector once and for each pass of the survey."""
        stored = sum(record.nbytes for contribution in self.contributions for record in _records(contribution))
        kinds = sorted({kind for step in self.steps if step.is_merged for kind in step.method.from_sites})
        beside = [one.source.beside for one in self.contributions if isinstance(one.source, TaskVector)]
        moments = sum(found.tensors[kind].nbytes for found in beside for kind in kinds)
        return self.base.tensors.nbytes + stored * (1 + self.survey_passes) + moments

    @property
    def surveys(self) -> bool:
        """Whether whole vectors are measured before the first tensor is combined."""
        return self.recipe.merge.clip is not None or any(step.surveys for step in self.steps)

    @property
    def survey_passes(self) -> int:
        """How often the vectors are read before the merge itself: for norms, for ranks and for inner products."""
        surveying = [step.method for step in self.steps if step.surveys]
        ranks, products = any(one.ranks for one in surveying), any(one.kind == "site" for one in surveying)
        return (self.recipe.merge.clip is not None) + ranks + products

    @property
    def is_judged(self) -> bool:
        """Whether public images are looked at on which the sites' networks judge the fused one."""
        return self.recipe.is_judged(has_statistics=self.base.has_statistics)

    @property
    def download_bytes(self) -> int:
        """What has to come from the Hub before the merge can start."""
        return self.base_fetched.download_bytes + sum(one.fetched.download_bytes for one in self.contributions)

    @property
    def base_digest(self) -> str | None:
        """The base's content digest; of a hollow base what the vectors say it is, else None."""
        if not self.base_fetched.hollow:
            return self.base.tensors.digest
        said = {one.source.manifest.base.digest for one in self.contributions if isinstance(one.source, TaskVector)}
        return said.pop() if len(said) == 1 else None

    @property
    def write_bytes(self) -> int:
        return sum(step.record.nbytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """A bound on the memory of the merge itself beyond mapped files: some pieces, or a tensor of all sites."""
        sizes = [self.bound(step) for step in self.steps]
        return max([min(sum(sizes), MOST_BYTES), *sizes])

    def bound(self, step: Step) -> int:
        """A bound on the memory that one tensor takes, or a piece of it."""
        computed = sum(isinstance(one.source, TunedDifferences) for one in self.contributions)
        return step.peak_bytes(len(self.contributions), computed)


def _records(contribution: Contribution) -> tuple[Record, ...]:
    source = contribution.source
    if isinstance(source, TaskVector):
        return tuple(source.tensors.records.values())
    if isinstance(source, Combination):
        return tuple(source.tensors.records.values())
    return tuple(source.tuned.tensors.records.values())
