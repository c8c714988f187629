"""What the pseudo-labels are doing: precision and recall, class shares, lambda, agreement.

The failure to look for is class conflation (DACS, https://arxiv.org/abs/2007.08702, sections 3.2 and 4.5): a class
loses its pixels to a larger one, with ever more confidence. Its recall and its share of the pseudo-labels fall to 0,
the precision of the class that takes its place falls too, and lambda rises all the same.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from crossmix._checks import (
    check_fraction,
    check_ignore_index,
    check_labels,
    check_num_classes,
    check_same_device,
    check_same_shape,
    check_tensor,
)
from crossmix._distributed import all_reduce_sum
from crossmix._tensors import at_least_float32

__all__ = ["PseudoLabelMonitor", "PseudoLabelQuality"]

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599
UNIT = 2**20  # Confidence is summed in units of 1 / UNIT: whole numbers give one sum in any order, on any device.


class PseudoLabelQuality(NamedTuple):
    """What pseudo-labels were like, as fractions; NaN where there was nothing to compute them from.

    Attributes:
        precision: (C,) float64 on the CPU: TP / (TP + FP) over pixels with a true label; NaN for a class that is not
            predicted.
        recall: (C,) likewise: TP / (TP + FN); NaN for a class that is not in the true labels.
        confident_precision: (C,) likewise, over confident pixels alone.
        confident_recall: (C,) likewise, over confident pixels alone.
        share: (C,) likewise: share of each class among the pseudo-labels.
        expected_share: (C,) likewise: the prior handed to `compute`, or else the share of each class among the true
            labels.
        divergence: Total variation between the two, sum_c abs(share_c - expected_share_c) / 2: the share of pixels that
            would have to change class. In [0, 1], and finite when a class is lost, where the KL divergence is not.
        confident_share: Share of pixels with confidence >= threshold: the mean of lambda over batches of one size.
        mean_confidence: Mean confidence, to 1e-6.
        agreement: Share of pixels to which the student gives the class of the pseudo-label.
        calibration_error: Expected calibration error over pixels with a true label, in 15 equal bins of confidence b:
            sum_b (number of pixels in b) / (number of pixels) * abs(accuracy_b - mean confidence_b).
        never_predicted: The number of classes that no pseudo-label has, ignored ones left out.
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
        """Return every number under a name of its own, for a JSON log or TensorBoard.

        Args:
            class_names: One name per class, e.g. `crossmix.datasets.classes.CLASS_NAMES`; class ids by default.

        Returns:
            "lambda" (the confident share), "divergence" and the other fields by name, with the class after a slash
            where there is one number per class: "recall/road". None, which JSON has and NaN is not, where undefined;
            the keys are always the same.

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
            raise ValueError(
                f"`class_names` must be {num_classes} distinct names, got {len(set(names))} among {len(names)}; "
                "name each class once."
            )
        record: dict[str, float | int | None] = {}
        for field, value in self._asdict().items():
            if isinstance(value, Tensor):
                record |= {f"{field}/{name}": _or_none(v) for name, v in zip(names, value.tolist(), strict=True)}
            else:
                record["lambda" if field == "confident_share" else field] = _or_none(value)
        return record


class PseudoLabelMonitor(nn.Module):
    """Count, over batches, what pseudo-labels are like, with and without true labels to hold against them.

    True labels of the target are for looking only: validation images, or a labelled target set that training ignores.

    Args:
        num_classes: The number of classes C.
        threshold: Confidence in [0, 1] from which a pixel is confident; that of the loss.
        ignore_index: The id of ignored pixels in all label maps. Where it is one of the classes, that class has no
            pixels, is not counted as never predicted, and has no part in a given prior.

    State:
        Buffers of int64, which `update` adds to and `reset` zeroes. `counts`: (C, 2, 4), pixels by class, confident or
        not, and what they are: a wrong pseudo-label, a right one, one without a true label, a true label.
        `confidence`: its sum in units of 2**-20. `gaps`: (15,), by bin of confidence, the sum of (correct - confidence)
        in those units. `agreement`: (2,), pixels where the student disagrees and agrees.

    Raises:
        TypeError: If an argument is of the wrong type.
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
        self._merged: dict[str, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(
        self, labels: Tensor, confidence: Tensor, *, truth: Tensor | None = None, student: Tensor | None = None
    ) -> None:
        """Count a batch, without a host sync: `update(*teacher.pseudo_label(images))`, or in every training step.

        A pixel counts nowhere where its pseudo-label or its given true label is ignored or no class, or its confidence
        is NaN. Batches without truth count for shares, lambda and agreement; for `share` and `expected_share` to be
        over the same pixels, give truth with every batch or with none.

        Args:
            labels: (N, H, W) uint8, int16, int32 or int64 pseudo-labels, before any threshold.
            confidence: (N, H, W) floating in [0, 1]; what is beyond counts as the nearest end.
            truth: (N, H, W) integer true labels.
            student: (N, H, W) integer classes that the student predicts; where they are ignored or no class, the pixel
                does not count for the agreement.

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

    def merge(self) -> None:
        """Add up the counts of all ranks for `compute`; twice, or without a process group, it changes nothing."""
        self._merged = {name: all_reduce_sum(buffer) for name, buffer in self.named_buffers()}

    def reset(self) -> None:
        """Forget all counts."""
        for buffer in self.buffers():
            buffer.zero_()
        self._merged = None

    def compute(self, prior: Tensor | Sequence[float] | None = None) -> PseudoLabelQuality:
        """Compute everything from the counts, those of all ranks after `merge`.

        Args:
            prior: (C,) class frequencies or counts to hold the shares against, >= 0, scaled to sum to 1: the source's,
                say, where the target has no labels. The shares of the true labels by default.

        Returns:
            The quality of the pseudo-labels counted since the last `reset`.

        Raises:
            ValueError: If `prior` is not C numbers that can be scaled.
        """
        state = {name: value.cpu().double() for name, value in (self._merged or dict(self.named_buffers())).items()}
        wrong, right, alone, true = state["counts"].unbind(2)  # (C, 2) each
        known = wrong + right
        both = known + alone
        pixels = both.sum()
        share = both.sum(1) / pixels  # 0 / 0 is NaN here and below: nothing to compute it from
        expected = true.sum(1) / true.sum() if prior is None else self._given_prior(prior)
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
        """Constructor arguments, for `repr`."""
        return f"num_classes={self.num_classes}, threshold={self.threshold}, ignore_index={self.ignore_index}"

    def _given_prior(self, prior: Tensor | Sequence[float]) -> Tensor:
        """The prior as (C,) float64 on the CPU, summing to 1 over the classes that are not ignored."""
        given = prior.detach().cpu() if isinstance(prior, Tensor) else prior  # off the device before it is double
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        if tuple(values.shape) != (self.num_classes,):
            raise ValueError(
                f"`prior` must hold one number per class, shape ({self.num_classes},), got {tuple(values.shape)}; "
                "count the pixels of each class."
            )
        values = values.where(torch.arange(self.num_classes, device="cpu") != self.ignore_index, 0)
        if not bool(values.isfinite().all()) or bool((values < 0).any()) or not float(values.sum()) > 0:
            raise ValueError(
                f"`prior` must be finite, not negative and not all zero, got {values.tolist()}; check the counts."
            )
        return values / values.sum()

    def _ids(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids in one row, 0 where there is none, and where there is one."""
        index = labels.flatten().long()
        known = (index >= 0) & (index < self.num_classes) & (index != self.ignore_index)
        return index.where(known, 0), known

    def _check_batch(self, labels: Tensor, confidence: Tensor, truth: Tensor | None, student: Tensor | None) -> None:
        check_labels("labels", labels)
        check_tensor("confidence", confidence)
        if not confidence.is_floating_point():
            raise TypeError(f"`confidence` must be floating in [0, 1], got {confidence.dtype}; pass probabilities.")
        check_same_shape("confidence", confidence.shape, "labels", labels.shape)
        for name, other in (("truth", truth), ("student", student)):
            if other is not None:
                check_labels(name, other)
                check_same_shape(name, other.shape, "labels", labels.shape)
        check_same_device(counts=self.counts, labels=labels, confidence=confidence, truth=truth, student=student)


def _forget(monitor: PseudoLabelMonitor, _: object) -> None:
    """A loaded state takes the place of everything counted before, here and on other ranks."""
    monitor._merged = None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
