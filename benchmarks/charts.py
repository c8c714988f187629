"""Bar charts and line charts as SVG, written by hand: the figures of the docs without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

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
}  # Okabe and Ito's, which colour-blind readers can tell apart
PLAIN = "#7a9cc6"
INK, FAINT = "#222222", "#dddddd"


class Panel(NamedTuple):
    """One small plot: named series, each of one or several lines (seeds), whose mean is drawn thick."""

    title: str
    series: Mapping[str, Sequence[Sequence[float | None]]]
    limit: float = 1  # the top of the plot; what is above is drawn there
    level: float | None = None  # a dashed line: what the curves should reach


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """A whole document on white, with a title for those who cannot see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" role="img">'
    )
    body = [f"<title>{escape(title)}</title>", f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts]
    return "\n".join([head, *body, "</svg>", ""])


def text(x: float, y: float, words: str, *, size: float = 12, anchor: str = "start", weight: str = "normal") -> str:
    """Words at a point."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{INK}">{escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, color: str = FAINT, width: float = 1, dash: str = "") -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width:g}"'
        f"{dashes}/>"
    )


def bars(title: str, rows: Mapping[str, Sequence[float]], *, unit: str = "%") -> str:
    """Horizontal bars of the means, a dot for every seed, the mean in figures."""
    left, right, top, step = 10 + 7 * max(map(len, rows)), 70, 46, 30
    width, height = 720, top + step * len(rows) + 30
    plot = width - left - right
    limit = nice(max(max(values) for values in rows.values()))
    parts = [text(width / 2, 22, title, size=15, anchor="middle", weight="bold")]
    bottom = top + step * len(rows)
    for i in range(6):
        x = left + plot * i / 5
        parts += [line(x, top, x, bottom), text(x, bottom + 18, f"{limit * i / 5:g}", anchor="middle")]
    for i, (name, values) in enumerate(rows.items()):
        y, mean = top + step * i, sum(values) / len(values)
        length, color = plot * mean / limit, COLORS.get(name, PLAIN)
        place = f'x="{left:.1f}" y="{y + 5:.1f}" width="{length:.1f}" height="{step - 10}"'
        parts += [text(left - 8, y + 19, name, anchor="end"), f'<rect {place} fill="{color}" fill-opacity="0.55"/>']
        for k, value in enumerate(values):  # spread vertically, so that equal ones are seen
            dot = y + step / 2 + (k - (len(values) - 1) / 2) * min(3.5, 14 / len(values))
            parts.append(f'<circle cx="{left + plot * value / limit:.1f}" cy="{dot:.1f}" r="2.6" fill="{INK}"/>')
        parts.append(text(left + plot * max(*values, mean) / limit + 8, y + 19, f"{mean:.1f} {unit}"))
    parts.append(line(left, top, left, bottom, color=INK))
    return svg(width, height, parts, title)


def curves(title: str, steps: Sequence[int], panels: Sequence[Panel], *, columns: int) -> str:
    """Panels in rows, all over the steps, with one legend."""
    cell_width, cell_height, plot_width, plot_height = 230.0, 150.0, 180.0, 100.0
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = max(cell_width * columns + 20, 480)
    rows = -(-len(panels) // columns)
    parts = [text(width / 2, 22, title, size=15, anchor="middle", weight="bold")]
    x = width / 2 - sum(40 + 6.2 * len(name) for name in names) / 2
    for name in names:
        parts += [line(x, 40, x + 18, 40, color=COLORS.get(name, PLAIN), width=3), text(x + 22, 44, name)]
        x += 40 + 6.2 * len(name)
    for i, panel in enumerate(panels):
        left, top = 40 + cell_width * (i % columns), 76 + cell_height * (i // columns)
        parts += [text(left + plot_width / 2, top - 6, panel.title, anchor="middle")]
        for part in (0.0, 0.5, 1.0):
            y, tick = top + plot_height * (1 - part), f"{part * panel.limit:g}"
            parts += [line(left, y, left + plot_width, y), text(left - 5, y + 4, tick, size=10, anchor="end")]
        parts += [
            text(left, top + plot_height + 14, "0", size=10, anchor="middle"),
            text(left + plot_width, top + plot_height + 14, f"{steps[-1]}", size=10, anchor="middle"),
        ]
        if panel.level is not None:
            y = top + plot_height * (1 - panel.level / panel.limit)
            parts.append(line(left, y, left + plot_width, y, color=INK, dash="4 3"))
        for name, runs in panel.series.items():
            color = COLORS.get(name, PLAIN)
            for values, stroke in [*((run, 0.6) for run in runs if len(runs) > 1), (mean_of(runs), 2.0)]:
                points = [
                    (left + plot_width * step / steps[-1], top + plot_height * (1 - min(value / panel.limit, 1)))
                    for step, value in zip(steps, values, strict=True)
                    if value is not None
                ]
                parts.append(polyline(points, color, stroke))
    return svg(width, 80 + cell_height * rows, parts, title)


Points = Sequence[tuple[float, float]]


def growth(title: str, unit: str, panels: Mapping[str, Mapping[str, Points]]) -> str:
    """Panels side by side with one legend, both axes logarithmic and the vertical one the same in all of them."""
    plot_width, plot_height, top = 250.0, 190.0, 84.0
    width = 70 + (plot_width + 30) * len(panels)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    heights = [y for series in panels.values() for points in series.values() for _, y in points]
    low, high = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))
    parts = [text(width / 2, 22, title, size=15, anchor="middle", weight="bold")]
    x = width / 2 - sum(40 + 6.2 * len(name) for name in names) / 2
    for name in names:
        parts += [line(x, 44, x + 18, 44, color=COLORS.get(name, PLAIN), width=3), text(x + 22, 48, name)]
        x += 40 + 6.2 * len(name)
    for i, (axis, series) in enumerate(panels.items()):
        left, bottom = 60 + (plot_width + 30) * i, top + plot_height
        grown = sorted({x for points in series.values() for x, _ in points})
        first, last = math.log2(grown[0]), math.log2(grown[-1])
        parts.append(text(left + plot_width / 2, top - 8, f"{unit} by {axis}", anchor="middle"))
        for power in range(low, high + 1):
            y = bottom - plot_height * (power - low) / (high - low)
            parts.append(line(left, y, left + plot_width, y))
            if i == 0:
                parts.append(text(left - 6, y + 4, f"{10.0**power:g}", size=10, anchor="end"))
        for x, value, anchor in ((left, grown[0], "start"), (left + plot_width, grown[-1], "end")):
            parts.append(text(x, bottom + 14, f"{value:.0f}", size=10, anchor=anchor))
        for name, points in series.items():
            spots = [
                (
                    left + plot_width * (math.log2(x) - first) / (last - first),
                    bottom - plot_height * (math.log10(y) - low) / (high - low),
                )
                for x, y in points
            ]
            color = COLORS.get(name, PLAIN)
            parts.append(polyline(spots, color, 2.0))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in spots]
    return svg(width, top + plot_height + 30, parts, title)


def polyline(points: Sequence[tuple[float, float]], color: str, stroke: float) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{stroke:g}"/>'


def mean_of(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean line, where all runs have a number."""
    columns = zip(*runs, strict=True)
    return [
        None if any(value is None for value in column) else sum(v for v in column if v is not None) / len(column)
        for column in columns
    ]


def nice(value: float) -> float:
    """A round number, and not much more than the value, that five ticks divide well."""
    return next(limit for limit in (5, 10, 20, 25, 30, 40, 50, 60, 75, 80, 100) if value <= limit)
