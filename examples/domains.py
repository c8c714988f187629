"""The trainer's data: source, target and validation images, their identity, and crops of them by draw number."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from crossmix.datasets import (
    GTA5,
    CachedSamples,
    Cityscapes,
    Classes,
    DataError,
    RareClassSampler,
    Sample,
    SegmentationFolder,
    StreetScenes,
    Synthia,
    class_counts,
    image_size,
    read_classes,
)
from crossmix.datasets.cache import CacheError
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.datasets.statistics import known_counts
from crossmix.engine import KeyedCrops, QuietLoader, resident
from options import Config, size

__all__ = [
    "COUNTS", "SOURCE", "TARGET", "Batch", "Data", "Identity", "Unlabelled", "class_names", "counts_file",
    "crop_size", "differences", "drawn_names", "every_image_needed", "identity", "is_cached", "loader", "open_data",
    "prepared", "rare_class_sampler", "resident_bytes", "target_labels", "to_count", "too_small", "whole_batch",
    "with_rendered_data",
]  # fmt: skip

SOURCE, TARGET = 0, 1  # random streams, keyed next to the seed
TRAIN = "train"
COUNTS = "crossmix-stats.jsonl"
"""File of class counts, the one that `python -m crossmix.datasets stats` writes."""
LAYOUT = "expected images/ and labels/, each with train/ and val/ if there are splits"
PNG = b"\x89PNG\r\n\x1a\n"
Identity = dict[str, dict[str, Any]]
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # source and target, each images and labels


class Data(NamedTuple):
    """Source, unlabelled target and labelled validation images, whole."""

    source: GTA5 | Synthia | SegmentationFolder
    target: Cityscapes | SegmentationFolder
    validation: Cityscapes | SegmentationFolder


def open_data(config: Config) -> Data:
    """Open the folders; one that is missing or has another layout is a `DataError`."""
    source = size(config.source_size)
    if config.source:
        classes = read_classes(config.classes)
        labelled = split_folders(config.source, TRAIN)
        if labelled[1] is None:
            raise DataError(f"{config.source}: has no label maps; {LAYOUT}.")
        return Data(
            source=own_folder(labelled, classes, size=source),
            target=own_folder((split_folders(config.target, TRAIN)[0], None), classes, size=size(config.target_size)),
            validation=own_folder(split_folders(config.target, config.eval_split), classes),
        )
    return Data(
        source=Synthia(config.synthia, size=source) if config.synthia else GTA5(config.gta5, size=source),
        target=Cityscapes(config.cityscapes, "train", size=size(config.target_size), labels=False),
        validation=Cityscapes(config.cityscapes, config.eval_split),
    )


def class_names(config: Config) -> tuple[str, ...]:
    """Name the classes, by train id."""
    return read_classes(config.classes).names if config.classes else CLASS_NAMES


def target_labels(config: Config) -> Cityscapes | SegmentationFolder:
    """Open the labels of the target's training images, which only an oracle has."""
    if not config.source:
        return Cityscapes(config.cityscapes, TRAIN, images=False)
    _, labels = split_folders(config.target, TRAIN)
    if labels is None:
        raise DataError(f"{config.target}: has no label maps for --prior oracle; use --prior source.")
    classes = read_classes(config.classes)
    return SegmentationFolder(None, labels, classes.mapping, num_classes=len(classes.names))


def split_folders(root: str, split: str) -> tuple[Path, Path | None]:
    """Find the folders of images and label maps, or None, of a split, or of everything where there are no splits."""
    try:
        return _split_folders(root, split)
    except OSError as error:  # not of every version of Python, which may say instead that there is none
        raise DataError(f"{root}: cannot be listed ({error.strerror}); check its permissions.") from error


def _split_folders(root: str, split: str) -> tuple[Path, Path | None]:
    if not Path(root).is_dir():
        raise DataError(f"{root}: is not a folder; {LAYOUT}.")
    images, labels = Path(root, "images"), Path(root, "labels")
    by_kind, by_split = (images / split, labels / split), (Path(root, split, "images"), Path(root, split, "labels"))
    found = next((pair for pair in (by_kind, by_split, (images, labels)) if pair[0].is_dir()), (Path(root), None))
    if found[0] in {images, Path(root)} and any(one.is_dir() for one in (images / TRAIN, Path(root, TRAIN, "images"))):
        raise DataError(f"{root}: has a split {TRAIN} but no {split}; expected {by_kind[0]} or {by_split[0]}.")
    return found[0], found[1] if found[1] is not None and found[1].is_dir() else None


def own_folder(
    folders: tuple[Path, Path | None], classes: Classes, *, size: tuple[int, int] | None = None
) -> SegmentationFolder:
    images, labels = folders
    if labels is None:
        return SegmentationFolder(images, size=size)
    return SegmentationFolder(images, labels, classes.mapping, num_classes=len(classes.names), size=size)


def with_rendered_data(config: Config, root: Path) -> Config:
    """Render the demo's two domains, once, in the folder layouts of GTA5 and Cityscapes."""
    gta5, cityscapes = root / "gta5", root / "cityscapes"
    if not (root / "complete").exists():
        print(f"rendering StreetScenes into {root}", flush=True)
        StreetScenes(400, domain="source", seed=0).write(gta5, layout="gta5")
        StreetScenes(400, domain="target", seed=1).write(cityscapes, layout="cityscapes", split="train")
        StreetScenes(100, domain="target", seed=2).write(cityscapes, layout="cityscapes", split="val")
        (root / "complete").touch()
    return replace(config, gta5=str(gta5), cityscapes=str(cityscapes))


def counts_file(config: Config, out: Path) -> Path:
    """Choose the file of class counts: beside the source, or in `out` where that folder cannot be written to."""
    root = Path(config.source or config.synthia or config.gta5)
    file = root / COUNTS
    return file if os.access(file if file.exists() else root, os.W_OK) else out / COUNTS


def to_count(config: Config, data: Data, out: Path) -> int:
    """Say how many label maps of the source `rare_class_sampler` has to read, because their counts are not kept."""
    paths = [one.label for one in data.source.files if one.label is not None]
    return len(paths) - len(known_counts(paths, data.source.label_format, counts_file(config, out)))


def rare_class_sampler(config: Config, data: Data, out: Path) -> RareClassSampler:
    """Count the classes of the source, or read the counts that are kept, and build the sampler of its images."""
    file = counts_file(config, out)
    if file.parent == out:
        out.mkdir(parents=True, exist_ok=True)
    counts = class_counts(data.source, cache=file, workers=config.workers)
    try:
        return RareClassSampler(counts, temperature=config.rare_temperature, min_pixels=config.rare_pixels)
    except ValueError as error:
        raise DataError(f"--rare-pixels {config.rare_pixels}: {error}") from error


# ------------------------------------------------------------------------------------------------ identity of the data


def identity(data: Data, classes: Sequence[str]) -> Identity:
    """Identify the data, wherever it is stored, by reader, names, classes and file sizes."""
    found = {}
    for part, samples in data._asdict().items():
        names = "\n".join(one.name for one in samples.files)
        found[part] = {
            "reader": type(samples).__name__,
            "count": len(samples.files),
            "names": hashlib.sha256(names.encode()).hexdigest(),
            "classes": f"{list(classes)}: {samples.label_format.signature}" * isinstance(samples, SegmentationFolder),
            "bytes": torch.tensor([[_file_size(path) for path in one[:2]] for one in samples.files]),
        }  # fmt: skip
    return found


def _file_size(path: Path | None) -> int:
    """Count the bytes of a file; 0 if there is none, or if it cannot be reached, as reading it will say."""
    try:
        return 0 if path is None else path.stat().st_size
    except OSError:  # a broken link, say, which may be one of the files to leave out
        return 0


def differences(old: Identity, new: Identity, data: Data) -> tuple[list[str], list[str]]:
    """Compare the data of a checkpoint with the present data: what differs, and the names of samples that changed.

    A repaired file has another size, so data in which one such file, or a tenth of all, differs is still the same.
    """
    other, changed = [], []
    for part, now in new.items():
        was, samples = old[part], getattr(data, part)
        for key in ("reader", "count", "names", "classes"):
            if was.get(key, "") != now[key]:
                how = {"names": " with other names", "classes": " with other classes"}.get(key, "")
                other.append(f"the {part} had {was['count']} samples of {was['reader']}, and is {now['count']} of "
                             f"{now['reader']}{how}")  # fmt: skip
                break
        else:
            moved = (was["bytes"] != now["bytes"]).any(1).nonzero().flatten().tolist()
            names = [samples.files[i].name for i in moved]
            if len(moved) > max(1, len(samples) // 10):
                other.append(f"the {part} has {len(moved)} files of {len(samples)} with another size, such as "
                             f"{names[0]}")  # fmt: skip
            else:
                changed += names
    return other, changed


def too_small(samples: Any, crop: tuple[int, int]) -> list[str]:  # noqa: ANN401 - any reader of files
    """List the images smaller than the crop, with their sizes. No image is decoded."""
    found = []
    for file in samples.files:
        if samples.size is None and _has_room(file.image, max(crop)):
            continue
        try:
            height, width = samples.size or image_size(file.image)
        except DataError:
            continue  # reading the image will say what is wrong
        if height < crop[0] or width < crop[1]:
            found.append(f"{file.image}: {height}x{width}")
    return found


def _has_room(path: Path, length: int) -> bool:
    """Whether both sides of a PNG have this length: its first bytes tell, while its orientation may be at its end."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return False
    sides = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    return head.startswith(PNG) and min(sides) >= length


# ------------------------------------------------------------------------------------------------------------- crops


def crop_size(config: Config) -> tuple[int, int]:
    return size(config.crop) or (0, 0)


def prepared(config: Config, data: Data, *, progress: bool) -> tuple[Any, Any]:
    """Return source and target as the crops are read from: the folders, a cache, or the device's memory."""
    found: list[Any] = []
    for name, reader in (("source", data.source), ("target", data.target)):
        samples = cached(config, reader, Path(config.cache) / name, progress=progress) if config.cache else reader
        try:
            found.append(resident(samples, config.device) if config.resident else samples)
        except ValueError as error:
            raise DataError(f"--resident: {error}") from error
    return found[0], found[1]


def cached(config: Config, reader: Any, folder: Path, *, progress: bool) -> CachedSamples:  # noqa: ANN401 - any reader
    """Open the cache of a domain, or build it."""
    with every_image_needed(config):
        return CachedSamples(reader, folder, workers=config.workers, progress=progress)


def is_cached(config: Config, reader: Any, name: str) -> bool:  # noqa: ANN401 - any reader
    """Whether `--cache` holds a domain whole; a `DataError` if it holds something else, or images that have changed."""
    with every_image_needed(config):
        return CachedSamples.check(reader, Path(config.cache) / name)


@contextmanager
def every_image_needed(config: Config) -> Iterator[None]:
    """Say of an image that a cache cannot take that `--skip-files` does not help; a `CacheError` has its own advice."""
    try:
        yield
    except DataError as error:
        if not config.skip_files or isinstance(error, CacheError):
            raise
        raise DataError(
            f"{error} With a --cache, which holds every image, --skip-files cannot leave this one out: repair or "
            "remove the file, or leave out --cache."
        ) from error


def resident_bytes(data: Data) -> int | None:
    """Count the bytes that `--resident` takes on the device; unknown if images keep their own sizes."""
    total = 0
    for samples, channels in ((data.source, 4), (data.target, 3)):  # the label is a channel more
        if samples.size is None:
            return None
        total += len(samples) * channels * prod(samples.size)
    return total


def draws(config: Config, start: int, rank: int, world: int) -> Iterator[int]:
    """Count the draws of one process, from a step to the end: its rows of each batch."""
    for part in range(start * config.accumulate, config.steps * config.accumulate):
        begin = config.batch * (part * world + rank)
        yield from range(begin, begin + config.batch)


class Crops(Dataset[tuple[Tensor, Tensor, int]]):
    """Crops by draw number, each with the index of the sample that was left out in its favour, or -1."""

    def __init__(self, crops: KeyedCrops) -> None:
        self.crops = crops

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.crops[draw]
        index = self.crops.index(draw)
        return image, label, index if index in self.crops.skipped else -1


class Unlabelled(Dataset[Sample]):
    """Samples whose labels are replaced by a constant.

    With 0 a label tells an image's pixels from those that padding adds; with 255 there is nothing to score.
    """

    def __init__(self, samples: Any, value: int) -> None:  # noqa: ANN401 - any data set
        self.samples = samples
        self.value = value

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, _, name = self.samples[index]
        return Sample(image, image.new_full(image.shape[1:], self.value), name)


def loader(
    config: Config, samples: Any, stream: int, start: int, *,  # noqa: ANN401 - what `prepared` returned
    rank: int, world: int, rare: RareClassSampler | None = None,
) -> QuietLoader[Any]:  # fmt: skip
    """Load batches of crops from a step on: images, labels, and for each the index of a sample left out for it, or -1.

    `stream` is SOURCE or TARGET; `rare` samples the source's images, and is ignored for the target.
    """
    keyed = KeyedCrops(
        Unlabelled(samples, 0) if config.pad and stream == TARGET else samples,
        crop_size(config),
        seed=config.seed,
        stream=stream,
        skip=config.skip_files,
        pad=config.pad,
        rare=rare if stream == SOURCE else None,
    )
    return QuietLoader(
        Crops(keyed),
        batch_size=config.batch,
        sampler=draws(config, start, rank, world),
        num_workers=0 if config.resident else config.workers,
        pin_memory=config.device.startswith("cuda") and not config.resident,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )


def whole_batch(config: Config, world: int) -> int:
    """Count the source images of a step over all processes; there are as many target images."""
    return config.batch * config.accumulate * world


def drawn_names(
    config: Config, data: Data, step: int, world: int, *, rare: RareClassSampler | None = None
) -> list[str]:
    """Name the samples that a step trains on, over all processes."""
    whole = whole_batch(config, world)
    names = []
    for stream, samples in ((SOURCE, data.source), (TARGET, data.target)):
        sampler = rare if stream == SOURCE else None
        keyed = KeyedCrops(samples, (1, 1), seed=config.seed, stream=stream, rare=sampler)
        names += [samples.files[keyed.index(draw)].name for draw in range(step * whole, (step + 1) * whole)]
    return names
