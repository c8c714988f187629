"""The pictures of a report: mixed images and predictions."""

from collections.abc import Iterable, Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix import SelfTraining
from crossmix.datasets import Sample, write_png
from crossmix.datasets.classes import PALETTE
from crossmix.evaluation import resize_labels
from crossmix.visualize import colorize, gallery

__all__ = ["CLASS_COLORS", "in_one_size", "mixed_rows", "predicted_rows", "write_pictures"]

PICTURES = 4  # rows per kind
LONGEST = 1024  # pixels of a side of a predicted picture
MADE = (hsv_to_rgb(0.618 * i % 1, 0.5 + i % 3 / 4, 1 - i % 2 / 3) for i in range(255 - len(PALETTE)))
CLASS_COLORS = PALETTE + tuple((int(255 * red), int(255 * green), int(255 * blue)) for red, green, blue in MADE)
"""Colours by train id: those of Cityscapes, then more for data with more classes."""


@torch.no_grad()
def mixed_rows(
    training: SelfTraining,
    student: nn.Module,
    images: tuple[Tensor, Tensor, Tensor],
    draw: Any,  # noqa: ANN401
) -> list[list[Tensor]]:
    """Show source, target, mixed image and mixed label of a batch (Figure 4 of the paper), leaving all state as it is.

    `student` is the method's network, not wrapped; `images` are source images, source labels and target images; `draw`
    is a result of `training.sample`.
    """
    source_images, source_labels, target_images = images
    modes = {module: module.training for module in training.modules()}
    parts = {name: getattr(training, name) for name in ("mix", "augment", "align", "upsample")}
    shown = SelfTraining(student, training.teacher, **parts).eval()
    mixed = shown(source_images, source_labels, target_images, draw=draw).mixed
    for module, mode in modes.items():
        module.training = mode
    pictures, labels = (source_images, source_labels) if mixed is None else (mixed.images, mixed.labels)
    return [
        [source, target, picture, colorize(label, colors=CLASS_COLORS)]
        for source, target, picture, label in zip(source_images, target_images, pictures, labels, strict=True)
    ]


@torch.no_grad()
def predicted_rows(
    student: nn.Module,
    samples: Iterable[Sample],
    size: tuple[int, int] | None,
    device: str,
    *,
    align_corners: bool = True,
) -> list[list[Tensor]]:
    """Show images, predictions of a network and ground truth (Figure 6 of the paper).

    The network sees the images as it is evaluated: resized to `size`, or as they are. Large pictures are made smaller.
    """
    rows, mode = [], student.training
    student.eval()
    for image, label, _ in samples:
        seen = tf.interpolate(image[None], size=size or image.shape[1:], mode="bilinear", antialias=True)
        logits = student(seen.to(device).float() / 255)
        height, width = seen.shape[2:]
        factor = min(1, LONGEST / max(height, width))
        shape = max(1, round(factor * height)), max(1, round(factor * width))
        prediction = tf.interpolate(logits, size=shape, mode="bilinear", align_corners=align_corners)[0].argmax(0)
        truth = torch.full(shape, 255) if label is None else resize_labels(label, shape)
        rows.append([
            tf.interpolate(seen, size=shape, mode="bilinear", antialias=True)[0],
            colorize(prediction, colors=CLASS_COLORS),
            colorize(truth, colors=CLASS_COLORS),
        ])  # fmt: skip
    student.train(mode)
    return rows


def in_one_size(rows: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> list[list[Tensor]]:
    """Resize pictures (3, H, W) to one size, without new colours, for a grid."""
    return [[tf.interpolate(picture[None], size=size)[0] for picture in row] for row in rows]


def write_pictures(folder: Path, kinds: Mapping[str, Sequence[Sequence[Tensor]]]) -> None:
    """Write the first rows of each kind, one file per picture: KIND-ROW-COLUMN.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for kind, rows in kinds.items():
        for i, row in enumerate(rows[:PICTURES]):
            for j, picture in enumerate(row):
                write_png(folder / f"{kind}-{i}-{j}.png", gallery([[picture]], gap=0))
