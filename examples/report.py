"""Make HTML pages of the trainer's runs: one run, or several side by side. The trainer makes both when it ends.

    python examples/report.py RUN                                         RUN/report/index.html, also of a stopped run
    python examples/report.py runs/gta5-source runs/gta5-dacs --out DIR   DIR/index.html, which compares them

A folder that contains the runs of several seeds or methods stands for all of them; scores are then mean and standard
deviation over the seeds. Only the runs' files are read: config.json, log.jsonl, metrics.json and report/pictures. A
page is a single file made from report.html.j2, without scripts or network access.
"""

import argparse
import base64
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from crossmix.datasets.classes import CLASS_NAMES, CLASSES_16
from crossmix.engine import RunLog
from crossmix.recipes import METHODS
from files import write_text
from options import config_files
from pictures import CLASS_COLORS
from scores import CHOSEN, TITLES, deciding_miou, information, paper_tables, plain, shortfall, spread

try:
    import matplotlib as mpl
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise SystemExit(f"error: {error}; reports take Jinja2 and Matplotlib: pip install jinja2 matplotlib.") from error

__all__ = ["comparison_page", "run_page"]

Curve = tuple[Sequence[float], Sequence[float]]  # steps and values; NaN makes a gap
Charts = dict[str, dict[str, Curve]]  # by title, then by name of the line
Gallery = tuple[str, Sequence[str], Sequence[Sequence[Path]]]  # title, column titles, rows

CHARTS = {
    "loss": {"loss": "loss", "source": "source_loss", "mixed": "mixed_loss", "consistency": "consistency_loss"},
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
PICTURES = {
    "mixed": ("source", "target", "mixed image", "mixed label"),
    "predicted": ("image", "prediction", "ground truth"),
}
PREDICTED = "Predictions on validation images"
SHORT = "label-free step below the best"
LABEL_FREE = "The label-free step is the one whose predictions have the highest information; no label chose it."
MIXED_SOURCE = ("source", "target, not used", "what the student saw", "its label")
PAPER = (
    "The rows of the paper's methods are means of three runs after the last step, on labels of 512 x 1024; those of "
    "other authors' methods are as the paper quotes them."
)

POINTS = 300  # per line; more could not be told apart and would make the page megabytes large
MARKED = 40  # lines of at most this many points have markers that show their values
LARGEST = 1e300  # differences between larger values could overflow
COLORS = 8  # line colours that the page defines
DASHES = ("-", "--", ":")
INK = "#010203"  # placeholder for the colour of the surrounding text
STYLE: Any = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    "axes.edgecolor": INK,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.2,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # words stay words
    "text.usetex": False,
}


class Run(NamedTuple):
    """The contents of a run's folder."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def synthia(self) -> bool:
        """Whether the source is SYNTHIA, which labels 16 of the classes."""
        return bool(self.config["synthia"])

    @property
    def benchmark(self) -> str:
        """The two domains."""
        if self.config.get("source"):
            return " to ".join(Path(self.config[name]).resolve().name for name in ("source", "target"))
        return f"{'SYNTHIA' if self.synthia else 'GTA5'} to Cityscapes"

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        if (last := self.metrics["last"]) is not None:
            return list(last["student"][self.config["evaluation"]]["per_class"])
        return [] if self.config.get("source") else list(CLASS_NAMES)

    def miou(self, entry: Mapping[str, Any], who: str = "student") -> float | None:
        """The mean IoU that decides, from an evaluation."""
        return deciding_miou(entry, evaluation=self.config["evaluation"], synthia=self.synthia, who=who)

    def chosen(self) -> dict[str, dict[str, Any]]:
        """The evaluations that are singled out, by title."""
        titles = {"last": "last step", **CHOSEN}
        return {words: self.metrics[title] for title, words in titles.items() if self.metrics.get(title)}

    def pictures(self, kind: str) -> list[list[Path]]:
        """The complete rows of pictures of a kind."""
        folder = self.folder / "report" / "pictures"
        starts = [path.name.removesuffix("-0.png") for path in sorted(folder.glob(f"{kind}-*-0.png"))]
        rows = [sorted(folder.glob(f"{start}-*.png")) for start in starts]
        return [row for row in rows if len(row) == len(PICTURES[kind])]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of one run or of several")
    parser.add_argument("--out", type=Path, help="folder for the page that compares them")
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
    """List the run in a folder, or those of the seeds and methods below it."""
    found = config_files(folder)
    if not found:
        raise SystemExit(f"error: {folder}: holds no config.json of a run; pass the --out of the trainer.")
    return [path.parent for path in found]


def read_run(folder: Path) -> Run:
    """Read the files that a run has written so far."""
    metrics: dict[str, Any] = {"evaluations": [], "last": None, "best": None}  # before the first evaluation
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return Run(folder, config, metrics, RunLog(folder / "log.jsonl").read())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {folder}: is not the folder of a run ({error}).") from error


# ------------------------------------------------------------------------------------------------------------ pages


def run_page(folder: Path) -> Path:
    """Write report/index.html of a run: scores, curves, pictures, configuration."""
    run = read_run(folder)
    entries = {f"{words}, {entry['step']}": [entry] for words, entry in run.chosen().items()}
    titles = {"mixed": "The last step's images", "predicted": PREDICTED}
    headers = {**PICTURES, "mixed": MIXED_SOURCE} if run.config["method"] == "source" else PICTURES
    return write(
        folder / "report",
        classes=run.classes,
        title=f"{run.config['method']}, {run.benchmark}, seed {run.config['seed']}",
        figures={"steps done": f"{run.log[-1]['step'] if run.log else 0} of {run.config['steps']}", **key_figures(run)},
        note=LABEL_FREE if run.metrics.get("best_unsupervised") else "",
        scores=score_tables(entries, run.config) if entries else [],
        charts={"Curves": charts(run)},
        galleries=[(title, headers[kind], run.pictures(kind)) for kind, title in titles.items()],
        facts={"Configuration": options(run)},
    )


def comparison_page(groups: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Write a page that compares groups of runs; a group is one method under several seeds."""
    runs = {name: [read_run(folder) for folder in folders] for name, folders in groups.items()}
    every = [run for group in runs.values() for run in group]
    first = every[0]
    for run in every:
        if run.metrics["last"] is None:
            raise SystemExit(f"error: {run.folder}: has no evaluation yet; continue it with --resume.")
        same = (run.synthia, run.classes, run.config["evaluation"])
        if same != (first.synthia, first.classes, first.config["evaluation"]):
            raise SystemExit(
                f"error: {run.folder}: has another source or label size, or other classes, than {first.folder}."
            )
    entries = {f"{name}, {words}": [run.chosen()[words] for run in group] for words in first.chosen()
               for name, group in runs.items() if all(words in run.chosen() for run in group)}  # fmt: skip
    short = {
        f"{name}, {SHORT}": [lost for run in group if (lost := shortfall(run.metrics, run.miou)) is not None]
        for name, group in runs.items()
    }
    configs = [options(group[0]) for group in runs.values()]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    return write(
        out,
        classes=first.classes,
        title=f"{', '.join(runs)}: {first.benchmark}",
        note=f"Rows of several runs show mean and standard deviation. {LABEL_FREE if any(short.values()) else ''}",
        figures={title: f"{spread(values)} points" for title, values in short.items() if values},
        scores=score_tables(entries, first.config),
        charts={"Curves, means over runs": compared({name: list(map(charts, group)) for name, group in runs.items()})},
        galleries=[compared_predictions({name: group[0] for name, group in runs.items()})],
        differing=(["option", *runs], [[name, *(config.get(name) for config in configs)] for name in differing]),
        facts={"Runs": {name: ", ".join(str(run.folder) for run in group) for name, group in runs.items()}},
    )


def write(
    folder: Path, *, classes: Sequence[str], charts: Mapping[str, Charts], galleries: Iterable[Gallery],
    **content: object,
) -> Path:  # fmt: skip
    """Fill in the template, draw the charts and embed the pictures; the file is replaced atomically."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                            trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    page = templates.get_template("report.html.j2").render(
        {"note": "", "figures": {}, "differing": ((), ())} | content,
        charts={
            heading: [(title, drawn(title, lines), {name: end(values) for name, (_, values) in lines.items()})
                      for title, lines in group.items()]
            for heading, group in charts.items() if group
        },
        galleries=[(title, header, [list(map(embedded, row)) for row in rows])
                   for title, header, rows in galleries if rows],
        colors={**dict(zip(classes, CLASS_COLORS, strict=False)), "ignored": (0, 0, 0)},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "index.html", page)
    return folder / "index.html"


def options(run: Run) -> dict[str, object]:
    """List a run's options, then the versions that it ran with."""
    versions: dict[str, object] = run.config.get("versions", {})
    return {name: value for name, value in run.config.items() if name != "versions"} | versions


# ----------------------------------------------------------------------------------------------------------- scores


def key_figures(run: Run) -> dict[str, str]:
    """Format the mean IoU of the steps that are singled out, and the price of choosing one without labels."""
    title = TITLES["miou_16" if run.synthia else "miou"]
    figures = {
        f"{who}, {words} ({entry['step']}): {title}": f"{spread([run.miou(entry, who)])} %"
        for words, entry in run.chosen().items()
        for who in ("student", "teacher")
        if who in entry
    }
    if (lost := shortfall(run.metrics, run.miou)) is not None:
        figures[f"student, {SHORT}"] = f"{spread([lost])} points"
    return figures


def score_tables(entries: Mapping[str, Sequence[dict[str, Any]]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a table for each label size, the deciding one first: IoU in percent of student and teacher, by class.

    `entries` are evaluations by title, one for each run that is averaged.
    """
    synthia, deciding = bool(config["synthia"]), config["evaluation"]
    last = next(iter(entries.values()))[0]["student"][deciding]
    names = [CLASS_NAMES[i] for i in CLASSES_16] if synthia else list(last["per_class"])
    means = ("miou_16", "miou_13") if synthia else ("miou",)
    tables = []
    for size in sorted(next(iter(entries.values()))[0]["student"], key=lambda size: size != deciding):
        rows = []
        for title, runs in entries.items():
            for who in ("student", "teacher"):
                if who in runs[0]:
                    scores = [run[who][size] for run in runs]
                    cells = [spread(score[key] for score in scores) for key in means]
                    cells += [spread(score["per_class"][name] for score in scores) for name in names]
                    rows.append([f"{title}: {who}", *(cell.replace(" +- ", "\n±") for cell in cells)])
        groups = {"": rows}
        beside_paper = size == deciding and config["network"] == "resnet101" and not config.get("source")
        for number in () if not beside_paper else (2,) if synthia else (3, 1):
            table = paper_tables()[f"table {number}"]
            groups[f"Table {number} of the paper: {table['title']}"] = [
                [row["method"], *(plain(row.get(key)) for key in means)]
                + [plain(row["per_class"].get(name)) for name in names]
                for row in table["rows"]
            ]
        tables.append(
            {
                "title": f"Scores on labels of {'their own size' if size == 'native' else size}",
                "note": PAPER if beside_paper else "",
                "header": ["IoU in percent", *(TITLES[key] for key in means), *names],
                "groups": groups,
            }
        )
    return tables


# ----------------------------------------------------------------------------------------------------------- curves


def charts(run: Run) -> Charts:
    """Collect the curves of log and evaluations, over steps."""
    found: Charts = {"mIoU in percent": evaluated(run, lambda entry, who: 100 * number(run.miou(entry, who)))}
    if any("unsupervised" in entry for entry in run.metrics["evaluations"]):
        found["information"] = evaluated(run, lambda entry, who: number(information(entry, who)))
    steps = [record["step"] for record in run.log]
    for title, lines in CHARTS.items():
        found[title] = {
            name: (steps, [number(record.get(key)) for record in run.log])
            for name, key in lines.items()
            if any(key in record for record in run.log)
        }
    kept = {title: {name: line for name, line in lines.items() if line[0]} for title, lines in found.items()}
    return {title: lines for title, lines in kept.items() if lines}


def evaluated(run: Run, value: Callable[[Mapping[str, Any], str], float]) -> dict[str, Curve]:
    """Read a value of student and teacher from every evaluation that has it."""
    found: dict[str, Curve] = {}
    for who in ("student", "teacher"):
        entries = [entry for entry in run.metrics["evaluations"] if who in entry]
        found[who] = [entry["step"] for entry in entries], [value(entry, who) for entry in entries]
    return found


def compared(groups: Mapping[str, Sequence[Charts]]) -> Charts:
    """Average one line of some charts over each group. Every group is listed, so that each keeps its colour."""
    found: Charts = {}
    for title, (chart, line) in COMPARED.items():
        lines = {name: [run[chart][line] for run in runs if line in run.get(chart, {})]
                 for name, runs in groups.items()}  # fmt: skip
        if any(lines.values()):
            found[title] = {name: mean_curve(own) if own else ([], []) for name, own in lines.items()}
    return found


def mean_curve(lines: Sequence[Curve]) -> Curve:
    """Average lines at the steps that all of them have; a gap in one is a gap in the mean."""
    by_step = [dict(zip(*line, strict=True)) for line in lines]
    steps = [step for step in lines[0][0] if all(step in line for line in by_step)]
    return steps, [fmean(line[step] for line in by_step) for step in steps]


def number(value: object) -> float:
    """Convert a value for drawing: NaN for anything but a finite number."""
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else math.nan


def thinned(steps: Sequence[float], values: Sequence[float]) -> Curve:
    """Reduce a long line to means over groups of neighbouring points, leaving out gaps."""
    size = -(-len(steps) // POINTS) or 1
    places, means = [], []
    for i in range(0, len(steps), size):
        pairs = zip(steps[i : i + size], values[i : i + size], strict=True)
        near = [(step, value) for step, value in pairs if not math.isnan(value)]
        places.append(fmean(step for step, _ in near) if near else steps[i])
        means.append(fmean(value for _, value in near) if near else math.nan)
    return places, means


def end(values: Sequence[float]) -> str:
    """Format the last value of a line."""
    return next((f"{value:.4g}" for value in reversed(values) if not math.isnan(value)), "")


def drawn(title: str, lines: Mapping[str, Curve]) -> Markup:
    """Draw a line chart as an SVG element that takes its colours from the page."""
    shown = {name: thinned(*line) for name, line in lines.items()}
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):  # unique ids on the page
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.subplots()
        for i, (steps, values) in enumerate(shown.values()):
            (line,) = axes.plot(steps, values, "o", markersize=3, markevery=marked(values), linewidth=1.5)
            line.set(color=f"#0000c{i % COLORS}", linestyle=DASHES[i % len(DASHES)], gid=f"line{i}")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
        axes.locator_params(axis="y", nbins=6)
        if not any(map(end, (values for _, values in shown.values()))):
            axes.text(0.5, 0.5, "no number was recorded", transform=axes.transAxes, ha="center")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return inline(file.getvalue(), title, shown)


def marked(values: Sequence[float]) -> list[int]:
    """Choose the points to mark: all of a short line, otherwise those that stand alone between gaps."""
    gaps = [math.isnan(value) for value in (math.nan, *values, math.nan)]
    short = gaps.count(False) <= MARKED
    return [i for i in range(len(values)) if not gaps[i + 1] and (short or (gaps[i] and gaps[i + 2]))]


def inline(svg: str, title: str, lines: Mapping[str, Curve]) -> Markup:
    """Turn Matplotlib's SVG file into an element of the page, with the page's colours and with tooltips."""
    svg = re.sub(r"#0000c(\d)", r"var(--c\1)", svg.replace(INK, "currentColor"))
    root = ET.fromstring(svg)  # noqa: S314 - our own
    for i, (name, (steps, values)) in enumerate(lines.items()):
        marks = root.iterfind(f".//*[@id='line{i}']/{{*}}g/{{*}}use")
        for mark, k in zip(marks, marked(values), strict=True):
            ET.SubElement(mark, "title").text = f"{name}, {steps[k]:g}: {values[k]:.4g}"
    referred = set(re.findall(r"#(\w+)[\")]", svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: value for key, value in element.items() if key != "id" or value in referred
        }
        for style in element.findall("{*}style"):
            element.remove(style)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704 - ElementTree escapes


# --------------------------------------------------------------------------------------------------------- pictures


def compared_predictions(runs: Mapping[str, Run]) -> Gallery:
    """Show images, each method's predictions and ground truth, for images that all methods predicted."""
    rows = [
        [row[0][0], *(prediction for _, prediction, _ in row), row[0][2]]
        for row in zip(*(run.pictures("predicted") for run in runs.values()), strict=False)
        if len({image.read_bytes() for image, _, _ in row}) == 1
    ]
    return PREDICTED, ["image", *runs, "ground truth"], rows


def embedded(path: Path) -> str:
    """Encode a picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    sys.exit(main())
