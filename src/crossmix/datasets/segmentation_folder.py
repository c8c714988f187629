"""A reader for folders of your own images and label maps."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from crossmix._checks import check_choice
from crossmix.datasets._arguments import check_count, check_size
from crossmix.datasets._folder_dataset import FolderDataset, by_key, find, paired
from crossmix.datasets._labels import custom_format
from crossmix.datasets._listing import Found, bare, is_folder, named_images, subfolders
from crossmix.datasets.sample import DataError, Sample

__all__ = ["SegmentationFolder", "found"]

IMAGES, LABELS = "images", "labels"
PAIRS = [(IMAGES, LABELS), (IMAGES, "masks"), ("image", "label"), ("imgs", "masks")]
PAIRS += [("JPEGImages", "SegmentationClass"), ("RGB", "GT"), ("leftImg8bit", "gtFine")]
"""Common names of adjacent folders of images and of label maps."""

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
LAYOUT = (
    "expected PNG or JPEG images and PNG label maps with the same names in two folders, a folder with both as `images` "
    "and `labels`, or two patterns with `*` for the common part"
)


class SegmentationFolder(FolderDataset):
    """Read PNG or JPEG images and PNG label maps from two folders or by two patterns, in sorted order.

    With folders, files with the same relative path form a pair, at any depth. With patterns, such as `"data/*_img.jpg"`
    and `"data/*_labelIds.png"`, files form a pair if `*` stands for the same text; `*` matches within one folder name,
    `**` across folders, and extensions match in any case. `image_files` defines which files are images.

    A sample is named by its file's stem, or by its path if stems are not unique. Without label maps, every pixel of the
    label is `ignore_index`, so that samples of one size collate in a plain `DataLoader`.

    Args:
        images: Folder or pattern of images (grey ones become RGB); or, without `labels`, a folder that contains
            `images` and `labels`. None reads only label maps, and `image` is empty, (3, 0, 0).
        labels: Folder or pattern of label maps; None reads only images.
        mapping: From the ids in the files (8 or 16 bits) or (R, G, B) colours to train ids or `ignore_index`, for
            example by `read_classes`. None keeps 8-bit ids as they are.
        unlisted: `"raise"`: an id missing from `mapping` is an error that names the file. `"ignore"`: it becomes
            `ignore_index`.
        num_classes: C, by default that of `mapping`. Other ids than 0..C-1 and `ignore_index` are errors that name the
            file; with neither, all ids are accepted.
        ignore_index: The train id of ignored pixels.
        size: (height, width) that images (antialiased) and labels (nearest) are resized to; None keeps their own size.
        resampling: `"bilinear"` or `"bicubic"`, for images.
        names: A text file that lists the images to use, one per line, with or without extension, and with enough of the
            path to be unambiguous; for patterns, the text that `*` stands for.
        transform: Called with each `Sample`, in the loader's workers; its result is the item.

    Attributes:
        labelled: Whether there are label maps.
        num_classes: C if known, else None.
        ignore_index: The train id of ignored pixels.
        transform: The transform, or None.

    Raises:
        DataError: If nothing is found, an image has no label map, `mapping` or `num_classes` is given without label
            maps, two images have the same name, or `names` lists missing files; on access, if a file is damaged or
            contains an id that is not a class.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> import tempfile, torch
        >>> from crossmix.datasets import write_png
        >>> root = Path(tempfile.mkdtemp())
        >>> write_png(root / "1_img.png", torch.zeros(3, 4, 6, dtype=torch.uint8))
        >>> write_png(root / "1_ids.png", torch.full((4, 6), 7, dtype=torch.uint8))
        >>> data = SegmentationFolder(root / "*_img.png", root / "*_ids.png", {7: 0, 0: 255})
        >>> data[0].name, data[0].label.unique()
        ('1', tensor([0], dtype=torch.uint8))
    """

    def __init__(
        self,
        images: str | Path | None,
        labels: str | Path | None = None,
        mapping: Mapping[int | tuple[int, int, int], int] | None = None,
        *,
        unlisted: Literal["raise", "ignore"] = "raise",
        num_classes: int | None = None,
        ignore_index: int = 255,
        size: tuple[int, int] | None = None,
        resampling: Literal["bilinear", "bicubic"] = "bilinear",
        names: str | Path | None = None,
        transform: Callable[[Sample], Sample] | None = None,
    ) -> None:
        check_choice("unlisted", unlisted, ("raise", "ignore"))
        check_choice("resampling", resampling, ("bilinear", "bicubic"))
        size = check_size(size)
        for name, value in (("num_classes", num_classes), ("ignore_index", ignore_index)):
            if value is not None and check_count(name, value, least=int(name == "num_classes")) > 255:
                raise ValueError(f"`{name}` must be at most 255, got {value}; label maps are uint8.")
        if transform is not None and not callable(transform):
            raise TypeError(f"`transform` must be callable, got {type(transform).__name__}; it takes a Sample.")
        label_format = custom_format(mapping, unlisted, num_classes, ignore_index)
        of_images, of_labels = found(images, labels)
        if of_labels is None and (mapping is not None or num_classes is not None):
            given = "num_classes" if mapping is None else "mapping"
            why = f"`labels` is not given, and the folder does not contain `{IMAGES}` and `{LABELS}`"
            raise DataError(f"{images}: has no label maps for `{given}`: {why}; pass `labels`, or leave out `{given}`.")
        files = paired(f"images {images}, labels {labels}:", of_images, of_labels, LAYOUT, names=names)
        super().__init__(files, label_format, size, resampling, any_kind=True)
        self.labelled: bool = of_labels is not None
        self.num_classes: int | None = label_format.num_classes
        self.ignore_index = ignore_index
        self.transform = transform

    def __getitem__(self, index: int) -> Sample:
        """Read a sample, fill in the label if there is none, and transform it."""
        sample = super().__getitem__(index)
        if sample.label is None:
            sample = sample._replace(label=torch.full_like(sample.image[0], self.ignore_index))
        return sample if self.transform is None else self.transform(sample)


def found(images: str | Path | None, labels: str | Path | None) -> tuple[Found | None, Found | None]:
    """The files of two folders or patterns, or of one folder that contains `images` and `labels`."""
    if images is None or labels is not None:
        if images is not None and labels is not None and Path(images).absolute() == Path(labels).absolute():
            raise DataError(f"{images}: is given for both images and labels; {LAYOUT}.")
        of_images, of_labels = (None if where is None else _looked_up(Path(where)) for where in (images, labels))
        return of_images, of_labels
    root = Path(images)
    if not (is_folder(root / IMAGES) and is_folder(root / LABELS)):
        alone = _looked_up(root)
        if "*" not in root.as_posix():
            _refuse_root_above(root, alone)
        return alone, None
    splits = [path.name for path in subfolders(root / IMAGES) if path.name in SPLITS]
    if len(splits) > 1:
        one = f"{root / IMAGES / splits[0]} and {root / LABELS / splits[0]}"
        raise DataError(f"{root / IMAGES}: holds the splits {', '.join(splits)}; pass one of them, {one}.")
    return _looked_up(root / IMAGES), _looked_up(root / LABELS)


def _refuse_root_above(root: Path, images: Found) -> None:
    """Refuse a folder that also contains label maps at some depth: they would be read as images."""
    folders = {folder for path in images.files.values() for folder in path.relative_to(root).parents}
    for folder in sorted(folders):
        for name, other in PAIRS:
            beside = folder.with_name(other) if folder.name == name else None
            if beside in folders:
                both = name == IMAGES and other == LABELS
                instead = f"{root / folder.parent}" if both else f"{root / folder} and {root / beside}"
                raise DataError(f"{root}: holds {folder} and {beside}, images and label maps; did you mean {instead}?")


def _looked_up(where: Path) -> Found:
    """Image files by key: their path relative to a folder, or the text matched by the stars of a pattern."""
    if "*" not in where.as_posix():
        if not is_folder(where):
            raise DataError(f"{where}: no such folder; pass a folder of image files, or a pattern with `*`.")
        return find(where, recursive=True)
    base = Path(*where.parts[: next(i for i, part in enumerate(where.parts) if "*" in part)])
    pattern = where.relative_to(base).as_posix()
    regex = _regex(pattern)
    if not is_folder(base):
        return Found({})
    named = named_images(base, recursive="/" in pattern, only=lambda path: regex.fullmatch(path) is not None)
    return named._replace(files=by_key((_stars(regex, name), path) for name, path in named.files.items()))


def _regex(pattern: str) -> re.Pattern[str]:
    """Translate a pattern to a regular expression with a group per star. Extensions match in any case, `.*` any."""
    stars = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)"}
    stem = bare(pattern)
    ending = r"\.[^./]+" if pattern[len(stem) :] == ".*" else re.escape(pattern[len(stem) :])
    body = "".join(stars.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*)", stem))
    return re.compile(f"{body}(?i:{ending})")


def _stars(regex: re.Pattern[str], path: str) -> str:
    match = regex.fullmatch(path)
    return "/".join(text.strip("/") for text in match.groups() if text) if match else ""
