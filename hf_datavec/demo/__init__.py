"""The whole loop on a real network and real images: four sites, one recipe, an honest table.

Every step a user would take runs through the command line, printed as it can be copied.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_datavec.demo import recipes
from hf_datavec.demo.comparison import Comparison, compare
from hf_datavec.demo.material import LABELS, SITES, write_images
from hf_datavec.errors import RunError
from hf_datavec.recipe import AUTO
from hf_datavec.samples import write_network
from hf_datavec.scanners import SCANNERS, SIDE
from hf_datavec.staging import refuse_existing

TRAINING = ("--epochs", "6", "--learning-rate", "2e-3", "--batch-size", "32")


@dataclass
class Shell:
    """Prints commands as they can be copied, runs them, and keeps the time."""

    command: Callable[[Sequence[str]], int]
    say: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)

    def run(self, *arguments: object, show: bool = False) -> str:
        """Run one command; returns what it wrote to stdout. Raises: RunError when it fails."""
        words = [str(argument) for argument in arguments]
        self.say(f"$ {shlex.join(['hf-datavec', *words])}")
        begun, out = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(out):
            code = self.command(words)
        if code:
            raise RunError(f"the command above ended with exit code {code}")
        if show:
            for line in out.getvalue().splitlines():
                self.say(f"  {line}")
        self.say(f"  [{time.monotonic() - begun:.1f} s]")
        return out.getvalue()

    def step(self, text: str) -> None:
        """Say what comes next and how long it took to get here."""
        self.say(f"\n# {text}  ({time.monotonic() - self.started:.0f} s so far)")


def run(out: Path, *, seed: int, command: Callable[[Sequence[str]], int], say: Callable[[str], None]) -> None:
    """Run the demonstration into the new folder `out`.

    Raises: InputError if `out` exists or the `demo` extra is not installed; RunError if a step fails.
    """
    refuse_existing(out)
    with _told_once():
        _run(out, Shell(command, say), seed)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Tell each warning and note once: the controls' are the merge's again."""
    told: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        before = len(told)
        told.add(record.getMessage())
        return len(told) > before

    handlers = list(logging.getLogger("hf_datavec").handlers)
    for handler in handlers:
        handler.addFilter(new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(new)


def _run(out: Path, shell: Shell, seed: int) -> None:
    root = str(out) if out.is_absolute() else f"./{out}"
    shell.step("A network with real ImageNet weights, and real digits as four scanners show them")
    write_network(out / "imagenet")
    write_images(out / "images", seed=seed)
    shell.say(f"  {root}/imagenet and {root}/images/{{{','.join((*SITES, 'public', 'test'))}}}")
    shell.step("The coordinator agrees on labels and hands the study base to all")
    shell.run("init", f"{root}/imagenet", "--labels", ",".join(LABELS), "--image-size", SIDE, "-o", f"{root}/base")
    for site, scanner in zip(SITES, SCANNERS, strict=True):
        shell.step(f"{site} ({scanner} scanner) trains on its own images and shares the difference only")
        _train(shell, root, site, seed)
        shell.run("push", f"{root}/sites/{site}/vector", f"{root}/vectors/{site}")
    shell.step("The coordinator merges by recipe; nobody has to be online")
    comment = "Four sites' vectors on one base; change method, scale or mode, merge again and see what happens."
    recipes.write(out / "recipe.yaml", comment=comment, home=".", method=AUTO, mode=AUTO)
    shell.run("plan", f"{root}/recipe.yaml", show=True)
    shell.run("merge", f"{root}/recipe.yaml", "-o", f"{root}/fused", show=True)
    shell.run("inspect", *(f"{root}/vectors/{site}" for site in SITES), "--plot", f"{root}/cosines.png", show=True)
    shell.step("For comparison: one network trained on all sites' images, which hospitals may not do")
    pooled = f"{root}/sites/pooled"
    shell.run("finetune", f"{root}/base", f"{root}/images/all-sites", "-o", pooled, *TRAINING, "--seed", seed)
    shell.step("For comparison: controls and every site alone, measured on the same test images")
    comparison = compare(out, lambda *arguments: shell.run(*arguments), root)
    _finish(out, root, comparison, shell, seed)


def _train(shell: Shell, root: str, site: str, seed: int) -> None:
    tuned = f"{root}/sites/{site}/tuned"
    shell.run("finetune", f"{root}/base", f"{root}/images/{site}", "-o", tuned, *TRAINING, "--seed", seed)
    shell.run("diff", f"{root}/base", tuned, "-o", f"{root}/sites/{site}/vector")


def _finish(out: Path, root: str, comparison: Comparison, shell: Shell, seed: int) -> None:
    seconds = time.monotonic() - shell.started
    results: dict[str, Any] = {"seed": seed, "seconds": round(seconds, 1), **asdict(comparison)}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    comparison.plot(out / "accuracy.png")
    root = shlex.quote(root)
    shell.say(f"\n{comparison.table()}\n\n{comparison.reading()}\n")
    shell.say(f"plots: {root}/accuracy.png {root}/cosines.png   numbers: {root}/results.json   {seconds:.0f} s in all")
    shell.say(
        f"""
The recipe is {root}/recipe.yaml, the fused model {root}/fused. To try next:
  the paper's rule:  write `merge: {{method: sum, scale: 1.0}}`, then
    hf-datavec merge {root}/recipe.yaml -o {root}/fused-2
  classify a picture:  python -c "from transformers import pipeline; \\
    print(pipeline('image-classification', model='{root}/fused')('PICTURE.png'))"
  use your own folders:  hf-datavec finetune {root}/base YOUR_IMAGES -o tuned"""
    )
