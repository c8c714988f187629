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
from torch.utils.data import ConcatDataset, Dataset, Subset

from crossmix.datasets._arguments import check_count
from crossmix.datasets._folder_dataset import Files, FolderDataset
from crossmix.datasets._labels import LabelFormat
from crossmix.datasets._parallel import each
from crossmix.datasets.sample import DataError, Sample

__all__ = ["class_counts"]


def class_counts(dataset: Dataset[Sample], *, cache: str | os.PathLike[str] | None = None, workers: int = 0) -> Tensor:
    """Count the pixels of every class in every label map.

    For class frequencies, for a prior, for drawing rare classes more often. A reader's maps are counted at their own
    size, and its images are not read; of a cache of samples, of StreetScenes and of any other data set the labels are
    counted as they come.

    Args:
        dataset: A data set of this package, or any whose items have a `label` (H, W) of integers from 0 to 255; also as
            `Subset` and `ConcatDataset` of `torch.utils.data` hold it.
        cache: A file that keeps the counts of a reader, a line of JSON per map. What it holds is taken where the map's
            size and time of change are as they were; the rest is counted and added, so an interrupted count goes on
            where it was.
        workers: Processes that read a reader's maps; 0 counts in this one.

    Returns:
        A row for each sample, (N, 256) int64. Columns are train ids 0 to 254, then ignored pixels.

    Raises:
        DataError: If a map is missing, damaged, or holds an id in no table, or `cache` is no such file.
        TypeError: If the items have no label, or `workers` is no int.
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
            raise ValueError(
                f"`cache` keeps counts of label files, which {type(dataset).__name__} has none of; omit it."
            )
        return _of_samples(dataset)
    files, labelled = chosen
    paths = [file.label for file in files if file.label is not None]
    if len(paths) < len(files):
        raise DataError(f"{len(files) - len(paths)} samples have no label map; read the data set with its labels.")
    return count_files(paths, labelled, None if cache is None else Path(cache), workers=workers)


def _files(dataset: Dataset[Sample]) -> tuple[list[Files], LabelFormat] | None:
    """Where a reader's samples are, or those of a subset of it; None where samples are not read from files."""
    if isinstance(dataset, FolderDataset):
        return dataset.files, dataset.label_format
    if isinstance(dataset, Subset) and (whole := _files(dataset.dataset)) is not None:
        return [whole[0][i] for i in dataset.indices], whole[1]
    return None


def _of_samples(dataset: Dataset[Sample]) -> Tensor:
    """Counts of the labels that a data set returns."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"`dataset` must have a length and items, got {type(dataset).__name__}; pass a data set.")
    table = torch.zeros(len(dataset), 256, dtype=torch.int64)
    for i in range(len(table)):
        label = getattr(dataset[i], "label", None)
        if label is None:
            raise DataError(f"sample {i} of {type(dataset).__name__} has no label; read the data set with its labels.")
        if label.numel() and (int(label.min()) < 0 or int(label.max()) > 255):
            raise DataError(f"sample {i} of {type(dataset).__name__} has labels outside 0..255; map its ids first.")
        table[i] = torch.bincount(label.flatten().long().cpu(), minlength=256)
    return table


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
