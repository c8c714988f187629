"""Read PNG and JPEG images as tensors. The format is detected by content; errors name the file."""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from kornia_rs import io
from torch import Tensor

from crossmix.datasets import _png
from crossmix.datasets.sample import DataError

try:
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the JPEG segment with the image size (SOF)
ORIENTATION = 0x0112  # EXIF tag


class Header(NamedTuple):
    """An image's size as displayed, and its EXIF orientation."""

    width: int
    height: int
    orientation: int
    channels: int = 0  # JPEG only


def read_image(path: str | Path, *, any_kind: bool = True) -> Tensor:
    """Read an image as RGB, rotated according to its EXIF orientation; transparency is dropped.

    Args:
        path: A PNG or JPEG file (by content) with 8 bits per channel.
        any_kind: Whether to convert grey images to RGB, and also PNGs with a palette, with grey and transparency, or
            with fewer bits (these need Pillow, the extra `pictures`). False refuses them: they may be label maps.

    Returns:
        (3, H, W) uint8.

    Raises:
        DataError: If the file is missing, damaged, too large, or of another kind, or Pillow is needed but missing.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import write_png
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> write_png(path, torch.zeros(4, 6, dtype=torch.uint8))
        >>> read_image(path).shape
        torch.Size([3, 4, 6])
    """
    path = Path(path)
    if _png.read_start(path).startswith(_png.JPEG):
        pixels, orientation = _read_jpeg(path)
    else:
        pixels, orientation = _read_png(path, any_kind=any_kind), _orientation(_png.read_exif(path))
    channels = pixels.shape[0]
    if channels not in {3, 4} and not (any_kind and channels == 1):
        raise DataError(f"{path}: expected an RGB image, got {channels} channels; is this a label map?")
    return _turned(pixels[:3].expand(3, -1, -1), orientation).contiguous()


def image_size(path: str | Path) -> tuple[int, int]:
    """Read the size of an image as displayed, which is that of what `read_image` returns, without decoding it.

    Args:
        path: A PNG or JPEG file (by content).

    Returns:
        Height and width.

    Raises:
        DataError: If the file is missing, too large, or of another kind, or its header is damaged.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import write_png
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> write_png(path, torch.zeros(4, 6, dtype=torch.uint8))
        >>> image_size(path)
        (4, 6)
    """
    header = read_header(Path(path))
    return header.height, header.width


def read_turned(path: Path, *, deep: bool = False) -> Tensor:
    """Read a PNG's channels as `read_png` does, rotated according to its EXIF orientation."""
    pixels = _png.read_png(path, deep=deep)
    return _turned(pixels, _orientation(_png.read_exif(path))).contiguous()


def read_header(path: Path) -> Header:
    """Read the size of an image without decoding it; refuse one with too many pixels."""
    if _png.read_start(path).startswith(_png.JPEG):
        return _read_jpeg_header(path)
    header, orientation = _png.read_header(path), _orientation(_png.read_exif(path))
    return Header(*_as_shown(header.width, header.height, orientation), orientation)


def _read_png(path: Path, *, any_kind: bool) -> Tensor:
    """Decode a PNG to (C, H, W) with C = 1, 3 or 4."""
    header = _png.read_header(path)
    odd = header.color_type in {_png.PALETTE, _png.GREY_ALPHA} or header.bit_depth < 8
    return _by_pillow(path) if any_kind and odd and header.bit_depth <= 8 else _png.read_png(path)


def _read_jpeg_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            header = _jpeg_header(file)
    except (OSError, struct.error, IndexError) as error:
        raise DataError(f"{path}: is cut off or damaged; copy or download it again.") from error
    _png.check_pixels(path, header.width, header.height)
    return header


def _read_jpeg(path: Path) -> tuple[Tensor, int]:
    """Decode a JPEG to (3, H, W), or (1, H, W) if it is grey; return its orientation too."""
    header = _read_jpeg_header(path)
    if header.channels not in {1, 3}:
        raise DataError(f"{path}: is a JPEG of {header.channels} channels; convert it to RGB.")
    try:  # the only decoder of kornia_rs that rejects truncated files
        pixels = torch.from_numpy(np.asarray(io.read_image_jpegturbo(str(path)))).permute(2, 0, 1)
    except Exception as error:  # kornia_rs raises bare Exception
        raise DataError(f"{path}: cannot be decoded ({error}); copy or download it again.") from error
    return pixels[: header.channels], header.orientation


def _as_shown(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation > 4 else (width, height)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to (C, H, W): 2 to 4 mirror or rotate by 180 degrees, 5 to 8 also transpose."""
    if orientation in {5, 6, 7, 8}:
        pixels = pixels.transpose(1, 2)
    across = [2] if orientation in {2, 3, 6, 7} else []
    down = [1] if orientation in {3, 4, 7, 8} else []
    return pixels.flip(across + down) if across + down else pixels


def _jpeg_header(file: BinaryIO) -> Header:
    """Parse a JPEG's segments up to the frame header."""
    file.seek(2)
    orientation = 1
    while True:
        marker = file.read(1)[0]
        if marker != 0xFF:
            raise struct.error("no marker")
        while marker == 0xFF:  # any number of fill bytes
            marker = file.read(1)[0]
        (length,) = struct.unpack(">H", file.read(2))
        if length < 2:
            raise struct.error("no length")
        if marker in FRAMES:
            _, height, width, channels = struct.unpack(">BHHB", file.read(6))
            return Header(*_as_shown(width, height, orientation), orientation, channels)
        body = file.read(length - 2)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation(body[6:])


def _orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, from the first EXIF directory; 1 (upright) if it is missing or damaged."""
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _by_pillow(path: Path) -> Tensor:
    """Convert a PNG with a palette, grey and transparency, or few bits to RGB."""
    if Image is None:
        raise DataError(
            f"{path}: is a PNG with a palette, with grey and transparency, or with few bits, which needs Pillow; "
            "install it with `pip install pillow`, or save the file as RGB."
        )
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(f"{path}: cannot be decoded ({error}); copy or download it again.") from error
