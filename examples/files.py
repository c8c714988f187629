"""Text files of a run, replaced whole."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: readers never see half of it, and an error names it and says what to do.

    The target of a link is replaced, and into what is no file, such as `/dev/stdout`, the text is written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="replace")
        return
    path = path.resolve()
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")
        aside.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the folder may be gone
            aside.unlink()
        if isinstance(error, OSError):
            advice = f"{error.strerror}; free some space, or make its folder writable"
            raise OSError(error.errno, advice, str(path)) from error
        raise
