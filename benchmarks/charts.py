"""Figures of the docs: bars of means with a dot per seed, curves over training, scaling of cost, and pictures."""

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from torch import Tensor

mpl.use("svg")
COLORS = {
    "source": "#999999",
    "source + jitter": "#444444",
    "pseudo-label": "#e69f00",
    "classmix": "#56b4e9",
    "alignment": "#009e73",
    "dacs": "#d55e00",
    "oracle": "#0072b2",
    "mix": "#d55e00",
    "augment": "#0072b2",
    "loss": "#009e73",
    "pseudo-labels": "#e69f00",
}  # the Okabe-Ito palette, distinguishable for colour-blind readers
PLAIN = "#7a9cc6"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "svg.hashsalt": "crossmix",  # reproducible files
    "svg.fonttype": "none",  # keep text as text
    "font.family": "sans-serif",
    "figure.facecolor": "white",
}


class Panel(NamedTuple):
    """One small plot of named series. Each series has one or several lines (seeds), whose mean is drawn thick."""

    title: str
    series: Mapping[str, Sequence[Sequence[float | None]]]
    limit: float | None = 1  # upper limit of the axis, to which values are clipped; None fits the curves
    level: float | None = None  # a dashed reference line


class Picture(NamedTuple):
    """An image (3, H, W) uint8; an exact one, such as a label map, is shown without smoothing."""

    image: Tensor
    exact: bool = False


def bars(title: str, rows: Mapping[str, Sequence[float]], *, unit: str = "%") -> str:
    """Horizontal bars of the means, labelled with the mean, and a dot per seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(rows.items()):
            mean = sum(values) / len(values)
            axes.barh(i, mean, height=0.7, color=COLORS.get(name, PLAIN), alpha=0.55)
            spread = [i + 0.12 * (k - (len(values) - 1) / 2) for k in range(len(values))]  # equal values stay visible
            axes.plot(values, spread, "o", color="#222222", markersize=3)
            axes.annotate(
                f"{mean:.1f} {unit}", (max(*values, mean), i), (6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.12 * max(max(values) for values in rows.values()))
        axes.set_title(title)
        return _svg(figure, title, [title, rows])


def curves(title: str, steps: Sequence[int], panels: Sequence[Panel], *, columns: int) -> str:
    """A grid of panels with the steps as x axis and one legend."""
    count = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * columns, 0.9 + 1.6 * count), layout="constrained")
        grid = figure.subplots(count, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.axis("off")
                continue
            panel = panels[i]
            axes.set_title(panel.title, fontsize=9)
            if panel.level is not None:
                axes.axhline(panel.level, color="#222222", linestyle="--", linewidth=0.8)
            for name, runs in panel.series.items():
                color = COLORS.get(name, PLAIN)
                for values in runs if len(runs) > 1 else ():
                    axes.plot(steps, _gaps(values, panel.limit), color=color, linewidth=0.5)
                (handles[name],) = axes.plot(steps, _gaps(_mean(runs), panel.limit), color=color, linewidth=1.6)
            axes.set_ylim(0, panel.limit)
            axes.set_xlim(0, steps[-1])
        figure.suptitle(title, fontsize=11)
        _legend(figure, handles)
        return _svg(figure, title, [title, list(steps), panels])


def growth(title: str, unit: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """A row of log-log panels with a shared y axis and one legend."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, (axis, series) in zip(grid.flat, panels.items(), strict=True):
            axes.set(title=f"{unit} by {axis}", xscale="log", yscale="log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            for name, points in series.items():
                (handles[name],) = axes.plot(*zip(*points, strict=True), "o-", color=COLORS.get(name, PLAIN))
        figure.suptitle(title, fontsize=11)
        _legend(figure, handles)
        return _svg(figure, title, [title, panels])


def pictures(
    title: str,
    columns: Mapping[str, Sequence[Picture]],
    rows: Sequence[str],
    legend: Mapping[str, tuple[int, int, int]],
) -> str:
    """A grid of pictures of about one shape, and a legend of colours."""
    height, width = next(iter(columns.values()))[0].image.shape[-2:]
    inches = 7.0 / len(columns)
    with mpl.rc_context({**STYLE, "axes.grid": False, "svg.image_inline": True}):
        figure = Figure(figsize=(7.8, 1.0 + len(rows) * (inches * height / width + 0.05)), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for j, (name, column) in enumerate(columns.items()):
            grid[0, j].set_title(name, fontsize=9)
            for axes, picture in zip(grid[:, j], column, strict=True):
                smooth = "none" if picture.exact else "bilinear"
                axes.imshow(picture.image.permute(1, 2, 0).numpy(), interpolation=smooth, aspect="auto")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for axes, name in zip(grid[:, 0], rows, strict=True):
            axes.set_ylabel(name, fontsize=7)
        patches = [Patch(facecolor=(r / 255, g / 255, b / 255), label=name) for name, (r, g, b) in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=11)
        digests = {name: [_digest(picture) for picture in column] for name, column in columns.items()}
        return _svg(figure, title, [title, digests, rows, legend])


def fingerprint(data: object) -> str:
    """A hash of a figure's data. Unlike the SVG, it does not depend on the version of Matplotlib."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _digest(picture: Picture) -> str:
    return hashlib.sha256(picture.image.contiguous().numpy().tobytes()).hexdigest()


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)


def _svg(figure: Figure, title: str, data: object) -> str:
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata={"Title": title, "Description": f"data {fingerprint(data)}", "Date": None}
    )
    return file.getvalue()


def _mean(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean over runs, or None where a run has no value."""
    columns = zip(*runs, strict=True)
    return [
        None if any(v is None for v in column) else sum(v for v in column if v is not None) / len(column)
        for column in columns
    ]


def _gaps(values: Sequence[float | None], limit: float | None) -> list[float]:
    """Replace missing values by NaN, which leaves gaps, and clip values to the limit."""
    return [math.nan if value is None else min(value, limit or math.inf) for value in values]
