"""Count how often every class occurs, and cache the counts."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from crossmix._workers import QuietLoader
from crossmix.datasets._arguments import check_count
from crossmix.datasets._folder_dataset import Files, FolderDataset
from crossmix.datasets._labels import LabelFormat
from crossmix.datasets._parallel import each
from crossmix.datasets.sample import DataError, Sample

__all__ = ["class_counts"]


def class_counts(dataset: Dataset[Sample], *, cache: str | os.PathLike[str] | None = None, workers: int = 0) -> Tensor:
    """Count the pixels of every class in every label map.

    The counts give class frequencies, a prior, or rare-class sampling (`RareClassSampler`). A reader's maps are counted
    at their original size, without reading images; the labels of other data sets are counted as returned.

    Args:
        dataset: A data set of this package, or any whose items have a `label` (H, W) of integers from 0 to 255; also
            wrapped in `Subset` or `ConcatDataset` of `torch.utils.data`.
        cache: A file that stores the counts of a reader; the command `stats` uses ROOT/crossmix-stats.jsonl. It has one
            JSON line per map, reused if the map's size and mtime and the reader's ids are unchanged and its checksum is
            correct. Other maps are counted and appended, so an interrupted count resumes. Several data sets and
            processes may share one file.
        workers: Number of processes that read maps or samples; 0 reads in this one.

    Returns:
        One row per sample, (N, 256) int64. Columns are train ids 0 to 254, then ignored pixels (or, if a reader was
        given another `ignore_index`, ignored pixels in that column).

    Raises:
        DataError: If a map is missing, damaged, or contains an unknown id, a sample's label is None, or `cache` is a
            file of another kind.
        TypeError: If the items have no `label`, or `workers` is not an int.
        ValueError: If `workers` is negative, or `cache` is given for a data set that reads no files.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import GTA5, StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> counts = class_counts(GTA5(root))
        >>> counts.shape, counts.sum(1)
        (torch.Size([2, 256]), tensor([8192, 8192]))
    """
    workers = check_count("workers", workers)
    if isinstance(dataset, ConcatDataset):
        return torch.cat([class_counts(part, cache=cache, workers=workers) for part in dataset.datasets])
    if (chosen := _files(dataset)) is None:
        if cache is not None:
            raise ValueError(f"`cache` stores counts of label files, but {type(dataset).__name__} has none; omit it.")
        return _of_samples(dataset, workers)
    files, labelled = chosen
    paths = [file.label for file in files if file.label is not None]
    if len(paths) < len(files):
        raise DataError(f"{len(files) - len(paths)} samples have no label map; read the data set with its labels.")
    return count_files(paths, labelled, None if cache is None else Path(cache), workers=workers)


def _files(dataset: Dataset[Sample]) -> tuple[list[Files], LabelFormat] | None:
    """The files of a reader, or of a subset of one; None if samples are not read from files."""
    if isinstance(dataset, FolderDataset):
        return dataset.files, dataset.label_format
    if isinstance(dataset, Subset) and (whole := _files(dataset.dataset)) is not None:
        return [whole[0][i] for i in dataset.indices], whole[1]
    return None


def _of_samples(dataset: Dataset[Sample], workers: int) -> Tensor:
    """Count the labels that a data set returns."""
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, IterableDataset):  # which inherits `__getitem__` without implementing it
        raise TypeError(f"`dataset` must have a length and items, got {type(dataset).__name__}; pass a data set.")
    counted = _Counted(dataset)
    rows: Iterator[Tensor] = iter(counted)
    if workers:
        unseeded = torch.Generator()  # otherwise the loader draws from the global one
        rows = iter(QuietLoader(counted, batch_size=None, num_workers=workers, generator=unseeded))
    table = torch.zeros(len(counted), 256, dtype=torch.int64, device="cpu")
    for row, counts in zip(table, rows, strict=True):
        row[:] = counts
    return table


class _Counted(Dataset[Tensor]):
    """A data set of the counts of each label map, (256,) int64."""

    def __init__(self, dataset: Any) -> None:  # noqa: ANN401 - any data set
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Tensor]:  # plain iteration over a data set need not stop
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        item = self.dataset[i]
        name = f"sample {i} of {type(self.dataset).__name__}"
        if not hasattr(item, "label"):
            kind = type(item).__name__
            raise TypeError(f"`dataset` must hold items with a `label`, like `Sample`, got {kind}; wrap them.")
        if (label := item.label) is None:
            raise DataError(f"{name} has no label; read the data set with its labels.")
        if label.numel() and (int(label.min()) < 0 or int(label.max()) > 255):
            raise DataError(f"{name} has labels outside 0..255; map its ids first.")
        return torch.bincount(label.flatten().long().cpu(), minlength=256)


def count_files(paths: list[Path], labelled: LabelFormat, cache: Path | None, *, workers: int) -> Tensor:
    """Count label maps given as paths; see `class_counts`."""
    ids = _ids(labelled)
    counted = {} if cache is None else known_counts(paths, labelled, cache)
    rest = [path for path in dict.fromkeys(paths) if path not in counted]
    if cache is not None and rest:
        _append(cache, b"")  # fail before counting if the file is not writable
    for path, counts in each(partial(_count, labelled=labelled), rest, "counting", workers=workers):
        counted[path] = counts
        if cache is not None:
            _append(cache, _line(ids, path, counts))
    table = torch.zeros(len(paths), 256, dtype=torch.int64, device="cpu")
    for row, path in zip(table, paths, strict=True):
        for value, count in counted[path].items():
            row[value] = count
    return table


def known_counts(paths: list[Path], labelled: LabelFormat, cache: Path) -> dict[Path, dict[int, int]]:
    """Read the counts that a file holds of label maps in their current state; see `class_counts`."""
    known = _read(cache, _ids(labelled))
    return {path: known[key] for path in paths if (key := _key(path)) in known}


def _ids(labelled: LabelFormat) -> str:
    return hashlib.sha256(labelled.signature.encode()).hexdigest()[:16]


def _count(path: Path, labelled: LabelFormat) -> dict[int, int]:
    counts = np.bincount(labelled.table[labelled.read(path).numpy()].ravel(), minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


Key = tuple[str, int, int]
START = b'{"ids": "'
"""Start of every line, and so of the file."""


def _key(path: Path) -> Key:
    """The identity of a file in its current state."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the folder.") from error
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _line(ids: str, path: Path, counts: dict[int, int]) -> bytes:
    file, size, mtime_ns = _key(path)
    entry = {"ids": ids, "file": file, "size": size, "mtime_ns": mtime_ns, "counts": counts}
    return json.dumps({**entry, "crc32": _checksum(entry)}).encode() + b"\n"


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the file; None if it is damaged or cut off."""
    try:
        entry: dict[str, Any] = json.loads(line)
        checksum = entry.pop("crc32")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if checksum == _checksum(entry) else None


def _read(cache: Path, ids: str) -> dict[Key, dict[int, int]]:
    """The counts in a file that belong to these ids."""
    try:
        data = cache.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{cache}: cannot be read ({error.strerror}); pass another file.") from error
    if not START.startswith(data[: len(START)]):
        raise DataError(f"{cache}: is not a file of counts; pass another file, or delete it to count again.")
    return {
        (entry["file"], entry["size"], entry["mtime_ns"]): {int(value): n for value, n in entry["counts"].items()}
        for entry in map(_entry, data.split(b"\n"))
        if entry is not None and entry["ids"] == ids
    }


def _append(cache: Path, lines: bytes) -> None:
    """Append to the file, on a new line if the last one was cut off."""
    try:
        with cache.open("a+b") as file:
            if file.seek(0, os.SEEK_END) < len(START):  # too short to be recognised: an interrupted first write
                file.truncate(0)
            elif file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                lines = b"\n" + lines
            file.write(lines)
    except OSError as error:
        raise DataError(f"{cache}: cannot be written ({error.strerror}); pass another file.") from error
