"""A mergekit configuration written as a recipe, for people to read and go on with."""

from __future__ import annotations

from pathlib import Path

from hf_datavec import located
from hf_datavec import recipe as recipes
from hf_datavec.pipeline import lock
from hf_datavec.staging import refuse_existing

# What a mergekit user has not met before: mergekit averages BatchNorm statistics, or stops at them.
RESTORE = """
# For a network with BatchNorm, restore its statistics on public images after the merge:
# recalibrate: {mode: statistics, images: ./public-images}
"""


def convert(source: Path, output: Path, *, base: str | None = None) -> tuple[str, ...]:
    """Write the recipe that a mergekit configuration stands for; returns what its author should know.

    Raises: InputError when `output` exists, InputErrors with everything that a recipe cannot say.
    """
    refuse_existing(output)
    # A base from the command line is relative to the working folder, those in the file to the file's folder.
    given = None if base is None else lock.moved(base, Path.cwd(), source.absolute().parent)
    translation = recipes.mergekit.translate(located.read(source), base=given)
    recipes.check(translation.document)
    here, there = source.absolute().parent, output.absolute().parent
    data = translation.document.data
    data = {
        "base": lock.moved(data["base"], here, there),
        "vectors": [{**entry, "model": lock.moved(entry["model"], here, there)} for entry in data["vectors"]],
        **{key: value for key, value in data.items() if key not in ("base", "vectors")},
        "output": "./fused",
    }
    head = [f"Made from {source.name}, a mergekit configuration. Paths are relative to this file.", *translation.notes]
    text = "".join(f"# {line}\n" for line in head) + lock.dump(data) + RESTORE
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, "utf-8")
    return translation.notes
