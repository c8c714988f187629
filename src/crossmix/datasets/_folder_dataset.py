"""The base of all readers: list and pair files, and read a pair as a `Sample`."""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from crossmix._tensors import nearest
from crossmix.datasets._arguments import check_index
from crossmix.datasets._images import read_image
from crossmix.datasets._labels import LabelFormat
from crossmix.datasets._listing import Found, bare, described, is_folder, named_images
from crossmix.datasets.sample import DataError, Sample

Filter = Literal["bilinear", "bicubic"]


class Files(NamedTuple):
    """The files of one sample."""

    image: Path | None
    label: Path | None
    name: str


class FolderDataset(Dataset[Sample]):
    """Pairs of an image and a label map on disk, decoded on access. With `any_kind`, images need not be RGB.

    Attributes:
        files: The files of each sample.
        label_format: How label maps are read.
        size: (height, width) that samples are resized to, or None.
    """

    def __init__(
        self,
        files: list[Files],
        labels: LabelFormat,
        size: tuple[int, int] | None,
        resampling: Filter,
        *,
        any_kind: bool = False,
    ) -> None:
        self.files = files
        self.size = size
        self.label_format = labels
        self._resampling: Filter = resampling
        self._any_kind = any_kind

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its label map, resize both, and map ids to train ids.

        Without `size` both must have the same size. With it each is resized, as the released code does for the few GTA5
        pairs that differ.
        """
        image_path, label_path, name = self.files[check_index(index, len(self.files))]
        image = torch.empty(3, 0, 0, dtype=torch.uint8, device="cpu")
        if image_path is not None:
            image = read_image(image_path, any_kind=self._any_kind)
            image = image if self.size is None else _resize_image(image, self.size, self._resampling)
        ids = None if label_path is None else self.label_format.read(label_path)
        if self.size is not None:
            ids = None if ids is None else nearest(ids, self.size)
        elif image_path is not None and ids is not None and image.shape[-2:] != ids.shape:
            raise DataError(f"{label_path}: {differing(ids.shape, image.shape[-2:])}.")
        return Sample(image, None if ids is None else torch.from_numpy(self.label_format.table[ids.numpy()]), name)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything besides the files that the samples depend on, as a JSON-serialisable dict, for caches."""
        made_by = {"reader": type(self).__name__, "size": self.size, "resampling": self._resampling}
        return {**made_by, "labels": self.label_format.signature}


def differing(label: Sequence[int], image: Sequence[int]) -> str:
    """Describe a label map, (height, width), whose size differs from its image's, with advice."""
    advice = "pass `size=` to resize both to one size, or remove the pair"
    if tuple(label) == tuple(image)[::-1]:  # resizing would misalign them
        advice = "one of them is rotated; does the image have an EXIF orientation? Rotate the label map too"
    return f"is {label[0]} x {label[1]} but its image {image[0]} x {image[1]}; {advice}"


def find(
    folder: Path, *, recursive: bool = False, only: Callable[[str], bool] | None = None, suffix: str = ""
) -> Found:
    """Find the images in a folder, keyed by relative path without extension and `suffix`; none without a folder."""
    if not is_folder(folder):
        return Found({})
    found = named_images(folder, recursive=recursive, only=only)
    return found._replace(files=by_key((bare(name).removesuffix(suffix), path) for name, path in found.files.items()))


def label_maps(folder: Path) -> Found:
    """Find label maps as `find` does, but not the copies in train ids that DAFormer's converters write beside them."""
    return find(folder, only=lambda name: not bare(name).endswith("_labelTrainIds"))


def by_key(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Map keys to paths; refuse duplicate keys, ignoring case as many file systems do, and how accents are encoded."""
    files: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for name, path in pairs:
        key = _composed(name)
        if other := taken.get(key.casefold()):
            hint = "keep one or, if one is a label map, move it to another folder"
            raise DataError(f"{other} and {path}: are two files of one name; {hint}.")
        taken[key.casefold()] = files[key] = path
    return files


def _composed(name: str) -> str:
    """A name with each accented letter as one character (NFC), where macOS writes a letter and its accent (NFD)."""
    return unicodedata.normalize("NFC", name)


SIGNS = {"Cityscapes": ("leftImg8bit*", "gtFine*"), "SYNTHIA": ("RGB", "GT"), "GTA5": ("images", "labels")}
"""Folders by which a data set is recognised."""


def _looks_like(root: Path, expected: str) -> str:
    """Guess what a wrong folder is, or where the right one is, as part of an error message."""
    if not root.is_dir():
        return " (there is no such folder)"
    for name, patterns in SIGNS.items():
        if name != expected and any(path.is_dir() for pattern in patterns for path in root.glob(pattern)):
            return f" (it looks like {name})"
    signs = SIGNS[expected]
    parents = [{path.parent for path in root.glob(f"*/{sign}") if path.is_dir()} for sign in signs]
    below = [*sorted(set.intersection(*parents)), *sorted(set.union(*parents))]  # those with all signs come first
    if len(below) > 1 and below[0] not in set.intersection(*parents):
        whole = " and one ".join(sign.rstrip("*") for sign in signs)
        return f" (the zips are in folders of their own, such as {below[0]}; merge these into one {whole})"
    return f" (did you mean {below[0]}?)" if below else ""


def paired(
    where: str,
    images: Found | None,
    labels: Found | None,
    layout: str,
    *,
    names: str | Path | None = None,
    strict: bool = False,
    root: tuple[Path, str] | None = None,
) -> list[Files]:
    """Pair images and label maps by key, sorted by key. Either is None if it is not to be read.

    An image without a label map is an error; with `strict`, so is the reverse. `names` is a file that lists the samples
    to keep. `where`, `layout` and `root` (a folder and the data set expected there) are for error messages. A sample's
    name is the last component of its key, or the whole key if the last components are not unique.
    """
    if images is None and labels is None:
        raise ValueError("`images` and `labels` must not both be False; read at least one of them.")
    wanted = [found for found in (images, labels) if found is not None]
    keys = wanted[0].files.keys()
    if not keys:
        kind = "images" if images is not None else "label maps"
        other = f"{len(labels.files)} label maps but no images" if images and labels and labels.files else f"no {kind}"
        looks = "" if root is None else _looks_like(*root)
        raise DataError(f"{where} has {other}{looks}{described(wanted[0].left_out)}; {layout}.")
    if images is not None and labels is not None:
        alone = sorted(keys ^ labels.files.keys() if strict else keys - labels.files.keys())
        if alone:
            lacking, missing = (labels, "label map") if alone[0] in keys else (images, "image")
            both = f"{len(keys)} images and {len(labels.files)} label maps that do not pair up"
            one = f"{alone[0]} has no {missing}{described(lacking.left_out)}"
            raise DataError(f"{where} has {both}, {one}; {layout}.")
    stems = Counter(key.rpartition("/")[2] for key in keys)
    whole = max(stems.values()) > 1
    return [
        Files(
            None if images is None else images.files[key],
            None if labels is None else labels.files.get(key),
            key if whole else key.rpartition("/")[2],
        )
        for key in sorted(keys if names is None else listed(Path(names), wanted[0].files))
    ]


def listed(path: Path, files: Mapping[str, Path]) -> set[str]:
    """The keys named in a list, one per line.

    A line is a sample's key, or enough of its path to be unambiguous, with or without extension. Folders in front of
    the key, as in lists that start with the data set's name, are ignored, and so are empty lines and comments (#).
    """
    known = _Known(files)
    lines: dict[str, str] = {}
    wanted, absent = _lines(path), []
    for line in wanted:
        keys = known.meant(line) or known.meant(bare(line))  # a dot may be part of the name
        if len(keys) > 1:
            raise DataError(f"{path}: names {line}, which may be {keys[0]} or {keys[1]}; include the folder.")
        for key in keys:
            if bare(lines.setdefault(key, line)) != bare(line):
                raise DataError(f"{path}: names {lines[key]} and {line}, but there is only {files[key]}; list it once.")
        absent += [] if keys else [bare(line)]
    if absent or not wanted:
        missing = f"({len(absent)} of {len(wanted)} are missing)"
        what = f"names {absent[0]}, which is not there {missing}" if absent else "names nothing"
        raise DataError(f"{path}: {what}; pass the list that belongs to this folder.")
    return set(lines)


def _lines(path: Path) -> list[str]:
    """The names in a list file, in UTF-8, or in UTF-16 with a byte-order mark."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read as a list of names ({error})"
        raise DataError(f"{path}: {reason}; pass a text file, a name per line.") from error
    lines = [line.strip() for line in re.split(r"[\r\n]+", _composed(text))]
    names = [PurePosixPath(line.replace("\\", "/")).as_posix() for line in lines if line and line[0] != "#"]
    for name in names:
        if ".." in name.split("/"):
            raise DataError(f"{path}: names {name}, which is outside of the folder; list files inside it.")
    return list(dict.fromkeys(names))


class _Known:
    """The samples by everything that a line of a list may call them, so that a line is looked up, not compared."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.wholes: dict[str, list[str]] = {}  # keys by the whole path
        self.ends: dict[str, list[str]] = {}  # and by every end of the key or the path, without extension
        for key, file in files.items():
            whole = bare(_composed(file.absolute().as_posix()))
            self.wholes.setdefault(whole, []).append(key)
            for end in dict.fromkeys([*_ends(key), *_ends(whole)]):
                self.ends.setdefault(end, []).append(key)

    def meant(self, line: str) -> list[str]:
        """The keys that match a line best."""
        if line in self.files:
            return [line]
        if line.startswith("/") or line[1:3] == ":/":
            return sorted(self.wholes.get(line) or self.resolved.get(line, []))
        if line in self.ends:
            return sorted(self.ends[line])
        return [end for end in _ends(line) if end in self.files][:1]  # the longest

    @cached_property
    def resolved(self) -> dict[str, list[str]]:
        """Keys by the whole path without links."""
        found: dict[str, list[str]] = {}
        for key, file in self.files.items():
            found.setdefault(bare(_composed(file.resolve().as_posix())), []).append(key)
        return found


def _ends(path: str) -> Iterator[str]:
    """What is left of a path without its first folders, the longest first."""
    rest = path
    while rest:
        _, _, rest = rest.partition("/")
        if rest:
            yield rest


def _resize_image(image: Tensor, size: tuple[int, int], resampling: Filter) -> Tensor:
    """Resize with antialiasing; equal to Pillow within one grey level."""
    return functional.interpolate(image[None], size=size, mode=resampling, antialias=True, align_corners=False)[0]
