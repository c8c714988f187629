"""Atomic, verified checkpoints: written to a temporary file, hashed, renamed into place, verified on loading."""

import hashlib
import operator
import os
import pickle
import re
import threading
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from crossmix._checks import check_int
from crossmix._files import damaged_part, refuse_bomb, whole_file, write_whole

__all__ = ["CheckpointError", "CheckpointStore"]

NAMES = r"best(_[a-z0-9_]*[a-z0-9])?"
OURS = rf"(step-\d+|{NAMES})\.pt"
_SAVING = threading.RLock()  # of all stores, so that one can be pickled; a signal may save in the midst of a save
LEFT_BEHIND = re.compile(rf"{OURS}(\.sha256)?\.tmp\.\d+")


class CheckpointError(RuntimeError):
    """Checkpoints exist, but none can be read; the message names the files and the reasons."""


class CheckpointStore:
    """The checkpoints of one run: the newest few and the best.

    A checkpoint is a file `step-<number>.pt`, with its SHA-256 in `step-<number>.pt.sha256`; the best one is `best.pt`.
    `torch.load(path, weights_only=True)` reads it. A checkpoint is valid if it matches its SHA-256 or, if the hash file
    is missing (after copying, say), if its parts match the checksums that torch stores in the file. Invalid checkpoints
    are never loaded, and neither is what holds code, or unpacks to far more than the file.

    Only one process at a time may save into a folder (see `FolderLock`); its threads take turns.

    Args:
        folder: The folder of the checkpoints, created on the first save.
        keep: How many of the newest valid checkpoints to keep, at least 2, so that there is a fallback if the newest is
            damaged. Damaged ones do not count.

    Raises:
        TypeError: If `keep` is not an int.
        ValueError: If `keep` is less than 2.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(tempfile.mkdtemp())
        >>> path = store.save(10, {"step": 10})
        >>> store.load_newest()
        {'step': 10}
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        check_int("keep", keep, least=2, hint="; a damaged checkpoint needs a predecessor")
        self.folder: Path = Path(folder)
        self.keep = keep

    @property
    def best(self) -> Path:
        """The path of the best checkpoint."""
        return self.folder / "best.pt"

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False, names: Collection[str] = ()) -> Path:
        """Write a checkpoint, delete the ones that are no longer kept, and return its path.

        This verifies the checkpoints that are kept, which takes a second or two per gigabyte.

        Args:
            step: Number of finished optimizer steps.
            state: Tensors, numbers, strings and containers of them: what `torch.load(weights_only=True)` reads.
            best: Whether to save it as `best.pt` as well.
            names: Further names, `best` or of the form `best_<measure>`: it is saved as `<name>.pt` as well, and
                replaces the one of that name.

        Raises:
            OSError: If writing fails. On a full disk the message states how many bytes are needed and free. Earlier
                checkpoints are untouched, and no partial file is left behind.
            TypeError: If `state` holds an object that could not be loaded again, or `step` is not an int. Nothing is
                written then.
            ValueError: If a name has another form, `step` is negative, or the folder has a valid checkpoint of a later
                step, which `load_newest` would return instead. Nothing is written then.
        """
        step = operator.index(step)
        check_int("step", step, least=0, hint="; it counts finished optimizer steps")
        for name in names:
            if not re.fullmatch(NAMES, name):
                raise ValueError(f"`names` must be 'best' or have the form 'best_<measure>', got {name!r}.")
        with _SAVING:
            return self._save(step, state, ["best", *names] if best else names)

    def _save(self, step: int, state: Mapping[str, Any], names: Collection[str]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        path = self.folder / f"step-{step:07d}.pt"
        for later in self._steps():
            if _step(later) > step and not isinstance(_loaded(later), str):
                raise ValueError(
                    f"`step` must not be before those in the folder, got {step}, but there is {later}; to go back, "
                    "delete the later ones, or use another folder."
                )
        _write(path, state)
        for name in dict.fromkeys(names):
            _write(self.folder / f"{name}.pt", state)
        whole = 0
        for one in reversed(self._steps()):
            if whole == self.keep:
                one.unlink()
                _hash_file(one).unlink(missing_ok=True)
            elif one == path or _problem(one) is None:
                whole += 1
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """Load the newest valid checkpoint to the CPU, or None before a save; warn of each newer, damaged one.

        Raises:
            CheckpointError: If there are checkpoints but none is valid.
        """
        problems: list[str] = []
        for path in reversed(self._steps()):
            found = _loaded(path)
            if not isinstance(found, str):
                for text in problems:
                    warnings.warn(f"{text}; loading {path.name} instead", stacklevel=2)
                return found
            problems.append(f"{path}: {found}")
        if problems:
            raise CheckpointError(f"No checkpoint can be read, and none is replaced: {'; '.join(problems)}.")
        return None

    def load_best(self) -> dict[str, Any] | None:
        """Load the best checkpoint to the CPU, or None if none was saved with `best=True`.

        Raises:
            CheckpointError: If it is damaged. The next `save` with `best=True` replaces it.
        """
        if not self.best.exists():
            return None
        found = _loaded(self.best)
        if isinstance(found, str):
            hint = "the next best checkpoint replaces it, until then use the newest"
            raise CheckpointError(f"{self.best}: {found}; {hint}.")
        return found

    def _steps(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
        return sorted(found, key=_step)

    def _clear(self) -> None:
        """Remove leftovers of killed writers: temporary files, and hashes without a checkpoint."""
        for path in self.folder.iterdir():
            alone = re.fullmatch(rf"{OURS}\.sha256", path.name) and not path.with_suffix("").exists()
            if alone or LEFT_BEHIND.fullmatch(path.name):
                path.unlink()


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


class _Hashing:
    """A writable file that counts bytes and, if it has an underlying file, hashes them and passes them on."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        self.size += len(data)
        if self.file is not None:
            self.file.write(data)
            self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: writes are not buffered here."""


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
            _refuse_objects(file)
            new = hashing.sha256.hexdigest()
            # Both hashes, so that an interruption at any point leaves a checkpoint, old or new, that matches one.
            write_whole(digest, "\n".join([new, *_hashes(path)[:1], ""]).encode())
    except BaseException:
        if not path.exists():
            digest.unlink(missing_ok=True)
        raise
    write_whole(digest, f"{new}\n".encode())


def _refuse_objects(file: BinaryIO) -> None:
    """Refuse a written checkpoint that `torch.load(weights_only=True)` would not read."""
    file.flush()
    found = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
    if found:
        names = ", ".join(sorted(found))
        raise TypeError(
            f"`state` must hold tensors, numbers, strings and containers of them only, got objects of {names}, which "
            "could not be loaded again; save their values, such as a module's `.state_dict()`."
        )


def _loaded(path: Path) -> dict[str, Any] | str:
    """The contents of a checkpoint, or why it is invalid: a hash that matches says nothing about who wrote both."""
    problem = _problem(path)
    if problem is not None:
        return problem
    try:
        state = _read(path)
    except OSError:  # says nothing about the file
        raise
    except pickle.UnpicklingError:  # whose text advises to trust the file
        return "it holds code or objects other than tensors, numbers, texts and containers, which were not run"
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's RuntimeError
            raise CheckpointError(f"{path}: it does not fit into memory; free some, or delete the file.") from error
        reason = re.split(r"\.\s|[;\n]", str(error))[0]
        return f"it is not a checkpoint ({type(error).__name__}: {reason})"
    return state if isinstance(state, dict) else f"it is not a checkpoint (a {type(state).__name__}, not a dict)"


def _read(path: Path) -> object:
    refuse_bomb(path)
    state: object = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _problem(path: Path) -> str | None:
    """Why a checkpoint is invalid, or None if it is valid."""
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
    """Check a file against the checksums that torch stores in it; None if they match."""
    try:
        part = damaged_part(path)
        if part is None:
            _read(path)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - zipfile and torch raise many types
        return "its sha256 file is missing, and it is cut off or damaged"
    return None if part is None else f"its sha256 file is missing, and its part {part} does not match its checksum"


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _hashes(path: Path) -> list[str]:
    """The hashes stored beside a file: one, or those of the new and the old file if the writer was killed late."""
    try:
        return _hash_file(path).read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return []
