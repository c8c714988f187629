"""Scores as in metrics.json, in percent for display, and from the tables of the paper."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmix.datasets.classes import CLASS_NAMES, CLASSES_13, CLASSES_16
from crossmix.metrics import ConfusionMatrix

__all__ = [
    "CHOSEN", "TITLES", "deciding_miou", "finite", "information", "markdown", "paper_row", "paper_tables", "percent",
    "plain", "rows_by_class", "shortfall", "spread", "summary",
]  # fmt: skip

TITLES = {"miou": "mIoU", "miou_16": "mIoU of 16", "miou_13": "mIoU of 13"}
CHOSEN = {"best": "best step", "best_unsupervised": "label-free step"}
"""Evaluations that metrics.json singles out, apart from the last."""
ROWS = {"source": "Source", "pseudo-label": "Pseudo-labelling", "classmix": "Naive ClassMix",
        "alignment": "Distribution alignment", "dacs": "DACS"}  # fmt: skip
"""The paper's names for the methods of `crossmix.recipes`."""


def summary(matrix: ConfusionMatrix, names: Sequence[str] = CLASS_NAMES) -> dict[str, Any]:
    """Summarise IoU as fractions, with None for classes that are in neither labels nor predictions."""
    iou = matrix.compute()
    subsets = {"miou_16": CLASSES_16, "miou_13": CLASSES_13} if tuple(names) == CLASS_NAMES else {}
    return {
        "miou": finite(iou.mean),
        **{key: finite(matrix.compute(classes).mean) for key, classes in subsets.items()},
        "pixel_accuracy": finite(iou.pixel_accuracy),
        "per_class": {name: finite(value) for name, value in zip(names, iou.per_class.tolist(), strict=True)},
    }


def finite(value: float) -> float | None:
    """Replace NaN by None, for JSON."""
    return None if math.isnan(value) else float(value)


def deciding_miou(entry: Mapping[str, Any], *, evaluation: str, synthia: bool, who: str = "student") -> float | None:
    """Read a network's mean IoU at the label size that decides, over the classes that the source has."""
    value: float | None = entry[who][evaluation]["miou_16" if synthia else "miou"]
    return value


def information(entry: Mapping[str, Any], who: str = "student") -> float | None:
    """Read the information of the predictions, by which a step is chosen without labels."""
    value: float | None = entry.get("unsupervised", {}).get(who, {}).get("information")
    return value


def shortfall(metrics: Mapping[str, Any], miou: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    """Compute how far the step chosen without labels falls short of the best one, as a fraction of IoU."""
    chosen, best = (miou(metrics[title]) if metrics.get(title) else None for title in ("best_unsupervised", "best"))
    return None if chosen is None or best is None else best - chosen


def rows_by_class(
    columns: Mapping[str, Sequence[Mapping[str, Any]]], paper: Mapping[str, Mapping[str, Any]], means: Iterable[str]
) -> list[list[str]]:
    """Make a header and rows of IoU in percent: the classes, then the means, which are keys of `TITLES`.

    `columns` are results of `summary` by title, one for each run; `paper`, rows of the paper, are further columns.
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
    """Format a header and rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]) + "\n"


def spread(values: Iterable[float | None]) -> str:
    """Format a fraction in percent; of several runs, mean and standard deviation."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return percent(present[0] if present else None)
    return f"{100 * statistics.mean(present):.2f} +- {100 * statistics.stdev(present):.2f}"


def percent(value: float | None) -> str:
    """Format a fraction in percent."""
    return "-" if value is None else f"{100 * value:.2f}"


def plain(value: float | None) -> str:
    """Format a number that is in percent already."""
    return "-" if value is None else f"{value:.2f}"


def paper_tables() -> dict[str, Any]:
    """Load Tables 1 to 3 of the paper, IoU in percent: `{"table 1": {"title", "rows"}, ...}`."""
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))
    return tables


def paper_row(source: str, method: str) -> dict[str, Any]:
    """Find the paper's row for a source, "gta5" or "synthia", and a method; without numbers if it has none."""
    table = paper_tables()["table 2" if source == "synthia" else "table 3"]
    return next((row for row in table["rows"] if row["method"] == ROWS[method]), {"per_class": {}})
