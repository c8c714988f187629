"""Any photograph, PNG or JPEG, as a tensor: the header is looked at first, every failure names the file."""

import struct
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from kornia_rs import io
from torch import Tensor

from crossmix.datasets import DataError

__all__ = ["ENDINGS", "read_photo"]

ENDINGS = {".png", ".jpg", ".jpeg"}
MAX_PIXELS = 100_000_000  # a file of some hundred kilobytes can unfold to gigabytes
MODES = {"grey": "mono", "RGB": "rgb", "RGBA": "rgba"}  # kornia_rs' names
FRAMES = {0xC0, 0xC1, 0xC2}  # JPEG markers that begin a frame: baseline, extended, progressive


class Header(NamedTuple):
    """What a file says about its pixels."""

    width: int
    height: int
    bits: int
    kind: str
    by_pillow: bool


def read_photo(path: Path) -> Tensor:
    """Read a picture as RGB, turned as its EXIF orientation says. Grey becomes RGB, transparency is left out.

    Args:
        path: A PNG or JPEG file of 8 bits per channel. JPEG, and PNG with EXIF, are read by Pillow.

    Returns:
        (3, H, W) uint8.

    Raises:
        DataError: If the file is missing, damaged, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"\x89PNG\r\n\x1a\n":
                header = png_header(file)
            elif start[:2] == b"\xff\xd8":
                file.seek(2)
                header = jpeg_header(file)
            else:
                raise DataError(f"{path}: is neither a PNG nor a JPEG file, whatever its name; convert it to one.")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    except (struct.error, IndexError) as error:
        raise DataError(f"{path}: is cut off or damaged; copy or download it again.") from error
    if header.bits != 8 or header.kind not in MODES:
        raise DataError(f"{path}: is {header.kind} of {header.bits} bits per channel; convert it to RGB of 8 bits.")
    if header.width * header.height > MAX_PIXELS:
        raise DataError(
            f"{path}: has {header.width} x {header.height} pixels, more than {MAX_PIXELS}; shrink it first."
        )
    try:
        pixels = (
            by_pillow(path)
            if header.by_pillow
            else torch.from_numpy(io.read_image_png_u8(str(path), MODES[header.kind]))
        )
    except ImportError as error:
        raise DataError(
            f"{path}: photographs take Pillow to read; install it by `pip install crossmix[pictures]`."
        ) from error
    except Exception as error:  # kornia_rs raises bare Exception, Pillow whatever a damaged file leads to
        raise DataError(f"{path}: cannot be decoded ({error}); copy or download it again.") from error
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return pixels[..., :3].permute(2, 0, 1).expand(3, -1, -1).contiguous()


def by_pillow(path: Path) -> Tensor:
    """Decode and turn a picture: (H, W, 3) uint8."""
    from PIL import Image, ImageOps  # noqa: PLC0415 - an extra

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the header was looked at
        warnings.filterwarnings("ignore", "Corrupt EXIF data")  # then it turns nothing
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB")))


def png_header(file: BinaryIO) -> Header:
    """From the first chunk of a PNG, and whether any chunk is of EXIF."""
    width, height, bits, color = struct.unpack(">8xIIBB", file.read(18))
    kinds = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with transparency", 6: "RGBA"}
    file.seek(3 + 4, 1)  # the rest of the chunk, and its checksum
    chunk = file.read(8)
    while len(chunk) == 8 and chunk[4:] != b"eXIf":
        file.seek(int.from_bytes(chunk[:4], "big") + 4, 1)
        chunk = file.read(8)
    return Header(width, height, bits, kinds.get(color, "unknown"), by_pillow=len(chunk) == 8)


def jpeg_header(file: BinaryIO) -> Header:
    """From a JPEG's frame, behind segments that are skipped."""
    while True:
        marker = file.read(1)[0]
        if marker != 0xFF:
            raise struct.error("no marker")
        while marker == 0xFF:  # any number of fill bytes
            marker = file.read(1)[0]
        (length,) = struct.unpack(">H", file.read(2))
        if marker in FRAMES:
            bits, height, width, channels = struct.unpack(">BHHB", file.read(6))
            kind = {1: "grey", 3: "RGB", 4: "CMYK"}.get(channels, "unknown")
            return Header(width, height, bits, kind, by_pillow=True)
        if length < 2:
            raise struct.error("no length")
        file.seek(length - 2, 1)
