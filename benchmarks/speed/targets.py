"""Compare results with the project's targets: one line per claim."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    what: str
    unit: str
    ours: float
    baseline: float
    against: str  # name of the baseline
    ratio: float
    target: float | None = None  # target of the ratio
    at_least: bool = False  # whether the target is a lower rather than an upper bound

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        reached = self.ratio >= self.target if self.at_least else self.ratio <= self.target
        return f"{'>=' if self.at_least else '<='} {self.target:<5g} {'reached' if reached else 'MISSED'}"


def faster(what: str, ours: float, baseline: float, against: str, target: float) -> Line:
    """A speedup over the baseline, in milliseconds each, of at least `target`."""
    return Line(what, "ms", ours, baseline, against, baseline / ours, target, at_least=True)


def share(what: str, ours: float, baseline: float, against: str, target: float, *, unit: str = "ms") -> Line:
    """A ratio to the baseline of at most `target`."""
    return Line(what, unit, ours, baseline, against, ours / baseline, target)


def rate(what: str, ours: float, wanted: float, unit: str) -> Line:
    """A rate of at least `wanted`."""
    return Line(what, unit, ours, wanted, "target", ours / wanted, 1, at_least=True)


def times(rows: Any) -> dict[str, float]:  # noqa: ANN401 - as JSON has it
    return {name: row["median_ms"] for name, row in rows.items()}


def mixing(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401 - as JSON has it
    lines = []
    for result in results:
        rows, labels, n = result["rows"], result["labels"], result["batch"]
        time, what = times(rows), f"mix, N = {n}, {labels}"
        loop = 20 if cuda else 3.2 if labels == "int64" else 2.5
        lines += [
            faster(what, time["crossmix"], time["released loop"], "released loop", loop),
            faster(what, time["crossmix"], time["whole-batch unique"], "whole-batch unique", 30),
        ]
        for form, target in (("", 1.35), (" boxes", 1.5), (" blobs", 1.5), (" compiled", 1)):
            if f"crossmix{form}" in rows:
                name = f"{what},{form}" if form else what
                lines.append(share(name, time[f"crossmix{form}"], time["floor"], "floor", target))
        if cuda and n >= 32:
            best = max(rows[name]["share_of_copy"] for name in ("crossmix", "crossmix compiled") if name in rows)
            lines.append(Line(f"{what}, bandwidth", "of copy", best, 1, "copy", best, 0.8, at_least=True))
    return lines


def augment(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - the same on a GPU
    result = results[0]
    time, error = times(result["rows"]), result["error"]
    lines = []
    for form, target in (("eager", 0.35), ("compiled", 0.12)):
        what, name = f"augment, {form}", f"crossmix {form}"
        lines.append(share(what, time[name], time["kornia"], "kornia", target))
        lines.append(share(f"{what}, error", error[name], 1e-5, "target", 1, unit=""))
    return lines


def loss(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - the same on a GPU
    ours, plain = results["crossmix"], results["plain"]
    return [
        share("loss, time", ours["median_ms"], plain["median_ms"], "plain", 0.35),
        share("loss, memory", ours["peak_mb"], plain["peak_mb"], "plain", 0.25, unit="MB"),
        share("loss, gradient error", ours["gradient_error"], 1e-5, "target", 1, unit=""),
    ]


def teacher(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401 - as JSON has it
    time, names = times(results), ("MeanTeacher.update", "ema_update_")
    lines = [share(f"EMA, {name}", time[name], time["loop mul_/add_"], "loop mul_/add_", 0.85) for name in names]
    counted = [(name, results[name]["launches"]) for name in names if cuda and "launches" in results[name]]
    return lines + [share(f"EMA, {name}", count, 20, "target", 1, unit="launches") for name, count in counted]


def optimizer(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - the same on a GPU
    return [beside("optimizer, RepeatedSGD", times(results), "RepeatedSGD", "repeated foreach")]


def evaluation(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - no GPU in it
    return [beside("confusion matrix", times(results["rows"]), "ConfusionMatrix", "masked bincount")]


def beside(what: str, time: dict[str, float], ours: str, other: str) -> Line:
    """A ratio without a target."""
    return Line(what, "ms", time[ours], time[other], other, time[ours] / time[other])


def crops(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - no GPU in it
    lines = []
    for result in results["data_sets"]:
        rates, what = result["crops_per_second_by_workers"]["2"], f"input, {result['images']}"
        png, pillow = rates["PNG"], rates["Pillow"]
        lines += [
            rate(f"{what}, PNG", png, 35, "crops/s"),
            Line(f"{what}, PNG", "crops/s", png, pillow, "Pillow", png / pillow, 2, at_least=True),
            rate(f"{what}, cache", 1e3 / result["one_crop"]["cache"]["median_ms"], 1000, "crops/s"),
        ]
    return lines


def step(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401 - as JSON has it
    """The best form against the released style (if measured) and, on a GPU, against the target rate."""
    rows, time = results["rows"], times(results["rows"])
    best = min(time.keys() - {"updated once", "mic", "bf16, mic"}, key=time.__getitem__)  # those differ from the paper
    lines = [beside(f"step, {best}", time, best, "released style")] if "released style" in rows else []
    for mic, dacs in (("mic", "RepeatedSGD"), ("bf16, mic", "bf16")):
        if mic in rows and dacs in rows:
            lines.append(share(f"step, {mic}", time[mic], time[dacs], dacs, 1.45))
    return [*lines, rate(f"step, {best}", rows[best]["it_per_s"], 40, "it/s")] if cuda else lines


def memory(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - the same on a GPU
    """Memory of the paper's fp32 step against that of the paper's GPU."""
    if results["network"] != "resnet101" or "RepeatedSGD" not in results["rows"]:
        return []
    row = results["rows"]["RepeatedSGD"]
    return [share("step, fp32, memory", row.get("reserved_mb", row["peak_mb"]), 11_000, "11 GB", 1, unit="MB")]


def kernels(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - GPU only
    """All kernels of a step against the rate to reach."""
    return [
        share("step, captured, all kernels", sum(row["ms"] for row in results["kernels"].values()), 25, "40 it/s", 1)
    ]


def scaling(results: Any, *, cuda: bool) -> list[Line]:  # noqa: ANN401, ARG001 - the same on a GPU
    """Cost grows at most linearly with batch and pixels."""
    return [
        share(f"{one['operation']} by {one['axis']}", one["exponent_last"], 1, "linear", 1.1, unit="exponent")
        for one in results
        if one["axis"] != "classes"
    ]


LINES: dict[str, Callable[..., list[Line]]] = {
    "mixing": mixing,
    "augment": augment,
    "loss": loss,
    "teacher": teacher,
    "optimizer": optimizer,
    "evaluation": evaluation,
    "input": crops,
    "step": step,
    "step-compiled": step,
    "step-kernels": kernels,
    "step-memory": memory,
    "scaling": scaling,
}


def table(lines: Sequence[Line]) -> str:
    rows = [("what", "ours", "baseline", "", "ratio", "target")]
    for line in lines:
        ours, baseline = (f"{value:.4g} {line.unit}" for value in (line.ours, line.baseline))
        rows.append((line.what, ours, baseline, line.against, f"{line.ratio:.3f}", line.verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
