"""The suites of speed: one training in all forms of a step, figures that follow from the files, loud failures."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import publish
from benchmarks.speed import __main__ as command
from benchmarks.speed import optimizer, scaling, step, step_forms, targets, teacher
from benchmarks.speed.step_forms import THRESHOLD, Form, Size, forms, losses, stepper

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = Size(crop=(32, 48), batch=2)


@pytest.fixture(scope="module")
def released() -> list[float]:
    """The losses of the released style, image by image and parameter by parameter."""
    return losses(Form(released=True), SMALL, 4)


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("name", ["plain", "small logits", "channels last", "RepeatedSGD"])
def test_step__every_form_trains_as_the_released_style(released: list[float], name: str) -> None:
    found = losses(forms("cpu")[name], SMALL, 4)
    torch.testing.assert_close(found, released, rtol=1e-4, atol=0)
    assert len({round(loss, 3) for loss in released}) == 4  # they move, so that equality says something


def test_step__some_pixels_are_confident_and_some_are_not() -> None:
    work = step_forms.build(Form(), SMALL)
    confidence = work.training(*work.batch, draw=work.sample()).confidence
    assert 0.2 < float((confidence >= THRESHOLD).float().mean()) < 0.8  # or lambda would hide in the losses


def test_step__forms_that_do_less_begin_alike_and_part(released: list[float]) -> None:
    once, half = (losses(forms("cpu")[name], SMALL, 4) for name in ("updated once", "bf16"))
    torch.testing.assert_close(once[0], released[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(half, released, rtol=2e-2, atol=0)
    assert abs(once[3] - released[3]) > 1e-3 * released[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["networks compiled", "step compiled"])
def test_step__compiled_forms_train_alike(released: list[float], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = losses(forms("cpu")[name], SMALL, 2)
    torch.testing.assert_close(found, released[:2], rtol=1e-4, atol=0)


def test_step__mic_is_a_step_of_three_passes() -> None:
    work = step_forms.build(forms("cpu")["mic"], SMALL)
    assert float(work.training(*work.batch, draw=work.sample()).consistency_loss.detach()) > 0.1
    assert step.tflop(SMALL, 3) == pytest.approx(step.tflop(SMALL) * 10 / 7, rel=0.01)  # one is 3 of 7 forward passes
    assert forms("cpu")["mic"].passes == 3
    rows = {"mic": {"median_ms": 14.0}, "RepeatedSGD": {"median_ms": 10.0}}
    best, line = targets.step({"rows": {**rows, "released style": {"median_ms": 20.0}}}, cuda=False)
    assert (best.what, line.what, line.verdict) == ("step, RepeatedSGD", "step, mic", "<= 1.45  reached")


def test_step__the_marked_one_is_the_step(released: list[float]) -> None:
    work = step_forms.build(forms("cpu")["RepeatedSGD"], SMALL)
    for number, want in enumerate(released):
        draw = work.training.sample(SMALL.batch, generator=torch.Generator().manual_seed(number))
        loss, parts = step.marked_step(work, draw, SMALL)
        torch.testing.assert_close(float(loss), want, rtol=1e-4, atol=0)
    assert list(parts) == [
        "source forward and loss", "teacher and pseudo-labels", "mix", "augment", "mixed forward and loss", "backward",
        "guard: check", "optimizer", "EMA", "guard: restore",
    ]  # fmt: skip
    assert all(value > 0 for value in parts.values())


@pytest.mark.slow
def test_step__measures_time_memory_parts_and_arithmetic() -> None:
    names = ["plain", "RepeatedSGD"]
    found = step.measured(SMALL, 2, names, ["RepeatedSGD"])
    assert list(found["rows"]) == names
    assert list(found["parts"]) == ["RepeatedSGD"]
    for row in found["rows"].values():
        assert row["it_per_s"] == pytest.approx(1000 / row["median_ms"])
        assert row["tflop_per_s"] == pytest.approx(found["tflop"] * row["it_per_s"])
    assert "peak_mb" not in found["rows"]["plain"]
    assert 5 < found["rows"]["RepeatedSGD"]["peak_mb"] < 2000


def test_step__arithmetic_is_the_papers() -> None:
    assert step.tflop(Size(network="resnet101", crop=(512, 512), batch=2)) == pytest.approx(5.2, abs=0.05)
    assert step.tflop(Size(crop=(32, 48), batch=6)) == pytest.approx(3 * step.tflop(SMALL))


# ------------------------------------------------------------------------------------------------------------- growth


def test_scaling__slope_is_the_exponent() -> None:
    xs = [1, 2, 8, 64]
    assert scaling.slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert scaling.slope(xs, [7.0] * 4) == pytest.approx(0)


def test_scaling__every_series(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [scaling.Shape(n, (16, 24)) for n in (1, 2, 3)]
    chosen = {(name, axis): shapes for name, axis in scaling.series("cpu", quick=True) if axis == "batch"}
    monkeypatch.setattr(scaling, "series", lambda *_, **__: chosen)
    results = scaling.measure("cpu", 2, quick=True)
    assert [one["operation"] for one in results] == ["mix", "augment", "loss", "pseudo-labels"]
    for one in results:
        assert one["grown"] == [1, 2, 3]
        for n, point in zip(one["grown"], one["points"], strict=True):
            assert point["ns_per_pixel"] == pytest.approx(1e6 * point["median_ms"] / (n * 16 * 24))
        times = [point["median_ms"] for point in one["points"]]
        assert one["exponent"] == one["exponent_last"] == scaling.slope([1, 2, 3], times)


# ------------------------------------------------------------------------------------------------- figures and targets


def test_pages__say_what_the_result_files_say() -> None:
    for path, made in publish.PAGES.items():
        assert made().strip() in path.read_text(encoding="utf-8"), f"{path}: run python -m benchmarks.publish --write"


@pytest.mark.slow
def test_pictures__show_the_data_of_the_result_files() -> None:
    said = re.compile("data [0-9a-f]{64}")
    for path, made in publish.pictures().items():
        committed = path.read_text(encoding="utf-8")
        ET.fromstring(committed)  # noqa: S314 - our own
        assert said.findall(committed) == said.findall(made), f"{path}: run python -m benchmarks.publish --write"


def test_pages__a_gpu_has_tables_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert publish.gpu() == ["No GPU has been measured yet.", ""]
    for path in RESULTS.glob("*--cpu.json"):
        shutil.copy(path, tmp_path)
    document = json.loads((tmp_path / "step--cpu.json").read_text(encoding="utf-8"))
    document["machine"]["gpu"] = "Some GPU"
    (tmp_path / "step--cuda.json").write_text(json.dumps(document), encoding="utf-8")
    page = publish.performance()
    assert page.count("| one step, tiny, 4 + 4 crops of 64 x 128 |") == 2
    assert f"On Some GPU, torch {document['machine']['torch']}, {document['date']}:" in page


def test_targets__follow_from_the_files() -> None:
    for suite in command.SUITES:
        assert targets.LINES[suite](publish.read(f"{suite}--cpu")["results"], cuda=False), suite
    (time, memory, error) = targets.loss(
        {
            "crossmix": {"median_ms": 1.0, "peak_mb": 30.0, "gradient_error": 1e-6},
            "plain": {"median_ms": 4.0, "peak_mb": 100.0},
        },
        cuda=False,
    )
    assert [line.verdict.split()[-1] for line in (time, memory, error)] == ["reached", "MISSED", "reached"]
    assert targets.faster("x", 2.0, 6.0, "y", 3.2).verdict == ">= 3.2   MISSED"
    assert targets.faster("x", 2.0, 6.4, "y", 3.2).verdict == ">= 3.2   reached"
    assert targets.table([memory]).splitlines()[1].split() == (
        ["loss,", "memory", "30", "MB", "100", "MB", "plain", "0.300", "<=", "0.25", "MISSED"]
    )


# -------------------------------------------------------------------------------------------------------- the command


def test_command__one_table_and_result_files(tmp_path: Path) -> None:
    words = ["-m", "benchmarks.speed", "evaluation", "--quick", "--rounds", "2", "--save", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nconfusion matrix  " in done.stdout
    document = json.loads((tmp_path / "evaluation--cpu.json").read_text(encoding="utf-8"))
    assert document["suite"] == "evaluation"
    assert document["machine"]["malloc"] == "kept"
    assert "masked bincount" in document["results"]["rows"]


def test_command__a_failing_suite_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(teacher, "measure", broken)
    results = publish.read("optimizer--cpu")["results"]
    monkeypatch.setattr(optimizer, "measure", lambda *_, **__: results)
    monkeypatch.setattr(sys, "argv", ["speed", "--quick", "--default-malloc", "teacher", "optimizer"])
    assert command.main() == 1
    printed = capsys.readouterr()
    assert "FAILED: teacher\n" in printed.out
    assert "no such kernel" in printed.err
    assert "optimizer, RepeatedSGD" in printed.out
    monkeypatch.setattr(sys, "argv", ["speed", "--quick", "--default-malloc", "optimizer"])
    assert command.main() == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--quick", "--save"], "--save with --quick needs --out"),
        (["--rounds", "1"], "--rounds must be at least 2 to compute a spread, got 1"),
        (["mixin"], "unknown suite 'mixin'; the suites are mixing,"),
    ],
)
def test_command__refused(
    words: Sequence[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", "--default-malloc", *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_command__every_suite_of_a_device_can_be_found(device: str) -> None:
    for suite in command.CUDA_SUITES if device == "cuda" else command.SUITES:
        module, _, variant = suite.partition("-")
        assert callable(getattr(importlib.import_module(f"benchmarks.speed.{module}"), f"measure_{variant}".strip("_")))
        assert suite in targets.LINES


# ------------------------------------------------------------------------------------- what holds on a GPU, or nothing


STEP = Size(crop=(64, 128), batch=2, device="cuda")
FUSED = forms("cuda")["RepeatedSGD"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["RepeatedSGD", "bf16"])
def test_gpu__no_step_after_the_first_waits_for_the_device(name: str) -> None:
    work, run = stepper(forms("cuda")[name], STEP)
    run(work.sample())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run(work.sample())
        run(work.training.sample(STEP.batch, generator=torch.Generator(), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu__trains_as_a_cpu_does() -> None:
    torch.testing.assert_close(losses(FUSED, STEP, 3), losses(FUSED, replace(STEP, device="cpu"), 3), rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_gpu__a_captured_step_replays_the_eager_one() -> None:
    torch.testing.assert_close(losses(replace(FUSED, graph=True), STEP, 3), losses(FUSED, STEP, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_step__repeats_to_the_bit_where_asked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix products are first used
    torch.use_deterministic_algorithms(mode=True)
    try:
        one, two = (losses(FUSED, replace(STEP, device=device), 3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert one == two
