"""Let SIGTERM and Ctrl-C end the trainer with exit code 0 at any moment, however often they are sent.

The trainer imports this module first, since its other imports take seconds; nothing heavy may be imported here.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Stopped", "end_early", "end_undisturbed", "ended_by_signals", "hear"]

BOTH = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the run. Not an `Exception`, so that no handler of errors mistakes it for a failure."""


def end_early() -> None:
    """Let a signal end this process at once, while it is still importing."""
    for number in BOTH:
        signal.signal(number, _leave)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise `Stopped` anywhere in a `with` block.

    For work that may end at any point: opening, rendering and caching data, building a network, writing a report.
    """
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # outside the main thread there are no handlers
        for number in BOTH:
            before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is _leave:  # a process of the trainer alone, which ends here
                end_undisturbed()
            else:
                signal.signal(number, handler)


def end_undisturbed() -> None:
    """Ignore further SIGTERMs, which launchers repeat, and the first Ctrl-C; a second one ends the process at once."""
    with suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, _insist)


def hear(seconds: float = 1.0) -> None:
    """Wait for a signal that other processes of the run have heard before this one, which raises `Stopped`."""
    time.sleep(seconds)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    os.write(1, b"stopped before it began\n")
    os._exit(0)


def _end(number: int, frame: FrameType | None) -> None:
    handled = sys.exception()
    while handled and not isinstance(handled, Stopped):
        handled = handled.__context__
    if not handled:
        raise Stopped
    end_undisturbed()  # the run ends already, by a `Stopped` that says what is saved
    if number == signal.SIGINT:
        _insist(number, frame)


def _insist(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
