"""Programs in processes of their own, and what a run of the trainer leaves behind."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINER = EXAMPLES / "dacs_gta5.py"
Run = Callable[..., Path]  # the fixtures `run`, `whole` and `died`: from flags to a folder
Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start_code(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Until the process has written a line, which is this word. Byte by byte: `communicate` is to get all the rest."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        line += byte
    assert line.decode().strip() == word, (line, process.stderr.read() if process.stderr else "")


FORKED: list[BaseProcess] = []  # to be ended with their test


def fork(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function in a forked process, with a function to call first; by then, or when it ends, this goes on."""
    read, write = os.pipe()

    def alone() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: waiting for them would never end
        work(lambda: os.write(write, b"."), *arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    FORKED.append(process)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return process


RANK = """
import os, sys, torch
import torch.distributed as dist
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{{sys.argv[3]}}", rank=rank, world_size=size)
{}
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort a process while it takes itself down, seldom
"""


def run_ranks(code: str, size: int, folder: Path, *arguments: str) -> list[str]:
    """What each of several processes of one group prints; the code knows its `rank` and their number, `size`."""
    store, pipe = str(folder / f"store-{size}"), subprocess.PIPE
    command = [sys.executable, "-c", RANK.format(textwrap.dedent(code))]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), store, *arguments], stdout=pipe, stderr=pipe, text=True)
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()  # the others would wait for ever
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in outputs]


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The trainer, with one thread and in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(TRAINER), *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def printed_by(process: subprocess.Popen[str]) -> str:
    """What a process has printed once it has ended, without an error."""
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    return printed


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the log has a step."""
    log = out / "log.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= step, process)


def changed(flags: list[str], **values: str) -> list[str]:
    """The flags, some with other values."""
    flags = list(flags)
    for name, value in values.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


def resolved(*flags: str) -> dict[str, Any]:
    """The options that flags ask for."""
    from options import read_options

    return asdict(read_options(flags, "").config)


def poison(trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Images of the source without a finite pixel in these steps."""
    real = trainer.crops

    def poisoned(training: Any, stream: int, begin: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step, (images, labels) in enumerate(real(training, stream, begin), begin):
            yield images * torch.nan if step in steps and stream == 0 else images, labels

    monkeypatch.setattr(trainer, "crops", poisoned)


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*.pt"))


def final(out: Path, step: int = 4) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoints" / f"step-{step:07d}.pt", weights_only=True)
    return state


def forget(out: Path, step: int = 4) -> None:
    """As if the run had been killed before this step was saved."""
    for path in (out / "checkpoints").glob(f"*{step:07d}*"):
        path.unlink()


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {name: value for key, part in items for name, value in tensors(part, f"{prefix}/{key}").items()}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_finite(state: dict[str, Any]) -> None:
    for name, value in tensors(state).items():
        assert value.isfinite().all(), name
