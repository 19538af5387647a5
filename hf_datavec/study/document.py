"""The report as chapters: settings, conclusion and the rows that matter first, all else in an appendix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_datavec.metrics import METRICS
from hf_datavec.study import conclusion
from hf_datavec.study.listing import HEADS_ALONE, START_ALONE
from hf_datavec.study.results import Line, Results
from hf_datavec.tables import markdown_table, metric_name

TABLE_FILE = "README.md"
RANDOM_WITH_START = (
    "Random vectors keep the averaged head; unrestored they show that head, restored they show what restoration does "
    f"to a head fitted to the base's statistics. That head alone is the row '{START_ALONE}'."
)
RANDOM = (
    "Random vectors have the norms of the sites' vectors and no direction: whatever they reach comes from the base and "
    "from restoration, not from what sites learned."
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """A heading with paragraphs and perhaps a table; `kinds` tell what each row of the table is."""

    title: str
    paragraphs: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[str, ...] = ()

    def markdown(self, level: int) -> str:
        """The chapter as Markdown."""
        parts = [f"{'#' * level} {self.title}", *self.paragraphs]
        return "\n\n".join([*parts, markdown_table(self.header, self.rows)] if self.rows else parts)


def settings(results: Results) -> Chapter:
    """What was compared, and how."""
    return Chapter("Settings", (), ("setting", "value"), results.settings)


def findings(results: Results) -> tuple[Chapter, ...]:
    """The conclusion, and the rows that it is made of."""
    matter = [line for line in results.lines if line.matters]
    return (
        Chapter("Conclusion", tuple(conclusion.sentences(results))),
        _lines("Rows that matter", (legend(results),), matter),
    )


def appendix(results: Results) -> tuple[Chapter, ...]:
    """All other rows, and all tests."""
    rest = [line for line in results.lines if not line.matters]
    random = [line for line in rest if line.kind == "random"]
    controls = [line for line in results.lines if line.text.startswith((START_ALONE, HEADS_ALONE))]
    others = [line for line in rest if line not in random and line not in controls]
    header, rows = results.tested()
    tests = (
        "Differences are means over seeds in points, p is that of McNemar's exact test in each seed, which takes "
        "images for independent of each other.",
    )
    return (
        _lines("All other rows", (), others),
        _lines("Random control", (RANDOM_WITH_START if results.start else RANDOM,), [*controls, *random]),
        Chapter("Paired tests on the same test images", tests, header, tuple(rows)),
    )


def legend(results: Results) -> str:
    """What the numbers of the tables are."""
    count = len(results.seeds)
    chosen = " Behind a row's name stands what `auto` chose." if any(line.choice for line in results.lines) else ""
    if count == 1:
        return f"In percent; in brackets the 95 % bootstrap interval over {results.images}.{chosen}"
    if count == 2:
        return f"In percent, mean of two seeds; in brackets the value of each.{chosen}"
    return f"In percent, mean over {count} seeds and the half-width of Student's 95 % interval.{chosen}"


def _lines(title: str, paragraphs: tuple[str, ...], lines: Sequence[Line]) -> Chapter:
    header = ("row", *(metric_name(name) for name in METRICS))
    rows = tuple((line.shown, *(line.cell(name) for name in METRICS)) for line in lines)
    return Chapter(title, paragraphs, header, rows, tuple(line.kind for line in lines))


def markdown(chapters: Sequence[Chapter], *, level: int = 2) -> str:
    """Chapters as Markdown."""
    return "\n\n".join(chapter.markdown(level) for chapter in chapters)


def write(results: Results, folder: Path) -> None:
    """Write the report as Markdown."""
    (folder / TABLE_FILE).write_text("\n\n".join(_parts(results)) + "\n", "utf-8")


def _parts(results: Results) -> Iterator[str]:
    yield "# Study"
    yield markdown((settings(results), *findings(results)))
    yield "## Appendix"
    yield markdown(appendix(results), level=3)
