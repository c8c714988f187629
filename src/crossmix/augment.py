"""Colour jitter and Gaussian blur of a batch, drawn per image, without a loop over images and without host syncs.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 4: mixed images are jittered and blurred.
The default strengths are those of the released code; the paper gives none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from crossmix._checks import check_choice, check_fraction, check_images, check_range, check_same_device, check_tensor
from crossmix._color import Channels, additive_jitter, torchvision_jitter
from crossmix._compiled import convolve
from crossmix._tensors import Device, at_least_float32, no_autocast, uniform

__all__ = ["AugmentDraw", "StrongAugment"]

MOST_UNROLLED = 63  # taps of a compiled blur that is a sum over taps; more would take long to compile


class AugmentDraw(NamedTuple):
    """The random numbers of `StrongAugment`, one row per image, independent of the images.

    Attributes:
        jitter: (N,) bool, whether the colours change.
        order: (N, 4) int64, a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue, in order of application.
        brightness: (N,) float32 factor around 1.
        contrast: (N,) float32 factor around 1.
        saturation: (N,) float32 factor around 1.
        hue: (N,) float32 shift around 0, as a fraction of the colour circle.
        blur: (N,) bool, whether the image is blurred.
        sigma: (N,) float32 standard deviation of the blur, in pixels.
    """

    jitter: Tensor
    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    blur: Tensor
    sigma: Tensor


class StrongAugment(nn.Module):
    """Jitter the colours of each image with probability `jitter_p` and blur it with probability `blur_p`.

    The order of the four colour operations is drawn per image, and so are their factors, from U(1 - v, 1 + v), and the
    hue shift, from U(-v, v). Images that are neither jittered nor blurred are returned bit for bit.

    Args:
        brightness: Strength v of the brightness factor, in [0, 1].
        contrast: That of the contrast factor, in [0, 1].
        saturation: That of the saturation factor, in [0, 1].
        hue: That of the hue shift, as a fraction of the colour circle, in [0, 0.5].
        jitter_p: Probability of the jitter.
        blur_p: Probability of the blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        flavor: `"additive"` follows kornia before version 0.6.4, which the published number used: brightness is added,
            x + (b - 1), contrast multiplies, c x, and saturation scales the S of HSV. `"torchvision"`: brightness
            multiplies, b x, contrast blends with the mean of the grey image, and saturation with the grey image. Both
            clamp to [0, 1] after each operation and rotate the hue in HSV.
        same_on_batch: Whether one decision to jitter and one to blur holds for the whole batch, as in the released
            code. Factors, order and sigma are per image in either case.
        mean: Mean per channel if the data loader, rather than the network, normalises images as (x - mean) / std. Input
            and output are then normalised; the augmentation itself works in [0, 1].
        std: Standard deviation per channel; required with `mean`.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range, or only one of `mean` and `std` is given.

    Example:
        >>> augment = StrongAugment()
        >>> draw = augment.sample(2, generator=torch.Generator().manual_seed(0))
        >>> images = torch.rand(2, 3, 16, 16)
        >>> torch.equal(augment(images, draw=draw), augment(images, draw=draw))
        True
    """

    def __init__(
        self,
        *,
        brightness: float = 0.25,
        contrast: float = 0.25,
        saturation: float = 0.25,
        hue: float = 0.25,
        jitter_p: float = 0.8,
        blur_p: float = 0.5,
        blur_sigma: tuple[float, float] = (0.15, 1.15),
        flavor: Literal["additive", "torchvision"] = "torchvision",
        same_on_batch: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        fractions = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        for name, value in {**fractions, "jitter_p": jitter_p, "blur_p": blur_p}.items():
            check_fraction(name, value)
        if hue > 0.5:
            raise ValueError(f"`hue` must lie in [0, 0.5], half of the colour circle, got {hue}.")
        least, greatest = _numbers("blur_sigma", blur_sigma, 2, "the smallest and the largest")
        if not 0 < least <= greatest:
            raise ValueError(f"`blur_sigma` must be (low, high) in pixels with 0 < low <= high, got {blur_sigma}.")
        check_choice("flavor", flavor, ("additive", "torchvision"))
        if (mean is None) != (std is None):
            raise ValueError(f"`mean` and `std` belong together, got mean={mean} and std={std}; pass both or neither.")
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.jitter_p = jitter_p
        self.blur_p = blur_p
        self.blur_sigma: tuple[float, float] = (least, greatest)
        self.flavor = flavor
        self.same_on_batch = same_on_batch
        self.mean: tuple[float, ...] | None = None if mean is None else _numbers("mean", mean, 3, "one per channel")
        self.std: tuple[float, ...] | None = None if std is None else _numbers("std", std, 3, "one per channel")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"`std` must be positive in each channel, got {self.std}.")

    def sample(self, n: int, *, generator: Generator | None = None, device: Device = None) -> AugmentDraw:
        """Draw all randomness for n images; rows can be sliced to split a batch.

        `generator` draws on its own device; None is the global one. `device` is that of the result, by default the
        generator's, or torch's default one.

        Raises:
            TypeError: If `generator` is no torch.Generator.
            ValueError: If `n` is negative.
        """
        numbers = uniform((11, n), generator=generator, device=device)
        decisions = numbers[:2, :1].expand(2, n) if self.same_on_batch else numbers[:2]
        low, high = self.blur_sigma
        return AugmentDraw(
            jitter=decisions[0] < self.jitter_p,
            order=numbers[2:6].argsort(0).T.contiguous(),
            brightness=1 + self.brightness * (2 * numbers[6] - 1),
            contrast=1 + self.contrast * (2 * numbers[7] - 1),
            saturation=1 + self.saturation * (2 * numbers[8] - 1),
            hue=self.hue * (2 * numbers[9] - 1),
            blur=decisions[1] < self.blur_p,
            sigma=low + (high - low) * numbers[10],
        )

    def forward(self, images: Tensor, *, draw: AugmentDraw | None = None, generator: Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            images: (N, 3, H, W) floating, RGB in [0, 1], or normalised by `mean` and `std`; computed in float32, or in
                float64 for float64 images.
            draw: A draw from `sample`, to replay it.
            generator: Source of randomness; None uses the global one. `torch.compile` cannot trace it: use `draw`.

        Returns:
            (N, 3, H, W) in the dtype and memory format of `images`.

        Raises:
            TypeError: If `images` is not floating, `draw` is not an `AugmentDraw`, or `generator` no torch.Generator.
            ValueError: If its shape is wrong, its values are far out of range (checked on the CPU only), or the draw is
                for another batch size or on another device.
        """
        check_images("images", images, channels=3)
        check_range("images", images, mean=self.mean, std=self.std)
        if draw is None:
            draw = self.sample(len(images), generator=generator, device=images.device)
        _check_draw(draw, images)
        if images.numel() == 0:
            return images.clone()
        x = at_least_float32(images).contiguous()
        with no_autocast(images.device):
            if self.mean is not None and self.std is not None:
                x = torch.stack([c * s + m for c, m, s in zip(x.unbind(1), self.mean, self.std, strict=True)], 1)
            if self.jitter_p > 0:
                x = _jitter(x, draw, additive_jitter if self.flavor == "additive" else torchvision_jitter)
            if self.blur_p > 0:
                x = _blur(x, draw, radius=math.ceil(4.3 * self.blur_sigma[1]))
            if self.mean is not None and self.std is not None:
                x = torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), self.mean, self.std, strict=True)], 1)
                # Return untouched images bit for bit, not rounded by un-normalising and normalising.
                x = torch.where((draw.jitter | draw.blur)[:, None, None, None], x, images.to(x.dtype))
        return _like(x, images)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return (
            f"brightness={self.brightness}, contrast={self.contrast}, saturation={self.saturation}, hue={self.hue}, "
            f"jitter_p={self.jitter_p}, blur_p={self.blur_p}, blur_sigma={self.blur_sigma}, flavor={self.flavor!r}, "
            f"same_on_batch={self.same_on_batch}, mean={self.mean}, std={self.std}"
        )


def _jitter(x: Tensor, draw: AugmentDraw, jitter: Callable[[Channels, Tensor, Tensor], Channels]) -> Tensor:
    """Jitter the images selected by the draw, (N, 3, H, W); the others are returned bit for bit."""
    factors = torch.stack([draw.brightness, draw.contrast, draw.saturation, draw.hue]).to(x.dtype)
    channels = x.unbind(1)
    drawn = draw.jitter[:, None, None]
    jittered = jitter(channels, draw.order, factors)
    return torch.stack([torch.where(drawn, new, old) for new, old in zip(jittered, channels, strict=True)], 1)


def _blur(x: Tensor, draw: AugmentDraw, *, radius: int) -> Tensor:
    """Blur the images selected by the draw, each with its own sigma; the others are returned bit for bit."""
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernels = torch.exp(-0.5 * (taps / draw.sigma.to(x.dtype)[:, None]) ** 2)  # (N, taps)
    kernels = kernels / kernels.sum(1, keepdim=True)
    blurred = x
    for axis in (3, 2):
        blurred = _convolve(_extend(blurred, radius, axis), kernels, axis)
    # Clamp, because the taps sum to 1 only up to rounding.
    return torch.where(draw.blur[:, None, None, None], blurred.clamp_(0, 1), x)


def _extend(x: Tensor, radius: int, axis: int) -> Tensor:
    """Pad along an axis by reflection, or by repeating the edge if the image is too small to reflect."""
    length = x.shape[axis]
    if length > radius:
        before, after = (x.narrow(axis, start, radius).flip(axis) for start in (1, length - 1 - radius))
    else:
        before, after = (x.narrow(axis, at, 1).repeat_interleave(radius, axis) for at in (0, length - 1))
    return torch.cat([before, x, after], axis)


def _convolve(x: Tensor, kernels: Tensor, axis: int) -> Tensor:
    """Convolve each image (N, C, H, W) along an axis with its own symmetric kernel, (N, taps), without padding."""
    n, channels, height, width = x.shape
    if torch.compiler.is_compiling() and kernels.shape[1] <= MOST_UNROLLED:
        return convolve(x, kernels, axis)
    kernels = kernels.repeat_interleave(channels, 0)[:, None, None]
    kernels = kernels if axis == 3 else kernels.mT
    x = functional.conv2d(x.reshape(1, n * channels, height, width), kernels, groups=n * channels)
    return x.reshape(n, channels, *x.shape[2:])


def _like(x: Tensor, images: Tensor) -> Tensor:
    """Convert to the dtype and memory format of `images`, following torch's rules for pointwise operations."""
    x = x.to(images.dtype)
    out = torch.empty_like(images)  # contiguous if the images are not dense
    as_it_is = not torch.compiler.is_compiling() and x.stride() == out.stride()  # when compiled, the copy is fused
    return x if as_it_is else out.copy_(x)


def _numbers(name: str, values: Sequence[float], count: int, which: str) -> tuple[float, ...]:
    """Convert a list, an array or a tensor to `count` finite floats."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be a sequence of {count} numbers, {which}, got {values!r}.") from error
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"`{name}` must hold {count} finite numbers, {which}, got {numbers}.")
    return numbers


def _check_draw(draw: AugmentDraw, images: Tensor) -> None:
    if not isinstance(draw, AugmentDraw):
        raise TypeError(f"`draw` must be an AugmentDraw, got {type(draw).__name__}; use `sample`.")
    for name, value in zip(AugmentDraw._fields, draw, strict=True):
        check_tensor(f"draw.{name}", value)
        if len(value) != len(images):
            raise ValueError(f"`draw.{name}` is for {len(value)} images but `images` holds {len(images)}.")
        check_same_device(images=images, **{f"draw.{name}": value})
