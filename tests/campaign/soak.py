"""The trainer for hours, stopped and resumed: memory, files, threads and speed stay level, and no step is lost."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from campaign.kills import flags
from runs import TRAINER, changed, log_of, metrics_of, steps_saved

MINUTES = {"ci": 1, "nightly": 120}
RESTARTS = 5
EVALUATED = 50
"""Steps from one evaluation, which starts processes and opens files, to the next."""
LEVEL = {"memory": 0.01, "memory with workers": 0.02, "open files": 0.0, "threads": 0.0, "CPU ms per step": 0.1}
"""How much each may rise while the trainer runs, as a share of it: the median over the times between restarts."""
SHORT = {"ci": 20}
"""How many times as much within a minute, in which caches still fill and a step is rarely measured."""
TO_BEGIN = 300
"""Seconds until the first step at most."""
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
Series = dict[str, list[float]]


def run(profile: str) -> dict[str, Any]:
    """Train for some minutes, or CROSSMIX_SOAK_MINUTES, with so many restarts, and look at the trainer meanwhile."""
    minutes = float(os.environ.get("CROSSMIX_SOAK_MINUTES", MINUTES[profile]))
    parts: list[Series] = []
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "run"
        options = [
            *changed(flags(Path(root)), **{"steps": "10000000", "save-every": "25", "eval-every": str(EVALUATED)})
        ]
        for _ in range(RESTARTS + 1):
            resume = ["--resume"] if steps_saved(out) else []
            seen, code = watched([*options, "--workers", "1", "--out", str(out), *resume], out, minutes * 10)
            parts.append(seen)
            if code:
                wrong["exit"] = f"exit code {code}, after {steps_saved(out)}: {printed(out)}"
                break
        else:
            wrong |= lost(out)
        steps = (steps_saved(out) or [0])[-1]
        speeds = [record["it_per_s"] for record in log_of(out)] if steps else [0.0]
    rises = {name: median(rise(part.get(name, [])) for part in parts) for name in LEVEL}
    for name, share in LEVEL.items():
        if rises[name] > share * SHORT.get(profile, 1):
            wrong[name] = f"rises by {rises[name]:.1%} from one restart to the next"
    memories = [part.get("memory", [0.0]) for part in parts]
    tenth = max(1, len(speeds) // 10)
    return {
        "minutes": minutes, "restarts": len(parts) - 1, "steps": steps,
        **{f"rise of {name}": f"{value:+.2%}" for name, value in rises.items()},
        "MB at first and at last": " and ".join(f"{median(memory):.0f}" for memory in (memories[0], memories[-1])),
        "steps per s at first and at last": f"{median(speeds[:tenth]):.1f} and {median(speeds[-tenth:]):.1f}",
        "wrong": wrong,
    }  # fmt: skip


def watched(options: list[str], out: Path, seconds: float) -> tuple[Series, int]:
    """Train, look at the process again and again from its first step on, and stop it by a signal.

    Returns what was seen, and the exit code.
    """
    command = [sys.executable, str(TRAINER), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.parent / "printed.txt").open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    log, seen, end = out / "log.jsonl", Series(), time.monotonic() + TO_BEGIN
    begun = (steps_saved(out) or [0])[-1]
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(max(0.3, seconds / 500))
            with contextlib.suppress(OSError):  # a process that has just ended
                if newest(log) > begun:
                    end = end if seen else time.monotonic() + seconds
                    look(process.pid, newest(log), seen)
        process.terminate()
        return per_step(seen), process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def look(process: int, step: int, seen: Series) -> None:
    """Add what Linux tells of the trainer and of its workers."""
    of_workers = sum(resident(child) for child in children(process))
    fields = stat(process)
    for name, value in {
        "memory": resident(process),
        "memory with workers": resident(process) + of_workers,
        "open files": sum(1 for _ in Path(f"/proc/{process}/fd").iterdir()),
        "threads": int(fields[17]),
        "CPU": (int(fields[11]) + int(fields[12])) / TICKS,
        "step": step,
    }.items():
        seen.setdefault(name, []).append(value)


def stat(process: int) -> list[str]:
    """The fields of a process's `stat` from its state on; see proc_pid_stat(5)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()


def resident(process: int) -> float:
    """The megabytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE / 1e6


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def newest(log: Path) -> int:
    """The last step in a log."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().split(b"\n")
    return int(lines[-2].partition(b'"step": ')[2].partition(b",")[0]) if len(lines) > 1 else 0


def per_step(seen: Series) -> Series:
    """The same with the processor's time of a step, which other processes change less than the clock's."""
    steps, spent = np.diff(seen.pop("step", [])), np.diff(seen.pop("CPU", []))
    return {**seen, "CPU ms per step": list(1e3 * spent[steps > 0] / steps[steps > 0])}


def rise(values: list[float]) -> float:
    """How much a series rises while it lasts, without its first fifth: the median of all slopes (Theil and Sen)."""
    settled = np.array(values[len(values) // 5 :])
    if len(settled) < 3:
        return float("inf")  # too little was seen to say that it is level
    first, second = np.triu_indices(len(settled), 1)
    slope = np.median((settled[second] - settled[first]) / (second - first))
    return float(slope * len(settled) / np.median(settled))


def lost(out: Path) -> dict[str, str]:
    """Steps and evaluations that are missing or there twice."""
    last, found = steps_saved(out)[-1], {}
    if [record["step"] for record in log_of(out)] != list(range(1, last + 1)):
        found["log"] = f"it does not hold the steps from 1 to {last}, each once"
    evaluated = [entry["step"] for entry in metrics_of(out)["evaluations"]]
    wanted = list(range(EVALUATED, last + 1, EVALUATED))
    if evaluated != wanted and evaluated != [step for step in wanted if step < last]:  # stopped before the last one
        found["evaluations"] = f"not one every {EVALUATED} steps to {last}: {evaluated}"[:300]
    return found


def printed(out: Path) -> str:
    return (out.parent / "printed.txt").read_text()[-300:]
