"""Anybody's own images and label maps."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from crossmix._checks import check_choice
from crossmix.datasets._files import FolderDataset, check_size, listed, paired
from crossmix.datasets._labels import custom_format
from crossmix.datasets.sample import DataError

__all__ = ["SegmentationFolder", "found"]


class SegmentationFolder(FolderDataset):
    """Read PNG images and label maps from two folders, or by two patterns, in sorted order.

    With folders, files of the same path below them are a pair, at any depth. With patterns, such as
    `"data/*_img.png"` and `"data/*_labelIds.png"`, those where the `*` stands for the same text; `*` stays within a
    folder's name, `**` crosses folders.

    Args:
        images: Folder or pattern of RGB images; None reads label maps alone, and `image` is then empty, (3, 0, 0).
        labels: Folder or pattern of label maps; None reads images alone, and `label` is then None.
        mapping: From the ids in the files (8 or 16 bits), or from (R, G, B) colours, to train ids; 255 is ignored. None
            takes 8-bit ids as they are.
        unlisted: `"raise"`: an id that `mapping` does not list is an error that names the file. `"ignore"`: it becomes
            255.
        size: (height, width) that images (antialiased) and labels (nearest) are resized to; None keeps their own size.
        resampling: `"bilinear"` or `"bicubic"`, for images.
        names: A text file that lists the images to take, a name per line; what `*` stands for is the name.

    Raises:
        DataError: If nothing is found, an image has no label map, or `names` lists what is not there; on access, if a
            file is damaged or holds an id that `mapping` does not list.
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
        size: tuple[int, int] | None = None,
        resampling: Literal["bilinear", "bicubic"] = "bilinear",
        names: str | Path | None = None,
    ) -> None:
        check_choice("unlisted", unlisted, ("raise", "ignore"))
        check_choice("resampling", resampling, ("bilinear", "bicubic"))
        check_size(size)
        label_format = custom_format(mapping, unlisted)
        files = paired(
            f"images {images}, labels {labels}:",
            None if images is None else found(Path(images)),
            None if labels is None else found(Path(labels)),
            "expected PNG files of the same names in two folders, or two patterns with `*` for what they share",
        )
        super().__init__(listed(files, names), label_format, size, resampling)


def found(where: Path) -> dict[str, Path]:
    """PNG files by what tells them apart: their path below a folder, or what the stars of a pattern stand for."""
    text = where.as_posix()
    if "*" not in text:
        if not where.is_dir():
            raise DataError(f"{where}: no such folder; pass a folder of PNG files, or a pattern with `*`.")
        return {path.relative_to(where).with_suffix("").as_posix(): path for path in where.rglob("*.png")}
    base = Path(*where.parts[: next(i for i, part in enumerate(where.parts) if "*" in part)])
    parts = re.split(r"(\*\*/|\*)", where.relative_to(base).as_posix())
    stars = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)"}
    regex = re.compile("".join(stars.get(part) or re.escape(part) for part in parts))
    files = {}
    for path in sorted(base.glob(where.relative_to(base).as_posix())):
        match = regex.fullmatch(path.relative_to(base).as_posix())
        if match is not None and path.is_file():
            files["/".join(text.strip("/") for text in match.groups() if text)] = path
    return files
