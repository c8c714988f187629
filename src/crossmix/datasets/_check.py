"""Validate a folder: identify the data set, pair its files, and list their problems."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from crossmix.datasets import cityscapes, synthia
from crossmix.datasets._folder_dataset import differing, find, label_maps
from crossmix.datasets._images import read_image
from crossmix.datasets._labels import LABEL_IDS, SYNTHIA_IDS, LabelFormat
from crossmix.datasets._listing import OTHER_IMAGES, Found, endings, is_folder, subfolders
from crossmix.datasets._parallel import each
from crossmix.datasets.classes import CLASSES
from crossmix.datasets.sample import DataError


class Part(NamedTuple):
    """A part of a data set: images and label maps by the key that pairs them."""

    title: str
    images: dict[str, Path]
    labels: dict[str, Path]
    labelled: LabelFormat
    expected: int | None = None  # number of images in the complete data set
    left_out: tuple[Path, ...] = ()  # other files in the same folders
    any_kind: bool = False  # images need not be RGB


def part(title: str, images: Found, labels: Found, labelled: LabelFormat, expected: int | None = None) -> Part:
    """Build a part from the files found."""
    return Part(title, images.files, labels.files, labelled, expected, (*images.left_out, *labels.left_out))


def parts(root: Path) -> list[Part]:
    """Identify a data set by the names of its folders.

    Raises:
        DataError: If it has none of the layouts that the readers support.
    """
    if not is_folder(root):
        raise DataError(f"{root}: no such folder; pass the one that holds the data set.")
    if found := _recognised(root):
        return found
    below = [path for path in subfolders(root) if path.name[0] != "." and _recognised(path)]
    mean = f"did you mean {below[0]}? Pass" if below else "pass"
    raise DataError(
        f"{root}: is not laid out as GTA5 (images, labels), SYNTHIA (RGB, GT/LABELS) or Cityscapes (leftImg8bit, "
        f"gtFine); {mean} the folder that holds these, or --classes, or --images and --labels for your own data."
    )


def _recognised(root: Path) -> list[Part]:
    names = {path.name for path in subfolders(root)}
    if any(name.startswith((cityscapes.IMAGES, cityscapes.FINE, cityscapes.COARSE)) for name in names):
        return _cityscapes(root)
    if "RGB" in names or "GT" in names:
        return [part("SYNTHIA", find(root / "RGB"), label_maps(synthia.labels_in(root)), SYNTHIA_IDS, 9400)]
    if names & {"images", "labels"}:
        others = {name: find(root / name) for name in sorted(names - {"images", "labels"}) if name[0] != "."}
        unread = {f"{name} (read by no reader)": found for name, found in others.items() if found.files}
        whole = part("GTA5", find(root / "images"), label_maps(root / "labels"), LABEL_IDS, 24_966)
        return [whole, *(part(title, Found({}), found, LABEL_IDS) for title, found in unread.items())]
    return []


def _cityscapes(root: Path) -> list[Part]:
    """Every split, with fine and coarse labels, whichever exist or are expected."""
    counts = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19_998}
    found = []
    for split in cityscapes.splits(root):
        images = cityscapes.of_split(root, split, cityscapes.IMAGES, f"_{cityscapes.IMAGES}")
        for kind in (cityscapes.FINE, cityscapes.COARSE):
            labels = cityscapes.of_split(root, split, kind, f"_{kind}_labelIds")
            if labels.files or kind == cityscapes.labels_of(split):
                found.append(part(f"Cityscapes {split}, {kind}", images, labels, LABEL_IDS, counts.get(split)))
    return found


def others(part: Part) -> str:
    """Describe the files that are not images of any type; empty if there are none."""
    return endings(path for path in part.left_out if path.suffix.lower() not in OTHER_IMAGES)


def problems(part: Part, *, crop: tuple[int, int] | None = None, workers: int = 0) -> list[str]:
    """Decode every file of a part.

    Returns:
        A line for each file that is missing, damaged, of an unsupported image type, of another size than its partner,
        smaller than `crop` (height, width), or suspicious: every pixel ignored, or an image of a single colour.
    """
    found = [
        f"{path}: is left out, being neither PNG nor JPEG; convert it"
        for path in part.left_out
        if path.suffix.lower() in OTHER_IMAGES
    ]
    if part.labels:
        found += [f"{path}: has no label map" for key, path in sorted(part.images.items()) if key not in part.labels]
        found += [f"{path}: has no image" for key, path in sorted(part.labels.items()) if key not in part.images]
    elif part.images and not part.any_kind:
        found.append(f"{part.title}: has {len(part.images)} images and no label maps")
    keys = sorted(part.images.keys() | part.labels.keys())
    pairs = [(part.images.get(key), part.labels.get(key)) for key in keys]
    look = partial(_look, labelled=part.labelled, any_kind=part.any_kind, crop=crop)
    for _, lines in each(look, pairs, part.title, workers=workers):
        found += lines
    return found


def _look(
    pair: tuple[Path | None, Path | None], labelled: LabelFormat, *, any_kind: bool, crop: tuple[int, int] | None
) -> list[str]:
    """The problems of a pair."""
    found: list[str] = []
    image, label = pair
    image_size = _size(image, partial(_of_image, any_kind=any_kind), found)
    if crop is not None and image_size is not None and any(a < b for a, b in zip(image_size, crop, strict=True)):
        found.append(f"{image}: is {image_size[0]} x {image_size[1]}, smaller than the crop {crop[0]} x {crop[1]}")
    label_size = _size(label, partial(_of_label, labelled=labelled), found)
    if image_size is not None and label_size is not None and image_size != label_size:
        found.append(f"{label}: {differing(label_size, image_size)}")
    return found


def _size(path: Path | None, read: Callable[[Path], tuple[Tensor, str]], found: list[str]) -> tuple[int, ...] | None:
    """The height and width of an image or a label map, None if it cannot be read; its problems are added."""
    if path is None:
        return None
    try:
        pixels, suspicion = read(path)
    except DataError as error:
        found.append(str(error))
        return None
    if suspicion:
        found.append(f"{path}: suspicious, {suspicion}")
    return tuple(pixels.shape[-2:])


def _of_image(path: Path, *, any_kind: bool) -> tuple[Tensor, str]:
    """An image, and what is suspicious about it."""
    image = read_image(path, any_kind=any_kind)
    return image, "every pixel has the same colour" if bool((image == image[:, :1, :1]).all()) else ""


def _of_label(path: Path, labelled: LabelFormat) -> tuple[Tensor, str]:
    """The ids of a label map, and what is suspicious about them."""
    ids = labelled.read(path)
    if (labelled.table[ids.numpy()] == labelled.ignored).all():
        return ids, f"every pixel is ignored, the first has id {int(ids[0, 0])}"
    if labelled.name == LABEL_IDS.name and int(ids.max()) < len(CLASSES):
        return ids, f"no id above {len(CLASSES) - 1}, as in train ids, which --classes takes"
    return ids, ""
