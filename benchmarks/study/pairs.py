"""The two pairs of domains on which the methods are compared, and their hyperparameters.

The hyperparameters are the paper's, adapted to the small size as in the trainer's demo, and the same for both pairs. A
small network trained from random weights needs a higher learning rate and is less confident, so few pixels would reach
0.968, and a teacher that averages over a hundred steps lags behind in a short run. The pairs differ only in image size,
and therefore in the number of steps that fit the time budget.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crossmix.datasets import Sample, SegmentationFolder, StreetScenes
from crossmix.datasets.classes import CLASS_NAMES

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The settings shared by all methods on a pair."""

    name: str
    classes: tuple[str, ...]
    crop: tuple[int, int]  # height and width, pixels
    steps: int
    batch: int = 4  # source images, and as many target images
    lr: float = 0.002  # of the backbone; the head learns ten times as fast
    threshold: float = 0.5  # 0.968 in the paper's code
    decay: float = 0.9  # of the teacher; 0.99 in the paper's code


PAIRS = {
    "streetscenes": Pair("streetscenes", CLASS_NAMES, crop=(64, 128), steps=3000),
    "camvid": Pair("camvid", CAMVID_CLASSES, crop=(96, 128), steps=1000),
}


class Domains(NamedTuple):
    """The images of a pair, in memory. The labels of `target` are used to train the oracle, and for monitoring."""

    source: list[Sample]
    target: list[Sample]
    test: list[Sample]  # target domain, never used in training


@functools.cache
def load(name: str, camvid: str = "") -> Domains:
    """Read or render a pair, once per process."""
    if name == "camvid":
        return Domains(*(list_of(folder) for folder in camvid_folders(Path(camvid))))
    return Domains(
        list_of(StreetScenes(400, domain="source", seed=0)),
        list_of(StreetScenes(400, domain="target", seed=1)),
        list_of(StreetScenes(100, domain="target", seed=2)),
    )


def camvid_folders(root: Path) -> list[SegmentationFolder]:
    """Drive 0006R0 by day and the two halves of drive 0001TP at dusk, from the SegNet version of CamVid.

    `root` is that version's folder `CamVid`, with `train`, `trainannot`, `test` and `testannot`, or the layout of
    examples/camvid_day_to_dusk.py.
    """
    if (root / "trainannot").is_dir():
        patterns = [
            (root / part / f"{drive}_*.png", root / f"{part}annot" / f"{drive}_*.png")
            for part, drive in (("train", "0006R0"), ("train", "0001TP"), ("test", "0001TP"))
        ]
    else:
        patterns = [(root / part / "images", root / part / "labels") for part in ("day", "dusk-train", "dusk-test")]
    unlabelled = len(CAMVID_CLASSES)  # id 11
    mapping: dict[int | tuple[int, int, int], int] = {**{i: i for i in range(unlabelled)}, unlabelled: 255}
    return [SegmentationFolder(images, labels, mapping, size=(120, 160)) for images, labels in patterns]


def list_of(samples: StreetScenes | SegmentationFolder) -> list[Sample]:
    return [samples[i] for i in range(len(samples))]


def class_shares(samples: list[Sample], num_classes: int) -> Tensor:
    """The share of each class among the labelled pixels, (C,) float64."""
    labels = torch.cat([sample.label.flatten() for sample in samples if sample.label is not None]).long()
    counts = torch.bincount(labels[labels < num_classes], minlength=num_classes).double()
    return counts / counts.sum()
