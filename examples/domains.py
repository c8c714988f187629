"""The data of the trainer: source, target and validation images, what they are, and crops of them by draw number."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    Sample,
    SegmentationFolder,
    StreetScenes,
    Synthia,
    read_classes,
)
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.engine import KeyedCrops, QuietLoader, resident
from options import Config, size

__all__ = [
    "SOURCE",
    "TARGET",
    "Batch",
    "Data",
    "class_names",
    "crop_size",
    "differences",
    "drawn_names",
    "identity",
    "loader",
    "open_data",
    "prepared",
    "target_labels",
    "too_small",
    "with_rendered_data",
]

SOURCE, TARGET = 0, 1  # streams of randomness, next to the seed
TRAIN = "train"
LAYOUT = "expected images/ and labels/, in both of them train/ and val/ where there are splits"
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # source and target, each images and labels
PNG = b"\x89PNG\r\n\x1a\n"


class Data(NamedTuple):
    """Source, unlabelled target, and labelled validation images at their own size."""

    source: GTA5 | Synthia | SegmentationFolder
    target: Cityscapes | SegmentationFolder
    validation: Cityscapes | SegmentationFolder


def open_data(config: Config) -> Data:
    """Open the folders.

    Raises:
        DataError: If one is missing, or is not laid out as it should be.
    """
    source = size(config.source_size)
    if config.source:
        classes = read_classes(config.classes)
        labelled = part(config.source, TRAIN)
        if labelled[1] is None:
            raise DataError(f"{config.source}: has no label maps; {LAYOUT}.")
        return Data(
            source=own_folder(labelled, classes, size=source),
            target=own_folder((part(config.target, TRAIN)[0], None), classes, size=size(config.target_size)),
            validation=own_folder(part(config.target, config.eval_split), classes),
        )
    return Data(
        source=Synthia(config.synthia, size=source) if config.synthia else GTA5(config.gta5, size=source),
        target=Cityscapes(config.cityscapes, "train", size=size(config.target_size), labels=False),
        validation=Cityscapes(config.cityscapes, config.eval_split),
    )


def class_names(config: Config) -> tuple[str, ...]:
    """The classes, by train id."""
    return read_classes(config.classes).names if config.classes else CLASS_NAMES


def target_labels(config: Config) -> Cityscapes | SegmentationFolder:
    """The labels of the target's training images alone, which only an oracle has."""
    if not config.source:
        return Cityscapes(config.cityscapes, TRAIN, images=False)
    _, labels = part(config.target, TRAIN)
    if labels is None:
        raise DataError(f"{config.target}: has no label maps for --prior oracle; take --prior source.")
    classes = read_classes(config.classes)
    return SegmentationFolder(None, labels, classes.mapping, num_classes=len(classes.names))


def part(root: str, split: str) -> tuple[Path, Path | None]:
    """The folders of images and of label maps, where there are any, of a split; or of all, where there are no splits.

    Raises:
        DataError: If there are splits, but not this one.
    """
    if not Path(root).is_dir():
        raise DataError(f"{root}: is no folder; {LAYOUT}.")
    images, labels = Path(root, "images"), Path(root, "labels")
    by_kind, by_split = (images / split, labels / split), (Path(root, split, "images"), Path(root, split, "labels"))
    found = next((pair for pair in (by_kind, by_split, (images, labels)) if pair[0].is_dir()), (Path(root), None))
    if found[0] in {images, Path(root)} and any(one.is_dir() for one in (images / TRAIN, Path(root, TRAIN, "images"))):
        raise DataError(f"{root}: has a split {TRAIN} but no {split}; expected {by_kind[0]} or {by_split[0]}.")
    return found[0], found[1] if found[1] is not None and found[1].is_dir() else None


def own_folder(
    folders: tuple[Path, Path | None], classes: Classes, *, size: tuple[int, int] | None = None
) -> SegmentationFolder:
    """Read one's own images and label maps, where there are any."""
    images, labels = folders
    if labels is None:
        return SegmentationFolder(images, size=size)
    return SegmentationFolder(images, labels, classes.mapping, num_classes=len(classes.names), size=size)


def with_rendered_data(config: Config, root: Path) -> Config:
    """Render the demo's two domains into the folder layouts of GTA5 and Cityscapes, once."""
    gta5, cityscapes = root / "gta5", root / "cityscapes"
    if not (root / "complete").exists():
        print(f"rendering StreetScenes into {root}", flush=True)
        StreetScenes(400, domain="source", seed=0).write(gta5, layout="gta5")
        StreetScenes(400, domain="target", seed=1).write(cityscapes, layout="cityscapes", split="train")
        StreetScenes(100, domain="target", seed=2).write(cityscapes, layout="cityscapes", split="val")
        (root / "complete").touch()
    return replace(config, gta5=str(gta5), cityscapes=str(cityscapes))


# ------------------------------------------------------------------------------------------------- what the data is


def identity(data: Data, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the data is, wherever it lies: reader, number and hash of names, classes of one's own, sizes of files."""
    found = {}
    for part, samples in data._asdict().items():
        names = "\n".join(one.name for one in samples.files)
        found[part] = {
            "reader": type(samples).__name__,
            "count": len(samples.files),
            "names": hashlib.sha256(names.encode()).hexdigest(),
            "classes": f"{list(classes)}: {samples.label_format.signature}"
            if isinstance(samples, SegmentationFolder)
            else "",
            "bytes": torch.tensor(
                [[0 if path is None else path.stat().st_size for path in one[:2]] for one in samples.files]
            ),
        }
    return found


def differences(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], data: Data
) -> tuple[list[str], list[str]]:
    """Compare what a checkpoint says of its data with the identity of what there is now.

    A file that was repaired has another size. So one such file, or a tenth of all, is the same data still.

    Returns:
        How the data is another, and the names of samples whose files have changed.
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
                other.append(
                    f"the {part} has {len(moved)} files of {len(samples)} with another size, such as {names[0]}"
                )
            else:
                changed += names
    return other, changed


def too_small(samples: Any, crop: tuple[int, int]) -> list[str]:  # noqa: ANN401 - any reader of files
    """The images that are smaller than the crop, each with its size; only their first bytes are read."""
    sizes: Iterator[tuple[str, tuple[int, int]]]
    if samples.size is not None:
        sizes = ((str(file.image), tuple(samples.size)) for file in samples.files)
    else:
        sizes = ((str(file.image), _image_size(samples, i)) for i, file in enumerate(samples.files))
    return [f"{name}: {height}x{width}" for name, (height, width) in sizes if height < crop[0] or width < crop[1]]


def _image_size(samples: Any, index: int) -> tuple[int, int]:  # noqa: ANN401 - any reader of files
    """Height and width, by the header of a PNG file."""
    with samples.files[index].image.open("rb") as file:
        head = file.read(24)
    if len(head) == 24 and head.startswith(PNG):
        return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    return (2**31, 2**31)  # reading it says what is wrong with it


# ------------------------------------------------------------------------------------------------------------- crops


def crop_size(config: Config) -> tuple[int, int]:
    """Height and width of the crops."""
    height, width = size(config.crop) or (0, 0)
    return height, width


def prepared(config: Config, data: Data, *, progress: bool) -> tuple[Any, Any]:
    """Source and target as they are cropped: as they lie, cached, or in the device's memory."""
    found: list[Any] = []
    for name, reader in (("source", data.source), ("target", data.target)):
        samples: Any = reader
        if config.cache:
            samples = CachedSamples(reader, Path(config.cache) / name, workers=config.workers, progress=progress)
        found.append(resident(samples, config.device) if config.resident else samples)
    return found[0], found[1]


class Draws:
    """Numbers of the draws of one process: its rows of each batch, from a step on, to the end."""

    def __init__(self, config: Config, start: int, rank: int, world: int) -> None:
        self.batch = config.batch
        self.every = config.batch * world
        self.first = config.batch * rank
        self.parts = range(start * config.accumulate, config.steps * config.accumulate)

    def __len__(self) -> int:
        return self.batch * len(self.parts)

    def __iter__(self) -> Iterator[int]:
        for part in self.parts:
            begin = part * self.every + self.first
            yield from range(begin, begin + self.batch)


class Crops(Dataset[tuple[Tensor, Tensor, int]]):
    """Crops by draw number, each with the index of the sample that was left out for it, or -1."""

    def __init__(self, crops: KeyedCrops) -> None:
        self.crops = crops

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, int]:
        image, label = self.crops[draw]
        index = self.crops.index(draw)
        return image, label, index if index in self.crops.skipped else -1


class Unlabelled(Dataset[Sample]):
    """Samples with a label of zeros, which tells their pixels from those that padding adds."""

    def __init__(self, samples: Any) -> None:  # noqa: ANN401 - any data set
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, _, name = self.samples[index]
        return Sample(image, image.new_zeros(image.shape[1:]), name)


def loader(
    config: Config,
    samples: Any,  # noqa: ANN401 - a data set, or a list
    stream: int,
    start: int,
    *,
    rank: int,
    world: int,
) -> QuietLoader[Any]:
    """Batches of crops from a step on: images, labels, and for each the index of a sample left out for it, or -1.

    Args:
        config: The options.
        samples: What `prepared` returned.
        stream: SOURCE or TARGET.
        start: The first step.
        rank: Which process this is.
        world: Of how many.
    """
    keyed = KeyedCrops(
        Unlabelled(samples) if config.pad and stream == TARGET else samples,
        crop_size(config),
        seed=config.seed,
        stream=stream,
        skip=config.skip_files,
        pad=config.pad,
    )
    return QuietLoader(
        Crops(keyed),
        batch_size=config.batch,
        sampler=Draws(config, start, rank, world),
        num_workers=0 if config.resident else config.workers,
        pin_memory=config.device.startswith("cuda") and not config.resident,
        generator=torch.Generator(),  # or each loader would draw from the global one
    )


def drawn_names(config: Config, data: Data, step: int, world: int) -> list[str]:
    """What a step trains on, by all processes."""
    whole = config.batch * config.accumulate * world
    names = []
    for stream, samples in ((SOURCE, data.source), (TARGET, data.target)):
        keyed = KeyedCrops(samples, (1, 1), seed=config.seed, stream=stream)
        names += [samples.files[keyed.index(draw)].name for draw in range(step * whole, (step + 1) * whole)]
    return names
