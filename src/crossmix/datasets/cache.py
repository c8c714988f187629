"""A cache of decoded and resized samples on disk, read through memory maps.

A cache is a folder of files `samples-00000.bin`. Each contains the pixels of 32 samples, then a JSON record (the
sources of the samples and the offset of each), then the length of the record and its SHA-256. Files are written
atomically.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmix._files import FolderLock, amount, whole_file
from crossmix._progress import shown
from crossmix._workers import QuietLoader
from crossmix.datasets._arguments import check_count, check_index
from crossmix.datasets._folder_dataset import Files, FolderDataset
from crossmix.datasets._images import read_header
from crossmix.datasets.classes import IGNORED
from crossmix.datasets.sample import DataError, Sample

__all__ = ["CachedSamples"]

FORMAT = 3  # increase when the file layout changes, or a reader returns different pixels for the same file
PER_FILE = 32  # samples; a process killed while building loses at most these, a few seconds of work
FOOTER = struct.Struct("<Q32s")  # length of the record in bytes, and its SHA-256


class CacheError(DataError):
    """A fault of the cache, not of the images that it is made from; the message says what to do about it."""


class CachedSamples(Dataset[Sample]):
    """A reader's samples, cached on disk; the cache is built if it is missing.

    Samples equal the reader's byte for byte. Their tensors are private memory maps: a crop loads only the pages it
    needs, and writing to a tensor changes neither the file nor later reads. benchmarks/speed/input.py measures how many
    crops per second are cut from it.

    An interrupted build resumes and loses at most 32 samples. A pixel takes 3 bytes, or 4 with its label: 92 GB for
    GTA5 at 720 x 1280, 6.2 GB for the training images of Cityscapes at 512 x 1024. Free disk space is checked first.

    Opening verifies that the cache belongs to this reader and that no source file has changed, by size and mtime (one
    second for GTA5). The first time a process reads a sample, it verifies the CRC-32 of the bytes (one millisecond);
    damage that occurs later is not noticed by the same process.

    Several processes may open one cache: one builds it, the others wait. A complete cache may be read-only. It and its
    sources may be moved; copies of the sources must keep their mtimes, at least to the second (as `tar` does).

    Args:
        samples: A reader of this package, or one with `files` and `fingerprint()`.
        folder: The folder of the cache: new, empty, or with a cache of the same samples.
        workers: Number of processes that build the cache; 0 builds it in this process. The result is the same.
        progress: Whether to report the required disk space and the progress of the build on stderr.

    Attributes:
        folder: The folder.
        ignore_index: The train id of ignored pixels, as of the reader.

    Raises:
        DataError: If the folder contains anything else, or a cache of other samples; if it is not writable or the disk
            is too small; if a source file has changed or cannot be read, or (also on access) the cache is damaged.
        TypeError: If `samples` is not a reader of files, or `workers` is not an int.
        ValueError: If `workers` is negative, or the reader reads no images or has a `transform`.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import GTA5, StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> cached = CachedSamples(GTA5(root, size=(32, 64)), f"{root}/cache", progress=False)
        >>> len(cached), cached[1].name, cached[1].label.shape
        (2, '00002', torch.Size([32, 64]))
    """

    def __init__(self, samples: FolderDataset, folder: str | Path, *, workers: int = 0, progress: bool = True) -> None:
        workers = check_count("workers", workers)
        self.folder: Path = Path(folder)
        self.ignore_index: int = getattr(samples, "ignore_index", IGNORED)
        cache = _Cache(samples, self.folder)
        if cache.missing():
            cache.build(workers, progress=progress)
        self._items = [item for number in range(len(cache)) for item in cache.read(number)]
        self._checked = bytearray(len(self._items))

    @staticmethod
    def check(samples: FolderDataset, folder: str | Path) -> bool:
        """Refuse a folder that opening would refuse, without building anything; it may be incomplete or new.

        Args:
            samples: As for the constructor.
            folder: Likewise.

        Returns:
            Whether the cache is complete, so that opening it builds nothing.

        Raises:
            DataError: If the folder contains anything else or a cache of other samples, or a source file has changed.
            TypeError: If `samples` is not a reader of files.
            ValueError: If the reader reads no images or has a `transform`.
        """
        cache = _Cache(samples, Path(folder))
        missing = cache.missing()
        cache.check(missing)
        return not missing

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        index = check_index(index, len(self._items))
        item = self._items[index]
        path = _path(self.folder, item.file)
        end = item.offset + math.prod(item.shape)
        try:  # A new map per read takes microseconds and isolates callers that write to their tensor.
            mapped = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise CacheError(f"{path}: cannot be read ({error}); {self._again(item.file)}.") from error
        pixels = mapped.numpy()[item.offset :]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != item.crc32:
                raise CacheError(f"{path}: the bytes of sample {item.name!r} are damaged; {self._again(item.file)}.")
            self._checked[index] = 1
        # Go through NumPy, so that the storage covers this sample only: loader workers send whole storages.
        planes = torch.from_numpy(pixels).view(*item.shape)
        return Sample(planes[:3], planes[3] if len(planes) == 4 else None, item.name)

    def __getstate__(self) -> dict[str, object]:
        """Let another process verify the samples again: it may run on another machine."""
        return {**self.__dict__, "_checked": bytearray(len(self._items))}

    def _again(self, number: int) -> str:
        return _again(_path(self.folder, number), sum(item.file == number for item in self._items))


class _Item(NamedTuple):
    """Location of a sample: uint8 of `shape` (3 or 4, H, W), image then label, starting at `offset`."""

    name: str
    file: int
    offset: int
    shape: Sequence[int]
    crc32: int


class _Cache(Dataset[int | Exception]):
    """The files of a cache. Getting item i writes file i, so that loader workers write files in parallel."""

    def __init__(self, samples: FolderDataset, folder: Path) -> None:
        if not (hasattr(samples, "files") and hasattr(samples, "fingerprint")):
            kind = type(samples).__name__
            raise TypeError(f"`samples` must be a reader of image files such as GTA5, got {kind}; write it to files.")
        if any(file.image is None for file in samples.files):
            raise ValueError("`samples` must have images, got a reader made with `images=False`; read them too.")
        if getattr(samples, "transform", None) is not None:
            raise ValueError("`samples` must have no `transform`, which the cache would freeze; apply it afterwards.")
        self.samples = samples
        self.folder = folder
        self.spans = [range(len(samples))[first : first + PER_FILE] for first in range(0, len(samples), PER_FILE)]
        self.made_by = {
            "format": FORMAT,
            "number of samples": len(samples),
            "reader": json.loads(json.dumps(samples.fingerprint())),  # tuples become lists, as when read back
        }
        paths = [path.absolute().as_posix() for files in samples.files for path in _paths(files)]
        self.common = len(os.path.commonprefix(paths))  # noqa: RUF071 - not recorded, so that sources may be moved

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> int | Exception:
        """Write a file; return its number of samples, or the error, since a loader would wrap a raised one."""
        path, offset = _path(self.folder, number), 0
        items: list[_Item] = []
        stats = []
        try:
            with whole_file(path) as file:
                for index in self.spans[number]:
                    stats.append(_stats(self.samples.files[index]))  # before reading, in case the source changes then
                    sample = self.samples[index]
                    planes = _planes(sample)
                    data = planes.numpy().data
                    file.write(data)
                    items.append(_Item(sample.name, number, offset, planes.shape, zlib.crc32(data)))
                    offset += planes.numel()
                record = json.dumps({**self._made_of(number), "stats": stats, "items": items}).encode()
                file.write(record + FOOTER.pack(len(record), hashlib.sha256(record).digest()))
        except (DataError, OSError) as error:
            return error
        return len(items)

    def missing(self) -> list[int]:
        """The numbers of the missing files."""
        names = self._names()
        return [number for number in range(len(self)) if _path(self.folder, number).name not in names]

    def read(self, number: int) -> list[_Item]:
        """Read a file's record; refuse one that is damaged, of other samples, or out of date."""
        record = self._record(number)
        for key, now in self._made_of(number).items():
            if (was := record.get(key)) != now:
                other = f"is a cache of other samples: its {key} is {was}, not {now}"
                raise CacheError(f"{self.folder}: {other}; choose another folder, or delete this one.")
        if change := self._change(number, record):
            others = {*range(len(self))} - {*self.missing(), number}
            stale = sum(self._change(other, self._record(other)) != "" for other in others)
            advice = self._again(number)
            if stale:
                advice = f"so have sources of {stale} more files of the cache; delete {self.folder} to build it anew"
            raise CacheError(f"{change}; {advice}.")
        return [_Item(*item) for item in record["items"]]

    def _record(self, number: int) -> dict[str, Any]:
        """Read the record at the end of a file."""
        path, again = _path(self.folder, number), self._again(number)
        try:
            with path.open("rb") as file:
                end = max(file.seek(0, os.SEEK_END) - FOOTER.size, 0)
                file.seek(end)
                length, digest = FOOTER.unpack(file.read().ljust(FOOTER.size))
                file.seek(max(end - length, 0))
                text = file.read(min(length, end))
        except OSError as error:
            raise CacheError(f"{path}: cannot be read ({error.strerror}); {again}.") from error
        if hashlib.sha256(text).digest() != digest:
            raise CacheError(f"{path}: is cut off or damaged; {again}.")
        record: dict[str, Any] = json.loads(text)
        return record

    def _again(self, number: int) -> str:
        return _again(_path(self.folder, number), len(self.spans[number]))

    def _change(self, number: int, record: dict[str, Any]) -> str:
        """Describe the first source of a file that has changed since; empty if none has."""
        for index, before in zip(self.spans[number], record["stats"], strict=True):
            files = self.samples.files[index]
            for source, was, now in zip(_paths(files), before, _stats(files), strict=True):
                if not _is_same(was, now):
                    return f"{source}: has changed since it was cached (size and mtime_ns were {was}, are {now})"
        return ""

    def check(self, missing: list[int]) -> None:
        """Refuse anything but this cache or parts of it."""
        if missing:  # a complete one may have company
            self._refuse_foreign()
        for number in {*range(len(self))} - {*missing}:
            self.read(number)

    def build(self, workers: int, *, progress: bool) -> None:
        """Write the missing files, or wait for another process that does."""

        def say(text: str) -> None:
            if progress:
                sys.stderr.write(f"{text}\n")

        self._refuse_foreign()
        try:
            with FolderLock(self.folder, waiting=lambda text: say(f"{text}; waiting for it")):
                missing = self.missing()
                self.check(missing)  # raise now rather than after hours of building the rest
                if not missing:
                    return
                for left in self.folder.glob("samples-*.bin.tmp.*"):  # left behind by killed processes
                    left.unlink(missing_ok=True)
                need, free = self._bytes(missing), shutil.disk_usage(self.folder).free
                text = f"{self.folder}: the cache needs {amount(need)} more, {amount(free)} are free"
                if need > free:
                    raise CacheError(f"{text}; free some space, choose another folder, or use a smaller `size`.")
                say(text)
                self._fill(missing, workers, progress=progress)
        except OSError as error:
            what = f"{error.filename or self.folder}: cannot be written: {error.strerror or error}"
            raise CacheError(f"{what}. The cache is incomplete; finished files are kept.") from error

    def _fill(self, missing: list[int], workers: int, *, progress: bool) -> None:
        # Its own generator, because a loader draws a seed for its workers, by default from the global one.
        workers, generator = min(workers, len(missing)), torch.Generator()
        loader = QuietLoader(self, batch_size=None, sampler=missing, num_workers=workers, generator=generator)

        def samples() -> Iterator[int]:
            for built in loader:
                if isinstance(built, Exception):
                    raise built
                yield from range(built)

        total = sum(len(self.spans[number]) for number in missing)
        for _ in shown(samples(), total, f"caching in {self.folder.name}", "image") if progress else samples():
            pass

    def _bytes(self, missing: list[int]) -> int:
        """The number of bytes of the pixels of missing files."""
        indices = [index for number in missing for index in self.spans[number]]
        first = _planes(self.samples[indices[0]])  # read one: samples can have labels even without label files
        if self.samples.size is not None:
            return first.numel() * len(indices)
        headers = (read_header(self.samples.files[index].image or Path()) for index in indices)
        return first.shape[0] * sum(header.height * header.width for header in headers)

    def _made_of(self, number: int) -> dict[str, Any]:
        """Everything that a file's samples depend on, except the contents of the sources."""
        made_of: dict[str, Any] = dict(self.made_by)
        for index in self.spans[number]:
            files = self.samples.files[index]
            paths = [path.absolute().as_posix()[self.common :] for path in _paths(files)]
            made_of[f"sample {index}"] = [files.name, *paths]
        return made_of

    def _names(self) -> set[str]:
        try:
            return {path.name for path in self.folder.iterdir()}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CacheError(f"{self.folder}: cannot be listed ({error.strerror}); choose another folder.") from error

    def _refuse_foreign(self) -> None:
        """Refuse a folder that contains anything but this cache or parts of it."""
        ours = {_path(self.folder, number).name for number in range(len(self))}
        for name in sorted(self._names()):
            if not name.startswith(".") and re.sub(r"\.tmp\.\d+$", "", name) not in ours:
                raise CacheError(
                    f"{self.folder}: holds {name!r}, which is not part of this cache; use an empty folder."
                )


def _path(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.bin"


def _again(path: Path, samples: int) -> str:
    return f"delete {path} and open the cache again, which rebuilds its {samples} sample{'s' * (samples != 1)}"


def _planes(sample: Sample) -> Tensor:
    """Image and label in one tensor, uint8 (3 or 4, H, W)."""
    parts = [sample.image] if sample.label is None else [sample.image, sample.label]
    size = sample.image.shape[-2:]
    if [(part.dtype, part.shape) for part in parts] != [(torch.uint8, (3, *size)), (torch.uint8, size)][: len(parts)]:
        got = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
        raise DataError(f"{sample.name}: expected uint8 (3, H, W) and (H, W), got {got}; correct the reader.")
    return torch.cat([part.reshape(-1, *size) for part in parts])


def _paths(files: Files) -> list[Path]:
    return [path for path in (files.image, files.label) if path is not None]


def _is_same(was: list[int], now: list[int]) -> bool:
    """Whether size and mtime are equal; whole seconds count where either has no more, as after `tar`."""
    second = 1_000_000_000
    whole = 0 in {was[1] % second, now[1] % second}
    return was == now or (whole and was[0] == now[0] and was[1] // second == now[1] // second)


def _stats(files: Files) -> list[list[int]]:
    """Size and mtime of a sample's files."""
    try:
        stats = [path.stat() for path in _paths(files)]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); restore the file.") from error
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
