"""The benchmarks of speed: one training in all forms of a step, figures that follow from the files, loud failures."""

import functools
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
MODULES = (
    "augment", "charts", "common", "evaluation", "figures", "gpu", "gpu_checks", "input", "loss", "mixing", "optimizer",
    "run", "scaling", "step", "step_forms", "targets", "teacher",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The modules of the benchmarks by name, importable as they import each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture
def small(bench: Any) -> Any:
    return bench["step_forms"].Size(crop=(32, 48), batch=2)


@pytest.fixture(scope="module")
def released(bench: Any) -> list[float]:
    """The losses of the released style, image by image and parameter by parameter."""
    forms = bench["step_forms"]
    losses: list[float] = forms.losses(forms.Form(released=True), forms.Size(crop=(32, 48), batch=2), 4)
    return losses


# ----------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("name", ["plain", "small logits", "channels last", "RepeatedSGD"])
def test_step__every_form_trains_as_the_released_style(
    bench: Any, small: Any, released: list[float], name: str
) -> None:
    found = bench["step_forms"].losses(bench["step_forms"].forms("cpu")[name], small, 4)
    torch.testing.assert_close(found, released, rtol=1e-4, atol=0)
    assert len({round(loss, 3) for loss in released}) == 4  # they move, so that equality says something


def test_step__some_pixels_are_confident_and_some_are_not(bench: Any, small: Any) -> None:
    forms = bench["step_forms"]
    work = forms.build(forms.Form(), small)
    confidence = work.training(*work.batch, draw=work.sample()).confidence
    assert 0.2 < float((confidence >= forms.THRESHOLD).float().mean()) < 0.8  # or lambda would hide in the losses


def test_step__forms_that_do_less_begin_alike_and_part(bench: Any, small: Any, released: list[float]) -> None:
    forms = bench["step_forms"].forms("cpu")
    once, half = (bench["step_forms"].losses(forms[name], small, 4) for name in ("updated once", "bf16"))
    torch.testing.assert_close(once[0], released[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(half, released, rtol=2e-2, atol=0)
    assert abs(once[3] - released[3]) > 1e-3 * released[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["networks compiled", "step compiled"])
def test_step__compiled_forms_train_alike(
    bench: Any, small: Any, released: list[float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = bench["step_forms"].losses(bench["step_forms"].forms("cpu")[name], small, 2)
    torch.testing.assert_close(found, released[:2], rtol=1e-4, atol=0)


def test_step__the_marked_one_is_the_step(bench: Any, small: Any, released: list[float]) -> None:
    work = bench["step_forms"].build(bench["step_forms"].forms("cpu")["RepeatedSGD"], small)
    for number, want in enumerate(released):
        draw = work.training.sample(small.batch, generator=torch.Generator().manual_seed(number))
        loss, parts = bench["step"].marked_step(work, draw, small)
        torch.testing.assert_close(float(loss), want, rtol=1e-4, atol=0)
    assert list(parts) == [
        "source forward and loss", "teacher and pseudo-labels", "mix", "augment", "mixed forward and loss", "backward",
        "guard: check", "optimizer", "EMA", "guard: restore",
    ]  # fmt: skip
    assert all(value > 0 for value in parts.values())


def test_step__measures_time_memory_parts_and_arithmetic(bench: Any, small: Any) -> None:
    names = ["plain", "RepeatedSGD"]
    found = bench["step"].measure("cpu", 2, quick=True, size=small, names=names, memory=["RepeatedSGD"])
    assert list(found["rows"]) == names
    assert list(found["parts"]) == ["RepeatedSGD"]
    for row in found["rows"].values():
        assert row["it_per_s"] == pytest.approx(1000 / row["median_ms"])
        assert row["tflop_per_s"] == pytest.approx(found["tflop"] * row["it_per_s"])
    assert "peak_mb" not in found["rows"]["plain"]
    assert 5 < found["rows"]["RepeatedSGD"]["peak_mb"] < 2000


def test_step__arithmetic_is_the_papers(bench: Any, small: Any) -> None:
    step, size = bench["step"], bench["step_forms"].Size
    assert step.tflop(size(network="resnet101", crop=(512, 512), batch=2)) == pytest.approx(5.2, abs=0.05)
    assert step.tflop(size(crop=(32, 48), batch=6)) == pytest.approx(3 * step.tflop(small))


# ------------------------------------------------------------------------------------------------------------- growth


def test_scaling__slope_is_the_exponent(bench: Any) -> None:
    xs = [1, 2, 8, 64]
    assert bench["scaling"].slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert bench["scaling"].slope(xs, [7.0] * 4) == pytest.approx(0)


def test_scaling__every_series(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = bench["scaling"]
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


def test_figures__the_picture_is_that_of_the_file(bench: Any) -> None:
    picture = (ROOT / "docs" / "scaling.svg").read_text(encoding="utf-8")
    assert picture == bench["figures"].scaling_figure()
    root = ET.fromstring(picture)  # noqa: S314 - our own
    circles = [child for child in root if child.tag.endswith("circle")]
    results = bench["figures"].read("scaling--cpu")["results"]
    assert len(circles) == sum(len(one["points"]) for one in results)
    for circle in circles:
        assert 0 < float(circle.get("cx", "nan")) < float(root.get("width", "nan"))
        assert 0 < float(circle.get("cy", "nan")) < float(root.get("height", "nan"))


def test_figures__a_gpu_has_tables_of_its_own(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bench["figures"]
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.gpu() == ["No GPU has been measured yet.", ""]
    for path in (BENCHMARKS / "results").glob("*--cpu.json"):
        shutil.copy(path, tmp_path)
    document = json.loads((tmp_path / "step--cpu.json").read_text(encoding="utf-8"))
    document["machine"]["gpu"] = "Some GPU"
    (tmp_path / "step--cuda.json").write_text(json.dumps(document), encoding="utf-8")
    page = figures.performance()
    assert page.count("| one step, tiny, 4 + 4 crops of 64 x 128 |") == 2
    assert f"On Some GPU, torch {document['machine']['torch']}, {document['date']}:" in page


def test_targets__follow_from_the_files(bench: Any) -> None:
    targets, read = bench["targets"], bench["figures"].read
    for suite in bench["run"].SUITES:
        assert targets.LINES[suite](read(f"{suite}--cpu")["results"], cuda=False), suite
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


# ------------------------------------------------------------------------------------------------------- the commands


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False)


def test_run__one_table_and_result_files(tmp_path: Path) -> None:
    done = run_command(
        "benchmarks/run.py", "--quick", "--rounds", "2", "--suites", "evaluation", "--save", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "\nconfusion matrix  " in done.stdout
    document = json.loads((tmp_path / "evaluation--cpu.json").read_text(encoding="utf-8"))
    assert document["suite"] == "evaluation"
    assert document["machine"]["malloc"] == "kept"
    assert "masked bincount" in document["results"]["rows"]


def test_run__a_failing_suite_is_named_and_the_others_run(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench["teacher"], "measure", broken)
    results = bench["figures"].read("optimizer--cpu")["results"]
    monkeypatch.setattr(bench["optimizer"], "measure", lambda *_, **__: results)
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--default-malloc", "--suites", "teacher", "optimizer"])
    assert bench["run"].main() == 1
    printed = capsys.readouterr()
    assert "FAILED: teacher\n" in printed.out
    assert "no such kernel" in printed.err
    assert "optimizer, RepeatedSGD" in printed.out
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--default-malloc", "--suites", "optimizer"])
    assert bench["run"].main() == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--quick", "--save"], "--save with --quick needs an --out"),
        (["--rounds", "1"], "--rounds must be at least 2, so that there is a spread, got 1"),
    ],
)
def test_arguments__refused(
    bench: Any, words: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--default-malloc", *words])
    with pytest.raises(SystemExit, match="2"):
        bench["run"].main()
    assert error in capsys.readouterr().err


def test_gpu__runs_on_a_cpu(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    done = run_command("benchmarks/gpu.py", "--device", "cpu", "--quick", "--stages", "checks", "scaling", *out)
    assert done.returncode == 0, done.stdout
    assert "tests: skipped, need a GPU" in done.stdout
    for name in ("no host sync", "CUDA = CPU", "graph = eager"):
        assert f"check {name}: skipped, needs a GPU" in done.stdout
    for name in ("pseudo-labels count", "repeatable"):
        assert f"check {name}: ok" in done.stdout
    assert "mix by batch" in done.stdout
    assert json.loads((tmp_path / "scaling--cpu.json").read_text(encoding="utf-8"))["suite"] == "scaling"


def test_gpu__stages_name_what_exists(bench: Any) -> None:
    made = bench["gpu"].stages("cuda", Path("out"), quick=False)
    assert [stage.name for stage in made if stage.check] == ["tests", "checks"]
    known = bench["step_forms"].forms("cuda")
    for stage in made:
        words = list(stage.command)
        assert all(Path(word).exists() for word in words if word.endswith(".py"))
        forms = words[words.index("--forms") + 1 :] if "--forms" in words else []
        assert set(forms) <= known.keys()
        assert stage.check or stage.name in bench["targets"].LINES


@pytest.mark.parametrize(("check", "code"), [(True, 1), (False, 0)])
def test_gpu__stages_fail_or_are_late_alone(
    bench: Any,
    check: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu = bench["gpu"]
    python = (sys.executable, "-c")
    made = [
        gpu.Stage("broken", 30, [*python, "print('why it broke'); raise SystemExit(3)"], check=check),
        gpu.Stage("late", 1, [*python, "import time; print('began', flush=True); time.sleep(100)"]),
        gpu.Stage("good", 30, [*python, "print('fine')"], check=True),
    ]
    monkeypatch.setattr(gpu, "stages", lambda *_, **__: made)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert gpu.main() == code
    printed = capsys.readouterr().out
    assert "broken: FAILED, exit code 3" in printed
    assert "  | why it broke\n" in printed
    assert "late: OUT OF TIME after 1 s" in printed
    assert "good: ok" in printed
    assert "  | fine\n" in printed
    assert gpu.run(made[2], -1, tmp_path / "log") == "SKIPPED, no time left"


def test_checks__can_fail(bench: Any) -> None:
    checks = bench["gpu_checks"]
    checks.close([1.0, 2.0], [1.0, 2.0], 0)
    for wrong in ([1.0, 2.1], [1.0, float("nan")]):
        with pytest.raises(RuntimeError, match="differ from"):
            checks.close(wrong, [1.0, 2.0], 1e-3)
