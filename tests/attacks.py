"""Files as an attacker writes them."""

import io
import pickle
import zipfile

import torch
from torch import Tensor


class Calls:
    """Calls a function when unpickled."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


def written(state: object, *, legacy: bool = False) -> bytes:
    """A file of torch."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def packed(state: object, kind: str) -> bytes:
    """A file of torch's present or former form, or a plain pickle."""
    return pickle.dumps(state, protocol=2) if kind == "pickle" else written(state, legacy=kind == "legacy")


def bomb(tensor: Tensor) -> bytes:
    """A file of weights whose parts are compressed to nearly nothing."""
    return recompressed(written({"w": tensor}))


def recompressed(whole: bytes) -> bytes:
    """A file of torch, its parts compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return file.getvalue()


def shared(levels: int, width: int, innermost: dict[str, Tensor]) -> dict[str, object]:
    """Few dicts, each many times in the next one: there are very many paths."""
    found: dict[str, object] = dict(innermost)
    for _ in range(levels):
        found = {f"a{i}": found for i in range(width)}
    return found
