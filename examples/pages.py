"""Runs of the trainer as HTML pages: one run, or several side by side. The trainer writes both when it ends.

    python examples/pages.py RUN                                         RUN/report/index.html, of a stopped run too
    python examples/pages.py runs/gta5-source runs/gta5-dacs --out DIR   DIR/index.html, which compares them

A folder with the runs of several seeds or methods stands for all of them; scores are then mean and standard deviation
over the seeds. Only the files of the runs are read: config.json, log.jsonl, metrics.json and report/pictures.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossmix.datasets.classes import CLASS_NAMES, CLASSES_16, PALETTE
from crossmix.engine import Report, RunLog
from crossmix.recipes import METHODS
from evaluate import plain
from paper import paper_tables
from reporting import TITLES, spread

__all__ = ["comparison_page", "run_page"]

Curve = tuple[list[float], list[float | None]]
CHARTS = {
    "loss": {"loss": "loss", "source": "source_loss", "mixed": "mixed_loss"},
    "confidence on target pixels": {"share over the threshold": "confident", "lambda": "lambda"},
    "learning rate": {"backbone": "lr"},
    "steps per second": {"it/s": "it_per_s"},
    "share of the time spent waiting for data": {"waiting": "data_wait"},
}
COMPARED = {
    "student's mIoU in percent": ("mIoU in percent", "student"),
    "loss": ("loss", "loss"),
    "lambda": ("confidence on target pixels", "lambda"),
}
MIXED = ("source", "target", "mixed image", "mixed label")
MIXED_SOURCE = ("source", "target, not used", "what the student saw", "its label")
PAPER = "The paper's rows are means of three runs after the last step, on labels of 512 x 1024."


class Run(NamedTuple):
    """What the folder of a run holds."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def synthia(self) -> bool:
        """Whether its source labels 16 of the classes."""
        return bool(self.config["synthia"])

    @property
    def benchmark(self) -> str:
        """Its two domains."""
        return f"{'SYNTHIA' if self.synthia else 'GTA5'} to Cityscapes"

    def pictures(self, kind: str) -> list[list[Path]]:
        """Its rows of pictures of a kind."""
        folder = self.folder / "report" / "pictures"
        rows = sorted(folder.glob(f"{kind}-*-0.png"))
        return [sorted(folder.glob(f"{row.name.removesuffix('-0.png')}-*.png")) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", type=Path, help="folder of the page that compares them")
    args = parser.parse_args(argv)
    found: dict[tuple[str, str], list[Path]] = {}
    for given in args.runs:
        for folder in runs_in(given):
            found.setdefault((read_run(folder).config["method"], str(given)), []).append(folder)
    methods = [method for method, _ in found]
    groups = {
        method if methods.count(method) == 1 else f"{method}, {given}": folders
        for (method, given), folders in sorted(found.items(), key=lambda group: METHODS.index(group[0][0]))
    }
    if args.out is None and len(folders := [folder for group in groups.values() for folder in group]) > 1:
        parser.error(f"give --out DIR for the page that compares {len(folders)} runs")
    print(run_page(folders[0]) if args.out is None else comparison_page(groups, args.out))
    return 0


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of seeds and methods below it."""
    patterns = ("config.json", "*/config.json", "*/*/config.json")
    found = next((paths for pattern in patterns if (paths := sorted(folder.glob(pattern)))), None)
    if found is None:
        raise SystemExit(f"error: {folder}: holds no config.json of a run; pass what --out was for the trainer.")
    return [path.parent for path in found]


def read_run(folder: Path) -> Run:
    """Read what a run has written so far."""
    metrics: dict[str, Any] = {"evaluations": [], "last": None, "best": None}  # before the first evaluation
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return Run(folder, config, metrics, RunLog(folder / "log.jsonl").read())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {folder}: is not the folder of a run ({error}).") from error


# ---------------------------------------------------------------------------------------------------------- one run


def run_page(folder: Path) -> Path:
    """Write report/index.html of a run: scores, curves, pictures, configuration."""
    run = read_run(folder)
    config, metrics = run.config, run.metrics
    page = Report(f"{config['method']}, {run.benchmark}, seed {config['seed']}")
    page.facts({"steps done": f"{run.log[-1]['step'] if run.log else 0} of {config['steps']}", **key_figures(run)})
    if metrics["last"] is not None:
        entries = {f"{title} step, {metrics[title]['step']}": [metrics[title]] for title in ("last", "best")}
        add_scores(page, entries, config)
    page.heading("Curves")
    page.curves(charts(run))
    add_pictures(page, run)
    page.heading("Configuration")
    versions = config.get("versions", {})
    page.facts({**{name: value for name, value in config.items() if name != "versions"}, **versions})
    (folder / "report").mkdir(exist_ok=True)
    return page.write(folder / "report" / "index.html")


def key_figures(run: Run) -> dict[str, str]:
    """Last and best mIoU, by the label size and the classes that decide."""
    key = "miou_16" if run.synthia else "miou"
    figures = {}
    for title in ("last", "best"):
        entry = run.metrics[title] or {}
        for who in ("student", "teacher"):
            if who in entry:
                scores = entry[who][run.config["evaluation"]]
                figures[f"{who}, {title} ({entry['step']}): {TITLES[key]}"] = f"{spread([scores[key]])} %"
    return figures


def add_scores(page: Report, entries: Mapping[str, Sequence[dict[str, Any]]], config: Mapping[str, Any]) -> None:
    """A table for each label size, the deciding one first: IoU in percent of student and teacher, by class.

    Args:
        page: The page.
        entries: Evaluations by title, of each of the runs that are averaged.
        config: The options of the runs.
    """
    synthia, deciding = bool(config["synthia"]), config["evaluation"]
    names = [CLASS_NAMES[i] for i in CLASSES_16] if synthia else list(CLASS_NAMES)
    means = ("miou_16", "miou_13") if synthia else ("miou",)
    header = ["IoU in percent", *(TITLES[key] for key in means), *names]
    sizes = sorted(next(iter(entries.values()))[0]["student"], key=lambda size: size != deciding)
    for size in sizes:
        rows = []
        for title, runs in entries.items():
            for who in ("student", "teacher"):
                if who in runs[0]:
                    scores = [run[who][size] for run in runs]
                    cells = [spread(score[key] for score in scores) for key in means]
                    cells += [spread(score["per_class"][name] for score in scores) for name in names]
                    rows.append([f"{title}: {who}", *(cell.replace(" +- ", "\n±") for cell in cells)])
        groups = {"": rows}
        page.heading(f"Scores on labels of {'their own size' if size == 'native' else size}")
        if size == deciding and config["network"] == "resnet101":
            page.paragraph(PAPER)
            for number in (2,) if synthia else (3, 1):
                table = paper_tables()[f"table {number}"]
                groups[f"Table {number} of the paper: {table['title']}"] = [
                    [row["method"], *(plain(row.get(key)) for key in means)]
                    + [plain(row["per_class"].get(name)) for name in names]
                    for row in table["rows"]
                ]
        page.table(header, groups)


def charts(run: Run) -> dict[str, dict[str, Curve]]:
    """What the log and the evaluations hold, over steps."""
    found = {"mIoU in percent": {who: evaluated(run, who) for who in ("student", "teacher")}}
    steps = [record["step"] for record in run.log]
    for title, lines in CHARTS.items():
        found[title] = {
            name: (steps, [record.get(key) for record in run.log])
            for name, key in lines.items()
            if any(key in record for record in run.log)
        }
    drawn = {title: {name: line for name, line in lines.items() if line[0]} for title, lines in found.items()}
    return {title: lines for title, lines in drawn.items() if lines}


def evaluated(run: Run, who: str) -> Curve:
    """The mean IoU over steps, in percent."""
    key = "miou_16" if run.synthia else "miou"
    entries = [entry for entry in run.metrics["evaluations"] if who in entry]
    values = [entry[who][run.config["evaluation"]][key] for entry in entries]
    return [entry["step"] for entry in entries], [None if value is None else 100 * value for value in values]


def add_pictures(page: Report, run: Run) -> None:
    """What was mixed in the last step, and predictions on validation images."""
    if mixed := run.pictures("mixed"):
        page.heading("The last step's images")
        page.pictures(MIXED_SOURCE if run.config["method"] == "source" else MIXED, mixed)
    if predicted := run.pictures("predicted"):
        page.heading("Predictions on validation images")
        page.pictures(("image", "prediction", "ground truth"), predicted)
    if mixed or predicted:
        page.colors({**dict(zip(CLASS_NAMES, PALETTE, strict=True)), "ignored": (0, 0, 0)})


# ----------------------------------------------------------------------------------------------------- several runs


def comparison_page(groups: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Write a page that sets groups of runs side by side; a group is one method under several seeds."""
    runs = {name: [read_run(folder) for folder in folders] for name, folders in groups.items()}
    every = [run for group in runs.values() for run in group]
    first = every[0]
    for run in every:
        if run.metrics["last"] is None:
            raise SystemExit(f"error: {run.folder}: has no evaluation yet; let it go on with --resume.")
        if (run.synthia, run.config["evaluation"]) != (first.synthia, first.config["evaluation"]):
            raise SystemExit(f"error: {run.folder}: has another source or label size than {first.folder}.")
    page = Report(f"{', '.join(runs)}: {first.benchmark}")
    page.paragraph("Mean and standard deviation over the runs of each row, where there are several.")
    entries = {f"{name}, {title} step": [run.metrics[title] for run in group]
               for title in ("last", "best") for name, group in runs.items()}  # fmt: skip
    add_scores(page, entries, first.config)
    page.heading("Curves, means over runs")
    page.curves(compared_charts({name: [charts(run) for run in group] for name, group in runs.items()}))
    add_compared_predictions(page, {name: group[0] for name, group in runs.items()})
    page.heading("Options that differ")
    configs = [group[0].config for group in runs.values()]
    options = [name for name in configs[0] if len({str(config.get(name)) for config in configs}) > 1]
    page.table(["option", *runs], [[name, *(str(config.get(name)) for config in configs)] for name in options])
    page.heading("Runs")
    page.facts({name: ", ".join(str(run.folder) for run in group) for name, group in runs.items()})
    out.mkdir(parents=True, exist_ok=True)
    return page.write(out / "index.html")


def compared_charts(groups: Mapping[str, Sequence[Mapping[str, Mapping[str, Curve]]]]) -> dict[str, dict[str, Curve]]:
    """One line of some of the charts, a mean for each group; every group is listed, so that each keeps its colour."""
    found: dict[str, dict[str, Curve]] = {}
    for title, (chart, line) in COMPARED.items():
        lines = {
            name: [run[chart][line] for run in group if line in run.get(chart, {})] for name, group in groups.items()
        }
        if any(lines.values()):
            found[title] = {name: mean_curve(own) if own else ([], []) for name, own in lines.items()}
    return found


def mean_curve(lines: Sequence[Curve]) -> Curve:
    """The mean at the steps that all lines have."""
    by_step = [dict(zip(*line, strict=True)) for line in lines]
    steps = [step for step in lines[0][0] if all(step in line for line in by_step)]
    return steps, [mean(line[step] for line in by_step) for step in steps]


def mean(values: Iterable[float | None]) -> float | None:
    """None where one is."""
    present = list(values)
    known = [value for value in present if value is not None]
    return sum(known) / len(known) if len(known) == len(present) else None


def add_compared_predictions(page: Report, runs: Mapping[str, Run]) -> None:
    """Image, ground truth, and what each method's first run predicts, where they predicted the same images."""
    columns = {name: run.pictures("predicted") for name, run in runs.items()}
    shown = []
    for row in zip(*columns.values(), strict=False):
        images = {image.read_bytes() for image, _, _ in row}
        if len(images) == 1:
            shown.append([row[0][0], *(prediction for _, prediction, _ in row), row[0][2]])
    if shown:
        page.heading("Predictions on validation images")
        page.pictures(["image", *columns, "ground truth"], shown)
        page.colors({**dict(zip(CLASS_NAMES, PALETTE, strict=True)), "ignored": (0, 0, 0)})


if __name__ == "__main__":
    sys.exit(main())
