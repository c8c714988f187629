"""What stops the trainer, and how it goes on: signals, kills, broken files, bad steps, full disks, moved data."""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import domains
import plan
from crossmix.datasets import CachedSamples, StreetScenes
from crossmix.engine import FolderLock
from crossmix.models import deeplab_v2_tiny
from files import write_text
from options import read_options
from runs import (
    TORCHRUN,
    TRAINER,
    Capture,
    Patch,
    Run,
    assert_finite,
    assert_same,
    changed,
    final,
    forget,
    log_of,
    metrics_of,
    poison,
    printed_by,
    resolved,
    start,
    steps_saved,
    wait_for_step,
    wait_until,
)
from signals import Stopped, ended_by_signals

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")
RARELY = ("--save-every", "1000", "--eval-every", "1000")
ONCE = ("--save-every", "4", "--eval-every", "4")  # the same, for runs that end

# Starts the trainer with workers of another kind.
STARTER = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def long_validation(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with validation images enough for an evaluation of some seconds."""
    root = tmp_path_factory.mktemp("long") / "cs"
    shutil.copytree(folders[3], root)
    for path in list(root.glob("*/val/*/*.png")):
        for i in range(1, 120):
            shutil.copy(path, path.with_name(path.name.replace("_00", f"_{i:03d}", 1)))
    return str(root)


WAYS = [  # every pair of workers' start, receiver and phase is there once
    ("0", "fork", "process", "training"),
    ("0", "fork", "group", "evaluation"),
    ("2", "fork", "group", "training"),
    ("2", "fork", "process", "evaluation"),
    ("2", "spawn", "process", "training"),
    ("2", "spawn", "group", "evaluation"),
    ("2", "forkserver", "group", "training"),
    ("2", "forkserver", "process", "evaluation"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method", "to", "phase"), WAYS)
def test_signal__saves_exits_with_0_and_goes_on_to_the_same_end(
    trainer: ModuleType, folders: list[str], long_validation: str, whole: Run, tmp_path: Path,
    workers: str, method: str, to: str, phase: str,
) -> None:  # fmt: skip
    (tmp_path / "starter.py").write_text(STARTER)
    evaluating = phase == "evaluation"
    flags = ["--cityscapes", long_validation, "--save-every", "1000", "--eval-every", "3", "--steps", "4"]
    if not evaluating:
        flags += ["--eval-split", "train", "--eval-every", "1000", "--steps", "60"]  # few images at the end
    out = tmp_path / "run"
    process = start(
        *folders, *flags, "--workers", workers, "--out", str(out), launcher=(str(tmp_path / "starter.py"), method)
    )
    if evaluating:
        wait_until(lambda: steps_saved(out) == [3], process)
        time.sleep(0.3)
    else:
        wait_for_step(out, 3, process)
    number = signal.SIGTERM if to == "process" else signal.SIGINT
    (os.kill if to == "process" else os.killpg)(process.pid, number)
    printed = printed_by(process)
    (saved,) = steps_saved(out)
    assert f"stopped after step {saved}, which is saved; the same command with --resume --out {out}" in printed
    if evaluating:
        assert metrics_of(out)["evaluations"] == []  # it was in the midst of one
    assert trainer.main([*folders, *flags, "--out", str(out), "--resume"]) == 0
    last = 4 if evaluating else 60
    assert_same(final(whole(*flags), last), final(out, last))
    assert metrics_of(out) == metrics_of(whole(*flags))


def test_signal__repeated_until_the_end_spoils_nothing(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*folders, "--steps", "5000", "--workers", "1", "--eval-every", "5000", "--out", str(out))
    wait_for_step(out, 3, process)
    while process.poll() is None:  # as launchers do that lose patience
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    printed = printed_by(process)
    assert f"stopped after step {steps_saved(out)[-1]}, which is saved" in printed


def test_signal__repeated_while_the_run_ends_leaves_the_first_stop() -> None:
    def end() -> None:
        try:
            raise Stopped(" after step 3, which is saved")
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    raise OSError
                except OSError:  # while something else is handled
                    os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="after step 3"), ended_by_signals():
        end()


def test_signal__while_an_error_is_handled_stops() -> None:
    def handle() -> None:
        try:
            raise OSError
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), ended_by_signals():
        handle()


@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_worker__killed_at_any_moment_costs_no_step(
    trainer: ModuleType, whole: Run, run: Run, tmp_path: Path, monkeypatch: Patch, phase: str
) -> None:
    real, parts = trainer.train_step, trainer.scores

    def kill_a_worker() -> None:
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(0.2)  # torch hears of it meanwhile

    def step(training: Any, batches: Any) -> Any:
        if training.done == 2:
            kill_a_worker()
        return real(training, batches)

    def scores(training: Any, network: Any) -> Any:
        real_forward = network.forward_features

        def forward(images: torch.Tensor) -> torch.Tensor:
            kill_a_worker()
            return real_forward(images)

        monkeypatch.setattr(network, "forward_features", forward)
        return parts(training, network)

    monkeypatch.setattr(trainer, *(("train_step", step) if phase == "step" else ("scores", scores)))
    with pytest.raises(SystemExit, match=r"error: DataLoader worker .*--workers 0 reads in this process, fewer than 1"):
        run(*RARELY, "--workers", "1")
    monkeypatch.undo()
    assert steps_saved(tmp_path / "run") == [3 if phase == "step" else 4]
    assert_same(final(whole(*ONCE)), final(run(*RARELY, "--resume")))


def test_signal__is_not_taken_for_a_failure_of_what_it_ends() -> None:
    with pytest.raises(Stopped), ended_by_signals(), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)


def test_signal__that_another_rank_hears_first_is_waited_for(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(trainer, "start_ranks", lambda *_: trainer.Ranks())
    later = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))

    def collective(*_: object) -> None:
        later.start()
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(trainer, "run_all", collective)
    assert trainer.main([*folders, "--out", str(tmp_path / "run")]) == 0
    later.join()
    assert "stopped; nothing was trained yet" in capsys.readouterr().out


def test_signal__after_all_is_done_does_not_fail_a_run(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer, "run_all", lambda *_: None)
    monkeypatch.setattr(FolderLock, "__exit__", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert trainer.main([*folders, "--out", str(tmp_path / "run")]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


# Has a signal come while a package is being imported, then runs the trainer.
AMID_IMPORTS = """
import os, runpy, signal, sys
class Sender:
    def find_spec(self, name, *_):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Sender())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("package", ["torch", "crossmix.engine"])
def test_signal__amid_the_imports_ends_with_0(tmp_path: Path, package: str) -> None:
    (tmp_path / "starter.py").write_text(AMID_IMPORTS)
    process = start(package, launcher=(str(tmp_path / "starter.py"),))
    assert process.communicate(timeout=120)[0] == "stopped before it began\n"
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "steps", "kills"), [("released", 120, 20), ("mic", 40, 6)])
def test_kill_9__at_any_moment_changes_nothing(
    trainer: ModuleType, whole: Run, run: Run, folders: list[str], tmp_path: Path, recipe: str, steps: int, kills: int
) -> None:
    flags = (
        "--recipe",
        recipe,
        "--threshold",
        "0.05",
        "--steps",
        str(steps),
        "--save-every",
        "3",
        "--eval-every",
        "20",
    )
    out, moments = tmp_path / "killed", random.Random(0)  # noqa: S311 - when to kill
    log, groups = out / "log.jsonl", []

    def logged() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    for attempt in range(kills):
        resume = ["--resume"] if (out / "config.json").exists() else []
        begin = logged()
        # Forked, since a new process would spend its first seconds on imports.
        arguments = [*folders, *flags, "--out", str(out), *resume, "--workers", str(2 * (attempt % 2))]
        process = multiprocessing.get_context("fork").Process(target=alone, args=(trainer, arguments))
        process.start()
        while process.is_alive() and logged() < min(begin + 2, steps - 1):
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
    assert_same(final(whole(*flags), steps), final(done, steps))
    assert metrics_of(whole(*flags)) == metrics_of(done)
    assert [record["step"] for record in log_of(done)] == list(range(1, steps + 1))


def alone(trainer: ModuleType, arguments: list[str]) -> None:
    """Run the trainer in a process group of its own."""
    os.setsid()
    trainer.main(arguments)


@pytest.mark.slow
def test_torchrun__two_processes_share_the_batch_and_resume(folders: list[str], tmp_path: Path) -> None:
    flags = ["--steps", "6", "--batch", "1", "--save-every", "3", "--eval-every", "6"]
    for out, steps in (("whole", [6]), ("parts", [3, 6])):
        for last in steps:
            resume = ["--resume"] if (tmp_path / out).exists() else []
            printed_by(start(*folders, *flags, "--out", str(tmp_path / out), *resume, launcher=TORCHRUN))
            if last == 3:  # as if it had died there
                forget(tmp_path / out, 6)
    assert_same(final(tmp_path / "whole", 6), final(tmp_path / "parts", 6))
    assert len(log_of(tmp_path / "whole")) == 6  # one process writes


TOGETHER = """
import torch.distributed as dist
from torch import nn

class Together(nn.BatchNorm2d):
    def forward(self, images):
        if self.training and dist.is_initialized():  # as SyncBatchNorm, which needs GPUs
            dist.barrier()
        return super().forward(images)

def network(n):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), Together(8), nn.ReLU(), nn.Conv2d(8, n, 1))
"""


@pytest.mark.slow
def test_torchrun__norms_that_wait_for_all_processes_never_wait_in_vain(
    folders: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    flags = [flag for flag in folders if flag != "--random-init"]
    flags = changed(flags, network="together:network", steps="1")
    printed = printed_by(start(*flags, "--batch", "1", "--out", str(tmp_path / "run"), launcher=TORCHRUN))
    assert "| mIoU |" in printed
    assert (tmp_path / "run" / "report" / "gallery.png").exists()


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


@pytest.mark.parametrize("begun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs__resumed_in_the_first_training_begins_the_second(
    whole: Run, run: Run, tmp_path: Path, *, begun: bool
) -> None:
    flags = ("--runs", "2", "--eval-every", "4")
    shutil.copytree(whole(*flags) / "seed-0", tmp_path / "run" / "seed-0")
    forget(tmp_path / "run" / "seed-0")
    if begun:  # and died before anything was saved
        (tmp_path / "run" / "seed-1").mkdir()
        shutil.copy(whole(*flags) / "seed-1" / "config.json", tmp_path / "run" / "seed-1")
    out = run(*flags, "--resume")
    for seed in ("seed-0", "seed-1"):
        assert_same(final(whole(*flags) / seed), final(out / seed))
    with pytest.raises(AssertionError):
        assert_same(final(out / "seed-0"), final(out / "seed-1"))


def test_resume__equals_a_run_that_never_stopped(whole: Run, died: Run, run: Run) -> None:
    died()
    out = run("--resume", "--crop", "32x32", "--log-every", "2", "--save-every", "1")  # sizes are compared as sizes
    assert_same(final(whole()), final(out))
    assert [record["step"] for record in log_of(out)] == [1, 2, 4]
    assert metrics_of(whole())["evaluations"] == metrics_of(out)["evaluations"]


def test_resume__with_nothing_saved_starts_from_the_weights_that_it_had(
    trainer: ModuleType, folders: list[str], whole: Run, died: Run, capsys: Capture
) -> None:
    out = died()
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.json").unlink()
    flags = [flag for flag in folders if flag != "--random-init"]
    assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert_same(final(whole()), final(out))


@pytest.mark.parametrize(("lost", "held"), [
    ("checkpoints/step-*", "checkpoints/best.pt, checkpoints/best_unsupervised.pt, metrics.json"),
    ("checkpoints/*.pt", "metrics.json"),
    ("checkpoints", "metrics.json"),
])  # fmt: skip
def test_resume__never_replaces_results_whose_steps_are_gone(run: Run, died: Run, lost: str, held: str) -> None:
    out = died()
    for path in out.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more in ((), ("--dry-run",)):
        with pytest.raises(SystemExit, match=f"^error: --resume: {out} holds {held}, but no checkpoints/step") as ended:
            run("--resume", *more)
        assert str(ended.value).endswith("give another --out, or delete them to start at step 0.")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_resume__of_results_without_their_options_has_one_advice(run: Run, died: Run) -> None:
    out = died()
    (out / "config.json").unlink()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(
        SystemExit, match=rf"^error: --resume: {out} is not the folder of a run, .*; check --out, or give another\.$"
    ):
        run("--resume")


def test_resume__never_replaces_results_of_one_of_several_runs(run: Run, whole: Run, tmp_path: Path) -> None:
    for seed in ("seed-0", "seed-1"):  # and the third has not begun
        shutil.copytree(whole(), tmp_path / "run" / seed)
    shutil.rmtree(tmp_path / "run" / "seed-1" / "checkpoints")
    with pytest.raises(SystemExit) as ended:
        run("--runs", "3", "--resume")
    assert str(ended.value).startswith(f"error: --resume: {tmp_path}/run/seed-1 holds metrics.json, but no ")
    assert "\n" not in str(ended.value)


def test_run__refuses_what_is_not_its_own(died: Run, run: Run) -> None:
    out = died()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="holds a run already; resume it with --resume, or give another --out"):
        run()
    with pytest.raises(SystemExit, match="scope 'batch' is now 'image'; give the old ones, or another --out"):
        run("--resume", "--scope", "image")
    with FolderLock(out), pytest.raises(SystemExit, match=f"run: is in use by process {os.getpid()}"):
        run("--resume")
    assert before == {path: path.read_bytes() for path in before}
    for path in (out / "checkpoints").glob("step*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="No checkpoint can be read"):
        run("--resume")


def test_resume__takes_the_same_data_anywhere(
    trainer: ModuleType, own_data: list[str], whole: Run, died: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = died()
    monkeypatch.chdir(tmp_path)
    flags = changed(own_data, gta5=f"{tmp_path}/data//gta5/", cityscapes="./data/cs")
    assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
    assert_same(final(whole()), final(out))


def test_resume__refuses_other_data(trainer: ModuleType, own_data: list[str], died: Run, tmp_path: Path) -> None:
    out, gta5 = died(), tmp_path / "data" / "gta5"
    before = sorted(path.read_bytes() for path in out.rglob("*.pt"))

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=f"on other data: the source {message}"):
            trainer.main([*own_data, "--out", str(out), "--resume"])

    StreetScenes(6, size=(32, 64), seed=9).write(gta5, layout="gta5")
    refused(r"has \d files of 6 with another size, such as 0000")
    for kind in ("images", "labels"):
        (gta5 / kind / "00001.png").rename(gta5 / kind / "00009.png")
    refused("had 6 samples of GTA5, and is 6 of GTA5 with other names")
    StreetScenes(1, size=(32, 64)).write(gta5, layout="gta5")
    refused("had 6 samples of GTA5, and is 7 of GTA5")
    assert sorted(path.read_bytes() for path in out.rglob("*.pt")) == before


def test_resume__needs_no_target_labels_for_the_prior(
    trainer: ModuleType, own_data: list[str], whole: Run, died: Run, tmp_path: Path
) -> None:
    flags = ("--method", "alignment")
    out = died(*flags)
    shutil.rmtree(tmp_path / "data" / "cs" / "gtFine" / "train")
    assert trainer.main([*own_data, *flags, "--out", str(out), "--resume"]) == 0
    assert_same(final(whole(*flags)), final(out))


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_broken_validation_label__costs_no_training(
    trainer: ModuleType, own_data: list[str], whole: Run, tmp_path: Path, workers: str
) -> None:
    flags, out = ("--save-every", "1000"), tmp_path / "run"
    label = sorted((tmp_path / "data" / "cs").glob("gtFine/val/*/*_labelIds.png"))[-1]
    good = label.read_bytes()
    label.write_bytes(good[:60])
    with pytest.raises(SystemExit) as ended:
        trainer.main([*own_data, *flags, "--workers", workers, "--out", str(out)])
    assert str(ended.value).startswith(f"error: {label}: ")
    assert "step 2 is saved, the same command with --resume" in str(ended.value)
    assert "Traceback" not in str(ended.value)
    assert steps_saved(out) == [2]
    label.write_bytes(good)
    assert trainer.main([*own_data, *flags, "--workers", workers, "--out", str(out), "--resume"]) == 0
    assert_same(final(whole()), final(out))
    assert metrics_of(whole()) == metrics_of(out)


def drawn(trainer: ModuleType, flags: list[str], step: int) -> str:
    """A source image that this step draws and no earlier one does."""
    config = trainer.Config(**resolved(*flags))
    data = domains.open_data(config)
    before = {name for earlier in range(step) for name in domains.drawn_names(config, data, earlier, 1)}
    return next(name for name in domains.drawn_names(config, data, step, 1) if name not in before)


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["broken", "gone", "small"])
def test_broken_file__ends_the_run_saved_and_can_be_left_out_by_resuming(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: Capture,
    workers: str, fault: str,
) -> None:  # fmt: skip
    flags = [*own_data, "--workers", workers, *RARELY]
    name, out = drawn(trainer, flags, 2), tmp_path / "run"
    image = tmp_path / "data" / "gta5" / "images" / f"{name}.png"
    image.write_bytes(image.read_bytes()[:100])
    if fault == "gone":
        image.unlink()
        image.symlink_to(tmp_path / "nowhere.png")
    if fault == "small":  # its header is whole, so that it is found before anything is trained
        StreetScenes(1, size=(16, 64)).write(tmp_path / "small", layout="gta5")
        for kind in ("images", "labels"):
            shutil.copy(tmp_path / "small" / kind / "00001.png", image.parent.parent / kind / image.name)
    with pytest.raises(SystemExit, match=f"^error: .*{name}.*--skip-files 1") as ended:
        trainer.main([*flags, "--out", str(out)])
    assert "Traceback" not in str(ended.value)
    flags += ["--skip-files", "1"]
    resume = [] if fault == "small" else ["--resume"]
    assert steps_saved(out) == [2] * len(resume)
    capsys.readouterr()
    assert trainer.main([*flags, "--out", str(out), *resume]) == 0
    assert f"1 files were left out: {name}" in capsys.readouterr().out
    assert metrics_of(out)["skipped_files"] == [name]
    if resume:
        assert trainer.main([*flags, "--out", str(tmp_path / "whole")]) == 0
        assert_same(final(tmp_path / "whole"), final(out))


def test_broken_file__that_is_back_is_a_repaired_one(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: Capture
) -> None:
    flags, out = [*own_data, "--skip-files", "1", "--out", str(tmp_path / "run")], tmp_path / "run"
    image = tmp_path / "data" / "gta5" / "images" / "00003.png"
    image.rename(tmp_path / "moved.png")
    image.symlink_to(tmp_path / "nowhere.png")
    assert trainer.main(flags) == 0
    forget(out)
    (tmp_path / "moved.png").replace(image)
    capsys.readouterr()
    assert trainer.main([*flags, "--resume"]) == 0
    assert "files of another size than before: 00003\n" in capsys.readouterr().out
    assert steps_saved(out) == [2, 4]


def test_broken_files__advice_is_given_where_it_can_work(
    trainer: ModuleType, own_data: list[str], tmp_path: Path
) -> None:
    labels = sorted((tmp_path / "data" / "gta5" / "labels").glob("*.png"))
    labels[0].write_bytes(labels[0].read_bytes()[:60])  # what is looked at before a run begins
    with pytest.raises(SystemExit, match=r"error: .*00001\.png: .* Repair it, or leave it out with --skip-files 1\."):
        trainer.main([*own_data, "--out", str(tmp_path / "run")])
    for label in labels:
        label.write_bytes(label.read_bytes()[:60])
    with pytest.raises(SystemExit, match=r" Repair them; nothing was trained yet\.$"):
        trainer.main([*own_data, "--out", str(tmp_path / "run"), "--skip-files", "6"])


EVERY = "With a --cache, which holds every image, --skip-files cannot leave this one out: repair or remove the file"


def test_broken_files__a_cache_needs_every_image(trainer: ModuleType, own_data: list[str], tmp_path: Path) -> None:
    folder, flags = tmp_path / "cache", [*own_data, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    label = tmp_path / "data" / "gta5" / "labels" / "00003.png"
    good = label.read_bytes()
    label.write_bytes(good[:60])
    for skip, end in (([], r"again\."), (["--skip-files", "1"], rf"again\. {EVERY}, or leave out --cache\.")):
        with pytest.raises(SystemExit, match=rf"^error: {label}: .* write it {end}$"):
            trainer.main([*flags, *skip])
    label.write_bytes(good)
    (folder / "source" / "notes.txt").touch()  # a fault of the cache, about which its own advice is all
    with pytest.raises(SystemExit, match=r"holds 'notes.txt', which is not part of this cache; use an empty folder\.$"):
        trainer.main([*flags, "--skip-files", "1"])


def test_broken_files__the_first_is_found_before_a_cache_is_built(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "mycache").mkdir()
    root = (tmp_path / "data" / "gta5").rename(tmp_path / "mycache" / "source")  # which holds the name of the cache's
    monkeypatch.chdir(tmp_path)
    flags = [*changed(own_data, gta5=str(root)), "--cache", "cache", "--out", "run"]
    label = root / "labels" / "00001.png"
    label.write_bytes(label.read_bytes()[:60])
    skipped = rf"{EVERY}, or leave out --cache\."
    for more, end in (([], r"Repair it\."), (["--skip-files", "1"], skipped)):
        with pytest.raises(SystemExit, match=rf"^error: {label}: .* write it again\. {end}$"):
            trainer.main([*flags, *more, "--dry-run"])
    monkeypatch.setattr(plan, "_of_samples", lambda *_: iter(()))  # as if it were not the first
    with pytest.raises(SystemExit, match=rf"^error: {label}: .* write it again\. {skipped}$"):
        trainer.main([*flags, "--skip-files", "1"])


def test_broken_files__a_whole_cache_needs_their_sizes_alone(
    trainer: ModuleType, own_data: list[str], tmp_path: Path
) -> None:
    flags = [*own_data, "--cache", str(tmp_path / "cache"), "--skip-files", "1"]
    label = tmp_path / "data" / "gta5" / "labels" / "00001.png"
    for name, reader in zip(("source", "target"), domains.open_data(read_options(flags, "").config), strict=False):
        CachedSamples(reader, tmp_path / "cache" / name, progress=False)
    written = label.stat().st_mtime_ns
    label.write_bytes(bytes(label.stat().st_size))
    os.utime(label, ns=(written, written))
    assert trainer.main([*flags[:-2], "--dry-run"]) == 0
    label.unlink()
    label.symlink_to(tmp_path / "nowhere.png")
    for dry in (["--dry-run"], []):
        with pytest.raises(
            SystemExit, match=rf"^error: {label}: cannot be read \(No .*; restore the file\. {EVERY}, or"
        ):
            trainer.main([*flags, "--out", str(tmp_path / "run"), *dry])


def test_broken_files__a_cache_leaves_out_small_ones(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    flags = [*own_data, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    StreetScenes(1, size=(16, 64)).write(tmp_path / "small", layout="gta5")
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / "small" / kind / "00001.png", tmp_path / "data" / "gta5" / kind / "00003.png")
    monkeypatch.setattr(domains, "too_small", lambda *_: [])  # which would find it first
    with pytest.raises(SystemExit, match=r"00003: the image is 16 x 64, .* leave it out with --skip-files 1; "):
        trainer.main(flags)


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_broken_cache__has_one_advice(trainer: ModuleType, folders: list[str], tmp_path: Path, workers: str) -> None:
    flags = [*changed(folders, workers=workers), "--cache", str(tmp_path / "cache")]
    assert trainer.main([*flags, "--out", str(tmp_path / "one")]) == 0
    path = tmp_path / "cache" / "source" / "samples-00000.bin"
    data = bytearray(path.read_bytes())
    data[: 6 * 4 * 32 * 64] = bytes(6 * 4 * 32 * 64)  # all pixels, and not the record that is read at the start
    path.write_bytes(data)
    advice = rf"delete {path} and open the cache again, which rebuilds its 6 samples\. Nothing was trained yet\."
    with pytest.raises(SystemExit, match=rf"^error: {path}: the bytes of sample '0000\d' are damaged; {advice}$"):
        trainer.main([*flags, "--out", str(tmp_path / "two")])


def test_death_in_the_first_step__does_not_block_the_same_command(
    trainer: ModuleType, own_data: list[str], whole: Run, tmp_path: Path
) -> None:
    flags = [*own_data, *RARELY, "--out", str(tmp_path / "run")]
    image = tmp_path / "data" / "gta5" / "images" / f"{drawn(trainer, flags, 0)}.png"
    good = image.read_bytes()
    image.write_bytes(good[:100])
    with pytest.raises(SystemExit, match="error: "):
        trainer.main(flags)
    image.write_bytes(good)
    assert trainer.main(flags) == 0
    assert_same(final(whole(*ONCE)), final(tmp_path / "run"))


def test_other_errors__save_the_last_finished_step(
    trainer: ModuleType, whole: Run, run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    real = trainer.Record.step

    def interrupted(record: Any, training: Any, output: Any) -> None:
        real(record, training, output)
        if training.done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as bad:
        bad.setattr(trainer.Record, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*RARELY)
    assert steps_saved(tmp_path / "run") == [3]
    assert_same(final(whole(*ONCE)), final(run(*RARELY, "--resume")))


def test_disk_full__is_said_and_the_older_checkpoint_stays(
    whole: Run, run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    real = torch.save

    def full(state: Any, *arguments: Any) -> None:
        if state["step"] == 4:
            raise OSError(28, "No space left on device")
        real(state, *arguments)

    with monkeypatch.context() as bad:
        bad.setattr(torch, "save", full)
        with pytest.raises(SystemExit, match="No space left on device"):
            run()
    assert steps_saved(tmp_path / "run") == [2]
    assert_same(final(run("--resume")), final(whole()))


def test_resume__of_nothing_is_refused(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: --resume: there is no folder runs/mistyped"):
        trainer.main([*folders, "--resume", "--out", "runs/mistyped"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(SystemExit, match=r"error: --resume: thesis is not the folder of a run.* to start there"):
        trainer.main([*folders, "--resume", "--out", "thesis"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter.tex", "thesis"]


def test_resume__of_a_part_of_several_runs_is_refused(
    trainer: ModuleType, folders: list[str], run: Run, died: Run, tmp_path: Path
) -> None:
    several = run("--runs", "2", out="several")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    begun = died()
    for out, more, held in (
        (several, (), f"{several}/seed-0, {several}/seed-1"),
        (several, ("--runs", "2", "--seed", "5"), f"{several}/seed-0, {several}/seed-1"),
        (begun, ("--runs", "2"), begun),
    ):
        with pytest.raises(SystemExit, match=f"--resume: this command has no run in {out}, which holds {held}; repeat"):
            trainer.main([*folders, *more, "--resume", "--out", str(out)])
    assert {path.relative_to(tmp_path) for path in several.rglob("*")} <= before
    trainer.main([*folders, "--runs", "3", "--resume", "--out", str(several)])  # one more than before
    assert steps_saved(several / "seed-2") == steps_saved(several / "seed-0")


def test_two_jobs_in_one_second__have_two_folders(trainer: ModuleType, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [trainer.new_folder("dacs") for _ in range(50)]  # some of them in one second
    assert len(set(made)) == 50
    assert all(folder.is_dir() for folder in made)


def test_nonfinite__stops_with_step_and_samples_or_undoes_the_step(
    trainer: ModuleType, run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    flags = ("--save-every", "1", "--eval-every", "4")
    with monkeypatch.context() as bad:
        poison(trainer, bad, {2})
        with pytest.raises(
            SystemExit, match=r"error: step 2: the loss or a gradient is not finite.* samples: "
        ) as error:
            run(*flags)
        skipped = run(*flags, "--skip-steps", "1", out="skipped")
    names = str(error.value).rpartition("samples: ")[2].rstrip(".").split(", ")
    assert [len(name) for name in names] == [5, 5, 20, 20]  # 00003 and street_000001_000019
    assert steps_saved(tmp_path / "run") == [1, 2]
    before = final(tmp_path / "run", 2)
    assert_same(before["student"], final(skipped, 3)["student"])  # the bad step changed nothing
    assert_same(before["optimizer"]["state"], final(skipped, 3)["optimizer"]["state"])
    assert_finite(final(skipped))
    moved, stayed = final(run(*flags, "--resume"), 3)["student"], before["student"]  # without the poison
    assert any(not torch.equal(moved[name], stayed[name]) for name in stayed)


def test_skip_steps__are_counted_and_the_count_goes_on(
    trainer: ModuleType, run: Run, monkeypatch: Patch, capsys: Capture
) -> None:
    poison(trainer, monkeypatch, set(range(1, 6)))
    flags = ("--steps", "6", "--save-every", "3", "--eval-every", "6")
    out = run(*flags, "--skip-steps", "5")
    assert "5 of 6 steps were undone" in capsys.readouterr().out
    assert metrics_of(out)["skipped_steps"] == 5
    assert [record.get("skipped_steps", 0) for record in log_of(out)] == list(range(6))
    assert final(out, 3)["metrics"]["skipped_steps"] == 2
    forget(out, 6)
    with pytest.raises(SystemExit, match=r"error: step 4: .* --skip-steps 4 undoes one more"):
        run(*flags, "--skip-steps", "3", "--resume")  # two before, one now
    with pytest.raises(SystemExit, match=r"error: 3 steps were undone so far.* --skip-steps 3 allows that many"):
        run(*flags, "--skip-steps", "2", "--resume")
    assert steps_saved(out)[-1] == 4  # what was good is saved, and the remedy works
    run(*flags, "--skip-steps", "5", "--resume")
    assert metrics_of(out)["skipped_steps"] == 5


def test_write_text__a_full_disk_is_named_and_keeps_the_old_text(small_disk: Path) -> None:
    path = small_disk / "table.md"
    write_text(path, "old")
    with pytest.raises(OSError, match=r"No space left.*free some space") as caught:
        write_text(path, "new" * 1_000_000)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


def test_write_text__through_links_and_into_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "table.md")
    for text in ("new", "newer"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "link").is_symlink()
    write_text(Path(os.devnull), "gone")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize(("launched", "ends"), [(False, ["by itself"]), (True, [])])
@pytest.mark.parametrize(("end", "status", "says"), [
    ("lambda: 3", 3, ""), ("lambda: sys.exit('error: no')", 1, "error: no\n"), ("lambda: sys.exit(2)", 2, ""),
    ("sys.exit", 0, ""),
])  # fmt: skip
def test_leave__a_launched_process_ends_before_the_interpreter_does(
    launched: bool, ends: list[str], end: str, status: int, says: str
) -> None:
    """Where threads of gloo could abort it: a race that nothing can win for certain."""
    code = "import atexit, sys, processes; atexit.register(print, 'by itself'); print('work', end=' '); "
    code += f"processes.leave({end})"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": "examples"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment | ({"RANK": "0"} if launched else {}),
        capture_output=True, text=True, check=False, cwd=TRAINER.parent.parent,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (status, says)
    assert process.stdout.rstrip() == " ".join(["work", *ends])


@pytest.mark.slow
def test_signal__before_the_first_step_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    flags = ["--demo", "--method", "dacs", "--steps", "2", "--device", "cpu", "--out", str(out)]
    process = start(*flags)
    wait_until((out / "data" / "gta5").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    printed = printed_by(process)
    assert "stopped; nothing was trained yet" in printed
    printed_by(start(*flags))
    assert steps_saved(out) == [2]


@pytest.mark.slow
def test_torchrun__the_demo_is_rendered_once_into_one_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = printed_by(start("--demo", "--steps", "2", "--device", "cpu", "--batch", "2", launcher=TORCHRUN))
    assert printed.count("rendering StreetScenes") == 1
    (out,) = (tmp_path / "runs").iterdir()
    for method in ("source", "dacs"):
        assert steps_saved(out / method) == [2]
