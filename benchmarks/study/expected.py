"""Expectations from the paper about the ablation, compared with the results."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

Rows = dict[str, dict[str, Any]]

# By how many points dacs is expected to be above source + jitter, and whether in every seed; fixed before the runs.
PHOTOGRAPHS = ((3, False), (0, True))
ABOVE_JITTER = {
    "streetscenes": ((5, True),),
    "streets-camvid": PHOTOGRAPHS,
    "streets-camvid-360x480": PHOTOGRAPHS,
}
EXTENSIONS = ("dacs + masked consistency", "dacs + rare classes")


class Check(NamedTuple):
    """One expectation: the claim, the paper's figures for it, what was found, and whether the claim holds."""

    claim: str
    paper: str
    found: str
    holds: bool


def checks(rows: Rows, classes: list[str], pair: str) -> list[Check]:
    """All expectations whose rows were run. The margins on StreetScenes were fixed before the runs."""
    street = {"margin": 15, "every": True} if pair == "streetscenes" else {}
    lost: dict[str, Any] = {"classes": classes}
    wanted: list[tuple[Callable[..., Check], tuple[str, ...], dict[str, Any]]] = [
        (above, ("source", "pseudo-label"), {"paper": "32.85 and 22.97"}),
        (conflated, ("pseudo-label", "source"), {"paper": 8, **lost}),
        (conflated, ("classmix", "source"), {"paper": 7, **lost}),
        (above, ("classmix", "source"), {"paper": "35.08 and 32.85"}),
        (above, ("classmix", "pseudo-label"), {"paper": "35.08 and 22.97"}),
        (above, ("alignment", "classmix"), {"paper": "48.04 and 35.08"}),
        (above, ("dacs", "alignment"), {"paper": "52.14 and 48.04"}),
        (above, ("dacs", "source"), {"paper": "52.14 and 32.85", **street}),
        *(
            (above, ("dacs", "source + jitter"), {"margin": margin, "every": every})
            for margin, every in ABOVE_JITTER.get(pair, ((0, False),))
        ),
        (rescued, ("pseudo-label", "classmix", "dacs"), lost),
        *((not_below, (name, "dacs"), {}) for name in EXTENSIONS),
        (above, ("oracle", "dacs"), {}),
    ]
    return [check(rows, *names, **more) for check, names, more in wanted if comparable(rows, names)]


def comparable(rows: Rows, names: tuple[str, ...]) -> bool:
    """Whether all of these rows were run, with at least one seed in common."""
    return bool(set.intersection(*({run["seed"] for run in rows.get(name, {"runs": []})["runs"]} for name in names)))


def above(rows: Rows, high: str, low: str, *, paper: str = "not run", margin: float = 0, every: bool = False) -> Check:
    """Check that a row is above another by a margin in points, in the mean or in every seed that both have."""
    differences = [100 * difference for difference in seed_by_seed(rows, high, low)]
    mean, least, count = statistics.mean(differences), min(differences), len(differences)
    seeds = sum(difference >= margin and difference > 0 for difference in differences)
    by = f" by at least {margin:g} points" if margin else ""
    where = " in every seed" if every else " in the mean"
    found = f"{mean:+.2f} points in the mean, {least:+.2f} in the worst seed; in {seeds} of {count} seeds"
    return Check(
        f"{high} above {low}{by}{where}",
        paper,
        found if count > 1 else f"{mean:+.2f} points, 1 seed",
        seeds == count if every else mean >= margin and mean > 0,
    )


def not_below(rows: Rows, name: str, base: str) -> Check:
    """Check that a row is not below another, over the seeds that both have, by more than its standard deviation."""
    found = [100 * miou for miou in mious(rows, name)]
    difference = 100 * statistics.mean(seed_by_seed(rows, name, base))
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    measured = f" in the mean, spread {spread:.2f}" if len(found) > 1 else ", 1 seed, spread unknown"
    return Check(
        f"{name} not below {base} by more than its spread",
        "not run",
        f"{difference:+.2f} points{measured}",
        difference >= -spread,
    )


def conflated(rows: Rows, name: str, base: str, *, classes: list[str], paper: int) -> Check:
    """Check that a method loses classes that source-only keeps above 1 %."""
    means, before = class_means(rows, name), class_means(rows, base)
    lost = [c for c, mean, kept in zip(classes, means, before, strict=True) if mean < 1 <= kept]
    below, under = (sum(mean < 1 for mean in column) for column in (means, before))
    return Check(
        f"{name} loses classes (mean IoU under 1 %) that source-only has",
        f"{paper} under 1 %, source-only 0",
        f"{below} under 1 %, source-only {under}; lost: {', '.join(lost) or 'none'}",
        bool(lost),
    )


def rescued(rows: Rows, *names: str, classes: list[str]) -> Check:
    """Check for a class that pseudo-labelling or naive ClassMix has below 5 % and DACS above 20 %."""
    *naive, dacs = names
    found = []
    for name in naive:
        pairs = zip(classes, class_means(rows, name), class_means(rows, dacs), strict=True)
        found += [f"{c} ({name} {low:.1f}, dacs {high:.1f})" for c, low, high in pairs if low < 5 and high > 20]
    return Check(
        "pseudo-label or classmix has a class under 5 % that dacs holds above 20 %",
        "sidewalk 0.03 and 0.00, dacs 39.66; fence, wall, rider, bicycle likewise",
        "; ".join(found) or "none",
        bool(found),
    )


def mious(rows: Rows, name: str) -> list[float]:
    return [run["last"]["student"]["miou"] for run in rows[name]["runs"]]


def seed_by_seed(rows: Rows, high: str, low: str) -> list[float]:
    """The differences of two rows in mIoU, for the seeds that both have."""
    base = {run["seed"]: miou for run, miou in zip(rows[low]["runs"], mious(rows, low), strict=True)}
    pairs = zip(rows[high]["runs"], mious(rows, high), strict=True)
    return [miou - base[run["seed"]] for run, miou in pairs if run["seed"] in base]


def class_means(rows: Rows, name: str) -> list[float]:
    """The student's IoU at the last step, in percent, mean over seeds."""
    seeds = [[value or 0.0 for value in run["last"]["student"]["per_class"]] for run in rows[name]["runs"]]
    return [100 * statistics.mean(column) for column in zip(*seeds, strict=True)]
