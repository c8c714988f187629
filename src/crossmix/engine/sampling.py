"""Random crops as a pure function of a key, so that resuming needs no generator state.

Draws are numbered over the whole run: draw = step * batch + slot. The result depends on (seed, stream, draw) alone, not
on the number of workers, on prefetching or on restarts.
"""

import logging
import math
import operator
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from crossmix._checks import check_ignore_index, check_size
from crossmix._keyed import keyed_generator
from crossmix.datasets.sample import DataError, Sample
from crossmix.datasets.sampling import RareClassSampler

__all__ = ["KeyedCrops", "keyed_generator", "resident"]

LOG = logging.getLogger(__name__)
Box = tuple[slice, slice]  # rows and columns of a crop
MORE_CROPS = 10


class Labelled(Protocol):
    """An image and its label map, as the readers of `crossmix.datasets` return them."""

    @property
    def image(self) -> Tensor:
        """(3, H, W) uint8."""

    @property
    def label(self) -> Tensor | None:
        """(H, W) uint8, or None."""

    @property
    def name(self) -> str:
        """Name used in error messages."""


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Labelled:
        """Sample at an index."""


class KeyedCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of a labelled or unlabelled data set, indexed by draw number without an upper limit.

    Each epoch visits every image once, in its own random order; the position of the crop is uniform.

    With `rare`, a class and an image are drawn as by `RareClassSampler`, and the image is cropped up to 10 more times
    until the crop has enough pixels of that class; failing that, the last crop is used. Enough is half of the sampler's
    `min_pixels`, scaled with the area of crops larger than 512 x 512 (1500, and 6000 at 1024 x 1024, as in DAFormer and
    HRDA), but at most half of the crop.

    A sample that cannot be read, or whose image is smaller than the crop (without `pad`), is an error. With `skip`, up
    to that many different samples are skipped instead; each is logged as a warning and recorded in `skipped`. The draw
    then uses the sample at the same position of the next epoch (of an ordinary epoch, with `rare`), so it remains a
    pure function of the key and the files. Each worker process counts on its own.

    Args:
        samples: Items with `image` (3, H, W) uint8, `label` (H, W) uint8 or None, and `name`.
        size: Height and width of the crops, in pixels.
        seed: Seed of the run.
        stream: Distinguishes the data sets of one run: different streams of one seed are unrelated.
        skip: Number of different unreadable samples to skip before the next one raises.
        pad: Whether to pad images smaller than the crop, at the bottom and right, with black pixels that are ignored.
        rare: Draws rare classes more often: a sampler built from the class counts of these samples; its draws are keyed
            by `seed` and `stream`.
        ignore_index: The label of padding, and of samples without a label map, 0..255. None takes the attribute
            `ignore_index` of `samples`, or 255 if they have none in this range.

    Attributes:
        skipped: Indices of the samples skipped so far, with the reasons.

    Raises:
        DataError: On access, if an image is smaller than the crop (without `pad`) or has no label (with `rare`); the
            message names the file. Errors from reading a sample are passed on.
        IndexError: If a draw is negative.
        TypeError: If `size` is not a pair of ints, a draw or `ignore_index` is not an int, or `rare` is not a sampler.
        ValueError: If there are no samples, the size is not positive, `skip`, `seed` or `stream` is negative,
            `ignore_index` is not in 0..255, or `rare` was built from the counts of another number of samples.

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
        ignore_index: int | None = None,
    ) -> None:
        if len(samples) == 0:
            raise ValueError("`samples` must not be empty; check the folder that they are read from.")
        keyed_generator(seed, stream)  # reject negative values here rather than in a worker
        self.samples = samples
        self.size: tuple[int, int] = check_size("size", size)
        self.seed = seed
        self.stream = stream
        if skip < 0:
            raise ValueError(f"`skip` must not be negative, got {skip}; 0 makes every broken sample an error.")
        self.skip = skip
        self.pad = pad
        self.rare = rare
        if ignore_index is None:
            theirs = getattr(samples, "ignore_index", 255)
            ignore_index = theirs if theirs in range(256) else 255  # -100, say, is that of a loss
        self.ignore_index: int = ignore_index
        check_ignore_index(self.ignore_index)
        if not 0 <= self.ignore_index <= 255:
            hint = "the crops' labels are uint8, so pass one of these"
            raise ValueError(f"`ignore_index` must lie in 0..255, got {self.ignore_index}; {hint}.")
        self._enough = 0.0 if rare is None else _enough(rare, self.size, len(samples))
        self.skipped: dict[int, str] = {}
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        """Return the crop of a draw: image (3, h, w) uint8 and label (h, w) uint8, all ignored if there is none."""
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
            return image, torch.full(self.size, self.ignore_index, dtype=torch.uint8, device=image.device)
        return image, self._padded(label, self.ignore_index)

    def _box(self, sample: Labelled, generator: torch.Generator) -> Box:
        """Draw the position of a crop."""
        (height, width), (crop_height, crop_width) = sample.image.shape[-2:], self.size
        top = int(torch.randint(max(0, height - crop_height) + 1, (), generator=generator, device="cpu"))
        left = int(torch.randint(max(0, width - crop_width) + 1, (), generator=generator, device="cpu"))
        return slice(top, top + crop_height), slice(left, left + crop_width)

    def _padded(self, pixels: Tensor, value: int) -> Tensor:
        """Pad to the size of the crop; without padding, only make the pixels contiguous."""
        missing = [size - side for size, side in zip(self.size, pixels.shape[-2:], strict=True)]
        if not any(missing):
            return pixels.contiguous()
        return functional.pad(pixels, (0, missing[1], 0, missing[0]), value=value)

    def _read(self, draw: int) -> tuple[Labelled, int | None]:
        """The sample of a draw, or its first usable replacement, and the class to look for."""
        candidates = self._candidates(draw)
        while True:
            index, wanted = next(candidates)
            if index not in self.skipped:
                try:
                    return self._fit(index, self.samples[index]), wanted
                except (ValueError, OSError) as error:  # what readers raise for a broken file
                    if self.skip == 0:
                        raise
                    if len(self.skipped) == min(self.skip, len(self.samples) - 1):
                        raise ValueError(
                            f"{error} This is one more than the {len(self.skipped)} broken samples that `skip` allows."
                        ) from error
                    self.skipped[index] = str(error)
                    LOG.warning("skipped: %s", error)

    def _fit(self, index: int, sample: Labelled) -> Labelled:
        """Refuse an image smaller than the crop (unless padded), a label map of another size, or a missing one."""
        (height, width), (crop_height, crop_width) = sample.image.shape[-2:], self.size
        if self.rare is not None and sample.label is None:
            wrong = "has no label to look for rare classes in; read the data set with its labels"
        elif sample.label is not None and sample.label.shape != (height, width):
            other = "is {} x {}".format(*sample.label.shape)
            wrong = f"its label map {other} but its image {height} x {width}; resize both to one size"
        elif not self.pad and (height < crop_height or width < crop_width):
            smaller = f"the image is {height} x {width}, smaller than the crop of {crop_height} x {crop_width}"
            wrong = f"{smaller}; use a smaller crop, pad, or resize the images when reading them"
        else:
            return sample
        files = getattr(self.samples, "files", None) if hasattr(self.samples, "fingerprint") else None  # a reader's
        raise DataError(f"{sample.name if files is None else files[index].image}: {wrong}.")

    def index(self, draw: int) -> int:
        """Return the index into `samples` that a draw, numbered from 0, uses unless that sample is skipped."""
        return next(self._candidates(operator.index(draw)))[0]

    def _candidates(self, draw: int) -> Iterator[tuple[int, int | None]]:
        """The sample of a draw and, with `rare`, its class; then its replacements in order."""
        if draw < 0:
            raise IndexError(f"draws are numbered from 0, got {draw}")
        if self.rare is not None:
            generator = keyed_generator(self.seed, self.stream, 2, draw)
            image, wanted = self.rare.pick(torch.rand(2, dtype=torch.float64, generator=generator, device="cpu"))
            yield int(image), int(wanted)
        while True:
            epoch, position = divmod(draw, len(self.samples))
            if self._order is None or self._order[0] != epoch:
                generator = keyed_generator(self.seed, self.stream, 0, epoch)
                self._order = (epoch, torch.randperm(len(self.samples), generator=generator, device="cpu"))
            yield int(self._order[1][position]), None
            draw += len(self.samples)  # the same position of the next epoch


def resident(samples: Samples, device: torch.device | str) -> list[Sample]:
    """Load a whole data set onto a device, to pass to `KeyedCrops`, whose crops are then the same, on that device.

    A list has no `ignore_index`: if that of `samples` is not 255, pass it to `KeyedCrops`.

    Args:
        samples: Items with `image`, `label` and `name`. All of them are read now, so a cached data set is best.
        device: The device.

    Returns:
        The samples in order.

    Raises:
        ValueError: If the device has less free memory than the samples need; nothing is left allocated.

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
                f"{device}: has {free / 2**30:.1f} GiB free, but {len(samples)} samples of the first one's size need "
                f"{need / 2**30:.1f} GiB; read them from a cache on disk instead."
            )

    def moved(sample: Labelled) -> Sample:
        label = None if sample.label is None else sample.label.to(device)
        return Sample(sample.image.to(device), label, sample.name)

    return [moved(samples[i]) for i in range(len(samples))]


def _with_enough(image: Tensor, label: Tensor, boxes: list[Box], wanted: int, enough: float) -> tuple[Tensor, Tensor]:
    """The first crop with enough pixels of a class, or the last one if none has."""
    if label.device.type == "cpu":
        for box in boxes:
            found = label[box]
            if np.count_nonzero(found.numpy() == wanted) >= enough:  # eight times faster than torch here
                break
        return image[:, *box], found
    labels = torch.stack([label[box] for box in boxes])  # all crops: testing one by one would sync with the device
    fits = (labels == wanted).sum((1, 2)) >= enough
    fits[-1].fill_(True)  # noqa: FBT003
    first = fits.int().argmax().view(1)  # the first of several maxima
    images = torch.stack([image[:, *box] for box in boxes])
    return images.index_select(0, first)[0], labels.index_select(0, first)[0]


def _enough(rare: RareClassSampler, size: tuple[int, int], length: int) -> float:
    """Check that the sampler belongs to the samples; return how many pixels of its class a crop should have."""
    if not isinstance(rare, RareClassSampler):
        raise TypeError(f"`rare` must be a RareClassSampler, got {type(rare).__name__}; build one from class counts.")
    if rare.num_images != length:
        count = rare.num_images
        raise ValueError(f"`rare` has the counts of {count} images, but there are {length} samples; count these.")
    area = math.prod(size)
    return min(rare.min_pixels * max(0.5, area / (512 * 1024)), area / 2)
