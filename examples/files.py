"""Text files of a run, replaced whole."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: readers never see half of it, and an error names it."""
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):  # the folder may be gone
            aside.unlink()
        advice = f"{error.strerror}; check the folder and the disk space"
        raise OSError(error.errno, advice, str(path)) from error
