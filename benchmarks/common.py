"""What the suites share: interleaved timing, the machine's description, and the result file."""

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import kornia
import torch

RESULTS = Path(__file__).parent / "results"
BIG = str(1 << 32)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every suite."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, help="21, or 5 with --quick")
    options.add_argument("--quick", action="store_true", help="few rounds, without the slowest candidates")
    options.add_argument("--save", action="store_true", help="write benchmarks/results/<suite>--<device>.json")
    options.add_argument("--out", type=Path, default=RESULTS, help="the folder that --save writes to")
    options.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator as it is")
    return options


def arguments(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and start again with an allocator that keeps its memory."""
    args = options.parse_args()
    if args.rounds is None:
        args.rounds = 5 if args.quick else 21
    if args.rounds < 2:
        options.error(f"--rounds must be at least 2, so that there is a spread, got {args.rounds}")
    if args.save and args.quick and args.out == RESULTS:
        options.error("--save with --quick needs an --out: the committed results are those of full runs")
    if not args.default_malloc and os.environ.get("MALLOC_TRIM_THRESHOLD_") != BIG:
        os.environ.update(MALLOC_MMAP_THRESHOLD_=BIG, MALLOC_TRIM_THRESHOLD_=BIG)  # read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this very script
    torch.set_num_threads(1)
    return args


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, device: str, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time each candidate once per round; return median and interquartile range in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            elapsed = _time(run, device)
            if i >= warmup:
                times[name].append(elapsed)
    report = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        report[name] = {"median_ms": statistics.median(values), "iqr_ms": high - low}
    return report


def show(title: str, rows: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    """Print rows with their ratio to a baseline."""
    print(f"\n{title}")
    width = max(map(len, rows))
    for name, row in rows.items():
        ratio = row["median_ms"] / rows[baseline]["median_ms"]
        print(f"  {name:{width}}  {row['median_ms']:9.3f} ms  (IQR {row['iqr_ms']:7.3f})  {ratio:8.3f} x {baseline}")


class Measure(Protocol):
    """What a suite is."""

    def __call__(self, device: str, rounds: int, *, quick: bool) -> object:
        """Measure, print, and return what the result file holds."""


def command(suite: str, description: str | None, measure: Measure) -> None:
    """Run a suite that has no options of its own, and save where asked."""
    args = arguments(parser(description))
    results = measure(args.device, args.rounds, quick=args.quick)
    if args.save:
        save(suite, args.device, results, args.out)


def save(suite: str, device: str, results: object, folder: Path = RESULTS) -> None:
    """Write the results with all that they depend on."""
    document = {
        "suite": suite,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        "results": results,
    }
    path = folder / f"{suite}--{torch.device(device).type}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def commit() -> str | None:
    """The commit that was measured, with a + where the code has changed since."""
    head = _git("rev-parse", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", "src", ":(glob)benchmarks/*.py").returncode != 0
    return f"{head}{'+' if changed else ''}" if head else None


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)  # noqa: S603, S607


def machine(device: str) -> dict[str, object]:
    """The machine and the versions."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kornia": kornia.__version__,
        "malloc": "kept" if os.environ.get("MALLOC_TRIM_THRESHOLD_") == BIG else "default",
    }


def _time(run: Callable[[], object], device: str) -> float:
    """Milliseconds of CPU time, or of GPU time between events."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    begin = time.thread_time()
    run()
    return (time.thread_time() - begin) * 1e3


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
