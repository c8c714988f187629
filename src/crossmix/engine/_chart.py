"""A line chart as an SVG element: axes, ticks and lines with gaps. Colours and dashes come from the page's style."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["STYLES", "chart"]

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 30
STYLES = 8
"""How many lines the page's style can tell apart."""
MOST_POINTS = 300
"""A line of more is averaged down: it could not be told apart, and would make a page of megabytes."""
DOTS = 40
"""Up to so many points are marked."""

LARGEST = 1e300
"""Above, a difference could overflow; NaN is not below it either."""

Curve = tuple[Sequence[float], Sequence[float | None]]
Point = tuple[float, float]


class Axis(NamedTuple):
    """Where numbers are, on screen: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    step: float  # between ticks

    def place(self, value: float) -> float:
        """The coordinate of a number."""
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """Multiples of the step, from end to end."""
        for i in range(math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9) + 1):
            yield i * self.step


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    """Draw lines over one pair of axes.

    Args:
        title: What a screen reader says.
        curves: Steps and values by name. A value that is None or not finite is a gap.

    Returns:
        An SVG element; without a single finite value, one that says so.
    """
    lines = [_averaged(*curve) for curve in curves.values()]
    points = [point for line in lines for part in line for point in part]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    if not points:
        parts.append(f'<text class="mid" x="{WIDTH / 2:g}" y="{HEIGHT / 2:g}">nothing was recorded</text>')
        return "".join([*parts, "</svg>"])
    xs, ys = zip(*points, strict=True)
    across = _axis(min(0.0, *xs), max(xs), LEFT, WIDTH - RIGHT, whole=False)
    up = _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, whole=True)
    for tick in up.ticks():
        y = up.place(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{_text(tick, up.step)}</text>')
    for tick in across.ticks():
        x = across.place(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{_text(tick, across.step)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for i, (name, line) in enumerate(zip(curves, lines, strict=True)):
        parts.append(_line(name, line, across, up, i % STYLES))
    return "".join([*parts, "</svg>"])


def _line(name: str, line: list[list[Point]], across: Axis, up: Axis, style: int) -> str:
    """Its parts between gaps; a part of one point is a dot, and few points are all marked, with their numbers."""
    marked = sum(map(len, line)) <= DOTS
    drawn = [f'<g class="s{style}">']
    for part in line:
        places = [(f"{across.place(step):.1f}", f"{up.place(value):.1f}") for step, value in part]
        if len(part) > 1:
            drawn.append(f'<polyline points="{" ".join(map(",".join, places))}"/>')
        for (step, value), (x, y) in zip(part, places, strict=True):
            if marked or len(part) == 1:
                words = escape(f"{name}, {step:g}: {value:.4g}")
                drawn.append(f'<circle cx="{x}" cy="{y}" r="2.5"><title>{words}</title></circle>')
    return "".join([*drawn, "</g>"])


def _averaged(steps: Sequence[float], values: Sequence[float | None]) -> list[list[Point]]:
    """A line's parts between gaps. Of many points, means of equally many neighbours, those that are numbers."""
    size = -(-len(steps) // MOST_POINTS) or 1
    parts: list[list[Point]] = [[]]
    for i in range(0, len(steps), size):
        near = [
            (step, value)
            for step, value in zip(steps[i : i + size], values[i : i + size], strict=True)
            if value is not None and abs(value) < LARGEST
        ]
        if near:
            parts[-1].append((math.fsum(x for x, _ in near) / len(near), math.fsum(y for _, y in near) / len(near)))
        else:
            parts.append([])
    return [part for part in parts if part]


def _axis(low: float, high: float, start: float, end: float, *, whole: bool) -> Axis:
    """About five ticks at 1, 2, 2.5 or 5 times a power of ten; with `whole` the axis ends at ticks."""
    if high - low <= max(1e-6 * max(abs(low), abs(high)), 1 / LARGEST):  # a constant, in the middle
        margin = abs(high) / 2 or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= (high - low) / 5 * (1 - 1e-9))
    if whole:
        low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    return Axis(low, high, start, end, step)


def _text(value: float, step: float) -> str:
    """A tick's number with the digits that tell it from its neighbours."""
    if value == 0:
        return "0"
    if not 1e-3 <= step < 1e6:
        digits = max(2, math.ceil(math.log10(abs(value) / step)) + 1)
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{float(mantissa):.{digits + 1}g}e{int(exponent)}"
    digits = next(n for n in range(5) if abs(round(step, n) - step) < step * 1e-6)
    return f"{value:,.{digits}f}"
