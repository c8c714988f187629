"""A run's log: one JSON object per line, appended and flushed, cut back when a run resumes."""

import json
import os
import warnings
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from crossmix._files import explained, write_whole

__all__ = ["RunLog"]


class RunLog:
    """`log.jsonl`: records with a `step` key.

    Args:
        path: The file; it and its folder are made when the first record is written.

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

        Raises:
            OSError: If it cannot be written, on a full disk with the bytes needed and free.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                _append(file, line)
        except OSError as error:
            raise explained(error, self.path, lambda: len(line)) from error

    def read(self) -> list[dict[str, Any]]:
        """Return all whole records.

        A last line that was cut off by a crash is left out, and so, with a warning, are lines that are no records.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        records = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line or "{}")
                if line:
                    records.append({**record, "step": record["step"]})
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"{self.path}: line {number} is damaged, and left out.", stacklevel=2)
        return records

    def cut(self, step: int) -> None:
        """Drop the records of later steps, before a run goes on from `step`.

        Args:
            step: The last step to keep.

        Raises:
            OSError: If it cannot be written; what was there is untouched then.
        """
        if self.path.exists():
            kept = [record for record in self.read() if record["step"] <= step]
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _append(file: FileIO, line: bytes) -> None:
    """Write all of a line or nothing."""
    size, done = file.tell(), 0
    try:
        while done < len(line):
            done += file.write(line[done:])
    except OSError:
        file.truncate(size)
        raise
