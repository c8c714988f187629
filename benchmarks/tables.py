"""Tables of the docs, in Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table and an empty one; only the columns `left` are not aligned to the right."""
    marks = ["---" if i in left else "---:" for i in range(len(header))]
    return [line(header), f"|{'|'.join(marks)}|", *map(line, rows), ""]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean_and_sd(fractions: Sequence[float]) -> str:
    """Mean in percent, with the sample standard deviation if there are several seeds."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean


def cell(runs: Sequence[dict[str, Any]], *keys: str) -> str:
    """The mean over runs of a number at these keys, with its spread; - if there is no such number."""
    found: list[Any] = list(runs)
    for key in keys:
        found = [None if part is None else part.get(key) for part in found]
    return "-" if None in found else mean_and_sd(found)


def each(fractions: Sequence[float]) -> str:
    """Every value in percent."""
    return ", ".join(f"{100 * value:.2f}" for value in fractions)
