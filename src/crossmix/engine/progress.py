"""What a person sees of a run: a bar on a terminal, a line per interval in a file."""

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

try:
    from tqdm import tqdm
except ImportError:  # the bar is an extra; the lines need nothing
    tqdm = None

__all__ = ["Progress"]


class Progress:
    """Speed, time left, time spent waiting for data, and peak memory.

    Args:
        total: Steps of the run.
        start: Steps that are done already.
        title: What the bar is called.
        shown: Whether to print at all; False on all ranks but one.

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
        """Count the time inside a `with` block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def measured(self, done: int) -> dict[str, float]:
        """Measure the interval since the last call.

        Args:
            done: Steps that are done now.

        Returns:
            `it_per_s`; `data_wait`, the share of the time that went into waiting for data; `memory_mb`, the peak of
            allocated GPU memory in MB, or of the process's memory without a GPU.
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
        """Show a record of the log: on the bar, or as a line with the time that is left.

        Args:
            record: Numbers by name; holds `step` and `it_per_s`.
        """
        values = " ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        elif self.shown:
            left = (self.total - record["step"]) / max(record["it_per_s"], 1e-9)
            self.say(f"step {record['step']}/{self.total} {values} left {left:.0f} s")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one.

        Args:
            text: The line.
        """
        if self._bar is not None:
            self._bar.write(text)
        elif self.shown:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _peak_memory() -> float:
    """Of the GPU where one is in use, otherwise of this process, in MB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0.0
    import resource  # noqa: PLC0415 - not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1e-3)
