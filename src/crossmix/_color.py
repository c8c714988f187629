"""Colour jitter with a random order of operations per image, as a fixed sequence of passes over the batch.

The order differs between images, so the batch cannot follow it with control flow. Instead all images go through one
sequence of passes that covers all 24 orders; small per-image factors neutralise the passes that an image does not need.

Red, green and blue stay three separate (N, H, W) tensors throughout, so that every pass is pointwise and
`torch.compile` fuses them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY = (0.299, 0.587, 0.114)  # Rec. 601 luma, as in torchvision and kornia
TINY = 1e-12  # avoids dividing by the chroma of a grey pixel, which is 0

Channels = Sequence[Tensor]  # red, green, blue


def additive_jitter(channels: Channels, order: Tensor, factors: Tensor) -> Channels:
    """Jitter as in early versions of kornia: affine, HSV, affine, HSV, affine.

    Brightness adds and contrast multiplies, so both in a row, clamps included, are one clamped affine map. Saturation
    and hue are the two HSV passes, in the order of the image.

    Channels are three (N, H, W) float tensors in [0, 1], `order` is (N, 4) int64, a permutation of the operations in
    order of application, and `factors` (4, N) in the dtype of the channels: brightness, contrast, saturation, hue.
    """
    when = order.argsort(1).T  # (4, N): the position of each operation
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
    """Jitter as in torchvision: on each side of the hue pass, a brightness pass and two blends.

    Contrast blends with the mean grey, saturation with the grey image. A brightness after a blend is folded into it,
    clamp(b clamp(y)) = min(max(b y, 0), min(b, 1)), so it needs a pass of its own only if it comes first.

    Arguments and result are those of `additive_jitter`.
    """
    when = order.argsort(1).T
    blends, which = when[CONTRAST:HUE].sort(0)  # (2, N): positions of contrast and saturation in order of application
    after_hue = blends > when[HUE]
    # (2, 2, N, 1, 1), side of the hue pass x blend
    amount = _at(torch.stack([~after_hue, after_hue]), factors[CONTRAST:HUE].gather(0, which), 1)
    after_hue = when[BRIGHTNESS] > when[HUE]
    place = _one_hot((when[BRIGHTNESS] > blends).sum(0), 3)  # (3, N): before, between or after the two blends
    # (2, 3, N, 1, 1), side of the hue pass x place
    gain = _at(torch.stack([place & ~after_hue, place & after_hue]), factors[BRIGHTNESS], 1)
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
    """Brightness and contrast before, between and after the HSV passes, as clamp(scale x + shift, 0, high).

    With b added and c multiplied, and x in [0, 1],

        clamp(c clamp(x + b)) = clamp(c x + c b, 0, c)    and    clamp(clamp(c x) + b) = clamp(c x + b, 0, 1 + b),

    both at most 1. `when` is (4, N), the position of each operation; scale, shift and high are (N, 1, 1) each.
    """
    slot = (when[:SATURATION, None] > when[None, SATURATION:]).sum(1)  # (2, N): how many HSV passes come before
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
    """Blend with the mean grey (contrast) or the grey image (saturation), clamp, scale by the gain, clamp."""
    red, green, blue = channels
    grey = (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])
    base = torch.where(contrast, grey.mean((1, 2), keepdim=True), grey).mul_(gain * (1 - amount))
    return _affine(channels, gain * amount, base, gain.clamp(max=1))


def _hsv(channels: Channels, saturation: Tensor, turn: Tensor) -> Channels:
    """Scale the HSV saturation and turn the hue by a fraction of the circle, without converting to HSV and back.

    With V the largest channel and chroma C the largest minus the smallest, a channel equals V within a sixth of the
    circle around its own hue, V - C beyond a third, and is linear in between. So it suffices to find the hue; three
    clamped distances on the circle then give the channels.
    """
    red, green, blue = channels
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # Of the three weights (channel - least) / chroma, one is 1, one is 0, and the third gives the position within a
    # sixth. So 2 + red - green - blue (as weights) is the distance from cyan in sixths; green vs. blue gives the side.
    hue = (red + least).sub_(green).sub_(blue).div_(chroma.clamp(min=TINY)).add_(2)
    hue = torch.copysign(hue, blue - green)
    # Adding at least half a turn makes the sum non-negative, so that the fractional part is the remainder.
    hue = torch.add(turn.remainder(1) + 0.5, hue, alpha=1 / 6).frac_()
    chroma = torch.minimum(chroma * saturation, value)  # saturation C / V is at most 1
    from_cyan, from_green, from_blue = ((hue - own).abs_().clamp_(1 / 6, 1 / 3) for own in (1 / 2, 1 / 3, 2 / 3))
    red = torch.addcmul(torch.sub(value, chroma, alpha=2), chroma, from_cyan, value=6)  # red is opposite to cyan
    top = value + chroma
    return red, torch.addcmul(top, chroma, from_green, value=-6), torch.addcmul(top, chroma, from_blue, value=-6)


def _one_hot(index: Tensor, size: int) -> Tensor:
    """One-hot encode (..., N) int64 along a new first dimension: (size, ..., N) bool."""
    places = torch.arange(size, device=index.device)
    return index == places.reshape(-1, *[1] * index.ndim)


def _at(used: Tensor, value: Tensor, neutral: float) -> Tensor:
    """The value where it is used, else the neutral one, (..., N), as (..., N, 1, 1)."""
    return torch.where(used, value, neutral)[..., None, None]
