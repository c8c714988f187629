"""Look at every file of a data set, and say what is wrong with it."""

from collections import Counter
from functools import partial
from pathlib import Path

from crossmix.datasets._images import read_image
from crossmix.datasets._labels import LABEL_IDS, LabelFormat
from crossmix.datasets._layouts import Part
from crossmix.datasets._listing import OTHER_IMAGES
from crossmix.datasets._parallel import each
from crossmix.datasets.classes import CLASSES
from crossmix.datasets.sample import DataError

__all__ = ["others", "problems"]

Size = tuple[int, ...]


def others(part: Part) -> str:
    """How many files beside the images are no images at all, or nothing."""
    rest = [path for path in part.left_out if path.suffix.lower() not in OTHER_IMAGES]
    kinds = Counter(path.suffix.lower() or "no ending" for path in rest).most_common(5)
    return f"left out {len(rest)} files that are no images: {', '.join(f'{n} of {end}' for end, n in kinds)}" * bool(
        rest
    )


def problems(part: Part, *, crop: tuple[int, int] | None = None, workers: int = 0) -> list[str]:
    """Decode every file of a part.

    Returns:
        A line for each file that is missing, damaged, an image of a type that is not read, of another size than its
        partner, smaller than `crop` (height, width), or suspicious: every pixel ignored, or an image of a single
        colour.
    """
    found = [
        f"{path}: is left out, being neither PNG nor JPEG; convert it"
        for path in part.left_out
        if path.suffix.lower() in OTHER_IMAGES
    ]
    if part.images and part.labels:
        found += [f"{path}: has no label map" for key, path in sorted(part.images.items()) if key not in part.labels]
        found += [f"{path}: has no image" for key, path in sorted(part.labels.items()) if key not in part.images]
    elif part.labels:
        found += [f"{path}: has no image" for path in sorted(part.labels.values())]
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
    """What is wrong with a pair."""
    image_size, of_image = _look_at_image(pair[0], any_kind=any_kind)
    label_size, of_label = _look_at_label(pair[1], labelled)
    if image_size is not None and label_size is not None and image_size != label_size:
        sides = " but its image ".join(f"{height} x {width}" for height, width in (label_size, image_size))
        of_label.append(f"{pair[1]}: is {sides}; readers need `size=` for it")
    if crop is not None and image_size is not None and any(a < b for a, b in zip(image_size, crop, strict=True)):
        of_image.append(f"{pair[0]}: is {image_size[0]} x {image_size[1]}, smaller than the crop {crop[0]} x {crop[1]}")
    return of_image + of_label


def _look_at_image(path: Path | None, *, any_kind: bool) -> tuple[Size | None, list[str]]:
    """Its size, and what is wrong with it."""
    if path is None:
        return None, []
    try:
        image = read_image(path, any_kind=any_kind)
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
    if (labelled.table[ids.numpy()] == labelled.ignored).all():
        found.append(f"{path}: suspicious, every pixel is ignored, the first has id {int(ids[0, 0])}")
    elif labelled.name == LABEL_IDS.name and int(ids.max()) < len(CLASSES):
        found.append(f"{path}: suspicious, no id above {len(CLASSES) - 1}, as in files of train ids")
    return tuple(ids.shape), found
