"""A mergekit configuration for a plain merge of whole models, read as a recipe.

The recipe keeps the places of what it was made from, so that whatever is wrong with it is shown in the
configuration's own lines. What a recipe cannot say is refused; what means nothing here is noted.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_datavec.errors import did_you_mean, raise_all
from hf_datavec.located import Document
from hf_datavec.recipe.mergekit.equivalents import EQUIVALENTS, Equivalent
from hf_datavec.recipe.mergekit.reading import Reading
from hf_datavec.recipe.mergekit.settings import write_settings

TOP_KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "slices", "modules",
            "tokenizer_source", "tokenizer", "chat_template")  # fmt: skip
OF_TEXT_MODELS = ("tokenizer_source", "tokenizer", "chat_template")


@dataclass(frozen=True, slots=True)
class Translation:
    """A recipe as a document, and what its author should know about how it differs."""

    document: Document
    notes: tuple[str, ...]


def is_configuration(document: Document) -> bool:
    """Whether a document is a mergekit configuration and no recipe."""
    return isinstance(document.data, dict) and "merge_method" in document.data and "vectors" not in document.data


def translate(document: Document, *, base: str | None = None) -> Translation:
    """The recipe that a configuration stands for; `base` is what its models were tuned from, if it does not say.

    Raises: InputErrors with everything that a recipe cannot say, each at its line and column.
    """
    if not isinstance(document.data, dict):
        raise document.problem((), "a mergekit configuration is a mapping with `merge_method:` and `models:`")
    reading = Reading(document, list(document.problems))
    _refuse_parts(reading)
    method, models = _method(reading), _models(reading)
    if method is not None and models is not None:
        start = _base(reading, method, base)
        if start is not None:
            reading.data["base"] = start
            write_settings(reading, method, models)
            _write_type(reading)
    reading.problems.sort(key=lambda problem: problem.place)
    raise_all(reading.problems)
    made = Document(document.name, document.lines, reading.data, reading.keys, reading.values)
    return Translation(made, tuple(reading.notes))


def _refuse_parts(reading: Reading) -> None:
    reading.refuse_unknown((), TOP_KEYS)
    for key in ("slices", "modules"):
        if key in reading.document.data:
            hint = "list whole models under 'models:'; merge.overrides of a recipe treats single tensors differently"
            reading.refuse((key,), f"'{key}:' joins parts of models, which a recipe cannot say", at="key", hint=hint)
    for key in OF_TEXT_MODELS:
        if key in reading.document.data:
            reading.notes.append(f"'{key}' is left out: an image classifier has no use for it")


def _method(reading: Reading) -> Equivalent | None:
    if "merge_method" not in reading.document.data:
        reading.refuse((), "'merge_method:' is missing", at="key")
        return None
    name = reading.document.data["merge_method"]
    if not isinstance(name, str) or name not in EQUIVALENTS:
        hint = did_you_mean(str(name), EQUIVALENTS, listing=False) or f"known: {', '.join(sorted(EQUIVALENTS))}"
        reading.refuse(("merge_method",), f"a recipe has no equal of mergekit's method '{name}'", hint=hint)
        return None
    found = EQUIVALENTS[name]
    reading.put(("merge", "method"), found.method, ("merge_method",))
    reading.notes += found.notes
    return found


def _models(reading: Reading) -> list[str] | None:
    """The models by name, if every entry is what it must be."""
    data, before = reading.document.data, len(reading.problems)
    listed = data.get("models")
    if not isinstance(listed, list) or not listed:
        if not {"slices", "modules"} & set(data):
            reading.refuse(("models",), "'models:' must list the models to merge", at="key")
        return None
    for index, entry in enumerate(listed):
        if not isinstance(entry, dict):
            reading.refuse(("models", index), "expected a mapping with 'model:'")
            continue
        reading.refuse_unknown(("models", index), ("model", "parameters"))
        _refuse_name(reading, ("models", index, "model"))
    return None if len(reading.problems) > before else [entry["model"] for entry in listed]


def _refuse_name(reading: Reading, path: tuple[str | int, ...]) -> None:
    value = reading.at(path)
    if not isinstance(value, str) or not value:
        reading.refuse(path, "expected the name of a model as text")
    elif "+" in value:
        hint = "merge the adapter into its model first, for example with PEFT's merge_and_unload"
        reading.refuse(path, f"'{value}' is a model with a LoRA adapter, which a recipe cannot say", hint=hint)


def _base(reading: Reading, method: Equivalent, given: str | None) -> str | None:
    named = reading.document.data.get("base_model")
    if named is not None:
        _refuse_name(reading, ("base_model",))
        reading.mark(("base",), ("base_model",))
    if given is not None:
        return given
    if isinstance(named, str) and not method.between:
        return named
    hint = "name it: hf-datavec convert --base MODEL"
    if named is not None:
        problem = "this base_model is one of the two ends; a recipe needs what all were fine-tuned from"
        reading.refuse(("base_model",), problem, hint=hint)
    else:
        problem = "no 'base_model:' is given; a recipe needs what all were fine-tuned from"
        also = "" if method.between else ", or base_model: MODEL"
        reading.refuse(("merge_method",), problem, about=(), hint=f"{hint}{also}")
    return None


def _write_type(reading: Reading) -> None:
    for key in ("dtype", "out_dtype"):  # the first is what mergekit computes in; the second, if given, the result
        if reading.document.data.get(key) is not None:
            reading.put(("dtype",), str(reading.document.data[key]).removeprefix("torch."), (key,))
