"""The sections of a recipe: what may be written, of which type and range."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# Chosen from the vectors' geometry (docs/choosing.md).
AUTO = "auto"
Dtype = Literal["float32", "float16", "bfloat16"]


class Section(BaseModel):
    """A mapping that knows its keys and their types; nothing else is let in."""

    # `strict`: the text "2" is no number here; YAML already knows the difference.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _known_length(value: Any) -> Any:
    # Said in one sentence; a union of two types would give one message for each.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or value == "median" or (number and 0 < value < math.inf):
        return value
    raise PydanticCustomError("length", "expected 'median' or a number above 0")


Clip = Annotated[Literal["median"] | Annotated[float, Field(gt=0)], BeforeValidator(_known_length)]


class VectorEntry(Section):
    """A site's vector; `weight` counts for methods that weigh, `name` is what tables call it."""

    vector: Text
    revision: Text | None = None
    weight: Finite | None = None
    name: Text | None = None


class ModelEntry(Section):
    """A site's whole tuned model, whose vector is computed on the way."""

    model: Text
    revision: Text | None = None
    weight: Finite | None = None
    name: Text | None = None


def _entry_kind(value: Any) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return "<text>"
    is_model = isinstance(value, ModelEntry) or (isinstance(value, dict) and "model" in value)
    return "<model>" if is_model else "<vector>"


# Pydantic puts the tag of the branch into an error's path; the brackets tell it from a key.
Entry = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[ModelEntry, Tag("<model>")] | Annotated[VectorEntry, Tag("<vector>")],
    Discriminator(_entry_kind),
]


class Override(Section):
    """Another method, options or scale for the tensors whose whole name matches a regular expression."""

    tensors: Text
    method: Text | None = None
    options: dict[str, Any] | None = None
    scale: Finite | None = None


class Measured(Section):
    """Labelled public images that choices are measured on, and the metric that decides."""

    images: Text
    split: Text | None = None
    # Sites differ in their class mix, so that plain accuracy would favour whatever guesses the common class.
    metric: Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "brier"] = "balanced_accuracy"
    batch_size: Annotated[int, Field(ge=1)] = 64


class ScaleSearch(Measured):
    """The values of `scale` to try."""

    # Each value costs one pass over the images; beyond a hundred the gaps are below what a metric can tell.
    search: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=100, strict=False)]


class WeightSearch(Measured):
    """The sites' weights are found by doubling or halving one at a time, in at most `rounds` rounds."""

    search: Literal["coordinate"]
    rounds: Annotated[int, Field(ge=1, le=100)] = 6


def _searches(value: Any) -> str:
    return "<search>" if isinstance(value, (dict, Measured)) else "<value>"


def _known_scale(value: Any) -> Any:
    # Said in one sentence; a union of two types would give one message for each.
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value == AUTO or number:
        return value
    raise PydanticCustomError("scale", "expected 'auto' or a finite number")


ScaleValue = Annotated[Literal["auto"] | Finite, BeforeValidator(_known_scale)]
Scale = Annotated[
    Annotated[ScaleValue, Tag("<value>")] | Annotated[ScaleSearch, Tag("<search>")], Discriminator(_searches)
]
Weights = Annotated[
    Annotated[Literal["equal", "examples"], Tag("<value>")] | Annotated[WeightSearch, Tag("<search>")],
    Discriminator(_searches),
]


class Merge(Section):
    """How the vectors are combined; `scale` is the lambda that the result is multiplied with.

    `clip` shortens every site's vector to at most this norm, or to at most the median of the sites' norms.
    """

    method: Text = "sum"
    scale: Scale = 1.0
    options: dict[str, Any] = {}
    weights: Weights = "equal"
    clip: Clip | None = None
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def searched(self) -> ScaleSearch | WeightSearch | None:
        """What is found by measuring, if anything is."""
        return next((one for one in (self.scale, self.weights) if isinstance(one, (ScaleSearch, WeightSearch))), None)

    @property
    def factor(self) -> float:
        """The scale; NaN as long as it is searched for or `auto`."""
        known = isinstance(self.scale, (int, float)) and self.method != AUTO
        return float(self.scale) if known else math.nan  # type: ignore[arg-type]

    @property
    def automatic(self) -> bool:
        """Whether the vectors' geometry decides; `method: auto` brings its own scale."""
        return AUTO in (self.method, self.scale)


# What the weights are tuned to, which weights, and how the sites' answers become one.
Loss = Literal["labels", "entropy", "ensemble"]
Trained = Literal["affine", "head", "all"]
Teacher = Literal["logits", "probabilities", "confidence"]


class Tune(Section):
    """How weights are tuned; without `loss`, labels are used where the images have them, else entropy.

    With `loss: ensemble` the network learns from the sites' networks, after whatever mode. It takes `epochs` and the
    keys below it, the other losses take `steps`. Without `parameters`, `ensemble` trains all weights, the others
    `affine`.
    """

    parameters: Trained | None = None
    loss: Loss | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    # A few passes over some hundred images; more is training, which `finetune` does better.
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    epochs: Annotated[int, Field(ge=1, le=1000)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 32
    teacher: Teacher = "logits"
    mixup: bool = True
    augment: Literal["none", "turns", "crops"] = "none"
    # How many variants of each image an `augment` prepares, the image as it is among them.
    copies: Annotated[int, Field(ge=1, le=64)] = 8

    @property
    def trained(self) -> Trained:
        """Which weights are trained."""
        return self.parameters or ("all" if self.loss == "ensemble" else "affine")

    @property
    def variants(self) -> int:
        """In how many variants each image is shown."""
        return 1 if self.augment == "none" else self.copies


# What is done about the confidence of answers where a recipe does not say it.
TEMPERATURE: Literal["none"] = "none"
# The temperatures that are fitted on the calibration images.
FITTED = ("labels", "ensemble")


def _known_temperature(value: Any) -> Any:
    # Said in one sentence; a union of two types would give one message for each.
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if number or value in ("none", "labels", "ensemble", "sites", AUTO):
        return value
    problem = "expected 'none', 'labels', 'ensemble', 'sites', 'auto' or a number above 0"
    raise PydanticCustomError("temperature", problem)


Temperature = Annotated[
    Literal["none", "labels", "ensemble", "sites", "auto"] | Annotated[float, Field(gt=0)],
    BeforeValidator(_known_temperature),
]


class Recalibrate(Section):
    """How BatchNorm layers and confidence are restored; `images` are public, their labels are looked at by `tune` and
    `temperature: labels` alone.

    `count` is how many are looked at, at most: beyond 512, not more than it takes for the standard error of every
    layer's statistics to be at most `tolerance` standard deviations.
    """

    mode: Literal["none", "statistics", "moments", "relative", "repair", "tune", "auto"] = "statistics"
    images: Text | None = None
    split: Text | None = None
    count: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 64
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05
    tune: Tune | None = None
    temperature: Temperature = TEMPERATURE

    @property
    def tuning(self) -> Tune:
        """The steps of mode `tune`."""
        return self.tune or Tune()

    @property
    def distils(self) -> bool:
        """Whether the fused network then learns from the sites' networks."""
        return self.tune is not None and self.tune.loss == "ensemble"

    @property
    def looks_at_images(self) -> bool:
        """Whether the mode restores on images, if there are any."""
        return self.mode not in ("none", "moments") and self.images is not None

    @property
    def fits_temperature(self) -> bool:
        """Whether a temperature is fitted on images, if there are any."""
        return self.temperature in (*FITTED, AUTO) and self.images is not None


class Evaluate(Section):
    """Labelled images that the fused model is measured on."""

    images: Text
    split: Text | None = None
    batch_size: Annotated[int, Field(ge=1)] = 64


class Push(Section):
    """Where the fused model goes: a Hub repo or a local folder; `create_pr` proposes it instead."""

    repo: Text
    private: bool = True
    revision: Text | None = None
    create_pr: bool = False


class LockedInput(Section):
    """The commit and the content digest of one input."""

    reference: Text
    commit: Text | None = None
    digest: Text | None = None


class Lock(Section):
    """What a run really used, so that it can be had again."""

    base: LockedInput
    vectors: Annotated[tuple[LockedInput, ...], Field(strict=False)]
    calibration: LockedInput | None = None
    evaluation: LockedInput | None = None
    search: LockedInput | None = None
    # What `adamerging` learned: for each tensor one number per vector, in the order of `vectors`.
    coefficients: dict[str, Annotated[tuple[Finite, ...], Field(strict=False)]] | None = None
    tools: dict[str, str]


class Recipe(Section):
    """A merge: base, vectors, how to combine, restore and measure, and where the result goes.

    With `aliases` the fused model's folder names the sites site-1, site-2, ... and no repo of theirs. With `round` the
    base must have been fused in that many rounds less one.
    """

    base: Text
    vectors: Annotated[tuple[Entry, ...], Field(min_length=1, strict=False)]
    merge: Merge = Merge()
    recalibrate: Recalibrate | None = None
    evaluate: Evaluate | None = None
    output: Text | None = None
    dtype: Dtype | None = None
    push: Push | None = None
    aliases: bool = False
    round: Annotated[int, Field(ge=1)] | None = None
    lock: Lock | None = None

    def is_judged(self, *, has_statistics: bool) -> bool:
        """Whether public images are looked at on which the sites' networks judge the fused one.

        Of a network without BatchNorm statistics only where `auto`, learning or a temperature asks for it: nothing else
        looks at images then.
        """
        restore = self.recalibrate
        if restore is None or restore.images is None:
            return False
        asked = self.merge.automatic or restore.distils or restore.fits_temperature
        return asked or (restore.looks_at_images and has_statistics)

    @property
    def distils(self) -> bool:
        """Whether the fused network learns from the sites' networks."""
        return self.recalibrate is not None and self.recalibrate.distils

    @property
    def entries(self) -> tuple[VectorEntry | ModelEntry, ...]:
        """The contributions, each in its long form."""
        return tuple(VectorEntry(vector=entry) if isinstance(entry, str) else entry for entry in self.vectors)
