"""What the readers share: from two files to a `Sample`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from crossmix._tensors import nearest
from crossmix.datasets._labels import LabelFormat
from crossmix.datasets._png import read_png
from crossmix.datasets.sample import DataError, Sample

__all__ = ["Files", "FolderDataset", "check_size", "listed", "paired", "pngs"]

Filter = Literal["bilinear", "bicubic"]


class Files(NamedTuple):
    """Where one sample is."""

    image: Path | None
    label: Path | None
    name: str


class FolderDataset(Dataset[Sample]):
    """Pairs of an image and a label map on disk, decoded when they are asked for.

    Attributes:
        files: Where each sample is.
        label_format: How its label maps are read.
        size: (height, width) that samples are resized to, or None.
    """

    def __init__(
        self, files: list[Files], labels: LabelFormat, size: tuple[int, int] | None, resampling: Filter
    ) -> None:
        self.files = files
        self.size = size
        self.label_format = labels
        self._resampling: Filter = resampling

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its label map, resize both, and map ids to train ids.

        Without a size the two must be equally large; with one, each is resized, as the released code does with the few
        GTA5 pairs that differ.
        """
        image_path, label_path, name = self.files[index]
        image = torch.empty(3, 0, 0, dtype=torch.uint8) if image_path is None else read_image(image_path)
        ids = None if label_path is None else self.label_format.read(label_path)
        if self.size is not None:
            image = image if image_path is None else _resize_image(image, self.size, self._resampling)
            ids = None if ids is None else nearest(ids, self.size)
        elif image_path is not None and ids is not None and image.shape[-2:] != ids.shape:
            raise DataError(
                f"{label_path}: is {ids.shape[0]} x {ids.shape[1]} but its image {image.shape[1]} x {image.shape[2]}; "
                "pass `size=` to resize both to one size, or remove the pair."
            )
        return Sample(image, None if ids is None else torch.from_numpy(self.label_format.table[ids.numpy()]), name)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the samples depend on besides the files, for caches of them.

        Returns:
            A dict that JSON can hold.
        """
        return {
            "reader": type(self).__name__,
            "size": self.size,
            "resampling": self._resampling,
            "labels": self.label_format.signature,
        }


SIGNS = {"Cityscapes": ("leftImg8bit*", "gtFine*"), "SYNTHIA": ("RGB", "GT"), "GTA5": ("images", "labels")}
"""Folders that tell a data set."""


def _looks_like(root: Path, expected: str) -> str:
    """What an unexpected folder seems to be, as a part of a message, or nothing."""
    for name, patterns in SIGNS.items():
        if name != expected and any(path.is_dir() for pattern in patterns for path in root.glob(pattern)):
            return f" (it looks like {name})"
    return "" if root.is_dir() else " (there is no such folder)"


def paired(
    where: str,
    images: Mapping[str, Path] | None,
    labels: Mapping[str, Path] | None,
    layout: str,
    *,
    strict: bool = False,
    root: tuple[Path, str] | None = None,
) -> list[Files]:
    """Pair images and label maps of the same key, sorted by key; either may be None, which is not to be read.

    An image without a label map is an error, with `strict` the reverse too. `where`, `layout` and `root`, a folder with
    the data set that it should be, are for messages.
    """
    if images is None and labels is None:
        raise ValueError("`images` and `labels` must not both be False; read at least one of them.")
    found = images if images is not None else labels or {}
    if not found:
        kind = "images" if images is not None else "label maps"
        other = f"{len(labels)} label maps but no images" if images is not None and labels else f"no {kind}"
        raise DataError(f"{where} has {other}{'' if root is None else _looks_like(*root)}; {layout}.")
    if images is not None and labels is not None:
        alone = sorted(images.keys() ^ labels.keys() if strict else images.keys() - labels.keys())
        if alone:
            missing = "label map" if alone[0] in images else "image"
            raise DataError(
                f"{where} has {len(images)} images and {len(labels)} label maps that do not pair up, {alone[0]} has no "
                f"{missing}; {layout}."
            )
    return [Files((images or {}).get(key), (labels or {}).get(key), key.rpartition("/")[2]) for key in sorted(found)]


def pngs(folder: Path) -> dict[str, Path]:
    """The PNG files of a folder by name, without the ending."""
    return {path.stem: path for path in folder.glob("*.png")}


def listed(files: list[Files], names: str | Path | None) -> list[Files]:
    """Keep the files that a list names, one per line, in the order of the files; folders in its lines do not count."""
    if names is None:
        return files
    path = Path(names)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as a list of names ({error}); pass a text file, a name per line."
        ) from error
    wanted = {line.strip().rpartition("/")[2].removesuffix(".png") for line in lines if line.strip()}
    absent = sorted(wanted - {file.name for file in files})
    if absent or not wanted:
        what = (
            f"names {absent[0]}, which is not there, as {len(absent)} of {len(wanted)}" if absent else "names nothing"
        )
        raise DataError(f"{path}: {what}; pass the list that belongs to this folder.")
    return [file for file in files if file.name in wanted]


def read_image(path: Path) -> Tensor:
    """Read an RGB image, (3, H, W) uint8; an alpha channel is left out."""
    pixels = read_png(path)
    if pixels.shape[0] not in {3, 4}:
        raise DataError(f"{path}: expected an RGB image, got {pixels.shape[0]} channels; is this a label map?")
    return pixels[:3]


def check_size(size: tuple[int, int] | None) -> None:
    """Refuse anything but None or two positive ints."""
    if size is not None and min(size) < 1:
        raise ValueError(f"`size` must be (height, width) in pixels, both positive, got {size}.")


def _resize_image(image: Tensor, size: tuple[int, int], resampling: Filter) -> Tensor:
    """Resize with antialiasing, as Pillow does to within one grey level."""
    return functional.interpolate(image[None], size=size, mode=resampling, antialias=True, align_corners=False)[0]
