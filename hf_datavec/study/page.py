"""The report of a study: plots, and one page of HTML that needs no network and no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_datavec.heatmap import plot_cosines
from hf_datavec.metrics import METRICS
from hf_datavec.report import BLUE, GREEN, GREY, ORANGE, Bar, Series, plot_bars, plot_lines
from hf_datavec.study import curves
from hf_datavec.study.networks import Seed
from hf_datavec.study.results import Results, cell
from hf_datavec.study.rows import Measuring
from hf_datavec.tables import metric_name

COLORS = {"fused": BLUE, "relay": BLUE, "federated": ORANGE, "ensemble": ORANGE, "pooled": GREEN}
CURVES_FILE, PAGE_FILE = "curves.json", "report.html"
STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}.fused td{background:#e8f2f9}
.pooled td{background:#e6f5f0}figcaption{color:#555}"""


def write(seeds: Sequence[Seed], results: Results, folder: Path) -> None:
    """Write plots, their numbers, and the page; curves and drift are those of the first seed."""
    first = Measuring(seeds[0])
    scales, between, drift = curves.over_scales(first), curves.between_sites(first), curves.drift(first)
    numbers = {"scales": curves.as_dict(scales), "between": curves.as_dict(between), "drift": drift}
    (folder / CURVES_FILE).write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")
    for metric in ("accuracy", "balanced_accuracy"):
        bars = [Bar(line.text, line.estimate(metric), COLORS.get(line.kind, GREY)) for line in results.lines]
        name = metric.replace("_", " ")
        axis = f"{name}, % (95 % interval over seeds {', '.join(map(str, results.seeds))})"
        plot_bars(bars, folder / f"{metric}.png", title=f"Every row, {name}", axis=axis)
    for name, found, x in (
        ("scales", scales, "scale of the sum: 0 is the base"),
        ("between", between, f"from {seeds[0].sites[0]} to {seeds[0].sites[1]}"),
    ):
        for what in ("accuracy", "loss"):
            lines = [Series(one.text, one.x, getattr(one, what)) for one in found]
            plot_lines(lines, folder / f"{name}-{what}.png", x=x, y=f"{what} on the test images")
    depth = [Series(mode, range(1, len(values) + 1), values) for mode, values in drift.items()]
    label = "distance of stored means, in standard deviations"
    plot_lines(depth, folder / "drift.png", x="BatchNorm layer, from the image to the head", y=label)
    plot_cosines(seeds[0].sites, curves.geometry(first), folder / "cosines.png")
    (folder / PAGE_FILE).write_text("\n".join(_page(results, folder)), "utf-8")


FIGURES = {
    "accuracy": "Accuracy of every row.",
    "balanced_accuracy": "Balanced accuracy of every row.",
    "scales-accuracy": "Accuracy along the line from the base through the sum of the vectors, by restoration mode.",
    "scales-loss": "Loss along the same line.",
    "between-accuracy": "Accuracy along the line between two sites.",
    "between-loss": "Loss along the same line.",
    "cosines": "Cosines between the sites' vectors.",
    "drift": "How far stored BatchNorm means are from those of the test images, before (none) and after restoration.",
}


def _page(results: Results, folder: Path) -> Iterator[str]:
    yield "<!doctype html><html lang='en'><meta charset='utf-8'><title>hf-datavec study</title>"
    yield f"<style>{STYLE}</style><h1>Study</h1>"
    sizes = ", ".join(f"{name} {count}" for name, count in results.sizes[0].items())
    yield f"<p>Images in the first seed: {html.escape(sizes)}. Percent, mean over seeds and the half-width of the 95 % "
    yield "interval (Student's t). Curves, cosines and drift are of the first seed.</p>"
    yield "<table><tr><th>row</th>" + "".join(f"<th>{metric_name(name)}</th>" for name in METRICS) + "</tr>"
    for line in results.lines:
        cells = "".join(f"<td>{cell(line.estimate(name))}</td>" for name in METRICS)
        yield f"<tr class='{line.kind}'><td>{html.escape(line.text)}</td>{cells}</tr>"
    yield "</table><h2>Paired tests on the same test images</h2>"
    header, rows = results.tested()
    yield "<table><tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in header) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
    yield "</table>"
    for name, caption in FIGURES.items():
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        yield f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{picture}'>"
        yield f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    yield "</html>"
