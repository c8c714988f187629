"""Data and randomness as pure functions of a key, so that resuming needs no generator state.

A draw is numbered through the whole run: draw = step * batch + slot. What it yields depends on (seed, stream, draw)
alone, not on the number of workers, on prefetching or on restarts.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["KeyedCrops", "keyed_generator"]


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

    Args:
        samples: Items with `image` (3, H, W) uint8, `label` (H, W) uint8 or None, and `name`.
        size: Height and width of the crops, in pixels.
        seed: Seed of the run.
        stream: Tells the data sets of one run apart: the same seed with another stream is unrelated.

    Raises:
        ValueError: If there are no samples or the size is not positive; on access, if an image is smaller than the
            crop.

    Example:
        >>> from crossmix.datasets import StreetScenes
        >>> crops = KeyedCrops(StreetScenes(4), (32, 32), seed=0, stream=0)
        >>> image, label = crops[1_000_000]
        >>> image.shape, label.shape
        (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    """

    def __init__(self, samples: Samples, size: tuple[int, int], *, seed: int, stream: int) -> None:
        if len(samples) == 0:
            raise ValueError("`samples` must not be empty; check the folder that they are read from.")
        if min(size) < 1:
            raise ValueError(f"`size` must be positive (H, W), got {size}.")
        self.samples = samples
        self.size = size
        self.seed = seed
        self.stream = stream
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor]:
        """Return the crop of a draw.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            Image (3, h, w) uint8 and label (h, w) uint8, all 255 where there is no label.
        """
        sample = self.samples[self.index(draw)]
        height, width = sample.image.shape[-2:]
        crop_height, crop_width = self.size
        if height < crop_height or width < crop_width:
            raise ValueError(
                f"{sample.name}: the image is {height} x {width}, smaller than the crop of {crop_height} x "
                f"{crop_width}; crop smaller or resize the images when reading them."
            )
        generator = keyed_generator(self.seed, self.stream, 1, draw)
        top = int(torch.randint(height - crop_height + 1, (), generator=generator))
        left = int(torch.randint(width - crop_width + 1, (), generator=generator))
        rows, columns = slice(top, top + crop_height), slice(left, left + crop_width)
        image = sample.image[:, rows, columns].contiguous()
        if sample.label is None:
            return image, torch.full(self.size, 255, dtype=torch.uint8)
        return image, sample.label[rows, columns].contiguous()

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
