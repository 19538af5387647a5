"""The record beside a vector: what it was computed from, what it holds and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_datavec.checkpoint import Role
from hf_datavec.errors import InputError, listed
from hf_datavec.lineage import Round

MANIFEST_FILE = "datavec.json"
VECTOR_FILE = "vector.safetensors"
AGAIN = "make the vector again with `hf-datavec diff`"
FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Label = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BaseIdentity(_Part):
    """The base that a vector belongs to: where it was found and, binding, the digest of its content.

    `files` are the SHA-256 of a Hub repo's weight files, by which a base can be told from headers alone.
    """

    id: str
    commit: str | None = None
    digest: str
    files: dict[str, str] | None = None


class TensorEntry(_Part):
    """One tensor of the base; `stored` says whether the vector holds its difference."""

    role: Role = Field(strict=False)
    shape: tuple[int, ...] = Field(strict=False)
    dtype: str
    stored: bool


class SecondMoment(_Part):
    """One file of second moments beside the vector: the digest of its tensors and how many images it is of.

    `only` says that nothing but the head had moved, so that the file is of the head alone.
    """

    content: str
    images: int = Field(ge=1)
    only: Literal["head"] | None = None


class StatisticsNoise(_Part):
    """The Gaussian noise on the statistics; `bound` is the assumed root mean square of one image's contributions.

    `sensitivity` and `sigma` are in units of the base's standard deviations (of its variances, for mean squares).
    """

    epsilon: Positive
    delta: Positive
    bound: Positive
    sensitivity: Positive
    sigma: Positive


class Manifest(_Part):
    """The content of `datavec.json`: `content` is the digest of the tensors, `digest` that of all the rest.

    So one digest pins labels, counts, roles and base as well as every bit of the tensors. `norm` is the length of
    the whole vector without head and statistics, so that a coordinator sees it before any download.
    """

    format: int = FORMAT
    base: BaseIdentity
    content: str
    digest: str = ""
    labels: tuple[Label, ...] = Field(strict=False, min_length=1)
    examples: dict[str, Count] | None = None
    training: dict[str, Any] | None = None
    noise: StatisticsNoise | None = None
    # The temperature that fits the tuned network best on images that its site held out.
    temperature: Positive | None = None
    norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tensors: dict[str, TensorEntry]
    second_moments: dict[Literal["fisher", "gram", "features"], SecondMoment] | None = None
    # The merges behind the base, when it was fused in an earlier round.
    lineage: tuple[Round, ...] | None = Field(default=None, strict=False)
    tools: dict[str, str]

    @property
    def has_statistics(self) -> bool:
        """Whether the vector carries the site's BatchNorm running statistics."""
        return any(entry.stored for entry in self.tensors.values() if entry.role is Role.STATISTIC)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """The tensors that the vector holds."""
        return {name: entry for name, entry in self.tensors.items() if entry.stored}

    def sealed(self) -> Manifest:
        """The same manifest with the digest that belongs to it."""
        return self.model_copy(update={"digest": self.own_digest()})

    def own_digest(self) -> str:
        """BLAKE3 over everything here but the digest itself, as canonical JSON."""
        fields = self.model_dump(mode="json", exclude={"digest"}, exclude_none=True)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return f"blake3:{blake3(text.encode()).hexdigest()}"

    def write(self, folder: Path) -> None:
        """Write `datavec.json` into a vector folder."""
        text = self.model_dump_json(indent=2, exclude_none=True)
        (folder / MANIFEST_FILE).write_text(text + "\n", "utf-8")


def read(folder: Path) -> Manifest:
    """The manifest in a vector folder.

    Raises: InputError when it is missing, damaged or of a newer format.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        what = "a model: write {model: ...} for it" if (folder / "config.json").exists() else "not a vector"
        raise InputError(f"'{folder}' has no {MANIFEST_FILE}: it is {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    try:
        _refuse_newer(path, text)
        found = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"'{path}' is damaged: {place}: {first['msg']}") from None
    strange = set(found.examples or ()) - set(found.labels)
    if strange:
        raise InputError(f"'{path}' counts images of labels that it does not name: {listed(strange)}", hint=AGAIN)
    repeated = {label for label in found.labels if found.labels.count(label) > 1}
    if repeated:
        raise InputError(f"'{path}' names a label twice: {listed(repeated)}", hint=AGAIN)
    if found.digest != found.own_digest():
        raise InputError(
            f"'{path}' was changed after it was written: digest {found.own_digest()[:19]}..., "
            f"expected {found.digest[:19]}...",
            hint="a manifest is not edited by hand; ask the site to send its vector again",
        )
    return found


def _refuse_newer(path: Path, text: str) -> None:
    # Looked at first: a newer format may mean something else by the same fields.
    newer = _format_of(text)
    if newer is not None and newer > FORMAT:
        raise InputError(f"'{path}' has format {newer}, this version reads {FORMAT}", hint="upgrade hf-datavec")


def _format_of(text: str) -> int | None:
    try:
        found = json.loads(text).get("format")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None
