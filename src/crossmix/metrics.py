"""The confusion matrix of a whole data set, and intersection over union from it: the benchmark's definition of mIoU."""

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from crossmix._checks import check_ignore_index, check_labels, check_num_classes, check_same_device, check_same_shape
from crossmix._distributed import all_reduce_sum

__all__ = ["ConfusionMatrix", "IoU"]


class IoU(NamedTuple):
    """Intersection over union, as fractions.

    Attributes:
        per_class: (C,) float64 on the CPU; NaN for a class that is in neither labels nor predictions, and for one that
            is ignored.
        mean: Mean over classes, NaN left out; NaN where nothing is left.
        pixel_accuracy: Share of labelled pixels that are predicted right; NaN without any.
    """

    per_class: Tensor
    mean: float
    pixel_accuracy: float


class ConfusionMatrix(nn.Module):
    """Count label and prediction pairs over a data set.

    IoU_c = TP_c / (TP_c + FP_c + FN_c), with the counts of all images together, not a mean over images.

    Args:
        num_classes: The number of classes C.
        ignore_index: The id of ignored pixels in labels. Where it is one of the classes, that class has no score and
            does not count in the mean; to predict it at a labelled pixel is an error like any other.

    On a GPU `update` does not wait for the device; a prediction that is no class is then found by `compute`.

    State:
        `counts`: (C, C) int64 buffer, rows labels, columns predictions; changed by `update` and `reset`.

    Raises:
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
        self.register_buffer("invalid", torch.zeros((), dtype=torch.int64), persistent=False)
        self._merged: Tensor | None = None  # counts of all ranks in one row, then the number of invalid predictions
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: (N, H, W) uint8, int16, int32 or int64 class ids.
            labels: (N, H, W) integer; ids outside 0..C-1 count as ignored.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or a prediction at a labelled pixel is no class.
        """
        check_labels("predictions", predictions)
        check_labels("labels", labels)
        check_same_shape("predictions", predictions.shape, "labels", labels.shape)
        check_same_device(labels=labels, predictions=predictions)
        size = self.num_classes + 2  # whatever is below the classes comes first, whatever is above them last
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

    def merge(self) -> None:
        """Add up the counts of all ranks for `compute`; twice, or without a process group, it changes nothing.

        Predictions that are no class are counted too, so that `compute` fails on every rank or on none.
        """
        self._merged = all_reduce_sum(self._state())

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()
        self.invalid.zero_()
        self._merged = None

    def compute(self, classes: Iterable[int] | None = None) -> IoU:
        """Compute the scores from the counts, those of all ranks after `merge`.

        Args:
            classes: Class ids that the mean is taken over, e.g. the 16 or 13 classes of SYNTHIA; all of them by
                default. Pixels of the others still count as errors where they are predicted as one of these, or the
                reverse.

        Returns:
            The scores; `per_class` always has all C entries.

        Raises:
            TypeError: If a class id is no whole number.
            ValueError: If a class id is out of range or there are none, or a prediction on a GPU was no class.
        """
        state = (self._state() if self._merged is None else self._merged).cpu()
        if state[-1]:
            self._refuse()
        chosen = [operator.index(one) for one in (range(self.num_classes) if classes is None else classes)]
        if not chosen or min(chosen) < 0 or max(chosen) >= self.num_classes:
            raise ValueError(f"`classes` must be ids in 0..{self.num_classes - 1}, got {chosen}; name some.")
        counts = state[:-1].view(self.counts.shape).double()
        hits = counts.diagonal()
        per_class = hits / (counts.sum(0) + counts.sum(1) - hits)  # 0 / 0 is NaN: absent from both
        if 0 <= self.ignore_index < self.num_classes:
            per_class[self.ignore_index] = torch.nan
        return IoU(
            per_class=per_class,
            mean=float(per_class[chosen].nanmean()),
            pixel_accuracy=float(hits.sum() / counts.sum()),
        )

    def _state(self) -> Tensor:
        """Everything counted, in one row: what ranks add up in one go."""
        return torch.cat([self.counts.flatten(), self.invalid[None]])

    def _clamped(self, ids: Tensor) -> Tensor:
        """Class ids plus one as int32, 0 for what is below and C + 1 for what is above."""
        if ids.dtype == torch.int64:
            ids = ids.clamp(-1, self.num_classes)  # before it gets narrower
        return ids.to(torch.int32).clamp(-1, self.num_classes) + 1

    def _refuse(self) -> None:
        raise ValueError(
            f"`predictions` must lie in 0..{self.num_classes - 1} where there is a label, got others; take the argmax "
            f"over {self.num_classes} classes."
        )

    @override
    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return f"num_classes={self.num_classes}, ignore_index={self.ignore_index}"


def _forget(matrix: ConfusionMatrix, _: object) -> None:
    """A loaded state takes the place of everything counted before, here and on other ranks."""
    matrix.invalid.zero_()
    matrix._merged = None


def _count(ids: Tensor, size: int) -> Tensor:
    """How often each of 0..size - 1 occurs; `bincount` waits for a GPU."""
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=size)
    return torch.zeros(size, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids.long(), torch.ones_like(ids, dtype=torch.int64)
    )
