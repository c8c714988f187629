"""The trainer, end to end on small folders: what it trains, by which switches, and what it leaves behind."""

import json
import shutil
import statistics
from functools import partialmethod
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from crossmix import recipes
from crossmix.datasets import Sample, StreetScenes, write_png
from crossmix.datasets._png import read_png
from crossmix.engine import KeyedCrops
from crossmix.models import deeplab_v2_tiny, save_weights
from crossmix.optim import RepeatedSGD
from oracles import deep_png, save
from pages import Page
from runs import Capture, Run, assert_finite, assert_same, final, forget, log_of, metrics_of, resolved

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")
ONCE = ("--save-every", "4", "--eval-every", "4")


@pytest.mark.parametrize("recipe", ["released", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_methods_and_outputs(whole: Run, method: str, recipe: str) -> None:
    out = whole("--method", method, *(["--recipe", "paper", "--source-size", "native"] if recipe == "paper" else []))
    state, log, metrics = final(out), log_of(out), metrics_of(out)
    assert state["step"] == 4
    assert (state["teacher"] is None) == (method == "source")
    assert (state["align"] is None) == (method != "alignment")
    assert_finite(state)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert {"loss", "source_loss", "mixed_loss", "lr", "it_per_s", "data_wait"} <= log[0].keys()
    assert log[-1]["lr"] < log[0]["lr"] == 2.5e-4
    entries = metrics["evaluations"]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert metrics["last"] == entries[-1]
    assert metrics["best"]["student"]["32x64"]["miou"] == max(one["student"]["32x64"]["miou"] for one in entries)
    assert metrics["best_unsupervised"] in entries
    networks = {"student"} if method == "source" else {"student", "teacher"}
    for entry in entries:
        assert entry.keys() == {"step", "unsupervised"} | networks
        assert entry["unsupervised"].keys() == networks
        for scores in (entry[who] for who in networks):
            assert set(scores) == {"32x64", "64x128"}  # both sizes, always
            assert all(0 <= score["miou"] <= 1 and len(score["per_class"]) == 19 for score in scores.values())
    config = json.loads((out / "config.json").read_text())
    assert (config["method"], config["scope"]) == (method, "batch" if recipe == "released" else "image")
    assert config["versions"]["torch"] == str(torch.__version__)
    assert read_png(out / "report" / "gallery.png").shape == (3, 4 + 2 * 36, 4 + 7 * 36)
    table = (out / "report" / "table.md").read_text()
    assert "| road |" in table
    assert "mIoU" in table


# The first losses of a small DACS run, so that a change of the numbers is seen.
RECORDED = [5.010983, 5.222232, 4.016420, 3.864082]


def test_first_losses__are_those_on_record(run: Run) -> None:
    log = log_of(run("--lr", "0.001", "--threshold", "0.15", *ONCE))
    assert [record["loss"] for record in log] == pytest.approx(RECORDED, rel=1e-4)


def test_prior__oracle_and_source(whole: Run) -> None:
    oracle = final(whole("--method", "alignment"))["align"]
    source = final(whole("--method", "alignment", "--prior", "source", *ONCE))["align"]
    assert (int(oracle["prior_count"]), int(source["prior_count"])) == (0, 4)
    assert float(oracle["prior"].sum()) == pytest.approx(1)
    assert not torch.equal(oracle["prior"], source["prior"])


def test_weights__start_the_student_are_needed_no_more_to_resume_and_the_head_may_differ(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(5)
    other, file = deeplab_v2_tiny(21), tmp_path / "w.safetensors"
    save_weights(other, file)
    flags = [*(flag for flag in folders if flag != "--random-init"), "--lr", "0"]
    assert trainer.main([*flags, "--weights", str(file), "--out", str(tmp_path / "whole")]) == 0
    assert "8 of another shape" in capsys.readouterr().out
    whole = final(tmp_path / "whole")
    for name, p in other.named_parameters():
        assert name.startswith("layer5") or torch.equal(whole["student"][name], p), name
    file.unlink()
    for out, again in (("with the file's name", ["--weights", str(file)]), ("without", [])):
        shutil.copytree(tmp_path / "whole", tmp_path / out)
        forget(tmp_path / out)
        assert trainer.main([*flags, *again, "--out", str(tmp_path / out), "--resume"]) == 0
        assert_same(whole, final(tmp_path / out))


@pytest.mark.parametrize(("choice", "optimizer"), [(True, RepeatedSGD), (False, torch.optim.SGD)])
def test_repeated__both_values(trainer: ModuleType, *, choice: bool, optimizer: type) -> None:
    assert type(trainer.build_optimizer(deeplab_v2_tiny(), trainer.Config(repeated=choice))) is optimizer


SWITCHES = {  # whether they change nothing here
    "--precision bf16": False, "--precision fp16": False, "--precision tf32": True, "--channels-last": False,
    "--accumulate 2": False, "--skip-files 1": True, "--resident": True, "--deterministic": True, "--pad": True,
}  # fmt: skip


@pytest.mark.parametrize(("flags", "same"), SWITCHES.items())
def test_switches__run(whole: Run, run: Run, flags: str, *, same: bool) -> None:
    state = final(run(*ONCE, *flags.split()))
    torch.use_deterministic_algorithms(mode=False)
    assert_finite(state)
    if same:
        plain = final(whole(*ONCE))
        assert_same(*({k: one[k] for k in ("student", "teacher", "optimizer")} for one in (plain, state)))


def test_cache__is_built_once_and_changes_nothing(whole: Run, run: Run, tmp_path: Path) -> None:
    times = []
    for out, flags in (("cached", []), ("again", ["--resident"])):
        state = final(run("--cache", str(tmp_path / "cache"), *ONCE, *flags, out=out))
        times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")})
        assert_same(final(whole(*ONCE))["student"], state["student"])
    assert times[0] == times[1]
    assert len(times[0]) == 2


@pytest.mark.slow
def test_compile__has_the_same_checkpoints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    quick = partialmethod(nn.Module.compile, backend="aot_eager")  # how code is generated makes no difference here
    monkeypatch.setattr(nn.Module, "compile", quick)
    flags = ["--steps", "2", "--save-every", "1", "--eval-every", "2"]
    out = run("--compile", *flags)
    one, two = final(out, 2), final(run(*flags, out="plain"), 2)
    assert one["student"].keys() == two["student"].keys()
    for name, value in two["student"].items():
        torch.testing.assert_close(one["student"][name], value, rtol=1e-3, atol=1e-4)
    forget(out, 2)
    run("--resume", *flags)  # and goes on without compiling


def test_synthia__trains_and_reports_16_and_13_classes(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    scenes = StreetScenes(4, size=(32, 64))
    ids = torch.tensor([3, 4, 2, 21, 5, 7, 15, 9, 6, 0, 1, 10, 17, 8, 0, 19, 0, 12, 11] + [0] * 237)
    for i in range(4):
        label = ids[scenes[i].label.long()][..., None].expand(-1, -1, 3)
        save(tmp_path / "s" / "RGB" / f"{i}.png", scenes[i].image.permute(1, 2, 0).numpy())
        deep_png(tmp_path / "s" / "GT" / "LABELS" / f"{i}.png", label.numpy())
    assert trainer.main(["--synthia", str(tmp_path / "s"), *folders[2:], "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "| mIoU of 16 |" in printed
    assert "| mIoU of 13 |" in printed
    metrics = metrics_of(tmp_path / "o")
    best = max(entry["student"]["32x64"]["miou_16"] for entry in metrics["evaluations"])
    assert metrics["best"]["student"]["32x64"]["miou_16"] == best


def test_runs__are_compared_and_metrics_of_a_killed_one_mended(run: Run, capsys: Capture) -> None:
    out = run("--runs", "2", *ONCE)
    printed = capsys.readouterr().out
    assert "dacs, seed 0" in printed
    assert "dacs, seed 1" in printed
    both = [100 * metrics_of(out / f"seed-{i}")["last"]["student"]["32x64"]["miou"] for i in (0, 1)]
    want = f"{statistics.mean(both):.2f} +- {statistics.stdev(both):.2f}"
    table = (out / "report" / "table.md").read_text("utf-8")
    assert f"| mIoU | {want} |" in table
    assert "mIoU, best step" in table
    assert table in printed
    rows = Page(out / "report" / "index.html").rows
    assert rows["dacs, last step: student"][0] == want.replace(" +- ", "\n±")
    before = metrics_of(out / "seed-0")
    (out / "seed-0" / "metrics.json").unlink()  # as if it had died between its last checkpoint and this file
    run("--runs", "2", *ONCE, "--resume")
    assert metrics_of(out / "seed-0") == before


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (
            ("--recipe", "paper"),
            "on labels of 1024x2048. The paper's numbers are on labels of 512x1024.",
        ),
        (("--network", "tiny", "--evaluation", "512x1024"), "on labels of 512x1024."),
        (("--network", "tiny", "--target-size", "native"), "on labels of their own size."),
    ],
)
def test_table__says_what_labels_it_is_scored_on(trainer: ModuleType, flags: tuple[str, ...], note: str) -> None:
    from training_run import shown

    config = trainer.Config(**resolved("--gta5", "a", "--cityscapes", "b", "--random-init", *flags))
    score = {"miou": 0.5, "per_class": {"road": 0.5}}
    entry = {"student": {config.evaluation: score}}
    run = {"last": entry, "best": entry, "best_unsupervised": None}
    assert shown({"dacs": [run]}, config).splitlines()[-1] == f"IoU in percent, {note}"


def test_nothing_to_score__is_said(trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: Capture) -> None:
    for label in (tmp_path / "data" / "cs").glob("gtFine/val/*/*_labelIds.png"):
        write_png(label, torch.zeros(32, 64, dtype=torch.uint8))  # unlabelled
    assert trainer.main([*own_data, *ONCE, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "no pixel of the validation images counts" in printed
    assert "inf" not in printed
    assert metrics_of(tmp_path / "run")["last"]["student"]["32x64"]["miou"] is None


def test_pad__trains_on_images_smaller_than_the_crop(run: Run) -> None:
    assert all(0 < record["loss"] < 20 for record in log_of(run("--crop", "40x80", "--pad", *ONCE)))


@pytest.mark.parametrize("labelled", [True, False])
def test_crops__pad_is_a_padded_image(*, labelled: bool) -> None:
    samples, padded = [], []
    for image, label, name in StreetScenes(3, size=(20, 64), seed=4):
        larger = functional.pad(label, (0, 0, 0, 12), value=255)
        samples.append(Sample(image, label if labelled else None, name))
        padded.append(Sample(functional.pad(image, (0, 0, 0, 12)), larger if labelled else None, name))
    crops = KeyedCrops(samples, (32, 40), seed=0, stream=0, pad=True)
    oracle = KeyedCrops(padded, (32, 40), seed=0, stream=0)
    for draw in range(9):
        assert all(map(torch.equal, crops[draw], oracle[draw]))
    with pytest.raises(ValueError, match=r"\d.*: the image is 20 x 64, smaller than the crop of 32 x 40"):
        KeyedCrops(samples, (32, 40), seed=0, stream=0)[0]


def test_crops__leave_a_small_image_out() -> None:
    good, small = StreetScenes(4, size=(32, 64)), StreetScenes(1, size=(20, 64))[0]
    crops = KeyedCrops([good[0], small, good[2], good[3]], (32, 32), seed=0, stream=0, skip=1)
    plain = KeyedCrops(good, (32, 32), seed=0, stream=0)
    for draw in range(12):
        assert crops[draw][0].shape == (3, 32, 32)
        assert plain.index(draw) == 1 or torch.equal(crops[draw][0], plain[draw][0])
    assert list(crops.skipped) == [1]


@pytest.mark.slow
def test_demo__source_and_dacs_side_by_side(trainer: ModuleType, capsys: Capture, tmp_path: Path) -> None:
    assert trainer.main(["--demo", "--steps", "3", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    assert "| class | source | dacs |" in capsys.readouterr().out
    for method in ("source", "dacs"):
        assert final(tmp_path / "demo" / method, 3)["step"] == 3
        assert (tmp_path / "demo" / method / "report" / "gallery.png").exists()
    assert trainer.main(["--demo", "--method", "dacs", "--steps", "3", "--out", str(tmp_path / "one")]) == 0
    assert final(tmp_path / "one", 3)["step"] == 3
