"""The trainer, end to end on small folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossmix import recipes
from crossmix.datasets._png import read_png
from crossmix.models import deeplab_v2_tiny, save_weights
from crossmix.optim import RepeatedSGD
from runs import assert_finite, assert_same, final, forget, log_of, metrics_of, resolved

pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.mark.parametrize("recipe", ["released", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_methods_and_outputs(run: Callable[..., Path], method: str, recipe: str) -> None:
    out = run("--method", method, "--recipe", recipe, "--source-size", "native", "--evaluation", "32x64")
    state = final(out)
    assert state["step"] == 4
    assert (state["teacher"] is None) == (method == "source")
    assert (state["align"] is None) == (method != "alignment")
    assert_finite(state)
    log = log_of(out)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert {"loss", "source_loss", "mixed_loss", "lr", "it_per_s", "data_wait"} <= log[0].keys()
    assert log[-1]["lr"] < log[0]["lr"] == 2.5e-4
    metrics = metrics_of(out)
    assert [entry["step"] for entry in metrics["evaluations"]] == [2, 4]
    assert metrics["last"]["step"] == 4
    best = max(entry["student"]["32x64"]["miou"] for entry in metrics["evaluations"])
    assert metrics["best"]["student"]["32x64"]["miou"] == best
    networks = {"student"} if method == "source" else {"student", "teacher"}
    assert metrics["best_unsupervised"] in metrics["evaluations"]
    assert all(entry.keys() == {"step", "unsupervised"} | networks for entry in metrics["evaluations"])
    assert all(entry["unsupervised"].keys() == networks for entry in metrics["evaluations"])
    for scores in (entry[who] for entry in metrics["evaluations"] for who in networks):
        assert set(scores) == {"32x64", "64x128"}  # both sizes, always
        for score in scores.values():
            assert 0 <= score["miou"] <= 1
            assert len(score["per_class"]) == 19
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == method
    assert config["scope"] == ("batch" if recipe == "released" else "image")
    assert config["versions"]["torch"] == str(torch.__version__)
    picture = read_png(out / "report" / "gallery.png")
    assert picture.shape == (3, 4 + 2 * 36, 4 + 7 * 36)
    table = (out / "report" / "table.md").read_text()
    assert "| road |" in table
    assert "mIoU" in table


def test_resume__equals_a_run_that_never_stopped(run: Callable[..., Path]) -> None:
    whole = run(out="whole")
    broken = run(out="broken")
    forget(broken)
    resumed = run("--resume", "--log-every", "2", "--save-every", "1", out="broken")
    assert_same(final(whole), final(resumed))
    assert [record["step"] for record in log_of(resumed)] == [1, 2, 4]
    keep = ("step", "student", "teacher")
    first, second = (metrics_of(out)["evaluations"] for out in (whole, resumed))
    assert [{k: e[k] for k in keep} for e in first] == [{k: e[k] for k in keep} for e in second]
    other = run("--seed", "1", out="other")
    with pytest.raises(AssertionError):
        assert_same(final(whole), final(other))


def test_resume__with_nothing_saved_starts_at_0(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    out = run("--resume")
    assert "nothing was saved" in capsys.readouterr().out
    assert final(out)["step"] == 4


def test_resume__refuses_changed_options_and_damaged_checkpoints(run: Callable[..., Path]) -> None:
    out = run()
    with pytest.raises(SystemExit, match="scope 'batch' is now 'image'; give the old ones, or another --out"):
        run("--resume", "--scope", "image")
    for path in (out / "checkpoints").glob("step*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="No checkpoint can be read"):
        run("--resume")


def test_run__never_overwrites_another(run: Callable[..., Path]) -> None:
    out = run()
    before = (out / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already; resume it with --resume, or give another --out"):
        run()
    assert (out / "log.jsonl").read_bytes() == before


def test_prior__oracle_and_source(run: Callable[..., Path]) -> None:
    oracle = final(run("--method", "alignment", out="oracle"))["align"]
    source = final(run("--method", "alignment", "--prior", "source", out="source"))["align"]
    assert int(oracle["prior_count"]) == 0
    assert int(source["prior_count"]) == 4
    assert float(oracle["prior"].sum()) == pytest.approx(1)
    assert not torch.equal(oracle["prior"], source["prior"])


def test_weights__start_the_student_and_the_head_may_differ(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    other = deeplab_v2_tiny(21)
    save_weights(other, tmp_path / "w.safetensors")
    flags = [flag for flag in folders if flag != "--random-init"]
    assert (
        trainer.main([*flags, "--weights", str(tmp_path / "w.safetensors"), "--lr", "0", "--out", str(tmp_path / "o")])
        == 0
    )
    assert "8 of another shape" in capsys.readouterr().out
    student = final(tmp_path / "o")["student"]
    for name, p in other.named_parameters():
        if not name.startswith("layer5"):
            assert torch.equal(student[name], p), name


@pytest.mark.parametrize(("choice", "optimizer"), [(True, RepeatedSGD), (False, torch.optim.SGD)])
def test_repeated__both_values(trainer: ModuleType, *, choice: bool, optimizer: type) -> None:
    built = trainer.build_optimizer(deeplab_v2_tiny(), trainer.Config(repeated=choice))
    assert type(built) is optimizer


def test_bf16__runs(run: Callable[..., Path]) -> None:
    assert_finite(final(run("--precision", "bf16")))


def test_options__flags_over_file_over_recipe(
    trainer: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = ("--gta5", "a", "--cityscapes", "b", "--random-init", "--network", "tiny")
    released, paper = resolved(trainer, capsys, *base), resolved(trainer, capsys, *base, "--recipe", "paper")
    switches = {name for name in released if released[name] != paper[name]}
    assert switches == {
        "recipe", "weigh", "scope", "source_normalizer", "include_ignored", "decay", "flavor", "same_on_batch",
        "aspp_branches", "nesterov", "repeated", "source_size", "evaluation",
    }  # fmt: skip
    for name in switches - {"recipe"}:  # each is one flag
        flag = "--" + name.replace("_", "-")
        value = [flag, str(paper[name])]
        if isinstance(paper[name], bool):
            value = [flag if paper[name] else flag.replace("--", "--no-")]
        assert resolved(trainer, capsys, *base, *value)[name] == paper[name]
    file = tmp_path / "c.json"
    file.write_text(
        json.dumps({"recipe": "paper", "decay": 0.99, "steps": 7, "gta5": "a", "cityscapes": "b", "random_init": True})
    )
    mixed = resolved(trainer, capsys, "--config", str(file), "--steps", "9")
    assert (mixed["scope"], mixed["decay"], mixed["steps"]) == ("image", 0.99, 9)
    file.write_text('{"lambda": 1}')
    with pytest.raises(SystemExit, match="unknown option 'lambda'"):
        trainer.main(["--dry-run", "--config", str(file)])
    for missing in ([], ["--gta5", "a"], ["--gta5", "a", "--cityscapes", "b"]):
        with pytest.raises(SystemExit):
            trainer.main(["--dry-run", *missing])


def test_paper_run__has_the_papers_settings(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(trainer, capsys, "--gta5", "a", "--cityscapes", "b", "--random-init")
    want = {
        "steps": 250_000, "batch": 2, "crop": "512x512", "lr": 2.5e-4, "momentum": 0.9, "weight_decay": 5e-4,
        "power": 0.9, "eval_every": 5000, "network": "resnet101", "aspp_branches": 2, "nesterov": False,
        "threshold": 0.968, "source_size": "720x1280", "target_size": "512x1024", "method": "dacs",
        "recipe": "released",
    }  # fmt: skip
    assert {name: config[name] for name in want} == want


def test_missing_folders__are_named(trainer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere: has no images \(there is no such folder\); expected <root>/images"):
        trainer.main(
            ["--gta5", str(tmp_path / "nowhere"), "--cityscapes", "b", "--random-init", "--out", str(tmp_path / "o")]
        )
    assert not (tmp_path / "o" / "config.json").exists()


@pytest.mark.slow
def test_demo__source_and_dacs_side_by_side(
    trainer: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert trainer.main(["--demo", "--steps", "3", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| class | source | dacs |" in printed
    for method in ("source", "dacs"):
        assert final(tmp_path / "demo" / method, 3)["step"] == 3
        assert (tmp_path / "demo" / method / "report" / "gallery.png").exists()
    shutil.rmtree(tmp_path / "demo" / "dacs")
    assert trainer.main(["--demo", "--method", "dacs", "--steps", "3", "--out", str(tmp_path / "one")]) == 0
    assert final(tmp_path / "one", 3)["step"] == 3
