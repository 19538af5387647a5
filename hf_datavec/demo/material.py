"""What the demonstration works on: real digits split over sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_datavec.samples import digits as sample_digits
from hf_datavec.scanners import SCANNERS, write_digits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SITES = tuple(f"site-{letter}" for letter in "abcd")
LABELS = tuple(str(digit) for digit in range(10))
PER_SITE = 400
PUBLIC = 400
TEST = 1000
# Each site sees its own classes three times as often as the others.
SKEW = 3.0


def write_images(folder: Path, *, seed: int) -> None:
    """Write one image folder per site, `all-sites`, `public` and `test`, all disjoint but for `all-sites`."""
    import numpy as np

    digits, labels = sample_digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits))
    parts = {"test": order[:TEST], "public": order[TEST : TEST + PUBLIC]}
    for number, (name, part) in enumerate(parts.items()):
        # Public and test images come from all scanners alike.
        for scanner, share in zip(SCANNERS, np.array_split(part, len(SCANNERS)), strict=True):
            write_digits(folder / name, digits[share], labels[share], scanner, seed=seed * 100 + number)
    rest = order[TEST + PUBLIC :]
    for number, (site, scanner) in enumerate(zip(SITES, SCANNERS, strict=True)):
        chosen = _site_part(rest, labels, number)
        rest = np.setdiff1d(rest, chosen, assume_unique=True)
        for place in (site, "all-sites"):
            write_digits(folder / place, digits[chosen], labels[chosen], scanner, seed=seed * 100 + 10 + number)


def _site_part(available: NDArray[np.int64], labels: NDArray[np.int64], site: int) -> NDArray[np.int64]:
    """The images of one site: `PER_SITE` of them, its own classes `SKEW` times as often as the others."""
    import numpy as np

    weights = np.array([SKEW if digit % len(SITES) == site else 1.0 for digit in range(10)])
    exact = PER_SITE * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    for digit in np.argsort(counts - exact, kind="stable")[: PER_SITE - counts.sum()]:
        counts[digit] += 1
    return np.concatenate([available[labels[available] == digit][:count] for digit, count in enumerate(counts)])
