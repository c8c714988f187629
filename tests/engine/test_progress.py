"""Progress on a terminal and elsewhere, with optional packages and without."""

import contextlib
import importlib.util
import resource
import runpy
import sys
import time
from types import ModuleType

import pytest
import torch

from crossmix import _progress
from crossmix.datasets import _images
from crossmix.engine import Progress, progress


class Bar:
    """In place of tqdm's."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.did: list[object] = []

    def update(self, steps: int) -> None:
        self.did.append(steps)

    def set_postfix_str(self, text: str) -> None:
        self.did.append(text)

    def write(self, text: str) -> None:
        self.did.append(text)

    def close(self) -> None:
        self.did.append("closed")


def use(made: Progress) -> None:
    assert made.measured(7)["it_per_s"] > 0
    made.show({"step": 7, "loss": 0.123456, "it_per_s": 2.0})
    made.say("saved")
    made.close()


def test_progress__is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "tqdm", Bar)
    made = Progress(10, start=4, title="run")
    use(made)
    assert made._bar is not None
    assert made._bar.options == {"total": 10, "initial": 4, "desc": "run", "unit": "it"}
    assert made._bar.did == [3, "loss 0.1235 it_per_s 2", "saved", "closed"]
    use(Progress(10, shown=False))
    assert capsys.readouterr() == ("", "")


def test_progress__is_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    use(Progress(10, start=4))
    use(Progress(10, start=4, shown=False))
    assert capsys.readouterr().out == "step 7/10 loss 0.1235 it_per_s 2 left 2 s\nsaved\n"


def test_measured__speed_and_waiting_since_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    made = Progress(100, start=10)
    for done, waited, other in ((20, 1.0, 3.0), (22, 0.5, 0.5)):
        with made.waiting():
            now[0] += waited
        now[0] += other
        measured = made.measured(done)
        assert measured["it_per_s"] == {20: 2.5, 22: 2}[done]
        assert measured["data_wait"] == {20: 0.25, 22: 0.5}[done]
    with contextlib.suppress(OSError), made.waiting():
        now[0] += 1.0
        raise OSError("a sample that cannot be read")
    assert made.measured(22)["data_wait"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it is the GPU's memory")
def test_measured__memory_is_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for platform, factor in (("linux", 1e-3), ("darwin", 1e-6)):
        monkeypatch.setattr(sys, "platform", platform)
        assert Progress(1).measured(1)["memory_mb"] == pytest.approx(peak * factor, rel=0.1, abs=0.1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # as on Windows
    assert Progress(1).measured(1)["memory_mb"] == 0


@pytest.mark.parametrize("module", [_progress, progress, _images], ids=lambda module: module.__name__)
def test_optional_packages__may_be_missing(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    without = runpy.run_path(str(module.__file__))
    assert without["Image" if module is _images else "tqdm"] is None
    if module is _progress:
        for total, lines in ((100, 10), (99, 0)):
            assert list(without["shown"](range(total), total, "reading", "file")) == list(range(total))
            said = capsys.readouterr().err.splitlines()
            assert said == [f"reading: {tenth * 10} of 100" for tenth in range(1, lines + 1)]
        assert len(list(without["shown"](range(199), None, "reading", "file"))) == 199
        assert capsys.readouterr().err == "reading: 100\n"
