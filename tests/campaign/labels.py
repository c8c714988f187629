"""Every id from 0 to 255, in files of 1 to 16 bits, by every reader: its train id, ignored, or refused by name."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from crossmix.datasets import GTA5, Cityscapes, DataError, SegmentationFolder, Synthia
from oracles import deep_png, picture, png_file, save

BESIDE: dict[str, tuple[int | None, ...]] = {"short": (None,), "ci": (None,), "nightly": (None, 0, 7, 20, 100, 255)}
"""Ids in the same file."""
STEP = {"short": 17, "ci": 1, "nightly": 1}
FORMS = ("grey", "palette", "1 bit", "2 bits", "4 bits", "16 bits", "16 bits RGB", "RGB")
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
              27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 10, 10: 11, 17: 12, 8: 13, 19: 15, 12: 17, 11: 18}
LAYOUTS = {
    "GTA5": ("images/1.png", "labels/1.png", GTA5),
    "Cityscapes": ("leftImg8bit/val/a/1_leftImg8bit.png", "gtFine/val/a/1_gtFine_labelIds.png",
                   lambda root: Cityscapes(root, "val")),
    "Synthia": ("RGB/1.png", "GT/LABELS/1.png", Synthia),
    "SegmentationFolder": ("images/1.png", "labels/1.png",
                           lambda root: SegmentationFolder(root / "images", root / "labels", num_classes=19)),
}  # fmt: skip
SIZE = (2, 8)


def write(path: Path, form: str, ids: np.ndarray) -> None:
    if form == "grey":
        save(path, ids)
    elif form == "palette":
        png_file(path, SIZE, 8, 3, b"".join(b"\0" + line.tobytes() for line in ids), palette=True)
    elif form == "RGB":
        save(path, np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], -1))
    elif form == "16 bits":
        deep_png(path, ids[..., None])
    elif form == "16 bits RGB":
        deep_png(path, np.stack([ids, np.full_like(ids, 9), np.zeros_like(ids)], -1))
    else:
        bits = int(form[0])
        shifts = np.arange(8 - bits, -1, -bits)
        packed = (ids.reshape(len(ids), -1, 8 // bits).astype(int) << shifts).sum(-1).astype(np.uint8)
        png_file(path, SIZE, bits, 0, b"".join(b"\0" + line.tobytes() for line in packed))


def expected(reader: str, form: str, ids: set[int]) -> dict[int, int] | None:
    """The train id of each id, by the official tables; None if the file is to be refused."""
    deep, colour = form.startswith("16"), form.endswith("RGB")
    if reader == "Synthia":
        alone = not deep and ids == {0}  # like files saved from the high bytes
        return None if max(ids) > 22 or alone else {value: SYNTHIA.get(value, 255) for value in ids}
    if colour:
        return None
    if reader == "SegmentationFolder":
        return {value: value for value in ids} if ids <= {*range(19), 255} else None
    if deep or not ids <= {*range(35), 255} or (255 in ids and not any(18 < value < 255 for value in ids)):
        return None
    return {value: CITYSCAPES.get(value, 255) for value in ids}


def problem(data: Any, path: Path, ids: np.ndarray, want: dict[int, int] | None) -> str:
    try:
        label = data[0].label
    except DataError as error:
        if want is not None:
            return f"refused: {error}".replace(str(path), path.name)
        return "" if str(path) in str(error) else "refused without the file's name"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    if want is None:
        return f"read as {sorted(set(label.flatten().tolist()))}, not refused"
    return "" if label.tolist() == [[want[value] for value in line] for line in ids.tolist()] else "another train id"


def run(profile: str) -> dict[str, Any]:
    """All ids, alone and beside others."""
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        for reader, (image, label, read) in LAYOUTS.items():
            folder = Path(root) / reader
            save(folder / image, picture(*SIZE))
            save(folder / label, np.zeros(SIZE, np.uint8))
            data = read(folder)
            for form in FORMS:
                highest = {"1 bit": 1, "2 bits": 3, "4 bits": 15}.get(form, 255)
                for value in range(0, highest + 1, STEP[profile]):
                    for other in BESIDE[profile]:
                        if other is not None and other > highest:
                            continue
                        ids = np.full(SIZE, value, np.uint8)
                        ids[0, ::2] = value if other is None else other
                        write(folder / label, form, ids)
                        want = expected(reader, form, set(ids.flatten().tolist()))
                        outcomes["refused by name" if want is None else "mapped or ignored"] += 1
                        found = problem(data, folder / label, ids, want)
                        if found:
                            wrong.setdefault(f"{reader}, {form}: {found}"[:200], f"id {value} beside {other}")
    return {"readers": len(LAYOUTS), "forms": len(FORMS), "files": outcomes.total(), **outcomes, "wrong": wrong}
