"""Run the suites of speed one after the other and print what they say about the numbers to reach.

    python benchmarks/run.py --quick            few rounds, in minutes, without the slowest candidates
    python benchmarks/run.py --save             everything, into benchmarks/results

A suite that fails is named at the end, and the exit code is then 1; the others run all the same. A target that is
missed is no failure.
"""

import importlib
import sys
import time
import traceback

from common import arguments, parser, save
from targets import LINES, Line, table

SUITES = ("mixing", "augment", "loss", "teacher", "optimizer", "evaluation", "input", "step", "scaling")


def main() -> int:
    """Run, print the table, and return the exit code."""
    options = parser(__doc__)
    options.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help="only these")
    args = arguments(options)
    begin = time.perf_counter()
    lines: list[Line] = []
    failed = []
    for suite in args.suites:
        print(f"\n=== {suite}", flush=True)
        try:
            results = importlib.import_module(suite).measure(args.device, args.rounds, quick=args.quick)
            if args.save:
                save(suite, args.device, results, args.out)
            lines += LINES[suite](results, cuda=args.device.startswith("cuda"))
        except Exception:  # noqa: BLE001 - whatever it is, the other suites are to run
            traceback.print_exc()
            failed.append(suite)
    print(f"\n{table(lines)}\n\n{time.perf_counter() - begin:.0f} seconds")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
