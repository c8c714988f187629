"""Generate the tables and figures of README.md and of the pages of results in docs/ from the result files.

    python -m benchmarks.publish            print them
    python -m benchmarks.publish --write    write the pages and the figures
    python -m benchmarks.publish --photographs CamVid --out FILE    draw the predictions beside their photographs

GPU tables are generated for the result files that exist.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.charts import growth
from benchmarks.speed.common import RESULTS, ROOT
from benchmarks.study import page, predictions
from benchmarks.study.expected import comparable, mious, seed_by_seed
from benchmarks.tables import cell, table

PRETRAINED, DAY_DUSK = f"ablation-{predictions.PAIR}", "ablation-day-dusk"
JITTER = ("dacs", "source + jitter")
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def is_there(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def demo() -> list[str]:
    document = read("demo")
    rows = []
    for run in document["runs"]:
        source, dacs = (100 * run[method]["miou"] for method in ("source", "dacs"))
        difference, seconds = f"{dacs - source:+.2f}", f"{run['seconds']:.0f}"
        rows.append([str(run["seed"]), f"{source:.2f}", f"{dacs:.2f}", difference, seconds])
    machine = f"{document['machine']['threads']} threads of {document['machine']['processor']}"
    return [
        f"mIoU in percent of the demo on held-out target scenes ({document['date']}, {machine};",
        "`python -m benchmarks.study demo --save`):",
        "",
        *table(["seed", "source-only", "DACS", "difference", "seconds"], rows, left=()),
        *jitter_alone(),
    ]


def jitter_alone() -> list[str]:
    """What the colour jitter gains without DACS, in the longer study of the same scenes."""
    rows = read("ablation-streetscenes")["rows"]
    scores = {name: 100 * statistics.mean(mious(rows, name)) for name in ("source", "source + jitter", "dacs")}
    source, jitter, dacs = (f"{score:.1f}" for score in scores.values())
    return [
        f"DACS also jitters the colours. In a longer study of these scenes, source-only scores {source}, with jitter",
        f"{jitter}, and DACS {dacs} (means over {len(rows['dacs']['runs'])} seeds; [results](docs/results.md)).",
        "",
    ]


def shift() -> list[str]:
    rows = read("shift")["rows"]
    means = {name: 100 * statistics.mean(run["miou"] for run in runs) for name, runs in rows.items()}
    count = len(rows["source on target"])
    best, low, own = (f"{means[name]:.1f} %" for name in ("target on target", "source on target", "source on source"))
    return [
        f"The two domains of StreetScenes are far apart. The same network scores {best} on the target",
        f"when trained on labelled target scenes, {low} when trained on source scenes, and {own} on",
        f"the source itself: means over {count} seeds (`python -m benchmarks.study shift --save`).",
        "",
    ]


def evidence() -> list[str]:
    """A short table of the pair with pretrained weights, and its figure."""
    main = {"source", "source + jitter", "dacs", "mic", "oracle"}
    rows = {name: entry for name, entry in read(PRETRAINED)["rows"].items() if name in main}
    lines = [
        f"mIoU in percent on photographs of streets, {page.seeds_of(rows)} each (±: standard deviation). A small",
        "network with ImageNet weights is trained on rendered scenes (`source`), on rendered scenes with jittered",
        "colours, or on rendered scenes and unlabelled photographs taken by day (`dacs`, `mic`). `oracle` is trained",
        "on the labels of these photographs; at dusk, which no method saw in training, it is no upper bound",
        "(`python -m benchmarks.study ablation --pair streets-camvid --camvid CamVid --finished --save`):",
        "",
        *table(
            ["photographs", *rows],
            [
                ["at dusk", *(cell(entry["runs"], "last", "student", "miou") for entry in rows.values())],
                ["by day", *(cell(entry["runs"], "by_day", "student", "miou") for entry in rows.values())],
            ],
        ),
    ]
    if predictions.are_there():
        lines += [f"![Label maps predicted by source and dacs](docs/results/{predictions.FIGURE})", ""]
    return [*lines, *in_words(rows), ""]


def in_words(rows: dict[str, Any]) -> list[str]:
    """What the table of evidence says, and the pair on which DACS gains nothing."""
    said = []
    if "mic" in rows and (by_day := page.with_scores_by_day(rows)) is not None:
        dusk, day = (f"{mean_difference(scores, 'mic', 'dacs'):+.1f}" for scores in (rows, by_day))
        said = [
            f"With the same seeds, `mic` differs from `dacs` by {dusk} points at dusk and {day} by day",
            f"({number_of_seeds(rows, 'mic', 'dacs')}); its decay and ignored rows are those for Cityscapes.",
        ]
    if is_there(DAY_DUSK):
        other = read(DAY_DUSK)["rows"]
        if comparable(other, JITTER):
            said += [
                "From CamVid by day to CamVid at dusk, `dacs` differs from `source + jitter` by",
                f"{mean_difference(other, *JITTER):+.1f} points ({number_of_seeds(other, *JITTER)}).",
            ]
    return [*said, "[Results](docs/results.md) lists all methods and seeds, and the expectations that were missed."]


def mean_difference(rows: dict[str, Any], high: str, low: str) -> float:
    """Points of mIoU between two rows, over the seeds that both have."""
    return 100 * statistics.mean(seed_by_seed(rows, high, low))


def number_of_seeds(rows: dict[str, Any], high: str, low: str) -> str:
    """How many seeds two rows have in common."""
    count = len(seed_by_seed(rows, high, low))
    return "1 seed" if count == 1 else f"{count} seeds"


def measured(document: dict[str, Any]) -> str:
    """Where and when a file was measured on a CPU."""
    machine = document["machine"]
    return f"{machine['processor']}, torch {machine['torch']}, {document['date']}"


def mixing() -> list[str]:
    document = read("mixing--cpu")
    columns = {
        "crossmix compiled": "compiled",
        "floor": "`torch.where` floor",
        "released loop": "released loop",
        "whole-batch unique": "whole-batch `unique`",
        "kornia transplant": "kornia transplant",
    }
    rows = []
    for result in document["results"]:
        median = {name: row["median_ms"] for name, row in result["rows"].items()}
        ratios = (f"{median[name] / median['crossmix']:.2f} x" for name in columns)
        rows.append([result["labels"], f"{median['crossmix']:.1f} ms", *ratios])
    return [
        "Time of the class masks and the mix of 8 x 3 x 512 x 512 images, labels and weights on one CPU thread, and of",
        "alternatives (`released loop`: our rewriting of that of the DACS code) as multiples of it",
        f"({measured(document)}; `python -m benchmarks.speed mixing --save`):",
        "",
        *table(["labels", "crossmix", *columns.values()], rows),
    ]


def against(name: str, rows: dict[str, Any], baseline: str) -> list[str]:
    """A table of a suite's rows with their ratios to the baseline."""
    base = rows[baseline]["median_ms"]
    return table(
        [name, "median", "spread (IQR)", f"times {baseline}"],
        [
            [candidate, f"{row['median_ms']:.2f} ms", f"{row['iqr_ms']:.2f} ms", f"{row['median_ms'] / base:.3f}"]
            for candidate, row in rows.items()
        ],
    )


def crops(result: dict[str, Any]) -> list[str]:
    height, width = result["size"]
    rates = result["crops_per_second_by_workers"]
    return table(
        [f"rendered scenes as {result['images']} at {height} x {width}, crops per second", *rates["0"]],
        [
            [f"{workers} workers", *(f"{rate:.1f} ({rate / row['Pillow']:.1f} x)" for rate in row.values())]
            for workers, row in rates.items()
        ],
    )


def of_step(result: dict[str, Any]) -> str:
    height, width = result["crop"]
    return f"one step, {result['network']}, {result['batch']} + {result['batch']} crops of {height} x {width}"


def step(document: dict[str, Any]) -> list[str]:
    result = document["results"]
    baseline, base = next((name, row["median_ms"]) for name, row in result["rows"].items())
    rows = [
        [
            name,
            f"{row['median_ms']:.1f} ms",
            f"{row['iqr_ms']:.1f} ms",
            f"{row['median_ms'] / base:.3f}",
            f"{row['it_per_s']:.1f}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['peak_mb']:.0f} MB" if "peak_mb" in row else "",
        ]
        for name, row in result["rows"].items()
    ]
    head = [of_step(result), "median", "spread (IQR)", f"times {baseline}", "it/s", "TFLOP/s", "peak memory"]
    rates = ", ".join(f"{rate:.3g} in {kind}" for kind, rate in result["matmul_tflop_per_s"].items())
    reached = f"; matrix products reach {rates} TFLOP/s" * bool(rates)
    return [*table(head, rows), f"A step is {result['tflop']:.3g} TFLOP{reached}.", "", *parts(result["parts"])]


def parts(found: dict[str, dict[str, float]]) -> list[str]:
    if not found:
        return []
    whole = {form: sum(times.values()) for form, times in found.items()}
    return table(
        ["parts of a step", *found],
        [
            [
                part,
                *(f"{times[part]:.2f} ms ({100 * times[part] / whole[form]:.1f} %)" for form, times in found.items()),
            ]
            for part in next(iter(found.values()))
        ],
    )


def memory(document: dict[str, Any]) -> list[str]:
    result = document["results"]
    peaks = ", ".join(f"{name} {row['peak_mb'] / 1e3:.2f} GB" for name, row in result["rows"].items())
    return [f"Peak memory of {of_step(result)}: {peaks}.", ""]


def scaling(document: dict[str, Any]) -> list[str]:
    axes = ("batch", "pixels", "classes")
    exponents = {
        (one["operation"], one["axis"]): f"{one['exponent_last']:.2f} ({one['exponent']:.2f})"
        for one in document["results"]
    }
    names = dict.fromkeys(name for name, _ in exponents)
    return table(
        ["cost grows with the power", *axes],
        [[name, *(exponents.get((name, axis), "") for axis in axes)] for name in names],
    )


def scaling_figure() -> str:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in read("scaling--cpu")["results"]:
        points = [(x, point["ns_per_pixel"]) for x, point in zip(one["grown"], one["points"], strict=True)]
        panels.setdefault(one["axis"], {})[one["operation"]] = points
    return growth("Cost per pixel on one CPU thread: level where the cost is in proportion", "ns per pixel", panels)


def mixing_on_gpu(document: dict[str, Any]) -> list[str]:
    """By batch and label type, with the share of a copy's bandwidth."""
    lines = []
    for result in document["results"]:
        rows = result["rows"]
        shares = (f"{name} {100 * row['share_of_copy']:.0f} %" for name, row in rows.items() if "share_of_copy" in row)
        lines += against(f"masks and mix, N = {result['batch']}, {result['labels']} labels", rows, "crossmix")
        lines += [f"Share of a copy's bandwidth: {', '.join(shares)}.", ""]
    return lines


def upsampled_loss(document: dict[str, Any]) -> list[str]:
    rows = document["results"]
    peaks = ", ".join(f"{name} {row['peak_mb']:.0f} MB" for name, row in rows.items() if "peak_mb" in row)
    return [*against("upsampling and loss", rows, "plain"), f"Peak memory on top of the inputs: {peaks}.", ""]


def teacher(document: dict[str, Any]) -> list[str]:
    rows = document["results"]
    launched = ", ".join(f"{name} {row['launches']}" for name, row in rows.items() if "launches" in row)
    said = [f"Launches of one update: {launched}.", ""] if launched else []
    return against("EMA of ResNet-101", rows, "loop mul_/add_") + said


def augment(document: dict[str, Any]) -> list[str]:
    return [
        text
        for result in document["results"]
        for text in against(f"StrongAugment, {result['what']}", result["rows"], "kornia")
    ]


def optimizer(document: dict[str, Any]) -> list[str]:
    return against("optimizer step, ResNet-101", document["results"], "plain foreach")


def kernels_on_gpu(document: dict[str, Any]) -> list[str]:
    """Where the time of a captured step goes."""
    rows = sorted(document["results"]["kernels"].items(), key=lambda item: -item[1]["ms"])
    rows.append(("all", {key: sum(row[key] for _, row in rows) for key in ("ms", "launches")}))
    return table(
        ["kernels of one captured step, bf16", "ms", "launches"],
        [[kind, f"{row['ms']:.2f}", f"{row['launches']:.0f}"] for kind, row in rows],
    )


GPU_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step": step,
    "step-compiled": step,
    "step-kernels": kernels_on_gpu,
    "step-memory": memory,
    "mixing": mixing_on_gpu,
    "augment": augment,
    "loss": upsampled_loss,
    "teacher": teacher,
    "optimizer": optimizer,
    "scaling": scaling,
}


def gpu() -> list[str]:
    lines: list[str] = []
    for suite, made in GPU_TABLES.items():
        if is_there(f"{suite}--cuda"):
            document = read(f"{suite}--cuda")
            machine, note = document["machine"], document.get("note", "")
            lines += [f"On {machine['gpu']}, torch {machine['torch']}, {document['date']}: {note}".rstrip(), ""]
            lines += made(document)
    return lines or ["No GPU has been measured yet.", ""]


def performance() -> str:
    document = read("mixing--cpu")
    lines = [f"On a CPU ({measured(document)}):", ""]
    for result in document["results"]:
        lines += against(f"masks and mix, {result['labels']} labels", result["rows"], "floor")
    lines += augment(read("augment--cpu"))
    lines += upsampled_loss(read("loss--cpu"))
    lines += teacher(read("teacher--cpu")) + optimizer(read("optimizer--cpu"))
    for result in read("input--cpu")["results"]["data_sets"]:
        lines += crops(result)
    lines += against("confusion matrix, 1024 x 2048", read("evaluation--cpu")["results"]["rows"], "ConfusionMatrix")
    lines += step(read("step--cpu"))
    if is_there("step-memory--cpu"):
        lines += memory(read("step-memory--cpu"))
    return "\n".join([*lines, *scaling(read("scaling--cpu")), *gpu()])


def reliability() -> str:
    document = read("reliability-nightly")
    machine, groups = document["machine"], document["groups"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("crossmix", "torch", "python"))
    rows = []
    for name, group in groups.items():
        figures = ", ".join(f"{what}: {count}" for what, count in group["figures"].items())
        wrong = "; ".join(group["wrong"]).replace("|", "\\|")
        rows.append([name, figures, wrong or "nothing", f"{group['seconds']}\N{NO-BREAK SPACE}s", group["date"]])
    lines = table(["group", "tried", "wrong", "time", "date"], rows, left=(0, 1, 2))
    head = f"The nightly profile, {versions}, on {machine['processor']}:"
    return "\n".join([head, "", *lines, *mutation()])


def mutation() -> list[str]:
    """The share of mutants that tests notice, and what they do not notice."""
    document = read("mutation")
    low, high = (f"{100 * share:.1f}" for share in document["interval_at_first"])
    number, first, killed = document["mutants"], document["killed_at_first"], document["killed"]
    torch = document["machine"]["torch"]
    rows = [[f"`{name}`".replace("|", "\\|"), reason] for name, reason in document["survivors"].items()]
    return [
        f"Of {number} mutants drawn at random from {document['all']}, the fast tests noticed {first}, which is",
        f"{100 * first / number:.1f} %; the 95 % interval is {low} to {high} % ({document['date']}, torch {torch},",
        f"lines of commit {document['commit'][:7]}). With tests written for some of the others they notice {killed}.",
        document["note"],
        "",
        *table(["what they do not notice", "why"], rows, left=(0, 1)),
    ]


def figures() -> str:
    pretrained = evidence() if is_there(PRETRAINED) else []
    return "\n".join([*pretrained, *demo(), *shift(), *mixing()])


PAGES = {
    ROOT / "README.md": figures,
    ROOT / "docs" / "performance.md": performance,
    ROOT / "docs" / "reliability.md": reliability,
}


def pictures() -> dict[Path, str]:
    """All figures as SVG, by path."""
    made = {ROOT / "docs" / "results" / name: content for name, content in page.figures().items()}
    return {ROOT / "docs" / "scaling.svg": scaling_figure(), **made}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the pages and the figures")
    parser.add_argument("--photographs", default="", metavar="DIR", help="data folder CamVid; needs --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the SVG file with photographs; do not distribute it")
    args = parser.parse_args()
    if bool(args.photographs) != bool(args.out):
        parser.error("--photographs and --out belong together")
    if args.out:
        args.out.write_text(predictions.figure(args.photographs), encoding="utf-8")
        return
    if not args.write:
        print("\n".join([*(made() for made in PAGES.values()), page.page()]))
        return
    for path, made in PAGES.items():
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n{made()}\n{END}{after}", encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page.page(), encoding="utf-8")
    for path, content in pictures().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
