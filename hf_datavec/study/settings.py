"""What was compared under which conditions, as a report begins with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hf_datavec.recipe import Section
from hf_datavec.study.networks import Seed
from hf_datavec.study.sections import Study


def described(seed: Seed) -> Iterator[tuple[str, str]]:
    """The settings of a study by name; sizes are those of a first seed."""
    study, table = seed.place.study, seed.place.table
    labels = ", ".join(f"{label} {count}" for label, count in sorted(Counter(table.labels).items()))
    groups = f", {len(set(table.groups))} groups by {study.data.group}" if study.data.group else ", no groups"
    yield "data", f"{study.data.images}: {len(table.labels)} images{groups}; {labels}"
    sizes = {name: len(places) for name, places in seed.division.parts.items()}
    sites = ", ".join(f"{name} {sizes[name]}" for name in seed.sites)
    yield "sites", f"{_told(study.sites)}; images in the first seed: {sites}"
    yield "test images", f"{sizes['test']} ({_told(study.test)})"
    yield "public images", "; ".join(_public(seed, study))
    yield "network", study.base + (f", {study.image_size} px" if study.image_size else "")
    yield "training", _told(study.training)
    for name in ("start", "relay", "heads", "federated"):
        if (chosen := getattr(study, name)) is not None:
            yield name, _told(chosen) or "as by default"
    yield "seeds", ", ".join(map(str, study.seeds))


def _public(seed: Seed, study: Study) -> Iterator[str]:
    yield f"{study.public.images or 'of the same data'}: {min(len(seed.public), study.public.count)} images"
    for one in study.more_public:
        yield f"{one.name}: {min(len(seed.shown(one.name)), one.count)} images of {one.images}"


def _told(section: Section) -> str:
    """A section's keys and values in words, without what is not set."""
    return ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in section.model_dump().items()
                     if value not in (None, (), False, {}))  # fmt: skip


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(_value(one) for one in value.values() if one not in ({}, "equal"))
    if isinstance(value, list | tuple):
        return " / ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else "yes" if value is True else str(value)
