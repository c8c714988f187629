"""Files that are either whole or not there, and JSON that carries its own hash."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from crossmix.datasets.sample import DataError

__all__ = ["read_sealed", "sealed", "sync_folder", "whole_file", "write_sealed"]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, put in its place when all of it is on the disk."""
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON whose first line holds the sha256 of all lines below, so that no byte can change unnoticed."""
    below = json.dumps(content, indent=1).removeprefix("{\n").encode() + b"\n"
    return _first_line(below) + below


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sealed file, whole or not at all."""
    with whole_file(path) as file:
        file.write(sealed(content))


def read_sealed(path: Path, *, fix: str = "delete it and open the cache again") -> dict[str, Any]:
    """Read a sealed file, refusing one that is not as it was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {fix}.") from error
    below = data.partition(b"\n")[2]
    if data != _first_line(below) + below:
        raise DataError(
            f"{path}: its contents do not match its sha256, so it is damaged, or no file of a cache; {fix}."
        )
    content: dict[str, Any] = json.loads(data)
    del content["sha256"]
    return content


def sync_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut, where the platform can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(below: bytes) -> bytes:
    return f'{{"sha256": "{hashlib.sha256(below).hexdigest()}",\n'.encode()
