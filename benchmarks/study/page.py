"""Generate docs/results.md and its figures from the committed result files.

A suite without a result file is listed on the page as missing, or left out if it starts from ImageNet weights. Written
remarks on a suite are copied from results/<suite>.md.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.charts import Panel, bars, curves
from benchmarks.speed.common import RESULTS
from benchmarks.study.collected import mean_and_sd
from benchmarks.study.expected import checks, mious
from benchmarks.study.studies import BASE, OPTIONS, row_name
from benchmarks.study.trials import LOOKED_AT

PRETRAINED = {
    "ablation-streets-camvid": "StreetScenes to CamVid, from ImageNet weights",
    "ablation-day-dusk": "CamVid, day to dusk, from ImageNet weights",
}
TITLES = PRETRAINED | {"ablation-streetscenes": "StreetScenes", "ablation-camvid": "CamVid, day to dusk"}
SENSITIVITY = "sensitivity-streetscenes"
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t(0.975) by sample size
BASELINES = ("source", "source + jitter")
Document = dict[str, Any]

INTRODUCTION = """\
# Results

The paper's findings on two freely available pairs of domains, with every seed. All scores are IoU in percent on
held-out target images; ± is the standard deviation over seeds. This page and its figures are generated from the files
in `benchmarks/results/`:

```bash
python -m benchmarks.study ablation --pair streetscenes --workers 2 --save
python -m benchmarks.study ablation --pair camvid --camvid CamVid --workers 2 --save
python -m benchmarks.study sensitivity --workers 2 --save
python -m benchmarks.study causes --pair streetscenes --workers 2 --save
python -m benchmarks.study causes --pair camvid --camvid CamVid --workers 2 --save
python -m benchmarks.publish --write
```

A run is a pure function of its options and its seed, bit for bit on one machine. For each seed, all methods use the
same network with the same initial weights, the same number of steps and the same batches. The colour jitter and blur of
DACS are applied to the pseudo-labelled images of every method that has them, to the source images in `source + jitter`,
and nowhere else. `alignment` knows the true class shares of the target, and `oracle` trains on its labels: both are
bounds, not methods.
"""

WATCHING = """\
At {looks} points during training, `PseudoLabelMonitor` compared the teacher's labels on {count} training images of the
target with the truth, which is not used in training. Thin lines are seeds, thick lines their mean.
"""

BY_CLASS = """\
Precision / recall of the pseudo-labels at the last step, by class, with the class's share among them in brackets. A
precision of - means that the class is never predicted. Means over seeds.
"""

TRIED = """\
Experiments on the causes (`python -m benchmarks.study causes`), over seeds {seeds}, in points of mIoU. Differences are
to the baselines with the same seeds and number of steps:
"""

ONE_AT_A_TIME = """\
One option at a time, on StreetScenes, {seeds} seeds with {steps} steps each. The difference is to the base, seed by
seed. It is called clear if 0 is outside of the 95 % confidence interval of its mean (Student's t over the seeds);
otherwise it is within the spread of these seeds. By chance, one row in twenty would look clear.
"""

PAIR_TEXT = {
    "ablation-streets-camvid": (
        "From rendered scenes to photographs: 1000 source scenes of StreetScenes, with its 19 classes mapped to the 11 "
        "of CamVid, and two drives by day as the target (0006R0 and the last two thirds of 0016E5, 305 images). Scored "
        "on drive 0001TP at dusk (124 images), and by day on the first third of 0016E5 (101 images). CamVid in the "
        "SegNet version, resized to 160 x 213."
    ),
    "ablation-day-dusk": (
        "Photographs from a moving car: drives 0006R0 and 0016E5 by day are the source (406 images), the first half of "
        "drive 0001TP at dusk is the target (62), and its second half is for evaluation (62). CamVid in the SegNet "
        "version, resized to 160 x 213."
    ),
    "ablation-streetscenes": (
        "Rendered scenes in two styles (`crossmix.datasets.StreetScenes`): 400 source and 400 target scenes of "
        "64 x 128 pixels, and 100 more target scenes for evaluation. The gap and class balance were chosen by the "
        "scores of networks trained on target labels and on source labels (`python -m benchmarks.study shift`), before "
        "any other method was run."
    ),
    "ablation-camvid": (
        "Photographs from a moving car: drive 0006R0 by day is the source (101 images), the first half of drive 0001TP "
        "at dusk is the target (62), and its second half is for evaluation (62). CamVid in the SegNet version, resized "
        "to 120 x 160. The hyperparameters are those of StreetScenes."
    ),
}


def page() -> str:
    parts = [INTRODUCTION]
    for suite in TITLES:
        parts += ablation(suite)
    parts += sensitivity()
    return "\n".join(parts).rstrip("\n") + "\n"


def figures() -> dict[str, str]:
    found = {}
    for suite in TITLES:
        document = read(suite)
        if document is not None:
            name = document["options"]["pair"]["name"]
            found[f"{name}-miou.svg"] = miou_figure(document)
            found[f"{name}-course.svg"] = course_figure(document)
            found[f"{name}-recall.svg"] = class_figure(document, "recall")
            found[f"{name}-share.svg"] = class_figure(document, "share")
    document = read(SENSITIVITY)
    if document is not None:
        found["sensitivity-miou.svg"] = miou_figure(document)
    return found


def read(suite: str) -> Document | None:
    path = RESULTS / f"{suite}.json"
    if not path.exists():
        return None
    content: Document = json.loads(path.read_text(encoding="utf-8"))
    return content


# ------------------------------------------------------------------------------------------------------------- parts


def ablation(suite: str) -> list[str]:
    document = read(suite)
    if document is None:
        if suite in PRETRAINED:
            return []
        return [f"## {TITLES[suite]}\n\nNot run yet: `benchmarks/results/{suite}.json` does not exist.\n"]
    name, rows = document["options"]["pair"]["name"], document["rows"]
    parts = [f"## {TITLES[suite]}\n", PAIR_TEXT[suite] + "\n", setting(document), scores_table(rows)]
    parts += [figure(f"{name}-miou.svg", "mIoU of every method, a dot per seed"), *by_day(rows)]
    parts += ["### Expectations and results\n", checks_table(document)]
    if suite not in PRETRAINED:
        parts += tried(document)
    parts += remarks(suite)
    parts += ["### By class\n", "IoU of the student at the last step.\n", class_table(document)]
    if watched(rows):
        watching = WATCHING.format(looks=len(document["looks"]), count=LOOKED_AT)
        parts += ["### Pseudo-labels\n", watching, pseudo_label_table(rows)]
        parts += [figure(f"{name}-course.svg", "Scores, lambda, agreement and errors over training")]
        parts += [figure(f"{name}-recall.svg", "Recall of the pseudo-labels over training, by class")]
        parts += [figure(f"{name}-share.svg", "Share of each class among the pseudo-labels over training")]
        parts += [BY_CLASS, precision_table(document)]
    return parts


def setting(document: Document) -> str:
    options, machine = document["options"], document["machine"]
    pair, runs = options["pair"], [run for entry in document["rows"].values() for run in entry["runs"]]
    height, width = pair["crop"]
    hours = sum(run["cpu_seconds"] for run in runs) / 3600
    network, optimizer = "`deeplab_v2_tiny` from random weights", "weight decay 0.0005"
    if pair.get("network") == "efficientnet-lite0":
        network = "EfficientNet-Lite0 with ImageNet weights and a feature pyramid of 64 channels"
        optimizer = "AdamW with weight decay 0.01"
    return (
        f"{network}, {options['steps']} steps of {pair['batch']} source and "
        f"{pair['batch']} target crops of {height} x {width}, learning rate {pair['lr']} (head ten times that), "
        f"polynomial decay 0.9, {optimizer}; the released recipe with threshold {pair['threshold']} and EMA "
        f"decay {pair['decay']}. The {len(runs)} runs took {hours:.1f} core hours on {machine['processor']}, "
        f"torch {machine['torch']}, {document['date']}.\n"
    )


def scores_table(rows: Document) -> str:
    lines = [
        "| method | mIoU, last step | best step | teacher, last | teacher, best | seeds, last step |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, entry in rows.items():
        cells = [
            mean_and_sd([run[when][network]["miou"] for run in entry["runs"]])
            if network in entry["runs"][0][when]
            else "-"
            for network in ("student", "teacher")
            for when in ("last", "best")
        ]
        seeds = ", ".join(f"{100 * value:.2f}" for value in mious(rows, name))
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return "\n".join([*lines, ""])


def by_day(rows: Document) -> list[str]:
    """Scores on the second set, by day, if there is one."""
    lines = ["Scored by day, at the last step:\n", "| method | mIoU | teacher | seeds |", "|---|---:|---:|---|"]
    scored = {name: [run["by_day"] for run in entry["runs"] if "by_day" in run] for name, entry in rows.items()}
    for name, runs in scored.items():
        if not runs:
            return []
        cells = [
            mean_and_sd([run[network]["miou"] for run in runs]) if network in runs[0] else "-"
            for network in ("student", "teacher")
        ]
        seeds = ", ".join(f"{100 * run['student']['miou']:.2f}" for run in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return ["\n".join([*lines, ""])]


def checks_table(document: Document) -> str:
    """All expectations with their figures, preceded by a list of the missed ones."""
    found = checks(document["rows"], document["options"]["pair"]["classes"], document["options"]["pair"]["name"])
    missed = [check.claim for check in found if not check.holds]
    verdict = f"{len(found) - len(missed)} of {len(found)} expectations hold."
    if missed:
        verdict += f" Missed: {'; '.join(missed)}."
    lines = [verdict, "", "| expected | paper, GTA5 to Cityscapes | found | |", "|---|---|---|---|"]
    lines += [f"| {c.claim} | {c.paper} | {c.found} | {'holds' if c.holds else '**missed**'} |" for c in found]
    return "\n".join([*lines, ""])


def tried(whole: Document) -> list[str]:
    """The rows of the study of causes, next to the same methods in the ablation."""
    suite = f"causes-{whole['options']['pair']['name']}"
    document = read(suite)
    if document is None:
        return [f"The causes have not been studied yet: `benchmarks/results/{suite}.json` does not exist.\n"]
    rows, steps, full = document["rows"], document["options"]["steps"], whole["options"]["steps"]
    baselines = whole["rows"] if steps == full else rows
    beside = {name: entry for name, entry in whole["rows"].items() if name in {"classmix", "dacs"}}
    seeds = [run["seed"] for run in next(iter(rows.values()))["runs"]]
    lines = [
        TRIED.format(seeds=", ".join(map(str, seeds))),
        "| row | steps | mIoU | above source | above source + jitter | seeds |",
        "|---|---:|---:|---:|---:|---|",
        *(tried_line(name, steps, mious(rows, name), baselines) for name in rows if name not in BASELINES),
        *(tried_line(name, full, mious(beside, name)[: len(seeds)], whole["rows"]) for name in beside),
    ]
    return ["\n".join([*lines, ""])]


def tried_line(name: str, steps: int, found: Sequence[float], base: Document) -> str:
    """A row with its differences to the two baselines, if they were run."""
    above = [
        mean_and_sd([a - b for a, b in zip(found, mious(base, other), strict=False)]) if other in base else "-"
        for other in BASELINES
    ]
    seeds = ", ".join(f"{100 * value:.2f}" for value in found)
    return f"| {' | '.join([name, str(steps), mean_and_sd(found), *above, seeds])} |"


def remarks(suite: str) -> list[str]:
    path = RESULTS / f"{suite}.md"
    return [path.read_text(encoding="utf-8").rstrip("\n") + "\n"] if path.exists() else []


def class_table(document: Document) -> str:
    rows, classes = document["rows"], document["options"]["pair"]["classes"]
    lines = ["| class | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    for i, name in enumerate(classes):
        cells = [
            mean_and_sd([run["last"]["student"]["per_class"][i] or 0.0 for run in entry["runs"]])
            for entry in rows.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [f"**{mean_and_sd(mious(rows, name))}**" for name in rows]
    return "\n".join([*lines, f"| **mIoU** | {' | '.join(cells)} |", ""])


def watched(rows: Document) -> Document:
    return {name: entry for name, entry in rows.items() if "by_class" in entry}


def pseudo_label_table(rows: Document) -> str:
    columns: dict[str, Callable[[Document], float]] = {
        "lambda": lambda run: last(run, "lambda"),
        "teacher-student agreement": lambda run: last(run, "agreement"),
        "divergence from the true shares": lambda run: last(run, "divergence"),
        "correct labels in the mixed batches": lambda run: last(run, "mixed_accuracy"),
        "mean recall": lambda run: statistics.mean(v for v in run["pseudo_labels"]["recall"] if v is not None),
    }
    lines = ["| method | " + " | ".join(columns) + " | classes with a recall under 1 % |", "|---|" + "---:|" * 6]
    for name, entry in watched(rows).items():
        runs = entry["runs"]
        cells = [mean_and_sd([column(run) for run in runs]) for column in columns.values()]
        lost = [sum(v is not None and v < 0.01 for v in run["pseudo_labels"]["recall"]) for run in runs]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, lost))} |")
    return "\n".join(["Percent at the last step, the last column by seed:\n", *lines, ""])


def last(run: Document, curve: str) -> float:
    return float(run["curves"][curve][-1])


def precision_table(document: Document) -> str:
    """Classes down, methods across: precision / recall (share)."""
    rows, shares = watched(document["rows"]), document["true_share"]
    lines = ["| class | true share | " + " | ".join(rows) + " |", "|---|---:|" + "---:|" * len(rows)]
    for i, name in enumerate(document["options"]["pair"]["classes"]):
        cells = []
        for entry in rows.values():
            precision, recall, share = (entry["by_class"][key][-1][i] for key in ("precision", "recall", "share"))
            cells.append(f"{percent(precision)} / {percent(recall)} ({percent(share)})")
        lines.append(f"| {name} | {percent(shares[i])} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def sensitivity() -> list[str]:
    document = read(SENSITIVITY)
    title = "## Sensitivity of DACS to its options\n"
    if document is None:
        return [title, f"Not run yet: `benchmarks/results/{SENSITIVITY}.json` does not exist.\n"]
    rows, seeds = document["rows"], len(document["rows"]["dacs"]["runs"])
    parts = [
        title,
        ONE_AT_A_TIME.format(seeds=seeds, steps=document["options"]["steps"]),
        "| option | value | mIoU | difference from the base | | lambda at the end | seeds |",
        "|---|---|---:|---:|---|---:|---|",
    ]
    base = mious(rows, "dacs")
    for option, values in OPTIONS.items():
        for value, variant in values.items():
            name = "dacs" if variant == BASE else row_name(option, value)
            if name in rows:
                parts.append(sensitivity_line(option, value, rows, name, base))
    return [*parts, "", figure("sensitivity-miou.svg", "mIoU of every variant, a dot per seed"), *remarks(SENSITIVITY)]


def sensitivity_line(option: str, value: str, rows: Document, name: str, base: Sequence[float]) -> str:
    found = mious(rows, name)
    confident = mean_and_sd([last(run, "lambda") for run in rows[name]["runs"]])
    difference, verdict = "base", ""
    if name != "dacs":
        moved = [100 * (a - b) for a, b in zip(found, base, strict=True)]
        difference, verdict = f"{statistics.mean(moved):+.2f}", clear(moved)
        if len(moved) > 1:
            difference += f" ± {statistics.stdev(moved):.2f}"
    seeds = ", ".join(f"{100 * v:.2f}" for v in found)
    return f"| {option} | {value} | {mean_and_sd(found)} | {difference} | {verdict} | {confident} | {seeds} |"


def clear(moved: Sequence[float]) -> str:
    """Whether a difference is significant at the 95 % level."""
    if len(moved) not in STUDENT:
        return "too few seeds"
    half = STUDENT[len(moved)] * statistics.stdev(moved) / len(moved) ** 0.5
    return "clear" if abs(statistics.mean(moved)) > half else "within the spread"


# ----------------------------------------------------------------------------------------------------------- figures


def figure(name: str, words: str) -> str:
    return f"![{words}](results/{name})\n"


def miou_figure(document: Document) -> str:
    rows, name = document["rows"], document["options"]["pair"]["name"]
    title = f"{name}: mIoU at the last step, percent, a dot per seed"
    return bars(title, {row: [100 * value for value in mious(rows, row)] for row in rows})


def course_figure(document: Document) -> str:
    """Scores of every method and quality of the pseudo-labels over training."""
    rows = document["rows"]
    titles = {
        "student": "mIoU of the student",
        "lambda": "lambda",
        "agreement": "teacher-student agreement",
        "divergence": "divergence from the true shares",
        "mixed_accuracy": "correct labels in the mixed batch",
    }
    panels = []
    for key, title in titles.items():
        seeds = {name: [run["curves"].get(key) for run in entry["runs"]] for name, entry in rows.items()}
        series = {name: runs for name, runs in seeds.items() if runs[0] is not None}
        panels.append(Panel(title, series, limit=None if key == "student" else 1))
    return curves(f"{document['options']['pair']['name']}: over training", document["looks"], panels, columns=3)


def class_figure(document: Document, key: str) -> str:
    """A panel per class with means over seeds: recalls, or shares as multiples of the true share."""
    panels, rows = [], watched(document["rows"])
    for i, name in enumerate(document["options"]["pair"]["classes"]):
        unit = document["true_share"][i] if key == "share" else 1.0
        series = {row: [[ratio(values[i], unit) for values in entry["by_class"][key]]] for row, entry in rows.items()}
        panels.append(Panel(name, series, limit=2, level=1) if key == "share" else Panel(name, series))
    what = "recall of the pseudo-labels" if key == "recall" else "share of the pseudo-labels over the true share"
    return curves(f"{document['options']['pair']['name']}: {what}", document["looks"], panels, columns=4)


def ratio(value: float | None, unit: float) -> float | None:
    """A number divided by a unit, or None if either is missing."""
    return value / unit if value is not None and unit else None
