"""Label file formats: how to read ids from a file, which ids are valid, and how they map to train ids."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossmix.datasets._images import read_turned
from crossmix.datasets.classes import IGNORED, KNOWN_LABEL_IDS, KNOWN_SYNTHIA_IDS, train_ids
from crossmix.datasets.sample import DataError

Bytes = NDArray[np.uint8]
Key = int | tuple[int, int, int]
Unlisted = Literal["raise", "ignore"]


class LabelFormat(NamedTuple):
    """How a data set stores labels.

    Attributes:
        read: Reads a file as ids, (H, W) uint8; raises `DataError` for another kind of file or an unknown id.
        table: (256,) uint8, from ids to train ids; applied last, after resizing.
        name: Name of the ids, for messages.
        signature: Equal for two formats that read every file as the same train ids.
        num_classes: C if train ids are known to be 0..C-1 or `ignored`, else None.
        ignored: The train id of ignored pixels.
    """

    read: Callable[[Path], Tensor]
    table: Bytes
    name: str
    signature: str
    num_classes: int | None = None
    ignored: int = IGNORED


_TRAIN_IDS = (
    "looks like train ids (0..18 and 255) where {} expected; use the official {}, or read it with "
    "`SegmentationFolder(..., mapping=None)`"
)


def _read_label_ids(path: Path) -> Tensor:
    """Read a Cityscapes or GTA5 label file: one channel of label ids."""
    ids = _only_channel(path, read_turned(path))
    if ids.numpy().max(initial=0) < 35:  # most files have official ids only; counting them would take 3 ms
        return ids
    present = _present(ids)
    _refuse_unknown(path, present, KNOWN_LABEL_IDS, "Cityscapes label ids (0..34)", "the official label id files")
    if 255 in present and not any(18 < value < 255 for value in present):
        raise DataError(f"{path}: {_TRAIN_IDS.format('label ids are', 'label id files')}.")
    return ids


def _read_synthia_ids(path: Path) -> Tensor:
    """Read a SYNTHIA label file: 16-bit RGB with the class in the first channel, or one channel of the same ids.

    Programs that keep only the high byte of each value turn every class into 0; such files are recognised by content.
    """
    pixels = read_turned(path, deep=True)
    wide = pixels.dtype != torch.uint8
    if pixels.shape[0] not in {1, 3}:
        raise DataError(f"{path}: expected 1 or 3 channels, got {pixels.shape[0]}; use the files of GT/LABELS.")
    ids = pixels[0]
    if not wide and not ids.any():
        raise DataError(
            f"{path}: holds no class but 0 in 8 bits, like files saved from the high bytes of SYNTHIA's 16-bit labels; "
            "use the official GT/LABELS."
        )
    if int(ids.max()) > 255:
        raise DataError(
            f"{path}: holds the id {int(ids.max())}, but SYNTHIA's ids end at 22; is the instance channel first, or "
            "the byte order reversed? Use the official GT/LABELS."
        )
    present = _present(ids)
    if 255 in present:
        raise DataError(f"{path}: {_TRAIN_IDS.format('SYNTHIA ids are', 'GT/LABELS')}.")
    _refuse_unknown(path, present, KNOWN_SYNTHIA_IDS, "SYNTHIA ids (0..22)", "the official GT/LABELS")
    return ids.to(torch.uint8)


LABEL_IDS = LabelFormat(_read_label_ids, train_ids().numpy(), "label ids", "label ids")
SYNTHIA_IDS = LabelFormat(_read_synthia_ids, train_ids("synthia").numpy(), "SYNTHIA ids", "SYNTHIA ids")


class _Mapped:
    """Reader of label files by a user's mapping of ids or colours; without a mapping, files contain train ids."""

    def __init__(
        self, mapping: Mapping[Key, int] | None, unlisted: Unlisted, num_classes: int | None, ignored: int
    ) -> None:
        self.unlisted = unlisted
        self.ignored = ignored
        self.colors = mapping is not None and any(isinstance(key, tuple) for key in mapping)
        if mapping is None:
            pairs = [(i, i) for i in sorted({*range(256 if num_classes is None else num_classes), ignored})]
            self.what = "but ids end at 255; pass a mapping" if num_classes is None else _range(num_classes, ignored)
        else:
            pairs = sorted((_packed(key), value) for key, value in mapping.items())
            self.what = "which the mapping does not list; add them, or pass `unlisted='ignore'`"
        self.keys = np.array([key for key, _ in pairs], np.int64)
        self.values = np.array([value for _, value in pairs], np.uint8)

    def __call__(self, path: Path) -> Tensor:
        """Read train ids."""
        pixels = read_turned(path, deep=True)
        if self.colors:
            if pixels.shape[0] not in {3, 4} or pixels.dtype != torch.uint8:
                raise DataError(f"{path}: expected an RGB label map for a mapping of colours, got {_kind(pixels)}.")
            red, green, blue = pixels[:3].numpy().astype(np.int64)
            ids = (red << 16) + (green << 8) + blue
        else:
            ids = _only_channel(path, pixels).numpy()
        if ids.dtype == np.uint8:  # the common case: look up 256 entries instead of every pixel
            present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
            table = np.zeros(256, np.uint8)
            table[present] = self._look_up(path, present)
            return torch.from_numpy(table[ids])
        return torch.from_numpy(self._look_up(path, ids))

    def _look_up(self, path: Path, ids: NDArray[np.int64]) -> Bytes:
        place = np.searchsorted(self.keys, ids).clip(max=len(self.keys) - 1)
        listed = self.keys[place] == ids
        if self.unlisted == "raise" and not listed.all():
            unknown = [_unpacked(key) if self.colors else key for key in np.unique(ids[~listed])[:5].tolist()]
            raise DataError(f"{path}: holds {unknown}, {self.what}.")
        return np.where(listed, self.values[place], np.uint8(self.ignored))


def custom_format(
    mapping: Mapping[Key, int] | None, unlisted: Unlisted, num_classes: int | None = None, ignored: int = IGNORED
) -> LabelFormat:
    """Build the format for a mapping of ids or RGB colours to train ids; None keeps ids as they are.

    Without `num_classes`, the number of classes is taken from the mapping.
    """
    _check_mapping(mapping)
    if mapping is not None:
        used = max((value for value in mapping.values() if value != ignored), default=-1) + 1
        if num_classes is not None and used > num_classes:
            hint = "or pass more `num_classes`"
            raise ValueError(f"`mapping` has the train id {used - 1}, {_range(num_classes, ignored)}, {hint}.")
        num_classes = num_classes or used or None
        listed = f"{sorted((_packed(key), value) for key, value in mapping.items())}"
    else:
        listed = "as they are" if num_classes is None else f"0..{num_classes - 1}"
    signature = f"mapped ids, unlisted {unlisted}: {listed}" + (f", ignored {ignored}" if ignored != IGNORED else "")
    read = _Mapped(mapping, unlisted, num_classes, ignored)
    return LabelFormat(read, np.arange(256, dtype=np.uint8), "mapped ids", signature, num_classes, ignored)


def _check_mapping(mapping: Mapping[Key, int] | None) -> None:
    """Refuse anything but a mapping of ids or colours to train ids."""
    for key, value in (mapping or {}).items():
        numbers, highest = (key, 255) if isinstance(key, tuple) else ((key,), 65535)
        if not all(isinstance(number, int | np.integer) for number in (*numbers, value)):
            raise TypeError(f"`mapping` must go from ints or (R, G, B) to ints, got {key!r}: {value!r}.")
        if not 0 <= value <= 255:
            raise ValueError(f"`mapping` must give train ids in 0..255, got {value} for {key}.")
        if len(numbers) not in {1, 3} or not all(0 <= number <= highest for number in numbers):
            raise ValueError(f"`mapping` must have ids in 0..65535 or (R, G, B) in 0..255 as keys, got {key}.")
    if mapping is not None and len({isinstance(key, tuple) for key in mapping}) != 1:
        raise ValueError("`mapping` must not be empty, and have either ids or colours as keys; do not mix them.")


def _range(num_classes: int, ignored: int) -> str:
    """The valid ids, as part of an error message."""
    ids = f"0..{num_classes - 1}, and ignored pixels {ignored}"
    return f"but {num_classes} classes have the ids {ids}; renumber them, for instance with a mapping"


def _only_channel(path: Path, pixels: Tensor) -> Tensor:
    if pixels.shape[0] != 1:
        hint = "read colour-coded maps with `SegmentationFolder` and a mapping of colours"
        raise DataError(f"{path}: expected a label map with one channel of ids, got {_kind(pixels)}; {hint}.")
    return pixels[0]


def _kind(pixels: Tensor) -> str:
    return f"{pixels.shape[0]} channel{'s' * (pixels.shape[0] != 1)} of {8 if pixels.dtype == torch.uint8 else 16} bits"


def _present(ids: Tensor) -> set[int]:
    return set(np.flatnonzero(np.bincount(ids.numpy().ravel(), minlength=256)).tolist())


def _refuse_unknown(path: Path, present: set[int], known: frozenset[int], name: str, instead: str) -> None:
    unknown = sorted(present - known)
    if unknown:
        raise DataError(f"{path}: holds ids {unknown[:5]} that are not {name}; use {instead}.")


def _packed(key: Key) -> int:
    return (int(key[0]) << 16) + (int(key[1]) << 8) + int(key[2]) if isinstance(key, tuple) else int(key)


def _unpacked(key: int) -> tuple[int, int, int]:
    return key >> 16, key >> 8 & 255, key & 255
