"""List image files. Readers, checks and predictions share this definition of an image file."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from crossmix.datasets import _png
from crossmix.datasets.sample import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_IMAGES = {f".{kind}" for kind in ("avif", "bmp", "exr", "gif", "heic", "heif", "jp2", "pgm", "ppm", "tga")}
OTHER_IMAGES |= {".tif", ".tiff", ".webp"}
"""Extensions of unsupported image types, in lower case."""

NOT_DATA = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
"""Visible files and folders created by operating systems, in lower case. Hidden names start with a dot."""

NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""Errors of paths that no file has: EINVAL is that of Windows for names that it does not permit, such as patterns."""

ENDING = re.compile(r"\.(?!\d+$)[^./]{1,5}$")  # `.png` and `.jpeg`, but not `.0001` in `frame.0001`


class ImageFiles(NamedTuple):
    """The images of a folder.

    Attributes:
        files: PNG and JPEG files, sorted.
        left_out: Visible files that are neither, sorted.
    """

    files: tuple[Path, ...]
    left_out: tuple[Path, ...]


class Found(NamedTuple):
    """Image files by relative path, or by the key that pairs them, and the other files in the same folders."""

    files: dict[str, Path]
    left_out: tuple[Path, ...] = ()


def image_files(folder: str | Path, *, recursive: bool = True, only: Callable[[str], bool] | None = None) -> ImageFiles:
    """List the PNG and JPEG files of a folder.

    A file counts as an image by its extension, `.png`, `.jpg` or `.jpeg` in any case, or else by its first bytes. So
    listing opens no image, and an invalid one is not skipped silently: reading it raises an error that names it.
    Symbolic links are followed, as by `find -L`, except links back to a parent folder. Hidden files (such as
    `._name.png` of macOS) and system files (such as `Thumbs.db`) are ignored.

    Args:
        folder: The folder.
        recursive: Whether to include subfolders.
        only: Takes a path relative to `folder`, with `/` as separator, and returns whether to consider the file at all.

    Returns:
        The images, and the files that were left out.

    Raises:
        DataError: If there is no such folder, or it or one of its subfolders cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.JPG", "a.png", "._a.png", "c.tif"):
        ...     (folder / name).touch()
        >>> found = image_files(folder)
        >>> [path.name for path in found.files], [path.name for path in found.left_out]
        (['a.png', 'b.JPG'], ['c.tif'])
    """
    images, left_out = named_images(Path(folder), recursive=recursive, only=only)
    return ImageFiles(tuple(images.values()), left_out)


def named_images(folder: Path, *, recursive: bool, only: Callable[[str], bool] | None) -> Found:
    """List images as `image_files` does, keyed by relative path."""
    if not is_folder(folder):
        raise DataError(f"{folder}: no such folder; check the path.")
    wanted = ((name, one) for name, one in _entries(folder, recursive=recursive) if only is None or only(name))
    ordered = [(name, _is_image(one)) for name, one in sorted(wanted, key=lambda pair: pair[0].split("/"))]
    images = {name: folder / name for name, is_image in ordered if is_image}
    return Found(images, tuple(folder / name for name, is_image in ordered if not is_image))


def is_folder(path: Path) -> bool:
    """Whether this is a folder; a `DataError` where that cannot be told: Python's own answer depends on its version."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except ValueError:  # a NUL byte
        return False
    except OSError as error:
        if error.errno in NO_FILE:
            return False
        raise _unlisted(path, error) from error


def subfolders(where: Path) -> list[Path]:
    """The folders in a folder, sorted; a `DataError` where it cannot be listed."""
    return sorted(where / entry.name for entry in _listed(where) if _is_folder(entry))


def bare(name: str) -> str:
    """A file name or path without its extension."""
    return ENDING.sub("", name)


def described(left_out: Sequence[Path]) -> str:
    """Describe the files left out, as part of an error message; empty if there are none."""
    if not left_out:
        return ""
    return f" (left out, being neither PNG nor JPEG: {endings(left_out)}, such as {left_out[0]})"


def endings(paths: Iterable[Path]) -> str:
    """Count files by extension, the most common first."""
    counts = Counter(path.suffix.lower() or "without an ending" for path in paths)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))


def _entries(folder: Path, *, recursive: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The visible files in a folder and below, with their relative paths."""
    waiting: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(folder, "", (_identity(folder),))]
    while waiting:
        where, prefix, above = waiting.pop()
        visible = [one for one in _listed(where) if one.name[0] != "." and one.name.lower() not in NOT_DATA]
        for entry in visible:
            if not _is_folder(entry):
                yield prefix + entry.name, entry
            elif recursive and (this := _identity(Path(entry))) not in above:  # else a link leads back
                waiting.append((Path(entry), f"{prefix}{entry.name}/", (*above, this)))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unlisted(folder, error) from error


def _unlisted(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions.")


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _unlisted(folder, error) from error
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Decide by extension, or else by the first bytes. A broken link counts, so that reading it raises an error."""
    by_ending = entry.name.lower().endswith(ENDINGS)
    try:
        if not entry.is_file() and Path(entry).exists():  # a pipe, a device
            return False
        if by_ending:
            return True
        with Path(entry).open("rb") as file:
            return file.read(8).startswith((_png.SIGNATURE, _png.JPEG))
    except OSError:
        return by_ending
