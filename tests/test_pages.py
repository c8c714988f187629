"""The pages of a run and of several: their numbers are those of the files beside them."""

import importlib
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crossmix.datasets.classes import CLASS_NAMES, CLASSES_16
from test_report import Page
from test_trainer import EXAMPLE, folders, run, trainer

__all__ = ["folders", "run", "trainer"]  # fixtures


def read(path: Path) -> tuple[Page, dict[str, list[str]]]:
    """A page, and the rows of its first table by their first cell; of equal ones the first."""
    text = path.read_text(encoding="utf-8")
    table = text[text.index("<table") : text.index("</table>")]
    rows: dict[str, list[str]] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        first, *cells = re.findall(r"<t[hd][^>]*>(?:<span>)?(.*?)(?:</span>)?</t[hd]>", row, re.DOTALL)
        rows.setdefault(first, cells)
    return Page(text), rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def metrics_of(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    return metrics


@pytest.fixture(scope="module")
def real(trainer: ModuleType, folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "run"
    assert trainer.main([*folders, "--out", str(out)]) == 0
    return out


def test_run_page__has_the_numbers_of_the_metrics_and_the_log(real: Path) -> None:
    out = real
    page, rows = read(out / "report" / "index.html")
    metrics = metrics_of(out)
    assert rows["IoU in percent"] == ["mIoU", *CLASS_NAMES]
    for title in ("last", "best"):
        entry = metrics[title]
        for who in ("student", "teacher"):
            scores = entry[who]["32x64"]
            want = [scores["miou"], *scores["per_class"].values()]
            assert rows[f"{title} step, {entry['step']}: {who}"] == [percent(value) for value in want]
    assert "Table 3 of the paper: GTA5 to Cityscapes, the ablation" not in rows  # another network
    assert page.of("h2")[:2] == ["Scores on labels of 32x64", "Scores on labels of 64x128"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    marks = page.of("title")
    for who in ("student", "teacher"):
        for entry in metrics["evaluations"]:
            assert f"{who}, {entry['step']}: {100 * entry[who]['32x64']['miou']:.4g}" in marks
    for name, key in (("loss", "loss"), ("source", "source_loss"), ("mixed", "mixed_loss"), ("lambda", "lambda"),
                      ("share over the threshold", "confident"), ("backbone", "lr"), ("it/s", "it_per_s")):  # fmt: skip
        for record in log:
            assert f"{name}, {record['step']}: {record[key]:.4g}" in marks
    assert len(page.values("img", "src")) == 2 * 4 + 2 * 3
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert page.of("dd")[:2] == ["4 of 4", f"{percent(metrics['last']['student']['32x64']['miou'])} %"]
    assert page.of("dt")[-3:] == ["crossmix", "torch", "gpu"]
    assert page.of("dd")[-2] == config["versions"]["torch"]


@pytest.fixture
def scored(real: Path, tmp_path: Path) -> Callable[..., Path]:
    """Folders that a run of the published network could have left: a real run's, with other options."""

    def make(name: str, shift: float = 0.0, **options: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(real, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(
            json.dumps({**config, "network": "resnet101", "method": "source", **options})
        )
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        for entry in metrics["evaluations"]:
            for key in ("miou", "miou_16", "miou_13"):
                entry["student"]["32x64"][key] = 0.25 + shift
        entry = metrics["evaluations"][-1]
        (folder / "metrics.json").write_text(json.dumps({**metrics, "last": entry, "best": entry}))
        return folder

    return make


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return importlib.import_module("pages")


def test_run_page__sets_the_papers_rows_beside_the_published_network(
    pages: ModuleType, scored: Callable[..., Path]
) -> None:
    page, rows = read(pages.run_page(scored("gta5")))
    assert rows["DACS"][:2] == ["52.14", "89.90"]
    assert rows["Distribution alignment"][0] == "48.04"
    assert rows["R-MRNet"][0] == "50.30"
    assert len(rows) == 1 + 4 + (1 + 5) + (1 + 20) - 3  # Source, Naive ClassMix and DACS are in both tables
    page, rows = read(pages.run_page(scored("synthia", synthia="some")))
    assert rows["IoU in percent"] == ["mIoU of 16", "mIoU of 13", *(CLASS_NAMES[i] for i in CLASSES_16)]
    assert rows["DACS"][:3] == ["48.34", "54.81", "80.56"]
    assert rows["last step, 4: student"][:2] == ["25.00", "25.00"]
    assert not any("Table 3" in title for title in rows)
    assert page.of("h1") == ["source, SYNTHIA to Cityscapes, seed 0"]


def test_comparison__mean_and_deviation_over_runs(
    pages: ModuleType, scored: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifts = (0.0, 0.02, 0.1)
    runs = [scored(f"many/seed-{i}", shift, seed=i) for i, shift in enumerate(shifts)]
    other = scored("other", 0.05, method="dacs", lr=0.5)
    assert pages.main([str(other), str(tmp_path / "many"), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    page, rows = read(tmp_path / "page" / "index.html")
    values = [25 + 100 * shift for shift in shifts]
    assert rows["source, last step: student"][0] == f"{statistics.mean(values):.2f}\n±{statistics.stdev(values):.2f}"
    assert rows["dacs, last step: student"][0] == "30.00"
    assert list(rows).index("source, last step: student") < list(rows).index("dacs, last step: student")
    assert f"source, 4: {statistics.mean(values):.4g}" in page.of("title")
    assert page.of("th")[-2:] == ["method", "lr"]
    assert page.of("td")[-4:] == ["source", "dacs", "0.00025", "0.5"]  # the options that differ, apart from the seed
    assert len(page.values("img", "src")) == 2 * 4  # image, two predictions, ground truth
    assert pages.main([*map(str, runs[:2]), "--out", str(tmp_path / "page")]) == 0
    _, rows = read(tmp_path / "page" / "index.html")
    assert f"source, {runs[0]}, last step: student" in rows  # one method twice is told apart by the folder


def test_pages__say_what_is_wrong(pages: ModuleType, scored: Callable[..., Path], tmp_path: Path) -> None:
    one, two = scored("a"), scored("b", evaluation="64x128")
    with pytest.raises(SystemExit, match=r"holds no config\.json of a run; pass what --out was"):
        pages.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="another source or label size"):
        pages.main([str(one), str(two), "--out", str(tmp_path / "page")])
    with pytest.raises(SystemExit, match="2"):
        pages.main([str(one), str(two)])
    (two / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="has no evaluation yet"):
        pages.main([str(two), "--out", str(tmp_path / "page")])
    assert pages.main([str(two)]) == 0  # a run that has not been evaluated has a page with curves
    assert "Curves" in read(two / "report" / "index.html")[0].of("h2")
    (one / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        pages.main([str(one)])


def test_trainer__compares_its_runs_and_mends_metrics_of_a_killed_one(run: Callable[..., Path]) -> None:
    out = run("--runs", "2")
    _, rows = read(out / "report" / "index.html")
    both = [metrics_of(out / f"seed-{seed}")["last"]["student"]["32x64"]["miou"] for seed in (0, 1)]
    want = f"{100 * statistics.mean(both):.2f}\n±{100 * statistics.stdev(both):.2f}"
    assert rows["dacs, last step: student"][0] == want
    assert want.replace("\n±", " +- ") in (out / "report" / "table.md").read_text("utf-8")
    before = metrics_of(out / "seed-0")
    (out / "seed-0" / "metrics.json").unlink()  # as if it had died between its last checkpoint and this file
    run("--runs", "2", "--resume")
    assert metrics_of(out / "seed-0") == before
