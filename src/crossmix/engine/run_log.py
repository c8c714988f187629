"""Append-only JSON Lines log of a training run, truncated to the checkpoint's step on resume."""

import json
import operator
import os
import warnings
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from crossmix._files import explained, write_whole

__all__ = ["RunLog"]


class RunLog:
    """A JSON Lines file with one record per logged step; every record has a `step` key.

    Args:
        path: The file. It and its parent folder are created on the first write.

    Example:
        >>> import tempfile
        >>> log = RunLog(Path(tempfile.mkdtemp()) / "log.jsonl")
        >>> log.write({"step": 1, "loss": 0.5})
        >>> log.read()
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = Path(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, JSON-serialisable and with an integer `step`.

        Raises:
            ValueError: If the record has no integer `step`, without which it could not be read; nothing is written.
            OSError: If writing fails. On a full disk the message states how many bytes are needed and free.
        """
        if not hasattr(record.get("step"), "__index__"):
            raise ValueError(
                f"`record` must have an integer `step`, got {record.get('step')!r}; add the step's number."
            )
        line = (json.dumps(record) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                _append(file, line)
        except OSError as error:
            raise explained(error, self.path, lambda: len(line)) from error

    def read(self) -> list[dict[str, Any]]:
        """Return all complete records.

        A last line truncated by a crash is ignored. Other invalid lines are skipped with a warning.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        records = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line or "{}")
                if line:
                    records.append({**record, "step": operator.index(record["step"])})
            except (ValueError, KeyError, TypeError, RecursionError):
                warnings.warn(f"{self.path}: line {number} is damaged and was skipped.", stacklevel=2)
        return records

    def cut(self, step: int) -> None:
        """Drop the records after `step`, before a run resumes from it.

        Raises:
            OSError: If writing fails; the log is then unchanged.
        """
        if self.path.exists():
            kept = [record for record in self.read() if record["step"] <= step]
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _append(file: FileIO, line: bytes) -> None:
    """Append a line, after a line that a crash cut off too; if only part is written, truncate the file again."""
    size, done = file.tell(), 0
    if size:
        file.seek(size - 1)
        line = b"\n" * (file.read(1) != b"\n") + line
    try:
        while done < len(line):
            done += file.write(line[done:])
    except OSError:
        file.truncate(size)
        raise
