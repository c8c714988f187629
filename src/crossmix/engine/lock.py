"""One run per folder: a lock that dies with its process."""

import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Self

try:
    import fcntl
except ImportError:  # Windows: an open file is lock enough there, it cannot be replaced
    fcntl = None  # type: ignore[assignment]

__all__ = ["BusyError", "FolderLock"]


class BusyError(RuntimeError):
    """Another process holds the folder; the message names both."""


class FolderLock:
    """Hold a folder for as long as a `with` block, or the process, lasts.

    The system drops the lock when the process ends in whatever way, so a crash leaves nothing to clean up. Processes
    forked from it, such as a loader's workers, which may outlive it, do not hold it.

    Args:
        folder: The folder; made where missing. The lock is a file `.lock` in it.

    Raises:
        BusyError: On entering, if another process holds it; the message names that process.

    Example:
        >>> import tempfile
        >>> with FolderLock(tempfile.mkdtemp()) as lock:
        ...     lock.path.name
        '.lock'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BusyError(
                f"{self.path.parent}: is in use by {holder}; wait for it to end, or choose another folder."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        self._file = file
        _held.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked process: close its copies of the files, which would keep the locks when their holder is gone."""
    for lock in _held:
        lock.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
