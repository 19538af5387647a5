"""The sites' networks as a judge that needs no label: what they answer together to unlabelled public images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_datavec import agreement, recalibrate, temperature
from hf_datavec.agreement import Match
from hf_datavec.models import Network
from hf_datavec.plan import Contribution
from hf_datavec.progress import progress
from hf_datavec.recalibrate import Pictures, Sites
from hf_datavec.vector import TaskVector

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

log = logging.getLogger(__name__)

# As many images as are normalised together: divergences of two networks differ by more than their standard errors.
MOST_IMAGES = 512
# Preprocessed images that are kept for the next network, in bytes: 512 of 3 x 224 x 224 take 308 MB.
HELD_BYTES = 2**29
# A site's network is looked at with its own statistics, where it shares them, and with those of the public images.
VIEWS = ("its own", "public")


@dataclass(frozen=True)
class Ensemble:
    """What each site's network answers to the public images.

    `log_probabilities` have the shape (sites, views, n, k); NaN where a site has no such view, lacks a label or gives
    values that are not finite. `counts` (sites, k) are the images of each label that the sites declare, if all do.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    log_probabilities: Floats
    counts: Floats | None = None
    # The logits (n, k) of a head of all sites' images on the untouched base, where all sites share sums of features.
    head: Floats | None = None

    @property
    def count(self) -> int:
        """How many images were looked at."""
        return int(self.log_probabilities.shape[2])

    @property
    def is_silent(self) -> bool:
        """Whether no network gives finite answers."""
        import numpy as np

        return bool(np.isnan(self.log_probabilities).all())

    @cached_property
    def teacher(self) -> Floats:
        """The logarithms of the ensemble's probabilities (n, k): an average of logits over views, then over sites.

        Raises: ValueError when the ensemble is silent.
        """
        if self.is_silent:
            raise ValueError("no network of the ensemble gives finite answers")
        return self._with_head(agreement.pooled(self._in_one_mix))

    def taught(self, kind: str) -> Floats:
        """The logarithms of the probabilities (n, k) that a student learns, by a kind of `agreement.taught`.

        Raises: ValueError when the ensemble is silent.
        """
        if self.is_silent:
            raise ValueError("no network of the ensemble gives finite answers")
        return self._with_head(agreement.taught(kind, self._in_one_mix))

    @property
    def probabilities(self) -> Floats:
        """The ensemble's probabilities (n, k)."""
        import numpy as np

        found: Floats = np.exp(self.teacher)
        return found

    def _with_head(self, answers: Floats) -> Floats:
        """Logarithms of probabilities (n, k) in which the head has a say, if there is one.

        Its share is `agreement.skew`: a site knows little of classes that it hardly has, while the head follows from
        all images, whoever has them. It is made as sure as the sites' networks are first.
        """
        import numpy as np

        if self.head is None or self.counts is None:
            return answers
        share = agreement.skew(self.counts)
        alone = agreement.log_softmax(self.head)
        alone = agreement.log_softmax(alone / temperature.fit_ensemble(alone, np.exp(answers)))
        return agreement.log_softmax((1 - share) * answers + share * alone)

    @property
    def _in_one_mix(self) -> Floats:
        """What the members answer for the mix of classes of all sites, where they declare their images."""
        return self._members if self.counts is None else self._members + agreement.shifts(self.counts)[:, None, :]

    @cached_property
    def _members(self) -> Floats:
        """Each site's mean over its views (sites, n, k)."""
        import numpy as np

        says = ~np.isnan(self.log_probabilities)
        views = says.sum(axis=1)
        summed = np.where(says, self.log_probabilities, 0.0).sum(axis=1)
        return agreement.no_louder(np.where(views > 0, summed / np.maximum(views, 1), np.nan))

    def of_site(self, name: str) -> Floats:
        """A site's mean over its views (n, k); NaN where it has no say."""
        found: Floats = self._members[self.names.index(name)]
        return found

    def match(self, logits: Floats, labels: Sequence[str]) -> Match:
        """How a network's logits (n, its labels) for the same images relate to the ensemble."""
        import numpy as np

        if not np.isfinite(logits).all():
            return agreement.BROKEN
        return agreement.match(self.teacher, agreement.at_labels(logits, labels, self.labels))

    @property
    def sites(self) -> tuple[Match | None, ...]:
        """How each site's own network relates to the ensemble; None for one without a say."""
        import numpy as np

        return tuple(
            None if np.isnan(found).all() else agreement.match(self.teacher, found)
            for found in (self.of_site(name) for name in self.names)
        )


def held(pictures: Pictures) -> Pictures:
    """The pictures that an ensemble looks at, prepared once for all networks where memory allows."""
    some = recalibrate.fewer(pictures, MOST_IMAGES)
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def load(indices: Sequence[int]) -> torch.Tensor:
        key = tuple(indices)
        if key in kept:
            return kept[key]
        loaded = some.load(indices)
        if sum(one.nbytes for one in kept.values()) + loaded.nbytes <= HELD_BYTES:
            kept[key] = loaded
        return loaded

    return Pictures(some.count, load, some.batch_size)


def declared(sites: Sequence[Contribution], labels: Sequence[str]) -> Floats | None:
    """How many images of each label (sites, k) the sites declare, or share sums of; None where one does neither."""
    import numpy as np

    counts = [_counts(one.source) if isinstance(one.source, TaskVector) else None for one in sites]
    if not all(counts):
        return None
    return np.array([[float((one or {}).get(label, 0)) for label in labels] for one in counts])


def _counts(vector: TaskVector) -> Mapping[str, float] | None:
    if vector.manifest.examples or "features" not in vector.beside.entries:
        return vector.manifest.examples
    sums = vector.beside.feature_sums(vector.labels)
    return dict(zip(sums.labels, sums.counts.tolist(), strict=True))


def of(
    sites: Sites,
    labels: tuple[str, ...],
    pictures: Pictures,
    *,
    kept: list[Any] | None = None,
) -> Ensemble:
    """The ensemble of all sites' networks, built and looked at one after the other; every process must call it.

    Where all sites declare their images, all answer for the mix of classes of all sites together. `kept` gets each
    site's name and what its layers see of the pictures, for `relative`; it is the same pass. Warns on the log of
    networks that give values that are not finite.
    """
    import numpy as np

    names, views = tuple(one.name for one in sites.members), []
    networks = progress(sites.networks(), text="ensemble", total=len(names), unit="site")
    for one, (network, _) in zip(sites.members, networks, strict=True):
        own, seen, public = _views(network, pictures, own=one.has_statistics or not sites.base.has_statistics)
        if kept is not None and seen is not None:
            kept.append((one.name, seen))
        silent = np.full((pictures.count, len(labels)), np.nan)
        found = [
            silent if logits is None else _says(logits, network.labels, labels, f"'{one.name}', {view} statistics")
            for view, logits in zip(VIEWS, (own, public), strict=True)
        ]
        views.append(np.stack(found))
    return Ensemble(labels, names, np.stack(views), declared(sites.members, labels))


def _views(network: Network, pictures: Pictures, *, own: bool) -> tuple[Floats | None, Any, Floats | None]:
    """Logits with the network's own statistics, what its layers see, and logits with the pictures' statistics."""
    first = recalibrate.outputs(network, pictures) if own else None
    if not recalibrate.layers_of(network):
        return first, None, None
    seen, second = recalibrate.observed(network, pictures)
    return first, seen, second


def _says(logits: Floats, have: Sequence[str], labels: tuple[str, ...], name: str) -> Floats:
    """What a network says of each label (n, k); nothing at all, with a warning, where a value is not finite."""
    import numpy as np

    if not np.isfinite(logits).all():
        log.warning("warning: the network of %s gives NaN or infinite values, so it has no say", name)
        return np.full((len(logits), len(labels)), np.nan)
    return agreement.at_labels(agreement.log_softmax(logits), have, labels)
