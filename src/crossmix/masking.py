"""Masks made from random numbers alone: boxes, blobs and blocks.

CutMix: Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899
CowMix: French et al., 2020, https://arxiv.org/abs/2003.12022
Masked image consistency: Hoyer et al., CVPR 2023, https://arxiv.org/abs/2212.01322
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from crossmix._checks import (
    check_floating,
    check_fraction,
    check_images,
    check_pixels,
    check_positive,
    check_same_device,
    check_size,
    wrong_shape,
)
from crossmix._tensors import Device, at_least_float32, no_autocast, uniform

__all__ = ["BoxMasks", "CowMasks", "MaskedImages", "block_mask", "box_mask", "cow_mask"]

Range = tuple[float, float]
CUT = math.sqrt(2 * math.log(100))  # exp(-CUT**2 / 2) = 0.01
ALMOST_ONE = 1 - 2.0**-24
DRAW = "draw it with torch.rand or torch.randn"


def box_mask(
    scores: Tensor, size: Sequence[int], *, area: Range = (0.02, 0.4), aspect: Range = (0.3, 1 / 0.3)
) -> Tensor:
    """Mark one box in each image (CutMix).

    The four scores of an image give the box's share of the image area (linear in `area`), its width over height (linear
    in the logarithm of `aspect`), and its top and left positions among those where the box fits. Sides are rounded to
    whole pixels, at least 1 and at most the image's.

    Args:
        scores: (N, 4) floating, uniform in [0, 1).
        size: Height and width.
        area: Smallest and largest share of the image area, in [0, 1].
        aspect: Smallest and largest width over height, positive.

    Returns:
        (N, H, W) bool, True in the box. No host sync.

    Raises:
        TypeError: If `scores` is not floating, or `size` is not two ints.
        ValueError: If a shape or a range is wrong.

    Example:
        >>> box_mask(torch.tensor([[1.0, 0.5, 0.0, 0.9]]), (4, 6), area=(0.0, 0.25)).int()
        tensor([[[0, 0, 0, 0, 1, 1],
                 [0, 0, 0, 0, 1, 1],
                 [0, 0, 0, 0, 0, 0],
                 [0, 0, 0, 0, 0, 0]]], dtype=torch.int32)
    """
    height, width = check_size("size", size)
    check_floating("scores", scores, DRAW)
    if scores.ndim != 2 or scores.shape[1] != 4:
        raise wrong_shape("scores", "(N, 4)", scores, "draw four numbers per image")
    _check_box(area, aspect)
    share, shape, down, across = at_least_float32(scores)[:, :, None].unbind(1)
    pixels = (area[0] + (area[1] - area[0]) * share) * (height * width)
    ratio = (math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * shape).exp()
    rows = _inside((pixels / ratio).sqrt(), down, height)
    columns = _inside((pixels * ratio).sqrt(), across, width)
    return rows[:, :, None] & columns[:, None, :]


def cow_mask(noise: Tensor, *, sigma: float | Tensor, ratio: float = 0.5) -> Tensor:
    """Mark blobs where smoothed noise exceeds a quantile of the normal distribution (CowMix).

    smooth > mean + std * sqrt(2) * erfinv(1 - 2 * ratio), with the mean and std of each image, so that about a share
    `ratio` is True. The Gaussian is truncated only by the image size; the noise is mirrored at the border. The values
    of a `sigma` tensor are not read on the host, so it may be on a GPU. A number is faster, the more so the larger it
    is, and `CowMasks`, which draws its own noise, much faster.

    Args:
        noise: (N, H, W) floating, standard normal.
        sigma: Standard deviation of the Gaussian in pixels, positive: a number, or (N,) floating, one per image.
        ratio: Share of pixels to mark, in [0, 1].

    Returns:
        (N, H, W) bool. No host sync.

    Raises:
        TypeError: If `noise` or `sigma` is not floating, or `ratio` is not a number.
        ValueError: If a shape, a device or a range is wrong.

    Example:
        >>> noise = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> round(float(cow_mask(noise, sigma=4.0, ratio=0.3).float().mean()), 1)
        0.3
    """
    check_floating("noise", noise, DRAW)
    if noise.ndim != 3 or 0 in noise.shape[1:]:
        raise wrong_shape("noise", "(N, H, W)", noise, "draw one number per pixel")
    check_fraction("ratio", ratio)
    noise = at_least_float32(noise)
    widths = _check_sigma(sigma, noise)
    height, width = noise.shape[1:]
    known = None if isinstance(sigma, Tensor) else float(sigma)
    with no_autocast(noise.device):  # matrix products in half precision would move the edges of the blobs
        (down, then_down), (across, then_across) = (
            _smoothing(widths.to(noise.dtype), length, known) for length in (height, width)
        )
        smooth = down @ noise @ across.mT
        smooth = smooth if then_down is None else then_down @ smooth
        smooth = smooth if then_across is None else smooth @ then_across.mT
    smooth -= smooth.mean((1, 2), keepdim=True)
    std = torch.linalg.vector_norm(smooth, dim=(1, 2), keepdim=True) / math.sqrt(height * width)
    return smooth > _quantile(std, ratio)


def block_mask(scores: Tensor, size: Sequence[int], block: int, *, ratio: float = 0.7) -> Tensor:
    """Mark the square blocks of a grid whose score is below `ratio` (masked image consistency).

    Args:
        scores: (N, ceil(H / block), ceil(W / block)) floating, uniform in [0, 1).
        size: Height and width; blocks in the last row and column may be cut off.
        block: Side of a block in pixels.
        ratio: Share of blocks to mark, in [0, 1].

    Returns:
        (N, H, W) bool, True on the blocks to hide. No host sync.

    Raises:
        TypeError: If `scores` is not floating, `size` is not two ints, or `block` is not an int.
        ValueError: If a shape or a range is wrong.

    Example:
        >>> block_mask(torch.tensor([[[0.1, 0.9]]]), (2, 3), 2)
        tensor([[[ True,  True, False],
                 [ True,  True, False]]])
    """
    height, width = check_size("size", size)
    check_pixels("block", block)
    check_fraction("ratio", ratio)
    check_floating("scores", scores, DRAW)
    rows, columns = -(-height // block), -(-width // block)
    if scores.ndim != 3 or scores.shape[1] != rows or scores.shape[2] != columns:
        want = f"(N, ceil(H / block), ceil(W / block)) = (N, {rows}, {columns})"
        raise wrong_shape("scores", want, scores, "draw one number per block")
    hidden = (scores < ratio).repeat_interleave(block, 1).repeat_interleave(block, 2)
    return hidden[:, :height, :width].contiguous()


class BoxMasks(nn.Module):
    """One box per image (CutMix), for `masks=` of `CrossDomainMix` and `ClassMix`.

    The ranges are those of UniMatch, which differs in three points: its ratio of the sides is itself uniform, it
    redraws a box that does not fit, and it leaves half of the images unmixed.

    Args:
        area: Smallest and largest share of the image area, in [0, 1]; uniform in between.
        aspect: Smallest and largest width over height, positive; uniform in the logarithm.

    Raises:
        TypeError: If a range is not two numbers.
        ValueError: If a range is wrong.

    Example:
        >>> masks = BoxMasks(area=(0.25, 0.25), aspect=(1.0, 1.0))
        >>> masks(masks.sample(2), (64, 64)).sum((1, 2))  # boxes of 32 x 32
        tensor([1024, 1024])
    """

    def __init__(self, *, area: Range = (0.02, 0.4), aspect: Range = (0.3, 1 / 0.3)) -> None:
        super().__init__()
        _check_box(area, aspect)
        self.area = area
        self.aspect = aspect

    def sample(
        self, n: int, size: Sequence[int] | None = None, *, generator: Generator | None = None, device: Device = None
    ) -> Tensor:
        """Draw the shapes and positions of n boxes, (n, 4) uniform numbers, for any size; see `MaskSource.sample`.

        Raises:
            TypeError: If `generator` is no torch.Generator.
            ValueError: If `n` is negative.
        """
        del size  # the draw does not depend on it
        return uniform((n, 4), generator=generator, device=device)

    def forward(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Make (N, H, W) bool masks, True in the box, from (N, 4) `scores`; see `crossmix.functional.box_mask`."""
        return box_mask(scores, size, area=self.area, aspect=self.aspect)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"area={self.area}, aspect={self.aspect}"


class CowMasks(nn.Module):
    """Blobs (CowMix), for `masks=` of `CrossDomainMix` and `ClassMix`.

    `crossmix.functional.cow_mask` smooths white noise with a Gaussian. This class draws only the low frequencies that
    survive it, which has the same distribution because the cosine transform of white noise is white noise. Frequencies
    that the narrowest Gaussian damps below 0.01 are left out; they make up 0.6 % of the standard deviation. At 512 x
    512 pixels this takes a sixtieth of the random numbers and less than a tenth of the time.

    Args:
        sigma: Standard deviation of the Gaussian in pixels, positive: one for all images, or the smallest and largest
            of a range from which each image draws one, uniformly in the logarithm. Default: the released code.
        ratio: Expected share of pixels to mark, in [0, 1]. The actual share varies more the larger the blobs are.

    Raises:
        TypeError: If `sigma` is neither a number nor a pair of numbers.
        ValueError: If `sigma` or `ratio` is out of range.

    Example:
        >>> masks = CowMasks(sigma=4.0)
        >>> mask = masks(masks.sample(2, (64, 64)), (64, 64))
        >>> mask.shape, mask.dtype
        (torch.Size([2, 64, 64]), torch.bool)
    """

    def __init__(self, *, sigma: float | Range = (8.0, 32.0), ratio: float = 0.5) -> None:
        super().__init__()
        check_fraction("ratio", ratio)
        pair = (sigma, sigma) if isinstance(sigma, (int, float)) else sigma
        _check_range("sigma", pair, "0 < low <= high, in pixels", lambda low, high: 0.0 < low <= high < math.inf)
        self.sigma: tuple[float, float] = (float(pair[0]), float(pair[1]))
        self.ratio = ratio

    def sample(
        self, n: int, size: Sequence[int] | None = None, *, generator: Generator | None = None, device: Device = None
    ) -> Tensor:
        """Draw the sizes and shapes of the blobs of n masks; see `MaskSource.sample`.

        Returns:
            (n, 1 + waves) uniform numbers, of which the first gives sigma and the others the amplitudes of the waves,
            whose number depends on `size`.

        Raises:
            TypeError: If `size` is not two ints, or `generator` is no torch.Generator.
            ValueError: If `size` is not given, or not positive, or `n` is negative.
        """
        if size is None:
            raise ValueError("`size` must be given, since the draw of `CowMasks` depends on it: height and width.")
        rows, columns = (self._waves(length) for length in check_size("size", size))
        return uniform((n, 1 + rows * columns), generator=generator, device=device)

    def forward(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        """Make (N, H, W) bool masks, True in the blobs, from `scores` drawn for this size. No host sync.

        Raises:
            TypeError: If `scores` is not floating, or `size` is not two ints.
            ValueError: If a shape is wrong.
        """
        height, width = check_size("size", size)
        rows, columns = self._waves(height), self._waves(width)
        check_floating("scores", scores, DRAW)
        if scores.ndim != 2 or scores.shape[1] != 1 + rows * columns:
            want = f"(N, {1 + rows * columns}) for masks of {height} x {width}"
            raise wrong_shape("scores", want, scores, "draw them with `sample(n, size)`")
        scores = at_least_float32(scores)
        low, high = self.sigma
        sigma = (math.log(low) + (math.log(high) - math.log(low)) * scores[:, :1, None]).exp()
        down, down_frequency = _cosines(height, rows, scores)
        across, across_frequency = _cosines(width, columns, scores)
        frequency = (down_frequency[:, None].square() + across_frequency.square()).sqrt()
        # Relative to the longest wave: a Gaussian wider than the image would damp every wave to 0.
        above = (frequency.square() - (math.pi / max(height, width)) ** 2).clamp(min=0)
        damping = (-0.5 * sigma.square() * above).exp() * (frequency > 0)  # drop the constant component
        # Uniform numbers to normal ones, (N, rows, columns); clamped where the result would be infinite.
        heights = (2 * scores[:, 1:] - 1).clamp(-ALMOST_ONE, ALMOST_ONE).erfinv().reshape(-1, rows, columns)
        heights = heights * damping
        # The waves are orthonormal, so the squares of the amplitudes sum to those of the pixels (Parseval).
        std = (heights.square().sum((1, 2), keepdim=True) / (height * width)).sqrt()
        level = _quantile(std, self.ratio) * math.sqrt(height * width)
        heights = torch.where(frequency > 0, heights, -level)  # subtract the level, so that the threshold is 0
        # The lower half of even waves is the mirrored upper half, that of odd waves its negative. So half of the
        # products and memory suffice: 3.1 instead of 4.1 ms for 8 x 512 x 512 on one CPU thread.
        half = (height + 1) // 2
        with no_autocast(scores.device):  # half precision would move the edges of the blobs
            lines = heights @ across.mT
            even, odd = (down[:half, parity::2].contiguous() @ lines[:, parity::2] for parity in (0, 1))
        lower = (even > odd)[:, : height // 2].flip(1)
        return torch.cat([even > odd.neg_(), lower], 1)

    def _waves(self, length: int) -> int:
        """Number of waves along one side, including the constant one, that are not damped below 0.01."""
        return math.ceil(min(length, max(2, CUT * length / (math.pi * self.sigma[0]))))

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"sigma={self.sigma}, ratio={self.ratio}"


def _quantile(std: Tensor, ratio: float) -> Tensor:
    """The value that a share `ratio` of normal numbers with mean 0 exceeds."""
    std = std.clamp(min=torch.finfo(std.dtype).tiny)  # avoids 0 * inf
    return std * (math.sqrt(2) * std.new_full((), 1 - 2 * ratio).erfinv())


def _cosines(length: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` longest waves of an orthonormal cosine transform, (length, count), and their frequencies, (count,).

    They are symmetric at the border, half a pixel beyond the edge pixel.
    """
    frequency = torch.arange(count, device=like.device, dtype=like.dtype) * (math.pi / length)
    pixel = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    scale = torch.where(frequency > 0, like.new_full((), math.sqrt(2 / length)), math.sqrt(1 / length))
    return (pixel[:, None] * frequency).cos() * scale, frequency


def _inside(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Mark an interval of a length (N, 1) among pixels 0..size-1, as (N, size) bool.

    `place` in [0, 1) selects one of the size - length + 1 positions where it fits, all equally likely.
    """
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor().minimum(size - length)
    pixel = torch.arange(size, device=length.device)
    return (pixel >= start) & (pixel < start + length)


def _smoothing(sigma: Tensor, size: int, known: float | None) -> tuple[Tensor, Tensor | None]:
    """One matrix, or two to apply in turn, that smooth `size` pixels with a Gaussian.

    One is (n or 1, size, size); two are (n or 1, waves, size) and (size, waves).

    Taps beyond the border are reflected, not repeating the edge, so that each wave of a cosine transform is damped by a
    factor. If sigma is known, waves that vanish in the arithmetic are left out, which saves most of the products.

    Args:
        sigma: (n,) or (1,), in pixels.
        size: The number of pixels.
        known: The value of sigma if it is a number, else None.
    """
    from kornia.filters import get_gaussian_kernel1d  # noqa: PLC0415 - importing kornia takes longer than crossmix

    reach, count = max(size - 1, 1), size
    cut = math.sqrt(-2 * math.log(torch.finfo(sigma.dtype).eps))  # where the Gaussian falls below eps
    if known is not None and known * cut < reach:  # otherwise the taps are cut off before waves vanish
        count = min(size, math.ceil(cut * reach / (math.pi * known)) + 1)
    pixel = torch.arange(size, device=sigma.device)
    is_end = (pixel == 0) | (pixel == size - 1)
    taps: Tensor = get_gaussian_kernel1d(2 * size - 1, sigma[:, None])[:, size - 1 :]  # of one side
    if 2 * count > size:  # one product is cheaper than two
        taps = torch.where(pixel == reach, 2 * taps, taps)  # this tap arrives from both sides
        direct = torch.cat([taps.flip(1), taps[:, 1:]], 1).unfold(1, size, 1).flip(1)  # by j - i
        mirrored = torch.cat([taps, taps.flip(1)[:, 1:]], 1).unfold(1, size, 1)  # by j + i
        return (direct + mirrored) * torch.where(is_end, sigma.new_full((), 0.5), 1.0), None
    waves = ((pixel[:, None] * pixel[:count] % (2 * reach)).to(sigma.dtype) * (math.pi / reach)).cos()
    damping = 2 * taps @ waves - taps[:, :1]
    weight = torch.where(is_end, 1, 2)
    inverse = (waves * (weight[:, None] * weight[:count])).mT / (2 * reach)
    return damping[:, :, None] * inverse, waves


def _check_sigma(sigma: float | Tensor, noise: Tensor) -> Tensor:
    """Sigma as (1,) or (N,) on the device of the noise, with its value checked if the host knows it."""
    if isinstance(sigma, Tensor):
        check_floating("sigma", sigma, "convert with `.float()`")
        if sigma.ndim != 1 or len(sigma) != len(noise):
            want = f"a number or have shape (N,) = ({len(noise)},)"
            raise ValueError(f"`sigma` must be {want}, got {tuple(sigma.shape)}; pass one per image.")
        check_same_device(noise=noise, sigma=sigma)
        check_positive("sigma", sigma, "it is in pixels")
        return sigma
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"`sigma` must be a number or a tensor, got {type(sigma).__name__}.")
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"`sigma` must be positive and finite, got {sigma}; it is in pixels.")
    return noise.new_full((1,), sigma)


def _check_box(area: Range, aspect: Range) -> None:
    _check_range("area", area, "0 <= low <= high <= 1", lambda low, high: 0.0 <= low <= high <= 1.0)
    _check_range("aspect", aspect, "0 < low <= high", lambda low, high: 0.0 < low <= high < math.inf)


def _check_range(name: str, values: Any, want: str, fits: Callable[[float, float], bool]) -> None:  # noqa: ANN401 - what a user gave
    pair = isinstance(values, Sequence) and len(values) == 2
    if not pair or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise TypeError(f"`{name}` must be two numbers (low, high), got {values!r}.")
    if not fits(*values):
        raise ValueError(f"`{name}` must be (low, high) with {want}, got {values}.")


class MaskedImages(nn.Module):
    """Hide square blocks of each image, for masked image consistency (MIC).

    A network that has to label the whole image from the visible part learns to use context. The authors multiply
    normalised images by 0, which is the mean colour; here images are in [0, 1], so blocks are filled with that colour.

    Args:
        block: Side of a block in pixels, at most the shorter side of the images. None chooses by their size, as the
            authors do: 64, or 32 if no side exceeds 512; never more than the shorter side.
        ratio: Share of blocks to hide, in [0, 1]; each block is drawn independently.
        fill: Value of hidden pixels per channel; the mean colour of ImageNet by default. For images that are already
            normalised, pass the normalised value: `(0.0, 0.0, 0.0)` for ImageNet statistics.

    Raises:
        TypeError: If `block` is not an int, or `ratio` or `fill` are not numbers.
        ValueError: If an argument is out of range.

    Example:
        >>> hide = MaskedImages(block=2, fill=(0.0, 0.5, 1.0))
        >>> hide(torch.ones(1, 3, 2, 4), scores=torch.tensor([[[0.1, 0.9]]]))[0, :, 0]
        tensor([[0.0000, 0.0000, 1.0000, 1.0000],
                [0.5000, 0.5000, 1.0000, 1.0000],
                [1.0000, 1.0000, 1.0000, 1.0000]])
    """

    def __init__(
        self, block: int | None = 64, ratio: float = 0.7, fill: Sequence[float] = (0.485, 0.456, 0.406)
    ) -> None:
        super().__init__()
        if block is not None:
            check_pixels("block", block)
        check_fraction("ratio", ratio)
        self.block = block
        self.ratio = ratio
        try:
            self.fill: tuple[float, ...] = tuple(float(value) for value in fill)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`fill` must hold a number per channel, got {fill!r}; repeat a single number.") from error
        if not self.fill or not all(map(math.isfinite, self.fill)):
            raise ValueError(f"`fill` must hold a finite number per channel, got {self.fill}.")

    def sample(
        self, n: int, size: Sequence[int], *, generator: Generator | None = None, device: Device = None
    ) -> Tensor:
        """Draw a number for each block of n images of a size, independently of the images; see `MaskSource.sample`.

        Returns:
            (n, ceil(H / block), ceil(W / block)) float32, uniform in [0, 1).

        Raises:
            TypeError: If `size` is not two ints, or `generator` is no torch.Generator.
            ValueError: If a block does not fit into such images, or `n` is negative.
        """
        height, width = check_size("size", size)
        block = self._side(height, width)
        return uniform((n, -(-height // block), -(-width // block)), generator=generator, device=device)

    def forward(self, images: Tensor, *, scores: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Hide the blocks whose score is below `ratio`.

        Args:
            images: (N, C, H, W) floating, with as many channels as `fill`; H and W need not be multiples of `block`.
            scores: A draw from `sample`, to replay it.
            generator: Source of randomness; None uses the global one. `torch.compile` cannot trace it: use `scores`.

        Returns:
            (N, C, H, W) in the dtype and memory format of `images`. No host sync.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape or a device is wrong, or a block does not fit into the images.
        """
        check_images("images", images, channels=len(self.fill))
        size = (images.shape[-2], images.shape[-1])
        if scores is None:
            scores = self.sample(len(images), size, generator=generator, device=images.device)
        hidden = block_mask(scores, size, self._side(*size), ratio=self.ratio)
        check_same_device(images=images, scores=scores)
        if len(scores) != len(images):
            raise ValueError(f"`scores` is for {len(scores)} images but `images` holds {len(images)}; draw for these.")
        with no_autocast(images.device):  # of a CPU, it refuses to stack float16
            fill = torch.stack([images.new_full((1, 1), value) for value in self.fill])  # torch.tensor would sync
        return torch.where(hidden[:, None], fill, images)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"block={self.block}, ratio={self.ratio}, fill={self.fill}"

    def _side(self, height: int, width: int) -> int:
        """The side of a block for images of this size."""
        if self.block is None:
            return min(64 if max(height, width) > 512 else 32, height, width)
        if self.block > min(height, width):
            got = f"{self.block} pixels for images of {height} x {width}"
            raise ValueError(f"`block` must fit into the images, got {got}; use a smaller one, or None.")
        return self.block
