"""Run the speed suites with their baselines and print a table of results and targets.

    python -m benchmarks.speed --quick               few rounds, without the slowest candidates (minutes)
    python -m benchmarks.speed --save                everything, saved to benchmarks/results
    python -m benchmarks.speed mixing augment        only these suites
    python -m benchmarks.speed --device cuda --save  on a GPU

If a suite fails, the others still run; it is named at the end, and the exit code is 1. A missed target is not a
failure.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.speed.common import BIG, RESULTS, commit, machine, today
from benchmarks.speed.targets import LINES, Line, table

SUITES = ("mixing", "augment", "loss", "teacher", "optimizer", "evaluation", "input", "step", "step-memory", "scaling")
STEPS_ON_CUDA = ("step", "step-compiled", "step-kernels", "step-memory")
CUDA_SUITES = ("mixing", "augment", "loss", "teacher", "optimizer", *STEPS_ON_CUDA, "scaling")


def main() -> int:
    args = arguments()
    begin = time.perf_counter()
    lines: list[Line] = []
    failed = []
    for suite in args.suites:
        print(f"\n=== {suite}", flush=True)
        try:
            module = importlib.import_module(f"benchmarks.speed.{suite.partition('-')[0]}")
            measure = getattr(module, f"measure_{suite.partition('-')[2]}" if "-" in suite else "measure")
            results = measure(args.device, args.rounds, quick=args.quick)
            if args.save:
                save(suite, args.device, results, args.out, rounds=args.rounds)
            lines += LINES[suite](results, cuda=args.device.startswith("cuda"))
        except Exception:  # noqa: BLE001 - the other suites should still run
            traceback.print_exc()
            failed.append(suite)
    print(f"\n{table(lines)}\n\n{time.perf_counter() - begin:.0f} seconds")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    """Parse the command line; restart the process with an allocator that keeps freed memory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = tuple(dict.fromkeys((*SUITES, *CUDA_SUITES)))
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(known)} (default: all for the device)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--rounds", type=int, help="timed rounds per candidate (default: 21, or 5 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few rounds, without the slowest candidates")
    parser.add_argument("--save", action="store_true", help="write OUT/<suite>--<device>.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for --save (default: benchmarks/results)")
    parser.add_argument("--default-malloc", action="store_true", help="do not change glibc's allocator settings")
    args = parser.parse_args()
    if unknown := [suite for suite in args.suites if suite not in known]:
        parser.error(f"unknown suite {unknown[0]!r}; the suites are {', '.join(known)}")
    if not args.suites:
        args.suites = CUDA_SUITES if args.device.startswith("cuda") else SUITES
    if args.rounds is None:
        args.rounds = 5 if args.quick else 21
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2 to compute a spread, got {args.rounds}")
    if args.save and args.quick and args.out == RESULTS:
        parser.error("--save with --quick needs --out: the committed results are from full runs")
    if not args.default_malloc and os.environ.get("MALLOC_TRIM_THRESHOLD_") != BIG:
        os.environ.update(MALLOC_MMAP_THRESHOLD_=BIG, MALLOC_TRIM_THRESHOLD_=BIG)  # read at process start
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]])  # noqa: S606
    torch.set_num_threads(1)
    return args


def save(suite: str, device: str, results: object, folder: Path, *, rounds: int) -> None:
    document = {
        "suite": suite,
        "date": today(),
        "commit": commit(),
        "machine": machine(device),
        "rounds": rounds,
        "results": results,
    }
    path = folder / f"{suite}--{torch.device(device).type}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    sys.exit(main())
