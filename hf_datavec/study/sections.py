"""The sections of a study file: what may be written, of which type and range."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from hf_datavec.examples import Augment
from hf_datavec.probe import TARGET
from hf_datavec.recipe import AUTO, Finite, ScaleValue, Section, Text, Tune

Mode = Literal["none", "statistics", "moments", "relative", "repair", "tune", "auto"]
Scanner = Literal["faint", "inverted", "blurred", "shaded"]
# The modes that measure something on public images.
LOOK_AT_IMAGES = ("statistics", "relative", "repair", "tune", "auto")
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Data(Section):
    """The images: a folder, a data set, or `demo`; `group` is the column of patients, who stay on one side."""

    images: Text
    split: Text | None = None
    label: Text | None = None
    group: Text | None = None
    # How many of the images, drawn at random once for all seeds; without it, all.
    count: Count | None = None


class Sites(Section):
    """How sites are made of the groups that are neither test nor public."""

    make: Literal["random", "column", "dirichlet", "scanners"] = "random"
    count: Annotated[int, Field(ge=2, le=100)] = 4
    column: Text | None = None
    alpha: Positive | None = None
    shares: Annotated[tuple[Positive, ...], Field(min_length=2, strict=False)] | None = None
    scanners: Annotated[tuple[Scanner, ...], Field(min_length=2, strict=False)] | None = None


class Held(Section):
    """The test images: a share of the groups, or the groups with these values in a column."""

    share: Share | None = None
    column: Text | None = None
    values: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] | None = None


class Public(Section):
    """The public images: a share of the groups, or another data set whose labels need not be the same."""

    share: Share | None = None
    images: Text | None = None
    split: Text | None = None
    count: Count = 512


def _known_name(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9]*([ -][a-z0-9]+)*", value):
        return value
    raise PydanticCustomError("name", "expected lower-case words")


class NamedPublic(Section):
    """One more set of public images, under the name that tables call it.

    Merges are restored on it as well, on the same networks; no network is trained on it.
    """

    name: Annotated[Text, BeforeValidator(_known_name)]
    images: Text
    split: Text | None = None
    count: Count = 512


class Training(Section):
    """How every network is trained; the keys are those of `hf-datavec finetune`."""

    epochs: Positive = 10.0
    batch_size: Count = 32
    learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    class_balanced: bool = False
    augment: Augment = "none"
    freeze: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    probe_steps: Annotated[int, Field(ge=0)] = 0


class Start(Section):
    """A round of heads before everything else, so that networks follow a head that knows all sites' labels, not zeros.

    Every site fits a head to the base by so many steps; the mean of the heads is what all networks of a seed, pooled
    ones as well, start from. Pooled networks are trained from the base as it is, too, in rows of their own.
    """

    steps: Count = 60


class Combining(Section):
    """One way to merge, as in a recipe's `merge:`."""

    method: Text = "sum"
    scale: ScaleValue = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Literal["equal", "examples"] = "equal"

    @property
    def name(self) -> str:
        """What tables call it."""
        options = "".join(f", {key} {value}" for key, value in self.options.items())
        weights = ", by examples" if self.weights == "examples" else ""
        if self.method == AUTO:
            return AUTO
        scale = self.scale if isinstance(self.scale, str) else f"{self.scale:g}"
        return f"{self.method} x {scale}{options}{weights}"


class Federated(Section):
    """FedAvg, the reference of many rounds: weights and statistics are averaged by image counts after each."""

    rounds: Annotated[int, Field(ge=1)] = 4


class Relay(Section):
    """Rounds of merging: the fused model of one is the base of the next."""

    rounds: Annotated[int, Field(ge=2)] = 2

    # Of every round, those before `heads:` as well; without it, the study's epochs are shared out over the rounds.
    epochs: Positive | None = None

    # Whether each round but the first begins with heads that the sites fitted to the fused model, as `heads:` says.
    heads: bool = False
    merge: Combining = Combining(scale=0.5)
    restore: Mode = "statistics"


class Heads(Section):
    """A last round that costs a site seconds: everyone fits a head to the fused network, and heads are merged.

    Heads fitted by `steps` are averaged; those by `least_squares` are merged by `regmean`, which gives the head of all
    sites' images together. `merge` and `restore` are those of the rounds before.
    """

    fit: Literal["steps", "least_squares"] = "steps"

    # Up to how many rounds of merging come before it, of as many epochs as those of `relay:`; each number has a row.
    rounds: Annotated[int, Field(ge=1)] = 1

    # A head that is fitted to the end fits its site; the mean of heads was better after some tens (docs/evidence.md).
    steps: Count = 60

    # What heads by least squares aim at for an image's label: how sure their answers are, not which they are.
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)] = TARGET
    merge: Combining = Combining(scale=0.5)
    restore: Mode = "statistics"


class Study(Section):
    """One experiment: data, sites, training, and every way to merge that shall be compared."""

    data: Data
    base: Text
    image_size: Count | None = None
    sites: Sites = Sites()
    test: Held = Held(share=0.2)
    public: Public = Public(share=0.1)
    more_public: Annotated[tuple[NamedPublic, ...], Field(strict=False)] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)] = (0, 1, 2)
    start: Start | None = None
    training: Training = Training()
    merges: Annotated[tuple[Combining, ...], Field(min_length=1, strict=False)] = (Combining(),)
    restore: Annotated[tuple[Mode, ...], Field(min_length=1, strict=False)] = ("none", "statistics")
    # The scales of the curves of the sum.
    curve: Annotated[tuple[Finite, ...], Field(strict=False)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    # Pooled at equal epochs takes n times the steps of a site; at equal steps it does not. `rounds` are the epochs of
    # all rounds of `relay:` together.
    budgets: Annotated[tuple[Literal["epochs", "steps", "rounds"], ...], Field(strict=False)] = ("epochs", "steps")
    # The control of trivial features: a random forest on colours, corners, black pixels and edges (extra `study`).
    trivial: bool = True
    # After the first merge: the fused network learns from the sites' networks, as a recipe's `tune: {loss: ensemble}`;
    # and, in a further row, its confidence is set to theirs, as a recipe's `temperature: ensemble`.
    distil: Tune | None = None

    # Sites also share sums of the base's features, so that `auto` may take the head that all their images give.
    features: bool = False
    federated: Federated | None = None
    relay: Relay | None = None
    heads: Heads | None = None
    output: Text | None = None
