"""Quality of pseudo-labels: precision and recall, class shares, lambda, agreement with the student.

The failure to watch for is class conflation (DACS, https://arxiv.org/abs/2007.08702, sections 3.2 and 4.5): a class
loses its pixels to a larger one, with growing confidence. Its recall and its share of the pseudo-labels fall to 0, the
precision of the class that replaces it falls as well, and lambda rises regardless.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from crossmix._checks import (
    check_confidence,
    check_fraction,
    check_ignore_index,
    check_labels,
    check_num_classes,
    check_same_device,
    check_same_shape,
    class_shares,
)
from crossmix._distributed import Counts
from crossmix._tensors import at_least_float32, valid_pixels

__all__ = ["PseudoLabelMonitor", "PseudoLabelQuality"]

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599
UNIT = 2**20  # confidence is summed as integers, in units of 1 / UNIT, so that sums do not depend on order or device


class PseudoLabelQuality(NamedTuple):
    """Quality of pseudo-labels as fractions; NaN for values without any data.

    Attributes:
        precision: (C,) float64 on the CPU: TP / (TP + FP) over pixels with a true label; NaN for classes that are never
            predicted.
        recall: (C,) likewise: TP / (TP + FN); NaN for classes absent from the true labels.
        confident_precision: (C,) likewise, over confident pixels only.
        confident_recall: (C,) likewise, over confident pixels only.
        share: (C,) likewise: share of each class among the pseudo-labels.
        expected_share: (C,) likewise: the prior passed to `compute`, or the share of each class among the true labels.
        divergence: Total variation distance between the two, sum_c abs(share_c - expected_share_c) / 2: the share of
            pixels that would have to change class. In [0, 1]; unlike the KL divergence, finite when a class is lost.
        confident_share: Share of pixels with confidence >= threshold; the mean of lambda over batches of equal size.
        mean_confidence: Mean confidence, accurate to 1e-6.
        agreement: Share of pixels where the student predicts the class of the pseudo-label.
        calibration_error: Expected calibration error over pixels with a true label, in 15 equal bins b of confidence:
            sum_b (number of pixels in b) / (number of pixels) * abs(accuracy_b - mean confidence_b).
        never_predicted: The number of classes that occur in no pseudo-label, without ignored ones.
        pixels: The number of pixels counted.
    """

    precision: Tensor
    recall: Tensor
    confident_precision: Tensor
    confident_recall: Tensor
    share: Tensor
    expected_share: Tensor
    divergence: float
    confident_share: float
    mean_confidence: float
    agreement: float
    calibration_error: float
    never_predicted: int
    pixels: int

    def as_dict(self, class_names: Sequence[str] | None = None) -> dict[str, float | int | None]:
        """Flatten to one number per key, for a JSON log or TensorBoard.

        Args:
            class_names: One name per class, e.g. `crossmix.datasets.classes.CLASS_NAMES`; class ids by default.

        Returns:
            "lambda" (the confident share), "divergence" and the other fields by name; fields with one number per class
            have the class after a slash, as in "recall/road". Undefined values are None; the keys are always the same.

        Raises:
            ValueError: If there is not one distinct name per class.

        Example:
            >>> monitor = PseudoLabelMonitor(2)
            >>> monitor.update(torch.tensor([[[0, 0]]]), torch.tensor([[[0.99, 0.50]]]))
            >>> record = monitor.compute().as_dict(["road", "sky"])
            >>> record["lambda"], record["share/road"], record["recall/road"]
            (0.5, 1.0, None)
        """
        num_classes = len(self.share)
        names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if len(names) != num_classes or len(set(names)) != num_classes:
            got = f"{len(set(names))} among {len(names)}"
            raise ValueError(f"`class_names` must be {num_classes} distinct names, got {got}; name each class once.")
        record: dict[str, float | int | None] = {}
        for field, value in self._asdict().items():
            if isinstance(value, Tensor):
                record |= {f"{field}/{name}": _or_none(v) for name, v in zip(names, value.tolist(), strict=True)}
            else:
                record["lambda" if field == "confident_share" else field] = _or_none(value)
        return record


class PseudoLabelMonitor(Counts):
    """Accumulate the quality of pseudo-labels over batches, with or without true labels.

    True labels of the target are for monitoring only: validation images, or a labelled target set unused in training.

    Args:
        num_classes: The number of classes C.
        threshold: Confidence in [0, 1] from which a pixel counts as confident; use that of the loss.
        ignore_index: The id of ignored pixels in all label maps. If it is one of the classes, that class has no pixels,
            does not count as never predicted, and is left out of a given prior.

    State:
        int64 buffers, which `update` adds to and `reset` zeroes. `counts`: (C, 2, 4), pixels by class, confident or
        not, and kind: wrong pseudo-label, right pseudo-label, pseudo-label without a true label, true label.
        `confidence`: its sum in units of 2**-20. `gaps`: (15,), per bin of confidence, the sum of
        (correct - confidence) in these units. `agreement`: (2,), pixels where the student disagrees and agrees.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `num_classes` is not positive or `threshold` is not in [0, 1].

    Example:
        >>> monitor = PseudoLabelMonitor(2, threshold=0.9)
        >>> labels, truth = torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[0, 0, 1, 255]]])
        >>> monitor.update(labels, torch.tensor([[[0.95, 0.60, 0.70, 0.99]]]), truth=truth)
        >>> quality = monitor.compute()
        >>> quality.precision, quality.recall
        (tensor([0.6667,    nan], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
        >>> round(quality.divergence, 4), round(quality.confident_share, 4), quality.never_predicted
        (0.3333, 0.3333, 1)
    """

    counts: Tensor
    confidence: Tensor
    gaps: Tensor
    agreement: Tensor

    def __init__(self, num_classes: int, *, threshold: float = 0.968, ignore_index: int = 255) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_fraction("threshold", threshold)
        check_ignore_index(ignore_index)
        self.num_classes = num_classes
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.register_buffer("counts", torch.zeros(num_classes, 2, 4, dtype=torch.int64))
        self.register_buffer("confidence", torch.zeros((), dtype=torch.int64))
        self.register_buffer("gaps", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("agreement", torch.zeros(2, dtype=torch.int64))

    @torch.no_grad()
    def update(
        self, labels: Tensor, confidence: Tensor, *, truth: Tensor | None = None, student: Tensor | None = None
    ) -> None:
        """Count a batch, without a host sync: `update(*teacher.pseudo_label(images))`, in every step if you like.

        Pixels whose pseudo-label or given true label is ignored or not a class, or whose confidence is NaN, do not
        count at all. Batches without truth count for shares, lambda and agreement; to compute `share` and
        `expected_share` over the same pixels, pass truth with every batch or with none.

        Args:
            labels: (N, H, W) uint8, int16, int32 or int64 pseudo-labels, before any threshold.
            confidence: (N, H, W) floating in [0, 1]; values outside are clamped.
            truth: (N, H, W) integer true labels.
            student: (N, H, W) integer predictions of the student; ignored pixels and ids that are not classes do not
                count for the agreement.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree.
        """
        self._check_batch(labels, confidence, truth, student)
        pseudo, counted = self._ids(labels)
        confidence = at_least_float32(confidence).flatten()
        counted = counted & ~confidence.isnan()
        confidence = confidence.nan_to_num(0).clamp(0, 1)
        true = None
        if truth is not None:
            true, known = self._ids(truth)
            counted = counted & known
        each = counted.long()
        units = (confidence * UNIT).round().long()
        self.confidence += (units * each).sum()
        counts, confident = self.counts.view(-1), (confidence >= self.threshold).long() * 4
        if true is None:
            counts.scatter_add_(0, pseudo * 8 + confident + 2, each)
        else:
            correct = (true == pseudo).long()
            counts.scatter_add_(0, pseudo * 8 + confident + correct, each)
            counts.scatter_add_(0, true * 8 + confident + 3, each)
            bins = (confidence * BINS).long().clamp(max=BINS - 1)
            self.gaps.scatter_add_(0, bins, (correct * UNIT - units) * each)
        if student is not None:
            predicted, known = self._ids(student)
            compared = counted & known
            agree = compared & (predicted == pseudo)
            self.agreement += torch.stack([(compared & ~agree).sum(), agree.sum()])
        self._merged = None

    def compute(self, prior: Tensor | Sequence[float] | None = None) -> PseudoLabelQuality:
        """Compute all values from the counts; after `merge`, from those of all ranks.

        Args:
            prior: (C,) class frequencies or counts to compare the shares with, >= 0, normalised to sum to 1; for
                example the source's, if the target has no labels. The shares of the true labels by default.

        Raises:
            ValueError: If `prior` is not C numbers that can be normalised.
        """
        state = self._totals()
        wrong, right, alone, true = state["counts"].unbind(2)  # (C, 2) each
        known = wrong + right
        both = known + alone
        pixels = both.sum()
        share = both.sum(1) / pixels  # here and below, 0 / 0 is NaN: no data
        expected = true.sum(1) / true.sum()
        if prior is not None:
            expected = class_shares(prior, self.num_classes, self.ignore_index)
        return PseudoLabelQuality(
            precision=right.sum(1) / known.sum(1),
            recall=right.sum(1) / true.sum(1),
            confident_precision=right[:, 1] / known[:, 1],
            confident_recall=right[:, 1] / true[:, 1],
            share=share,
            expected_share=expected,
            divergence=float((share - expected).abs().sum() / 2),
            confident_share=float(both[:, 1].sum() / pixels),
            mean_confidence=float(state["confidence"] / UNIT / pixels),
            agreement=float(state["agreement"][1] / state["agreement"].sum()),
            calibration_error=float(state["gaps"].abs().sum() / UNIT / known.sum()),
            never_predicted=sum(n == 0 for c, n in enumerate(both.sum(1).tolist()) if c != self.ignore_index),
            pixels=int(pixels),
        )

    @override
    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, threshold={self.threshold}, ignore_index={self.ignore_index}"

    def _ids(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Flattened class ids, with 0 where a pixel has no valid class, and a mask of the valid pixels."""
        index, known = valid_pixels(labels.flatten(), self.num_classes, self.ignore_index)
        return index.where(known, 0), known

    def _check_batch(self, labels: Tensor, confidence: Tensor, truth: Tensor | None, student: Tensor | None) -> None:
        check_labels("labels", labels)
        check_confidence(confidence)
        check_same_shape("confidence", confidence.shape, "labels", labels.shape)
        for name, other in (("truth", truth), ("student", student)):
            if other is not None:
                check_labels(name, other)
                check_same_shape(name, other.shape, "labels", labels.shape)
        check_same_device(counts=self.counts, labels=labels, confidence=confidence, truth=truth, student=student)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
