"""The folder of a cache: what must be in it, who may write to it, whether there is room, and filling it."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from crossmix._files import FolderLock, amount, write_whole
from crossmix._workers import QuietLoader
from crossmix.datasets._files import Files
from crossmix.datasets._images import read_header
from crossmix.datasets._sealed import read_sealed, sealed
from crossmix.datasets._shards import (
    PER_SHARD,
    FileSamples,
    Item,
    ShardBuilder,
    read_items,
    shard_path,
)
from crossmix.datasets.sample import DataError

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

__all__ = ["CacheFolder"]

FORMAT = 1
"""To be raised when files are laid out otherwise, or a reader comes to return other pixels of the same file."""

MANIFEST = "manifest.json"
OURS = re.compile(r"(manifest\.json|shard-\d{5,}\.(bin|json))(\.tmp\.\d+)?")
LEFT_BEHIND = re.compile(OURS.pattern.removesuffix("?"))
ELSEWHERE = "choose a folder that can be written to, or make this one so"


class CacheFolder:
    """Where the samples of one reader are cached."""

    def __init__(self, folder: Path, samples: FileSamples) -> None:
        self.folder = folder
        self.samples = samples
        self.shards = [
            range(first, min(first + PER_SHARD, len(samples))) for first in range(0, len(samples), PER_SHARD)
        ]
        self.plan = {
            "format": FORMAT,
            "per_shard": PER_SHARD,
            "reader": json.loads(json.dumps(samples.fingerprint())),
            "items": _names(samples.files),
        }
        self.manifest = sealed(self.plan)
        self.digest = hashlib.sha256(self.manifest).hexdigest()

    def complete(self) -> bool:
        """Whether all files are there; what is in them is checked by `items`."""
        return (self.folder / MANIFEST).exists() and not self._missing()

    def items(self) -> list[Item]:
        """Where the samples are, after checking manifest, records, sizes and sources."""
        self._check_manifest()
        return [item for shard in range(len(self.shards)) for item in self._read(shard)]

    def build(self, workers: int, *, progress: bool) -> None:
        """Write what is missing; waits where another process is at it."""
        self._check_folder()
        with _locked(self.folder, progress=progress):
            if self.complete():  # by the process that was waited for
                return
            self._check_folder()
            missing = self._missing()
            for shard in sorted(set(range(len(self.shards))) - set(missing)):
                self._read(shard)  # better refused now than after hours of building the others
            self._check_room(missing, progress=progress)
            try:
                for name in filter(LEFT_BEHIND.fullmatch, _listing(self.folder)):
                    (self.folder / name).unlink()
                if not (self.folder / MANIFEST).exists():
                    write_whole(self.folder / MANIFEST, self.manifest)
                self._fill(missing, workers, progress=progress)
            except OSError as error:
                raise DataError(f"{error.filename or self.folder}: cannot be written: {error.strerror}.") from error

    def _missing(self) -> list[int]:
        """The shards that are not finished."""
        names = _listing(self.folder)
        paths = [shard_path(self.folder, shard) for shard in range(len(self.shards))]
        return [i for i, path in enumerate(paths) if not {path.name, path.with_suffix(".json").name} <= names]

    def _read(self, shard: int) -> list[Item]:
        span = self.shards[shard]
        return read_items(self.folder, shard, self.digest, self.samples.files[span.start : span.stop])

    def _fill(self, missing: Sequence[int], workers: int, *, progress: bool) -> None:
        builder = ShardBuilder(self.samples, self.folder, self.digest, [(i, self.shards[i]) for i in missing])
        todo = sum(len(self.shards[i]) for i in missing)
        # A generator of its own: a loader draws a seed for its workers, by default from the global one.
        loader = QuietLoader(builder, batch_size=None, num_workers=workers, generator=torch.Generator())
        with _progress(self.folder, len(self.samples), len(self.samples) - todo, shown=progress) as advance:
            for built in loader:
                if isinstance(built, DataError):
                    raise built
                advance(built)

    def _check_manifest(self) -> None:
        fix = "if this folder is a cache, delete that file alone and open it again"
        found = read_sealed(self.folder / MANIFEST, fix=fix)
        if found != self.plan:
            raise DataError(
                f"{self.folder}: is a cache of other samples: {_difference(found, self.plan)}; choose another folder, "
                "or delete this one to build it anew."
            )

    def _check_folder(self) -> None:
        """Refuse to build in the cache of another reader, and in a folder that is none."""
        names = _listing(self.folder)
        if MANIFEST in names:
            self._check_manifest()
            return
        foreign = sorted(name for name in names if not (name.startswith(".") or OURS.fullmatch(name)))
        if foreign:
            raise DataError(
                f"{self.folder}: holds {foreign[0]!r}, which is no file of a cache; choose a folder that is new or "
                "empty."
            )

    def _check_room(self, missing: Sequence[int], *, progress: bool) -> None:
        need = sum(_bytes(self.samples.files[i], self.samples.size) for shard in missing for i in self.shards[shard])
        free = shutil.disk_usage(self.folder).free
        text = f"{self.folder}: the cache needs {amount(need)} more, {amount(free)} are free"
        if need > free:
            raise DataError(f"{text}; make room, choose another folder, or read at a smaller `size`.")
        if progress:
            _say(text)


def _names(files: Sequence[Files]) -> list[list[str | None]]:
    """Name, image and label of each sample; paths from the folder that holds all, so that it may be moved."""
    absolute = [path.absolute() for one in files for path in (one.image, one.label) if path is not None]
    try:
        root = os.path.commonpath({path.parent for path in absolute})
    except ValueError:  # on two drives
        root = ""

    def within(path: Path | None) -> str | None:
        return None if path is None else str(path.absolute())[len(root) :].replace(os.sep, "/").lstrip("/")

    return [[one.name, within(one.image), within(one.label)] for one in files]


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing in which two manifests differ."""
    for key in ("format", "per_shard", "reader"):
        if was.get(key) != now[key]:
            return f"its {key} is {was.get(key)}, this one's {now[key]}"
    old, new = was["items"], now["items"]
    pairs = zip(old, new, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    a, b = ("nothing" if first >= len(items) else items[first] for items in (old, new))
    return f"it has {len(old)} samples, there are {len(new)} now, and sample {first} was {a}, is {b}"


def _bytes(files: Files, size: tuple[int, int] | None) -> int:
    """What a sample will take."""
    if size is None:
        header = read_header(Path(files.image or ""))
        size = header.height, header.width
    height, width = size
    return (3 if files.label is None else 4) * height * width


def _listing(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise DataError(f"{folder}: is no folder that can be read ({error.strerror}); choose another.") from error


@contextlib.contextmanager
def _locked(folder: Path, *, progress: bool) -> Iterator[None]:
    """Hold the folder, waiting for another process that does."""
    with contextlib.ExitStack() as stack:
        lock = FolderLock(folder, waiting=lambda text: _say(f"{text}; waiting for it") if progress else None)
        try:
            stack.enter_context(lock)
        except OSError as error:
            raise DataError(
                f"{folder}: is not a complete cache and cannot be written ({error.strerror}); {ELSEWHERE}."
            ) from error
        yield


@contextlib.contextmanager
def _progress(folder: Path, total: int, done: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, else a line now and then."""
    if shown and tqdm is not None and sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=f"caching in {folder.name}", unit="image") as bar:
            yield bar.update
        return
    start, first, last = time.monotonic(), done, -10.0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        seconds = time.monotonic() - start
        if shown and (seconds - last >= 10 or done == total):
            last = seconds
            _say(f"{folder}: {done} of {total} cached, {(done - first) / max(seconds, 1e-9):.1f} per second")

    yield advance


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
