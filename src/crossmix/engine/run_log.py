"""A run's log: one JSON object per line, appended and flushed, cut back when a run resumes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RunLog"]


class RunLog:
    """`log.jsonl`: records with a `step` key.

    Args:
        path: The file; made when the first record is written.

    Example:
        >>> import tempfile
        >>> log = RunLog(Path(tempfile.mkdtemp()) / "log.jsonl")
        >>> log.write({"step": 1, "loss": 0.5})
        >>> log.read()
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Args:
            record: JSON-serialisable; holds `step`.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole records; a last line that was cut off by a crash is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def cut(self, step: int) -> None:
        """Drop the records of later steps, before a run goes on from `step`.

        Args:
            step: The last step to keep.
        """
        kept = [record for record in self.read() if record["step"] <= step]
        aside = self.path.with_name(f"{self.path.name}.tmp.{os.getpid()}")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        aside.replace(self.path)
