"""What matters to DACS and what does not: one option at a time on StreetScenes, several seeds.

    python benchmarks/sensitivity.py --workers 2 --save

The base is the row `dacs` of ablation.py at a third of its steps, for there are 16 rows. Runs are resumable as there.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ablation import save, show
from collected import row
from crossmix.engine import BusyError
from pairs import PAIRS
from trials import Job, Variant, run_all

PAIR = PAIRS["streetscenes"]
STEPS = PAIR.steps // 3
BASE = Variant("dacs")  # with the threshold and the decay of the pair

# Each option with all its values in order; the base's value is there as the base itself.
OPTIONS: dict[str, dict[str, Variant]] = {
    "threshold": {
        f"{value:g}": BASE if value == PAIR.threshold else replace(BASE, threshold=value)
        for value in (0.5, 0.7, 0.9, 0.968)
    },
    "EMA decay": {
        f"{value:g}": BASE if value == PAIR.decay else replace(BASE, decay=value) for value in (0.0, 0.9, 0.99, 0.999)
    },
    "ratio of classes": {f"{value:g}": replace(BASE, ratio=value) for value in (0.25, 0.5, 0.75)},
    "lambda scope": {scope: replace(BASE, scope=scope) for scope in ("image", "batch", "pixel", "none")},
    "ignored pixels": {
        "can be drawn": replace(BASE, include_ignored=True),
        "never drawn": replace(BASE, include_ignored=False),
    },
    "teacher's BatchNorm": {
        "batch statistics": replace(BASE, mode="train"),
        "running statistics": replace(BASE, mode="eval"),
    },
    "ASPP branches": {"2": replace(BASE, aspp_branches=2), "4": replace(BASE, aspp_branches=4)},
    "what is pasted": {"classes": BASE, "a box (CutMix)": replace(BASE, boxes=True)},
}


def rows() -> dict[str, Variant]:
    """Every variant once, the base first, by the name of its row."""
    variants = {"dacs": BASE}
    for option, values in OPTIONS.items():
        for value, variant in values.items():
            if variant != BASE:
                variants[row_name(option, value)] = variant
    return variants


def row_name(option: str, value: str) -> str:
    """What result files call a variant."""
    return f"{option}: {value}"


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--options", nargs="+", choices=tuple(OPTIONS), default=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="folder of the runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sensitivity-streetscenes.json")
    args = parser.parse_args()
    chosen = {name: variant for name, variant in rows().items() if name.split(": ")[0] in {"dacs", *args.options}}
    jobs = [Job(PAIR.name, name, chosen[name], seed, args.steps) for seed in range(args.seeds) for name in chosen]
    try:
        documents = run_all(jobs, args.out, args.workers)
    except BusyError as error:
        raise SystemExit(f"error: {error}") from error
    found = {name: row([d for d, job in zip(documents, jobs, strict=True) if job.row == name]) for name in chosen}
    for entry in found.values():
        entry.pop("by_class", None)
    show(found)
    if args.save:
        save("sensitivity-streetscenes", documents, found)


if __name__ == "__main__":
    main()
