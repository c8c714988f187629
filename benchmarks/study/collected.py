"""Collect what tables and figures need: of a run for its file, and of the runs of one row for a result file."""

import statistics
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
CURVES = ("lambda", "agreement", "divergence")
UNSUPERVISED = ("entropy", "information", "neighborhood_density")
BY_CLASS = ("precision", "recall", "share")


def compact(looks: Sequence[Document]) -> list[Document]:
    """The looks of a run to 5 digits, with the IoU by class at the last step and the best ones only."""
    whole = {looks[-1]["step"], *(best(looks, name)["step"] for name in networks_of(looks[-1]))}
    kept = []
    for i, look in enumerate(looks):
        surplus = set() if look["step"] in whole else {"per_class"}
        surplus |= {"true_share"} if i > 0 else set()  # always the same
        surplus |= {"precision"} if i < len(looks) - 1 else set()
        kept.append(rounded(without(look, surplus), 5))
    return kept


def row(documents: Sequence[Document]) -> dict[str, Any]:
    """Everything that tables and figures show of a variant: options, seeds, and pseudo-labels over training."""
    collected: dict[str, Any] = {
        "variant": documents[0]["options"]["variant"],
        "runs": [seed_of(document) for document in documents],
    }
    looks = list(zip(*(document["looks"] for document in documents), strict=True))  # step by step, those of all seeds
    if "pseudo_labels" in looks[0][0]:
        collected["by_class"] = {
            name: [
                by_class([look["pseudo_labels"][name] for look in seeds])
                for seeds in looks
                if name in seeds[0]["pseudo_labels"]
            ]
            for name in BY_CLASS
        }
    return collected


def seed_of(document: Document) -> dict[str, Any]:
    """One seed: scores at the last and the best step, quality of the last pseudo-labels, and curves."""
    looks = document["looks"]
    networks = networks_of(looks[-1])
    entry: dict[str, Any] = {
        "seed": document["options"]["seed"],
        "machine": name_of(document["machine"]),
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
        entry["curves"]["student"] = rounded([look["student"]["miou"] for look in looks], 5)  # read in a table
        for name in UNSUPERVISED:
            entry["curves"][name] = rounded([look["unsupervised"][name] for look in looks], 5)
    if "pseudo_labels" in looks[-1]:
        entry["pseudo_labels"] = rounded({name: looks[-1]["pseudo_labels"][name] for name in BY_CLASS}, 4)
        entry["curves"]["mixed_accuracy"] = rounded([look["mixed_accuracy"] for look in looks], 3)
        for name in CURVES:
            entry["curves"][name] = rounded([look["pseudo_labels"][name] for look in looks], 3)
    return entry


def name_of(machine: Document) -> str:
    """What a run was computed on, in words."""
    return f"{machine['gpu'] or machine['processor']}, torch {machine['torch']}"


def networks_of(look: Document) -> list[str]:
    return [name for name in ("student", "teacher") if name in look]


def best(looks: Sequence[Document], network: str = "student") -> Document:
    return max(looks, key=lambda look: float(look[network]["miou"]))


def highest(looks: Sequence[Document], network: str) -> dict[str, Any]:
    look = best(looks, network)
    return {"step": look["step"], **rounded(look[network], 5)}


def by_class(seeds: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each class over the seeds that have a value for it."""
    columns = [[value for value in column if value is not None] for column in zip(*seeds, strict=True)]
    return [round(statistics.mean(column), 4) if column else None for column in columns]


def without(value: Any, names: set[str]) -> Any:  # noqa: ANN401 - whatever JSON holds
    """A nested dict without some of its keys."""
    if not isinstance(value, dict):
        return value
    return {key: without(item, names) for key, item in value.items() if key not in names}


def rounded(value: Any, digits: int) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, list) else value
