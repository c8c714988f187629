"""Shared by all suites: interleaved timing, peak memory in a fresh process, and a description of the machine."""

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

import kornia
import torch

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BIG = str(1 << 32)
Rows = dict[str, dict[str, float]]


def interleave(candidates: Mapping[str, Callable[[], object]], *, rounds: int, device: str, warmup: int = 3) -> Rows:
    """Time every candidate once per round; return median and interquartile range in milliseconds."""
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


def _time(run: Callable[[], object], device: str) -> float:
    """Time one call in milliseconds: CPU time of this thread, or GPU time between events."""
    if is_cuda(device):
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


def compare(
    title: str, candidates: Mapping[str, Callable[[], object]], baseline: str, *, rounds: int, device: str
) -> Rows:
    """Time every candidate and print the times next to those of the baseline."""
    rows = interleave(candidates, rounds=rounds, device=device)
    show(title, rows, baseline)
    return rows


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def show(title: str, rows: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    print(f"\n{title}")
    width = max(map(len, rows))
    for name, row in rows.items():
        ratio = row["median_ms"] / rows[baseline]["median_ms"]
        print(f"  {name:{width}}  {row['median_ms']:9.3f} ms  (IQR {row['iqr_ms']:7.3f})  {ratio:8.3f} x {baseline}")


def held_bytes(device: str) -> int:
    """Memory in use by this process: resident memory, or memory allocated on the GPU."""
    if is_cuda(device):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def peak_mb(run: Callable[[], object], device: str, *, since: int) -> dict[str, float]:
    """Peak memory of one call beyond `since` bytes, in MB; on a GPU also the memory reserved from the driver."""
    if is_cuda(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_mb": (peak - since) / 1e6, "reserved_mb": reserved / 1e6}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset VmHWM
    run()
    return {"peak_mb": (_resident("VmHWM") - since) / 1e6}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def in_fresh_process(module: str, expression: str) -> dict[str, float]:
    """Evaluate an expression of a suite's module in a new process that returns freed large blocks to the system."""
    code = f"import json; from benchmarks.speed import {module}; print(json.dumps({module}.{expression}))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(  # noqa: S603 - this project's own module
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def today() -> str:
    return dt.datetime.now(tz=dt.UTC).date().isoformat()


def commit() -> str | None:
    """The measured commit, with a + if there are uncommitted changes."""
    head = _git("rev-parse", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", "src", ":(glob)benchmarks/**/*.py").returncode != 0
    return f"{head}{'+' if changed else ''}" if head else None


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603, S607


def machine(device: str) -> dict[str, object]:
    cuda = is_cuda(device)
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kornia": kornia.__version__,
        "malloc": "kept" if os.environ.get("MALLOC_TRIM_THRESHOLD_") == BIG else "default",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    version = Path("/sys/module/nvidia/version")
    return version.read_text(encoding="utf-8").strip() if version.exists() else None
