"""Collect the runs of one row for a result file: the scores of every seed, and rounded curves."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.study.trials import best

Document = dict[str, Any]
CURVES = ("lambda", "agreement", "divergence")
UNSUPERVISED = ("entropy", "information", "neighborhood_density")
BY_CLASS = ("precision", "recall", "share")


def row(documents: Sequence[Document]) -> dict[str, Any]:
    """Everything that tables and figures show of a variant: options, seeds, and pseudo-labels over training."""
    collected: dict[str, Any] = {
        "variant": documents[0]["options"]["variant"],
        "runs": [seed_of(document) for document in documents],
    }
    looks = list(zip(*(document["looks"] for document in documents), strict=True))  # step by step, those of all seeds
    if "pseudo_labels" in looks[0][0]:
        collected["by_class"] = {
            name: [by_class([look["pseudo_labels"][name] for look in seeds]) for seeds in looks] for name in BY_CLASS
        }
    return collected


def seed_of(document: Document) -> dict[str, Any]:
    """One seed: scores at the last and the best step, quality of the last pseudo-labels, and curves."""
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
    if "by_day" in looks[-1]:
        entry["by_day"] = rounded(looks[-1]["by_day"], 5)
        entry["curves"]["by_day"] = rounded([look["by_day"]["student"]["miou"] for look in looks], 4)
    if "unsupervised" in looks[-1]:
        for name in UNSUPERVISED:
            entry["curves"][name] = rounded([look["unsupervised"][name] for look in looks], 4)
    if "pseudo_labels" in looks[-1]:
        entry["pseudo_labels"] = rounded({name: looks[-1]["pseudo_labels"][name] for name in BY_CLASS}, 4)
        entry["curves"]["mixed_accuracy"] = rounded([look["mixed_accuracy"] for look in looks], 3)
        for name in CURVES:
            entry["curves"][name] = rounded([look["pseudo_labels"][name] for look in looks], 3)
    return entry


def highest(looks: Sequence[Document], network: str) -> dict[str, Any]:
    look = best(looks, network)
    return {"step": look["step"], **rounded(look[network], 5)}


def by_class(seeds: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each class over the seeds that have a value for it."""
    columns = [[value for value in column if value is not None] for column in zip(*seeds, strict=True)]
    return [round(statistics.mean(column), 4) if column else None for column in columns]


def mean_and_sd(fractions: Sequence[float]) -> str:
    """Mean in percent, with the sample standard deviation if there are several seeds."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean


def rounded(value: Any, digits: int) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value
