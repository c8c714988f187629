"""How signals end the trainer: with 0, from its first moment to its last, and once.

Nothing heavy is imported here: the trainer imports this first, for its other imports take seconds.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Stopped", "end_early", "end_undisturbed", "ended_by_signals"]

BOTH = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal ended the run."""


def end_early() -> None:
    """Have a signal end this process at once, as long as it has only begun to import what it needs."""
    for number in BOTH:
        signal.signal(number, _leave)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and Ctrl-C end what is done in a `with` block wherever it is, by `Stopped`.

    For what leaves nothing half done: opening, rendering and caching data, building a network, writing a report.
    """
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not the main thread: there are no handlers
        for number in BOTH:
            before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is _leave:  # this process is the trainer's alone, and over
                end_undisturbed()
            else:
                signal.signal(number, handler)


def end_undisturbed() -> None:
    """Ignore SIGTERM from here on, as launchers repeat it, and the first Ctrl-C; the next ends the process at once."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, _insist)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    os.write(1, b"stopped before it began\n")
    os._exit(0)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped


def _insist(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
