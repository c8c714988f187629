"""Confusion matrix over a whole data set, and the intersection over union (IoU) computed from it."""

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from crossmix._checks import (
    check_ignore_index,
    check_labels,
    check_num_classes,
    check_same_device,
    check_same_shape,
    check_values,
)
from crossmix._distributed import Counts

__all__ = ["ConfusionMatrix", "IoU"]


class IoU(NamedTuple):
    """Intersection over union, as fractions.

    Attributes:
        per_class: (C,) float64 on the CPU; NaN for a class absent from both labels and predictions, and for an ignored
            one.
        mean: Mean over classes without the NaN ones; NaN if none is left.
        pixel_accuracy: Share of labelled pixels predicted correctly; NaN if there are none.
    """

    per_class: Tensor
    mean: float
    pixel_accuracy: float


class ConfusionMatrix(Counts):
    """Accumulate a confusion matrix over a data set.

    IoU_c = TP_c / (TP_c + FP_c + FN_c), from the counts of all images together, not a mean over images.

    On a GPU, `update` does not sync; invalid predictions are then reported by `compute`.

    Args:
        num_classes: The number of classes C.
        ignore_index: The id of ignored pixels in labels. If it is one of the classes, that class has no score and is
            left out of the mean; predicting it at a labelled pixel still counts as an error.

    State:
        `counts`: (C, C) int64 buffer, rows labels, columns predictions; changed by `update` and `reset`. `invalid`:
            int64 buffer, the predictions on a GPU that were not class ids; not in the state_dict.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If `num_classes` is not positive.

    Example:
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.update(torch.tensor([[[0, 1, 1, 1]]]), torch.tensor([[[0, 0, 1, 255]]]))
        >>> matrix.compute()
        IoU(per_class=tensor([0.5000, 0.5000], dtype=torch.float64), mean=0.5, pixel_accuracy=0.6666666666666666)
    """

    counts: Tensor
    invalid: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_ignore_index(ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.register_buffer("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64))
        self.register_buffer("invalid", torch.zeros((), dtype=torch.int64), persistent=False)  # predictions

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: (N, H, W) uint8, int16, int32 or int64 class ids.
            labels: (N, H, W) integer; ids outside 0..C-1 count as ignored.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or a prediction at a labelled pixel is not a class id.
        """
        check_labels("predictions", predictions)
        check_labels("labels", labels)
        check_same_shape("predictions", predictions.shape, "labels", labels.shape)
        check_same_device(labels=labels, predictions=predictions)
        check_values("labels", labels)
        size = self.num_classes + 2  # one extra bin below and one above the class ids
        index = self._clamped(labels) * size + self._clamped(predictions)
        pairs = _count(index.flatten(), size * size).view(size, size)[1:-1].to(self.counts.device)
        if 0 <= self.ignore_index < self.num_classes:
            pairs[self.ignore_index] = 0
        counts, invalid = pairs[:, 1:-1], pairs[:, 0].sum() + pairs[:, -1].sum()
        if invalid.device.type == "cpu" and invalid:
            self._refuse()
        self.counts += counts
        self.invalid += invalid
        self._merged = None

    def compute(self, classes: Iterable[int] | None = None) -> IoU:
        """Compute the scores from the counts; after `merge`, from those of all ranks.

        Args:
            classes: Class ids to average over, e.g. the 16 or 13 classes of SYNTHIA; all by default. Confusions between
                these and the other classes still count as errors, and `per_class` always has all C entries.

        Raises:
            TypeError: If a class id is not an integer.
            ValueError: If a class id is out of range, there are none, or a prediction on a GPU was not a class id.
        """
        state = self._totals()
        if state["invalid"]:
            self._refuse()
        chosen = [operator.index(one) for one in (range(self.num_classes) if classes is None else classes)]
        if not chosen or min(chosen) < 0 or max(chosen) >= self.num_classes:
            raise ValueError(f"`classes` must be ids in 0..{self.num_classes - 1}, got {chosen}; pass at least one.")
        counts = state["counts"]
        hits = counts.diagonal()
        per_class = hits / (counts.sum(0) + counts.sum(1) - hits)  # 0 / 0 is NaN: absent from both
        if 0 <= self.ignore_index < self.num_classes:
            per_class[self.ignore_index] = torch.nan
        return IoU(per_class, float(per_class[chosen].nanmean()), float(hits.sum() / counts.sum()))

    def _clamped(self, ids: Tensor) -> Tensor:
        """Class ids plus one as int32: 0 for ids below the classes, C + 1 for ids above."""
        if ids.dtype == torch.int64:
            ids = ids.clamp(-1, self.num_classes)  # before narrowing to int32
        return ids.to(torch.int32).clamp(-1, self.num_classes) + 1

    def _refuse(self) -> None:
        least = f"must lie in 0..{self.num_classes - 1} at labelled pixels"
        hint = (
            f"take the argmax over {self.num_classes} classes, or find out why the scores are NaN, which counts as -1"
        )
        raise ValueError(f"`predictions` {least}, got other values; {hint}.")

    @override
    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, ignore_index={self.ignore_index}"


def _count(ids: Tensor, size: int) -> Tensor:
    """Count the ids 0..size - 1. On a GPU `bincount` would sync, so use `scatter_add_`."""
    if ids.device.type != "cpu":
        ids = ids.long()
        return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))
    return torch.bincount(ids, minlength=size)
