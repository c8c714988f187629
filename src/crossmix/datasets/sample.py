"""What readers return, and what they raise."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["DataError", "Sample"]


class Sample(NamedTuple):
    """An image with its label map.

    Attributes:
        image: (3, H, W) uint8, RGB; (3, 0, 0) where images are not read.
        label: (H, W) uint8, train ids or 255 for ignored pixels; None where labels are not read, but all ignored from
            `SegmentationFolder`, whose samples collate.
        name: The file's stem without the data set's suffix; with folders in front where stems repeat.
    """

    image: Tensor
    label: Tensor | None
    name: str


class DataError(ValueError):
    """Something is wrong with data on disk; the message names the file or folder, what was expected, and what to do."""
