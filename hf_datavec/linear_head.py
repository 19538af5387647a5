"""A linear head in closed form, from sums of features that sites share in place of their images.

The ridge regression of one-hot labels on features needs nothing of the images but sums over them. So the sums of all
sites give the very head that all their images together would give, whoever has which class.

Source: arXiv 2405.16240 (analytic federated learning).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

# From next to nothing to features that count for nothing, two values a decade. Relative to the features' mean variance,
# so that neither their scale nor the number of images matters.
PENALTIES = tuple(10 ** (half / 2) for half in range(-12, 5))
# Where no second site can judge: a hundredth of the mean variance, in the middle of the grid.
PENALTY = 1e-2
# What outputs for an image's own label are multiplied to. The softmax of such outputs was about as sure as right on
# PAD-UFES-20 (60 % right); where nearly all is right, as on the digits, 7.5 was (docs/evidence.md).
SHARPNESS = 3.0


@dataclass(frozen=True, slots=True)
class FeatureSums:
    """Sums over images with `g = (feature, 1)`: of g g^T (d+1, d+1), and of g by label (k, d+1), in float64."""

    labels: tuple[str, ...]
    products: Matrix
    by_label: Matrix

    @property
    def images(self) -> float:
        """How many images there are."""
        return float(self.products[-1, -1])

    @property
    def counts(self) -> Matrix:
        """How many images each label has, shape (k,)."""
        return self.by_label[:, -1]

    def aligned(self, labels: Sequence[str]) -> FeatureSums:
        """The same sums with rows for other labels, by name; zero for a label that is absent here.

        Labels that are not asked for keep their images in `products`: these are images of none of the labels.
        """
        import numpy as np

        row_of = {label: row for row, label in enumerate(self.labels)}
        rows = np.zeros((len(labels), self.by_label.shape[1]))
        for row, label in enumerate(labels):
            if label in row_of:
                rows[row] = self.by_label[row_of[label]]
        return FeatureSums(tuple(labels), self.products, rows)


@dataclass(frozen=True, slots=True)
class Head:
    """Weights (k, d) and bias (k,), the penalty behind them, and the error of each penalty on sites left out."""

    labels: tuple[str, ...]
    weights: Matrix
    bias: Matrix
    penalty: float
    errors: tuple[float, ...]


def total(sums: Sequence[FeatureSums]) -> FeatureSums:
    """The sums over all images of all sites; labels are the union, in the order in which they are first seen."""
    labels = tuple(dict.fromkeys(label for one in sums for label in one.labels))
    aligned = [one.aligned(labels) for one in sums]
    products = reduce(lambda left, right: left + right, (one.products for one in aligned))
    return FeatureSums(labels, products, reduce(lambda left, right: left + right, (one.by_label for one in aligned)))


def ridge(sums: FeatureSums, penalty: float) -> Matrix:
    """The W (k, d+1) that minimises `sum |y - W g|^2 + l |W without its last column|^2` over the images.

    y are one-hot labels; `l` is `penalty` times the trace of the centred features' products, divided by d. The last
    column is the intercept, which is not penalised.
    """
    return _solver(sums)(penalty)


def _solver(sums: FeatureSums) -> Callable[[float], Matrix]:
    """What solves the ridge regression for any penalty, after one decomposition."""
    import numpy as np

    images = max(1.0, sums.images)
    mean, shares = sums.products[-1, :-1] / images, sums.counts / images
    centred = sums.products[:-1, :-1] - images * np.outer(mean, mean)
    values, directions = np.linalg.eigh((centred + centred.T) / 2)
    # Variances that rounding has made negative.
    values = values.clip(min=0.0)
    pulls = (sums.by_label[:, :-1] - np.outer(sums.counts, mean)) @ directions

    def solve(penalty: float) -> Matrix:
        below = values + penalty * float(values.mean())
        # Features that are the same for all images tell nothing.
        found = np.divide(pulls, below, out=np.zeros_like(pulls), where=below > 0) @ directions.T
        return np.column_stack([found, shares - found @ mean])

    return solve


def squared_error(weights: Matrix, sums: FeatureSums) -> float:
    """The sum of `|y - W g|^2` over the images, from their sums alone; rows of `weights` are those of the sums."""
    import numpy as np

    # An image whose label has no row has a one-hot label of zeros.
    own = float(sums.counts.sum())
    crossed = float(np.vdot(weights, sums.by_label))
    return own - 2 * crossed + float(np.vdot(weights @ sums.products, weights))


def score(weights: Matrix, sums: FeatureSums) -> float:
    """The mean squared error of a head's outputs (k, d+1) on one-hot labels: a judge with labels that shows no image.

    A head whose outputs are multiplied by a sharpness is judged before that.
    """
    return squared_error(weights, sums) / max(1.0, sums.images)


def leave_one_site_out(
    sites: Sequence[FeatureSums], penalties: Sequence[float] = PENALTIES
) -> tuple[float, tuple[float, ...]]:
    """The penalty whose heads of all other sites err least on each site, and the mean squared error of each penalty.

    Of penalties that err alike the largest is taken. With fewer than two sites that have images there is nobody to
    judge: it is `PENALTY`, and there are no errors.
    """
    import numpy as np

    some = [one for one in sites if one.images > 0]
    if len(some) < 2:
        return PENALTY, ()
    labels = total(some).labels
    some = [one.aligned(labels) for one in some]
    errors = np.zeros(len(penalties))
    for place, one in enumerate(some):
        solve = _solver(total([*some[:place], *some[place + 1 :]]))
        errors += [squared_error(solve(penalty), one) for penalty in penalties]
    errors /= sum(one.images for one in some)
    _, least = min(zip(errors, (-penalty for penalty in penalties), strict=True))
    return -least, tuple(float(error) for error in errors)


def pooled_head(sites: Sequence[FeatureSums], *, penalty: float | None = None, sharpness: float = SHARPNESS) -> Head:
    """The head that ridge regression on all sites' images together gives, its outputs times `sharpness`.

    Without a `penalty` the sites choose it by `leave_one_site_out`. Least squares on one-hot labels make no calibrated
    logits, and no sums tell how sure a softmax should be: `sharpness` is a default, which decides how sure answers are,
    not which they are.
    """
    chosen, errors = leave_one_site_out(sites) if penalty is None else (penalty, ())
    sums = total(sites)
    found = sharpness * ridge(sums, chosen)
    return Head(sums.labels, found[:, :-1], found[:, -1], chosen, errors)
