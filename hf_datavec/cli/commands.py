"""What each command does with its options, and how its result is shown."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from hf_datavec import processes


def _say(text: str) -> None:
    if processes.is_main():
        sys.stdout.write(text + "\n")


def _say_json(data: Any) -> None:
    _say(json.dumps(data, indent=2, allow_nan=False))


def _labels(text: str) -> list[str]:
    # As a line of a table, so that a label may hold a comma in quotes.
    return [label.strip() for label in next(csv.reader([text], skipinitialspace=True), [])]


def demo(options: Namespace) -> None:
    """Run the demonstration; it runs other commands through this command line."""
    from hf_datavec.cli import main
    from hf_datavec.demo import run

    run(options.out, seed=options.seed, command=main, say=_say)


def init(options: Namespace) -> None:
    from hf_datavec.pipeline import site

    labels = _labels(options.labels)
    _say(str(site.init(options.base, labels, options.output, image_size=options.image_size)))


def finetune(options: Namespace) -> None:
    from hf_datavec.finetune import Settings, read_record
    from hf_datavec.pipeline import site
    from hf_datavec.tables import table

    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        schedule=options.schedule,
        class_balanced=options.class_balanced,
        augment=options.augment,
        freeze=tuple(options.freeze),
        seed=options.seed,
        probe_steps=options.probe_steps,
        least_squares=options.least_squares,
        hold_out=options.hold_out,
        **({} if options.target is None else {"target": options.target}),
    )
    examples = site.finetune(
        options.base, options.images, options.output, settings=settings, split=options.split, device=options.device
    )
    _say(table(("label", "images"), [(label, str(count)) for label, count in examples.items()]))
    if held := read_record(options.output).get("held_out"):
        told = f"{100 * held['accuracy']:.1f} % right, temperature {held['temperature']:g}"
        _say(f"held out: {held['images']} images, {told}")
    _say(f"tuned model: {options.output}")


def diff(options: Namespace) -> None:
    from hf_datavec.errors import InputError
    from hf_datavec.pipeline import site
    from hf_datavec.pipeline.observing import Observed
    from hf_datavec.tables import table
    from hf_datavec.threads import numpy_on_one_thread

    numpy_on_one_thread()
    if bool(options.second_moments) != bool(options.images):
        raise InputError("--with and --images belong together", hint="for example --with fisher,gram --images ./ours")
    observed = None
    if options.images:
        observed = Observed(
            options.second_moments, options.images, options.split, count=options.count, device=options.device
        )
    labels = tuple(_labels(options.labels)) if options.labels else None
    manifest = site.diff(
        options.base,
        options.tuned,
        options.output,
        labels=labels,
        with_statistics=options.with_statistics,
        share_counts=options.share_counts,
        observed=observed,
        noise=options.noise,
    )
    kinds: dict[tuple[str, bool], int] = {}
    for entry in manifest.tensors.values():
        kinds[entry.role.value, entry.stored] = kinds.get((entry.role.value, entry.stored), 0) + 1
    rows = [(role, str(count), "yes" if stored else "left out") for (role, stored), count in sorted(kinds.items())]
    _say(table(("role", "tensors", "in the vector"), rows))
    for kind, found in (manifest.second_moments or {}).items():
        _say(f"{kind}: second moments of {found.images} images")
    if manifest.temperature is not None:
        _say(f"temperature: {manifest.temperature:g}")
    _say(f"vector: {options.output}")


def push(options: Namespace) -> None:
    from hf_datavec.pipeline import site

    place = site.push(
        options.folder,
        options.repo,
        private=not options.public,
        revision=options.revision,
        create_pr=options.create_pr,
    )
    _say(f"pushed to {place}")


def inspect(options: Namespace) -> None:
    from hf_datavec.cli.shown import inspection_data, inspection_text
    from hf_datavec.pipeline import measure

    found = measure.inspect(options.vectors, plot=options.plot, download=options.download)
    if options.json:
        return _say_json(inspection_data(found))
    _say(inspection_text(found))
    if options.plot:
        _say(f"\nplot: {options.plot}")


def plan(options: Namespace) -> None:
    from hf_datavec.threads import without_collection

    with without_collection():
        from hf_datavec.cli.shown import plan_data, plan_lines
        from hf_datavec.pipeline import lock as locks
        from hf_datavec.pipeline.prepare import prepare
        from hf_datavec.tables import table

        prepared = prepare(options.recipe, headers_only=True)
    lock = locks.write(prepared) if options.lock else None
    if options.json:
        return _say_json({**plan_data(prepared.plan), "lock": str(lock) if lock else None})
    _say(table(("plan", ""), plan_lines(prepared.plan)))
    for note in prepared.plan.notes:
        _say(f"note: {note}")
    if lock:
        _say(f"lock: {lock}")


def merge(options: Namespace) -> None:
    from hf_datavec.threads import numpy_on_one_thread, without_collection

    numpy_on_one_thread()
    with without_collection():
        from hf_datavec.cli.shown import choice_table, evaluation_table, search_table
        from hf_datavec.pipeline import coordinator
    result = coordinator.merge(options.recipe, output=options.output, push=not options.no_push, device=options.device)
    output = _near(result.output)
    if options.json:
        return _say_json(
            {
                "output": str(result.output),
                "digest": result.digest,
                "method": result.plan.recipe.merge.method,
                "scale": result.plan.recipe.merge.scale,
                "vectors": [one.name for one in result.plan.contributions],
                "norms": result.geometry.norms,
                "cosines": result.geometry.cosines,
                "restoration": result.restoration,
                "temperature": result.temperature,
                "search": result.search.as_dict() if result.search else None,
                "choice": result.verdict.as_dict() if result.verdict else None,
                "agreement": result.agreement.as_dict() if result.agreement else None,
                "evaluation": result.evaluation.as_dict() if result.evaluation else None,
                "pushed_to": result.pushed_to,
            }
        )
    if result.verdict:
        _say(choice_table(result.verdict) + "\n")
    if result.search:
        _say(search_table(result.search) + "\n")
    if result.evaluation:
        _say(evaluation_table(result.evaluation) + "\n")
    _say(result.restoration)
    _say(f"fused model: {output}")
    if result.pushed_to:
        _say(f"pushed to {result.pushed_to}")


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def evaluate(options: Namespace) -> None:
    from hf_datavec.cli.shown import evaluation_table
    from hf_datavec.pipeline import measure

    found = measure.evaluate(
        options.model, options.images, split=options.split, batch_size=options.batch_size, device=options.device
    )
    if options.json:
        return _say_json(found.as_dict())
    _say(evaluation_table(found))


def methods(options: Namespace) -> None:
    from hf_datavec.methods import all_methods, options_model, ranges

    if options.json:
        return _say_json(
            {
                name: {"summary": found.summary, "formula": found.formula, "source": found.source,
                       "uses_weights": found.uses_weights, "needs": found.needs,
                       "options": options_model(name).model_json_schema().get("properties", {})}
                for name, found in all_methods().items()
            }
        )  # fmt: skip
    for name, found in all_methods().items():
        weights = "uses weights" if found.uses_weights else "ignores weights"
        lines = (found.formula, found.summary, "; ".join((weights, *found.needs)), *ranges(name), found.source)
        _say("\n    ".join((name, *lines)))


def schema(options: Namespace) -> None:
    from hf_datavec import recipe, study

    _say_json(study.schema() if options.study else recipe.schema())


def run_study(options: Namespace) -> None:
    """Run a study, or what is left of it."""
    from hf_datavec.study import document
    from hf_datavec.study.run import run

    outcome = run(options.study, output=options.output, device=options.device)
    if options.json:
        return _say_json({"output": str(outcome.folder), **outcome.results.as_dict()})
    _say(document.markdown(document.findings(outcome.results)))
    _say(f"\nreport with all rows and tests: {_near(outcome.folder)}/report.html")


def list_vectors(options: Namespace) -> None:
    """Show the vectors of an org and which share a base."""
    from hf_datavec.cli.shown import found_data, found_table
    from hf_datavec.pipeline import discovery

    found = discovery.vectors_of(options.owner)
    if options.json:
        return _say_json([found_data(one) for one in found])
    _say(found_table(found))


def write_recipe(options: Namespace) -> None:
    """Write a recipe over the vectors of an org that fit together."""
    from hf_datavec.cli.shown import found_table
    from hf_datavec.pipeline import discovery

    found = discovery.write_recipe(options.owner, options.output, base=options.base)
    _say(found_table(found))
    _say(f"\nrecipe: {options.output}")


def convert(options: Namespace) -> None:
    """Write a mergekit configuration as a recipe; notes go to stderr."""
    import logging

    from hf_datavec.pipeline import conversion

    for note in conversion.convert(options.configuration, options.output, base=options.base):
        logging.getLogger(__name__).info("note: %s", note)
    _say(f"recipe: {options.output}")


# The names that users type; two of them would hide Python's own inside this module.
BY_NAME = {
    "demo": demo, "init": init, "finetune": finetune, "diff": diff, "push": push, "inspect": inspect, "plan": plan,
    "merge": merge, "evaluate": evaluate, "list": list_vectors, "recipe": write_recipe, "convert": convert,
    "methods": methods, "schema": schema, "study": run_study,
}  # fmt: skip
