"""Why StreetScenes does not show all that the paper leads one to expect: the rows concerned with other options.

    python benchmarks/causes.py --workers 2 --save

- A third of the steps, as in sensitivity.py: if a margin grows with the budget, the budget is a cause.
- Naive ClassMix with the threshold of the paper's code, 0.968: with 0.5 nearly every pixel counts from the start, right
  or wrong.

Runs are resumable and repeatable as those of ablation.py, whose rows of the same seeds they are held against on
docs/results.md.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ablation import METHODS, save, show
from collected import row
from crossmix import recipes
from crossmix.engine import BusyError
from sensitivity import PAIR, STEPS
from trials import Job, run_all

STRICT = "classmix, threshold 0.968"
ROWS = {
    "source": METHODS["source"],
    "source + jitter": METHODS["source + jitter"],
    "classmix": METHODS["classmix"],
    STRICT: replace(METHODS["classmix"], threshold=recipes.RELEASED.threshold),
    "dacs": METHODS["dacs"],
}


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/causes"), help="folder of the runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/causes-streetscenes.json")
    args = parser.parse_args()
    jobs = [Job(PAIR.name, name, ROWS[name], seed, args.steps) for seed in range(args.seeds) for name in ROWS]
    try:
        documents = run_all(jobs, args.out, args.workers)
    except BusyError as error:
        raise SystemExit(f"error: {error}") from error
    rows = {name: row([d for d, job in zip(documents, jobs, strict=True) if job.row == name]) for name in ROWS}
    for entry in rows.values():
        entry.pop("by_class", None)
    show(rows)
    if args.save:
        save("causes-streetscenes", documents, rows)


if __name__ == "__main__":
    main()
