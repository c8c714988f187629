"""Shards of a cache: some consecutive samples in one file of pixels, with a record of what they were made of.

A shard is `shard-00007.bin`, the pixels of its samples one after another, and `shard-00007.json`, written after it. It
counts when both are there.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmix._files import whole_file
from crossmix.datasets._files import Files
from crossmix.datasets._sealed import read_sealed, write_sealed
from crossmix.datasets.sample import DataError, Sample

__all__ = ["PER_SHARD", "FileSamples", "Item", "ShardBuilder", "read_items", "shard_path"]

PER_SHARD = 32
"""Samples in a shard. A worker that is killed loses at most these: some seconds of work."""


class FileSamples(Protocol):
    """A reader of image files."""

    @property
    def files(self) -> Sequence[Files]:
        """Where the samples are."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every sample, or None where each keeps its own."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Sample:
        """The one at an index."""

    def fingerprint(self) -> dict[str, Any]:
        """All that its samples depend on besides the files, as JSON can hold it."""


class Item(NamedTuple):
    """Where a cached sample is: image (3, height, width), then, where there is one, the label (height, width)."""

    name: str
    shard: int
    offset: int
    height: int
    width: int
    labelled: bool
    crc32: int

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return (3 + self.labelled) * self.height * self.width


class ShardBuilder(Dataset[int | DataError]):
    """Builds a shard on access, so that a `DataLoader` builds several at a time; gives the number of its samples.

    An error comes back as a value: raised in a worker, it would reach the user wrapped in a traceback.
    """

    def __init__(self, samples: FileSamples, folder: Path, manifest: str, shards: Sequence[tuple[int, range]]) -> None:
        self.samples = samples
        self.folder = folder
        self.manifest = manifest
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> int | DataError:
        shard, span = self.shards[index]
        path = shard_path(self.folder, shard)
        try:
            return self._build(shard, span, path)
        except DataError as error:
            return error
        except OSError as error:
            return DataError(
                f"{error.filename or path}: cannot be written: {error.strerror}. "
                "Then start again: finished shards are kept."
            )

    def _build(self, shard: int, span: range, path: Path) -> int:
        items: list[dict[str, Any]] = []
        offset = 0
        with whole_file(path) as file:
            for i in span:
                sources = _sources(self.samples.files[i])  # before reading: a file that changes meanwhile is stale
                sample = self.samples[i]
                pixels = _pixels(sample)
                file.write(pixels)
                items.append(
                    {
                        "name": sample.name,
                        "sources": sources,
                        "offset": offset,
                        "shape": list(sample.image.shape[1:]),
                        "labelled": sample.label is not None,
                        "crc32": zlib.crc32(pixels),
                    }
                )
                offset += len(pixels)
        write_sealed(path.with_suffix(".json"), {"manifest": self.manifest, "shard": shard, "items": items})
        return len(items)


def shard_path(folder: Path, shard: int) -> Path:
    """The file of pixels."""
    return folder / f"shard-{shard:05d}.bin"


def read_items(folder: Path, shard: int, manifest: str, files: Sequence[Files]) -> list[Item]:
    """Read a shard's record, refusing one of another cache, a cut off shard, and sources that have changed."""
    path = shard_path(folder, shard)
    record_path = path.with_suffix(".json")
    anew = f"delete {record_path} and open the cache again, which builds its {len(files)} samples anew"
    record = read_sealed(record_path)
    if record["manifest"] != manifest or record["shard"] != shard:
        raise DataError(f"{record_path}: belongs to another cache; {anew}.")
    items = [
        Item(
            name=entry["name"],
            shard=shard,
            offset=entry["offset"],
            height=entry["shape"][0],
            width=entry["shape"][1],
            labelled=entry["labelled"],
            crc32=entry["crc32"],
        )
        for entry in record["items"]
    ]
    want = sum(item.bytes for item in items)
    if (size := path.stat().st_size) != want:
        raise DataError(f"{path}: expected {want} bytes, got {size}; {anew}.")
    for entry, one in zip(record["items"], files, strict=True):
        for file, was, now in zip(_paths(one), entry["sources"], _sources(one), strict=True):
            if was != now:
                raise DataError(
                    f"{file}: has changed since it was cached (size and mtime_ns were {was}, are {now}); {anew}."
                )
    return items


def _pixels(sample: Sample) -> memoryview:
    """A sample's bytes as they are kept."""
    parts: list[Tensor] = [sample.image] if sample.label is None else [sample.image, sample.label]
    shapes = [(3, *sample.image.shape[1:]), sample.image.shape[1:]]
    if any(part.dtype != torch.uint8 or part.shape != shape for part, shape in zip(parts, shapes, strict=False)):
        raise DataError(
            f"{sample.name}: expected an image (3, H, W) and a label (H, W), both uint8, got "
            f"{', '.join(f'{tuple(part.shape)} {part.dtype}' for part in parts)}; correct the reader."
        )
    return torch.cat([part.flatten() for part in parts]).numpy().data


def _paths(files: Files) -> list[Path]:
    return [path for path in (files.image, files.label) if path is not None]


def _sources(files: Files) -> list[list[int]]:
    """Size and mtime of a sample's files."""
    try:
        stats = [path.stat() for path in _paths(files)]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); restore the file.") from error
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
