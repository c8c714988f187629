"""The trainer with the mic recipe: its options, masked consistency, rare classes, and a label-free step."""

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from crossmix import recipes
from crossmix.datasets import RareClassSampler, StreetScenes, class_counts
from crossmix.datasets._png import read_png
from crossmix.diagnostics import UnsupervisedScores
from crossmix.engine import KeyedCrops, keyed_generator
from crossmix.models import deeplab_v2_tiny, load_weights
from pages import Page
from runs import TORCHRUN, assert_same, final, log_of, metrics_of, poison, resolved, start, tensors, wait_for_step

pytestmark = pytest.mark.usefixtures("one_thread")

MIC = ("--recipe", "mic")
BASE = ("--gta5", "a", "--cityscapes", "b", "--random-init")


def as_flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    return [f"{flag}={'none' if value is None else value}"]


# ----------------------------------------------------------------------------------------------------------- options


def test_mic__has_the_settings_of_its_row(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    want = {
        "weigh": "target", "scope": "batch", "source_normalizer": "valid", "include_ignored": False, "decay": 0.999,
        "mode": "train", "flavor": "torchvision", "same_on_batch": False, "ignore_top": 15, "ignore_bottom": 120,
        "consistency": True, "consistency_block": None, "consistency_ratio": 0.7, "consistency_weight": 1.0,
        "rare_classes": True, "rare_temperature": 0.01, "rare_pixels": 3000, "optimizer": "adamw", "lr": 6e-5,
        "warmup": 1500, "power": 1.0, "head_factor": 10.0, "no_decay": "norm", "aspp_branches": 4, "repeated": False,
        "nesterov": False, "steps": 40_000, "source_size": "720x1280", "evaluation": "1024x2048",
    }  # fmt: skip
    config = resolved(trainer, capsys, *BASE, *MIC)
    assert {name: config[name] for name in want} == want
    for name, value in want.items():  # each is a flag
        assert resolved(trainer, capsys, *BASE, *as_flag(name, value), "--no-repeated")[name] == value


@pytest.mark.parametrize("name", ["released", "paper", "mic"])
def test_recipe__every_field_is_an_option_with_the_recipes_value(
    trainer: ModuleType, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = resolved(trainer, capsys, *BASE, "--recipe", name)
    recipe = getattr(recipes, name.upper())
    for field in recipes.Recipe.__dataclass_fields__:
        want = getattr(recipe, field)
        assert config[field] == (bool(want) if field == "consistency" else want), field


@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize("recipe", ["released", "paper", "mic"])
def test_recipe__builds_what_the_library_builds(
    trainer: ModuleType, folders: list[str], recipe: str, method: Any
) -> None:
    from options import read_options

    flags = [*folders, "--recipe", recipe, "--method", method, "--prior", "source", "--source-size", "native"]
    config = read_options(flags, "").config
    built = trainer.build_training(deeplab_v2_tiny(), config, trainer.Ranks(), fresh=True)
    ours = recipes.self_training(deeplab_v2_tiny(), 19, method=method, recipe=recipe, upsample=True)  # type: ignore[arg-type]
    assert repr(built) == repr(ours)


def test_warmup__fits_short_runs_unless_given(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, warmup in ((40_000, 1500), (15_000, 1500), (1700, 170), (40, 4), (4, 0), (1, 0)):
        assert resolved(trainer, capsys, *BASE, *MIC, "--steps", str(steps))["warmup"] == warmup
    assert resolved(trainer, capsys, *BASE, *MIC, "--steps", "100", "--warmup", "60")["warmup"] == 60
    with pytest.raises(SystemExit, match="error: --warmup must be less than --steps, got 1500 of 1500"):
        trainer.main([*BASE, *MIC, "--steps", "1500", "--warmup", "1500"])


def test_rare_pixels__fit_small_crops_unless_given(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for crop, pixels in (("512x512", 3000), ("1024x1024", 3000), ("256x256", 750), ("32x32", 12), ("8x8", 1)):
        assert resolved(trainer, capsys, *BASE, *MIC, "--crop", crop)["rare_pixels"] == pixels
    assert resolved(trainer, capsys, *BASE, *MIC, "--crop", "32x32", "--rare-pixels", "7")["rare_pixels"] == 7
    assert resolved(trainer, capsys, *BASE, "--crop", "32x32")["rare_pixels"] == 3000  # unused


def test_evaluation__is_at_a_size_that_is_scored(trainer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, size in (("released", "256x512"), ("paper", "512x1024"), ("mic", "512x1024")):
        flags = (*BASE, "--recipe", recipe, "--target-size")
        assert resolved(trainer, capsys, *flags, "256x512")["evaluation"] == size
        assert resolved(trainer, capsys, *flags, "native")["evaluation"] == "native"


@pytest.mark.usefixtures("trainer")
def test_demo__settings_of_both_optimizers() -> None:
    from options import read_options

    sgd, mic = (read_options(["--demo", *flags], "").config for flags in ([], MIC))
    assert (sgd.optimizer, sgd.warmup, sgd.rare_classes, sgd.consistency, sgd.steps) == ("sgd", 0, False, False, 1700)
    assert (mic.optimizer, mic.warmup, mic.rare_classes, mic.consistency) == ("adamw", 170, True, True)
    assert (mic.rare_pixels, mic.evaluation, mic.decay, mic.ignore_bottom) == (12, "native", 0.9, 120)


def test_contradictions__of_optimizer_and_consistency(trainer: ModuleType, folders: list[str]) -> None:
    for flags, message in (
        (["--optimizer", "adamw", "--nesterov"], "--nesterov needs --optimizer sgd"),
        (["--optimizer", "adamw", "--repeated"], "--repeated needs --optimizer sgd"),
        (["--ignore-top", "400", "--ignore-bottom", "112"], "must leave some of 512 rows"),
        (["--consistency", "--consistency-block", "33"], "--consistency-block must fit into --crop 32x32, got 33"),
        (["--no-decay", "norms"], "--no-decay must be any of norm, bias, position, got 'norms'; did you mean 'norm'"),
        (["--no-decay", "norm,"], "--no-decay must be any of"),
        (["--rare-temperature", "0"], "--rare-temperature must be a number of at least 1e-06"),
        (["--rare-pixels", "0"], "--rare-pixels must be a whole number of at least 1"),
        (["--consistency-block", "0"], "--consistency-block must be a whole number of at least 1, or none"),
        (["--consistency-ratio", "1.1"], "--consistency-ratio must be a number from 0 to 1"),
        (["--ignore-top", "512"], "--ignore-top must be a whole number from 0 to 511"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            trainer.main([*folders, *flags, "--dry-run"])
    for flags in (["--no-decay", "norm,bias"], ["--no-decay="], ["--consistency-block", "none"]):
        assert trainer.main([*folders, *flags, "--dry-run"]) == 0


def test_file__a_mic_runs_own_config_repeats_it(trainer: ModuleType, run: Callable[..., Path], tmp_path: Path) -> None:
    out = run(*MIC, "--consistency-weight", "0.5")
    config = json.loads((out / "config.json").read_text())
    assert config["consistency_block"] is None
    assert trainer.main(["--config", str(out / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert_same(final(out), final(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config


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
    norm = {id(one) for one in network[1].parameters()}
    head = {id(one) for one in network[3].parameters()}
    assert len(found) == 6
    for key, (lr, weight_decay) in found.items():
        assert lr == pytest.approx(3e-4 if key in head else 6e-5)
        assert weight_decay == (0.0 if key in norm else 0.01)
    built = trainer.build_optimizer(network, trainer.Config(**flags, no_decay="bias,norm"))
    assert sorted(len(group["params"]) for group in built.param_groups) == [1, 1, 1, 3]


def test_learning_rate__warms_up_then_decays(run: Callable[..., Path]) -> None:
    flags = ["--steps", "10", "--lr", "0.01", "--warmup", "4", "--power", "1", "--eval-every", "10"]
    found = [record["lr"] for record in log_of(run(*flags))]
    want = [0.01 * (1 - step / 10) * (1e-6 + (1 - 1e-6) * min(step / 4, 1)) for step in range(10)]
    assert found == pytest.approx(want, rel=1e-9)


def test_consistency__is_the_librarys_term_with_the_trainers_draws(
    trainer: ModuleType, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's loss, computed again from the images and by the draws of the whole batch."""
    seen = []
    real = trainer.train_step

    def watched(training: Any, parts: Any) -> Any:
        generator = keyed_generator(0, 2, training.done)
        draw = training.training.sample(2, (32, 32), generator=generator)
        before = [buffer.clone() for buffer in training.training.buffers()]
        ((images, labels), (target, _)) = parts[0]
        with torch.no_grad():
            want = training.training(images, labels, target, draw=draw)
            for buffer, was in zip(training.training.buffers(), before, strict=True):
                buffer.copy_(was)
        output = real(training, parts)
        seen.append((want, output))
        return output

    monkeypatch.setattr(trainer, "train_step", watched)
    out = run(*MIC, "--threshold", "0.05", "--consistency-block", "16")
    assert len(seen) == 4
    for (want, output), record in zip(seen, log_of(out), strict=True):
        torch.testing.assert_close(output.consistency_loss.detach(), want.consistency_loss, rtol=1e-5, atol=1e-6)
        assert record["consistency_loss"] == pytest.approx(float(want.consistency_loss), rel=1e-5)
        total = record["source_loss"] + record["mixed_loss"] + record["consistency_loss"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert record["consistency_loss"] > 0
    monkeypatch.undo()
    for flags in (["--no-consistency"], ["--method", "source"]):
        assert all("consistency_loss" not in record for record in log_of(run(*MIC, *flags, out=flags[-1])))


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["dacs", "alignment", "source"])
def test_mic__resumed_equals_a_run_that_never_stopped(run: Callable[..., Path], method: str, every: int) -> None:
    flags = [*MIC, "--method", method, "--prior", "source", "--threshold", "0.05", "--lr", "0.001", "--warmup", "2",
             "--save-every", str(every), "--eval-every", str(5 - every)]  # fmt: skip
    whole, out = run(*flags, out="whole"), run(*flags)
    assert len(tensors(final(out)["optimizer"])) > 2  # counts of steps, and both averages
    for path in (out / "checkpoints").glob("*0000004*"):
        path.unlink()  # as if it had died after step 3, or 2
    run(*flags, "--resume", "--workers", "1")
    assert_same(final(whole), final(out))
    assert metrics_of(whole) == metrics_of(out)


def test_mic__a_bad_step_changes_nothing(
    trainer: ModuleType, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(trainer, monkeypatch, {2})
    out = run(*MIC, "--lr", "0.001", "--save-every", "1", "--skip-steps", "1", "--eval-every", "4", "--steps", "3")
    before, after = final(out, 2), final(out, 3)
    for name in ("student", "teacher"):
        assert_same(before[name], after[name])
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])  # both averages, and the counts of steps
    assert metrics_of(out)["skipped_steps"] == 1


@pytest.mark.slow
def test_mic__killed_anywhere_resumes_to_the_same_end(
    run: Callable[..., Path], folders: list[str], tmp_path: Path
) -> None:
    flags = [*MIC, "--steps", "40", "--threshold", "0.05", "--save-every", "3", "--eval-every", "20"]
    whole, out = run(*flags, out="whole"), tmp_path / "killed"
    for attempt, step in enumerate((2, 9, 17, 26)):
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = start(*folders, *flags, "--out", str(out), *resume, "--workers", str(attempt % 2))
        wait_for_step(out, step, process)
        process.kill()
        process.communicate()
    run(*flags, "--resume", out="killed")
    assert_same(final(whole, 40), final(out, 40))
    assert metrics_of(whole) == metrics_of(out)


@pytest.mark.slow
def test_mic__two_processes_draw_what_one_does(run: Callable[..., Path], folders: list[str], tmp_path: Path) -> None:
    flags = [*MIC, "--method", "dacs", "--threshold", "0.05", "--lr", "0", "--steps", "2", "--eval-every", "2"]
    one = run(*flags, "--batch", "4", out="one")
    process = start(*folders, *flags, "--batch", "2", "--out", str(tmp_path / "two"), launcher=TORCHRUN)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["batch"] == 2
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
def own_copy(folders: list[str], tmp_path: Path) -> list[str]:
    """The flags with a source of their own, where no counts are kept yet."""
    StreetScenes(6, size=(32, 64)).write(tmp_path / "gta5", layout="gta5")
    return [*folders, "--gta5", str(tmp_path / "gta5")]


def test_rare_classes__the_source_alone_is_drawn_by_them(
    trainer: ModuleType, own_copy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import domains
    from options import read_options

    flags = [*own_copy, "--rare-classes", "--rare-temperature", "0.05", "--rare-pixels", "20"]
    config = read_options(flags, "").config
    data = domains.open_data(config)
    rare = RareClassSampler(class_counts(data.source), temperature=0.05, min_pixels=20)
    streams = [
        KeyedCrops(data.source, (32, 32), seed=0, stream=0, rare=rare),
        KeyedCrops(data.target, (32, 32), seed=0, stream=1),
    ]
    seen = []
    real = trainer.train_step

    def watched(training: Any, parts: Any) -> Any:
        seen.append(parts[0])
        return real(training, parts)

    monkeypatch.setattr(trainer, "train_step", watched)
    assert trainer.main([*flags, "--out", str(tmp_path / "run")]) == 0
    for step, batch in enumerate(seen):
        for (images, labels), crops in zip(batch, streams, strict=True):
            for row in range(2):
                image, label = crops[2 * step + row]
                assert torch.equal(images[row], image.float() / 255)
                assert torch.equal(labels[row], label)
        drawn = [data.source.files[streams[0].index(2 * step + row)].name for row in range(2)]
        drawn += [data.target.files[streams[1].index(2 * step + row)].name for row in range(2)]
        assert domains.drawn_names(config, data, step, 1, rare=rare) == drawn
    assert len(seen) == 4
    usual = [name for step in range(4) for name in domains.drawn_names(config, data, step, 1)]
    assert usual != [name for step in range(4) for name in domains.drawn_names(config, data, step, 1, rare=rare)]
    picture = read_png(tmp_path / "run" / "report" / "pictures" / "mixed-0-0.png")
    assert torch.equal(picture, (seen[-1][0][0][0] * 255).round().to(torch.uint8))  # the report shows what was drawn


def test_rare_classes__a_bad_step_names_what_was_drawn(
    trainer: ModuleType, own_copy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import domains
    from options import read_options

    flags = [*own_copy, "--rare-classes"]
    config = read_options(flags, "").config
    data = domains.open_data(config)
    rare = domains.rare_class_sampler(config, data, tmp_path)
    names = ", ".join(domains.drawn_names(config, data, 2, 1, rare=rare))
    poison(trainer, monkeypatch, {2})
    with pytest.raises(SystemExit, match=f"step 2: .* Its samples: {names}"):
        trainer.main([*flags, "--out", str(tmp_path / "run")])


def test_rare_classes__are_counted_once_beside_the_data_or_in_out(
    trainer: ModuleType, own_copy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gta5" / "crossmix-stats.jsonl"
    flags = [*own_copy, "--rare-classes"]
    assert trainer.main([*flags, "--out", str(tmp_path / "one")]) == 0
    kept = file.read_bytes()
    assert len(kept.splitlines()) == 6
    assert trainer.main([*flags, "--seed", "1", "--out", str(tmp_path / "two")]) == 0
    assert file.read_bytes() == kept
    file.unlink()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "gta5" not in str(path) and real(path, mode))
    assert trainer.main([*flags, "--runs", "2", "--out", str(tmp_path / "three")]) == 0  # both seeds share it
    assert len((tmp_path / "three" / "crossmix-stats.jsonl").read_bytes().splitlines()) == 6
    assert not file.exists()
    assert_same(final(tmp_path / "one"), final(tmp_path / "three" / "seed-0"))


def test_rare_classes__bad_counts_end_before_anything_is_trained(
    trainer: ModuleType, own_copy: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"error: --rare-pixels 1000000: .* the most is"):
        trainer.main([*own_copy, "--rare-classes", "--rare-pixels", "1000000", "--out", str(out)])
    label = tmp_path / "gta5" / "labels" / "00003.png"
    label.write_bytes(label.read_bytes()[:40])
    (tmp_path / "gta5" / "crossmix-stats.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"error: .*00003\.png"):
        trainer.main([*own_copy, "--rare-classes", "--out", str(out)])
    assert not (out / "checkpoints").exists()


# -------------------------------------------------------------------------------------------- choosing without labels


def test_unsupervised__scores_are_the_librarys_and_choose_a_step(run: Callable[..., Path], folders: list[str]) -> None:
    from crossmix.datasets import Cityscapes

    out = run("--eval-every", "1", "--lr", "0.01", "--steps", "4")
    metrics = metrics_of(out)
    entries = metrics["evaluations"]
    for entry in entries:
        for who in ("student", "teacher"):
            scores = entry["unsupervised"][who]
            assert scores.keys() == {"entropy", "information", "neighborhood_density"}
            assert all(math.isfinite(value) for value in scores.values())
    densities = [entry["unsupervised"]["student"]["neighborhood_density"] for entry in entries]
    chosen = entries[densities.index(max(densities))]
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
    best, by_density = (metrics[name]["student"]["32x64"]["miou"] for name in ("best", "best_unsupervised"))
    table = (out / "report" / "table.md").read_text()
    assert f"| mIoU, label-free step | {100 * by_density:.2f} |" in table
    assert f"| points below the best step | {100 * (best - by_density):.2f} |" in table
    page = Page(out / "report" / "index.html")
    assert page.rows[f"label-free step, {chosen['step']}: student"][0] == f"{100 * by_density:.2f}"
    figures = dict(zip(page.of("dt"), page.of("dd"), strict=False))
    short = figures["student, label-free step below the best"]
    assert short == f"{100 * (best - by_density):.2f} points"
    assert f"student, 4: {densities[-1]:.4g}" in page.of("title")


def test_unsupervised__the_first_of_equal_ones_and_none_without_numbers(trainer: ModuleType) -> None:
    from training_run import keep_scores

    metrics: dict[str, Any] = {"evaluations": [], "last": None, "best": None, "best_unsupervised": None}
    run: Any = SimpleNamespace(config=trainer.Config(evaluation="native"), metrics=metrics)
    given: list[tuple[float | None, float | None]] = [(None, None), (0.1, None), (0.3, 2.0), (0.2, 2.0), (0.3, 2.5)]
    better = []
    for step, (miou, density) in enumerate(given):
        scores = {"native": {"miou": miou}}
        entry = {"step": step, "student": scores, "unsupervised": {"student": {"neighborhood_density": density}}}
        better.append(keep_scores(run, entry))
    assert better == [True, True, True, False, False]
    assert [metrics[name]["step"] for name in ("last", "best", "best_unsupervised")] == [4, 2, 4]


def test_unsupervised__a_target_without_any_labels_is_scored_too(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = StreetScenes(5, domain="target", size=(32, 64))
    from crossmix.datasets import write_png

    for folder, kinds in (("game", ("images", "labels")), ("photos", ("images",))):
        for i, kind in itertools.product(range(5), kinds):
            (tmp_path / folder / kind).mkdir(parents=True, exist_ok=True)
            write_png(tmp_path / folder / kind / f"{i}.png", scenes[i][kinds.index(kind)])
    (tmp_path / "classes.json").write_text(json.dumps([str(i) for i in range(19)]))
    flags = ["--source", str(tmp_path / "game"), "--target", str(tmp_path / "photos"), "--classes",
             str(tmp_path / "classes.json"), *folders[4:]]  # fmt: skip
    assert trainer.main([*flags, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "no pixel of the validation images counts" in printed.out
    assert "not one pixel" not in printed.err
    metrics = metrics_of(tmp_path / "run")
    densities = [entry["unsupervised"]["student"]["neighborhood_density"] for entry in metrics["evaluations"]]
    assert all(math.isfinite(value) for value in densities)
    assert metrics["best_unsupervised"] == metrics["evaluations"][densities.index(max(densities))]
    assert "points below the best step | - |" in (tmp_path / "run" / "report" / "table.md").read_text()
