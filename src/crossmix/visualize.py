"""Pictures: label maps in colour, and grids of images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from crossmix._checks import check_int, check_tensor, check_values, wrong_shape
from crossmix.datasets.classes import PALETTE

__all__ = ["colorize", "gallery"]


def colorize(labels: Tensor, *, colors: Sequence[tuple[int, int, int]] = PALETTE) -> Tensor:
    """Colour a map of train ids, by default with the Cityscapes palette; all other ids become black.

    Args:
        labels: (H, W) integer train ids.
        colors: (R, G, B) in 0..255 per train id; the 19 classes of Cityscapes by default.

    Returns:
        (3, H, W) uint8.

    Raises:
        TypeError: If `labels` is not an integer tensor.
        ValueError: If the shape is wrong, or a colour is not three whole numbers from 0 to 255.

    Example:
        >>> colorize(torch.tensor([[0, 255]]))[:, 0]
        tensor([[128,   0],
                [ 64,   0],
                [128,   0]], dtype=torch.uint8)
    """
    check_tensor("labels", labels)
    check_values("labels", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"`labels` must be integers, got {labels.dtype}; convert with `.long()`.")
    if labels.ndim != 2:
        raise ValueError(f"`labels` must have shape (H, W), got {tuple(labels.shape)}; pass one map at a time.")
    for color in colors:
        if not (len(list(color)) == 3 and all(part in range(256) for part in color)):
            raise ValueError(f"`colors` must hold (red, green, blue) from 0 to 255, got {color}; check its range.")
    table = torch.tensor([*colors, (0, 0, 0)], dtype=torch.uint8, device="cpu")
    index = labels.cpu().long()
    index = torch.where((index >= 0) & (index < len(colors)), index, len(colors))
    return table[index].permute(2, 0, 1).contiguous()


def gallery(rows: Sequence[Sequence[Tensor]], *, gap: int = 4) -> Tensor:
    """Arrange pictures in a grid on a white background.

    Args:
        rows: Rows of equal length; all pictures have one size (3, H, W) and are uint8, or floating in [0, 1].
        gap: White pixels between and around the pictures.

    Returns:
        (3, H', W') uint8.

    Raises:
        TypeError: If a picture is not a uint8 or floating tensor, or `gap` is not an int.
        ValueError: If there are no pictures, a shape is wrong, the sizes differ, or the rows differ in length.

    Example:
        >>> gallery([[torch.zeros(3, 2, 5), torch.ones(3, 2, 5)]], gap=1).shape
        torch.Size([3, 4, 13])
    """
    check_int("gap", gap, least=0)
    for row in rows:
        for picture in row:
            check_tensor("rows", picture)
            check_values("rows", picture)
            if picture.dtype != torch.uint8 and not picture.is_floating_point():
                raise TypeError(f"`rows` must be uint8 or floating in [0, 1], got {picture.dtype}; convert to uint8.")
            if picture.ndim != 3 or len(picture) != 3:
                raise wrong_shape("rows", "(3, H, W) each", picture, "pass RGB pictures without a batch dimension")
    shapes = {tuple(picture.shape) for row in rows for picture in row}
    lengths = {len(row) for row in rows}
    if len(shapes) != 1 or len(lengths) != 1:
        got = f"lengths {sorted(lengths)} and sizes {sorted(shapes)}"
        raise ValueError(f"`rows` must have equal lengths and pictures of one size, got {got}; crop or resize them.")
    _, height, width = next(iter(shapes))
    columns = next(iter(lengths))
    size = (3, gap + len(rows) * (height + gap), gap + columns * (width + gap))
    canvas = torch.full(size, 255, dtype=torch.uint8, device="cpu")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[:, top : top + height, left : left + width] = _bytes(picture)
    return canvas


def _bytes(picture: Tensor) -> Tensor:
    picture = picture.detach().cpu()
    if picture.dtype == torch.uint8:
        return picture
    return (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)
