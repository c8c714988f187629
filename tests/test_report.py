"""The report: well-formed, escaped, whole in one file, and its curves where arithmetic puts them."""

import base64
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from crossmix.datasets import write_png
from crossmix.engine import Report

VOID = {"meta", "img"}
NASTY = """<script>alert("1")</script>&'"</style>"""


class Page(HTMLParser):
    """Elements with their texts; every element that begins ends, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for parent, text in self.texts if parent == tag]

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for kind, attributes in self.elements if kind == tag and name in attributes]


def written(page: Report, tmp_path: Path) -> Page:
    return Page(page.write(tmp_path / "index.html").read_text(encoding="utf-8"))


def test_report__is_one_file_without_script_or_network(tmp_path: Path) -> None:
    write_png(tmp_path / "p.png", torch.zeros(3, 2, 4, dtype=torch.uint8))
    page = Report("Run")
    page.heading("Scores")
    page.paragraph("Some words.")
    page.table(["class", "IoU"], [["road", "89.90\n±0.10"]])
    page.table(["class", "IoU"], {"": [["road", "1"]], "others": [["road", "2"]]})
    page.curves({"loss": {"loss": ([1, 2], [3.0, 4.0])}})
    page.pictures(["image", "truth"], [[tmp_path / "p.png", tmp_path / "p.png"]])
    page.colors({"road": (128, 64, 128)})
    page.facts({"lr": 2.5e-4, "cache": None})
    assert page.write(str(tmp_path / "index.html")) == tmp_path / "index.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "p.png"]  # nothing is left aside
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert not re.search(r"https?:|@import|\burl\(|<script|<link|\bon\w+=", text.replace("http-equiv", ""))
    assert parsed.values("meta", "content")[0] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sources = parsed.values("img", "src")
    assert len(sources) == 2
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == (tmp_path / "p.png").read_bytes()
    assert parsed.values("img", "alt") == ["image, 1", "truth, 1"]
    assert parsed.of("td") == ["89.90\n±0.10", "1", "2"]
    assert parsed.values("tbody", "class") == ["first"]  # of groups only
    assert (parsed.of("title")[0], parsed.of("h1"), parsed.of("h2")) == ("Run", ["Run"], ["Scores"])
    assert (parsed.of("dt"), parsed.of("dd")) == (["lr", "cache"], ["0.00025", "None"])


def test_report__escapes_every_text(tmp_path: Path) -> None:
    write_png(tmp_path / "p.png", torch.zeros(3, 2, 4, dtype=torch.uint8))
    page = Report(NASTY)
    page.heading(NASTY)
    page.paragraph(NASTY)
    page.table([NASTY, NASTY], {NASTY: [[NASTY, NASTY]]})
    page.curves({NASTY: {NASTY: ([1], [2.0])}})
    page.pictures([NASTY], [[tmp_path / "p.png"]])
    page.colors({NASTY: (1, 2, 3)})
    page.facts({NASTY: NASTY})
    parsed = written(page, tmp_path)
    assert "script" not in {tag for tag, _ in parsed.elements}
    counts = {"title": 2, "h1": 1, "h2": 1, "p": 1, "span": 2, "th": 3, "td": 1, "figcaption": 1, "dt": 1, "dd": 1}
    for tag, count in counts.items():
        assert len([text for text in parsed.of(tag) if NASTY in text]) == count, tag
    assert len([text for text in parsed.of("li") if NASTY in text]) == 2
    assert parsed.values("svg", "aria-label") == [NASTY]
    assert parsed.values("img", "alt") == [f"{NASTY}, 1"]


def test_report__text_that_utf8_cannot_hold_does_not_lose_the_page(tmp_path: Path) -> None:
    page = Report("name \udcff of a file")
    assert written(page, tmp_path).of("h1") == ["name ? of a file"]


def axes(parsed: Page, up: list[float], across: list[float]) -> Callable[[float, float], tuple[float, float]]:
    """Where a number belongs on screen, from the marks of the first and the last tick of each axis."""
    paths = parsed.values("path", "d")
    rows = [float(found[1]) for d in paths if (found := re.fullmatch(r"M[\d.]+ ([\d.]+)H[\d.]+", d))]
    columns = [float(found[1]) for d in paths if (found := re.fullmatch(r"M([\d.]+) [\d.]+v4", d))]
    assert len(rows) == len(up)
    assert len(columns) == len(across)

    def place(step: float, value: float) -> tuple[float, float]:
        x = columns[0] + (columns[-1] - columns[0]) * (step - across[0]) / (across[-1] - across[0])
        return x, rows[0] + (rows[-1] - rows[0]) * (value - up[0]) / (up[-1] - up[0])

    return place


def points(text: str) -> list[float]:
    return [float(number) for number in re.split(r"[ ,]", text)]


def test_curves__points_are_where_the_ticks_say(tmp_path: Path) -> None:
    page = Report("Run")
    line, dot = {25: 0.5, 50: 4.5, 100: 2.5}, (50, 1.0)
    page.curves({"loss": {"a": (list(line), list(line.values())), "b": ([dot[0]], [dot[1]])}})
    parsed = written(page, tmp_path)
    up, across = [0, 1, 2, 3, 4, 5], [0, 20, 40, 60, 80, 100]
    assert parsed.of("text") == [*map(str, up), *map(str, across)]
    place = axes(parsed, up, across)
    want = [place(*point) for point in line.items()]
    rounded = {"abs": 0.11, "rel": 0}  # a tenth of a pixel
    assert points(parsed.values("polyline", "points")[0]) == pytest.approx([n for xy in want for n in xy], **rounded)
    for axis, name in enumerate(("cx", "cy")):
        marks = [float(mark) for mark in parsed.values("circle", name)]
        assert marks == pytest.approx([xy[axis] for xy in [*want, place(*dot)]], **rounded)
    (left, bottom), (right, top) = place(0, 0), place(100, 5)
    assert left < right
    assert top < bottom  # larger is higher
    assert parsed.of("li") == ["a 2.5", "b 1"]
    assert parsed.values("g", "class") == ["s0", "s1"]
    assert "a, 50: 4.5" in parsed.of("title")


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, -math.inf, 1e301])
def test_curves__what_is_no_number_is_a_gap(gap: float | None, tmp_path: Path) -> None:
    page = Report("Run")
    page.curves({"loss": {"a": ([1, 2, 3, 4, 5, 6], [1.0, 2.0, gap, 1.5, gap, gap])}})
    parsed = written(page, tmp_path)
    drawn, key = parsed.values("polyline", "points")
    assert len(drawn.split()) == 2
    assert key == "0,6 26,6"  # the legend's
    assert len(parsed.values("circle", "cx")) == 3
    if gap != 1e301:
        assert parsed.of("li") == ["a 1.5"]


def test_curves__nothing_and_constants(tmp_path: Path) -> None:
    page = Report("Run")
    page.curves({})
    page.curves({"empty": {}, "none": {"a": ([], []), "b": ([1], [math.nan])}})
    parsed = written(page, tmp_path)
    assert parsed.of("text") == ["nothing was recorded"] * 2
    assert parsed.of("li") == ["a ", "b "]
    for value in (3.0, 0.0, -2.0, 5e-324):
        page = Report("Run")
        page.curves({"same": {"a": ([0, 10], [value, value])}})
        parsed = written(page, tmp_path)
        frame = next(d for d in parsed.values("path", "d") if "V" in d)  # down the left side, along the bottom
        left, top, bottom, right = map(float, re.findall(r"[\d.]+", frame))
        middle = (top + bottom) / 2
        assert points(parsed.values("polyline", "points")[0]) == [left, middle, right, middle]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 2.5e-4], ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4"]),
        ([0.0, 12500.0], ["0", "2,500", "5,000", "7,500", "10,000", "12,500"]),
        ([-1.0, 1.0], ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        ([0.2, 0.21], ["0.200", "0.202", "0.204", "0.206", "0.208", "0.210"]),
        ([0.0, 3e9], ["0", "1e9", "2e9", "3e9"]),
    ],
)
def test_curves__ticks_are_told_apart(values: list[float], ticks: list[str], tmp_path: Path) -> None:
    page = Report("Run")
    page.curves({"a": {"a": ([0, 1], values)}})
    assert written(page, tmp_path).of("text")[: len(ticks)] == ticks


def test_curves__long_lines_are_means_of_neighbours(tmp_path: Path) -> None:
    page = Report("Run")
    steps = list(range(1, 601))
    page.curves({"a": {"a": (steps, [float(step % 2) for step in steps]), "b": ([0, 600], [0.0, 1.0])}})
    parsed = written(page, tmp_path)
    ticks = [float(text) for text in parsed.of("text")]
    split = ticks.index(0, 1)  # from there on the steps
    place = axes(parsed, ticks[:split], ticks[split:])
    drawn = points(parsed.values("polyline", "points")[0])
    # Pairs of steps, 1 and 2 first: the mean of their values lies in the middle.
    assert drawn == pytest.approx([n for i in range(300) for n in place(2 * i + 1.5, 0.5)], abs=0.11, rel=0)


def test_report__refuses_what_does_not_fit(tmp_path: Path) -> None:
    page = Report("Run")
    with pytest.raises(ValueError, match=r"must have 2 cells each, as the header, got 1 in \['road'\]"):
        page.table(["class", "IoU"], [["road"]])
    with pytest.raises(ValueError, match="got 2 steps and 1 values in 'loss', 'a'"):
        page.curves({"loss": {"a": ([1, 2], [1.0])}})
    with pytest.raises(ValueError, match="must have 2 pictures each, as the header, got 1"):
        page.pictures(["a", "b"], [[tmp_path / "none.png"]])
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"x\.png: expected a PNG file"):
        page.pictures(["a"], [[tmp_path / "x.png"]])
    with pytest.raises(FileNotFoundError):
        page.pictures(["a"], [[tmp_path / "none.png"]])
    with pytest.raises(FileNotFoundError):
        page.write(tmp_path / "nowhere" / "index.html")
