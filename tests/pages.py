"""Reports, read back."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Elements with their texts; every element that begins ends, in order, and ids are unique."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        text = path.read_text(encoding="utf-8")
        self.feed(text)
        self.close()
        assert not self.open
        assert not re.search(r"https?:|@import|<script|<link|<iframe|\bon\w+=", text.replace("http-equiv", ""))
        assert all(address.startswith("#") for address in re.findall(r"\burl\((.*?)\)", text))
        assert all(
            link.startswith(("#", "data:image/png")) for name in ("href", "src") for link in self.values("", name)
        )
        assert max(Counter(self.values("", "id")).values(), default=1) == 1
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in self.values("meta", "content")
        table = text[text.find("<table") : text.find("</table>")]
        self.rows: dict[str, list[str]] = {}  # of the first table by their first cell; of equal ones the first
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
            first, *cells = re.findall(r"<t[hd][^>]*>(?:<span>)?(.*?)(?:</span>)?</t[hd]>", row, re.DOTALL)
            self.rows.setdefault(first, cells)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for parent, text in self.texts if parent == tag and text.strip()]

    def values(self, tag: str, name: str) -> list[str]:
        return [found[name] or "" for kind, found in self.elements if kind in {tag or kind} and name in found]
