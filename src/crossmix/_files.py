"""Atomic file writes and folder locks."""

import contextlib
import errno
import os
import platform
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
FOLDER = 0x10
"""The attribute that marks a part of a zip file as a folder."""
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems without locks, such as some NFS, Lustre and FUSE mounts."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, needed: Callable[[], int] | None = None) -> Iterator[BinaryIO]:
    """Write a file atomically: it appears, complete and synced to disk, when the block ends.

    The content goes to `<name>.tmp.<pid>` in the same folder, which is synced and renamed. If the block or the disk
    fails, the temporary file is removed and an existing file stays untouched. Only a killed process leaves a temporary
    file behind; the owner of the folder has to remove it. The OSError of a failed write names `path` and, on a full
    disk, the bytes free and `needed()` for the complete file.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder may be gone or read-only
            aside.unlink()
        cause: BaseException | None = error
        while type(cause) is RuntimeError:  # torch wraps OSError in RuntimeError
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError) and cause.filename in {None, str(aside)}:  # not about another file
            raise explained(cause, path, needed) from error
        raise
    sync_folder(path.parent)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of this content atomically; see `whole_file`."""
    with whole_file(path, needed=lambda: len(content)) as file:
        file.write(content)


def damaged_part(path: str | os.PathLike[str]) -> str | None:
    """The name of a damaged part of a zip file, or None. `torch.load` does not verify the checksums in its files.

    The directory at the end of the file has no checksum. If it marks a part as a folder, torch reads no data for that
    part and returns a tensor of uninitialised memory. Torch itself writes no attributes; other programs, which identify
    themselves in the file, write permissions. A damaged directory raises `zipfile.BadZipFile`, and so does a bomb.
    """
    refuse_bomb(path)
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.external_attr & (FOLDER if part.create_system else ~0) and not part.is_dir():
                return part.filename
        return archive.testzip()


def refuse_bomb(path: str | os.PathLike[str]) -> None:
    """Raise `zipfile.BadZipFile` if a zip file would unpack to far more than it: tensors do not compress, bombs do."""
    with zipfile.ZipFile(path) as archive:
        whole, packed = sum(part.file_size for part in archive.infolist()), Path(path).stat().st_size
    if whole > 2 * packed:
        raise zipfile.BadZipFile(f"its parts claim {amount(whole)}, the file has {amount(packed)}")


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a power cut, where platform and file system support it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, *WITHOUT_LOCKS}:
            raise
    finally:
        os.close(handle)


def amount(count: int) -> str:
    """Format a number of bytes for display."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def explained(error: OSError, path: Path, needed: Callable[[], int] | None = None) -> OSError:
    """Rebuild a write error so that it names the intended file and says what to do; see `whole_file`."""
    text = error.strerror or str(error)
    if error.errno in FULL:
        room = [] if needed is None else [f"{amount(needed())} are needed"]
        if error.errno == errno.ENOSPC:  # free disk space says nothing about a quota
            with contextlib.suppress(OSError):
                room.append(f"{amount(shutil.disk_usage(path.parent).free)} are free")
        text += f" ({', '.join(room)}); free some space, existing files are untouched"
    elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        text += "; make its folder writable, or choose another one"
    return OSError(error.errno, text, str(path))


class BusyError(RuntimeError):
    """Another process has locked the folder; the message names both."""


class FolderLock:
    """Lock a folder for the duration of a `with` block.

    The operating system releases the lock when the process ends, however it ends. Forked processes, such as data loader
    workers, do not hold it. On a file system without locks, such as some NFS and Lustre mounts, the block runs
    unlocked, with a warning.

    Args:
        folder: The folder, created if missing. The lock is the file `.lock` in it; `.lock.holder` names the holder.
        waiting: If given, called with a text that names the holder of a folder in use, to wait instead of raising.

    Raises:
        BusyError: On entering, if another process holds the lock and `waiting` is not given.
        ImportError: On entering, if the package filelock is missing or too old.
        OSError: On entering, if the folder is not writable.

    Example:
        >>> import tempfile
        >>> with FolderLock(tempfile.mkdtemp()) as lock:
        ...     lock.path.name
        '.lock'
    """

    def __init__(self, folder: str | os.PathLike[str], *, waiting: Callable[[str], object] | None = None) -> None:
        self.path: Path = Path(folder) / ".lock"
        self._holder = self.path.with_name(".lock.holder")
        self._waiting = waiting
        self._lock: Any = None
        self._process = 0

    def __enter__(self) -> Self:
        filelock = _filelock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._process = os.getpid()
        lock = filelock.FileLock(self.path, fallback_to_soft=False, thread_local=False)
        try:
            self._acquire(lock, filelock.Timeout)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            warnings.warn(
                f"{self.path.parent}: its file system has no locks ({error.strerror}); continuing without one, so make "
                "sure that only one process uses this folder.",
                stacklevel=2,
            )
            return self
        self._lock = lock
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # informative only: the lock is held in any case
            self._holder.write_text(f"process {self._process} on {platform.node()} since {since}\n", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and self._process == os.getpid():  # a forked process must not release it
            with contextlib.suppress(OSError):
                self._holder.unlink()
            self._lock.release()
        self._lock = None

    def _acquire(self, lock: Any, timeout: type[Exception]) -> None:  # noqa: ANN401 - a filelock.FileLock
        try:
            lock.acquire(timeout=0)
        except timeout:
            try:
                holder = self._holder.read_text(encoding="utf-8").strip()
            except OSError:
                holder = ""
            text = f"{self.path.parent}: is in use by {holder or 'another process'}"
            if self._waiting is None:
                raise BusyError(f"{text}; wait for it to end, or choose another folder.") from None
            self._waiting(text)
            lock.acquire(timeout=-1, poll_interval=0.2)


def _filelock() -> Any:  # noqa: ANN401 - a module
    """Import filelock lazily: it is an optional dependency."""
    advice = "locking a folder needs filelock 3.30 or newer; install it with `pip install -U filelock`."
    try:
        import filelock  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.msg}: {advice}", name="filelock") from error
    if [int(part) for part in filelock.__version__.split(".")[:2]] < [3, 30]:
        # Older ones take a file system without locks for a busy lock, and let forked processes keep the lock.
        raise ImportError(f"filelock is {filelock.__version__}: {advice}", name="filelock")
    return filelock
