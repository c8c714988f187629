"""Scores: as metrics.json holds them, in percent for people, and beside the tables of the paper."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmix.datasets.classes import CLASS_NAMES, CLASSES_13, CLASSES_16
from crossmix.metrics import ConfusionMatrix

__all__ = ["TITLES", "markdown", "paper_row", "paper_tables", "percent", "plain", "rows_by_class", "spread", "summary"]

TITLES = {"miou": "mIoU", "miou_16": "mIoU of 16", "miou_13": "mIoU of 13"}
ROWS = {
    "source": "Source",
    "pseudo-label": "Pseudo-labelling",
    "classmix": "Naive ClassMix",
    "alignment": "Distribution alignment",
    "dacs": "DACS",
}  # methods of `crossmix.recipes`, as the paper calls them


def summary(matrix: ConfusionMatrix, names: Sequence[str] = CLASS_NAMES) -> dict[str, Any]:
    """IoU as fractions; None for a class that is in neither labels nor predictions."""
    iou = matrix.compute()
    subsets = {"miou_16": CLASSES_16, "miou_13": CLASSES_13} if tuple(names) == CLASS_NAMES else {}
    return {
        "miou": _number(iou.mean),
        **{key: _number(matrix.compute(classes).mean) for key, classes in subsets.items()},
        "pixel_accuracy": _number(iou.pixel_accuracy),
        "per_class": {name: _number(value) for name, value in zip(names, iou.per_class.tolist(), strict=True)},
    }


def rows_by_class(
    columns: Mapping[str, Sequence[Mapping[str, Any]]], paper: Mapping[str, Mapping[str, Any]], means: Iterable[str]
) -> list[list[str]]:
    """A header and rows of IoU in percent: the classes, then the means.

    Args:
        columns: By title, what `summary` returned for one run, or for each of several.
        paper: Rows of the paper by title, which follow.
        means: Keys of `TITLES`.
    """
    rows = [["class", *columns, *paper]]
    for name in next(iter(columns.values()))[0]["per_class"]:
        ours = [spread(run["per_class"][name] for run in runs) for runs in columns.values()]
        rows.append([name, *ours, *(plain(row["per_class"].get(name)) for row in paper.values())])
    for key in means:
        ours = [spread(run[key] for run in runs) for runs in columns.values()]
        rows.append([TITLES[key], *ours, *(plain(row.get(key)) for row in paper.values())])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]) + "\n"


def spread(values: Iterable[float | None]) -> str:
    """A fraction in percent; of several runs mean and standard deviation."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return percent(present[0] if present else None)
    return f"{100 * statistics.mean(present):.2f} +- {100 * statistics.stdev(present):.2f}"


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "-" if value is None else f"{100 * value:.2f}"


def plain(value: float | None) -> str:
    """A number that is in percent already."""
    return "-" if value is None else f"{value:.2f}"


def paper_tables() -> dict[str, Any]:
    """Tables 1 to 3 of the paper, IoU in percent: `{"table 1": {"title", "rows"}, ...}`."""
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))
    return tables


def paper_row(source: str, method: str) -> dict[str, Any]:
    """The paper's own row of a method; without a number where it has none.

    Args:
        source: `"gta5"` or `"synthia"`.
        method: A name of `crossmix.recipes.METHODS`.
    """
    table = paper_tables()["table 2" if source == "synthia" else "table 3"]
    return next((row for row in table["rows"] if row["method"] == ROWS[method]), {"per_class": {}})


def _number(value: float) -> float | None:
    """A float as JSON can hold it."""
    return None if math.isnan(value) else float(value)
