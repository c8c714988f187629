"""Text files of a run, replaced whole."""

from pathlib import Path

from crossmix._files import write_whole

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: readers never see half of it, and an error names it and says what to do.

    The target of a link is replaced, and into what is no file, such as `/dev/stdout`, the text is written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="replace")
    else:
        write_whole(path.resolve(), text.encode("utf-8", "replace"))
