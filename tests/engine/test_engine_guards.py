"""Stop requests, with real processes and signals."""

import os
import signal
import time
from pathlib import Path

import pytest

from crossmix.engine import StopRequest
from runs import run_ranks, start_code, wait_for

LOOP = """
    import sys, time
    from crossmix.engine import StopRequest
    with StopRequest() as stop:
        print("ready", flush=True)
        while not stop.agreed():
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(float(sys.argv[1]))
    print("left", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stop__finishes_the_step(number: signal.Signals) -> None:
    process = start_code(LOOP, "0")
    wait_for(process, "ready")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output.split() == ["asked", "left"]
    assert process.returncode == 0


def test_stop__a_second_ctrl_c_ends_at_once() -> None:
    process = start_code(LOOP, "600")
    wait_for(process, "ready")
    process.send_signal(signal.SIGINT)
    wait_for(process, "asked")
    process.send_signal(signal.SIGTERM)  # changes nothing
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == ""
    assert process.returncode == 130


def test_stop__puts_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


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
