"""Rare-class sampling: draw source images so that rare classes are seen more often.

Rare-class sampling: Hoyer et al. (DAFormer), CVPR 2022, https://arxiv.org/abs/2111.14887, section 3.2.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from crossmix._checks import check_ignore_index, check_temperature, wrong_shape
from crossmix._keyed import keyed_generator
from crossmix.datasets._arguments import check_count
from crossmix.datasets.classes import IGNORED

__all__ = ["RareClassSampler"]


class RareClassSampler(Sampler[int]):
    """Draw a class, favouring rare ones, and then an image that has enough pixels of it.

        P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T)

    f_c is the share of class c among all labelled pixels. The sum runs over classes of which some image has at least
    `min_pixels` pixels; other classes are never drawn. The image is then drawn uniformly from those with at least
    `min_pixels` pixels of the class. Draws are with replacement.

    Draw k of an epoch is a pure function of (seed, epoch, k). Rank r of R takes draws r, r + R, r + 2R, ...; for equal
    shares, as DDP needs, make `num_samples` a multiple of `world_size` times the batch size. Call `set_epoch` before
    every epoch; otherwise all epochs are the same.

    Args:
        counts: (images, C), pixels of each class in each image, from `class_counts`: a tensor, an array or lists, of
            any real dtype. Column 255 holds ignored pixels and is not used.
        ignore_index: The id of ignored pixels in the label maps, whose column is not used either.
        temperature: T > 0. Lower values favour the rarest classes more; 0.01 in DAFormer.
        min_pixels: How many pixels of a class an image must have to be drawn for it, at the size at which it was
            counted; 3000 in DAFormer, for images of about two megapixels.
        num_samples: Number of draws per epoch over all ranks; the number of images by default.
        seed: Seed of the run.
        rank: Index of this rank.
        world_size: Number of ranks.

    Attributes:
        probabilities: (C,) float64, P(c); 0 for classes that are never drawn.
        num_images: Number of images counted.

    Raises:
        TypeError: If `counts` does not hold numbers, or another argument has the wrong type.
        ValueError: If `counts` is not (images, C), or is empty, negative or not finite, if no image has `min_pixels`
            pixels of any class, or if another argument is out of range.

    Example:
        >>> counts = torch.tensor([[9000, 0], [6000, 3000], [9000, 10]])
        >>> sampler = RareClassSampler(counts, temperature=0.5)
        >>> sampler.probabilities  # the second class has a ninth of the pixels
        tensor([0.1745, 0.8255], dtype=torch.float64)
        >>> list(sampler)  # and one image that has enough of it
        [1, 1, 1]
    """

    def __init__(
        self,
        counts: Tensor | NDArray[Any] | Sequence[Sequence[float]],
        *,
        ignore_index: int = 255,
        temperature: float = 0.01,
        min_pixels: int = 3000,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        pixels = _checked(counts, ignore_index)
        check_temperature(temperature)
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.min_pixels: int = check_count("min_pixels", min_pixels, least=1)
        self.num_images: int = len(pixels)
        self.num_samples: int = (
            self.num_images if num_samples is None else check_count("num_samples", num_samples, least=1)
        )
        self.seed: int = check_count("seed", seed)
        self.world_size: int = check_count("world_size", world_size, least=1)
        self.rank: int = check_count("rank", rank)
        if self.rank >= self.world_size:
            raise ValueError(f"`rank` must lie in 0..{self.world_size - 1}, got {rank}; ranks count from 0.")
        self.epoch: int = 0
        self.start: int = 0

        enough = pixels >= self.min_pixels
        _, self._images = enough.T.nonzero(as_tuple=True)  # class by class
        self._many = enough.sum(0)  # (C,) number of images with enough of each class
        if not len(self._images):
            most = f"got {min_pixels}, but the most is {int(pixels.max())}"
            raise ValueError(f"`min_pixels` must be reached by some class in some image, {most}; scale it.")
        self.probabilities: Tensor = _probabilities(pixels.sum(0), self._many > 0, temperature)

    def pick(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers, (..., 2) in [0, 1), for class and image, into images and their classes, (...) int64.

        Raises:
            ValueError: If `scores` is not (..., 2).

        Example:
            >>> sampler = RareClassSampler([[4000, 0], [0, 3000], [0, 3500]], temperature=1.0)
            >>> sampler.pick(torch.tensor([[0.1, 0.9], [0.9, 0.9]]))
            (tensor([0, 2]), tensor([0, 1]))
        """
        if scores.shape[-1:] != (2,):
            raise wrong_shape("scores", "(..., 2)", scores, "draw two per sample")
        scores = scores.double()
        upper = self.probabilities.cumsum(0)
        upper[int(self._many.nonzero()[-1]) :] = 1  # exact despite rounding of the sum
        classes = torch.searchsorted(upper, scores[..., 0].contiguous(), right=True)
        first = self._many.cumsum(0) - self._many
        images = self._images[first[classes] + (scores[..., 1] * self._many[classes]).long()]
        return images, classes

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Set the epoch of the next iteration, from 0, and how many draws of this rank to skip, to resume in it.

        Raises:
            TypeError: If a number is not an int.
            ValueError: If a number is negative.
        """
        self.epoch = check_count("epoch", epoch)
        self.start = check_count("start", start)

    def __len__(self) -> int:
        return len(self._draws())

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch  # fixed for this iteration
        for draw in self._draws():
            generator = keyed_generator(self.seed, epoch, draw)
            yield int(self.pick(torch.rand(2, dtype=torch.float64, generator=generator, device="cpu"))[0])

    def _draws(self) -> range:
        """The remaining draws of this rank."""
        return range(self.rank, self.num_samples, self.world_size)[self.start :]


def _checked(counts: object, ignore_index: int) -> Tensor:
    """The counts, checked, as (images, C) float64 on the CPU, with 0 for ignored pixels."""
    hint = "pass `class_counts(dataset)`"
    if isinstance(counts, list | tuple | np.ndarray):
        try:
            counts = torch.as_tensor(counts)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`counts` must hold numbers, (images, C): {error}") from error
    if not isinstance(counts, Tensor) or counts.is_complex() or counts.dtype == torch.bool:
        found = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"`counts` must hold numbers, (images, C), got {found}; {hint}.")
    if counts.ndim != 2 or 0 in counts.shape:
        raise wrong_shape("counts", "(images, C), one row per image", counts, hint)
    pixels = counts.detach().cpu().double()  # in this order, as the device may lack float64
    if not bool(pixels.isfinite().all()) or bool((pixels < 0).any()):
        raise ValueError("`counts` must be finite and not negative; count the pixels of each class in each image.")
    columns = torch.arange(pixels.shape[1], device="cpu")
    return pixels.masked_fill((columns == IGNORED) | (columns == ignore_index), 0)


def _probabilities(pixels: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """P(c), (C,). Exponents are relative to the rarest class, so that nothing overflows."""
    shares = pixels / pixels.sum()
    exponents = (shares[drawn].min() - shares) / temperature
    return exponents.where(drawn, -torch.inf).softmax(0)
