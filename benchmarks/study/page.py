"""Generate docs/results.md and its figures from the committed result files.

A suite without a result file is listed on the page as missing, or left out if it starts from ImageNet weights. Written
remarks on a suite are copied from results/<suite>.md.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.charts import Panel, bars, curves
from benchmarks.speed.common import RESULTS
from benchmarks.study import predictions
from benchmarks.study.collected import name_of
from benchmarks.study.expected import checks, mious
from benchmarks.study.studies import BASE, CAUSES, OPTIONS, is_pretrained, row_name, rows_of
from benchmarks.study.studies import seeds_of as planned_seeds
from benchmarks.study.trials import LOOKED_AT
from benchmarks.tables import cell, each, mean_and_sd, table

PRETRAINED = {
    "ablation-streets-camvid": "StreetScenes to CamVid, from ImageNet weights",
    "ablation-streets-camvid-360x480": "StreetScenes to CamVid in full size, from ImageNet weights",
    "ablation-day-dusk": "CamVid, day to dusk, from ImageNet weights",
}
TITLES = PRETRAINED | {"ablation-streetscenes": "StreetScenes", "ablation-camvid": "CamVid, day to dusk"}
SENSITIVITY = "sensitivity-streetscenes"
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t(0.975) by sample size
BASELINES = ("source", "source + jitter")
MISSED = ("classmix", "dacs")  # rows whose missed expectations have causes
MISSED_PRETRAINED = ("dacs", "dacs + masked consistency")
Document = dict[str, Any]

INTRODUCTION = """\
# Results

The paper's findings on {pairs} freely available pairs of domains, with every seed. All scores are IoU in percent on
images that no method is trained on; ± is the sample standard deviation over seeds. The best step is chosen by the
labels of these images, so no method could know it. This page and its figures are generated from the files in
`benchmarks/results/`:

```bash
{commands}python -m benchmarks.study ablation --pair streetscenes --workers 2 --save
python -m benchmarks.study ablation --pair camvid --camvid CamVid --workers 2 --save
python -m benchmarks.study sensitivity --workers 2 --save
python -m benchmarks.study causes --pair streetscenes --workers 2 --save
python -m benchmarks.study causes --pair camvid --camvid CamVid --workers 2 --save
python -m benchmarks.publish --write
```

A run is a pure function of its options and its seed, bit for bit on one CPU; on a GPU, other rounding leads a seed to
another score. The pairs from ImageNet weights have their runs in `benchmarks/results/runs`, each with the machine that
it ran on: `--finished` collects them, and without it the missing ones are run. For each seed, all methods use the same
network with the same initial weights, the same number of steps and the same batches, except where a row samples rare
classes or is trained on the target. The colour jitter and blur of DACS are applied to the pseudo-labelled images of
every method that has them, to the source images in `source + jitter`, and nowhere else. `alignment` knows the true
class shares of the target, and `oracle` is trained on its labels; neither is possible where the target is unlabelled.
`dacs + boxes` pastes boxes of half of the image, as CutMix does; those of `BoxMasks` are smaller by default.
"""

COMMAND = "python -m benchmarks.study {study} --pair {pair} --camvid CamVid --finished --save\n"

PREDICTED = """\
Label maps of the student at the last step of seed 0, on images spread evenly over the two test drives, and scenes that
it was trained on. The photographs and their labels must not be distributed; with the data,
`python -m benchmarks.publish --photographs CamVid --out FILE` draws the figure with them.
"""

SELECTED = """\
Which step to keep, without labels: the mIoU of the student at the last step, at the best one, and at the one that a
score of `UnsupervisedScores` on {count} unlabelled training images of the target would choose among {looks} steps.
"""

FROM_SCRATCH = """\
The same methods with a small network from random weights. It is weaker and less confident, and its pseudo-labels are
worse. The mIoU at the last step, in percent: {scores}.
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
Experiments on the causes (`python -m benchmarks.study causes`), over {seeds}, in points of mIoU, on {machines};
another processor rounds differently. Differences are to the baselines with the same seeds and number of steps{fewer}:
"""

ONE_AT_A_TIME = """\
One option at a time, on StreetScenes, {seeds} seeds with {steps} steps each. The difference is to the base, seed by
seed. It is called clear if 0 is outside of the 95 % confidence interval of its mean (Student's t over the seeds);
otherwise it is within the spread of these seeds. By chance, one row in twenty would look clear.
"""

PAIR_TEXT = {
    "ablation-streets-camvid": (
        "From rendered scenes to photographs: 1000 source scenes of StreetScenes in the style `rich`, with its 19 "
        "classes mapped to the 11 of CamVid, and two drives by day as the target (0006R0 and the last two thirds of "
        "0016E5, 305 images). Scored on drive 0001TP at dusk (124 images), and by day on the first third of 0016E5 "
        "(101 images), which is the target domain; dusk is a third one, seen by no row. CamVid in the SegNet version, "
        "resized to 160 x 213."
    ),
    "ablation-streets-camvid-360x480": (
        "The same scenes and photographs in the size of the SegNet version of CamVid, 360 x 480, with more steps."
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
    lead = [part for suite in PRETRAINED for part in ablation(suite)]
    rest = [part for suite in TITLES if suite not in PRETRAINED for part in ablation(suite)] + sensitivity()
    found = [suite.removeprefix("ablation-") for suite in PRETRAINED if read(suite) is not None]
    if found:
        rest = from_scratch() + ["#" + part if part.startswith("##") else part for part in rest]
    pairs = {2: "two", 3: "three", 4: "four", 5: "five"}[2 + len(found)]
    commands = "".join(COMMAND.format(study="ablation", pair=pair) for pair in found)
    causes = [pair for pair in found if read(f"causes-{pair}") is not None]
    commands += "".join(COMMAND.format(study="causes", pair=pair) for pair in causes)
    parts = [INTRODUCTION.format(pairs=pairs, commands=commands), *lead, *rest]
    return "\n".join(parts).rstrip("\n") + "\n"


def figures() -> dict[str, str]:
    found = {}
    for suite in TITLES:
        document = read(suite)
        if document is not None:
            name = document["options"]["pair"]["name"]
            found[f"{name}-miou.svg"] = miou_figure(document)
            if watched(document["rows"]):
                found[f"{name}-course.svg"] = course_figure(document)
                found[f"{name}-recall.svg"] = class_figure(document, "recall")
                found[f"{name}-share.svg"] = class_figure(document, "share")
            if name == predictions.PAIR and predictions.are_there():
                found[predictions.FIGURE] = predictions.figure()
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
    parts = [f"## {TITLES[suite]}\n", PAIR_TEXT[suite] + "\n", setting(document), *scores_table(rows)]
    parts += [figure(f"{name}-miou.svg", "mIoU of every method, a dot per seed"), *by_day(rows)]
    if name == predictions.PAIR and predictions.are_there():
        parts += ["### Predictions\n", PREDICTED, figure(predictions.FIGURE, "Label maps predicted by source and dacs")]
    parts += ["### Expectations and results\n", *checks_table(document)]
    if name in CAUSES:
        parts += tried(document)
    parts += remarks(suite)
    parts += selected(document)
    parts += ["### By class\n", "IoU of the student at the last step.\n", *class_table(document)]
    if watched(rows):
        watching = WATCHING.format(looks=len(document["looks"]), count=LOOKED_AT)
        parts += ["### Pseudo-labels\n", watching, *pseudo_label_table(rows)]
        parts += [figure(f"{name}-course.svg", "Scores, lambda, agreement and errors over training")]
        parts += [figure(f"{name}-recall.svg", "Recall of the pseudo-labels over training, by class")]
        parts += [figure(f"{name}-share.svg", "Share of each class among the pseudo-labels over training")]
        parts += [BY_CLASS, *precision_table(document)]
    return parts


def setting(document: Document) -> str:
    options, runs_on = document["options"], name_of(document["machine"])
    pair, runs = options["pair"], [run for entry in document["rows"].values() for run in entry["runs"]]
    height, width = pair["crop"]
    machines = Counter(run.get("machine", runs_on) for run in runs)
    took = []
    for on, ran in machines.items():
        hours = sum(run["cpu_seconds"] for run in runs if run.get("machine", runs_on) == on) / 3600
        of = f" for {ran} of them" if len(machines) > 1 else ""
        took.append(f"{hours:.1f} CPU hours {'beside' if 'NVIDIA' in on else 'on'} {on}{of}")
    network, optimizer = "`deeplab_v2_tiny` from random weights", "weight decay 0.0005"
    unfinished = own = ""
    count = f"{len(runs)} runs"
    if pair.get("network") == "efficientnet-lite0":
        network = "EfficientNet-Lite0 with ImageNet weights and a feature pyramid of 64 channels"
        optimizer = "AdamW with weight decay 0.01"
        count += f" with {seeds_of(document['rows'])} each"
        own = " (`mic` has its own)" if "mic" in document["rows"] else ""
        planned = len(rows_of("ablation", pair["name"])) * planned_seeds("ablation", pair["name"])
        if len(runs) < planned:
            unfinished = (
                f" Unfinished: {planned} runs are planned. Differences are between the seeds that both rows have."
            )
    return (
        f"{network}, {options['steps']} steps of {pair['batch']} source and "
        f"{pair['batch']} target crops of {height} x {width}, learning rate {pair['lr']} (head ten times that), "
        f"polynomial decay 0.9, {optimizer}; the released recipe with threshold {pair['threshold']} and EMA "
        f"decay {pair['decay']}{own}. The {count} took {' and '.join(took)}, {document['date']}.{unfinished}\n"
    )


def scores_table(rows: Document) -> list[str]:
    columns = [("student", "last"), ("student", "best"), ("teacher", "last"), ("teacher", "best")]
    return table(
        ["method", "mIoU, last step", "best step", "teacher, last", "teacher, best", "seeds, last step"],
        [
            [name, *(cell(entry["runs"], when, network, "miou") for network, when in columns), each(mious(rows, name))]
            for name, entry in rows.items()
        ],
        left=(0, 5),
    )


def by_day(rows: Document) -> list[str]:
    """Scores on the second set, by day, if there is one."""
    scored = {name: [run.get("by_day") for run in entry["runs"]] for name, entry in rows.items()}
    if any(None in runs for runs in scored.values()):
        return []
    lines = [
        [
            name,
            cell(runs, "student", "miou"),
            cell(runs, "teacher", "miou"),
            each([run["student"]["miou"] for run in runs]),
        ]
        for name, runs in scored.items()
    ]
    return ["Scored by day, at the last step:\n", *table(["method", "mIoU", "teacher", "seeds"], lines, left=(0, 3))]


def seeds_of(rows: Document) -> str:
    counts = [len(entry["runs"]) for entry in rows.values()]
    least = f"{min(counts)} to " if min(counts) < max(counts) else ""
    return f"{least}{max(counts)} seed{'s' * (max(counts) > 1)}"


def checks_table(document: Document) -> list[str]:
    """All expectations with their figures, preceded by a list of the missed ones; on each set of test images."""
    pair, lines = document["options"]["pair"], []
    sets = {"found": checks(document["rows"], pair["classes"], pair["name"])}
    if (day := with_scores_by_day(document["rows"])) is not None:
        sets = {"at dusk": sets["found"], "by day": checks(day, pair["classes"], pair["name"])}
    for where, found in sets.items():
        missed = [check.claim for check in found if not check.holds]
        verdict = f"{len(found) - len(missed)} of {len(found)} expectations hold{f' {where}' * (len(sets) > 1)}."
        lines += [verdict + f" Missed: {'; '.join(missed)}." * bool(missed), ""]
    if any(len(entry["runs"]) == 1 for entry in document["rows"].values()):
        lines += ["An expectation about a row with one seed is judged by that seed alone.", ""]
    columns = [column for where in sets for column in (where, "result")]
    rows = [
        [checked[0].claim, checked[0].paper]
        + [cell for c in checked for cell in (c.found, "holds" if c.holds else "**missed**")]
        for checked in zip(*sets.values(), strict=True)
    ]
    head = ["expected", "paper, GTA5 to Cityscapes", *columns]
    return [*lines, *table(head, rows, left=range(len(head)))]


def with_scores_by_day(rows: Document) -> Document | None:
    """The same rows with the scores at the last step on the second set in place of the first, if there is one."""
    if any("by_day" not in run for entry in rows.values() for run in entry["runs"]):
        return None
    return {name: {"runs": [run | {"last": run["by_day"]} for run in entry["runs"]]} for name, entry in rows.items()}


def tried(whole: Document) -> list[str]:
    """The rows of the study of causes, next to the same methods in the ablation."""
    suite = f"causes-{whole['options']['pair']['name']}"
    document = read(suite)
    if document is None:
        return [f"The causes have not been studied yet: `benchmarks/results/{suite}.json` does not exist.\n"]
    lengths = sorted(len(entry["runs"]) for entry in document["rows"].values())
    fewer = "; a row that lists fewer seeds has the first of them" * (lengths[0] < lengths[-1])
    seeds = f"seeds {', '.join(map(str, range(lengths[-1])))}" if lengths[-1] > 1 else "seed 0"
    runs = [run for entry in document["rows"].values() for run in entry["runs"]]
    machines = sorted({run.get("machine") or name_of(document["machine"]) for run in runs})
    text = TRIED.format(seeds=seeds, fewer=fewer, machines=" and ".join(machines))
    parts = [text, *tried_table(whole, document)]
    if (rows := with_scores_by_day(document["rows"])) is not None:
        day = whole | {"rows": with_scores_by_day(whole["rows"])}
        parts += ["The same by day:\n", *tried_table(day, document | {"rows": rows})]
    return parts


def tried_table(whole: Document, document: Document) -> list[str]:
    rows, steps, full = document["rows"], document["options"]["steps"], whole["options"]["steps"]
    pretrained = is_pretrained(whole["options"]["pair"]["name"])
    names = MISSED_PRETRAINED if pretrained else BASELINES
    baselines = whole["rows"] if steps == full else rows
    beside = {name: whole["rows"][name] for name in (MISSED_PRETRAINED if pretrained else MISSED)}
    count = max(len(entry["runs"]) for entry in rows.values())  # of seeds, from 0
    lines = [tried_line(name, steps, mious(rows, name), baselines, names) for name in rows if name not in names]
    lines += [tried_line(name, full, mious(beside, name)[:count], whole["rows"], names) for name in beside]
    return table(["row", "steps", "mIoU", *(f"above {name}" for name in names), "seeds"], lines, left=(0, 5))


def tried_line(name: str, steps: int, found: Sequence[float], base: Document, names: Sequence[str]) -> list[str]:
    """A row with its differences to the rows `names`, where these were run."""
    above = [
        mean_and_sd([a - b for a, b in zip(found, mious(base, other), strict=False)])
        if other in base and other != name
        else "-"
        for other in names
    ]
    return [name, str(steps), mean_and_sd(found), *above, each(found)]


def remarks(suite: str) -> list[str]:
    path = RESULTS / f"{suite}.md"
    return [path.read_text(encoding="utf-8").rstrip("\n") + "\n"] if path.exists() else []


def selected(document: Document) -> list[str]:
    """The scores at the steps that label-free scores choose, and how far they fall short of the best."""
    rows = {name: entry["runs"] for name, entry in document["rows"].items() if name != "oracle"}
    every = [run for runs in rows.values() for run in runs]
    if any("entropy" not in run["curves"] for run in every):
        return []
    twice = all("by_day" in run["curves"] for run in every)
    lines = [
        [name, *(mean_and_sd(list(column)) for column in zip(*(kept(run, "student") for run in runs), strict=True))]
        for name, runs in rows.items()
    ]
    return [
        "### Choosing a step without labels\n",
        SELECTED.format(count=LOOKED_AT, looks=len(document["looks"])) + "The table is at dusk.\n" * twice,
        *table(["method", *KEPT], lines),
        shortfall(every, "student", ", at dusk" if twice else ""),
        *([shortfall(every, "by_day", ", by day")] if twice else []),
    ]


KEPT = ("last step", "best step", "lowest entropy", "highest information", "highest density")


def kept(run: Document, curve: str) -> list[float]:
    """The scores of a run on one set of images at the steps that `KEPT` names."""
    mious, curves = run["curves"][curve], run["curves"]

    def chosen(score: str, sign: int) -> float:
        steps = [i for i, value in enumerate(curves[score]) if value is not None]
        return float(mious[max(steps, key=lambda i: sign * curves[score][i])])

    by_score = (chosen("entropy", -1), chosen("information", 1), chosen("neighborhood_density", 1))
    return [mious[-1], max(mious), *by_score]


def shortfall(runs: Sequence[Document], curve: str, where: str) -> str:
    """How far the kept steps are below the best ones, in words."""
    differences = []
    for run in runs:
        scores = kept(run, curve)
        differences.append([100 * (max(run["curves"][curve]) - score) for score in scores])
    short = dict(zip(KEPT, map(statistics.mean, zip(*differences, strict=True)), strict=True))
    best = min(KEPT[2:], key=lambda name: short[name])
    count = f"these {len(runs)} runs" if len(runs) > 1 else "one run"
    return (
        f"In the mean over {count}{where}, the last step is {short['last step']:.2f} points below the "
        f"best one, and the chosen steps are {', '.join(f'{short[name]:.2f} ({name})' for name in KEPT[2:])} below it. "
        f"The best of these scores, {best}, gains {short['last step'] - short[best]:+.2f} points over keeping the last "
        "step; that it is the best was known only afterwards.\n"
    )


def from_scratch() -> list[str]:
    """The head of the part about the pairs that start from random weights."""
    scores = []
    for suite in TITLES.keys() - PRETRAINED.keys():
        if (document := read(suite)) is not None:
            rows = {name: mean_and_sd(mious(document["rows"], name)) for name in (*BASELINES, "dacs", "oracle")}
            scores.append(f"{TITLES[suite]}: " + ", ".join(f"{name} {score}" for name, score in rows.items()))
    return ["## Without pretrained weights\n", FROM_SCRATCH.format(scores="; ".join(sorted(scores)) or "not run yet")]


def class_table(document: Document) -> list[str]:
    rows = document["rows"]
    lines = [
        [
            name,
            *(
                mean_and_sd([run["last"]["student"]["per_class"][i] or 0.0 for run in entry["runs"]])
                for entry in rows.values()
            ),
        ]
        for i, name in enumerate(document["options"]["pair"]["classes"])
    ]
    lines.append(["**mIoU**", *(f"**{mean_and_sd(mious(rows, name))}**" for name in rows)])
    return table(["class", *rows], lines)


def watched(rows: Document) -> Document:
    return {name: entry for name, entry in rows.items() if "by_class" in entry}


def pseudo_label_table(rows: Document) -> list[str]:
    columns: dict[str, Callable[[Document], float]] = {
        "lambda": lambda run: last(run, "lambda"),
        "teacher-student agreement": lambda run: last(run, "agreement"),
        "divergence from the true shares": lambda run: last(run, "divergence"),
        "correct labels in the mixed batches": lambda run: last(run, "mixed_accuracy"),
        "mean recall": lambda run: statistics.mean(v for v in run["pseudo_labels"]["recall"] if v is not None),
    }
    lines = []
    for name, runs in ((name, entry["runs"]) for name, entry in watched(rows).items()):
        lost = [sum(v is not None and v < 0.01 for v in run["pseudo_labels"]["recall"]) for run in runs]
        cells = [mean_and_sd([column(run) for run in runs]) for column in columns.values()]
        lines.append([name, *cells, ", ".join(map(str, lost))])
    head = ["method", *columns, "classes with a recall under 1 %"]
    return ["Percent at the last step, the last column by seed:\n", *table(head, lines)]


def last(run: Document, curve: str) -> float:
    return float(run["curves"][curve][-1])


def precision_table(document: Document) -> list[str]:
    """Classes down, methods across: precision / recall (share)."""
    rows, shares = watched(document["rows"]), document["true_share"]

    def of_class(entry: Document, i: int) -> str:
        precision, recall, share = (percent(entry["by_class"][key][-1][i]) for key in ("precision", "recall", "share"))
        return f"{precision} / {recall} ({share})"

    return table(
        ["class", "true share", *rows],
        [
            [name, percent(shares[i]), *(of_class(entry, i) for entry in rows.values())]
            for i, name in enumerate(document["options"]["pair"]["classes"])
        ],
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def sensitivity() -> list[str]:
    document = read(SENSITIVITY)
    title = "## Sensitivity of DACS to its options\n"
    if document is None:
        return [title, f"Not run yet: `benchmarks/results/{SENSITIVITY}.json` does not exist.\n"]
    rows = document["rows"]
    words = ONE_AT_A_TIME.format(seeds=len(rows["dacs"]["runs"]), steps=document["options"]["steps"])
    named = [
        (option, value, "dacs" if variant == BASE else row_name(option, value))
        for option, values in OPTIONS.items()
        for value, variant in values.items()
    ]
    lines = [[option, value, *sensitivity_line(rows, name)] for option, value, name in named if name in rows]
    head = ["option", "value", "mIoU", "difference from the base", "verdict", "lambda at the end", "seeds"]
    picture = figure("sensitivity-miou.svg", "mIoU of every variant, a dot per seed")
    return [title, words, *table(head, lines, left=(0, 1, 4, 6)), picture, *remarks(SENSITIVITY)]


def sensitivity_line(rows: Document, name: str) -> list[str]:
    found = mious(rows, name)
    difference, verdict = "base", ""
    if name != "dacs":
        moved = [a - b for a, b in zip(found, mious(rows, "dacs"), strict=True)]
        difference, verdict = mean_and_sd(moved), clear(moved)
        difference = "+" * (not difference.startswith("-")) + difference
    return [
        mean_and_sd(found),
        difference,
        verdict,
        mean_and_sd([last(run, "lambda") for run in rows[name]["runs"]]),
        each(found),
    ]


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
