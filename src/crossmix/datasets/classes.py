"""The classes of Cityscapes, GTA5 and SYNTHIA in one table, and the tables derived from it.

A train id is the row of a class in the table. Ids without a row (ego vehicle, rectification border, licence plate, ...)
are ignored: train id 255.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crossmix._checks import check_choice

__all__ = ["CLASSES", "CLASSES_13", "CLASSES_16", "CLASS_NAMES", "IGNORED", "PALETTE", "label_ids", "train_ids"]


class _Class(NamedTuple):
    name: str
    color: tuple[int, int, int]
    label_id: int  # in Cityscapes and GTA5
    synthia_id: int


CLASSES = (
    _Class("road", (128, 64, 128), 7, 3),
    _Class("sidewalk", (244, 35, 232), 8, 4),
    _Class("building", (70, 70, 70), 11, 2),
    _Class("wall", (102, 102, 156), 12, 21),
    _Class("fence", (190, 153, 153), 13, 5),
    _Class("pole", (153, 153, 153), 17, 7),
    _Class("traffic light", (250, 170, 30), 19, 15),
    _Class("traffic sign", (220, 220, 0), 20, 9),
    _Class("vegetation", (107, 142, 35), 21, 6),
    _Class("terrain", (152, 251, 152), 22, 16),
    _Class("sky", (70, 130, 180), 23, 1),
    _Class("person", (220, 20, 60), 24, 10),
    _Class("rider", (255, 0, 0), 25, 17),
    _Class("car", (0, 0, 142), 26, 8),
    _Class("truck", (0, 0, 70), 27, 18),
    _Class("bus", (0, 60, 100), 28, 19),
    _Class("train", (0, 80, 100), 31, 20),
    _Class("motorcycle", (0, 0, 230), 32, 12),
    _Class("bicycle", (119, 11, 32), 33, 11),
)
"""Name, RGB colour, id in Cityscapes and GTA5 label files, and id in SYNTHIA of each train id from 0 to 18."""

IGNORED = 255
"""The train id of ignored pixels."""

CLASS_NAMES = tuple(row.name for row in CLASSES)
"""Names by train id."""

PALETTE = tuple(row.color for row in CLASSES)
"""RGB colours by train id."""

CLASSES_16 = tuple(i for i, name in enumerate(CLASS_NAMES) if name not in {"terrain", "truck", "train"})
"""The train ids that SYNTHIA labels; its 16-class mean is taken over these."""

CLASSES_13 = tuple(i for i in CLASSES_16 if CLASS_NAMES[i] not in {"wall", "fence", "pole"})
"""The train ids of SYNTHIA's 13-class mean."""

KNOWN_LABEL_IDS = frozenset(range(35)) | {255}
"""Valid ids in Cityscapes and GTA5 label files: the official ones, with -1 (licence plate) saved as 255."""


KNOWN_SYNTHIA_IDS = frozenset(range(23))
"""Valid ids in SYNTHIA label files: void, 21 classes, lane marking."""


def train_ids(ids: Literal["cityscapes", "synthia"] = "cityscapes") -> Tensor:
    """Return the table from a data set's label ids to train ids.

    SYNTHIA's description also lists terrain, truck and train, but SYNTHIA-RAND-CITYSCAPES contains none of them, and
    the published numbers are means over the 16 others; so their ids are ignored.

    Args:
        ids: `"cityscapes"`, whose ids GTA5 shares, or `"synthia"`.

    Returns:
        (256,) uint8 on the CPU, to be indexed with a label map.

    Example:
        >>> train_ids()[torch.tensor([7, 8, 34])]
        tensor([  0,   1, 255], dtype=torch.uint8)
        >>> train_ids("synthia")[torch.tensor([3, 4, 22])]
        tensor([  0,   1, 255], dtype=torch.uint8)
    """
    check_choice("ids", ids, ("cityscapes", "synthia"))
    table = torch.full((256,), IGNORED, dtype=torch.uint8, device="cpu")
    for train_id, row in enumerate(CLASSES):
        if ids == "cityscapes":
            table[row.label_id] = train_id
        elif train_id in CLASSES_16:
            table[row.synthia_id] = train_id
    return table


def label_ids() -> Tensor:
    """Return the table from train ids to label ids of Cityscapes and GTA5; ignored pixels become 0, "unlabeled".

    Returns:
        (256,) uint8 on the CPU, to be indexed with a label map.

    Example:
        >>> label_ids()[torch.tensor([0, 18, 255])]
        tensor([ 7, 33,  0], dtype=torch.uint8)
    """
    table = torch.zeros(256, dtype=torch.uint8, device="cpu")
    for train_id, row in enumerate(CLASSES):
        table[train_id] = row.label_id
    return table
