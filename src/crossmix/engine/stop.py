"""Graceful shutdown: on SIGTERM or Ctrl-C, all ranks stop after the same step."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

__all__ = ["StopRequest"]


class StopRequest:
    """Turn SIGTERM and Ctrl-C into a flag that the training loop checks after each step.

    The first signal sets the flag; a Ctrl-C after it ends the process at once. Leaving the `with` block restores the
    previous handlers. Outside the main thread, where Python allows no signal handlers, a stop is never requested.

    Args:
        group: A CPU process group (gloo). `agreed` then combines the flags of all ranks, so every rank must call it at
            the same step.

    Example:
        >>> import os, signal
        >>> with StopRequest() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     stop.agreed()
        True
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.requested: bool = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def agreed(self) -> bool:
        """Return whether a stop was requested on any rank."""
        if self.group is None:
            return self.requested
        flag = torch.tensor(int(self.requested))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(130)
        self.requested = True
