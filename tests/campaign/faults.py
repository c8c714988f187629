"""Errors, a full disk and kills at every moment of `CheckpointStore.save`: one whole checkpoint is always left."""

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from unittest import mock

from campaign.checkpoints import same, state
from crossmix.engine import CheckpointStore
from runs import FORKED, fork

EVERY = {"short": 71, "ci": 2, "nightly": 1}
KINDS = ("error", "full disk", "kill")


class InjectedError(Exception):
    """Any error."""


def fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if kind == "full disk" else InjectedError("injected")


class Moments:
    """The moments of a save at which something can fail, numbered from 0; at one of them something does."""

    def __init__(self, at: int | None = None, kind: str = "") -> None:
        self.at, self.kind = at, kind
        self.names: list[str] = []

    def reached(self, name: str, *, first: Callable[[], object] = lambda: None) -> None:
        self.names.append(name)
        if self.at == len(self.names) - 1:
            first()
            fail(self.kind)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While files are opened, written, synced, renamed and deleted."""
        moments, opened, synced = self, Path.open, os.fsync

        def open_(path: Path, mode: str = "r", **options: Any) -> Any:
            if mode != "wb":
                return opened(path, mode, **options)
            moments.reached(f"open {path.suffixes}")
            return File(opened(path, mode, **options), moments)

        def fsync(handle: int) -> None:
            moments.reached("before fsync")
            synced(handle)
            moments.reached("after fsync")

        def around(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Path, *arguments: Any, **options: Any) -> Any:
                moments.reached(f"before {name}")
                result = real(path, *arguments, **options)
                moments.reached(f"after {name}")
                return result

            return call

        with (
            mock.patch.object(Path, "open", open_),
            mock.patch.object(os, "fsync", fsync),
            mock.patch.object(Path, "replace", around("rename", Path.replace)),
            mock.patch.object(Path, "unlink", around("unlink", Path.unlink)),
        ):
            yield


class File:
    """A file with moments before and within each write."""

    def __init__(self, file: Any, moments: Moments) -> None:
        self.file, self.moments, self.name = file, moments, file.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for share in (0.0, 0.5) if len(view) > 1 else (0.0,):

            def part(size: int = int(share * len(view))) -> None:
                self.file.write(view[:size])
                self.file.flush()

            self.moments.reached(f"write, {share:.0%} done", first=part)
        return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())


def save(folder: Path, moments: Moments) -> None:
    with moments.watched():
        CheckpointStore(folder).save(3, state(3), best=True)


def killed(begun: Callable[[], object], folder: Path, moments: Moments) -> None:
    begun()
    save(folder, moments)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def problem(folder: Path, kind: str) -> str:
    """What is wrong with what a failed save left, if anything."""
    store = CheckpointStore(folder)
    if kind != "kill" and any(".tmp." in name for name in names(folder)):
        return "a partial file was left"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest, best = store.load_newest(), store.load_best()
    if not any(same(newest, state(step)) for step in (2, 3)):
        return "the newest is neither the old nor the new one"
    if not any(same(best, state(step)) for step in (1, 3)):
        return "the best is neither the old nor the new one"
    store.save(4, state(4), best=True)
    before = 3 if newest is not None and newest["step"] == 3 else 2
    files = [f"step-{before:07d}.pt", "step-0000004.pt", "best.pt"]
    if names(folder) != {*files, *(f"{name}.sha256" for name in files)}:
        return f"the next save left {sorted(names(folder))}"
    if not (same(store.load_newest(), state(4)) and same(store.load_best(), state(4))):
        return "the next save is not loaded"
    return ""


def attempt(made: Path, folder: Path, at: int, kind: str) -> str:
    """Save with a fault: what is wrong, if anything."""
    shutil.copytree(made, folder)
    moments = Moments(at, kind)
    if kind == "kill":
        process = fork(killed, folder, moments)
        process.join()
        FORKED.remove(process)
        if process.exitcode != -signal.SIGKILL:
            return f"the process ended with {process.exitcode}"
    else:
        try:
            save(folder, moments)
        except (InjectedError, OSError, RuntimeError) as error:  # torch wraps errors of writing
            if kind == "full disk" and not (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                return f"the full disk became {error!r}"
        else:
            return "the error was lost"
    try:
        return problem(folder, kind)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def run(profile: str) -> dict[str, Any]:
    """Every kind of fault at every moment, or at every few of them."""
    tried = dict.fromkeys(KINDS, 0)
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        made = Path(root) / "made"
        store = CheckpointStore(made)
        store.save(1, state(1), best=True)
        store.save(2, state(2))
        watch = Moments()
        save(Path(shutil.copytree(made, Path(root) / "watched")), watch)
        for at in range(0, len(watch.names), EVERY[profile]):
            for kind in KINDS:
                found = attempt(made, Path(root) / f"{at}-{kind}", at, kind)
                tried[kind] += 1
                if found:
                    wrong.setdefault(f"{kind}: {found}"[:300], f"moment {at}, {watch.names[at]}")
    return {"moments of a save": len(watch.names), **{f"tried: {kind}": n for kind, n in tried.items()}, "wrong": wrong}
