"""The paper's tables as data, to print beside one's own scores."""

import json
from pathlib import Path
from typing import Any

__all__ = ["paper_row", "paper_tables"]


def paper_tables() -> dict[str, Any]:
    """Tables 1 to 3 of the paper, IoU in percent: `{"table 1": {"title", "rows"}, ...}`."""
    tables: dict[str, Any] = json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))
    return tables


def paper_row(source: str, method: str) -> dict[str, Any] | None:
    """The paper's own row of a method, or None where it has none.

    Args:
        source: `"gta5"` or `"synthia"`.
        method: A name of `crossmix.recipes.METHODS`.
    """
    name = {
        "source": "Source",
        "pseudo-label": "Pseudo-labelling",
        "classmix": "Naive ClassMix",
        "alignment": "Distribution alignment",
        "dacs": "DACS",
    }[method]
    table = paper_tables()["table 2" if source == "synthia" else "table 3"]
    return next((row for row in table["rows"] if row["method"] == name), None)
