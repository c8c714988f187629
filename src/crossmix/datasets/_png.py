"""Read and write PNG files as tensors. Errors name the file."""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from kornia_rs import io
from numpy.typing import NDArray
from torch import Tensor

from crossmix.datasets.sample import DataError

MAX_PIXELS = 100_000_000
"""Larger images are refused before decoding, since a small file can decompress to gigabytes."""

LONGEST_EXIF = 1 << 16
"""Bytes, as in a JPEG. A header can claim gigabytes."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
MODES = {GREY: "mono", PALETTE: "mono", RGB: "rgb", RGBA: "rgba"}
"""Names of colour types in kornia_rs."""

Bytes = NDArray[np.uint8]


class Header(NamedTuple):
    """The fields of a PNG's IHDR chunk."""

    width: int
    height: int
    bit_depth: int
    color_type: int
    compression: int
    filters: int
    interlace: int


def read_png(path: str | Path, *, deep: bool = False) -> Tensor:
    """Read a PNG as (C, H, W) uint8 with C = 1, 3 or 4; palette files give indices, not colours.

    Grey and palette files may also have 1, 2 or 4 bits; with `deep`, files of 16 bits are read as int32.
    """
    path = Path(path)
    header = read_header(path)
    if header.bit_depth == 16 and not deep:
        raise DataError(f"{path}: expected 8 bits per channel, got 16; is it the right file? Convert it to 8 bits.")
    try:
        pixels = _read_packed(path, header) if header.bit_depth < 8 else _decoded(path, header)
    except DataError:
        raise
    except Exception as error:  # kornia_rs raises bare Exception
        raise DataError(f"{path}: cannot be decoded ({error}); download or write it again.") from error
    return torch.from_numpy(pixels.astype(np.int32) if header.bit_depth == 16 else pixels).permute(2, 0, 1)


def write_png(path: str | Path, pixels: Tensor) -> None:
    """Write an RGB image or a grey map as PNG.

    Args:
        path: The file; its folder must exist.
        pixels: (3, H, W) or (H, W) uint8.

    Raises:
        OSError: If the file cannot be written.
        TypeError: If `pixels` is not uint8.
        ValueError: If its shape is wrong.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "picture.png"
        >>> write_png(path, torch.zeros(3, 4, 5, dtype=torch.uint8))
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"`pixels` must be uint8, got {pixels.dtype}; scale to 0..255 and convert.")
    if pixels.ndim == 2:
        pixels, mode = pixels[None], "mono"
    elif pixels.ndim == 3 and pixels.shape[0] == 3:
        mode = "rgb"
    else:
        raise ValueError(f"`pixels` must have shape (3, H, W) or (H, W), got {tuple(pixels.shape)}; write one picture.")
    try:
        io.write_image_png_u8(str(path), pixels.permute(1, 2, 0).contiguous().cpu().numpy(), mode)
    except Exception as error:  # kornia_rs raises bare Exception
        raise OSError(f"{path}: cannot be written ({error}); free some space, or make its folder writable.") from error


def read_start(path: Path) -> bytes:
    """Read the first 33 bytes of a file, which contain the whole header of a PNG."""
    try:
        with path.open("rb") as file:
            return file.read(33)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the folder, or download it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions.") from error


def read_header(path: Path) -> Header:
    """Read a PNG's header without decoding the file; refuse one with too many pixels."""
    start = read_start(path)
    if start.startswith(JPEG):
        raise DataError(f"{path}: is a JPEG file, whose lossy compression changes ids; save label maps as PNG.")
    if len(start) < 33 or not start.startswith(SIGNATURE) or start[12:16] != b"IHDR":
        if not start or start.startswith(SIGNATURE):
            raise DataError(f"{path}: is {'cut off' if start else 'empty'}; copy or download it again.")
        raise DataError(f"{path}: is neither PNG nor JPEG; convert it to PNG, or download it again.")
    header = Header(*struct.unpack(">IIBBBBB", start[16:29]))
    check_pixels(path, header.width, header.height)
    return header


def read_exif(path: Path) -> bytes:
    """Read the body of a PNG's eXIf chunk; empty if it has none."""
    with path.open("rb") as file:
        file.seek(len(SIGNATURE))
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind == b"eXIf":
                return file.read(min(length, LONGEST_EXIF))
            file.seek(length + 4, 1)  # skip body and checksum
    return b""


def check_pixels(path: Path, width: int, height: int) -> None:
    """Refuse an image that would take too much memory."""
    if width * height > MAX_PIXELS:
        limit = f"more than the limit of {MAX_PIXELS}"
        raise DataError(f"{path}: has {width} x {height} pixels, {limit}; check where the file comes from.")


def _decoded(path: Path, header: Header) -> Bytes | NDArray[np.uint16]:
    """Decode 8 or 16 bits; `io.read_image` would choose the decoder by the extension instead."""
    if header.color_type not in MODES:
        raise DataError(f"{path}: is grey with transparency, which is not supported; save it without transparency.")
    read = io.read_image_png_u16 if header.bit_depth == 16 else io.read_image_png_u8
    return np.asarray(read(str(path), MODES[header.color_type]))


def _read_packed(path: Path, header: Header) -> Bytes:
    """Decode grey or palette files with 1, 2 or 4 bits per pixel, which kornia_rs does not support, to (H, W, 1)."""
    if header.bit_depth not in {1, 2, 4} or header.color_type not in {GREY, PALETTE}:
        kind = f"{header.bit_depth} bits of colour type {header.color_type}"
        raise DataError(f"{path}: has {kind}, which PNG does not know; download it again.")
    if header.compression or header.filters or header.interlace not in {0, 1}:
        raise DataError(f"{path}: has unknown values in its header; download it again.")
    if header.interlace:
        kind = f"interlaced files of {header.bit_depth} bits"
        raise DataError(f"{path}: {kind} are not supported; save it without interlacing.")
    stride = (header.width * header.bit_depth + 7) // 8
    size = header.height * (stride + 1)
    decoder = zlib.decompressobj()
    data = decoder.decompress(_image_data(path), size)
    if len(data) != size:
        raise DataError(f"{path}: holds {len(data)} bytes of pixels instead of {size}; download it again.")
    decoder.decompress(decoder.unconsumed_tail, 1)  # reads on to the checksum, and raises if it is wrong
    lines = np.frombuffer(data, np.uint8).reshape(header.height, stride + 1)
    rows = np.zeros((header.height, stride), np.uint8)
    above = np.zeros(stride, np.uint8)
    for i, line in enumerate(lines):
        above = rows[i] = _unfilter(int(line[0]), line[1:], above, path)
    per_byte = 8 // header.bit_depth
    shifts = np.arange(8 - header.bit_depth, -1, -header.bit_depth, dtype=np.uint8)
    unpacked = (rows[:, :, None] >> shifts) & ((1 << header.bit_depth) - 1)
    return unpacked.reshape(header.height, stride * per_byte)[:, : header.width, None].astype(np.uint8)


def _image_data(path: Path) -> bytes:
    """The compressed pixels: all IDAT chunks, with their checksums verified."""
    found: list[bytes] = []
    data, position = path.read_bytes(), len(SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        checksum = data[position + 8 + length : position + 12 + length]
        if len(checksum) != 4 or zlib.crc32(kind + body) != struct.unpack(">I", checksum)[0]:
            break
        if kind == b"IEND":
            return b"".join(found)
        if kind == b"IDAT":
            found.append(body)
        position += 12 + length
    raise DataError(f"{path}: is cut off or damaged; download it again.")


def _unfilter(kind: int, line: Bytes, above: Bytes, path: Path) -> Bytes:
    """Undo one line's filter for pixels of at most a byte (PNG specification, section 9)."""
    if kind not in range(5):
        raise DataError(f"{path}: has an unknown filter {kind}; download it again.")
    if kind < 3:
        undone: list[Bytes] = [line, np.cumsum(line, dtype=np.uint8), line + above]
        return undone[kind]
    out, left, corner = np.empty_like(line), 0, 0
    for i, (value, up) in enumerate(zip(line.tolist(), above.tolist(), strict=True)):
        predicted = (left + up) // 2 if kind == 3 else _paeth(left, up, corner)
        left, corner = (value + predicted) & 255, up
        out[i] = left
    return out


def _paeth(left: int, up: int, corner: int) -> int:
    estimate = left + up - corner
    return min((left, up, corner), key=lambda value: abs(estimate - value))
