"""Results as text: aligned columns for a terminal, Markdown for cards, numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from hf_datavec.metrics import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(str(row[column])) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (str(cell) for cell in cells)
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + " --- |" * len(header))
    return "\n".join(lines)


def percent(estimate: Estimate) -> str:
    """A share with its interval: `61.3 (57.1 to 65.0)`."""
    if estimate.value != estimate.value:
        return "not defined"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def metric_rows(metrics: dict[str, Estimate]) -> list[tuple[str, str]]:
    """Metric names and values in percent."""
    return [(metric_name(name), percent(estimate)) for name, estimate in metrics.items()]


def metric_name(name: str) -> str:
    """What tables in percent call a metric; the Brier score, which reaches 2, is no share but is scaled like one."""
    return "Brier score x 100" if name == "brier" else name.replace("_", " ")


def size(count: float) -> str:
    """Bytes for people: `17.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
