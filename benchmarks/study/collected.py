"""Runs of one row, put together for a result file: every seed's scores, and rounded curves."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.study.trials import best

Document = dict[str, Any]
CURVES = ("lambda", "agreement", "divergence")
BY_CLASS = ("precision", "recall", "share")


def row(documents: Sequence[Document]) -> dict[str, Any]:
    """All that tables and figures show of one variant: its options, its seeds, its pseudo-labels over training."""
    collected: dict[str, Any] = {
        "variant": documents[0]["options"]["variant"],
        "runs": [seed_of(document) for document in documents],
    }
    looks = list(zip(*(document["looks"] for document in documents), strict=True))  # the seeds' looks at each step
    if "pseudo_labels" in looks[0][0]:
        collected["by_class"] = {
            name: [by_class([look["pseudo_labels"][name] for look in seeds]) for seeds in looks] for name in BY_CLASS
        }
    return collected


def seed_of(document: Document) -> dict[str, Any]:
    """One seed: scores at the last and the best step, what the last pseudo-labels were like, and curves."""
    looks = document["looks"]
    networks = [name for name in ("student", "teacher") if name in looks[-1]]
    entry: dict[str, Any] = {
        "seed": document["options"]["seed"],
        "cpu_seconds": round(document["cpu_seconds"], 1),
        "last": {name: rounded(looks[-1][name], 5) for name in networks},
        "best": {name: highest(looks, name) for name in networks},
        "curves": {name: rounded([look[name]["miou"] for look in looks], 4) for name in networks},
    }
    for loss in ("source_loss", "mixed_loss"):
        entry["curves"][loss] = rounded([look[loss] for look in looks], 3)
    if "pseudo_labels" in looks[-1]:
        entry["pseudo_labels"] = rounded({name: looks[-1]["pseudo_labels"][name] for name in BY_CLASS}, 4)
        entry["curves"]["mixed_accuracy"] = rounded([look["mixed_accuracy"] for look in looks], 3)
        for name in CURVES:
            entry["curves"][name] = rounded([look["pseudo_labels"][name] for look in looks], 3)
    return entry


def highest(looks: Sequence[Document], network: str) -> dict[str, Any]:
    """The best look of a network by its own score."""
    look = best(looks, network)
    return {"step": look["step"], **rounded(look[network], 5)}


def by_class(seeds: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean over the seeds in which a class has a number."""
    columns = [[value for value in column if value is not None] for column in zip(*seeds, strict=True)]
    return [round(statistics.mean(column), 4) if column else None for column in columns]


def mean_and_sd(fractions: Sequence[float]) -> str:
    """Percent over seeds, with the standard deviation of the sample where there is one."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean


def rounded(value: Any, digits: int) -> Any:  # noqa: ANN401 - whatever JSON holds
    """The same with every fraction rounded."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value
