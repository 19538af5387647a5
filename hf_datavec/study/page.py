"""The report of a study: plots, and one page of HTML that needs no network and no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from hf_datavec.heatmap import plot_cosines
from hf_datavec.report import BLUE, GREEN, GREY, ORANGE, Bar, Series, plot_bars, plot_lines
from hf_datavec.study import curves, document
from hf_datavec.study.comparison import FEWEST_SEEDS
from hf_datavec.study.document import Chapter
from hf_datavec.study.networks import Seed
from hf_datavec.study.results import Results
from hf_datavec.study.rows import Measuring

COLORS = {"fused": BLUE, "relay": BLUE, "federated": ORANGE, "ensemble": ORANGE, "pooled": GREEN}
CURVES_FILE, PAGE_FILE = "curves.json", "report.html"
STYLE = """body{font:15px/1.5 sans-serif;max-width:66em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,.plain td{text-align:left}
div{overflow-x:auto}img{max-width:100%}.fused td{background:#e8f2f9}
.pooled td{background:#e6f5f0}figcaption{color:#555}"""


def write(seeds: Sequence[Seed], results: Results, folder: Path) -> None:
    """Write plots, their numbers, and the page; curves and drift are those of the first seed."""
    first = Measuring(seeds[0])
    scales, between, drift = curves.over_scales(first), curves.between_sites(first), curves.drift(first)
    numbers = {"scales": curves.as_dict(scales), "between": curves.as_dict(between), "drift": drift}
    (folder / CURVES_FILE).write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")
    matter = [line for line in results.lines if line.matters]
    for metric in ("accuracy", "balanced_accuracy"):
        bars = [Bar(line.shown, line.estimate(metric), COLORS.get(line.kind, GREY)) for line in matter]
        name = metric.replace("_", " ")
        axis = f"{name}, %{_spread(results)}"
        plot_bars(bars, folder / f"{metric}.png", title=f"Rows that matter, {name}", axis=axis)
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


def _spread(results: Results) -> str:
    """What the bars' intervals are; two seeds tell none."""
    count = len(results.seeds)
    if count < FEWEST_SEEDS:
        return "\n(95 % bootstrap interval)" if count == 1 else "\n(mean of two seeds)"
    return f"\n(95 % interval over {count} seeds)"


FIGURES = {
    "accuracy": "Accuracy of the rows that matter.",
    "balanced_accuracy": "Balanced accuracy of the rows that matter.",
    "scales-accuracy": "Accuracy along the line from the base through the sum of the vectors, by restoration mode.",
    "scales-loss": "Loss along the same line.",
    "between-accuracy": "Accuracy along the line between two sites.",
    "between-loss": "Loss along the same line.",
    "cosines": "Cosines between the sites' vectors.",
    "drift": "How far stored BatchNorm means are from those of the test images, before (none) and after restoration.",
}


def _page(results: Results, folder: Path) -> Iterator[str]:
    yield "<!doctype html><html lang='en'><meta charset='utf-8'><title>hf-datavec study</title>"
    yield "<meta name='viewport' content='width=device-width'>"
    yield f"<style>{STYLE}</style><h1>Study</h1>"
    for chapter in (document.settings(results), *document.findings(results)):
        yield from _chapter(chapter, "h2")
    yield "<h2>Plots</h2><p>Curves, cosines and drift are of the first seed.</p>"
    for name, caption in FIGURES.items():
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        yield f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{picture}'>"
        yield f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    yield "<h2>Appendix</h2>"
    for chapter in document.appendix(results):
        yield from _chapter(chapter, "h3")
    yield "</html>"


def _chapter(chapter: Chapter, heading: str) -> Iterator[str]:
    yield f"<{heading}>{html.escape(chapter.title)}</{heading}>"
    for text in chapter.paragraphs:
        yield f"<p>{html.escape(text)}</p>"
    if not chapter.rows:
        return
    yield "<div><table><tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in chapter.header) + "</tr>"
    for row, kind in zip_longest(chapter.rows, chapter.kinds, fillvalue="plain"):
        yield f"<tr class='{kind}'>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
    yield "</table></div>"
