"""Generate the tables and figures of README.md, docs/performance.md and docs/results.md from the result files.

    python -m benchmarks.publish            print them
    python -m benchmarks.publish --write    write the pages and the figures

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
from benchmarks.study import page
from benchmarks.study.collected import mean_and_sd

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def demo() -> list[str]:
    document = read("demo")
    machine = f"{document['machine']['threads']} threads of {document['machine']['processor']}"
    lines = [
        f"mIoU in percent of the demo on held-out target scenes ({document['date']}, {machine};",
        "`python -m benchmarks.study demo --save`):",
        "",
        "| seed | source-only | DACS | difference | seconds |",
        "|---:|---:|---:|---:|---:|",
    ]
    for run in document["runs"]:
        source, dacs = (100 * run[method]["miou"] for method in ("source", "dacs"))
        lines.append(f"| {run['seed']} | {source:.2f} | {dacs:.2f} | {dacs - source:+.2f} | {run['seconds']:.0f} |")
    return lines


def shift() -> list[str]:
    rows = read("shift")["rows"]
    means = {name: 100 * statistics.mean(run["miou"] for run in runs) for name, runs in rows.items()}
    count = len(rows["source on target"])
    best, low, own = (f"{means[name]:.1f} %" for name in ("target on target", "source on target", "source on source"))
    return [
        f"The two domains of StreetScenes are far apart. The same network scores {best} on the target",
        f"when trained on labelled target scenes, {low} when trained on source scenes, and {own} on",
        f"the source itself: means over {count} seeds (`python -m benchmarks.study shift --save`).",
    ]


def evidence() -> list[str]:
    pairs = {"StreetScenes": read("ablation-streetscenes"), "CamVid, day to dusk": read("ablation-camvid")}
    seeds = min(len(entry["runs"]) for document in pairs.values() for entry in document["rows"].values())
    lines = [
        f"mIoU in percent, {seeds} seeds each: the paper's ablation, source-only with the colour jitter of DACS, and",
        "an oracle. [Results](docs/results.md) lists all seeds, missed expectations, pseudo-label statistics, and",
        "the options that matter (`python -m benchmarks.study ablation --save`, also with `--pair camvid`):",
        "",
        f"| pair | {' | '.join(pairs['StreetScenes']['rows'])} |",
        "|---" + "|---:" * len(pairs["StreetScenes"]["rows"]) + "|",
    ]
    for name, document in pairs.items():
        scores = [[run["last"]["student"]["miou"] for run in entry["runs"]] for entry in document["rows"].values()]
        lines.append(f"| {name} | {' | '.join(map(mean_and_sd, scores))} |")
    runs = read("causes-camvid")["rows"]["dacs, threshold 0.968"]["runs"]
    strict = mean_and_sd([run["last"]["student"]["miou"] for run in runs])
    return [
        *lines,
        "",
        "Both pairs use the hyperparameters of StreetScenes. On CamVid the threshold of 0.5 costs DACS its lead:",
        f"with the 0.968 of the paper's code it scores {strict}, {len(runs)} seeds",
        "(`python -m benchmarks.study causes --pair camvid --save`).",
    ]


def mixing() -> list[str]:
    document = read("mixing--cpu")
    columns = {
        "crossmix compiled": "compiled",
        "floor": "`torch.where` floor",
        "released loop": "released loop",
        "whole-batch unique": "whole-batch `unique`",
        "kornia transplant": "kornia transplant",
    }
    columns = {name: title for name, title in columns.items() if name in document["results"][0]["rows"]}
    lines = [
        "Time of the class masks and the mix of 8 x 3 x 512 x 512 images, labels and weights on one CPU thread, and of",
        "alternatives as multiples of it (`python -m benchmarks.speed mixing --save`):",
        "",
        f"| labels | crossmix | {' | '.join(columns.values())} |",
        "|---|---:" + "|---:" * len(columns) + "|",
    ]
    for result in document["results"]:
        median = {name: row["median_ms"] for name, row in result["rows"].items()}
        ratios = " | ".join(f"{median[name] / median['crossmix']:.2f} x" for name in columns)
        lines.append(f"| {result['labels']} | {median['crossmix']:.1f} ms | {ratios} |")
    return lines


def against(name: str, rows: dict[str, Any], baseline: str) -> list[str]:
    """A table of a suite's rows with their ratios to the baseline."""
    lines = [f"| {name} | median | spread (IQR) | times {baseline} |", "|---|---:|---:|---:|"]
    for candidate, row in rows.items():
        ratio = row["median_ms"] / rows[baseline]["median_ms"]
        lines.append(f"| {candidate} | {row['median_ms']:.2f} ms | {row['iqr_ms']:.2f} ms | {ratio:.3f} |")
    return [*lines, ""]


def crops(result: dict[str, Any]) -> list[str]:
    height, width = result["size"]
    rates = result["crops_per_second_by_workers"]
    lines = [
        f"| {result['images']} at {height} x {width}, crops per second | {' | '.join(rates['0'])} |",
        "|---" + "|---:" * len(rates["0"]) + "|",
    ]
    for workers, row in rates.items():
        cells = [f"{rate:.1f} ({rate / row['Pillow']:.1f} x)" for rate in row.values()]
        lines.append(f"| {workers} workers | {' | '.join(cells)} |")
    return [*lines, ""]


def step(document: dict[str, Any]) -> list[str]:
    result = document["results"]
    rows, (height, width) = result["rows"], result["crop"]
    baseline = next(iter(rows))
    what = f"{result['network']}, {result['batch']} + {result['batch']} crops of {height} x {width}"
    lines = [
        f"| one step, {what} | median | spread (IQR) | times {baseline} | it/s | TFLOP/s | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        cells = (
            f"{row['median_ms']:.1f} ms",
            f"{row['iqr_ms']:.1f} ms",
            f"{row['median_ms'] / rows[baseline]['median_ms']:.3f}",
            f"{row['it_per_s']:.1f}",
            f"{row['tflop_per_s']:.3g}",
            f"{row['peak_mb']:.0f} MB" if "peak_mb" in row else "",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rates = ", ".join(f"{rate:.3g} in {kind}" for kind, rate in result["matmul_tflop_per_s"].items())
    reached = f"; matrix products reach {rates} TFLOP/s" * bool(rates)
    lines += ["", f"A step is {result['tflop']:.3g} TFLOP{reached}.", ""]
    return lines + (parts(result["parts"]) if result["parts"] else [])


def parts(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| parts of a step | {' | '.join(found)} |", "|---" + "|---:" * len(found) + "|"]
    for part in next(iter(found.values())):
        cells = [f"{times[part]:.2f} ms ({100 * times[part] / sum(times.values()):.1f} %)" for times in found.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return [*lines, ""]


def memory(document: dict[str, Any]) -> list[str]:
    result = document["results"]
    height, width = result["crop"]
    what = f"{result['network']}, {result['batch']} + {result['batch']} crops of {height} x {width}"
    peaks = ", ".join(f"{name} {row['peak_mb'] / 1e3:.2f} GB" for name, row in result["rows"].items())
    return [f"Peak memory of one step, {what}: {peaks}.", ""]


def scaling(document: dict[str, Any]) -> list[str]:
    lines = [
        "| cost grows with the power | batch | pixels | classes |",
        "|---|---:|---:|---:|",
    ]
    series = {(one["operation"], one["axis"]): one for one in document["results"]}
    for name in dict.fromkeys(name for name, _ in series):
        found = [series.get((name, axis)) for axis in ("batch", "pixels", "classes")]
        cells = ["" if one is None else f"{one['exponent_last']:.2f} ({one['exponent']:.2f})" for one in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def scaling_figure() -> str:
    document = read("scaling--cpu")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in document["results"]:
        points = [(x, point["ns_per_pixel"]) for x, point in zip(one["grown"], one["points"], strict=True)]
        panels.setdefault(one["axis"], {})[one["operation"]] = points
    return growth("Cost per pixel on one CPU thread: level where the cost is in proportion", "ns per pixel", panels)


def mixing_on_gpu(document: dict[str, Any]) -> list[str]:
    """By batch and label type, with the share of a copy's bandwidth."""
    lines = []
    for result in document["results"]:
        rows = result["rows"]
        lines += against(f"masks and mix, N = {result['batch']}, {result['labels']} labels", rows, "crossmix")[:-1]
        shares = (f"{name} {100 * row['share_of_copy']:.0f} %" for name, row in rows.items() if "share_of_copy" in row)
        lines += ["", f"Share of a copy's bandwidth: {', '.join(shares)}.", ""]
    return lines


def teacher_on_gpu(document: dict[str, Any]) -> list[str]:
    rows = document["results"]
    launched = ", ".join(f"{name} {row['launches']}" for name, row in rows.items() if "launches" in row)
    said = [f"Launches of one update: {launched}.", ""] if launched else []
    return against("EMA of ResNet-101", rows, "loop mul_/add_") + said


def augment_on_gpu(document: dict[str, Any]) -> list[str]:
    return [
        text
        for result in document["results"]
        for text in against(f"StrongAugment, {result['what']}", result["rows"], "kornia")
    ]


def kernels_on_gpu(document: dict[str, Any]) -> list[str]:
    """Where the time of a captured step goes."""
    rows = document["results"]["kernels"]
    ranked = sorted(rows.items(), key=lambda item: -item[1]["ms"])
    lines = [f"| {kind} | {row['ms']:.2f} | {row['launches']:.0f} |" for kind, row in ranked]
    whole = (
        f"| all | {sum(row['ms'] for row in rows.values()):.2f} | {sum(row['launches'] for row in rows.values()):.0f} |"
    )
    return ["| kernels of one captured step, bf16 | ms | launches |", "|---|---:|---:|", *lines, whole, ""]


GPU_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step": step,
    "step-compiled": step,
    "step-whole": step,
    "step-kernels": kernels_on_gpu,
    "step-memory": memory,
    "mixing": mixing_on_gpu,
    "augment": augment_on_gpu,
    "loss": lambda document: against("upsampling and loss", document["results"], "plain"),
    "teacher": teacher_on_gpu,
    "optimizer": lambda document: against("optimizer step, ResNet-101", document["results"], "plain foreach"),
    "scaling": scaling,
}


def gpu() -> list[str]:
    lines: list[str] = []
    for suite, table in GPU_TABLES.items():
        if (RESULTS / f"{suite}--cuda.json").exists():
            document = read(f"{suite}--cuda")
            machine, note = document["machine"], document.get("note", "")
            lines += [f"On {machine['gpu']}, torch {machine['torch']}, {document['date']}: {note}".rstrip(), ""]
            lines += table(document)
    return lines or ["No GPU has been measured yet.", ""]


def performance() -> str:
    lines = []
    for result in read("mixing--cpu")["results"]:
        lines += against(f"masks and mix, {result['labels']} labels", result["rows"], "floor")
    for result in read("augment--cpu")["results"]:
        lines += against(f"StrongAugment, {result['what']}", result["rows"], "kornia")
    loss = read("loss--cpu")["results"]
    lines += against("upsampling and loss", loss, "plain")
    peaks = ", ".join(f"{name} {row['peak_mb']:.0f} MB" for name, row in loss.items())
    lines += [f"Peak memory on top of the inputs: {peaks}.", ""]
    lines += against("EMA of ResNet-101", read("teacher--cpu")["results"], "loop mul_/add_")
    lines += against("optimizer step, ResNet-101", read("optimizer--cpu")["results"], "plain foreach")
    for result in read("input--cpu")["results"]["data_sets"]:
        lines += crops(result)
    lines += against("confusion matrix, 1024 x 2048", read("evaluation--cpu")["results"]["rows"], "ConfusionMatrix")
    lines += step(read("step--cpu"))
    if (RESULTS / "step-memory--cpu.json").exists():
        lines += memory(read("step-memory--cpu"))
    lines += scaling(read("scaling--cpu"))
    return "\n".join([*lines, *gpu()])


def figures() -> str:
    return "\n".join([*demo(), "", *shift(), "", *evidence(), "", *mixing(), ""])


PAGES = {ROOT / "README.md": figures, ROOT / "docs" / "performance.md": performance}


def pictures() -> dict[Path, str]:
    """All figures as SVG, by path."""
    made = {ROOT / "docs" / "results" / name: content for name, content in page.figures().items()}
    return {ROOT / "docs" / "scaling.svg": scaling_figure(), **made}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the pages and the figures")
    if not parser.parse_args().write:
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
