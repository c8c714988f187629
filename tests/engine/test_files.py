"""Whole files and folder locks, on a real full disk where one can be had, with real processes."""

import errno
import fcntl
import os
import platform
import re
import stat
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from crossmix._files import BusyError, FolderLock, amount, sync_folder, whole_file, write_whole
from runs import fork


def test_whole_file__replaces_at_its_end_and_not_at_all_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    write_whole(path, b"another")
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), whole_file(path) as file:  # noqa: PT012
            file.write(b"new")
            raise error
    assert path.read_bytes() == b"another"
    assert list(tmp_path.iterdir()) == [path]


def test_whole_file__a_full_disk_is_named_with_the_space_needed_and_free(small_disk: Path) -> None:
    path = small_disk / "a.bin"
    write_whole(path, b"old")
    with pytest.raises(OSError, match=r"3\.00 MB are needed, \d\.\d\d MB are free.*free some space") as caught:
        write_whole(path, bytes(3_000_000))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_whole_file__a_disk_full_at_the_end(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)  # network file systems say so this late
    with pytest.raises(OSError, match=rf"{os.strerror(number)} \(5 bytes are needed") as caught:
        write_whole(tmp_path / "a.bin", b"12345")
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_whole_file__names_its_own_file_and_leaves_other_errors_alone(tmp_path: Path) -> None:
    path = tmp_path / "no" / "a.bin"
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(path, b"")
    assert missing.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as other, whole_file(tmp_path / "a.bin"):
        (tmp_path / "source.png").read_bytes()
    assert other.value.filename == str(tmp_path / "source.png")


def test_whole_file__a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refused(path: Path, *args: str) -> object:  # root may write everywhere, so no real folder would do
        if args == ("wb",):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError, match="make its folder writable") as caught:
        write_whole(tmp_path / "a.bin", b"1")
    assert caught.value.filename == str(tmp_path / "a.bin")


def write_and_wait(begun: Callable[[], object], path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        begun()
        time.sleep(600)


def test_whole_file__survives_a_kill_of_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    process = fork(write_and_wait, path)
    process.kill()
    process.join()
    assert path.read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"a.bin", f"a.bin.tmp.{process.pid}"}


def test_whole_file__folders_that_cannot_be_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a.bin", b"1")
    assert (tmp_path / "a.bin").read_bytes() == b"1"


def test_amount() -> None:
    assert [amount(n) for n in (0, 999, 1000, 2_500_000, 1_204_000_000)] == [
        "0 bytes", "999 bytes", "1.00 kB", "2.50 MB", "1.20 GB",
    ]  # fmt: skip


def hold(held: Callable[[], object], folder: Path) -> None:
    with FolderLock(folder):
        held()
        time.sleep(600)


def test_lock__names_its_holder_and_is_gone_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = fork(hold, folder)
    holder = rf"process {process.pid} on {re.escape(platform.node())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    for _ in range(2):  # the first who is refused leaves the name for the second
        with pytest.raises(BusyError, match=rf"run: is in use by {holder}.*; wait for it to end"), FolderLock(folder):
            pass
    process.kill()  # without any chance to clean up
    process.join()
    with FolderLock(folder) as lock, pytest.raises(BusyError, match=f"process {os.getpid()} "), FolderLock(folder):
        pass
    assert lock.path == folder / ".lock"
    assert {path.name for path in folder.iterdir()} <= {".lock"}


def test_lock__may_be_waited_for(tmp_path: Path) -> None:
    process = fork(hold, tmp_path)
    told = []

    def waiting(text: str) -> None:
        told.append(text)
        process.kill()
        process.join()

    with FolderLock(tmp_path, waiting=waiting), pytest.raises(BusyError), FolderLock(tmp_path):
        pass
    assert len(told) == 1
    assert f"is in use by process {process.pid} on" in told[0]


def hold_and_fork(ready: Callable[[], object], folder: Path, end: str) -> None:
    with FolderLock(folder):
        child = os.fork()
        if child == 0 and end == "leaves":
            sys.exit()  # through the end of the block
        if child == 0:
            time.sleep(60)
            os._exit(0)
        if end == "leaves":
            os.waitpid(child, 0)
        (folder / "child").write_text(str(child))
        ready()
        time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.parametrize("end", ["outlives", "leaves"])
def test_lock__is_its_process_s_alone_and_not_that_of_forked_ones(tmp_path: Path, end: str) -> None:
    process = fork(hold_and_fork, tmp_path, end)
    # The child let go of its copy, and not of the lock.
    with pytest.raises(BusyError, match=f"in use by process {process.pid} "), FolderLock(tmp_path):
        pass
    process.kill()
    process.join()
    with FolderLock(tmp_path):
        pass
    if end == "outlives":
        os.kill(int((tmp_path / "child").read_text()), 9)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_lock__a_file_system_without_locks(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    reached = False
    with pytest.warns(UserWarning, match=r"has no locks \(.*\); continuing without one"), FolderLock(tmp_path):
        reached = True
    assert reached


def test_lock__other_errors_are_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), FolderLock(tmp_path / "file" / "folder"):
        pass


@pytest.mark.parametrize("found", [None, "3.16.0"])
def test_lock__asks_for_the_package(tmp_path: Path, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = None if found is None else types.SimpleNamespace(__version__=found)
    monkeypatch.setitem(sys.modules, "filelock", module)
    said = f"is {found}: .*" if found else ""
    with pytest.raises(ImportError, match=rf"{said}pip install -U filelock"), FolderLock(tmp_path):
        pass


def test_lock__a_holder_without_a_name(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        (tmp_path / ".lock.holder").unlink()
        with pytest.raises(BusyError, match="is in use by another process; wait"), FolderLock(tmp_path):
            pass


def test_lock__makes_its_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b") as lock:
        assert lock.path.parent == tmp_path / "a" / "b"
        assert lock.path.parent.is_dir()


def test_sync_folder__other_errors_are_errors_and_other_systems_need_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        sync_folder(tmp_path)
