"""Decoded and resized samples on the disk, mapped into memory instead of read."""

import zlib
from pathlib import Path

import torch
from torch.utils.data import Dataset

from crossmix.datasets._arguments import check_count, check_index
from crossmix.datasets._cache_folder import CacheFolder
from crossmix.datasets._shards import FileSamples, shard_path
from crossmix.datasets.sample import DataError, Sample

__all__ = ["CachedSamples"]


class CachedSamples(Dataset[Sample]):
    """The samples of a reader from a cache, which is built when it is first asked for.

    Samples are equal to the reader's byte for byte. Their tensors are private maps of the file: a crop loads no more of
    it than its own pages, writing to one changes neither the file nor what comes back the next time. That gives some
    thousand crops of 512 x 512 from 720 x 1280 per second and core (benchmarks/speed/input.py).

    The folder holds `manifest.json`, what was read and how; and in shards of 32 samples `shard-00000.bin`, their bytes
    one after another, with `shard-00000.json`: size and mtime of their source files, shape, offset and CRC-32. So there
    are few files, and yet the work is saved every 32 samples: a build that is killed goes on where it was, a shard that
    is damaged or stale is built again alone. Every file is written aside, synchronised and renamed; the JSON files
    carry their own sha256. Disk needed is 3 bytes per pixel, 4 with labels (GTA5 at 720 x 1280: 92 GB; Cityscapes'
    training images at 512 x 1024: 6.2 GB with labels); it is told and checked before anything is written.

    Opening checks the manifest against the reader, and all records, sizes and source files (a second for GTA5). The
    bytes of a sample are checked against its CRC-32 when a process first reads it, which costs a millisecond then: any
    flipped byte is noticed before it is used. What changes after that, while the process runs, is not.

    Several processes may ask for the same cache: one builds, the others wait. A complete one may be read-only, and
    moved, as may the sources; a copy must keep their mtimes.

    Args:
        samples: A reader of this package. Its image files are looked up by `samples.files`, and what else its samples
            depend on by `samples.fingerprint()`.
        folder: Where the cache is, or is to be: new, empty, or a cache of the same samples.
        workers: Processes that build beside this one; 0 builds in this one. They make the same bytes.
        progress: Whether to tell on stderr how much disk is needed and how far building is.

    Raises:
        DataError: If the folder holds anything else, was built from other files or parameters, cannot be written or
            has no room, a source file has changed or cannot be read, or a file of the cache is damaged; on access, if
            the sample's bytes are.
        TypeError: If `samples` is no reader of files, or `workers` no int.
        ValueError: If `workers` is negative, or the reader reads no images, or transforms its samples.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import GTA5, StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> cached = CachedSamples(GTA5(root, size=(32, 64)), f"{root}/cache", progress=False)
        >>> len(cached), cached[1].name, cached[1].label.shape
        (2, '00002', torch.Size([32, 64]))
    """

    def __init__(self, samples: FileSamples, folder: str | Path, *, workers: int = 0, progress: bool = True) -> None:
        if not (hasattr(samples, "files") and hasattr(samples, "fingerprint")):
            raise TypeError(
                f"`samples` must be a reader of image files such as GTA5, got {type(samples).__name__}; "
                "write it to files first."
            )
        if any(file.image is None for file in samples.files):
            raise ValueError("`samples` must have images, got a reader made with `images=False`; read them too.")
        if getattr(samples, "transform", None) is not None:
            raise ValueError(
                "`samples` must have no `transform`, whose results would be kept; transform what is cached."
            )
        workers = check_count("workers", workers)
        self.folder = Path(folder)
        cache = CacheFolder(self.folder, samples)
        if not cache.complete():
            cache.build(workers, progress=progress)
        self._items = cache.items()
        self._checked = bytearray(len(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        index = check_index(index, len(self._items))
        item = self._items[index]
        path = shard_path(self.folder, item.shard)
        try:  # a map of its own, which costs some microseconds: what a caller writes into it, no other caller sees
            mapped = torch.from_file(str(path), shared=False, size=item.offset + item.bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be read ({error}); {_anew(path)}.") from error
        pixels = mapped.numpy()[item.offset :]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != item.crc32:
                raise DataError(f"{path}: the bytes of sample {item.name!r} are damaged; {_anew(path)}.")
            self._checked[index] = 1
        # By way of numpy, so that the tensor's storage is the sample: a loader's worker sends storages as a whole.
        planes = torch.from_numpy(pixels).view(3 + item.labelled, item.height, item.width)
        return Sample(planes[:3], planes[3] if item.labelled else None, item.name)

    def __getstate__(self) -> dict[str, object]:
        """Another process checks for itself: it may be on another machine."""
        return {**self.__dict__, "_checked": bytearray(len(self._items))}


def _anew(path: Path) -> str:
    return f"delete {path.with_suffix('.json')} and open the cache again, which builds its samples anew"
