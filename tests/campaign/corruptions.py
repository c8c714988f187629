"""Broken files in a data set, under both policies: named, or left out and counted, never a wrong pixel."""

import io
import logging
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossmix.datasets import GTA5, DataError
from crossmix.engine import KeyedCrops
from oracles import deep_png, flipped, save

TREES = {"short": 30, "ci": 100, "nightly": 1000}
"""Images of the tree of which a tenth is broken."""
SMALL = 5
SIDE = 16
IDS = (7, 8, 11, 12, 13)  # and their train ids, which are 0 to 4


def encoded(array: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, quality=100)
    return file.getvalue()


def larger(path: Path) -> None:
    with Image.open(path) as opened:
        opened.resize((SIDE + 8, SIDE)).save(path)


def jpeg(path: Path) -> None:
    with Image.open(path) as opened:
        path.write_bytes(encoded(np.asarray(opened), "jpeg"))


def palette(path: Path) -> None:
    image = Image.fromarray(np.asarray(Image.open(path).convert("L")) % 16, mode="P")
    image.putpalette(bytes(range(48)))
    image.save(path, bits=4)


def folder(path: Path) -> None:
    """As a file that cannot be opened: who tests as root may read every other one."""
    path.unlink()
    path.mkdir()


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


KINDS: dict[str, Callable[[Path], object]] = {
    "empty": rewritten(lambda data: b""),
    "junk": rewritten(lambda data: random.Random(len(data)).randbytes(len(data))),  # noqa: S311
    "cut behind the header": rewritten(lambda data: data[:40]),
    "cut in half": rewritten(lambda data: data[: len(data) // 2]),
    "cut before the end": rewritten(lambda data: data[:-8]),
    "wrong checksum": rewritten(flipped),
    "JPEG inside": jpeg,
    "another size": larger,
    "16 bits": lambda path: deep_png(path, np.zeros((SIDE, SIDE, 3), int)),
    "palette of 4 bits": palette,
    "bomb": rewritten(lambda data: data[:16] + struct.pack(">II", 60_000, 60_000) + data[24:]),
    "missing": Path.unlink,
    "unreadable": folder,
}
FINE = {("images", "JPEG inside"), ("labels", "palette of 4 bits")}
"""What is as good as a plain PNG."""


def colour(i: int) -> tuple[int, int, int]:
    return 50 * (i % len(IDS)) + 20, i // len(IDS) % 256, 160


def tree(root: Path, count: int) -> GTA5:
    """Images and label maps of one value each, by which they are known."""
    for i in range(count):
        save(root / "images" / f"{i:04d}.png", np.full((SIDE, SIDE, 3), colour(i), np.uint8))
        save(root / "labels" / f"{i:04d}.png", np.full((SIDE, SIDE), IDS[i % len(IDS)], np.uint8))
    return GTA5(root)


def source(crop: tuple[Tensor, Tensor], count: int) -> int | None:
    """The sample that a crop is of, if every pixel is of it."""
    image, label = crop
    colours = torch.tensor([colour(i) for i in range(count)])
    far = (image.flatten(1).T - colours[:, None]).abs().amax((1, 2))
    index = int(far.argmin())
    return index if far[index] <= 4 and bool((label == index % len(IDS)).all()) else None  # JPEG rounds


def named(data: GTA5, *, bad: bool) -> str:
    """What is wrong with reading, and with cropping, when the third of a few files may be bad, if anything."""
    try:
        whole = data[2]
    except DataError as error:
        if not bad:
            return f"refused: {error}".replace(str(data.root), "")
        if "0002.png" not in str(error):
            return f"not named: {error}"
    else:
        if bad:
            return f"read, image {tuple(whole.image.shape)}"
    strict = KeyedCrops(data, (8, 8), seed=0, stream=0)
    try:
        crops = [strict[draw] for draw in range(2 * SMALL)]
    except DataError:
        return "" if bad else "refused in a crop"
    if bad or any(source(crop, SMALL) != strict.index(draw) for draw, crop in enumerate(crops)):
        return "a crop of it"
    return ""


def left_out(data: GTA5, broken: set[int]) -> str:
    """What is wrong with two epochs in which broken samples are left out, if anything."""
    crops = KeyedCrops(data, (8, 8), seed=0, stream=0, skip=max(1, len(broken)))
    for draw in range(2 * len(data)):
        found = source(crops[draw], len(data))
        if found is None or found in broken:
            return f"a wrong crop of sample {found}"
    return "" if set(crops.skipped) == broken else f"left out {sorted(crops.skipped)}, broken {sorted(broken)}"


def run(profile: str) -> dict[str, Any]:
    """Every kind in an image and in a label map, and many in one tree."""
    logging.getLogger("crossmix").setLevel(logging.ERROR)
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}

    def noted(what: str, call: Callable[[], str]) -> None:
        outcomes["cases"] += 1
        try:
            found = call()
        except Exception as error:  # noqa: BLE001
            found = f"{type(error).__name__}: {error}"
        if found:
            wrong[what] = found[:300]

    count = TREES[profile]
    with tempfile.TemporaryDirectory() as root:
        for part in ("images", "labels"):
            for kind, damage in KINDS.items():
                few, bad = tree(Path(root) / f"{part}-{kind}", SMALL), (part, kind) not in FINE
                damage(few.root / part / "0002.png")
                noted(f"{kind}, {part}, raise", partial(named, few, bad=bad))
                noted(f"{kind}, {part}, skip", partial(left_out, few, {2} if bad else set()))
        data = tree(Path(root) / "many", count)
        broken = set(random.Random(0).sample(range(count), count // 10))  # noqa: S311
        for number, index in enumerate(sorted(broken)):
            cases = [(part, kind) for part in ("images", "labels") for kind in KINDS if (part, kind) not in FINE]
            part, kind = cases[number % len(cases)]
            KINDS[kind](Path(root) / "many" / part / f"{index:04d}.png")
        noted("many", partial(left_out, data, broken))
    return {"kinds": len(KINDS), **outcomes, "broken of many": f"{len(broken)} of {count}", "wrong": wrong}
