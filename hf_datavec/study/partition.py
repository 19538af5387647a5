"""Who gets which images: test, public, and the sites; always whole groups, so that no patient is on two sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_datavec.errors import InputError, listed
from hf_datavec.study.sections import Held, Sites, Study

if TYPE_CHECKING:
    import numpy as np

    from hf_datavec.study.pictures import Table

TEST, PUBLIC, POOLED = "test", "public", "pooled"
# Networks on all sites' images: of what every network of a seed starts from, and of the base that nobody has touched.
FROM_BASE = f"{POOLED}-from-base"
# Names of parts and of networks that are no site's.
RESERVED = (
    TEST, PUBLIC, POOLED, "start",
    *(f"{name}-{budget}" for name in (POOLED, FROM_BASE) for budget in ("epochs", "steps", "rounds")),
)  # fmt: skip
# A site needs a few images to train on; a skew that leaves one with fewer is drawn again, at most so often.
FEWEST, DRAWS = 8, 100


@dataclass(frozen=True, slots=True)
class Division:
    """The places of the images of each part, and the scanner that shows each image of the study, if any does."""

    parts: Mapping[str, tuple[int, ...]]
    scanners: Mapping[int, str]

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites in their order."""
        return tuple(name for name in self.parts if name not in (TEST, PUBLIC))


def divide(study: Study, table: Table, seed: int) -> Division:
    """The parts of one seed.

    Raises: InputError when a part would have no images, or a patient is at two sites.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    members: dict[str, list[int]] = {}
    for place, group in enumerate(table.groups):
        members.setdefault(group, []).append(place)
    groups = [str(group) for group in random.permutation(sorted(members))]
    test = _held(study.test, table, groups)
    rest = [group for group in groups if group not in test]
    count = round((study.public.share or 0) * len(groups))
    public, rest = rest[:count], rest[count:]
    by_site = _sites(study.sites, table, {group: members[group] for group in rest}, random)
    chosen = {TEST: sorted(test), **({PUBLIC: public} if study.public.share else {}), **by_site}
    parts = {name: tuple(sorted(place for one in some for place in members[one])) for name, some in chosen.items()}
    for name, places in parts.items():
        if len(places) < FEWEST:
            raise InputError(
                f"the part '{name}' gets {len(places)} images with seed {seed}, expected at least {FEWEST}",
                hint="use fewer sites, other shares, or more images",
            )
    return Division(parts, _scanners(study.sites, parts, random))


def _held(held: Held, table: Table, groups: Sequence[str]) -> set[str]:
    """The groups of the test images."""
    if held.share is not None:
        return set(groups[: round(held.share * len(groups))])
    values = table.column(str(held.column))
    missing = sorted(set(held.values or ()) - set(values))
    if missing:
        raise InputError(f"no image has {listed(missing)} in '{held.column}'; it has {listed(set(values), most=12)}")
    inside = _one_value(dict(zip(range(len(values)), values, strict=True)), table, str(held.column))
    return {group for group in groups if inside[group] in (held.values or ())}


def _one_value(values: Mapping[int, str], table: Table, column: str) -> dict[str, str]:
    """The value that all images of a group have in a column. Raises: InputError when they differ."""
    found: dict[str, str] = {}
    for place, value in sorted(values.items()):
        group = table.groups[place]
        if found.setdefault(group, value) != value:
            raise InputError(
                f"the group '{group}' has two values in '{column}': '{found[group]}' and '{value}'",
                hint="a patient belongs to one side; give another group column, or clean the table",
            )
    return found


def _sites(
    sites: Sites, table: Table, members: Mapping[str, Sequence[int]], random: np.random.Generator
) -> dict[str, list[str]]:
    groups = list(members)
    if sites.make == "column":
        column = str(sites.column)
        values = dict(enumerate(table.column(column)))
        inside = _one_value({place: values[place] for some in members.values() for place in some}, table, column)
        present = sorted(set(inside.values()))
        return {_site_name(value, present): [group for group in groups if inside[group] == value] for value in present}
    names = [f"site-{number + 1}" for number in range(sites.count)]
    if sites.make == "dirichlet":
        return _skewed(sites, table, members, random)
    shares = sites.shares or (1.0,) * sites.count
    ends = [round(len(groups) * sum(shares[: index + 1]) / sum(shares)) for index in range(sites.count)]
    return {name: groups[start:end] for name, start, end in zip(names, [0, *ends], ends, strict=False)}


def slug(text: str) -> str:
    """A name as a file name, whatever a table calls its sites: no separators, no dots in front."""
    safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)
    return f"_{safe}" if safe.startswith(".") else safe


def _site_name(value: str, values: Sequence[str]) -> str:
    """The name of the site of a column's value, which is no other's and no part's."""
    name = slug(value)
    alike = [other for other in values if slug(other) == name]
    if len(alike) > 1:
        raise InputError(f"the sites {listed(alike)} would have one folder", hint="rename one of them in the table")
    return f"site-{name}" if name in RESERVED else name


def _skewed(
    sites: Sites, table: Table, members: Mapping[str, Sequence[int]], random: np.random.Generator
) -> dict[str, list[str]]:
    """Each class goes to the sites in proportions drawn from a Dirichlet distribution.

    A group counts as of the class that most of its images have. Source: arXiv 1909.06335, section 3, with the
    proportions drawn over sites for each class.
    """
    names = [f"site-{number + 1}" for number in range(sites.count)]
    label = {group: Counter(table.labels[place] for place in places).most_common(1)[0][0]
             for group, places in members.items()}  # fmt: skip
    for _ in range(DRAWS):
        found: dict[str, list[str]] = {name: [] for name in names}
        for one in sorted(set(label.values())):
            of_class = [group for group in members if label[group] == one]
            shares = random.dirichlet([float(sites.alpha or 1)] * sites.count).cumsum()
            ends = [0, *(round(len(of_class) * share) for share in shares)]
            for name, start, end in zip(names, ends, ends[1:], strict=False):
                found[name] += of_class[start:end]
        if all(sum(len(members[group]) for group in some) >= FEWEST for some in found.values()):
            return found
    raise InputError(
        f"{DRAWS} draws with alpha {sites.alpha:g} left a site with fewer than {FEWEST} images",
        hint="use a larger alpha, fewer sites, or more images",
    )


def _scanners(sites: Sites, parts: Mapping[str, tuple[int, ...]], random: np.random.Generator) -> dict[int, str]:
    """A site's images come from its scanner; test and public images from all scanners alike."""
    if not sites.scanners:
        return {}
    found = {}
    for name, places in parts.items():
        if name in (TEST, PUBLIC):
            dealt = random.permutation([sites.scanners[index % sites.count] for index in range(len(places))])
            found.update({place: str(scanner) for place, scanner in zip(places, dealt, strict=True)})
        else:
            scanner = sites.scanners[[one for one in parts if one not in (TEST, PUBLIC)].index(name)]
            found.update(dict.fromkeys(places, scanner))
    return found
