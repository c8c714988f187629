"""Print the figures of README and docs/performance.md from the result files, or write them there with --write."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def read(name: str) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def demo() -> list[str]:
    """Both rows of the demo by seed."""
    document = read("demo--cpu")
    machine = f"{document['machine']['threads']} threads of {document['machine']['processor']}"
    lines = [
        f"The demo, {machine} (`python benchmarks/demo.py --save`), mIoU in percent on held-out target scenes:",
        "",
        "| seed | source-only | DACS | difference | seconds |",
        "|---:|---:|---:|---:|---:|",
    ]
    for run in document["runs"]:
        source, dacs = (100 * run[method]["miou"] for method in ("source", "dacs"))
        lines.append(f"| {run['seed']} | {source:.2f} | {dacs:.2f} | {dacs - source:+.2f} | {run['seconds']:.0f} |")
    return lines


def shift() -> list[str]:
    """What the two looks are apart."""
    rows = read("street_scenes_shift")["rows"]
    means = {name: 100 * statistics.mean(run["miou"] for run in runs) for name, runs in rows.items()}
    count = len(rows["source on target"])
    return [
        "StreetScenes' two looks are far apart. The same small network, with the same budget, scores",
        f"{means['target on target']:.1f} % on the target when trained on labelled target scenes and",
        f"{means['source on target']:.1f} % when trained on source scenes, which gets",
        f"{means['source on source']:.1f} % on the source; means of {count} seeds",
        "(`python benchmarks/street_scenes_shift.py --save`).",
    ]


def mixing() -> list[str]:
    """Class masks and the mix against the loop and the floor."""
    document = read("mixing--cpu")
    lines = [
        "Class masks and the mix of 8 x 3 x 512 x 512 images, labels and weights on one CPU thread, and what others",
        "take as multiples of it (`python benchmarks/mixing.py --save`):",
        "",
        "| labels | crossmix | `torch.where` floor | released loop | whole-batch `unique` | kornia transplant |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for result in document["results"]:
        median = {name: row["median_ms"] for name, row in result["rows"].items()}
        names = ("floor", "released loop", "whole-batch unique", "kornia transplant")
        ratios = " | ".join(f"{median[name] / median['crossmix']:.2f} x" for name in names)
        lines.append(f"| {result['labels']} | {median['crossmix']:.1f} ms | {ratios} |")
    return lines


def against(name: str, rows: dict[str, Any], baseline: str) -> list[str]:
    """A suite's rows as multiples of one of them."""
    lines = [f"| {name} | median | spread (IQR) | times {baseline} |", "|---|---:|---:|---:|"]
    for candidate, row in rows.items():
        ratio = row["median_ms"] / rows[baseline]["median_ms"]
        lines.append(f"| {candidate} | {row['median_ms']:.2f} ms | {row['iqr_ms']:.2f} ms | {ratio:.3f} |")
    return [*lines, ""]


def crops(result: dict[str, Any]) -> list[str]:
    """Crops per second by workers."""
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


def performance() -> str:
    """The tables of docs/performance.md."""
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
    return "\n".join(lines)


def figures() -> str:
    """The README's, as Markdown."""
    return "\n".join([*demo(), "", *shift(), "", *mixing(), ""])


PAGES = {ROOT / "README.md": figures, ROOT / "docs" / "performance.md": performance}


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for path, made in PAGES.items():
        if not args.write:
            print(made())
            continue
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n{made()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
