"""Data and randomness as pure functions of a key, so that resuming needs no generator state.

A draw is numbered through the whole run: draw = step * batch + slot. What it yields depends on (seed, stream, draw)
alone, not on the number of workers, on prefetching or on restarts.
"""

import itertools
import logging
import math
import operator
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from crossmix._keyed import keyed_generator
from crossmix.datasets.sample import DataError
from crossmix.datasets.sampling import RareClassSampler

__all__ = ["KeyedCrops", "keyed_generator", "resident"]

LOG = logging.getLogger(__name__)
Box = tuple[slice, slice]  # rows and columns of a crop
MORE_CROPS = 10


class Labelled(Protocol):
    """An image with its label map, as the readers of `crossmix.datasets` return it."""

    @property
    def image(self) -> Tensor:
        """(3, H, W) uint8."""

    @property
    def label(self) -> Tensor | None:
        """(H, W) uint8, or None."""

    @property
    def name(self) -> str:
        """What errors call it."""


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Labelled:
        """The one at an index."""


class KeyedCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of a labelled or unlabelled data set, indexed by draw number without end.

    Every image is drawn once in each pass, in an order of the pass's own; the crop's position is uniform.

    With `rare` an image is drawn as `RareClassSampler` draws it, for a class, and cropped again until the crop has
    enough pixels of that class, at most 10 times more; the last crop is then taken as it is. Enough is half of the
    sampler's `min_pixels`, and in proportion to the area where the crop is larger than 512 x 512: 1500 there and 6000
    at 1024 x 1024, as in DAFormer and HRDA. Where that is more than half of the crop, half of the crop is enough.

    A sample that cannot be read, or whose image is smaller than the crop, is an error. With `skip` up to so many
    different ones are left out instead, each logged as a warning and kept in `skipped`: the draw then takes the sample
    that the same draw of the next pass would take (of an ordinary pass, with `rare`), so that it is a pure function
    still, of the files as they are. Each worker process counts for itself. With `pad` small images are padded instead,
    and are no errors.

    Args:
        samples: Items with `image` (3, H, W) uint8, `label` (H, W) uint8 or None, and `name`.
        size: Height and width of the crops, in pixels.
        seed: Seed of the run.
        stream: Tells the data sets of one run apart: the same seed with another stream is unrelated.
        skip: How many different samples that cannot be read are left out before one is an error.
        pad: Whether an image smaller than the crop is padded, below and to the right, with black pixels of label 255.
        rare: Draws rare classes more often: a sampler made of the counts of these samples. Only its probabilities and
            `min_pixels` matter: the draw is keyed by `seed` and `stream` as everything else is.

    Attributes:
        skipped: Indices of the samples left out so far, with the reasons.

    Raises:
        DataError: On access, without `pad`, if an image is smaller than the crop, or with `rare` has no label; the file
            is named. What reading a sample raises is passed on.
        IndexError: If a draw is negative.
        TypeError: If `size` is no pair of ints, a draw no int, or `rare` no sampler.
        ValueError: If there are no samples, the size is not positive, `skip`, `seed` or `stream` is negative, or `rare`
            has the counts of more or fewer samples.

    Example:
        >>> from crossmix.datasets import StreetScenes
        >>> crops = KeyedCrops(StreetScenes(4), (32, 32), seed=0, stream=0)
        >>> image, label = crops[1_000_000]
        >>> image.shape, label.shape
        (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    """

    def __init__(
        self,
        samples: Samples,
        size: tuple[int, int],
        *,
        seed: int,
        stream: int,
        skip: int = 0,
        pad: bool = False,
        rare: RareClassSampler | None = None,
    ) -> None:
        if len(samples) == 0:
            raise ValueError("`samples` must not be empty; check the folder that they are read from.")
        keyed_generator(seed, stream)  # refuses a negative one here, and not in a worker
        self.samples = samples
        self.size = _checked(size)
        self.seed = seed
        self.stream = stream
        if skip < 0:
            raise ValueError(f"`skip` must not be negative, got {skip}; 0 makes every broken sample an error.")
        self.skip = skip
        self.pad = pad
        self.rare = rare
        self._enough = 0.0 if rare is None else _enough(rare, self.size, len(samples))
        self.skipped: dict[int, str] = {}
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        """Return the crop of a draw.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            Image (3, h, w) uint8 and label (h, w) uint8, all 255 where there is no label.
        """
        draw = operator.index(draw)
        sample, wanted = self._read(draw)
        generator = keyed_generator(self.seed, self.stream, 1, draw)
        boxes = [self._box(sample, generator) for _ in range(1 if wanted is None else 1 + MORE_CROPS)]
        if wanted is None or sample.label is None:
            rows, columns = boxes[0]
            image, label = sample.image[:, rows, columns], None if sample.label is None else sample.label[rows, columns]
        else:
            image, label = _with_enough(sample.image, sample.label, boxes, wanted, self._enough)
        image = self._padded(image, 0)
        if label is None:
            return image, torch.full(self.size, 255, dtype=torch.uint8, device=image.device)
        return image, self._padded(label, 255)

    def _box(self, sample: Labelled, generator: torch.Generator) -> Box:
        """Where the next crop of a sample is."""
        (height, width), (crop_height, crop_width) = sample.image.shape[-2:], self.size
        top = int(torch.randint(max(0, height - crop_height) + 1, (), generator=generator))
        left = int(torch.randint(max(0, width - crop_width) + 1, (), generator=generator))
        return slice(top, top + crop_height), slice(left, left + crop_width)

    def _padded(self, pixels: Tensor, value: int) -> Tensor:
        """Fill up to the size of the crop; what has it already is only laid out in memory."""
        missing = [size - side for size, side in zip(self.size, pixels.shape[-2:], strict=True)]
        if not any(missing):
            return pixels.contiguous()
        return functional.pad(pixels, (0, missing[1], 0, missing[0]), value=value)

    def _read(self, draw: int) -> tuple[Labelled, int | None]:
        """The sample of a draw, or the next in line where it cannot be used and may be skipped; and its class."""
        for index, wanted in self._in_line(draw):
            if index not in self.skipped:
                try:
                    return self._fit(index, self.samples[index]), wanted
                except (ValueError, OSError) as error:  # what readers raise for a broken file
                    if self.skip == 0:
                        raise
                    if len(self.skipped) == min(self.skip, len(self.samples) - 1):
                        raise ValueError(
                            f"{error} It is one more than the {len(self.skipped)} broken samples that `skip` allows."
                        ) from error
                    self.skipped[index] = str(error)
                    LOG.warning("left out: %s", error)
        raise AssertionError("there is always a next one")

    def _fit(self, index: int, sample: Labelled) -> Labelled:
        """Refuse an image that is smaller than the crop and is not to be padded, and one without the label it needs."""
        (height, width), (crop_height, crop_width) = sample.image.shape[-2:], self.size
        files = getattr(self.samples, "files", None)  # where the samples are those of a reader
        name = sample.name if files is None else files[index].image
        if self.rare is not None and sample.label is None:
            raise DataError(f"{name}: has no label to look for rare classes in; read the data set with its labels.")
        if not self.pad and (height < crop_height or width < crop_width):
            raise DataError(
                f"{name}: the image is {height} x {width}, smaller than the crop of {crop_height} x {crop_width}; "
                "crop smaller, pad, or resize the images when reading them."
            )
        return sample

    def index(self, draw: int) -> int:
        """Return which sample a draw takes.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            Index into `samples`.
        """
        return next(self._in_line(operator.index(draw)))[0]

    def _in_line(self, draw: int) -> Iterator[tuple[int, int | None]]:
        """Which sample a draw takes, and with `rare` the class that it is drawn for; then those in place of it."""
        if draw < 0:
            raise IndexError(f"draws are numbered from 0, got {draw}")
        if self.rare is not None:
            generator = keyed_generator(self.seed, self.stream, 2, draw)
            image, wanted = self.rare.pick(torch.rand(2, dtype=torch.float64, generator=generator))
            yield int(image), int(wanted)
        for later in itertools.count(draw, len(self.samples)):  # the same draw of this pass and of the later ones
            epoch, position = divmod(later, len(self.samples))
            if self._order is None or self._order[0] != epoch:
                generator = keyed_generator(self.seed, self.stream, 0, epoch)
                self._order = (epoch, torch.randperm(len(self.samples), generator=generator))
            yield int(self._order[1][position]), None


class Resident(NamedTuple):
    """A sample whose tensors are on a device."""

    image: Tensor
    label: Tensor | None
    name: str


def resident(samples: Samples, device: torch.device | str) -> list[Resident]:
    """Read a whole data set once and keep it on a device, where `KeyedCrops` then crops it.

    Args:
        samples: Items with `image`, `label` and `name`; best those of a cache, for every one is read here.
        device: The device.

    Returns:
        The samples in order, to be given to `KeyedCrops` in place of the data set. Crops come out on the device, and
        are those of the data set itself.

    Raises:
        ValueError: If the device has less free memory than the samples need; nothing is left on it.

    Example:
        >>> from crossmix.datasets import StreetScenes
        >>> crops = KeyedCrops(resident(StreetScenes(4), "cpu"), (32, 32), seed=0, stream=0)
        >>> crops[7][0].device
        device(type='cpu')
    """
    device = torch.device(device)
    if device.type == "cuda" and len(samples):
        first = samples[0]
        need = len(samples) * (first.image.numel() + (0 if first.label is None else first.label.numel()))
        free, _ = torch.cuda.mem_get_info(device)
        if need > free:
            raise ValueError(
                f"{device}: has {free / 2**30:.1f} GiB free, but {len(samples)} samples like the first need "
                f"{need / 2**30:.1f} GiB; read them from a cache on disk instead."
            )
    kept = []
    for i in range(len(samples)):
        sample = samples[i]
        label = None if sample.label is None else sample.label.to(device)
        kept.append(Resident(sample.image.to(device), label, sample.name))
    return kept


def _with_enough(image: Tensor, label: Tensor, boxes: list[Box], wanted: int, enough: float) -> tuple[Tensor, Tensor]:
    """The first crop that has enough pixels of a class, or the last one."""
    if label.device.type == "cpu":
        for box in boxes:
            found = label[box]
            if np.count_nonzero(found.numpy() == wanted) >= enough:  # eight times as fast as torch
                break
        return image[:, *box], found
    labels = torch.stack([label[box] for box in boxes])  # all of them, since a look would wait for the device
    fits = (labels == wanted).sum((1, 2)) >= enough
    fits[-1].fill_(True)  # noqa: FBT003
    first = fits.int().argmax().view(1)  # the first of several maxima
    images = torch.stack([image[:, *box] for box in boxes])
    return images.index_select(0, first)[0], labels.index_select(0, first)[0]


def _enough(rare: RareClassSampler, size: tuple[int, int], length: int) -> float:
    """How many pixels of its class a crop should have, once it is known that the sampler belongs to the samples."""
    if not isinstance(rare, RareClassSampler):
        raise TypeError(f"`rare` must be a RareClassSampler, got {type(rare).__name__}; make one of the class counts.")
    if rare.num_images != length:
        raise ValueError(
            f"`rare` has the counts of {rare.num_images} images, but there are {length} samples; count these."
        )
    area = math.prod(size)
    return min(rare.min_pixels * max(0.5, area / (512 * 1024)), area / 2)


def _checked(size: object) -> tuple[int, int]:
    """A crop's size as two ints."""
    sides = list(size) if isinstance(size, tuple | list) else []
    if len(sides) != 2 or not all(hasattr(side, "__index__") and side is not True for side in sides):
        raise TypeError(f"`size` must be (height, width) in whole pixels, got {size!r}; pass a pair of ints.")
    height, width = map(operator.index, sides)
    if min(height, width) < 1:
        raise ValueError(f"`size` must be positive (H, W), got {(height, width)}.")
    return height, width
