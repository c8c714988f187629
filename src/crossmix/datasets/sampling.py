"""Drawing source images so that rare classes are seen more often.

Rare-class sampling: Hoyer et al. (DAFormer), CVPR 2022, https://arxiv.org/abs/2111.14887, section 3.2.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from crossmix._keyed import keyed_generator
from crossmix.datasets._arguments import check_count
from crossmix.datasets.classes import IGNORED

__all__ = ["RareClassSampler"]


class RareClassSampler(Sampler[int]):
    """Draw a class, the rarer the likelier, and then one of the images that have enough of it.

        P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T)

    f_c is the share of class c among all labelled pixels. The sum is over the classes that some image has with at least
    `min_pixels` pixels; all others are never drawn. The image is then one of those with at least `min_pixels` pixels
    of the class, each as likely as the others. Draws are with replacement: an epoch need not show every image.

    Draw k of an epoch is a pure function of (seed, epoch, k). Rank r of R takes draws r, r + R, r + 2R, ..., so that
    ranks share the draws of one process out among them; for equally many each, as DDP needs, let `num_samples` be a
    multiple of `world_size` and the batch size. Call `set_epoch` before every epoch, or all will be the same.

    Args:
        counts: (images, C), pixels of each class in each image, as `class_counts` gives them. A column 255 holds
            ignored pixels and counts nowhere, nor does a column that is set to 0. Any real dtype, numpy's too.
        temperature: T > 0. The lower, the more the rarest classes are preferred; 0.01 is DAFormer's.
        min_pixels: How many pixels of a class an image must have to be drawn for it, at the size at which it was
            counted; 3000 is DAFormer's for images of about two megapixels.
        num_samples: The number of draws of an epoch, of all ranks together; that of the images by default.
        seed: Seed of the run.
        rank: The rank that draws.
        world_size: The number of ranks.

    Attributes:
        probabilities: (C,) float64, P(c); 0 for classes that are never drawn.
        num_images: How many images there are counts of.

    Raises:
        TypeError: If `counts` is no tensor or array of numbers, or another argument no number of its kind.
        ValueError: If `counts` is not (images, C), empty, negative or not finite, no image has `min_pixels` pixels of
            any class, or another argument is out of range.

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
        counts: Tensor,
        *,
        temperature: float = 0.01,
        min_pixels: int = 3000,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        pixels = _checked(counts)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise TypeError(f"`temperature` must be a float, got {type(temperature).__name__}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}; the lower, the rarer.")
        self.temperature = temperature
        self.min_pixels = check_count("min_pixels", min_pixels, least=1)
        self.num_images = len(pixels)
        self.num_samples = self.num_images if num_samples is None else check_count("num_samples", num_samples, least=1)
        self.seed = check_count("seed", seed)
        self.world_size = check_count("world_size", world_size, least=1)
        self.rank = check_count("rank", rank)
        if self.rank >= self.world_size:
            raise ValueError(f"`rank` must lie in 0..{self.world_size - 1}, got {rank}; ranks count from 0.")
        self.epoch = self.start = 0

        enough = pixels >= self.min_pixels
        _, self._images = enough.T.nonzero(as_tuple=True)  # class by class
        self._many = enough.sum(0)  # (C,) images that have enough of each class
        if not len(self._images):
            raise ValueError(
                f"`min_pixels` must be no more than an image has of some class, got {min_pixels}, but the most is "
                f"{int(pixels.max())}; lower it, in proportion to the size of the images."
            )
        self.probabilities = _probabilities(pixels.sum(0), self._many > 0, temperature)

    def pick(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers into draws.

        Args:
            scores: (..., 2) floating in [0, 1): what chooses the class, then the image among those that have it.

        Returns:
            Indices of images, and the classes that they were drawn for, both (...) int64.

        Raises:
            ValueError: If `scores` is not (..., 2).

        Example:
            >>> sampler = RareClassSampler([[4000, 0], [0, 3000], [0, 3500]], temperature=1.0)
            >>> sampler.pick(torch.tensor([[0.1, 0.9], [0.9, 0.9]]))
            (tensor([0, 2]), tensor([0, 1]))
        """
        if scores.shape[-1:] != (2,):
            raise ValueError(f"`scores` must have shape (..., 2), got {tuple(scores.shape)}; draw two a sample.")
        scores = scores.double()
        upper = self.probabilities.cumsum(0)
        upper[int(self._many.nonzero()[-1]) :] = 1  # whatever the sum is rounded to
        classes = torch.searchsorted(upper, scores[..., 0].contiguous(), right=True)
        first = self._many.cumsum(0) - self._many
        images = self._images[first[classes] + (scores[..., 1] * self._many[classes]).long()]
        return images, classes

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and where in it to begin.

        Args:
            epoch: The number of the epoch, from 0.
            start: How many draws of this rank are left out, because they were made before an interruption: the number
                of batches done times the batch size.

        Raises:
            TypeError: If a number is no int.
            ValueError: If one is negative.
        """
        self.epoch = check_count("epoch", epoch)
        self.start = check_count("start", start)

    def __len__(self) -> int:
        return len(self._draws())

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch  # as it is when the iteration begins
        for draw in self._draws():
            generator = keyed_generator(self.seed, epoch, draw)
            yield int(self.pick(torch.rand(2, dtype=torch.float64, generator=generator))[0])

    def _draws(self) -> range:
        """The draws of this rank that are still to be made."""
        return range(self.rank, self.num_samples, self.world_size)[self.start :]


def _checked(counts: object) -> Tensor:
    """Counts as (images, C) float64 on the CPU, 0 for ignored pixels."""
    if isinstance(counts, list | tuple | np.ndarray):
        try:
            counts = torch.as_tensor(counts)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`counts` must hold numbers, (images, C): {error}") from error
    if not isinstance(counts, Tensor) or counts.is_complex() or counts.dtype == torch.bool:
        found = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(
            f"`counts` must be a tensor of numbers, (images, C), got {found}; pass `class_counts(dataset)`."
        )
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(
            f"`counts` must have shape (images, C), a row for each image, got {tuple(counts.shape)}; "
            "pass `class_counts(dataset)`."
        )
    pixels = counts.detach().cpu().double()  # off the device before it is double
    if not bool(pixels.isfinite().all()) or bool((pixels < 0).any()):
        raise ValueError("`counts` must be finite and not negative; count the pixels of each class in each image.")
    if pixels.shape[1] > IGNORED:
        pixels = pixels.clone()
        pixels[:, IGNORED] = 0
    return pixels


def _probabilities(pixels: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """P(c), (C,), of the classes that are drawn. The rarest has the exponent 0, so that nothing overflows."""
    shares = pixels / pixels.sum()
    exponents = (shares[drawn].min() - shares) / temperature
    return exponents.where(drawn, -torch.inf).softmax(0)
