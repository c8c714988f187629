"""How often every class occurs, counted once and kept."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossmix.datasets._files import FolderDataset
from crossmix.datasets._labels import LabelFormat
from crossmix.datasets._parallel import each
from crossmix.datasets.sample import DataError

__all__ = ["class_counts"]


def class_counts(dataset: FolderDataset, *, cache: str | os.PathLike[str] | None = None, workers: int = 0) -> Tensor:
    """Count the pixels of every class in every label map, at the maps' own size.

    For class frequencies, for a prior, for drawing rare classes more often. Images are not read.

    Args:
        dataset: A reader of this package.
        cache: A file that keeps the counts, a line of JSON per map. What it holds is taken where the map's size and
            time of change are as they were; the rest is counted and added, so an interrupted count goes on where it
            was.
        workers: Processes; 0 counts in this one.

    Returns:
        A row for each sample, (N, 256) int64. Columns are train ids 0 to 254, then ignored pixels.

    Raises:
        DataError: If a map is missing, damaged, or holds an id in no table, or `cache` is no such file.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import GTA5, StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> counts = class_counts(GTA5(root))
        >>> counts.shape, counts.sum(1)
        (torch.Size([2, 256]), tensor([8192, 8192]))
    """
    paths = [file.label for file in dataset.files if file.label is not None]
    if len(paths) < len(dataset.files):
        raise DataError(
            f"{len(dataset.files) - len(paths)} samples have no label map; read the data set with its labels."
        )
    return count_files(paths, dataset.label_format, None if cache is None else Path(cache), workers=workers)


def count_files(paths: list[Path], labelled: LabelFormat, cache: Path | None, *, workers: int) -> Tensor:
    """The same for label maps given as paths."""
    known = {} if cache is None else _read(cache, labelled)
    counted = {path: known[key] for path in paths if (key := _key(path)) in known}
    rest = [path for path in paths if path not in counted]
    write = _writer(cache, labelled) if rest and cache is not None else None
    for path, counts in each(partial(_count, labelled=labelled), rest, "counting", workers=workers):
        counted[path] = counts
        if write is not None:
            write(path, counts)
    table = torch.zeros(len(paths), 256, dtype=torch.int64)
    for row, path in zip(table, paths, strict=True):
        for value, count in counted[path].items():
            row[value] = count
    return table


def _count(path: Path, labelled: LabelFormat) -> dict[int, int]:
    counts = np.bincount(labelled.table[labelled.read(path).numpy()].ravel(), minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


Key = tuple[str, int, int]


def _key(path: Path) -> Key:
    """What a count belongs to: this file, as it is now."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the folder.") from error
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _head(labelled: LabelFormat) -> dict[str, Any]:
    return {"counts of": labelled.signature}


def _read(cache: Path, labelled: LabelFormat) -> Mapping[Key, dict[int, int]]:
    """The counts in a file; the last line may be cut off."""
    try:
        lines = cache.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{cache}: cannot be read ({error}); delete it to count again.") from error
    if not lines[0]:
        return {}
    found: dict[Key, dict[int, int]] = {}
    try:
        if json.loads(lines[0]) != _head(labelled):
            raise DataError(f"{cache}: holds counts of other ids; pass another file, or delete it to count again.")
        for line in lines[1:-1]:
            entry = json.loads(line)
            key = (str(entry["file"]), int(entry["size"]), int(entry["mtime_ns"]))
            found[key] = {int(value): int(count) for value, count in entry["counts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{cache}: is no file of counts ({error}); delete it to count again.") from error
    return found


def _writer(cache: Path, labelled: LabelFormat) -> Callable[[Path, dict[int, int]], None]:
    """Append to the file, whole lines at a time."""
    try:
        data = cache.read_bytes() if cache.exists() else b""
        whole = data[: data.rfind(b"\n") + 1] or json.dumps(_head(labelled)).encode() + b"\n"
        if whole != data:
            cache.write_bytes(whole)
    except OSError as error:
        raise DataError(f"{cache}: cannot be written ({error.strerror}); pass another file.") from error

    def write(path: Path, counts: dict[int, int]) -> None:
        file, size, mtime_ns = _key(path)
        line = json.dumps({"file": file, "size": size, "mtime_ns": mtime_ns, "counts": counts})
        with cache.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    return write
