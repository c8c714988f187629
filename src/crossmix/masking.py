"""Masks that come from random numbers alone: boxes, blobs and blocks.

CutMix: Yun et al., ICCV 2019, https://arxiv.org/abs/1905.04899
CowMix: French et al., 2020, https://arxiv.org/abs/2003.12022
Masked image consistency: Hoyer et al., CVPR 2023, https://arxiv.org/abs/2212.01322
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossmix._checks import check_fraction, check_images, check_pixels, check_same_device, check_tensor
from crossmix._tensors import at_least_float32, uniform

__all__ = ["MaskedImages", "block_mask", "box_mask", "cow_mask"]


def box_mask(
    scores: Tensor,
    size: Sequence[int],
    *,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Mark one box in each image (CutMix).

    Of the four numbers of an image the first is the box's share of the image, linear in `area`; the second its width
    over its height, linear in the logarithm of `aspect`; the last two say where its top and its left edge are, between
    the first and the last place where the box fits. Sides are whole pixels, at least 1 and no longer than the image's.

    Args:
        scores: (N, 4) floating, uniform in [0, 1).
        size: Height and width.
        area: Least and largest share of the image, in [0, 1].
        aspect: Least and largest width over height, positive.

    Returns:
        (N, H, W) bool, True in the box. No host sync.

    Raises:
        TypeError: If `scores` is not floating, or `size` not two ints.
        ValueError: If a shape or a range is wrong.

    Example:
        >>> box_mask(torch.tensor([[1.0, 0.5, 0.0, 0.9]]), (4, 6), area=(0.0, 0.25)).int()
        tensor([[[0, 0, 0, 0, 1, 1],
                 [0, 0, 0, 0, 1, 1],
                 [0, 0, 0, 0, 0, 0],
                 [0, 0, 0, 0, 0, 0]]], dtype=torch.int32)
    """
    height, width = _check_size(size)
    _check_floating("scores", scores)
    if scores.ndim != 2 or scores.shape[1] != 4:
        raise ValueError(f"`scores` must have shape (N, 4), got {tuple(scores.shape)}; draw four numbers per image.")
    _check_range("area", area, "0 <= low <= high <= 1", 0.0 <= area[0] <= area[1] <= 1.0)
    _check_range("aspect", aspect, "0 < low <= high", 0.0 < aspect[0] <= aspect[1] < math.inf)
    share, shape, down, across = at_least_float32(scores)[:, :, None].unbind(1)
    pixels = (area[0] + (area[1] - area[0]) * share) * (height * width)
    ratio = (math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * shape).exp()
    rows = _inside((pixels / ratio).sqrt(), down, height)
    columns = _inside((pixels * ratio).sqrt(), across, width)
    return rows[:, :, None] & columns[:, None, :]


def cow_mask(noise: Tensor, *, sigma: float | Tensor, ratio: float = 0.5) -> Tensor:
    """Mark blobs: where smoothed noise exceeds the quantile of a normal distribution (CowMix).

    smooth > mean + std * sqrt(2) * erfinv(1 - 2 * ratio), with mean and std of each image, so that about a share
    `ratio` is True. The Gaussian is as wide as the image allows; the noise is mirrored at the border. `sigma` is never
    looked at, so a tensor of them may be on a GPU.

    Args:
        noise: (N, H, W) floating, standard normal.
        sigma: Standard deviation of the Gaussian in pixels, positive: a number, or (N,) floating, one per image.
        ratio: Share of pixels to mark, in [0, 1].

    Returns:
        (N, H, W) bool. No host sync.

    Raises:
        TypeError: If `noise` or `sigma` is not floating, or `ratio` is no number.
        ValueError: If a shape, a device or a range is wrong.

    Example:
        >>> noise = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> round(float(cow_mask(noise, sigma=4.0, ratio=0.3).float().mean()), 1)
        0.3
    """
    _check_floating("noise", noise)
    if noise.ndim != 3 or 0 in noise.shape[1:]:
        raise ValueError(f"`noise` must have shape (N, H, W), got {tuple(noise.shape)}; draw one number per pixel.")
    check_fraction("ratio", ratio)
    widths = _check_sigma(sigma, noise)
    noise = at_least_float32(noise)
    with torch.autocast(noise.device.type, enabled=False):  # products in half precision would move the blobs' edges
        down, across = (_smoothing(widths.to(noise.dtype), length) for length in noise.shape[1:])
        smooth = down @ noise @ across.mT
    centred = smooth - smooth.mean((1, 2), keepdim=True)
    std = centred.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(centred.dtype).tiny)  # no 0 * inf
    return centred > std * (math.sqrt(2) * noise.new_full((), 1 - 2 * ratio).erfinv())


def block_mask(scores: Tensor, size: Sequence[int], block: int, *, ratio: float = 0.7) -> Tensor:
    """Mark square blocks of a grid whose score is below `ratio` (masked image consistency).

    Args:
        scores: (N, ceil(H / block), ceil(W / block)) floating, uniform in [0, 1).
        size: Height and width; the last row and column of blocks may be cut.
        block: Side of a block in pixels.
        ratio: Share of blocks to mark, in [0, 1].

    Returns:
        (N, H, W) bool, True on the blocks that are to be hidden. No host sync.

    Raises:
        TypeError: If `scores` is not floating, `size` not two ints, or `block` no int.
        ValueError: If a shape or a range is wrong.

    Example:
        >>> block_mask(torch.tensor([[[0.1, 0.9]]]), (2, 3), 2)
        tensor([[[ True,  True, False],
                 [ True,  True, False]]])
    """
    height, width = _check_size(size)
    check_pixels("block", block)
    check_fraction("ratio", ratio)
    _check_floating("scores", scores)
    rows, columns = -(-height // block), -(-width // block)
    if scores.ndim != 3 or scores.shape[1] != rows or scores.shape[2] != columns:
        raise ValueError(
            f"`scores` must have shape (N, ceil(H / block), ceil(W / block)) = (N, {rows}, {columns}), "
            f"got {tuple(scores.shape)}; draw one number per block."
        )
    hidden = (scores < ratio)[..., None].expand(-1, -1, -1, block).reshape(-1, rows, 1, columns * block)
    hidden = hidden[..., :width].expand(-1, -1, block, -1)  # columns first: then whole rows are copied
    return hidden.reshape(-1, rows * block, width)[:, :height].contiguous()


def _inside(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Which of the pixels 0..size-1 lie on a side of a length (N, 1) that begins at a share `place` of where it fits.

    Every one of the places, as many as there are whole pixels left and one more, is equally likely.
    """
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor().minimum(size - length)
    pixel = torch.arange(size, device=length.device)
    return (pixel >= start) & (pixel < start + length)


def _smoothing(sigma: Tensor, size: int) -> Tensor:
    """Rows that smooth `size` pixels by a Gaussian, (N, size, size): a product costs the same for every sigma.

    Entry (i, j) is how much pixel j counts at pixel i. Taps beyond the border are mirrored, without the edge itself.
    """
    from kornia.filters import get_gaussian_kernel1d  # noqa: PLC0415 - takes longer to import than all of crossmix

    kernel: Tensor = get_gaussian_kernel1d(2 * size - 1, sigma[:, None])
    reach = size - 1
    # Row i of the taps, laid over pixels -reach..size-1+reach, begins reach - i columns into the padded kernel.
    taps = functional.pad(kernel, (reach, reach)).unfold(1, size + 2 * reach, 1).flip(1)
    before, after = taps[..., :reach].flip(2), taps[..., size + reach :].flip(2)
    folded: Tensor = taps[..., reach : size + reach] + functional.pad(before, (1, 0)) + functional.pad(after, (0, 1))
    return folded


def _check_sigma(sigma: float | Tensor, noise: Tensor) -> Tensor:
    """Sigma as (1,) or (N,) on the device of the noise, where a value that the host knows is positive."""
    if isinstance(sigma, Tensor):
        _check_floating("sigma", sigma)
        if sigma.ndim != 1 or len(sigma) != len(noise):
            raise ValueError(
                f"`sigma` must be a number or have shape (N,) = ({len(noise)},), got {tuple(sigma.shape)}; "
                "give one per image."
            )
        check_same_device(noise=noise, sigma=sigma)
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((sigma > 0).all()):
            raise ValueError(f"`sigma` must be positive, got {float(sigma.min())}; it is in pixels.")
        return sigma
    if isinstance(sigma, bool) or not isinstance(sigma, int | float):
        raise TypeError(f"`sigma` must be a number or a tensor, got {type(sigma).__name__}.")
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"`sigma` must be positive and finite, got {sigma}; it is in pixels.")
    return noise.new_full((1,), sigma)


def _check_size(size: object) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(side) is int for side in size):
        raise TypeError(f"`size` must be two ints, height and width, got {size!r}.")
    if min(size) < 1:
        raise ValueError(f"`size` must be positive, got {tuple(size)}.")
    return size[0], size[1]


def _check_range(name: str, values: tuple[float, float], want: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"`{name}` must be (low, high) with {want}, got {values}.")


def _check_floating(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be floating, got {value.dtype}; draw it with torch.rand or torch.randn.")


class MaskedImages(nn.Module):
    """Hide square blocks of each image, for masked image consistency (MIC).

    A network that has to label the whole image, from what is left of it, learns from context. The authors multiply
    normalised images by 0, which is the mean colour; here images are in [0, 1], so the mean colour is filled in.

    Args:
        block: Side of a block in pixels, no longer than the images' sides. None goes by their size: 64, or 32 where no
            side is longer than 512, as the authors have it, and on smaller images than that the shorter side.
        ratio: Share of blocks to hide, in [0, 1]; each is drawn by itself.
        fill: What hidden pixels become, a number per channel: the mean colour of ImageNet. Where images are normalised
            before they come here, the fill has to be too: `(0.0, 0.0, 0.0)` by the statistics of ImageNet.

    Raises:
        TypeError: If `block` is no int, or `ratio` or `fill` no numbers.
        ValueError: If one is out of range.

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
        if isinstance(fill, int | float):
            raise TypeError(f"`fill` must hold a number per channel, got {type(fill).__name__}; repeat it.")
        self.fill = tuple(float(value) for value in fill)
        if not self.fill or not all(map(math.isfinite, self.fill)):
            raise ValueError(f"`fill` must hold a finite number per channel, got {self.fill}.")

    def sample(
        self,
        n: int,
        size: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a number for each block, which does not depend on the images.

        Args:
            n: The number of images.
            size: Their height and width.
            generator: Source of randomness, used on its own device; None uses the global one.
            device: Where the draw shall be; the generator's device, or torch's default one, when not given.

        Returns:
            (N, ceil(H / block), ceil(W / block)) float32, uniform in [0, 1).

        Raises:
            TypeError: If `size` is not two ints.
            ValueError: If a block does not fit into such images.
        """
        height, width = _check_size(size)
        block = self._side(height, width)
        return uniform((n, -(-height // block), -(-width // block)), generator=generator, device=device)

    def forward(
        self, images: Tensor, *, scores: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Hide the blocks whose score is below `ratio`.

        Args:
            images: (N, C, H, W) floating, of as many channels as `fill` has; H and W need not be multiples of `block`.
            scores: What `sample` returned, to replay it.
            generator: Source of randomness; None uses the global one. Cannot be traced by `torch.compile`: use
                `scores`.

        Returns:
            (N, C, H, W) in the dtype and the memory format of `images`. No host sync.

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
            raise ValueError(
                f"`scores` is for {len(scores)} images but `images` holds {len(images)}; sample for this batch size."
            )
        fill = torch.stack([images.new_full((1, 1), value) for value in self.fill])  # a list would wait for its copy
        return torch.where(hidden[:, None], fill, images)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"block={self.block}, ratio={self.ratio}, fill={self.fill}"

    def _side(self, height: int, width: int) -> int:
        """The side of a block in images of a size."""
        if self.block is None:
            return min(64 if max(height, width) > 512 else 32, height, width)
        if self.block > min(height, width):
            raise ValueError(
                f"`block` must fit into the images, got {self.block} pixels for images of {height} x {width}; take a "
                "smaller one, or None to go by their size."
            )
        return self.block
