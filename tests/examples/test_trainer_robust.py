"""The trainer under kills, signals, several processes, bad numbers and bad input."""

import contextlib
import json
import multiprocessing
import os
import random
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
from crossmix.engine import FolderLock
from crossmix.models import deeplab_v2_tiny
from oracles import deep_png, save
from runs import (
    TORCHRUN,
    assert_finite,
    assert_same,
    final,
    forget,
    log_of,
    metrics_of,
    poison,
    start,
    steps_saved,
    wait_for_step,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")


@pytest.mark.slow
def test_kill_9__at_any_moment_changes_nothing(
    trainer: ModuleType, run: Callable[..., Path], folders: list[str], tmp_path: Path
) -> None:
    flags = ["--steps", "120", "--save-every", "3", "--eval-every", "60", "--log-every", "1"]
    whole = run(*flags, out="whole")
    out, moments = tmp_path / "killed", random.Random(0)  # noqa: S311 - when to kill
    log, groups = out / "log.jsonl", []

    def logged() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    for attempt in range(20):
        resume = ["--resume"] if (out / "config.json").exists() else []
        begin = logged()
        # Forked, since a new process would spend its first seconds on imports.
        arguments = [*folders, *flags, "--out", str(out), *resume, "--workers", str(2 * (attempt % 2))]
        process = multiprocessing.get_context("fork").Process(target=alone, args=(trainer, arguments))
        process.start()
        while process.is_alive() and logged() < min(begin + 2, 119):
            time.sleep(0.02)
        assert process.exitcode is None
        time.sleep(moments.random() * 0.15)
        process.kill()
        process.join()
        groups.append(process.pid)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    done = run(*flags, "--resume", out="killed")
    assert_same(final(whole, 120), final(done, 120))
    assert [record["step"] for record in log_of(done)] == list(range(1, 121))


def alone(trainer: ModuleType, arguments: list[str]) -> None:
    """Run the trainer in a process group of its own."""
    os.setsid()
    trainer.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal__finishes_the_step_saves_and_exits_with_0(
    run: Callable[..., Path], folders: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    flags = ["--steps", "60", "--save-every", "1000", "--eval-every", "1000", "--log-every", "1"]
    out = tmp_path / "stopped"
    process = start(*folders, *flags, "--out", str(out), "--workers", "1")
    wait_for_step(out, 3, process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "which is saved; the same command with --resume" in printed
    (saved,) = steps_saved(out)
    assert 3 <= saved < 60
    resumed = run(*flags, "--resume", out="stopped")
    assert_same(final(run(*flags, out="whole"), 60), final(resumed, 60))


def test_lock__two_runs_in_one_folder(run: Callable[..., Path], tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), pytest.raises(SystemExit, match=f"run: is in use by process {os.getpid()}"):
        run()
    assert not (tmp_path / "run" / "config.json").exists()
    run()


def test_nonfinite__stops_with_step_and_samples_or_undoes_the_step(
    trainer: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(trainer, monkeypatch, {2})
    with pytest.raises(
        SystemExit, match=r"error: step 2: the loss or a gradient is not finite.* samples: (.*)\."
    ) as error:
        run("--save-every", "1")
    names = str(error.value).rpartition("samples: ")[2].rstrip(".").split(", ")
    assert [len(name) for name in names] == [5, 5, 20, 20]  # 00003 and street_000001_000019
    assert steps_saved(tmp_path / "run") == [1, 2]
    before = final(tmp_path / "run", 2)
    skipped = run("--save-every", "1", "--skip-steps", "1", out="skipped")
    monkeypatch.undo()
    assert_same(before["student"], final(skipped, 3)["student"])  # the bad step changed nothing
    assert_same(before["optimizer"]["state"], final(skipped, 3)["optimizer"]["state"])
    assert_finite(final(skipped))
    moved, stayed = final(run("--save-every", "1", "--resume"), 3)["student"], before["student"]  # without the poison
    assert any(not torch.equal(moved[name], stayed[name]) for name in stayed)


def test_disk_full__is_said_and_the_older_checkpoint_stays(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saves = torch.save, []

    def full(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) > 2:  # the first step is also the best
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        run("--save-every", "1", "--eval-every", "4")
    monkeypatch.undo()
    assert len(steps_saved(tmp_path / "run")) == 2
    assert_same(
        final(run("--resume", "--save-every", "1", "--eval-every", "4")), final(run("--eval-every", "4", out="whole"))
    )


@pytest.mark.slow
def test_torchrun__two_processes_share_the_batch_and_resume(folders: list[str], tmp_path: Path) -> None:
    flags = ["--steps", "6", "--batch", "1", "--save-every", "3", "--eval-every", "6"]
    for out, steps in (("whole", [6]), ("parts", [3, 6])):
        for last in steps:
            resume = ["--resume"] if (tmp_path / out).exists() else []
            process = start(*folders, *flags, "--out", str(tmp_path / out), *resume, launcher=TORCHRUN)
            printed, _ = process.communicate(timeout=240)
            assert process.returncode == 0, printed
            if last == 3:  # as if it had died there
                forget(tmp_path / out, 6)
    assert_same(final(tmp_path / "whole", 6), final(tmp_path / "parts", 6))
    assert len(log_of(tmp_path / "whole")) == 6  # one process writes


@pytest.mark.slow
def test_torchrun__signals_stop_all_ranks_at_one_step_and_a_death_ends_the_job(
    folders: list[str], tmp_path: Path
) -> None:
    out, step = tmp_path / "run", 0
    flags = ["--steps", "5000", "--batch", "1", "--save-every", "2", "--eval-every", "5000", "--log-every", "1"]
    for number, to in ((signal.SIGTERM, "rank"), (signal.SIGTERM, "launcher"), (signal.SIGKILL, "rank")):
        resume = ["--resume"] if step else []
        process = start(*folders, *flags, "--out", str(out), *resume, launcher=TORCHRUN)
        wait_for_step(out, step + 3, process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(children.split()[-1]) if to == "rank" else process.pid, number)
        printed, _ = process.communicate(timeout=120)
        assert f"resumed at step {step}" in printed or not resume
        step = steps_saved(out)[-1]
        if number == signal.SIGKILL:
            assert process.returncode != 0
            assert "SIGKILL" in printed
        else:
            assert f"stopped after step {step}" in printed
            assert process.returncode == 0 or to == "launcher", printed  # which reports its signal by its exit code


PATCHED = """
import runpy, sys
from torch import nn
compile = nn.Module.compile
nn.Module.compile = lambda self: compile(self, backend="eager")  # tracing is what is tested; code for it takes minutes
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_checkpoints__are_exchanged_between_eager_compiled_one_process_and_two(
    folders: list[str], tmp_path: Path
) -> None:
    patched = tmp_path / "patched.py"
    patched.write_text(PATCHED)
    flags = ["--save-every", "1", "--eval-every", "50", "--log-every", "1", "--steps", "50"]
    flags += ["--out", str(tmp_path / "run")]
    one, two = ("--batch", "2"), ("--batch", "1")
    ways = [
        (launcher, batch, compiled) for launcher, batch in (((), one), (TORCHRUN, two)) for compiled in (False, True)
    ]
    order = (0, 1, 3, 2, 0)  # to compiled, to two processes, to eager, to one process
    step = 0
    for way in order:
        launcher, batch, compiled = ways[way]
        more = [*batch, *(["--resume"] if step else []), *(["--compile"] if compiled else [])]
        process = start(*folders, *flags, *more, launcher=(*launcher, str(patched)))
        wait_for_step(tmp_path / "run", step + 1, process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
        assert f"resumed at step {step}" in printed or step == 0, printed
        step = steps_saved(tmp_path / "run")[-1]
    saved = final(tmp_path / "run", step)
    names = deeplab_v2_tiny().state_dict().keys()
    assert saved["student"].keys() == names
    assert {f"module.{name}" for name in names} <= saved["teacher"].keys()


def test_runs__mean_and_deviation(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run("--runs", "2", "--eval-every", "2")
    printed = capsys.readouterr().out
    assert "seed 0" in printed
    assert "seed 1" in printed
    scores = [100 * metrics_of(out / f"seed-{seed}")["last"]["student"]["32x64"]["miou"] for seed in (0, 1)]
    mean, deviation = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    assert f"| mIoU | {mean:.2f} +- {deviation:.2f} |" in printed
    assert "mIoU, best step" in printed


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "fp16"), ("--precision", "tf32"), ("--channels-last",), ("--deterministic",), ("--resident",),
        ("--accumulate", "2"), ("--skip-files", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_switches__run(run: Callable[..., Path], flags: tuple[str, ...]) -> None:
    assert_finite(final(run(*flags)))
    torch.use_deterministic_algorithms(mode=False)


def test_cache__is_built_once_and_changes_nothing(run: Callable[..., Path], tmp_path: Path) -> None:
    one = final(run(out="plain"))
    two = final(run("--cache", str(tmp_path / "cache"), out="cached"))
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    three = final(run("--cache", str(tmp_path / "cache"), "--resident", out="again"))
    assert built == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert len(built) == 2
    for other in (two, three):
        assert_same(one["student"], other["student"])


@pytest.mark.parametrize("flags", [("--resident",), ("--deterministic",), ("--precision", "tf32")], ids=" ".join)
def test_switches__that_change_nothing_here(run: Callable[..., Path], flags: tuple[str, ...]) -> None:
    one, two = final(run(out="plain")), final(run(*flags, out="switched"))
    torch.use_deterministic_algorithms(mode=False)
    assert_same(
        {k: one[k] for k in ("student", "teacher", "optimizer")},
        {k: two[k] for k in ("student", "teacher", "optimizer")},
    )


@pytest.mark.slow
def test_compile__has_the_same_checkpoints(run: Callable[..., Path]) -> None:
    torch.compiler.reset()
    out = run("--compile", "--steps", "2", "--save-every", "1", "--eval-every", "2")
    plain = run("--steps", "2", "--save-every", "1", "--eval-every", "2", out="plain")
    one, two = final(out, 2), final(plain, 2)
    assert one["student"].keys() == two["student"].keys()
    for name, value in two["student"].items():
        torch.testing.assert_close(one["student"][name], value, rtol=1e-3, atol=1e-4)
    forget(out, 2)
    run("--resume", "--steps", "2", "--save-every", "1", "--eval-every", "2")  # and goes on without compiling


@pytest.mark.parametrize("recipe", ["released", "paper"])
@pytest.mark.parametrize("method", ["dacs", "alignment"])
def test_synthia__trains_and_reports_16_and_13_classes(
    trainer: ModuleType,
    folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    recipe: str,
) -> None:
    scenes = StreetScenes(4, size=(32, 64))
    ids = torch.tensor([3, 4, 2, 21, 5, 7, 15, 9, 6, 0, 1, 10, 17, 8, 0, 19, 0, 12, 11] + [0] * 237)
    for i in range(4):
        save(tmp_path / "s" / "RGB" / f"{i}.png", scenes[i].image.permute(1, 2, 0).numpy())
        deep_png(
            tmp_path / "s" / "GT" / "LABELS" / f"{i}.png",
            ids[scenes[i].label.long()][..., None].expand(-1, -1, 3).numpy(),
        )
    flags = folders[2:]
    arguments = ["--synthia", str(tmp_path / "s"), *flags, "--method", method, "--recipe", recipe]
    arguments += ["--source-size", "native", "--evaluation", "32x64"]
    assert trainer.main([*arguments, "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "| mIoU of 16 |" in printed
    assert "| mIoU of 13 |" in printed
    metrics = metrics_of(tmp_path / "o")
    best = max(entry["student"]["32x64"]["miou_16"] for entry in metrics["evaluations"])
    assert metrics["best"]["student"]["32x64"]["miou_16"] == best


def test_bad_input__is_said_in_one_line_and_nothing_is_written(
    trainer: ModuleType, folders: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    cityscapes, gta5 = folders[3], folders[1]
    for flags, message in (
        (["--gta5", cityscapes], r"has no images \(it looks like Cityscapes\)"),
        (
            ["--crop", "40x32"],
            r"--crop 40x32 is larger than 6 of 6 source images, such as .*00001\.png: 32x64; crop smaller",
        ),
        (["--batch", "7"], "the source has 6 images, fewer than the 7 of a batch"),
        (["--device", "cuda:9"], "--device cuda:9 cannot be used"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--eval-split", "test"], "split 'test' has no images"),
        (["--steps", "0"], "--steps must be a whole number of at least 1, got 0"),
        (["--evaluation", "1x1"], "--evaluation must be one of the scored sizes, 32x64 or 64x128, got '1x1'"),
        (["--config", str(tmp_path / "none.json")], r"none\.json: is not a JSON object of options"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.main([*folders, "--out", str(out), *flags])
        assert not (out / "config.json").exists()
    file = tmp_path / "c.json"
    file.write_text('{"tresh": 1}')
    with pytest.raises(SystemExit, match=r"unknown option 'tresh'; did you mean 'threshold'\?"):
        trainer.main(["--config", str(file)])
    file.write_text("[1]")
    with pytest.raises(SystemExit, match="is not a JSON object"):
        trainer.main(["--config", str(file)])
    for flags, message in (
        (["--gta5", gta5, "--synthia", gta5, "--cityscapes", cityscapes], "give --gta5 DIR or --synthia DIR"),
        (["--gta5", gta5, "--cityscapes", cityscapes], "comes nowhere near its numbers; or --random-init"),
        (["--demo", "--runs", "0"], "--runs must be a whole number from 1 to 10000, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.main(flags)


def test_dry_run__says_what_is_there_and_what_it_takes(
    trainer: ModuleType, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main([*folders, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["images"] == {"source": 6, "target": 5, "validation": 3}
    assert plan["evaluations"] == 2
    with pytest.raises(SystemExit, match="error: a: has no images"):
        trainer.main(["--dry-run", "--gta5", "a", "--cityscapes", "b", "--random-init"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert "a: has no images (there is no such folder)" in plan["images"]
    assert 1400 < plan["checkpoints_mb"] < 1700  # nine times 175 MB
    assert 4000 < plan["memory_mb_computed_fp32"] < 11_000  # the paper's card has 11 GB


# The first losses of a small DACS run, so that a change of the numbers is seen.
RECORDED = [5.010983, 5.222232, 4.016420, 3.864082]


def test_first_losses__are_those_on_record(run: Callable[..., Path]) -> None:
    log = log_of(run("--lr", "0.001", "--threshold", "0.15"))
    assert [record["loss"] for record in log] == pytest.approx(RECORDED, rel=1e-4)
