"""JSON that carries its own hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossmix._files import write_whole
from crossmix.datasets.sample import DataError

__all__ = ["read_sealed", "sealed", "write_sealed"]


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON whose first line holds the sha256 of all lines below, so that no byte can change unnoticed."""
    below = json.dumps(content, indent=1).removeprefix("{\n").encode() + b"\n"
    return _first_line(below) + below


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sealed file, whole or not at all."""
    write_whole(path, sealed(content))


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


def _first_line(below: bytes) -> bytes:
    return f'{{"sha256": "{hashlib.sha256(below).hexdigest()}",\n'.encode()
