"""A run as one page: tables, curves, pictures and facts in a single HTML file."""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from crossmix.engine._chart import STYLES, Curve, chart
from crossmix.engine._page_style import document

__all__ = ["Report"]

Row = Sequence[str]


class Report:
    """An HTML page, put together from top to bottom, that needs no other file, no network and no JavaScript.

    Every text is escaped. Curves are drawn as SVG, pictures are embedded, and the page follows the light or dark scheme
    of whoever reads it.

    Args:
        title: The page's title and first heading.

    Example:
        >>> import tempfile
        >>> page = Report("DACS, seed 0")
        >>> page.heading("Scores")
        >>> page.table(["class", "IoU"], [["road", "89.90"], ["train", "0.00"]])
        >>> page.curves({"loss": {"source": ([1, 2, 3], [0.9, math.nan, 0.7]), "mixed": ([1, 2, 3], [0.5, 0.4, 0.4])}})
        >>> page.facts({"lr": 2.5e-4})
        >>> path = page.write(Path(tempfile.mkdtemp()) / "index.html")
        >>> path.read_text(encoding="utf-8").count("<svg viewBox=")
        1
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section.

        Args:
            text: Its heading.
        """
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a few sentences.

        Args:
            text: Plain text.
        """
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, header: Row, rows: Sequence[Row] | Mapping[str, Sequence[Row]]) -> None:
        """Add a table; a long one scrolls sideways below its first column.

        Args:
            header: Names of the columns.
            rows: As many texts each, of one or more lines; or groups of rows by title, the first set off.

        Raises:
            ValueError: If a row has another length than the header.
        """
        groups = rows if isinstance(rows, Mapping) else {"": rows}
        body = []
        for i, (title, group) in enumerate(groups.items()):
            body.append('<tbody class="first">' if i == 0 and len(groups) > 1 else "<tbody>")
            if title:
                body.append(f'<tr><th colspan="{len(header)}" scope="rowgroup">{escape(title)}</th></tr>')
            for row in group:
                if len(row) != len(header):
                    raise ValueError(
                        f"`rows` must have {len(header)} cells each, as the header, got {len(row)} in {list(row)}; "
                        "fill the empty ones with a text."
                    )
                cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
                body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
            body.append("</tbody>")
        names = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in header)
        kind = ' class="narrow"' if len(header) > 10 else ""
        self._parts.append(
            f'<div class="scroll"><table{kind}><thead><tr>{names}</tr></thead>{"".join(body)}</table></div>'
        )

    def curves(self, charts: Mapping[str, Mapping[str, Curve]]) -> None:
        """Add line charts side by side, each with a legend that says where its lines end.

        A line of more than 300 points is shown as 300 means of neighbours or fewer.

        Args:
            charts: By title, lines by name: steps and values of equal length. A value that is None, NaN or infinite is
                a gap.

        Raises:
            ValueError: If a line has not as many values as steps.
        """
        figures = []
        for title, lines in charts.items():
            for name, (steps, values) in lines.items():
                if len(steps) != len(values):
                    raise ValueError(
                        f"`charts` must have a value for each step, got {len(steps)} steps and {len(values)} values in "
                        f"{title!r}, {name!r}; use NaN where there is none."
                    )
            key = "".join(
                f'<li><svg class="s{i % STYLES}" viewBox="0 0 26 10" aria-hidden="true">'
                f'<polyline points="0,6 26,6"/></svg>{escape(name)} {_last(values)}</li>'
                for i, (name, (_, values)) in enumerate(lines.items())
            )
            figures.append(
                f"<figure><figcaption>{escape(title)}</figcaption>{chart(title, lines)}"
                f'<ul class="key">{key}</ul></figure>'
            )
        self._parts.append(f'<div class="charts">{"".join(figures)}</div>')

    def pictures(self, header: Row, rows: Sequence[Sequence[str | os.PathLike[str]]]) -> None:
        """Add rows of pictures under titles; they are embedded.

        Args:
            header: Titles of the columns.
            rows: As many PNG files each.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If it is no PNG file, or a row has another length than the header.
        """
        body = []
        for i, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"`rows` must have {len(header)} pictures each, as the header, got {len(row)}.")
            cells = [f'<td><img alt="{escape(name)}, {i + 1}" src="{_embedded(Path(path))}"></td>'
                     for name, path in zip(header, row, strict=True)]  # fmt: skip
            body.append(f"<tr>{''.join(cells)}</tr>")
        names = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
        self._parts.append(
            f'<div class="scroll"><table class="pictures" style="max-width: {21 * len(header)}rem">'
            f"<thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )

    def colors(self, colors: Mapping[str, tuple[int, int, int]]) -> None:
        """Add a legend of colours.

        Args:
            colors: RGB in 0..255 by name.
        """
        entries = "".join(
            f'<li><i style="background: rgb({int(r)} {int(g)} {int(b)})"></i>{escape(name)}</li>'
            for name, (r, g, b) in colors.items()
        )
        self._parts.append(f'<ul class="key">{entries}</ul>')

    def facts(self, values: Mapping[str, object]) -> None:
        """Add names and what they are, such as a configuration.

        Args:
            values: Anything by name; `str` makes it a text.
        """
        entries = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values.items()
        )
        self._parts.append(f"<dl>{entries}</dl>")

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; a reader never sees half of it.

        Args:
            path: The HTML file; its folder must exist.

        Returns:
            The path.
        """
        path = Path(path)
        aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        aside.write_text(document(self.title, "\n".join(self._parts)), encoding="utf-8", errors="replace")
        aside.replace(path)
        return path


def _last(values: Sequence[float | None]) -> str:
    """Where a line ends."""
    last = next((value for value in reversed(values) if value is not None and math.isfinite(value)), None)
    return "" if last is None else f"{last:.4g}"


def _embedded(path: Path) -> str:
    """A PNG file as a URL that holds it."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path}: expected a PNG file; write one with crossmix.datasets.write_png.")
    return "data:image/png;base64," + base64.b64encode(data).decode()
