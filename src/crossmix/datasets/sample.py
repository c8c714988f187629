"""The type that readers return, and the error that they raise."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["DataError", "Sample"]


class Sample(NamedTuple):
    """An image with its label map.

    Attributes:
        image: (3, H, W) uint8, RGB; (3, 0, 0) if images are not read.
        label: (H, W) uint8 train ids, 255 for ignored pixels; None if labels are not read, except that
            `SegmentationFolder` then returns a map of ignored pixels, so that samples collate.
        name: The file's stem without the data set's suffix, preceded by its folders if stems are not unique.
    """

    image: Tensor
    label: Tensor | None
    name: str


class DataError(ValueError):
    """Invalid data on disk; the message names the file or folder, what was expected, and what to do."""
