"""Files that are either whole or not there, and folders that one process holds at a time."""

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

__all__ = ["BusyError", "FolderLock", "amount", "damaged_part", "explained", "sync_folder", "whole_file", "write_whole"]

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
FOLDER = 0x10
"""The attribute of a part of a zip file that calls it a folder."""
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What the system says where files cannot be locked at all: some NFS, Lustre and FUSE mounts."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, needed: Callable[[], int] | None = None) -> Iterator[BinaryIO]:
    """Open a file to write that takes its place when the block ends and all of it is on the disk.

    It is written beside its place, as `<name>.tmp.<process>`, synchronised and renamed. When the block or the disk
    fails nothing is left of it, and what was there before is untouched. Only a process that is killed leaves the file
    aside behind, for whoever owns the folder to clear.

    Args:
        path: The file.
        needed: Tells how many bytes the whole file takes; asked when the disk is full.

    Yields:
        The file, in binary.

    Raises:
        OSError: If it cannot be written, under its own name; on a full disk with the bytes needed and free.
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
        with contextlib.suppress(OSError):  # of a folder that is gone or read-only, say
            aside.unlink()
        cause: BaseException | None = error
        while type(cause) is RuntimeError:  # in which torch wraps what the system says
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError) and cause.filename in {None, str(aside)}:  # not of another file that was read
            raise explained(cause, path, needed) from error
        raise
    sync_folder(path.parent)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        path: The file.
        content: All of it.

    Raises:
        OSError: As `whole_file`.
    """
    with whole_file(path, needed=lambda: len(content)) as file:
        file.write(content)


def damaged_part(path: str | os.PathLike[str]) -> str | None:
    """Name a part of a zip file that is not what its writer wrote, which torch does not look for when it reads one.

    The directory at the end of the file has no checksum, and torch reads nothing of a part that it calls a folder, and
    leaves a tensor of whatever was in memory. Torch writes no attributes at all; other programs, which say that they
    are, write permissions.

    Args:
        path: The file.

    Returns:
        The part, or None where all is well.

    Raises:
        zipfile.BadZipFile: If it is no such file, or its directory is damaged.
        OSError: If it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.external_attr & (FOLDER if part.create_system else ~0) and not part.is_dir():
                return part.filename
        return archive.testzip()


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut, where the platform and the file system can."""
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
    """How much memory or disk a number of bytes is, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def explained(error: OSError, path: Path, needed: Callable[[], int] | None = None) -> OSError:
    """Give an error of writing the name of the file that was to be written, and what can be done.

    Args:
        error: What the system says.
        path: The file.
        needed: Tells how many bytes it takes; asked when the disk is full.

    Returns:
        An error of the same number.
    """
    text = error.strerror or str(error)
    if error.errno in FULL:
        room = [] if needed is None else [f"{amount(needed())} are needed"]
        if error.errno == errno.ENOSPC:  # a quota is not what the disk has
            with contextlib.suppress(OSError):
                room.append(f"{amount(shutil.disk_usage(path.parent).free)} are free")
        text += f" ({', '.join(room)}); make room, what was there before is untouched"
    elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        text += "; make its folder one that can be written to, or choose another"
    return OSError(error.errno, text, str(path))


class BusyError(RuntimeError):
    """Another process holds the folder; the message names both."""


class FolderLock:
    """Hold a folder for as long as a `with` block, or the process, lasts.

    The system drops the lock when the process ends in whatever way, so a crash leaves nothing to clean up. Processes
    forked from it, such as a loader's workers, which may outlive it, do not hold it. Where the file system has no
    locks, as on some NFS and Lustre mounts, that is said by a warning, and the block runs without one.

    Args:
        folder: The folder; made where missing. The lock is a file `.lock` in it, and who holds it stands in
            `.lock.holder` meanwhile.
        waiting: Called with a text that names the holder where the folder is in use, which is then waited for.

    Raises:
        BusyError: On entering, if another process holds it and there is no `waiting`; the message names that process.
        ImportError: On entering, if the package filelock is missing or too old.
        OSError: On entering, if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with FolderLock(tempfile.mkdtemp()) as lock:
        ...     lock.path.name
        '.lock'
    """

    def __init__(self, folder: str | os.PathLike[str], *, waiting: Callable[[str], object] | None = None) -> None:
        self.path = Path(folder) / ".lock"
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
                f"{self.path.parent}: its file system has no locks ({error.strerror}); going on without, so see to it "
                "that only one process uses this folder.",
                stacklevel=2,
            )
            return self
        self._lock = lock
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # it is held all the same
            self._holder.write_text(f"process {self._process} on {platform.node()} since {since}\n", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None and self._process == os.getpid():  # a forked process leaves it to its parent
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
    """The package, which is imported only where something is locked."""
    advice = "locking a folder needs the package filelock, 3.30 or newer; install it by `pip install crossmix[train]`."
    try:
        import filelock  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.msg}: {advice}", name="filelock") from error
    if [int(part) for part in filelock.__version__.split(".")[:2]] < [3, 30]:
        # Those take a file system without locks for a busy one, and forked processes keep their parent's locks.
        raise ImportError(f"filelock is {filelock.__version__}: {advice}", name="filelock")
    return filelock
