"""Stop requests, with real processes and signals."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from crossmix.engine import StopRequest
from runs import fork, run_ranks


def wait(ready: Callable[[], object], asked: Path, seconds: float) -> None:
    """As a trainer does, whose last step takes this long."""
    with StopRequest() as stop:
        ready()
        while not stop.agreed():
            time.sleep(0.01)
        asked.touch()
        time.sleep(seconds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop__finishes_the_step(number: signal.Signals, tmp_path: Path) -> None:
    process = fork(wait, tmp_path / "asked", 0)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "asked").exists()


def test_stop__a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    process = fork(wait, tmp_path / "asked", 600)
    os.kill(process.pid, signal.SIGINT)
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)  # changes nothing
    process.join(0.1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130


def test_stop__puts_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_stop__is_never_asked_for_outside_the_main_thread() -> None:
    before, agreed = signal.getsignal(signal.SIGTERM), []

    def elsewhere() -> None:
        with StopRequest() as stop:
            agreed.append((stop.agreed(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert agreed == [(False, before)]


@pytest.mark.usefixtures("process_group")
def test_stop__a_group_hears_of_it() -> None:
    stop = StopRequest(dist.group.WORLD)
    assert stop.agreed() is False
    stop.requested = True
    assert stop.agreed() is True


def test_stop__only_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


RANKS = """
    from crossmix.engine import StopRequest
    with StopRequest(dist.group.WORLD) as stop:
        for step in range(10):
            stop.requested = stop.requested or (rank == 1 and step == 3)
            if stop.agreed():
                break
    print(step)
"""


@pytest.mark.slow
def test_stop__all_ranks_at_the_same_step(tmp_path: Path) -> None:
    assert run_ranks(RANKS, 2, tmp_path) == ["3\n", "3\n"]
