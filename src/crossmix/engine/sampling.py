"""Data and randomness as pure functions of a key, so that resuming needs no generator state.

A draw is numbered through the whole run: draw = step * batch + slot. What it yields depends on (seed, stream, draw)
alone, not on the number of workers, on prefetching or on restarts.
"""

import logging
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

__all__ = ["KeyedCrops", "keyed_generator", "resident"]

LOG = logging.getLogger(__name__)


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


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator whose state is a pure function of a key.

    Args:
        *key: Non-negative integers, e.g. seed, stream and step. Neighbouring keys give unrelated streams.
        device: Where the generator draws.

    Returns:
        A new generator.

    Raises:
        ValueError: If the key is empty or holds a negative number.

    Example:
        >>> torch.equal(torch.rand(2, generator=keyed_generator(0, 7)), torch.rand(2, generator=keyed_generator(0, 7)))
        True
    """
    if not key or min(key) < 0:
        raise ValueError(f"`key` must hold non-negative integers, got {key}; give e.g. (seed, stream, step).")
    # numpy pads keys with zeros, so that (0,) and (0, 0) would be one; the length tells them apart.
    seed = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Labelled:
        """The one at an index."""


class KeyedCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of a labelled or unlabelled data set, indexed by draw number without end.

    Every image is drawn once in each pass, in an order of the pass's own; the crop's position is uniform.

    A sample that cannot be read, or whose image is smaller than the crop, is an error. With `skip` up to so many
    different ones are left out instead, each logged as a warning and kept in `skipped`: the draw then takes the sample
    that the same draw of the next pass would take, so that it is a pure function still, of the files as they are. Each
    worker process counts for itself.

    Args:
        samples: Items with `image` (3, H, W) uint8, `label` (H, W) uint8 or None, and `name`.
        size: Height and width of the crops, in pixels.
        seed: Seed of the run.
        stream: Tells the data sets of one run apart: the same seed with another stream is unrelated.
        skip: How many different samples that cannot be read are left out before one is an error.
        pad: Whether an image smaller than the crop is padded, below and to the right, with black pixels of label 255.

    Attributes:
        skipped: Indices of the samples left out so far, with the reasons.

    Raises:
        ValueError: If there are no samples, the size is not positive, or `skip` is negative; on access, if an image is
            smaller than the crop, without `pad`. What reading a sample raises is passed on.

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
    ) -> None:
        if len(samples) == 0:
            raise ValueError("`samples` must not be empty; check the folder that they are read from.")
        if min(size) < 1:
            raise ValueError(f"`size` must be positive (H, W), got {size}.")
        self.samples = samples
        self.size = size
        self.seed = seed
        self.stream = stream
        if skip < 0:
            raise ValueError(f"`skip` must not be negative, got {skip}; 0 makes every broken sample an error.")
        self.skip = skip
        self.pad = pad
        self.skipped: dict[int, str] = {}
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        """Return the crop of a draw.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            Image (3, h, w) uint8 and label (h, w) uint8, all 255 where there is no label.
        """
        sample = self._read(draw)
        height, width = sample.image.shape[-2:]
        crop_height, crop_width = self.size
        generator = keyed_generator(self.seed, self.stream, 1, draw)
        top = int(torch.randint(max(0, height - crop_height) + 1, (), generator=generator))
        left = int(torch.randint(max(0, width - crop_width) + 1, (), generator=generator))
        rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
        image = self._padded(sample.image[:, rows, columns], 0)
        if sample.label is None:
            return image, torch.full(self.size, 255, dtype=torch.uint8, device=image.device)
        return image, self._padded(sample.label[rows, columns], 255)

    def _padded(self, pixels: Tensor, value: int) -> Tensor:
        """Fill up to the size of the crop; what has it already is only laid out in memory."""
        missing = [size - side for size, side in zip(self.size, pixels.shape[-2:], strict=True)]
        if not any(missing):
            return pixels.contiguous()
        return functional.pad(pixels, (0, missing[1], 0, missing[0]), value=value)

    def _read(self, draw: int) -> Labelled:
        """The sample of a draw, or of the first later pass's where it cannot be used and may be skipped."""
        while True:
            index = self.index(draw)
            if index not in self.skipped:
                try:
                    return self._large_enough(self.samples[index])
                except (ValueError, OSError) as error:  # what readers raise for a broken file
                    if self.skip == 0:
                        raise
                    if len(self.skipped) == min(self.skip, len(self.samples) - 1):
                        raise ValueError(
                            f"{error} It is one more than the {len(self.skipped)} broken samples that `skip` allows."
                        ) from error
                    self.skipped[index] = str(error)
                    LOG.warning("left out: %s", error)
            draw += len(self.samples)

    def _large_enough(self, sample: Labelled) -> Labelled:
        """Refuse an image that is smaller than the crop and is not to be padded."""
        (height, width), (crop_height, crop_width) = sample.image.shape[-2:], self.size
        if not self.pad and (height < crop_height or width < crop_width):
            raise ValueError(
                f"{sample.name}: the image is {height} x {width}, smaller than the crop of {crop_height} x "
                f"{crop_width}; crop smaller, pad, or resize the images when reading them."
            )
        return sample

    def index(self, draw: int) -> int:
        """Return which sample a draw takes.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            Index into `samples`.
        """
        epoch, position = divmod(draw, len(self.samples))
        if self._order is None or self._order[0] != epoch:
            generator = keyed_generator(self.seed, self.stream, 0, epoch)
            self._order = (epoch, torch.randperm(len(self.samples), generator=generator))
        return int(self._order[1][position])


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
