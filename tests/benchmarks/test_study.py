"""The studies: runs that resume and repeat, a page that says what the files say, and a benchmark that can fail."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study import __main__ as command
from benchmarks.study import page, trials
from benchmarks.study.collected import row as collected_row
from benchmarks.study.expected import checks
from benchmarks.study.pairs import PAIRS, Domains, Pair, list_of
from benchmarks.study.studies import METHODS, rows_of
from benchmarks.study.trials import Boxes, Job, Variant
from crossmix import ConfidenceWeightedCE, CrossDomainMix, MeanTeacher
from crossmix.datasets import StreetScenes
from oracles import seeded

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few() -> Domains:
    """StreetScenes with fewer scenes."""
    kinds = (("source", 60, 0), ("target", 60, 1), ("target", 12, 2))
    return Domains(*(list_of(StreetScenes(n, domain=domain, seed=seed)) for domain, n, seed in kinds))


@pytest.fixture(autouse=True)
def few_scenes_and_looks(few: Domains, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "load", lambda *_: few)
    monkeypatch.setattr(trials, "LOOKS", 2)
    monkeypatch.setattr(trials, "LOOKED_AT", 16)


# ------------------------------------------------------------------------------------------------------ the benchmark


def dacs(seed: int = 0, steps: int = 40) -> dict[str, Any]:
    """What a short run ends with."""
    run, _ = trials.run(Job("streetscenes", "dacs", Variant("dacs"), seed, steps))
    look: dict[str, Any] = run["looks"][-1]
    return look


@pytest.mark.slow
def test_benchmark__fails_when_the_algorithm_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, mix = ConfidenceWeightedCE.upsampled, CrossDomainMix.forward
    breaks = {
        "the loss has its sign flipped": (
            ConfidenceWeightedCE,
            "upsampled",
            lambda *args, **options: -loss(*args, **options),
        ),
        "the teacher never updates": (MeanTeacher, "update", lambda *args: None),
        "the mask is for images alone": (
            CrossDomainMix,
            "forward",
            lambda self, *args, **options: mix(self, *args, **options)._replace(labels=args[3]),
        ),
    }
    intact, broken = dacs(), {}
    for name, patch_of in breaks.items():
        with monkeypatch.context() as patch:
            patch.setattr(*patch_of)
            broken[name] = dacs()
    # Half of a mixed image is pasted truth. What the teacher adds makes the rest right, or not.
    assert intact["mixed_accuracy"] > 0.65
    for name, run in broken.items():
        assert run["mixed_accuracy"] < 0.6, name
    assert intact["teacher"]["miou"] > 0.05
    for name in ("the loss has its sign flipped", "the teacher never updates"):
        assert broken[name]["teacher"]["miou"] < 0.03, name
    assert intact["pseudo_labels"]["divergence"] < 0.45
    for name, run in broken.items():
        assert run["pseudo_labels"]["divergence"] > 0.5, name


def test_run__repeats_to_the_bit_and_ends_at_the_last_step() -> None:
    job = Job("streetscenes", "dacs", Variant("dacs"), seed=1, steps=3)
    (first, maps), (second, _) = trials.run(job), trials.run(job)
    assert maps is None
    assert first["looks"] == second["looks"]
    assert [look["step"] for look in first["looks"]] == [2, 3]
    assert dacs(seed=2, steps=3) != first["looks"][-1]


@pytest.mark.parametrize("name", ["source", "source + jitter", "pseudo-label", "classmix", "alignment", "oracle"])
def test_run__every_method_has_scores_and_those_with_a_teacher_have_pseudo_labels(name: str) -> None:
    job = Job("streetscenes", name, METHODS[name], seed=0, steps=1)
    look = trials.run(job)[0]["looks"][-1]
    has_teacher = name not in {"source", "source + jitter", "oracle"}
    assert 0 <= look["student"]["miou"] <= 1
    assert len(look["student"]["per_class"]) == 19
    assert ("teacher" in look, "pseudo_labels" in look) == (has_teacher, has_teacher)


def test_every_method_of_a_seed_starts_from_one_network_and_sees_one_batch() -> None:
    pair, shares = PAIRS["streetscenes"], torch.full((19,), 1 / 19)
    weights = []
    for variant in [*METHODS.values(), Variant(aspp_branches=4)]:
        torch.manual_seed(3)
        student = trials.deeplab_v2_tiny(19, aspp_branches=variant.aspp_branches)
        weights.append(
            torch.cat([p.flatten() for p in trials.build(student, pair, variant, shares).student.parameters()])
        )
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_boxes__are_one_box_of_the_asked_share() -> None:
    scores = torch.rand(50, 20, generator=seeded(0))
    mask = Boxes(0.5, 19)(scores, (64, 128))
    assert mask.shape == (50, 64, 128)
    for one in mask:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None])  # a product of two ranges ...
        for side in (rows, columns):
            inside = side.nonzero().flatten()
            assert len(inside) == inside[-1] - inside[0] + 1  # ... without gaps
        assert abs(float(one.double().mean()) - 0.5) < 0.02
    assert len({tuple(one.any(1).nonzero().flatten().tolist()) for one in mask}) > 25  # they differ


# ---------------------------------------------------------------------------------------------------------- many runs


def fake(job: Any) -> dict[str, Any]:
    """A run's document, made up: 0.1 for every seed and the length of the row's name."""
    score = 0.1 * (1 + job.seed) + 0.01 * len(job.row)
    look = {
        "student": {"miou": score, "per_class": [score, 0.0]},
        "teacher": {"miou": score / 2, "per_class": [score, None]},
        "source_loss": 1.0,
        "mixed_loss": 0.5,
        "mixed_accuracy": 0.75,
        "pseudo_labels": {
            "lambda": 0.5,
            "agreement": 0.9,
            "divergence": 0.1,
            "precision": [score, None],
            "recall": [1.0, 0.0],
            "share": [1.0, 0.0],
            "true_share": [0.9, 0.1],
        },
    }
    looks = [{**look, "step": step} for step in (1, 2)]
    looks[0] = {**looks[0], "student": {"miou": score + 0.05, "per_class": [score, 0.0]}}
    machine = {"gpu": None, "processor": "a processor", "torch": "0"}
    return {"options": job.options(), "machine": machine, "cpu_seconds": 2.0, "looks": looks}


def test_run_all__skips_what_is_finished_and_refuses_other_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []
    monkeypatch.setattr(trials, "run", lambda job, _: started.append(job.seed) or (fake(job), None))
    jobs = [Job("streetscenes", "source + jitter", Variant("source"), seed, 5) for seed in range(3)]
    trials.run_all(jobs[:2], tmp_path, workers=1)
    documents = trials.run_all(jobs, tmp_path, workers=1)
    assert started == [0, 1, 2]
    assert [document["options"]["seed"] for document in documents] == [0, 1, 2]
    assert {path.name for path in tmp_path.glob("*.json*")} == {f"source-jitter--seed-{i}.json" for i in range(3)}
    assert "2 of 3 runs are finished" in capsys.readouterr().out
    longer = Job("streetscenes", "source + jitter", Variant("source"), 0, 6)
    with pytest.raises(SystemExit, match=r"source-jitter--seed-0\.json: is a run with other options; pass another"):
        trials.run_all([longer], tmp_path, workers=1)


def test_sensitivity__rows_have_files_of_their_own_and_the_base_is_there_once() -> None:
    rows = rows_of("sensitivity", "streetscenes")
    files = {Job("streetscenes", name, variant, 0, 1).file for name, variant in rows.items()}
    assert len(files) == len(rows) == len(set(rows.values())) == 16
    assert rows["dacs"] == METHODS["dacs"]  # so that the runs are shared


# ----------------------------------------------------------------------------------------------------------- the page


def test_checks__tell_hits_from_misses() -> None:
    def row(*mious: float, classes: list[float]) -> dict[str, Any]:
        lasts = [{"student": {"miou": miou, "per_class": classes}} for miou in mious]
        return {"runs": [{"seed": i, "last": last} for i, last in enumerate(lasts)]}

    rows = {
        "source": row(0.20, 0.22, classes=[0.3, 0.1]),
        "source + jitter": row(0.30, 0.32, classes=[0.5, 0.1]),
        "pseudo-label": row(0.10, 0.25, classes=[0.4, 0.005]),
        "dacs": row(0.36, 0.36, classes=[0.5, 0.21]),
    }
    found = {check.claim: check for check in checks(rows, ["road", "pole"], "streetscenes")}
    held = {claim: check.holds for claim, check in found.items()}
    assert held == {
        "source above pseudo-label in the mean": True,
        "pseudo-label loses classes (mean IoU under 1 %) that source-only has": True,
        "dacs above source by at least 15 points in every seed": False,
        "dacs above source + jitter by at least 5 points in every seed": False,
    }
    assert found["source above pseudo-label in the mean"].found == (
        "+3.50 points in the mean, -3.00 in the worst seed; in 1 of 2 seeds"
    )
    assert "lost: pole" in found["pseudo-label loses classes (mean IoU under 1 %) that source-only has"].found
    rows["classmix"] = row(0.2, 0.2, classes=[0.4, 0.02])
    rescued = checks(rows, ["road", "pole"], "streetscenes")[-1]
    assert (rescued.holds, rescued.found) == (
        True,
        "pole (pseudo-label 0.5, dacs 21.0); pole (classmix 2.0, dacs 21.0)",
    )


def test_page__shows_a_suite_and_names_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PAIRS, "streetscenes", Pair("streetscenes", ("road", "pole"), (64, 128), 2))
    for module in (page, command):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "ablation-streetscenes.md").write_text("Pseudo-labelling was lucky.\n", encoding="utf-8")
    documents, rows = [], {}
    for name, variant in METHODS.items():
        runs = [fake(Job("streetscenes", name, variant, seed, 2)) for seed in range(3)]
        documents += runs
        rows[name] = collected_row(runs)
    command.write("ablation-streetscenes", command.summary("ablation-streetscenes", documents, rows))
    text = page.page()
    assert "| dacs | 24.00 ± 10.00 | 29.00 ± 10.00 | 12.00 ± 5.00 | 12.00 ± 5.00 | 14.00, 24.00, 34.00 |" in text
    assert "Pseudo-labelling was lucky." in text
    assert "| pole | 10.0 | - / 0.0 (0.0) |" in text
    for missing in ("ablation-camvid", "sensitivity-streetscenes", "causes-streetscenes"):
        assert f"`benchmarks/results/{missing}.json` does not exist" in text
    assert all(f"](results/{name})" in text for name in page.figures())

    monkeypatch.setattr(command, "load", lambda *_: None)
    monkeypatch.setattr(command, "run_all", lambda jobs, *_: [fake(job) for job in jobs])
    monkeypatch.setattr(sys, "argv", ["study", "causes", "--seeds", "2", "--save"])
    command.main()
    text = page.page()
    assert "over seeds 0, 1, in points" in text
    assert "| classmix | 1000 | 23.00 ± 7.07 | 2.00 ± 0.00 | -7.00 ± 0.00 | 18.00, 28.00 |" in text
    assert "| classmix | 2 | 23.00 ± 7.07 | 2.00 ± 0.00 | -7.00 ± 0.00 | 18.00, 28.00 |" in text
    assert "| classmix, threshold 0.968 | 1000 | 40.00 ± 7.07 | 19.00 ± 0.00 | 10.00 ± 0.00 | 35.00, 45.00 |" in text


def test_page__is_what_the_result_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real numbers of looks
    committed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert committed == page.page(), "run python -m benchmarks.publish --write"


def test_result_files__are_json_without_nan() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
