"""The trainer, killed at random moments or in the next save, and resumed: its end is that of one that never stopped."""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from crossmix.datasets import StreetScenes
from runs import FORKED, assert_same, final, fork, metrics_of, steps_saved

KILLS = {"ci": 5, "nightly": 100}
STEPS = 6
MOST = 30
"""Kills of one training, which a save every step lets get further; above this it does not get on."""


def flags(root: Path) -> list[str]:
    """Small folders in the official layouts, and options that train on them in a second."""
    size = (32, 64)
    StreetScenes(6, size=size).write(root / "gta5", layout="gta5")
    StreetScenes(5, domain="target", size=size).write(root / "cs", layout="cityscapes")
    StreetScenes(3, domain="target", size=size, seed=1).write(root / "cs", layout="cityscapes", split="val")
    return [
        "--gta5", str(root / "gta5"), "--cityscapes", str(root / "cs"), "--random-init", "--network", "tiny",
        "--source-size", "native", "--target-size", "32x64", "--evaluation", "32x64", "--crop", "32",
        "--steps", str(STEPS), "--device", "cpu", "--save-every", "1", "--eval-every", "2", "--log-every", "1",
    ]  # fmt: skip


def trained(begun: Callable[[], object], options: list[str], printed: Path = Path(os.devnull)) -> None:
    """In a process, and a process group, of its own."""
    import dacs_gta5
    import report
    from signals import end_early

    os.setsid()
    end_early()
    warnings.resetwarnings()  # under pytest they are errors
    sys.stdout = sys.stderr = file = printed.open("a", buffering=1)
    os.dup2(file.fileno(), 2)
    with mock.patch.object(report, "drawn", return_value=""):  # charts take most of so short a run
        begun()
        code = dacs_gta5.main(options)
    os._exit(code)


def train(options: list[str], kill_after: float | None = None, saving_in: Path | None = None) -> int:
    """Train, or begin to: the exit code. With a folder, the kill waits for the next save in it."""
    process = fork(trained, options)
    process.join(kill_after)
    while saving_in and process.is_alive() and not any(saving_in.glob("*.tmp.*")):
        time.sleep(0.0005)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    FORKED.remove(process)
    return process.exitcode or 0


def run(profile: str) -> dict[str, Any]:
    """Kill trainings until there were enough kills; each then ends, and is compared."""
    import dacs_gta5  # noqa: F401 - here, so that no process has to load it

    torch.set_num_threads(1)
    rng = random.Random(0)  # noqa: S311
    kills = saves = trainings = resumed_with_workers = 0
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        options = flags(Path(root))
        whole, out = Path(root) / "whole", Path(root) / "run"
        begun = time.monotonic()
        if train([*options, "--workers", "0", "--out", str(whole)]):
            return {"wrong": {"whole": "the run that is not killed fails"}}
        seconds = time.monotonic() - begun
        while kills < KILLS[profile] and not wrong:
            trainings += 1
            for _ in range(MOST):
                workers = rng.choice((0, 0, 1, 2))
                resume = ["--resume"] if steps_saved(out) else []
                limit = rng.uniform(0, 1.2 * seconds) if kills < KILLS[profile] else None
                folder = out / "checkpoints" if limit and rng.random() < 0.5 else None
                code = train([*options, "--workers", str(workers), "--out", str(out), *resume], limit, folder)
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    wrong["exit"] = f"exit code {code} after {kills} kills, at steps {steps_saved(out)}"
                    break
                kills += 1
                saves += any((out / "checkpoints").glob("*.tmp.*"))
                resumed_with_workers += workers > 0
            else:
                wrong["end"] = f"no end after {MOST} kills, at steps {steps_saved(out)}"
            with contextlib.suppress(FileNotFoundError):
                found = difference(whole, out)
                if found:
                    wrong.setdefault("difference", f"{found}, after {kills} kills")
            shutil.rmtree(out, ignore_errors=True)
    return {
        "kills": kills, "of them within a save": saves, "of them with workers": resumed_with_workers,
        "trainings": trainings, "wrong": wrong,
    }  # fmt: skip


def difference(whole: Path, out: Path) -> str:
    """What differs between the ends of two runs, if anything."""
    try:
        assert_same(final(whole, STEPS), final(out, STEPS))
    except AssertionError as error:
        return f"other weights: {error}"
    return "" if metrics_of(whole) == metrics_of(out) else "other metrics"
