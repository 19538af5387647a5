"""Plots from results; nothing here computes a result."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_datavec.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito 2008).
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#E69F00", "#999999", "#009E73"
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", "#000000", GREY)


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a comparison: what it is, how well it does, and which group it belongs to."""

    text: str
    estimate: Estimate
    color: str = BLUE


# Letters in a line of a bar's name.
LABEL = 42


def plot_bars(bars: Sequence[Bar], path: Path, *, title: str, axis: str) -> None:
    """A horizontal bar chart with 95 % intervals, best read from top to bottom."""
    figure, axes = _figure(7.0, 0.9 + 0.42 * len(bars))
    places = list(range(len(bars)))[::-1]
    values = [100 * bar.estimate.value for bar in bars]
    # Of a single seed no interval is known, and a metric may not be defined.
    values = [0.0 if math.isnan(value) else value for value in values]
    # No share is below nothing or above all, whatever an interval of few seeds says; an unknown end stays unknown.
    lows = [100 * (bar.estimate.value - max(bar.estimate.low, 0.0)) for bar in bars]
    highs = [100 * (min(bar.estimate.high, 1.0) - bar.estimate.value) for bar in bars]
    spread = [[0.0 if math.isnan(one) else max(0.0, one) for one in ends] for ends in (lows, highs)]
    axes.barh(places, values, color=[bar.color for bar in bars], height=0.62)
    axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    for place, bar, value in zip(places, bars, values, strict=True):
        end = value if math.isnan(bar.estimate.high) else min(100.0, 100 * bar.estimate.high)
        axes.text(end + 1.5, place, f"{value:.1f}", va="center", fontsize=9)
    # A long name in one line would leave no room for its bar.
    axes.set_yticks(places, [textwrap.fill(bar.text, LABEL, max_lines=2) for bar in bars], fontsize=9)
    axes.set_xlim(0, 112)
    axes.set_ylim(-0.8, len(bars) - 0.2)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@dataclass(frozen=True, slots=True)
class Series:
    """One named line."""

    text: str
    x: Sequence[float]
    y: Sequence[float]


def plot_lines(series: Sequence[Series], path: Path, *, x: str, y: str) -> None:
    """Lines with a dot at each value, told apart by colour and by mark."""
    figure, axes = _figure(6.4, 4.0)
    marks = "osD^vPX*"
    for place, one in enumerate(series):
        color = LINES[place % len(LINES)]
        axes.plot(list(one.x), list(one.y), label=one.text, color=color, marker=marks[place % len(marks)], markersize=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Axes]:
    # The object interface: no window system is touched and no global state left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    # Without the library's version in the file, the same data give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
