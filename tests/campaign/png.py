"""Mutated PNG files, read as images and as label maps: what Pillow reads, pixel for pixel, or a refusal.

Two differences are counted, not wrong. crossmix refuses some files that Pillow reads, such as those with too few
pixels. And kornia_rs reads 8 and 16 bits if only the checksum of zlib is wrong, inside of a chunk whose own is right,
or if only something behind the pixels is damaged; the pixels must then be those of a file without that damage.
"""

import io
import random
import re
import struct
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from crossmix.datasets import DataError, read_image
from crossmix.datasets._png import read_png
from oracles import deep_png, png_file

TRIES = {"short": 12, "ci": 100, "nightly": 1000}
MUTANTS = 10
"""Of each file."""
START = 8  # of the first chunk
REASONS = {
    "got 16;": "has 16 bits",
    "bytes of pixels instead|not have enough data|unexpected end": "has too few pixels",
    "CRC error|cut off or damaged": "has a wrong checksum, or no end",
    "interlaced": "is interlaced",
    "more than the limit": "is too large",
    "while decompressing": "has a damaged compression behind the last pixel",
    "PNG does not know|unknown values|Unknown": "has a header that PNG does not know",
}
"""Why crossmix refuses files that Pillow reads."""


class Maker:
    """Small files of every kind; the numbers come from one generator."""

    def __init__(self, seed: int, path: Path) -> None:
        self.rng, self.path = random.Random(seed), path  # noqa: S311
        self.numbers = np.random.default_rng(seed)
        self.size = (self.rng.randint(1, 9), self.rng.randint(1, 17))

    def pixels(self, channels: int, highest: int = 255) -> np.ndarray:
        shape = self.size if channels == 1 else (*self.size, channels)
        return self.numbers.integers(0, highest + 1, shape).astype(np.uint8)

    def pillow(self, channels: int) -> None:
        Image.fromarray(self.pixels(channels)).save(self.path)

    def palette(self, bits: int) -> None:
        image = Image.fromarray(self.pixels(1, 2**bits - 1), mode="P")
        image.putpalette(self.numbers.integers(0, 256, 3 * 2**bits).astype(np.uint8).tobytes())
        image.save(self.path, bits=bits)

    def few_bits(self, bits: int) -> None:
        """Grey, from the specification, each line with any filter."""
        height, width = self.size
        lines = [bytes([self.rng.randrange(5)]) + self.rng.randbytes((width * bits + 7) // 8) for _ in range(height)]
        png_file(self.path, self.size, bits, 0, b"".join(lines))

    def deep(self, channels: int) -> None:
        deep_png(self.path, self.numbers.integers(0, 2**16, (*self.size, channels)))


KINDS: dict[str, Callable[[Maker], None]] = {
    "grey": lambda m: m.pillow(1),
    "RGB": lambda m: m.pillow(3),
    "RGBA": lambda m: m.pillow(4),
    **{f"palette of {bits} bits": lambda m, bits=bits: m.palette(bits) for bits in (1, 2, 4, 8)},  # type: ignore[misc]
    **{f"grey of {bits} bits": lambda m, bits=bits: m.few_bits(bits) for bits in (1, 2, 4)},  # type: ignore[misc]
    "grey of 16 bits": lambda m: m.deep(1),
    "RGB of 16 bits": lambda m: m.deep(3),
}


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Some bytes set, cut or added anywhere, or set within chunks whose checksums and compression are then right."""
    how = rng.choice(("set", "set", "cut", "removed", "added", "mended", "mended", "recompressed", "recompressed"))
    place = rng.randrange(len(data))
    if how == "cut":
        return how, data[:place]
    if how == "removed":
        return how, data[:place] + data[place + rng.randint(1, 4) :]
    if how == "added":
        return how, data[:place] + rng.randbytes(rng.randint(1, 4)) + data[place:]
    if how == "set":
        return how, some_set(data, rng)
    chunks = [list(chunk) for chunk in split(data)]
    if how == "mended":
        chunk = rng.choice([chunk for chunk in chunks if chunk[1]])
        chunk[1] = some_set(chunk[1], rng)
    else:
        chunk = next(chunk for chunk in chunks if chunk[0] == b"IDAT")
        lines = some_set(zlib.decompress(chunk[1]), rng)
        chunk[1] = zlib.compress(lines[: rng.choice((len(lines), len(lines), rng.randrange(len(lines))))])
    return how, data[:START] + b"".join(joined(*chunk) for chunk in chunks)


def some_set(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


def split(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a whole file: name and body."""
    found, place = [], START
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def joined(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def as_image(data: bytes) -> np.ndarray:
    """By Pillow: turned, in colour."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def as_ids(data: bytes) -> np.ndarray:
    """By Pillow: (H, W, C), the numbers in the file."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
        pixels = np.asarray(opened)
    bits, color = data[24:26]
    if color == 0 and bits in {2, 4}:
        pixels = pixels // (255 // (2**bits - 1))  # Pillow scales them
    return pixels.reshape(*pixels.shape[:2], -1)


def our_image(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def our_ids(path: Path) -> np.ndarray:
    pixels = read_png(path, deep=True).permute(1, 2, 0).numpy()
    return pixels >> 8 if pixels.dtype != np.uint8 and pixels.shape[2] > 1 else pixels  # Pillow keeps the high bytes


def compared(path: Path, read: Callable[[Path], np.ndarray], reference: Callable[[bytes], np.ndarray]) -> str:
    """What the two decoders make of a file."""
    try:
        theirs: np.ndarray | None = reference(path.read_bytes())
        why = ""
    except Exception as error:  # noqa: BLE001 - Pillow raises many types
        theirs, why = None, f"{type(error).__name__}: {error}"
    try:
        ours = read(path)
    except DataError as error:
        if str(path) not in str(error):
            return f"WRONG: an error without the file's name: {error}"
        return "both refuse" if theirs is None else f"only crossmix refuses what {reason(str(error))}"
    except Exception as error:  # noqa: BLE001
        return f"WRONG: {type(error).__name__}: {error}"
    if theirs is not None:
        return "equal pixels" if np.array_equal(ours, theirs) else "WRONG: other pixels"
    try:
        theirs = reference(repaired(path.read_bytes()))
    except Exception:  # noqa: BLE001
        return f"WRONG: only Pillow refuses: {why}"
    same = np.array_equal(ours, theirs)
    return "only Pillow refuses, pixels right" if same else f"WRONG: pixels of a file that Pillow refuses: {why}"


def reason(error: str) -> str:
    return next((what for pattern, what in REASONS.items() if re.search(pattern, error)), "is odd otherwise")


def repaired(data: bytes) -> bytes:
    """The file with the right checksum of zlib and a right end, if its chunks are right up to the last pixels."""
    chunks, place = [], START
    while not (chunks and chunks[-1][0] == b"IDAT" and data[place + 4 : place + 8] != b"IDAT"):
        (length,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        if joined(name, body) != data[place : place + 12 + length]:
            raise ValueError("a chunk is damaged")
        chunks.append((name, body))
        place += 12 + length
    packed = b"".join(body for name, body in chunks if name == b"IDAT")
    lines = zlib.decompressobj(wbits=-15).decompress(packed[2:])  # behind zlib's header, and without its checksum
    before = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    whole = [*before, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return data[:START] + b"".join(joined(*chunk) for chunk in whole)


def run(profile: str) -> dict[str, Any]:
    """Mutants of files of every kind, and each file as it was."""
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    files, seeds = 0, range(TRIES[profile])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about large images
        path = Path(folder) / "a.png"
        for seed in seeds:
            maker = Maker(seed, path)
            kind = list(KINDS)[seed % len(KINDS)]
            KINDS[kind](maker)
            whole = path.read_bytes()
            for i in range(MUTANTS + 1):
                how, data = mutated(whole, maker.rng) if i else ("whole", whole)
                path.write_bytes(data)
                files += 1
                for what, read, reference in (("image", our_image, as_image), ("ids", our_ids, as_ids)):
                    outcome = compared(path, read, reference)
                    outcomes[outcome.partition(":")[0]] += 1
                    if outcome.startswith("WRONG"):
                        wrong.setdefault(outcome, f"{what}, {kind}, {how}, seed {seed}, file {i}")
    outcomes.pop("WRONG", None)
    return {"files": len(seeds), "with their mutants": files, **outcomes, "wrong": wrong}
