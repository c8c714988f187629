"""Counting a confusion matrix: whole maps at once, compared with a loop over pixels as in the released evaluation.

- `ConfusionMatrix`: this library, a 1024 x 2048 prediction against its label.
- `masked bincount`: the usual few lines of NumPy.
- `pixel loop`: our reimplementation with one Python step per pixel, on a 64 x 128 cut, scaled by the number of pixels.
"""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.speed.common import interleave, show
from crossmix.metrics import ConfusionMatrix

CLASSES = 19
HEIGHT, WIDTH = 1024, 2048
SMALL = 64, 128


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, dict[str, object]]:  # noqa: ARG001 - quick enough
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (1, HEIGHT // 32, WIDTH // 32), generator=generator)
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2).to(torch.uint8)
    labels[:, -100:] = 255
    wrong = torch.rand(labels.shape, generator=generator) < 0.1
    predictions = torch.where(wrong, 0, labels.long().clamp(max=CLASSES - 1))
    labels, predictions = labels.to(device), predictions.to(device)
    matrix = ConfusionMatrix(CLASSES).to(device)
    small = labels[0, : SMALL[0], : SMALL[1]].cpu().numpy(), predictions[0, : SMALL[0], : SMALL[1]].cpu().numpy()
    candidates: dict[str, Callable[[], object]] = {
        "ConfusionMatrix": lambda: matrix.update(predictions, labels),
        "masked bincount": lambda: masked_bincount(predictions[0].cpu().numpy(), labels[0].cpu().numpy()),
        "pixel loop, 64 x 128": lambda: pixel_loop(*small),
    }
    rows = interleave(candidates, rounds=rounds, device=device)
    scale = HEIGHT * WIDTH / (SMALL[0] * SMALL[1])
    cut = rows.pop("pixel loop, 64 x 128")
    rows["pixel loop, scaled"] = {key: scale * value for key, value in cut.items()}
    show("one 1024 x 2048 map", rows, "ConfusionMatrix")
    return {"rows": dict(rows)}


def masked_bincount(predictions: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", labels: object) -> object:
    """The vectorised form used in many code bases."""
    truth = np.asarray(labels)
    valid = truth < CLASSES
    index = CLASSES * truth[valid].astype(np.int64) + predictions[valid]
    return np.bincount(index, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def pixel_loop(labels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", predictions: object) -> object:
    counts = np.zeros((CLASSES, CLASSES))
    for truth, predicted in zip(labels.flatten(), np.asarray(predictions).flatten(), strict=True):
        if truth < CLASSES:
            counts[truth, predicted] += 1
    return counts
