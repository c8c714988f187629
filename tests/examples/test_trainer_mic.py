"""The trainer with the mic recipe: its optimizer, masked consistency, rare classes, and a label-free step."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import domains
from crossmix.datasets import Cityscapes, RareClassSampler, class_counts
from crossmix.datasets._png import read_png
from crossmix.diagnostics import UnsupervisedScores
from crossmix.engine import KeyedCrops, keyed_generator
from crossmix.models import deeplab_v2_tiny, load_weights
from pages import Page
from runs import (
    TORCHRUN,
    Patch,
    Run,
    assert_same,
    final,
    log_of,
    metrics_of,
    poison,
    printed_by,
    resolved,
    start,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MIC = ("--recipe", "mic")
MOVING = (*MIC, "--threshold", "0.05", "--lr", "0.001", "--warmup", "2")


# ------------------------------------------------------------------------------------------------- optimizer and loss


class Normed(nn.Sequential):
    """A network with a bias and a normalisation layer."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 19, 1))


def test_optimizer__adamw_without_decay_on_norms(trainer: ModuleType) -> None:
    flags = {"network": "m:f", "head": "3", "optimizer": "adamw", "lr": 6e-5, "weight_decay": 0.01, "repeated": False}
    network = Normed()
    built = trainer.build_optimizer(network, trainer.Config(**flags, no_decay="norm", head_factor=5.0))
    assert type(built) is torch.optim.AdamW
    found = {id(one): (group["lr"], group["weight_decay"]) for group in built.param_groups for one in group["params"]}
    want = {id(one): (3e-4 if part is network[3] else 6e-5, 0.0 if part is network[1] else 0.01)
            for part in network for one in part.parameters()}  # fmt: skip
    assert found.keys() == want.keys()
    assert all(found[key] == pytest.approx(pair) for key, pair in want.items())
    built = trainer.build_optimizer(network, trainer.Config(**flags, no_decay="bias,norm"))
    assert sorted(len(group["params"]) for group in built.param_groups) == [1, 1, 1, 3]


@pytest.mark.usefixtures("no_charts")
def test_learning_rate__warms_up_then_decays(run: Run) -> None:
    flags = ["--steps", "10", "--lr", "0.01", "--warmup", "4", "--power", "1"]
    found = [record["lr"] for record in log_of(run(*flags, "--eval-every", "10", "--save-every", "10"))]
    want = [0.01 * (1 - step / 10) * (1e-6 + (1 - 1e-6) * min(step / 4, 1)) for step in range(10)]
    assert found == pytest.approx(want, rel=1e-9)


def spied(trainer: ModuleType, monkeypatch: Patch, look: Callable[[Any, Any], Any]) -> list[Any]:
    """What a function of each step's run and batch returns before the step, beside the step's output."""
    seen = []
    real = trainer.train_step

    def watched(training: Any, parts: Any) -> Any:
        found = look(training, parts[0])
        output = real(training, parts)
        seen.append((found, output))
        return output

    monkeypatch.setattr(trainer, "train_step", watched)
    return seen


@pytest.mark.usefixtures("no_charts")
def test_consistency__is_the_librarys_term_with_the_trainers_draws(
    trainer: ModuleType, run: Run, monkeypatch: Patch
) -> None:
    """Each step's loss, computed again from the images and by the draws of the whole batch."""

    def expected(run: Any, batch: Any) -> Any:
        training, ((images, labels), (target, _)) = run.training, batch
        draw = training.sample(2, (32, 32), generator=keyed_generator(0, 2, run.done))
        before = [buffer.clone() for buffer in training.buffers()]
        with torch.no_grad():
            want = training(images, labels, target, draw=draw)
            for buffer, was in zip(training.buffers(), before, strict=True):
                buffer.copy_(was)
        return want.consistency_loss

    seen = spied(trainer, monkeypatch, expected)
    log = log_of(run(*MIC, "--threshold", "0.05", "--consistency-block", "16", "--eval-every", "4"))
    assert len(seen) == 4
    for (want, output), record in zip(seen, log, strict=True):
        assert want > 0
        torch.testing.assert_close(output.consistency_loss.detach(), want, rtol=1e-5, atol=1e-6)
        assert record["consistency_loss"] == pytest.approx(float(want), rel=1e-5)
        total = record["source_loss"] + record["mixed_loss"] + record["consistency_loss"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("dacs", ()),
        ("alignment", ("--prior", "source", "--no-consistency", "--save-every", "1", "--eval-every", "4")),
        ("source", ()),
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_mic__resumed_equals_a_run_that_never_stopped(
    whole: Run, died: Run, run: Run, method: str, flags: tuple[str, ...]
) -> None:
    flags = (*MOVING, "--method", method, *flags)
    want, out = final(whole(*flags)), died(*flags)
    assert len(tensors(want["optimizer"])) > 2  # counts of steps, and both averages
    assert ("consistency_loss" in log_of(out)[0]) == (method == "dacs")
    run(*flags, "--resume")
    assert_same(want, final(out))
    assert metrics_of(whole(*flags)) == metrics_of(out)


@pytest.mark.usefixtures("no_charts")
def test_mic__a_bad_step_changes_nothing(trainer: ModuleType, run: Run, monkeypatch: Patch) -> None:
    poison(trainer, monkeypatch, {2})
    out = run(*MIC, "--lr", "0.001", "--save-every", "1", "--skip-steps", "1", "--eval-every", "4", "--steps", "3")
    before, after = final(out, 2), final(out, 3)
    for name in ("student", "teacher"):
        assert_same(before[name], after[name])
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])  # both averages, and the counts of steps
    assert metrics_of(out)["skipped_steps"] == 1


@pytest.mark.slow
def test_mic__two_processes_draw_what_one_does(run: Run, folders: list[str], tmp_path: Path) -> None:
    flags = [*MIC, "--threshold", "0.05", "--lr", "0", "--steps", "2", "--eval-every", "2"]
    one = run(*flags, "--batch", "4", out="one")
    printed_by(start(*folders, *flags, "--batch", "2", "--out", str(tmp_path / "two"), launcher=TORCHRUN))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["batch"] == 2
    first, second = metrics_of(one), metrics_of(tmp_path / "two")
    assert first["skipped_files"] == second["skipped_files"]
    for entry, other in zip(first["evaluations"], second["evaluations"], strict=True):
        # BatchNorm sees other batches, so the statistics differ; the label-free scores are of all images in both.
        assert entry["unsupervised"].keys() == other["unsupervised"].keys()
    pictures = sorted((one / "report" / "pictures").glob("mixed-[01]-[01].png"))
    assert len(pictures) == 4  # source and target of the first two rows: rank 0's part of the batch
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "two" / "report" / "pictures" / path.name).read_bytes()


# ------------------------------------------------------------------------------------------------------- rare classes


@pytest.fixture
def rare(folders: list[str], tmp_path: Path) -> list[str]:
    """The flags with a source of their own, where no counts are kept yet."""
    shutil.copytree(folders[1], tmp_path / "gta5", ignore=shutil.ignore_patterns("*.jsonl"))
    return [*folders, "--gta5", str(tmp_path / "gta5"), "--rare-classes", "--save-every", "4", "--eval-every", "4"]


@pytest.mark.usefixtures("no_charts")
def test_rare_classes__the_source_alone_is_drawn_by_them(
    trainer: ModuleType, rare: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    flags = [*rare, "--rare-temperature", "0.05", "--rare-pixels", "20", "--out", str(tmp_path / "run")]
    config = trainer.Config(**resolved(*flags))
    data = domains.open_data(config)
    sampler = RareClassSampler(class_counts(data.source), temperature=0.05, min_pixels=20)
    streams = [KeyedCrops(samples, (32, 32), seed=0, stream=i, rare=sampler if i == 0 else None)
               for i, samples in enumerate(data[:2])]  # fmt: skip
    seen = spied(trainer, monkeypatch, lambda _, batch: batch)
    assert trainer.main(flags) == 0
    assert len(seen) == 4
    usual, names = [], []
    for step, (batch, _) in enumerate(seen):
        drawn = []
        for (images, labels), crops, samples in zip(batch, streams, data[:2], strict=True):
            for row in range(2):
                image, label = crops[2 * step + row]
                assert torch.equal(images[row], image.float() / 255)
                assert torch.equal(labels[row], label)
                drawn.append(samples.files[crops.index(2 * step + row)].name)
        assert domains.drawn_names(config, data, step, 1, rare=sampler) == drawn
        names += drawn
        usual += domains.drawn_names(config, data, step, 1)
    assert usual != names
    picture = read_png(tmp_path / "run" / "report" / "pictures" / "mixed-0-0.png")
    assert torch.equal(picture, (seen[-1][0][0][0][0] * 255).round().to(torch.uint8))  # the report shows what was drawn


@pytest.mark.usefixtures("no_charts")
def test_rare_classes__are_counted_once_beside_the_data_or_in_out(
    trainer: ModuleType, whole: Run, rare: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    config = trainer.Config(**resolved(*rare))
    data = domains.open_data(config)
    sampler = domains.rare_class_sampler(config, data, tmp_path)
    file = tmp_path / "gta5" / "crossmix-stats.jsonl"
    kept = file.read_bytes()
    assert len(kept.splitlines()) == 6
    names = ", ".join(domains.drawn_names(config, data, 0, 1, rare=sampler))
    with monkeypatch.context() as bad:
        poison(trainer, bad, {0})
        with pytest.raises(SystemExit, match=f"step 0: .* Its samples: {names}"):  # drawn by the same counts
            trainer.main([*rare, "--out", str(tmp_path / "bad")])
    assert file.read_bytes() == kept
    file.unlink()
    flags = ("--rare-classes", "--steps", "2")
    want = final(whole(*flags), 2)
    assert (Path(rare[1]) / file.name).exists()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "gta5" not in str(path) and real(path, mode))
    assert trainer.main([*rare, *flags, "--runs", "2", "--out", str(tmp_path / "two")]) == 0  # both seeds share it
    assert len((tmp_path / "two" / file.name).read_bytes().splitlines()) == 6
    assert not file.exists()
    assert_same(want, final(tmp_path / "two" / "seed-0", 2))


def test_rare_classes__bad_counts_end_before_anything_is_trained(
    trainer: ModuleType, rare: list[str], tmp_path: Path
) -> None:
    for _ in ("before they are counted", "after"):
        with pytest.raises(SystemExit, match=r"error: --rare-pixels 1000000: .* the most is"):
            trainer.main([*rare, "--rare-pixels", "1000000", "--out", str(tmp_path / "run")])
    label = tmp_path / "gta5" / "labels" / "00003.png"
    label.write_bytes(label.read_bytes()[:40])
    with pytest.raises(SystemExit, match=r"error: .*00003\.png"):
        trainer.main([*rare, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "checkpoints").exists()


# -------------------------------------------------------------------------------------------- choosing without labels


def test_unsupervised__scores_are_the_librarys_and_choose_a_step(run: Run, folders: list[str]) -> None:
    out = run("--eval-every", "1", "--lr", "0.01")
    metrics = metrics_of(out)
    entries = metrics["evaluations"]
    gains = [entry["unsupervised"]["student"]["information"] for entry in entries]
    chosen = entries[gains.index(max(gains))]
    assert metrics["best_unsupervised"] == chosen
    validation = Cityscapes(folders[3], "val", size=(32, 64))
    network = deeplab_v2_tiny(aspp_branches=2, upsample=False)
    for who in ("student", "teacher"):
        load_weights(network, out / "checkpoints" / "step-0000004.pt", entry=who)
        direct = UnsupervisedScores(19)
        for sample in validation:
            with torch.no_grad():
                direct.update(network.eval()(sample.image[None].float() / 255))
        assert entries[-1]["unsupervised"][who] == pytest.approx(direct.compute()._asdict(), rel=1e-5)
        assert all(math.isfinite(value) for entry in entries for value in entry["unsupervised"][who].values())
    best, by_information = (metrics[name]["student"]["32x64"]["miou"] for name in ("best", "best_unsupervised"))
    table = (out / "report" / "table.md").read_text()
    assert f"| mIoU, label-free step | {100 * by_information:.2f} |" in table
    assert f"| points below the best step | {100 * (best - by_information):.2f} |" in table
    page = Page(out / "report" / "index.html")
    assert page.rows[f"label-free step, {chosen['step']}: student"][0] == f"{100 * by_information:.2f}"
    figures = dict(zip(page.of("dt"), page.of("dd"), strict=False))
    assert figures["student, label-free step below the best"] == f"{100 * (best - by_information):.2f} points"
    assert f"student, 4: {gains[-1]:.4g}" in page.of("title")


NAMES = ("best", "best_unsupervised")


@pytest.mark.usefixtures("no_charts")
def test_unsupervised__the_chosen_steps_checkpoint_is_kept_until_a_better_one_comes(
    trainer: ModuleType, run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    """By scores that are made up: by labels step 4 is the best of 6, by information step 2, then step 5."""
    import evaluate

    scores = {2: (0.1, 3.0), 3: (0.2, 1.0), 4: (0.3, 2.0), 5: (0.2, 4.0), 6: (0.1, 3.5)}

    def made_up(run: Any, _network: Any) -> Any:
        miou, information = scores.get(run.done, (0.0, 0.0))
        by_size = {size: {"miou": miou, "per_class": {}} for size in ("32x64", "64x128")}
        return by_size, {"information": information}

    def steps(out: Path) -> list[int]:
        states = [torch.load(out / "checkpoints" / f"{name}.pt", weights_only=True) for name in NAMES]
        assert [state["step"] for state in states] == [metrics_of(out)[name]["step"] for name in NAMES]
        return [state["step"] for state in states]

    monkeypatch.setattr(trainer, "scores", made_up)
    monkeypatch.setattr("training_run.write_report", lambda *_: None)
    monkeypatch.setattr(trainer, "conclude", lambda *_: None)
    flags = ["--steps", "6", "--eval-every", "1", "--save-every", "1"]
    with monkeypatch.context() as bad:
        poison(trainer, bad, {4})
        with pytest.raises(SystemExit, match="step 4: "):
            run(*flags)
    out = tmp_path / "run"
    assert steps(out) == [4, 2]
    (out / "checkpoints" / "best.pt").unlink()  # as if it had been killed before it wrote this, its last file
    run(*flags, "--resume")
    assert steps(out) == [4, 5]
    files = {path.name for path in (out / "checkpoints").glob("*.pt")}
    assert files == {"best.pt", "best_unsupervised.pt", "step-0000005.pt", "step-0000006.pt"}
    network = evaluate.load_network(str(out / "checkpoints" / "best_unsupervised.pt"), "student")
    assert_same(network.state_dict(), final(out, 5)["student"])


def test_unsupervised__the_first_of_equal_ones_and_none_without_numbers(trainer: ModuleType) -> None:
    from training_run import keep_scores

    metrics: dict[str, Any] = {"evaluations": [], "last": None, **dict.fromkeys(NAMES)}
    run: Any = SimpleNamespace(config=trainer.Config(evaluation="native"), metrics=metrics)
    given: list[tuple[float | None, float | None]] = [(None, None), (0.1, None), (0.3, 2.0), (0.2, 2.0), (0.3, 2.5)]
    better = []
    for step, (miou, information) in enumerate(given):
        scores = {"native": {"miou": miou}}
        entry = {"step": step, "student": scores, "unsupervised": {"student": {"information": information}}}
        better.append(keep_scores(run, entry))
    assert better == [[*NAMES], ["best"], [*NAMES], [], ["best_unsupervised"]]
    assert [metrics[name]["step"] for name in ("last", *NAMES)] == [4, 2, 4]
