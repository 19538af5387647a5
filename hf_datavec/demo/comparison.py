"""The table at the end of the demonstration: what merging gains, and what would have happened otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_datavec import hub, models
from hf_datavec.demo import recipes
from hf_datavec.demo.material import SITES
from hf_datavec.evaluate import Predictions, predict, score
from hf_datavec.images import open_images
from hf_datavec.metrics import Estimate
from hf_datavec.report import BLUE, GREEN, GREY, ORANGE, Bar, plot_bars
from hf_datavec.tables import percent, table

Command = Callable[..., str]


@dataclass(frozen=True)
class Row:
    """One network or group of networks: accuracy as it is, and after recalibration on the public images."""

    name: str
    plain: Estimate
    recalibrated: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """All rows, in the order of the table."""

    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def table(self) -> str:
        """Accuracy on the test images in percent with 95 % intervals."""
        cells = [
            (row.name, percent(row.plain), percent(row.recalibrated) if row.recalibrated else "-") for row in self.rows
        ]
        return table(("accuracy, % (95 % interval)", "as it is", "recalibrated on public images"), cells)

    def reading(self) -> str:
        """What the table says, in words that follow from its numbers."""
        fused = _best(self.row("fused"))
        best = max((self.row(site) for site in SITES), key=lambda row: row.plain.value)
        fair = max((self.row(site) for site in SITES), key=lambda row: _recalibrated(row))
        pooled, ensemble = self.row("all data pooled").plain.value, self.row("ensemble of the sites")
        return "\n".join(
            [
                _against(f"the best single site as it is ({best.name})", fused, best.plain.value),
                _against(f"the best single site recalibrated likewise ({fair.name})", fused, _recalibrated(fair)),
                _against("the better of the two ensembles, which run 4 networks", fused, _best(ensemble)),
                f"The fused model reaches {fused / pooled:.2f} of one trained on all data pooled; "
                f"random vectors of the same length reach {100 * _best(self.row('random vectors')):.0f} %.",
            ]
        )

    def plot(self, path: Path) -> None:
        """The bar chart of the table."""
        bars = [Bar(site, self.row(site).plain, GREY) for site in SITES]
        sites = [self.row(site) for site in SITES]
        bars += [Bar(f"{row.name}, recalibrated", row.recalibrated or row.plain, GREY) for row in sites]
        for name, color in (("ensemble of the sites", ORANGE), ("random vectors", GREY), ("fused", BLUE)):
            row = self.row(name)
            bars.append(Bar(name, row.plain, color))
            if row.recalibrated:
                bars.append(Bar(f"{name}, recalibrated", row.recalibrated, color))
        bars.append(Bar("all data pooled", self.row("all data pooled").plain, GREEN))
        axis = "accuracy on images of all scanners, % (95 % interval)"
        plot_bars(bars, path, title="Four sites, one recipe", axis=axis)


def _recalibrated(row: Row) -> float:
    return row.recalibrated.value if row.recalibrated else row.plain.value


def _best(row: Row) -> float:
    return max(row.plain.value, _recalibrated(row))


def _against(what: str, fused: float, other: float) -> str:
    gap = 100 * (fused - other)
    return f"The fused model is {abs(gap):.1f} points {'above' if gap > 0 else 'below'} {what}."


def compare(out: Path, command: Command, root: str) -> Comparison:
    """Measure every row of the table, through commands where there is one."""
    controls = out / "controls"
    rows = []
    for site in SITES:
        plain = _evaluated(command, f"{root}/sites/{site}/tuned", root)
        recipes.write(controls / f"{site}.yaml", comment=f"{site} alone, recalibrated", sites=(site,), scale=1.0)
        rows.append(Row(site, plain, _merged(command, f"{root}/controls/{site}")))
    ensembles = [[out / "sites" / site / "tuned" for site in SITES], [controls / site for site in SITES]]
    test = out / "images" / "test"
    rows.append(Row("ensemble of the sites", *(_ensemble(networks, test) for networks in ensembles)))
    for name, method in (("random vectors", "random"), ("fused", "sum")):
        found = []
        for mode in ("none", "statistics"):
            if (method, mode) == ("sum", "statistics"):
                found.append(_estimate(json.loads((out / "fused" / "evaluation.json").read_text("utf-8"))))
                continue
            comment = f"control: {name}, recalibration {mode}"
            recipes.write(controls / f"{method}-{mode}.yaml", comment=comment, method=method, mode=mode)
            found.append(_merged(command, f"{root}/controls/{method}-{mode}"))
        rows.append(Row(name, found[0], found[1]))
    rows.append(Row("all data pooled", _evaluated(command, f"{root}/sites/pooled", root), None))
    return Comparison(tuple(rows))


def _evaluated(command: Command, model: str, root: str) -> Estimate:
    return _estimate(json.loads(command("evaluate", model, f"{root}/images/test", "--json")))


def _merged(command: Command, path: str) -> Estimate:
    return _estimate(json.loads(command("merge", f"{path}.yaml", "-o", path, "--json"))["evaluation"])


def _estimate(evaluation: dict[str, dict[str, dict[str, float]]]) -> Estimate:
    return Estimate(**evaluation["metrics"]["accuracy"])


def _ensemble(folders: list[Path], test: Path) -> Estimate:
    """The accuracy of the mean of the networks' probabilities."""
    import numpy as np

    images = open_images(hub.parse(str(test.absolute())))
    each = [predict(models.load(folder), images) for folder in folders]
    mean = np.mean([one.probabilities for one in each], axis=0)
    return score(Predictions(each[0].labels, mean, each[0].references), "test").metrics["accuracy"]
