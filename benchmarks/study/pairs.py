"""The pairs of domains on which the methods are compared, and their hyperparameters.

`streets-camvid` and `day-dusk` start from ImageNet weights, as the paper does, with the threshold and the decay of the
released code. Their network is trained with AdamW. Learning rate, steps and size are those of earlier trials of
source-only training, DACS and the oracle on one seed, and the same for all methods. `streets-camvid-360x480` is the
first pair on images of full size and with four times the steps, which takes a GPU.

`streetscenes` and `camvid` train a small network from random weights. Its hyperparameters are the paper's, adapted to
the small size as in the trainer's demo, and the same for both pairs. Such a network needs a higher learning rate and is
less confident, so few pixels would reach 0.968, and a teacher that averages over a hundred steps lags behind in a short
run. These two differ only in image size, and therefore in the number of steps that fit the time budget.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crossmix import recipes
from crossmix.datasets import Sample, SegmentationFolder, StreetScenes
from crossmix.datasets.classes import CLASS_NAMES

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip

SCENES = 1000  # rendered ones in streets-camvid
# What the classes of StreetScenes are called in CamVid, whose cars include vans, trucks and buses, whose trees include
# hedges and grass, and whose bicyclists include motorcyclists. A class without an entry would be ignored.
CAMVID_NAMES = {
    "road": "road",
    "sidewalk": "pavement",
    "building": "building",
    "wall": "building",
    "fence": "fence",
    "pole": "pole",
    "traffic light": "sign",
    "traffic sign": "sign",
    "vegetation": "tree",
    "terrain": "tree",
    "sky": "sky",
    "person": "pedestrian",
    "rider": "bicyclist",
    "car": "car",
    "truck": "car",
    "bus": "car",
    "train": "car",
    "motorcycle": "bicyclist",
    "bicycle": "bicyclist",
}


@dataclass(frozen=True)
class Pair:
    """The settings shared by all methods on a pair."""

    name: str
    classes: tuple[str, ...]
    crop: tuple[int, int]  # height and width, pixels
    steps: int
    batch: int = 4  # source images, and as many target images
    network: Literal["deeplab-v2-tiny", "efficientnet-lite0"] = "deeplab-v2-tiny"  # the second one is pretrained
    lr: float = 0.002  # of the backbone; the head learns ten times as fast
    threshold: float = 0.5  # 0.968 in the paper's code
    decay: float = 0.9  # of the teacher; 0.99 in the paper's code

    @property
    def pretrained(self) -> bool:
        return self.network == "efficientnet-lite0"


def pretrained(name: str, steps: int, size: tuple[int, int] = (160, 213)) -> Pair:
    """A pair with CamVid's classes that starts from ImageNet weights, on whole images."""
    return Pair(
        name,
        CAMVID_CLASSES,
        crop=size,
        steps=steps,
        network="efficientnet-lite0",
        lr=1e-4,
        threshold=recipes.RELEASED.threshold,
        decay=recipes.RELEASED.decay,
    )


PAIRS = {
    "streets-camvid": pretrained("streets-camvid", steps=2400),
    "streets-camvid-360x480": pretrained("streets-camvid-360x480", steps=10_000, size=(360, 480)),
    "day-dusk": pretrained("day-dusk", steps=800),
    "streetscenes": Pair("streetscenes", CLASS_NAMES, crop=(64, 128), steps=3000),
    "camvid": Pair("camvid", CAMVID_CLASSES, crop=(96, 128), steps=1000),
}


class Domains(NamedTuple):
    """The images of a pair, in memory. The labels of `target` are used to train the oracle, and for monitoring."""

    source: list[Sample]
    target: list[Sample]
    test: list[Sample]  # target domain, never used in training
    by_day: Sequence[Sample] = ()  # a second set of such images, scored on its own


@functools.cache
def load(name: str, camvid: str = "") -> Domains:
    """Read or render a pair, once per process."""
    if name in {"streets-camvid", "streets-camvid-360x480"}:
        return streets_camvid(Path(camvid), PAIRS[name].crop)
    if name == "day-dusk":
        drive, day, dusk, test = (read(Path(camvid), kind, PAIRS[name].crop) for kind in CAMVID)
        return Domains(drive + day, dusk, test)
    if name == "camvid":
        return Domains(*(read(Path(camvid), kind, (120, 160)) for kind in ("day", "dusk-train", "dusk-test")))
    return Domains(
        list_of(StreetScenes(400, domain="source", seed=0)),
        list_of(StreetScenes(400, domain="target", seed=1)),
        list_of(StreetScenes(100, domain="target", seed=2)),
    )


def streets_camvid(root: Path, size: tuple[int, int]) -> Domains:
    """From richly rendered scenes to photographs by day, scored on a drive at dusk and on a stretch of road by day.

    That stretch is the first third of drive 0016E5. Most of the other two thirds was taken at 15 images per second.
    """
    source = in_camvid_classes(StreetScenes(SCENES, style="rich", size=size, seed=0))
    drive, day, *dusk = (read(root, kind, size) for kind in CAMVID)
    third = len(day) // 3
    target = drive + day[third:]
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))  # the first ones are monitored
    return Domains(source, [target[i] for i in order.tolist()], dusk[0] + dusk[1], day[:third])


def in_camvid_classes(scenes: StreetScenes) -> list[Sample]:
    table = torch.full((256,), 255, dtype=torch.uint8)
    for i, name in enumerate(CLASS_NAMES):
        if name in CAMVID_NAMES:
            table[i] = CAMVID_CLASSES.index(CAMVID_NAMES[name])
    return [scene._replace(label=table[scene.label.long()]) for scene in list_of(scenes) if scene.label is not None]


# Parts of the SegNet version of CamVid: a drive, and the folders in which its images are.
CAMVID = {
    "day": ("0006R0", ("train",)),
    "day-0016E5": ("0016E5", ("train", "val")),
    "dusk-train": ("0001TP", ("train",)),
    "dusk-test": ("0001TP", ("test",)),
}


def read(root: Path, kind: str, size: tuple[int, int]) -> list[Sample]:
    """Read a part of the SegNet version of CamVid, in order of time.

    `root` is that version's folder `CamVid`, with `train`, `trainannot` and so on, or has a folder for each part, with
    `images` and `labels`, as for examples/camvid_day_to_dusk.py.
    """
    drive, folders = CAMVID[kind]
    patterns = [(root / folder / f"{drive}_*.png", root / f"{folder}annot" / f"{drive}_*.png") for folder in folders]
    if not (root / "trainannot").is_dir():
        patterns = [(root / kind / "images", root / kind / "labels")]
    unlabelled = len(CAMVID_CLASSES)  # id 11
    mapping: dict[int | tuple[int, int, int], int] = {**{i: i for i in range(unlabelled)}, unlabelled: 255}
    samples = [
        sample
        for images, labels in patterns
        for sample in list_of(SegmentationFolder(images, labels, mapping, size=size))
    ]
    return sorted(samples, key=lambda sample: sample.name)


def list_of(samples: StreetScenes | SegmentationFolder) -> list[Sample]:
    return [samples[i] for i in range(len(samples))]


def class_shares(samples: list[Sample], num_classes: int) -> Tensor:
    """The share of each class among the labelled pixels, (C,) float64."""
    labels = torch.cat([sample.label.flatten() for sample in samples if sample.label is not None]).long()
    counts = torch.bincount(labels[labels < num_classes], minlength=num_classes).double()
    return counts / counts.sum()
