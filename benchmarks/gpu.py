"""Check crossmix on a GPU, then measure everything there: one command of less than nine minutes.

    python benchmarks/gpu.py                        on a machine with a GPU
    python benchmarks/gpu.py --out DIR              result files into another folder
    python benchmarks/gpu.py --device cpu --quick   the same stages on a CPU, to see that they run, with more time

First the checks: the tests that need a GPU, and `gpu_checks.py`. Then the suites, each a process of its own with its
own time budget, which writes <suite>--cuda.json when it is done; one that fails or is out of time does not stop the
others, and what it printed last is shown. A table ends it. The exit code is 1 if a check failed.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from targets import LINES, Line, table

HERE = Path(__file__).parent
EAGER = ("released style", "plain", "small logits", "channels last", "RepeatedSGD", "updated once", "bf16")
LIMIT = 530  # seconds, of all stages together on a GPU
LEAST = 5  # seconds, with less none is begun


class Stage(NamedTuple):
    """One process, and how many seconds it gets."""

    name: str
    seconds: int
    command: Sequence[str]
    check: bool = False


def stages(device: str, out: Path, *, quick: bool) -> list[Stage]:
    """Checks, then what matters most; what is compiled for longest comes last."""
    cuda = device.startswith("cuda")
    patience = 1 if cuda else 10
    options = ["--device", device, "--save", "--out", str(out), *(["--quick"] if quick else ["--rounds", "11"])]

    def suite(name: str, seconds: int, *more: str, script: str = "") -> Stage:
        return Stage(name, patience * seconds, [sys.executable, str(HERE / f"{script or name}.py"), *options, *more])

    def steps(name: str, seconds: int, *forms: str) -> Stage:
        return suite(name, seconds, "--suite", name, "--no-memory", "--forms", *forms, script="step")

    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    checks = [sys.executable, str(HERE / "gpu_checks.py"), "--device", device]
    measured = [
        steps("step", 70, *EAGER, *(("tf32", "graph") if cuda else ())),
        suite("step-memory", 45, "--memory", "--forms", "released style", "RepeatedSGD", "bf16", script="step"),
        suite("mixing", 70),
        suite("teacher", 20),
        suite("augment", 45),
        suite("loss", 35),
        suite("optimizer", 15),
        suite("scaling", 30),
    ]
    if not quick:
        graph = ("graph, networks compiled",) if cuda else ()
        measured += [
            steps("step-compiled", 150, "bf16", "networks compiled", *graph),
            steps("step-whole", 150, "bf16", "step compiled"),
        ]
    return [Stage("tests", 90, tests, check=True)] * cuda + [
        Stage("checks", patience * 60, checks, check=True),
        *measured,
    ]


def run(stage: Stage, seconds: float, log: Path) -> str:
    """Run a stage for so long at most; how it went."""
    if seconds < min(LEAST, stage.seconds):
        return "SKIPPED, no time left"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(  # noqa: S603 - this project's own scripts
            stage.command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it and the processes that it has started
            process.wait()
            return f"OUT OF TIME after {seconds:.0f} s"
    return "ok" if code == 0 else f"FAILED, exit code {code}"


def main() -> int:
    """Run the stages, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled for long")
    parser.add_argument("--out", type=Path, help="benchmarks/results, with --quick or on a CPU a temporary folder")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    out = (args.out or (HERE / "results" if cuda and not args.quick else Path(tempfile.mkdtemp()))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = stages(args.device, out, quick=args.quick)
    known = [stage.name for stage in chosen]
    if unknown := [name for name in args.stages or () if name not in known]:
        parser.error(f"--stages knows {', '.join(known)}, got {unknown[0]!r}")
    begin, outcomes, checked = time.monotonic(), {}, True
    limit = LIMIT if cuda else math.inf
    if not cuda:
        print("tests: skipped, need a GPU")
    with tempfile.TemporaryDirectory() as folder:
        for stage in chosen:
            if args.stages and stage.name not in args.stages:
                continue
            started, log = time.monotonic(), Path(folder) / stage.name
            outcomes[stage.name] = run(stage, min(stage.seconds, limit - (started - begin)), log)
            print(f"{stage.name}: {outcomes[stage.name]}, {time.monotonic() - started:.0f} s", flush=True)
            good = outcomes[stage.name] == "ok"
            checked = checked and (good or not stage.check)
            shown = log.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in shown if stage.check and good else shown[-15:] if not good else []:
                print(f"  | {line}")
    print(f"\n{table(claims(out, args.device, outcomes))}\n\n{time.monotonic() - begin:.0f} seconds, results in {out}")
    return 0 if checked else 1


def claims(out: Path, device: str, outcomes: dict[str, str]) -> list[Line]:
    """What the result files of the stages that went well say."""
    kind = device.partition(":")[0]
    lines = []
    for name, outcome in outcomes.items():
        if outcome == "ok" and name in LINES:
            document = json.loads((out / f"{name}--{kind}.json").read_text(encoding="utf-8"))
            lines += LINES[name](document["results"], cuda=kind == "cuda")
    return lines


if __name__ == "__main__":
    sys.exit(main())
