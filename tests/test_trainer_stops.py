"""What stops the trainer, and how it goes on: signals, broken files, bad steps, moved and other data."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from crossmix.datasets import StreetScenes
from crossmix.models import deeplab_v2_tiny, save_weights
from test_trainer import EXAMPLE, assert_same, final, folders, run, trainer
from test_trainer_robust import TORCHRUN, one_thread, start, wait_for_step

__all__ = ["folders", "one_thread", "run", "trainer"]  # fixtures

# Starts the trainer with workers of another kind.
STARTER = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*.pt"))


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def changed(flags: list[str], **values: str) -> list[str]:
    """The flags, some with other values."""
    flags = list(flags)
    for name, value in values.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


@pytest.fixture(scope="module")
def long_validation(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags, with validation images enough for an evaluation of some seconds."""
    root = tmp_path_factory.mktemp("long") / "cs"
    shutil.copytree(folders[3], root)
    for path in list(root.glob("*/val/*/*.png")):
        for i in range(1, 120):
            shutil.copy(path, path.with_name(path.name.replace("_00", f"_{i:03d}", 1)))
    return changed(folders, cityscapes=str(root))


@pytest.fixture(scope="module")
def wholes(trainer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs that were never stopped, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def whole(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("whole") / "run"
            assert trainer.main([*flags, "--out", str(made[flags])]) == 0
        return made[flags]

    return whole


WAYS = [
    pytest.param(*way, marks=() if way in {("2", "fork", "group", "evaluation"), ("2", "spawn", "group", "training")}
                 else pytest.mark.slow)  # fmt: skip
    for way in itertools.product(
        ("0", "2"), ("fork", "spawn", "forkserver"), ("process", "group"), ("training", "evaluation")
    )
    if way[:2] not in {("0", "spawn"), ("0", "forkserver")}
]


@pytest.mark.parametrize(("workers", "method", "to", "phase"), WAYS)
def test_signal__saves_exits_with_0_and_goes_on_to_the_same_end(
    trainer: ModuleType, long_validation: list[str], wholes: Callable[..., Path], tmp_path: Path,
    workers: str, method: str, to: str, phase: str,
) -> None:  # fmt: skip
    (tmp_path / "starter.py").write_text(STARTER)
    evaluating = phase == "evaluation"
    flags = [*long_validation, "--eval-every", "3", "--steps", "4"]
    if not evaluating:
        flags += ["--eval-split", "train", "--eval-every", "1000", "--steps", "60"]  # few images at the end
    flags += ["--save-every", "1000"]
    out = tmp_path / "run"
    process = start(*flags, "--workers", workers, "--out", str(out), launcher=(str(tmp_path / "starter.py"), method))
    if evaluating:
        wait_until(lambda: steps_saved(out) == [3], process)
        time.sleep(0.3)
    else:
        wait_for_step(out, 3, process)
    number = signal.SIGTERM if to == "process" else signal.SIGINT
    begin = time.monotonic()
    (os.kill if to == "process" else os.killpg)(process.pid, number)
    printed, _ = process.communicate(timeout=120)
    print(phase, workers, method, to, time.monotonic() - begin)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    (saved,) = steps_saved(out)
    assert f"stopped after step {saved}, which is saved; the same command with --resume --out {out}" in printed
    if evaluating:
        assert metrics_of(out)["evaluations"] == []  # it was in the midst of one
    assert trainer.main([*flags, "--workers", "0", "--out", str(out), "--resume"]) == 0
    whole = wholes(*flags)
    last = 4 if evaluating else 60
    assert_same(final(whole, last), final(out, last))
    assert metrics_of(out) == metrics_of(whole)
