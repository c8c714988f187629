"""What a folder is: which data set, in which parts, and which of its files belong together."""

from pathlib import Path
from typing import NamedTuple

from crossmix.datasets import cityscapes, synthia
from crossmix.datasets._files import Found, find
from crossmix.datasets._labels import LABEL_IDS, SYNTHIA_IDS, LabelFormat
from crossmix.datasets.sample import DataError

__all__ = ["Part", "parts"]


class Part(NamedTuple):
    """Files that are read together, by what pairs them."""

    title: str
    images: dict[str, Path]
    labels: dict[str, Path]
    labelled: LabelFormat
    expected: int | None = None
    """How many images the whole data set has."""
    left_out: tuple[Path, ...] = ()
    """Files beside them that are no images."""
    any_kind: bool = False
    """Whether images need not be RGB."""


def part(title: str, images: Found, labels: Found, labelled: LabelFormat, expected: int | None = None) -> Part:
    """A part of what was found."""
    return Part(title, images.files, labels.files, labelled, expected, (*images.left_out, *labels.left_out))


def parts(root: Path) -> list[Part]:
    """Recognise a folder by the names in it.

    Raises:
        DataError: If it is none of the layouts that the readers know.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass the one that holds the data set.")
    if found := _recognised(root):
        return found
    below = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and _recognised(path))
    mean = f"did you mean {below[0]}? Pass" if below else "pass"
    raise DataError(
        f"{root}: is not laid out as GTA5 (images, labels), SYNTHIA (RGB, GT/LABELS) or Cityscapes (leftImg8bit, "
        f"gtFine); {mean} the folder that holds these, or --classes, or --images and --labels for data of your own."
    )


def _recognised(root: Path) -> list[Part]:
    names = {path.name for path in root.iterdir() if path.is_dir()}
    if any(name.startswith((cityscapes.IMAGES, cityscapes.FINE, cityscapes.COARSE)) for name in names):
        return _cityscapes(root)
    if "RGB" in names or "GT" in names:
        folder = next((name for name in synthia.LABEL_FOLDERS if (root / name).is_dir()), synthia.LABEL_FOLDERS[0])
        return [part("SYNTHIA", find(root / "RGB"), find(root / folder), SYNTHIA_IDS, 9400)]
    if names & {"images", "labels"}:
        others = {name: find(root / name) for name in sorted(names - {"images", "labels"}) if name[0] != "."}
        return [
            part("GTA5", find(root / "images"), find(root / "labels"), LABEL_IDS, 24_966),
            *(
                part(f"{name} (read by no reader)", Found({}), found, LABEL_IDS)
                for name, found in others.items()
                if found.files
            ),
        ]
    return []


def _cityscapes(root: Path) -> list[Part]:
    """Every split, with fine labels where there are any and coarse ones otherwise."""
    counts = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19_998}
    found = []
    for split in cityscapes.splits(root):
        images = cityscapes.of_split(root, split, cityscapes.IMAGES, f"_{cityscapes.IMAGES}")
        for kind in (cityscapes.FINE, cityscapes.COARSE):
            labels = cityscapes.of_split(root, split, kind, f"_{kind}_labelIds")
            if labels.files or kind == cityscapes.labels_of(split):
                found.append(part(f"Cityscapes {split}, {kind}", images, labels, LABEL_IDS, counts.get(split)))
    return found
