"""What a folder is: which data set, in which parts, and which of its files belong together."""

from pathlib import Path
from typing import NamedTuple

from crossmix.datasets import cityscapes, synthia
from crossmix.datasets._files import pngs
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


def parts(root: Path) -> list[Part]:
    """Recognise a folder by the names in it.

    Raises:
        DataError: If it is none of the layouts that the readers know.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; pass the one that holds the data set.")
    names = {path.name for path in root.iterdir() if path.is_dir()}
    if any(name.startswith((cityscapes.IMAGES, cityscapes.FINE, cityscapes.COARSE)) for name in names):
        return _cityscapes(root)
    if "RGB" in names or "GT" in names:
        folder = next((name for name in synthia.LABEL_FOLDERS if (root / name).is_dir()), synthia.LABEL_FOLDERS[0])
        return [Part("SYNTHIA", pngs(root / "RGB"), pngs(root / folder), SYNTHIA_IDS, 9400)]
    if names & {"images", "labels"}:
        others = sorted(name for name in names - {"images", "labels"} if pngs(root / name))
        return [
            Part("GTA5", pngs(root / "images"), pngs(root / "labels"), LABEL_IDS, 24_966),
            *(Part(f"{name} (read by no reader)", {}, pngs(root / name), LABEL_IDS) for name in others),
        ]
    raise DataError(
        f"{root}: is not laid out as GTA5 (images, labels), SYNTHIA (RGB, GT/LABELS) or Cityscapes (leftImg8bit, "
        "gtFine); pass the folder that holds these, or --images and --labels for data of your own."
    )


def _cityscapes(root: Path) -> list[Part]:
    """Every split, with fine labels where there are any and coarse ones otherwise."""
    counts = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19_998}
    found = []
    for split in cityscapes.splits(root):
        images = cityscapes.find(root, split, cityscapes.IMAGES, f"_{cityscapes.IMAGES}.png")
        for kind in (cityscapes.FINE, cityscapes.COARSE):
            labels = cityscapes.find(root, split, kind, f"_{kind}_labelIds.png")
            if labels or kind == cityscapes.labels_of(split):
                found.append(Part(f"Cityscapes {split}, {kind}", images, labels, LABEL_IDS, counts.get(split)))
    return found
