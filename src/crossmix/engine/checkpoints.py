"""Checkpoints that are either whole or not there: written aside, hashed, renamed into place, verified when read."""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "CheckpointStore"]


class CheckpointError(RuntimeError):
    """No checkpoint could be read, though there are some; the message names the files and the reasons."""


class CheckpointStore:
    """The checkpoints of one run: the last few and the best.

    A checkpoint is a file `step-<number>.pt` with its sha256 beside it in `step-<number>.pt.sha256`. It is loadable
    with `torch.load(path, weights_only=True)`.

    Args:
        folder: Where they are; made when the first one is saved.
        keep: How many of the newest to keep, at least 2, so that a damaged one has a predecessor.

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

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> Path:
        """Write a checkpoint, then drop those that are no longer kept.

        Args:
            step: Finished optimizer steps.
            state: Tensors, numbers, strings and containers of them.
            best: Whether to keep it as `best.pt` too.

        Returns:
            The file.

        Raises:
            OSError: If it cannot be written; earlier checkpoints are untouched then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:07d}.pt"
        self._write(path, state)
        if best:
            self._write(self.folder / "best.pt", state)
        for old in self._steps()[: -self.keep]:
            old.unlink()
            _hash_file(old).unlink(missing_ok=True)
        for stale in self.folder.glob("*.tmp.*"):
            stale.unlink()
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
            problem = self._problem(path)
            if problem is None:
                for text in problems:
                    warnings.warn(f"{text}; taking {path.name} instead", stacklevel=2)
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return state
            problems.append(f"{path}: {problem}")
        if problems:
            raise CheckpointError(f"No checkpoint can be read, and none is replaced: {'; '.join(problems)}.")
        return None

    def _steps(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint is not whole, or None."""
        try:
            expected = _hash_file(path).read_text().strip()
        except FileNotFoundError:
            return "its sha256 file is missing"
        return None if _sha256(path) == expected else "its contents do not match its sha256"

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            digest = _hash_file(path).with_name(f"{path.name}.sha256.tmp.{os.getpid()}")
            digest.write_text(_sha256(aside) + "\n")
            digest.replace(_hash_file(path))
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(self.folder)


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves survive a power cut, where the platform can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
