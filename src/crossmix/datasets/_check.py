"""Look at every file of a data set, and say what is wrong with it."""

from functools import partial
from pathlib import Path

from crossmix.datasets._files import read_image
from crossmix.datasets._labels import LABEL_IDS, LabelFormat
from crossmix.datasets._layouts import Part
from crossmix.datasets._parallel import each
from crossmix.datasets.classes import CLASSES, IGNORED
from crossmix.datasets.sample import DataError

__all__ = ["problems"]


def problems(part: Part, *, workers: int = 0) -> list[str]:
    """Decode every file of a part.

    Returns:
        A line for each file that is missing, damaged, of another size than its partner, or suspicious: every pixel
        ignored, or an image of a single colour.
    """
    found = []
    if part.images and part.labels:
        found += [f"{path}: has no label map" for key, path in sorted(part.images.items()) if key not in part.labels]
        found += [f"{path}: has no image" for key, path in sorted(part.labels.items()) if key not in part.images]
    elif part.labels:
        found += [f"{path}: has no image" for path in sorted(part.labels.values())]
    elif part.images:
        found.append(f"{part.title}: has {len(part.images)} images and no label maps")
    keys = sorted(part.images.keys() | part.labels.keys())
    pairs = [(part.images.get(key), part.labels.get(key)) for key in keys]
    for _, lines in each(partial(_look, labelled=part.labelled), pairs, part.title, workers=workers):
        found += lines
    return found


def _look(pair: tuple[Path | None, Path | None], labelled: LabelFormat) -> list[str]:
    """What is wrong with a pair."""
    (image_size, of_image), (label_size, of_label) = _look_at_image(pair[0]), _look_at_label(pair[1], labelled)
    if image_size is not None and label_size is not None and image_size != label_size:
        sides = " but its image ".join(f"{height} x {width}" for height, width in (label_size, image_size))
        of_label.append(f"{pair[1]}: is {sides}; readers need `size=` for it")
    return of_image + of_label


Size = tuple[int, ...]


def _look_at_image(path: Path | None) -> tuple[Size | None, list[str]]:
    """Its size, and what is wrong with it."""
    if path is None:
        return None, []
    try:
        image = read_image(path)
    except DataError as error:
        return None, [str(error)]
    one = bool((image == image[:, :1, :1]).all())
    return tuple(image.shape[1:]), [f"{path}: suspicious, every pixel has the same colour"] if one else []


def _look_at_label(path: Path | None, labelled: LabelFormat) -> tuple[Size | None, list[str]]:
    """Its size, and what is wrong with it."""
    if path is None:
        return None, []
    try:
        ids = labelled.read(path)
    except DataError as error:
        return None, [str(error)]
    found = []
    if (labelled.table[ids.numpy()] == IGNORED).all():
        found.append(f"{path}: suspicious, every pixel is ignored, the first has id {int(ids[0, 0])}")
    elif labelled.name == LABEL_IDS.name and int(ids.max()) < len(CLASSES):
        found.append(f"{path}: suspicious, no id above {len(CLASSES) - 1}, as in files of train ids")
    return tuple(ids.shape), found
