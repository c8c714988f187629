"""Checkpoints that are either whole or not there: written aside, hashed, renamed into place, verified when read."""

import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from crossmix._files import damaged_part, whole_file, write_whole

__all__ = ["CheckpointError", "CheckpointStore"]

OURS = r"(step-\d+|best)\.pt"
LEFT_BEHIND = re.compile(rf"{OURS}(\.sha256)?\.tmp\.\d+")


class CheckpointError(RuntimeError):
    """No checkpoint could be read, though there are some; the message names the files and the reasons."""


class CheckpointStore:
    """The checkpoints of one run: the last few and the best.

    A checkpoint is a file `step-<number>.pt` with its sha256 beside it in `step-<number>.pt.sha256`, and the best one
    `best.pt`. It is loadable with `torch.load(path, weights_only=True)`. It is whole if it matches its sha256; copied
    without it, if its parts match the checksums that torch writes into the file. Nothing else is ever loaded.

    One process at a time may save into a folder (see `FolderLock`).

    Args:
        folder: Where they are; made when the first one is saved.
        keep: How many of the newest whole ones to keep, at least 2, so that one that comes to be damaged has a
            predecessor. A damaged one takes nobody's place.

    Raises:
        ValueError: If `keep` is less than 2.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(tempfile.mkdtemp())
        >>> path = store.save(10, {"step": 10})
        >>> store.load_newest()
        {'step': 10}
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"`keep` must be at least 2, so that a damaged checkpoint has a predecessor, got {keep}.")
        self.folder = Path(folder)
        self.keep = keep

    @property
    def best(self) -> Path:
        """The file of the best one."""
        return self.folder / "best.pt"

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> Path:
        """Write a checkpoint, then drop those that are no longer kept.

        The ones that are kept are verified for that: reading a gigabyte takes a second or two.

        Args:
            step: Finished optimizer steps.
            state: Tensors, numbers, strings and containers of them.
            best: Whether to keep it as `best.pt` too.

        Returns:
            The file.

        Raises:
            OSError: If it cannot be written, on a full disk with the bytes needed and free; earlier checkpoints are
                untouched then, and nothing is left of it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        path = self.folder / f"step-{step:07d}.pt"
        _write(path, state)
        if best:
            _write(self.best, state)
        whole = 0
        for one in reversed(self._steps()):
            if whole == self.keep:
                one.unlink()
                _hash_file(one).unlink(missing_ok=True)
            elif one == path or _problem(one) is None:
                whole += 1
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole, warning of newer ones that are not.

        Returns:
            Its state on the CPU, or None where nothing was ever saved.

        Raises:
            CheckpointError: If there are checkpoints but none is whole.
        """
        problems: list[str] = []
        for path in reversed(self._steps()):
            problem = _problem(path)
            if problem is None:
                for text in problems:
                    warnings.warn(f"{text}; taking {path.name} instead", stacklevel=2)
                return _read(path)
            problems.append(f"{path}: {problem}")
        if problems:
            raise CheckpointError(f"No checkpoint can be read, and none is replaced: {'; '.join(problems)}.")
        return None

    def load_best(self) -> dict[str, Any] | None:
        """Read the best checkpoint.

        Returns:
            Its state on the CPU, or None where none was saved as the best.

        Raises:
            CheckpointError: If it is damaged; the next one that is saved as the best replaces it.
        """
        if not self.best.exists():
            return None
        problem = _problem(self.best)
        if problem is not None:
            raise CheckpointError(
                f"{self.best}: {problem}; the next best one replaces it, until then take the newest of {self.folder}."
            )
        return _read(self.best)

    def _steps(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))

    def _clear(self) -> None:
        """Remove what writers that were killed have left, before more is written."""
        for path in self.folder.iterdir():
            alone = re.fullmatch(rf"{OURS}\.sha256", path.name) and not path.with_suffix("").exists()
            if alone or LEFT_BEHIND.fullmatch(path.name):
                path.unlink()


class _Hashing:
    """A file to write that hashes and counts what passes, on its way to another file where there is one."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        count = len(data) if self.file is None else self.file.write(data)
        self.size += count
        if self.file is not None:
            self.sha256.update(data)
        return count

    def flush(self) -> None:
        """Nothing waits here."""


def _write(path: Path, state: Mapping[str, Any]) -> None:
    def size() -> int:
        counting = _Hashing()
        torch.save(dict(state), counting)  # type: ignore[arg-type]
        return counting.size

    digest = _hash_file(path)
    try:
        with whole_file(path, needed=size) as file:
            hashing = _Hashing(file)
            torch.save(dict(state), hashing)  # type: ignore[arg-type]
            new = hashing.sha256.hexdigest()
            # Whenever this is cut short, the file that is in place then is whole: the old one as well as the new.
            write_whole(digest, "\n".join([new, *_hashes(path)[:1], ""]).encode())
    except BaseException:
        if not path.exists():
            digest.unlink(missing_ok=True)
        raise
    write_whole(digest, f"{new}\n".encode())


def _read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _problem(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        hashes = _hashes(path)
        if not hashes:
            return _damage(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if digest in hashes else "its contents do not match its sha256"


def _damage(path: Path) -> str | None:
    """What the checksums in a file of torch say, or None where all is well."""
    try:
        part = damaged_part(path)
        if part is None:
            _read(path)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, struct.error, zlib.error):
        return "its sha256 file is missing, and it is cut off or damaged"
    return None if part is None else f"its sha256 file is missing, and its part {part} does not match its checksum"


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _hashes(path: Path) -> list[str]:
    """The hashes beside a file: one, or, if its writer was killed at the last moment, those of the new and the old."""
    try:
        return _hash_file(path).read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return []
