"""What a run of the trainer shows: tables beside the paper's rows, and pictures."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix import SelfTraining
from crossmix.datasets import Sample, write_png
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.evaluation import resize_labels
from crossmix.visualize import colorize, gallery
from evaluate import percent, plain
from paper import paper_row

__all__ = ["TITLES", "first", "mixed_rows", "predicted_rows", "spread", "table", "write_pictures"]

TITLES = {"miou": "mIoU", "miou_16": "mIoU of 16", "miou_13": "mIoU of 13"}
PICTURES = 4  # rows of a kind on a page
Results = dict[str, list[dict[str, Any]]]


def table(results: Results, *, source: str, evaluation: str, beside_paper: bool) -> str:
    """IoU of each method in percent, mean and deviation over runs, with the paper's rows where they compare.

    Args:
        results: What metrics.json holds, of each run of each method.
        source: `"gta5"`, or `"synthia"`, whose mean is over 16 classes and over 13.
        evaluation: The label size that counts.
        beside_paper: Whether to add the paper's rows.
    """
    means = ("miou_16", "miou_13") if source == "synthia" else ("miou",)
    columns = {method: [run["last"]["student"][evaluation] for run in runs] for method, runs in results.items()}
    paper = {method: paper_row(source, method) or {"per_class": {}} for method in results if beside_paper}
    lines = [_row("class", [*columns, *(f"{method} in the paper" for method in paper)])]
    lines.append("|---" + "|---:" * (len(columns) + len(paper)) + "|")
    for name in CLASS_NAMES:
        ours = [spread(run["per_class"][name] for run in runs) for runs in columns.values()]
        lines.append(_row(name, [*ours, *(plain(row["per_class"].get(name)) for row in paper.values())]))
    for key in means:
        ours = [spread(run[key] for run in runs) for runs in columns.values()]
        lines.append(_row(TITLES[key], [*ours, *(plain(row.get(key)) for row in paper.values())]))
    best = [spread(run["best"]["student"][evaluation][means[0]] for run in runs) for runs in results.values()]
    lines.append(_row(f"{TITLES[means[0]]}, best step", [*best, *("-" for _ in paper)]))
    return "\n".join(lines) + "\n"


@torch.no_grad()
def mixed_rows(
    training: SelfTraining,
    student: nn.Module,
    images: tuple[Tensor, Tensor, Tensor],
    draw: Any,  # noqa: ANN401
) -> list[list[Tensor]]:
    """Source, target, mixed image and mixed label of a batch (Figure 4 of the paper), without moving any state.

    Args:
        training: The method.
        student: Its network, without a wrapper.
        images: Source images, source labels, target images.
        draw: What `training.sample` returned.
    """
    source_images, source_labels, target_images = images
    modes = {module: module.training for module in training.modules()}
    shown = SelfTraining(
        student,
        training.teacher,
        mix=training.mix,
        augment=training.augment,
        align=training.align,
        upsample=training.upsample,
    ).eval()
    mixed = shown(source_images, source_labels, target_images, draw=draw).mixed
    for module, mode in modes.items():
        module.training = mode
    pictures, labels = (source_images, source_labels) if mixed is None else (mixed.images, mixed.labels)
    return [
        [source, target, picture, colorize(label)]
        for source, target, picture, label in zip(source_images, target_images, pictures, labels, strict=True)
    ]


@torch.no_grad()
def predicted_rows(
    student: nn.Module, samples: Iterable[Sample], shape: tuple[int, int], device: str
) -> list[list[Tensor]]:
    """Image, prediction and ground truth (Figure 6 of the paper), all of one shape.

    Args:
        student: The network, without a wrapper.
        samples: Labelled images.
        shape: Height and width that images are resized to.
        device: Where the network is.
    """
    rows = []
    mode = student.training
    student.eval()
    for image, label, _ in samples:
        small = tf.interpolate(image[None], size=shape, mode="bilinear", antialias=True)
        logits = student(small.to(device).float() / 255)
        prediction = tf.interpolate(logits, size=shape, mode="bilinear", align_corners=True)[0].argmax(0)
        truth = torch.full(shape, 255) if label is None else resize_labels(label, shape)
        rows.append([small[0], colorize(prediction), colorize(truth)])
    student.train(mode)
    return rows


def first(samples: Any, count: int) -> Iterable[Sample]:  # noqa: ANN401 - any reader
    """The first few samples of a reader."""
    return (samples[i] for i in islice(range(len(samples)), count))


def write_pictures(folder: Path, kinds: Mapping[str, Sequence[Sequence[Tensor]]]) -> None:
    """The first rows of each kind, a file for every picture: KIND-ROW-COLUMN.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for kind, rows in kinds.items():
        for i, row in enumerate(rows[:PICTURES]):
            for j, picture in enumerate(row):
                write_png(folder / f"{kind}-{i}-{j}.png", gallery([[picture]], gap=0))


def _row(title: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join([title, *cells]) + " |"


def spread(values: Iterable[float | None]) -> str:
    """A fraction in percent; of several runs mean and standard deviation."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return percent(present[0] if present else None)
    return f"{100 * statistics.mean(present):.2f} +- {100 * statistics.stdev(present):.2f}"
