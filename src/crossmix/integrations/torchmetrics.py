"""The mean IoU of `ConfusionMatrix` as a metric of torchmetrics, for a MetricCollection or Lightning."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from crossmix._checks import check_tensor
from crossmix._tensors import most_probable
from crossmix.metrics import ConfusionMatrix, IoU

__all__ = ["MeanIoU"]


class MeanIoU(Metric):
    """Mean IoU from one confusion matrix over all images, as for the published numbers.

    `torchmetrics.segmentation.MeanIoU` is another quantity, a mean of the IoU of each image;
    `torchmetrics.classification.MulticlassJaccardIndex` is this one for all classes.

    Args:
        num_classes: The number of classes C.
        ignore_index: The id of ignored pixels in labels.
        classes: The ids to average over, e.g. `CLASSES_16` of `crossmix.datasets.classes`; all by default.

    State:
        `counts`: (C, C) int64, rows labels, columns predictions. `invalid`: int64, the predictions on a GPU that were
            not class ids. Both are summed over ranks. `ignored`: `ignore_index`, the same on all ranks. None is in the
            state_dict, unless torchmetrics is told to by `.persistent(True)`.

    Raises:
        ValueError: If `num_classes` is not positive.

    Example:
        >>> from torchmetrics import MetricCollection
        >>> metrics = MetricCollection({"all": MeanIoU(2), "second": MeanIoU(2, classes=[1])})
        >>> metrics.update(torch.tensor([[[0, 1, 1, 1]]]), torch.tensor([[[0, 1, 0, 255]]]))
        >>> metrics.compute()
        {'all': tensor(0.5000), 'second': tensor(0.5000)}
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    counts: Tensor
    invalid: Tensor
    ignored: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int = 255, classes: Iterable[int] | None = None) -> None:
        super().__init__()
        matrix = ConfusionMatrix(num_classes, ignore_index=ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classes: tuple[int, ...] | None = None if classes is None else tuple(classes)
        matrix.compute(self.classes)  # checks them
        self.add_state("counts", matrix.counts, dist_reduce_fx="sum")
        self.add_state("invalid", matrix.invalid, dist_reduce_fx="sum")
        # Never changes: a MetricCollection lets metrics whose states are equal share one, whatever they ignore.
        self.add_state("ignored", torch.tensor(ignore_index), dist_reduce_fx="max")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: (N, H, W) integer class ids, or (N, C, H, W) floating logits or probabilities.
            labels: (N, H, W) integer; ids outside 0..C-1 count as ignored.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or a prediction at a labelled pixel is not a class id, or NaN.
        """
        check_tensor("predictions", predictions)
        with self.counts.device:  # to move zeros there would wait for a GPU
            matrix = ConfusionMatrix(self.num_classes, ignore_index=self.ignore_index)
        matrix.update(most_probable(predictions) if predictions.is_floating_point() else predictions, labels)
        self.counts += matrix.counts
        self.invalid += matrix.invalid

    def compute(self) -> Tensor:
        """Compute the mean IoU.

        Returns:
            A scalar, NaN if no pixel was counted.

        Raises:
            ValueError: If a prediction on a GPU was not a class id.
        """
        return torch.tensor(self.scores().mean, device=self.counts.device)

    def scores(self) -> IoU:
        """Compute all scores, of this rank alone unless torchmetrics has synchronised the state.

        Returns:
            The IoU per class, their mean, and the pixel accuracy.

        Raises:
            ValueError: If a prediction on a GPU was not a class id.
        """
        matrix = ConfusionMatrix(self.num_classes, ignore_index=self.ignore_index)
        matrix.counts += self.counts.cpu()
        matrix.invalid += self.invalid.cpu()
        return matrix.compute(self.classes)
