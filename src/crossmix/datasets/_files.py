"""What the readers share: from two files to a `Sample`."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from crossmix.datasets._png import read_png
from crossmix.datasets.classes import KNOWN_LABEL_IDS, train_ids
from crossmix.datasets.sample import DataError, Sample

__all__ = ["Files", "check_size", "read_image", "read_label_ids", "read_sample"]

Filter = Literal["bilinear", "bicubic"]

TRAIN_IDS = train_ids().numpy()


class Files(NamedTuple):
    """Where one sample is."""

    image: Path
    label: Path | None
    name: str


def read_sample(files: Files, size: tuple[int, int] | None, resampling: Filter) -> Sample:
    """Read an image and its label map, resize both, and map label ids to train ids.

    Without a size the two must be equally large; with one, each is resized, as the released code does with the few GTA5
    pairs that differ.
    """
    image = read_image(files.image)
    if files.label is None:
        return Sample(image if size is None else _resize_image(image, size, resampling), None, files.name)
    ids = read_label_ids(files.label)
    if size is not None:
        image, ids = _resize_image(image, size, resampling), _resize_label(ids, size)
    elif image.shape[-2:] != ids.shape:
        raise DataError(
            f"{files.label}: is {ids.shape[0]} x {ids.shape[1]} but its image {image.shape[1]} x {image.shape[2]}; "
            "pass `size=` to resize both to one size, or remove the pair."
        )
    return Sample(image, torch.from_numpy(TRAIN_IDS[ids.numpy()]), files.name)


def read_image(path: Path) -> Tensor:
    """Read an RGB image, (3, H, W) uint8."""
    pixels = read_png(path)
    if pixels.shape[0] != 3:
        raise DataError(f"{path}: expected an RGB image, got {pixels.shape[0]} channels; is this a label map?")
    return pixels


def read_label_ids(path: Path) -> Tensor:
    """Read a map of Cityscapes label ids, (H, W) uint8, refusing what no official file holds."""
    pixels = read_png(path)
    if pixels.shape[0] != 1:
        raise DataError(
            f"{path}: expected a label map with one channel of label ids, got {pixels.shape[0]} channels; "
            "colour-coded maps are not read."
        )
    ids = pixels[0]
    if ids.numpy().max(initial=0) < 35:  # all official, as in most files, which counting tells 3 ms later
        return ids
    present = set(np.flatnonzero(np.bincount(ids.numpy().ravel(), minlength=256)).tolist())
    unknown = sorted(present - KNOWN_LABEL_IDS)
    if unknown:
        raise DataError(
            f"{path}: holds ids {unknown[:5]} that are no Cityscapes label ids (0..34); "
            "use the official label id files."
        )
    if 255 in present and not any(18 < value < 255 for value in present):
        raise DataError(
            f"{path}: looks like train ids (0..18 and 255) where label ids are expected; "
            "use the official label id files."
        )
    return ids


def check_size(size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Refuse anything but None or two positive ints."""
    if size is not None and min(size) < 1:
        raise ValueError(f"`size` must be (height, width) in pixels, both positive, got {size}.")
    return size


def _resize_image(image: Tensor, size: tuple[int, int], resampling: Filter) -> Tensor:
    """Resize with antialiasing, as Pillow does to within one grey level."""
    return functional.interpolate(image[None], size=size, mode=resampling, antialias=True, align_corners=False)[0]


def _resize_label(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the nearest pixel, as Pillow's NEAREST does."""
    rows, columns = (_nearest(old, new) for old, new in zip(ids.shape, size, strict=True))
    return ids[rows[:, None], columns]


def _nearest(old: int, new: int) -> Tensor:
    """The old pixel under the centre of each new one; centres are added up as Pillow does it, which decides ties."""
    steps = torch.full((new,), old / new, dtype=torch.float64)
    steps[0] = old / new * 0.5
    return steps.cumsum(0).long()
