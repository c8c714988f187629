"""Console progress: a bar on a terminal, one line per interval otherwise."""

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

try:
    from tqdm import tqdm
except ImportError:  # optional dependency; without it progress is printed line by line
    tqdm = None

__all__ = ["Progress"]


class Progress:
    """Show speed, remaining time, the share of time spent waiting for data, and peak memory.

    Args:
        total: Number of steps of the run.
        start: Number of steps already done.
        title: Label of the bar.
        shown: Whether to print anything; pass False on all ranks but one.

    Example:
        >>> progress = Progress(10, title="demo")
        >>> with progress.waiting():
        ...     pass
        >>> sorted(progress.measured(5))
        ['data_wait', 'it_per_s', 'memory_mb']
    """

    def __init__(self, total: int, *, start: int = 0, title: str = "", shown: bool = True) -> None:
        self.total = total
        self.shown = shown
        self._bar = None
        if shown and tqdm is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=title, unit="it")
        self._done = start
        self._then = time.perf_counter()
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside a `with` block as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    def measured(self, done: int) -> dict[str, float]:
        """Measure the interval since the last call, given the number of steps done so far.

        Returns:
            `it_per_s`; `data_wait`, the share of the time spent waiting for data; `memory_mb`, the peak allocated GPU
            memory in MB, or the peak memory of the process if no GPU is used.
        """
        now = time.perf_counter()
        elapsed = max(now - self._then, 1e-9)
        record = {
            "it_per_s": round((done - self._done) / elapsed, 3),
            "data_wait": round(self._waited / elapsed, 3),
            "memory_mb": round(_peak_memory(), 1),
        }
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done, self._then, self._waited = done, now, 0.0
        return record

    def show(self, record: Mapping[str, float | int]) -> None:
        """Show values by name, including `step` and `it_per_s`, on the bar, or in a line with the remaining time."""
        values = " ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        elif self.shown:
            left = (self.total - record["step"]) / max(record["it_per_s"], 1e-9)
            self.say(f"step {record['step']}/{self.total} {values} left {left:.0f} s")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.shown:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _peak_memory() -> float:
    """Peak memory in MB: allocated memory of the fullest GPU in use, otherwise resident memory of this process."""
    devices = range(torch.cuda.device_count())
    if torch.cuda.is_available() and (peak := max(map(torch.cuda.max_memory_allocated, devices))):
        return peak / 1e6
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0.0
    import resource  # noqa: PLC0415 - not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1e-3)
