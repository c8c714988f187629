"""Stop requests and the guard against numbers that are none, with real processes and signals."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from crossmix import DistributionAlignment, MeanTeacher
from crossmix.engine import FiniteGuard, NonFiniteError, StopRequest
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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


class Parts:
    """A student with BatchNorm, its teacher, an average, and an optimizer with momentum."""

    def __init__(self, optimizer: str = "sgd", *, last: bool = False) -> None:
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        if last:
            self.student.to(memory_format=torch.channels_last)
        self.teacher = MeanTeacher(self.student, decay=0.9)
        self.align = DistributionAlignment(2)
        build = {
            "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
            "fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
            "adam": lambda p: torch.optim.Adam(p, 0.1),
        }[optimizer]
        self.optimizer = build(self.student.parameters())

    def guard(self, skip: int) -> FiniteGuard:
        return FiniteGuard([self.student, self.teacher, self.align], self.optimizer, skip=skip)

    def step(self, guard: FiniteGuard | None, number: int, images: Tensor) -> None:
        logits = self.student(images)
        self.align.update(logits.softmax(1))
        loss = logits.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        if guard is not None:
            guard.check(loss, number)
        self.optimizer.step()
        self.teacher.update(self.student)
        if guard is not None:
            guard.restore()

    def state(self) -> list[Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        modules = (self.student, self.teacher.module, self.align)
        return [v.clone() for v in (*(v for m in modules for v in m.state_dict().values()), *moments)]


def images(number: int) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "fused", "adam"])
def test_guard__good_steps_are_untouched(optimizer: str, *, last: bool) -> None:
    plain, guarded = Parts(optimizer, last=last), Parts(optimizer, last=last)
    guard = guarded.guard(0)
    for number in range(4):
        plain.step(None, number, images(number))
        guarded.step(guard, number, images(number))
    for a, b in zip(plain.state(), guarded.state(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["sgd", "fused", "adam"])
@pytest.mark.parametrize("first", [False, True])
def test_guard__bad_steps_leave_no_trace(optimizer: str, value: float, *, first: bool) -> None:
    parts = Parts(optimizer)
    guard = parts.guard(2)
    if not first:
        parts.step(guard, 0, images(0))
    before = parts.state()
    bad = images(1)
    bad[0, 0, 0, 0] = value
    parts.step(guard, 1, bad)
    parts.step(guard, 2, bad)
    assert guard.skipped == 2
    after = parts.state()
    for a, b in zip(before, after, strict=False):  # what the optimizer has had no state for yet starts from zero
        assert torch.equal(a, b)
    assert all(not b.any() for b in after[len(before) :])
    with pytest.raises(
        NonFiniteError, match=r"step 3: the loss or a gradient is not finite, 3 such steps so far and 2"
    ):
        parts.step(guard, 3, bad)
    for a, b in zip(after, parts.state(), strict=True):
        assert torch.equal(a, b)
    parts.step(guard, 4, images(4))  # and good ones move on
    assert not all(torch.equal(a, b) for a, b in zip(after, parts.state(), strict=True))
    assert all(v.isfinite().all() for v in parts.state())


def test_guard__gradients_may_be_left_to_a_scaler() -> None:
    parts = Parts()
    guard = parts.guard(0)
    loss = parts.student(images(0)).square().mean()
    loss.backward()
    parts.student[0].weight.grad.fill_(torch.inf)
    guard.check(loss, 0, gradients=False)
    with pytest.raises(NonFiniteError) as caught:
        guard.check(loss, 5)
    assert caught.value.step == 5


def test_guard__refuses() -> None:
    with pytest.raises(ValueError, match="`skip` must not be negative"):
        Parts().guard(-1)
    with pytest.raises(RuntimeError, match="needs a `check` before it"):
        Parts().guard(0).restore()
    parts = Parts()
    guard = parts.guard(1)
    with torch.no_grad():
        parts.student[0].weight.fill_(2.0)  # a checkpoint is loaded
    guard.keep()
    bad = images(1) * torch.nan
    parts.step(guard, 1, bad)
    assert (parts.student[0].weight == 2.0).all()


@pytest.mark.gpu
def test_guard__on_a_gpu_without_waiting() -> None:
    parts = Parts()
    for module in (parts.student, parts.teacher, parts.align):
        module.cuda()
    guard = parts.guard(0)
    good, bad = images(0).cuda(), images(1).cuda() * torch.nan
    parts.step(guard, 0, good)
    before = parts.state()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts.step(guard, 1, bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(before, parts.state(), strict=True):
        assert torch.equal(a, b)
    torch.cuda.synchronize()

    def go_on() -> None:
        for number in range(2, 5):
            parts.step(guard, number, good)
            torch.cuda.synchronize()

    with pytest.raises(NonFiniteError, match="step 1"):  # once the flag has arrived
        go_on()
