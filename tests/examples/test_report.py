"""The pages of runs: well-formed, escaped, whole in one file, with the numbers of the files beside them."""

import base64
import importlib
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import report
from crossmix.datasets.classes import CLASS_NAMES, CLASSES_16
from pages import Page
from runs import Capture, Patch, Run

NASTY = """<script>alert("1")</script>&'"</style>$x$ \udcff"""
SHOWN = NASTY.replace("\udcff", "?")  # UTF-8 cannot hold it


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def content(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def real(trainer: ModuleType, folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "run"
    assert trainer.main([*folders, "--out", str(out)]) == 0
    return out


@pytest.fixture
def changed(real: Path, tmp_path: Path) -> Run:
    """Folders that other runs could have left: the real one's, with other options, scores and lines of the log."""

    def make(name: str, miou: float | None = 0.25, log: list[dict[str, Any]] | None = None, **options: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(real, folder)
        (folder / "config.json").write_text(json.dumps(content(folder / "config.json") | options))
        metrics = content(folder / "metrics.json")
        for entry in metrics["evaluations"]:
            entry["student"]["32x64"] |= dict.fromkeys(("miou", "miou_16", "miou_13"), miou)
        metrics |= dict.fromkeys(("last", "best"), metrics["evaluations"][-1])
        (folder / "metrics.json").write_text(json.dumps(metrics))
        if log is not None:
            (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        return folder

    return make


def test_run_page__has_the_numbers_of_the_metrics_and_the_log(real: Path) -> None:
    page = Page(real / "report" / "index.html")
    metrics, config = content(real / "metrics.json"), content(real / "config.json")
    assert page.rows["IoU in percent"] == ["mIoU", *CLASS_NAMES]
    chosen = {"last": "last step", "best": "best step", "best_unsupervised": "label-free step"}
    for title, words in chosen.items():
        for who in ("student", "teacher"):
            scores = metrics[title][who]["32x64"]
            want = [percent(value) for value in (scores["miou"], *scores["per_class"].values())]
            assert page.rows[f"{words}, {metrics[title]['step']}: {who}"] == want
    assert len(page.rows) == 1 + 6  # the paper's network is another one
    assert page.of("h2")[:2] == ["Scores on labels of 32x64", "Scores on labels of 64x128"]
    log = [json.loads(line) for line in (real / "log.jsonl").read_text("utf-8").splitlines()]
    names = {"loss": "loss", "source": "source_loss", "mixed": "mixed_loss", "share over the threshold": "confident",
             "lambda": "lambda", "backbone": "lr", "it/s": "it_per_s", "waiting": "data_wait"}  # fmt: skip
    both = [(who, entry) for who in ("student", "teacher") for entry in metrics["evaluations"]]
    want = [f"{who}, {entry['step']}: {100 * entry[who]['32x64']['miou']:.4g}" for who, entry in both]
    gains = [entry["unsupervised"][who]["information"] for who, entry in both]
    want += [f"{who}, {entry['step']}: {value:.4g}" for (who, entry), value in zip(both, gains, strict=True)]
    want += [f"{name}, {record['step']}: {record[key]:.4g}" for name, key in names.items() for record in log]
    assert page.of("title") == [page.of("h1")[0], *want]
    for name, key in names.items():
        assert f"{name} {log[-1][key]:.4g}" in page.of("li")
    pictures = [path for kind in ("mixed", "predicted") for path in sorted((real / "report/pictures").glob(f"{kind}*"))]
    assert len(pictures) == 2 * 4 + 2 * 3
    shown = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.values("img", "src")]
    assert shown == [path.read_bytes() for path in pictures]
    assert page.of("dd")[:2] == ["4 of 4", f"{percent(metrics['last']['student']['32x64']['miou'])} %"]
    assert page.of("dt")[-3:] == ["crossmix", "torch", "gpu"]
    assert page.of("dd")[-2] == config["versions"]["torch"]
    assert not [path for path in (real / "report").iterdir() if ".tmp" in path.name]


def test_pages__escape_every_text(changed: Run, tmp_path: Path) -> None:
    run = changed("run", gta5=NASTY, seed=NASTY, evaluation="32x64")
    page = Page(report.run_page(run))
    assert page.of("h1") == [f"dacs, GTA5 to Cityscapes, seed {SHOWN}"]
    assert page.of("dd").count(SHOWN) == 2
    other = changed("other", lr=NASTY)
    page = Page(report.comparison_page({NASTY: [run], "b": [other]}, tmp_path / "page"))
    assert page.of("h1") == [f"{SHOWN}, b: GTA5 to Cityscapes"]
    for tag, count in {"th": 2 * (2 + 2 + 2) + 1, "span": 1, "li": 3, "dt": 2, "td": 3}.items():
        assert len([text for text in page.of(tag) if SHOWN in text]) == count, tag
    assert page.values("img", "alt")[1] == f"{SHOWN}, 2"
    assert f"{SHOWN}, 4: 25" in page.of("title")


def test_curves__what_is_no_number_is_a_gap(changed: Run) -> None:
    gaps = [None, math.nan, math.inf, -math.inf, 1e301, 10**400, "text", [1]]
    values = [1.0, 2.0, *gaps, 1.5, *gaps]
    run = changed("run", None, log=[{"step": i, "loss": value} for i, value in enumerate(values, 1)])
    page = Page(report.run_page(run))
    marks = [text for text in page.of("title") if text.startswith("loss, ")]
    assert marks == ["loss, 1: 1", "loss, 2: 2", f"loss, {3 + len(gaps)}: 1.5"]
    assert "loss 1.5" in page.of("li")
    information = content(run / "metrics.json")["evaluations"][0]["unsupervised"]["student"]["information"]
    student = [text for text in page.of("title") if text.startswith("student")]
    assert len(student) == 2  # of the information alone: both evaluations have no mIoU
    assert student[0] == f"student, 2: {information:.4g}"
    assert "student " in page.of("li")
    charts = page.values("svg", "aria-label")
    assert charts == ["mIoU in percent", "information", "loss"]  # no chart of what was never logged


@pytest.mark.parametrize("value", [3.0, 0.0, -2.0, 5e-324, 9e299, math.nan])
def test_curves__of_one_record_or_constant(value: float) -> None:
    for count in (1, 2, 400):
        steps = [5 * i for i in range(1, count + 1)]
        drawn = report.drawn("loss", {"loss": (steps, [value] * count)})
        marks = [] if math.isnan(value) or count > 40 else [f"loss, {step}: {value:.4g}" for step in steps]
        assert re.findall("<title>(.*?)</title>", drawn) == marks


def test_curves__long_lines_are_means_of_neighbours() -> None:
    steps = list(range(1, 1000))
    values = [math.nan if 500 <= step < 510 or step == 2 else math.sin(step) for step in steps]
    places, means = report.thinned(steps, values)
    finite = [(place, mean) for place, mean in zip(places, means, strict=True) if not math.isnan(mean)]
    groups = [[k for k in range(i, min(i + 4, 999)) if not math.isnan(values[k])] for i in range(0, 999, 4)]
    assert len(places) == 250 <= report.POINTS
    assert len(places) - len(finite) == 2  # 499 to 502 and 507 to 510 hold a number
    for (place, mean), members in zip(finite, filter(None, groups), strict=True):
        assert place == pytest.approx(statistics.mean(steps[k] for k in members), rel=1e-12)
        assert mean == pytest.approx(statistics.mean(values[k] for k in members), rel=1e-12)
    assert report.thinned(steps[:300], values[:300])[0] == steps[:300]
    sizes = [len(report.drawn("loss", {"loss": (range(n), [math.sin(i) for i in range(n)])})) for n in (300, 20_000)]
    assert sizes[1] < 1.1 * sizes[0]
    assert report.marked([math.nan, 1, math.nan, *range(50), math.nan, 3]) == [1, 54]  # what a line would not show


@pytest.mark.usefixtures("no_charts")
def test_run_page__sets_the_papers_rows_beside_the_published_network(changed: Run) -> None:
    page = Page(report.run_page(changed("gta5", network="resnet101", method="source")))
    assert page.rows["DACS"][:2] == ["52.14", "89.90"]
    assert page.rows["Distribution alignment"][0] == "48.04"
    assert page.rows["R-MRNet"][0] == "50.30"
    assert len(page.rows) == 1 + 6 + (1 + 5) + (1 + 20) - 3  # Source, Naive ClassMix and DACS are in both tables
    assert page.values("tbody", "class") == ["own"]  # beside the paper's only
    assert "what the student saw" in page.of("th")  # a source-only run mixes nothing
    page = Page(report.run_page(changed("synthia", network="resnet101", method="source", synthia="some")))
    assert page.rows["IoU in percent"] == ["mIoU of 16", "mIoU of 13", *(CLASS_NAMES[i] for i in CLASSES_16)]
    assert page.rows["DACS"][:3] == ["48.34", "54.81", "80.56"]
    assert page.rows["last step, 4: student"][:2] == ["25.00", "25.00"]
    assert not any("Table 3" in title for title in page.rows)
    assert page.of("h1") == ["source, SYNTHIA to Cityscapes, seed 0"]


def test_comparison__mean_and_deviation_over_runs(changed: Run, tmp_path: Path, capsys: Capture) -> None:
    values = (25.0, 27.0, 35.0)
    runs = [changed(f"many/seed-{i}", value / 100, seed=i, method="source") for i, value in enumerate(values)]
    other = changed("other", 0.3, lr=0.5)
    assert report.main([str(other), str(tmp_path / "many"), "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    page = Page(tmp_path / "page" / "index.html")
    want = f"{statistics.mean(values):.2f}\n±{statistics.stdev(values):.2f}"
    assert page.rows["source, last step: student"][0] == want
    assert page.rows["dacs, last step: student"][0] == "30.00"
    assert list(page.rows).index("source, last step: student") < list(page.rows).index("dacs, last step: student")
    assert f"source, 4: {statistics.mean(values):.4g}" in page.of("title")
    assert page.of("th")[-2:] == ["method", "lr"]
    assert page.of("td")[-4:] == ["source", "dacs", "0.00025", "0.5"]  # the options that differ, apart from the seed
    assert len(page.values("img", "src")) == 2 * 4  # image, two predictions, ground truth
    assert report.main([*map(str, runs[:2]), "--out", str(tmp_path / "page")]) == 0
    rows = Page(tmp_path / "page" / "index.html").rows
    assert f"source, {runs[0]}, last step: student" in rows  # one method twice is told apart by the folder


@pytest.mark.usefixtures("no_charts")
def test_pages__say_how_far_the_label_free_choice_falls_short(changed: Run, tmp_path: Path) -> None:
    runs = [changed(f"many/seed-{i}", seed=i) for i in range(3)]
    lost = []
    for i, run in enumerate(runs):
        metrics = content(run / "metrics.json")
        chosen = {**metrics["evaluations"][0], "step": 2}
        chosen["student"]["32x64"]["miou"] = 0.25 - 0.01 * i
        metrics["best_unsupervised"] = chosen
        lost.append(float(i))
        (run / "metrics.json").write_text(json.dumps(metrics))
    key = "label-free step below the best"
    page = Page(report.run_page(runs[2]))
    assert dict(zip(page.of("dt"), page.of("dd"), strict=False))[f"student, {key}"] == "2.00 points"
    assert page.rows["label-free step, 2: student"][0] == "23.00"
    page = Page(report.comparison_page({"dacs": runs}, tmp_path / "page"))
    want = f"{statistics.mean(lost):.2f} +- {statistics.stdev(lost):.2f} points"
    assert dict(zip(page.of("dt"), page.of("dd"), strict=False))[f"dacs, {key}"] == want
    old = content(runs[0] / "metrics.json")  # of a run without such scores
    for entry in (*old["evaluations"], old["last"], old["best"], old.pop("best_unsupervised")):
        entry.pop("unsupervised")
    (runs[0] / "metrics.json").write_text(json.dumps(old))
    page = Page(report.run_page(runs[0]))
    assert len(page.rows) == 1 + 4
    assert page.of("figcaption")[:2] == ["mIoU in percent", "loss"]  # no information
    assert "dacs, last step: student" in Page(report.comparison_page({"dacs": runs}, tmp_path / "page")).rows


@pytest.mark.usefixtures("no_charts")
def test_report__says_what_is_wrong(changed: Run, tmp_path: Path) -> None:
    one, two = changed("a"), changed("b", evaluation="64x128")
    with pytest.raises(SystemExit, match=r"holds no config\.json of a run; pass the --out of the trainer"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="another source or label size"):
        report.main([str(one), str(two), "--out", str(tmp_path / "page")])
    with pytest.raises(SystemExit, match="2"):
        report.main([str(one), str(two)])
    for path in (two / "metrics.json", *(two / "report/pictures").glob("mixed-0-1*")):
        path.unlink()
    with pytest.raises(SystemExit, match="has no evaluation yet"):
        report.main([str(two), "--out", str(tmp_path / "page")])
    assert report.main([str(two)]) == 0  # a run that has not been evaluated has a page with curves
    page = Page(two / "report" / "index.html")
    assert page.of("h2")[:2] == ["Curves", "The last step's images"]
    assert len(page.values("img", "src")) == 1 * 4 + 2 * 3  # without the row that is not whole
    (two / "log.jsonl").unlink()
    shutil.rmtree(two / "report")
    assert report.main([str(two)]) == 0  # nor one that has not begun
    assert Page(two / "report" / "index.html").of("h2") == ["Configuration"]
    (one / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        report.main([str(one)])


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package__is_named_before_anything_is_trained(
    package: str, trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(SystemExit, match=f"error: the package {package} is needed to"):
        trainer.main([*folders, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    monkeypatch.delitem(sys.modules, "report")
    with pytest.raises(SystemExit, match=rf"^error: .*{package}.*pip install jinja2 matplotlib\.$"):
        importlib.import_module("report")
