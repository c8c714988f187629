"""The four colour operations in each image's own order, in one fixed series of passes over the whole batch.

An order is data, so the passes cannot follow it. Instead every image goes through the same series, which has room for
all 24 orders, and small per-image numbers, planned beforehand, make the steps that an image does not need neutral.

Red, green and blue are kept as three (N, H, W) tensors from the first step to the last: so the steps are pointwise, and
`torch.compile` makes one kernel of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY = (0.299, 0.587, 0.114)  # Rec. 601, as torchvision and kornia have it
TINY = 1e-12  # stands for the chroma of a grey pixel, which has no hue

Channels = Sequence[Tensor]  # red, green, blue


def additive_jitter(channels: Channels, order: Tensor, factors: Tensor) -> Channels:
    """Old kornia's operations: affine, HSV, affine, HSV, affine.

    Brightness adds and contrast multiplies, so that two of them in a row, with their clamps, are one affine map with a
    bound. Saturation and hue are the HSV steps, the one that comes first in the first.

    Args:
        channels: Three (N, H, W) float tensors in [0, 1].
        order: (N, 4) int64, a permutation of the operations per image, first one first.
        factors: (4, N) in the dtype of the channels: brightness, contrast, saturation, hue.

    Returns:
        Three (N, H, W) tensors in [0, 1].
    """
    when = order.argsort(1).T  # (4, N): when each operation comes
    hue_first = when[HUE] < when[SATURATION]
    saturation = _at(torch.stack([~hue_first, hue_first]), factors[SATURATION], 1)
    turn = _at(torch.stack([hue_first, ~hue_first]), factors[HUE], 0)
    affine = _affine_maps(when, factors)
    channels = _affine(channels, *affine[0])
    for i in range(2):
        channels = _hsv(channels, saturation[i], turn[i])
        channels = _affine(channels, *affine[i + 1])
    return channels


def torchvision_jitter(channels: Channels, order: Tensor, factors: Tensor) -> Channels:
    """Today's usual operations: on either side of the hue a brightness and two blends, each with a brightness after it.

    Contrast and saturation blend with the mean grey and with the grey image. Brightness scales what comes before it,
    clamp(b clamp(y)) = min(max(b y, 0), min(b, 1)), so that it needs a pass of its own only where it comes first.

    Args and returns as for `additive_jitter`.
    """
    when = order.argsort(1).T
    blends, which = when[CONTRAST:HUE].sort(0)  # (2, N): contrast and saturation as they follow each other
    after_hue = blends > when[HUE]
    amount = _at(torch.stack([~after_hue, after_hue]), factors[CONTRAST:HUE].gather(0, which), 1)  # side, blend
    after_hue = when[BRIGHTNESS] > when[HUE]
    place = _one_hot((when[BRIGHTNESS] > blends).sum(0), 3)  # before both blends, between, after
    gain = _at(torch.stack([place & ~after_hue, place & after_hue]), factors[BRIGHTNESS], 1)  # side, place
    contrast = (which == 0)[..., None, None]
    turn = factors[HUE][:, None, None]
    for i in range(2):
        channels = [x.mul(gain[i, 0]).clamp_max_(1) for x in channels]
        for j in range(2):
            channels = _blend(channels, contrast[j], amount[i, j], gain[i, j + 1])
        if i == 0:
            channels = _hsv(channels, torch.ones_like(turn), turn)
    return channels


def _affine_maps(when: Tensor, factors: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Brightness and contrast before, between and after the HSV steps, as clamp(scale x + shift, 0, high).

    With b added and c multiplied, and x in [0, 1],

        clamp(c clamp(x + b)) = clamp(c x + c b, 0, c)    and    clamp(clamp(c x) + b) = clamp(c x + b, 0, 1 + b),

    both at most 1.

    Args:
        when: (4, N) int64, when each operation comes.
        factors: (4, N), their factors.

    Returns:
        Three times scale, shift and high, each (N, 1, 1).
    """
    slot = (when[:SATURATION, None] > when[None, SATURATION:]).sum(1)  # (2, N): after how many of the HSV steps
    here = _one_hot(slot, 3)
    added = torch.where(here[:, BRIGHTNESS], factors[BRIGHTNESS] - 1, 0)
    scale = torch.where(here[:, CONTRAST], factors[CONTRAST], 1)
    adds_first = when[BRIGHTNESS] < when[CONTRAST]
    shift = torch.where(adds_first, scale * added, added)
    high = torch.where(adds_first, scale, 1 + added).clamp(max=1)
    return list(zip(*(value[..., None, None] for value in (scale, shift, high)), strict=True))


def _affine(channels: Channels, scale: Tensor, shift: Tensor, high: Tensor) -> Channels:
    """clamp(scale x + shift, 0, high)."""
    return [x.mul(scale).add_(shift).clamp_min_(0).clamp_max_(high) for x in channels]


def _blend(channels: Channels, contrast: Tensor, amount: Tensor, gain: Tensor) -> Channels:
    """Blend with the mean grey (contrast) or the grey image (saturation), clamp, then scale by the gain and clamp."""
    red, green, blue = channels
    grey = (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    base = torch.where(contrast, grey.mean((1, 2), keepdim=True), grey).mul_(gain * (1 - amount))
    return _affine(channels, gain * amount, base, gain.clamp(max=1))


def _hsv(channels: Channels, saturation: Tensor, turn: Tensor) -> Channels:
    """Scale the saturation of HSV and turn the hue by a share of the circle, without going through HSV.

    With V the greatest channel and C, the chroma, the greatest less the least, a channel is V within a sixth of the
    circle around its own hue, V - C beyond a third, and linear between. So one hue is found, and three clamped
    distances on the circle give the channels.
    """
    red, green, blue = channels
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # Of the weights (channel - least) / chroma one is 1, one is 0, and the third says where in its sixth the hue lies.
    # So 2 + red - green - blue, of the weights, is the distance from cyan in sixths, and green against blue the side.
    hue = (red + least).sub_(green).sub_(blue).div_(chroma.clamp(min=TINY)).add_(2)
    hue = torch.copysign(hue, blue - green)
    # Half a turn and more are added, so that the sum is at least 0, where the fraction is the remainder.
    hue = torch.add(turn.remainder(1) + 0.5, hue, alpha=1 / 6).frac_()
    chroma = torch.minimum(chroma * saturation, value)  # the saturation C / V is at most 1
    from_cyan, from_green, from_blue = ((hue - own).abs_().clamp_(1 / 6, 1 / 3) for own in (1 / 2, 1 / 3, 2 / 3))
    red = torch.addcmul(torch.sub(value, chroma, alpha=2), chroma, from_cyan, value=6)  # opposite to cyan
    top = value + chroma
    return red, torch.addcmul(top, chroma, from_green, value=-6), torch.addcmul(top, chroma, from_blue, value=-6)


def _one_hot(index: Tensor, size: int) -> Tensor:
    """(..., N) int64 as (size, ..., N) bool."""
    places = torch.arange(size, device=index.device)
    return index == places.reshape(-1, *[1] * index.ndim)


def _at(used: Tensor, value: Tensor, neutral: float) -> Tensor:
    """The value where it is used, else what changes nothing: (..., N) as (..., N, 1, 1)."""
    return torch.where(used, value, neutral)[..., None, None]
