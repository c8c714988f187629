"""What stops the trainer, and how it goes on: signals, broken files, bad steps, moved and other data."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional

from crossmix.datasets import Sample, StreetScenes, write_png
from crossmix.engine import KeyedCrops
from crossmix.models import deeplab_v2_tiny, save_weights
from runs import (
    TORCHRUN,
    TRAINER,
    assert_same,
    changed,
    final,
    forget,
    log_of,
    metrics_of,
    poison,
    start,
    steps_saved,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")

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
    (os.kill if to == "process" else os.killpg)(process.pid, number)
    printed, _ = process.communicate(timeout=120)
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


def test_signal__repeated_until_the_end_spoils_nothing(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*folders, "--steps", "5000", "--workers", "1", "--eval-every", "5000", "--out", str(out))
    wait_for_step(out, 3, process)
    while process.poll() is None:  # as launchers do that lose patience
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    assert f"stopped after step {steps_saved(out)[-1]}, which is saved" in printed


@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_worker__killed_at_any_moment_costs_no_step(
    trainer: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    whole = run("--save-every", "1000", "--eval-every", "1000", out="whole")
    real, parts = trainer.train_step, trainer.scores

    def kill_a_worker() -> None:
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(0.5)  # torch hears of it meanwhile

    def step(training: Any, batches: Any) -> Any:
        if phase == "step" and training.done == 2:
            kill_a_worker()
        return real(training, batches)

    def scores(training: Any, network: Any) -> Any:
        real_forward = network.forward_features

        def forward(images: torch.Tensor) -> torch.Tensor:
            kill_a_worker()
            return real_forward(images)

        monkeypatch.setattr(network, "forward_features", forward)
        return parts(training, network)

    monkeypatch.setattr(trainer, "train_step", step)
    if phase == "evaluation":
        monkeypatch.setattr(trainer, "scores", scores)
    flags = ["--save-every", "1000", "--eval-every", "1000"]
    with pytest.raises(SystemExit, match=r"error: DataLoader worker .*--workers 0 reads in this process, fewer than 1"):
        run(*flags, "--workers", "1")
    monkeypatch.undo()
    saved = 3 if phase == "step" else 4
    assert steps_saved(tmp_path / "run") == [saved]
    assert_same(final(whole), final(run(*flags, "--resume")))


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


@pytest.mark.parametrize("begun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs__resumed_in_the_first_training_begins_the_second(run: Callable[..., Path], *, begun: bool) -> None:
    whole = run("--runs", "2", out="whole")
    out = run("--runs", "2")
    forget(out / "seed-0")
    shutil.rmtree(out / "seed-1")
    if begun:  # and died before anything was saved
        (out / "seed-1").mkdir()
        shutil.copy(out / "seed-0" / "config.json", out / "seed-1")
    run("--runs", "2", "--resume")
    for seed in ("seed-0", "seed-1"):
        assert_same(final(whole / seed), final(out / seed))


def test_resume__takes_the_same_data_anywhere(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert trainer.main([*own_data, "--out", str(out)]) == 0
    whole = final(out)
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for place in (str(tmp_path / "elsewhere"), "./elsewhere", "elsewhere//"):
        forget(out)
        flags = changed(own_data, gta5=f"{place}/gta5/", cityscapes=f"{place}/cs")
        assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
        assert_same(whole, final(out))


def test_resume__refuses_other_data(trainer: ModuleType, own_data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert trainer.main([*own_data, "--out", str(out)]) == 0
    before = sorted(path.read_bytes() for path in out.rglob("*.pt"))
    again = [*own_data, "--out", str(out), "--resume"]
    StreetScenes(6, size=(32, 64), seed=9).write(tmp_path / "data" / "gta5", layout="gta5")
    with pytest.raises(
        SystemExit, match=r"on other data: the source has \d files of 6 with another size, such as 0000"
    ):
        trainer.main(again)
    for kind in ("images", "labels"):
        (tmp_path / "data" / "gta5" / kind / "00001.png").rename(tmp_path / "data" / "gta5" / kind / "00009.png")
    with pytest.raises(SystemExit, match="the source had 6 samples of GTA5, and is 6 of GTA5 with other names"):
        trainer.main(again)
    StreetScenes(1, size=(32, 64)).write(tmp_path / "data" / "gta5", layout="gta5")
    with pytest.raises(SystemExit, match="the source had 6 samples of GTA5, and is 7 of GTA5"):
        trainer.main(again)
    assert sorted(path.read_bytes() for path in out.rglob("*.pt")) == before


@pytest.mark.parametrize("again", ["with the file's name", "without"])
def test_resume__needs_no_initial_weights(trainer: ModuleType, folders: list[str], tmp_path: Path, again: str) -> None:
    flags = [flag for flag in folders if flag != "--random-init"]
    torch.manual_seed(5)
    save_weights(deeplab_v2_tiny(), tmp_path / "w.safetensors")
    given = ["--weights", str(tmp_path / "w.safetensors")]
    out = tmp_path / "run"
    assert trainer.main([*flags, *given, "--out", str(out)]) == 0
    whole = final(out)
    forget(out)
    (tmp_path / "w.safetensors").unlink()
    assert trainer.main([*flags, *(given if "with the" in again else []), "--out", str(out), "--resume"]) == 0
    assert_same(whole, final(out))


def test_resume__with_nothing_saved_starts_from_the_weights_that_it_had(
    trainer: ModuleType, folders: list[str], tmp_path: Path
) -> None:
    flags = [flag for flag in folders if flag != "--random-init"]
    out = tmp_path / "run"
    assert trainer.main([*folders, "--out", str(out)]) == 0
    whole = final(out)
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.json").unlink()
    assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
    assert_same(whole, final(out))


def test_resume__needs_no_target_labels_for_the_prior(trainer: ModuleType, own_data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [*own_data, "--method", "alignment", "--out", str(out)]
    assert trainer.main(flags) == 0
    whole = final(out)
    forget(out)
    shutil.rmtree(tmp_path / "data" / "cs" / "gtFine" / "train")
    assert trainer.main([*flags, "--resume"]) == 0
    assert_same(whole, final(out))


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_broken_validation_label__costs_no_training(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, workers: str
) -> None:
    flags = [*own_data, "--workers", workers, "--save-every", "1000"]
    assert trainer.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    label = sorted((tmp_path / "data" / "cs").glob("gtFine/val/*/*_labelIds.png"))[-1]
    good, out = label.read_bytes(), tmp_path / "run"
    label.write_bytes(good[:60])
    with pytest.raises(SystemExit) as ended:
        trainer.main([*flags, "--out", str(out)])
    assert str(ended.value).startswith(f"error: {label}: ")
    assert "step 2 is saved, the same command with --resume" in str(ended.value)
    assert "Traceback" not in str(ended.value)
    assert steps_saved(out) == [2]
    label.write_bytes(good)
    assert trainer.main([*flags, "--out", str(out), "--resume"]) == 0
    assert_same(final(tmp_path / "whole"), final(out))
    assert metrics_of(tmp_path / "whole") == metrics_of(out)


def drawn(flags: list[str], step: int) -> str:
    """A source image that this step draws and no earlier one does."""
    import domains
    from options import read_options

    config = read_options(flags, "").config
    data = domains.open_data(config)
    before = {name for earlier in range(step) for name in domains.drawn_names(config, data, earlier, 1)}
    return next(name for name in domains.drawn_names(config, data, step, 1) if name not in before)


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["broken", "small"])
def test_broken_file__ends_the_run_saved_and_can_be_left_out_by_resuming(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    workers: str, fault: str,
) -> None:  # fmt: skip
    flags = [*own_data, "--workers", workers, "--save-every", "1000", "--eval-every", "1000"]
    name, out = drawn(flags, 2), tmp_path / "run"
    image = tmp_path / "data" / "gta5" / "images" / f"{name}.png"
    image.write_bytes(image.read_bytes()[:100])
    if fault == "small":  # its header is whole, so that it is found before anything is trained
        StreetScenes(1, size=(16, 64)).write(tmp_path / "small", layout="gta5")
        for kind in ("images", "labels"):
            shutil.copy(tmp_path / "small" / kind / "00001.png", image.parent.parent / kind / image.name)
    with pytest.raises(SystemExit) as ended:
        trainer.main([*flags, "--out", str(out)])
    message = str(ended.value)
    assert message.startswith("error: ")
    assert image.name.removesuffix(".png") in message
    assert "--skip-files 1" in message
    assert "Traceback" not in message
    again = [*flags, "--out", str(out), "--skip-files", "1"]
    if fault == "broken":
        assert steps_saved(out) == [2]
        again += ["--resume"]
    else:
        assert not (out / "config.json").exists()
    capsys.readouterr()
    assert trainer.main(again) == 0
    assert f"1 files were left out: {name}" in capsys.readouterr().out
    assert metrics_of(out)["skipped_files"] == [name]
    assert trainer.main([*flags, "--out", str(tmp_path / "whole"), "--skip-files", "1"]) == 0
    assert_same(final(tmp_path / "whole"), final(out))


def test_broken_files__advice_is_given_where_it_can_work(
    trainer: ModuleType, own_data: list[str], tmp_path: Path
) -> None:
    labels = sorted((tmp_path / "data" / "gta5" / "labels").glob("*.png"))
    labels[0].write_bytes(labels[0].read_bytes()[:60])  # what is looked at before a run begins
    with pytest.raises(SystemExit, match=r"error: .*00001\.png: .* Repair it, or leave it out with --skip-files 1\."):
        trainer.main([*own_data, "--out", str(tmp_path / "run")])
    for label in labels:
        label.write_bytes(label.read_bytes()[:60])
    with pytest.raises(SystemExit) as ended:
        trainer.main([*own_data, "--out", str(tmp_path / "run"), "--skip-files", "6"])
    assert str(ended.value).endswith(" Repair them; nothing was trained yet.")


def test_death_in_the_first_step__does_not_block_the_same_command(
    trainer: ModuleType, own_data: list[str], tmp_path: Path
) -> None:
    flags = [*own_data, "--out", str(tmp_path / "run")]
    assert trainer.main([*own_data, "--out", str(tmp_path / "whole")]) == 0
    image = tmp_path / "data" / "gta5" / "images" / f"{drawn(flags, 0)}.png"
    good = image.read_bytes()
    image.write_bytes(good[:100])
    with pytest.raises(SystemExit, match="error: "):
        trainer.main(flags)
    image.write_bytes(good)
    assert trainer.main(flags) == 0
    assert_same(final(tmp_path / "whole"), final(tmp_path / "run"))


def test_other_errors__save_the_last_finished_step(
    trainer: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("--save-every", "1000", "--eval-every", "1000", out="whole")
    real = trainer.Record.step

    def interrupted(record: Any, training: Any, output: Any) -> None:
        real(record, training, output)
        if training.done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Record, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--save-every", "1000", "--eval-every", "1000")
    monkeypatch.undo()
    assert steps_saved(tmp_path / "run") == [3]
    assert_same(final(whole), final(run("--save-every", "1000", "--eval-every", "1000", "--resume")))


def test_resume__of_nothing_is_refused(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: --resume needs --out DIR"):
        trainer.main([*folders, "--resume"])
    with pytest.raises(SystemExit, match="error: --resume: there is no folder runs/mistyped"):
        trainer.main([*folders, "--resume", "--out", "runs/mistyped"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(SystemExit, match="error: --resume: thesis is not the folder of a run"):
        trainer.main([*folders, "--resume", "--out", "thesis"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter.tex", "thesis"]


def test_two_jobs_in_one_second__have_two_folders(
    trainer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = [trainer.new_folder("dacs") for _ in range(50)]  # some of them in one second
    assert len(set(made)) == 50
    assert all(folder.is_dir() for folder in made)


def test_skip_steps__are_counted_and_the_count_goes_on(
    trainer: ModuleType, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    poison(trainer, monkeypatch, set(range(1, 10)))
    flags = ["--steps", "10", "--save-every", "5", "--eval-every", "5"]
    out = run(*flags, "--skip-steps", "9")
    assert "9 of 10 steps were undone" in capsys.readouterr().out
    assert metrics_of(out)["skipped_steps"] == 9
    assert [record.get("skipped_steps", 0) for record in log_of(out)] == list(range(10))
    assert final(out, 5)["metrics"]["skipped_steps"] == 4
    forget(out, 10)
    run(*flags, "--skip-steps", "9", "--resume")
    assert metrics_of(out)["skipped_steps"] == 9
    forget(out, 10)
    with pytest.raises(SystemExit, match=r"error: step 6: .* --skip-steps 6 undoes one more"):
        run(*flags, "--skip-steps", "5", "--resume")  # four before, one now
    with pytest.raises(SystemExit, match=r"error: 5 steps were undone so far.* --skip-steps 5 allows that many"):
        run(*flags, "--skip-steps", "4", "--resume")
    assert steps_saved(out)[-1] == 6  # what was good is saved, and the remedy works
    run(*flags, "--skip-steps", "9", "--resume")
    assert metrics_of(out)["skipped_steps"] == 9


def test_nothing_to_score__is_said(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in (tmp_path / "data" / "cs").glob("gtFine/val/*/*_labelIds.png"):
        write_png(label, torch.zeros(32, 64, dtype=torch.uint8))  # unlabelled
    assert trainer.main([*own_data, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "no pixel of the validation images counts" in printed
    assert "inf" not in printed
    assert metrics_of(tmp_path / "run")["last"]["student"]["32x64"]["miou"] is None


def test_pad__trains_on_images_smaller_than_the_crop(run: Callable[..., Path]) -> None:
    whole = run("--crop", "40x80", "--pad", "--save-every", "2")
    assert all(0 < record["loss"] < 20 for record in log_of(whole))
    plain = run("--crop", "32", out="plain")
    assert_same(final(plain)["student"], final(run("--crop", "32", "--pad", out="padded"))["student"])


@pytest.mark.parametrize("labelled", [True, False])
def test_crops__pad_is_a_padded_image(*, labelled: bool) -> None:
    scenes = StreetScenes(3, size=(20, 64), seed=4)
    samples = [Sample(one.image, one.label if labelled else None, one.name) for one in (scenes[i] for i in range(3))]
    padded = [
        Sample(functional.pad(one.image, (0, 0, 0, 12)),
               one.label if one.label is None else functional.pad(one.label, (0, 0, 0, 12), value=255), one.name)
        for one in samples
    ]  # fmt: skip
    crops = KeyedCrops(samples, (32, 40), seed=0, stream=0, pad=True)
    oracle = KeyedCrops(padded, (32, 40), seed=0, stream=0)
    for draw in range(9):
        for got, want in zip(crops[draw], oracle[draw], strict=True):
            assert torch.equal(got, want)
    with pytest.raises(
        ValueError, match=f"{scenes[0].name[:3]}.*: the image is 20 x 64, smaller than the crop of 32 x 40"
    ):
        KeyedCrops(samples, (32, 40), seed=0, stream=0)[0]


def test_crops__leave_a_small_image_out() -> None:
    good, small = StreetScenes(4, size=(32, 64)), StreetScenes(1, size=(20, 64))[0]
    crops = KeyedCrops([good[0], small, good[2], good[3]], (32, 32), seed=0, stream=0, skip=1)
    plain = KeyedCrops(good, (32, 32), seed=0, stream=0)
    for draw in range(12):
        if plain.index(draw) != 1:
            assert torch.equal(crops[draw][0], plain[draw][0])
        else:
            assert crops[draw][0].shape == (3, 32, 32)
    assert list(crops.skipped) == [1]


@pytest.mark.slow
def test_signal__before_the_first_step_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    flags = ["--demo", "--method", "dacs", "--steps", "2", "--device", "cpu", "--out", str(out)]
    process = start(*flags)
    wait_until((out / "data" / "gta5").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "stopped; nothing was trained yet" in printed
    process = start(*flags)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert steps_saved(out) == [2]


@pytest.mark.slow
def test_torchrun__the_demo_is_rendered_once_into_one_folder(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, *TORCHRUN, str(TRAINER), "--demo", "--steps", "2", "--device", "cpu", "--batch", "2"],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("rendering StreetScenes") == 1
    (out,) = (tmp_path / "runs").iterdir()
    for method in ("source", "dacs"):
        assert steps_saved(out / method) == [2]
