"""Confidence weights and the weighted cross-entropy of self-training.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 3.4.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from crossmix._checks import (
    check_choice,
    check_fraction,
    check_ignore_index,
    check_labels,
    check_logits,
    check_same_device,
    check_same_shape,
    check_tensor,
    check_weights,
)
from crossmix._cross_entropy import pixel_losses, upsample_for, upsampled_sum, valid_pixels
from crossmix._distributed import all_reduce_sum, world_size
from crossmix._tensors import at_least_float32, weight_maps

__all__ = ["ConfidenceWeightedCE", "confidence_weight", "upsampled_cross_entropy", "weighted_cross_entropy"]

Scope = Literal["image", "batch", "pixel", "none"]
Normalizer = Literal["all", "valid", "weights"]
Reduction = Literal["mean", "sum", "none"]

_SCOPES = ("image", "batch", "pixel", "none")
_NORMALIZERS = ("all", "valid", "weights")
_REDUCTIONS = ("mean", "sum", "none")


def confidence_weight(confidence: Tensor, threshold: float = 0.968, *, scope: Scope = "image") -> Tensor:
    """Weight pixels by the share of confident ones: the lambda of section 3.4.

    lambda = (number of pixels with confidence >= threshold) / (number of pixels)

    Args:
        confidence: (N, H, W) floating in [0, 1], the maximum over classes of the teacher's probabilities.
        threshold: Confidence in [0, 1]; 0.968 in the released code, not stated in the paper.
        scope: What the share is computed over: `"image"` (the paper), `"batch"` (the released code), `"pixel"` (1 if
            the pixel itself is confident, else 0) or `"none"` (1 everywhere).

    Returns:
        (N, H, W) float32, or float64 for float64 confidence. No host sync.

    Raises:
        TypeError: If `confidence` is not floating.
        ValueError: If a shape, the threshold or the scope is wrong.

    Example:
        >>> confidence_weight(torch.tensor([[[0.99, 0.50]], [[0.97, 0.98]]]))
        tensor([[[0.5000, 0.5000]],
        <BLANKLINE>
                [[1.0000, 1.0000]]])
    """
    _check_confidence(confidence)
    check_fraction("threshold", threshold)
    check_choice("scope", scope, _SCOPES)
    return _confidence_weight(confidence, threshold, scope, sync=False)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = 255,
    normalizer: Normalizer = "all",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with a weight per pixel and a named divisor: the H of the paper's Eq. (3).

    loss = sum_p w_p * CE(logits_p, label_p) / divisor, over the pixels p that are not ignored

    Finite and differentiable for every degenerate batch: if no pixel counts, the loss and its gradient are 0, never
    NaN. A pixel that is ignored or has weight 0 adds exactly 0 to the loss and to the gradient of the logits, even if
    its logits are NaN or infinite; an ignored one does so whatever its weight.

    Args:
        logits: (N, C, H, W) floating; computed in float32, or in float64 where an input is float64.
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..C-1 count as ignored.
        weights: (N, H, W) or (N,) floating, >= 0; ones if not given. For a weight per class, torch's `weight=`, pass
            `class_weights[labels.long().clamp(0, C - 1)]` with `normalizer="weights"`.
        ignore_index: The id of ignored pixels.
        normalizer: The divisor of the mean: the number of `"all"` pixels including ignored ones (the paper, and the
            released mixed loss), of the `"valid"` ones (the released source loss, and torch), or the sum of the
            `"weights"` of the valid ones.
        label_smoothing: Share of the uniform distribution in the label, in [0, 1].
        reduction: `"mean"` as described, `"sum"`, or `"none"` for the (N, H, W) weighted losses.

    Returns:
        A scalar, or (N, H, W) with `reduction="none"`; float32 or float64. No host sync.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes or devices disagree, or an option is unknown.

    Example:
        >>> logits, labels = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 1, 1, 255]]])
        >>> weighted_cross_entropy(logits, labels), weighted_cross_entropy(logits, labels, normalizer="valid")
        (tensor(0.5199), tensor(0.6931))
    """
    _check_loss_inputs(logits, labels, weights)
    check_same_shape("labels", labels.shape, "logits", (logits.shape[0], *logits.shape[2:]))
    _check_loss_options(ignore_index, normalizer, label_smoothing)
    check_choice("reduction", reduction, _REDUCTIONS)
    losses = pixel_losses(logits, labels, weights, ignore_index, label_smoothing)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / _positive(
        _divisor(labels, weights, total, logits.shape[1], ignore_index=ignore_index, normalizer=normalizer)
    )


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    align_corners: bool = True,
    ignore_index: int = 255,
    normalizer: Normalizer = "all",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute `weighted_cross_entropy` of smaller logits, upsampled to the size of the labels.

    Upsampling is bilinear, in float32 (float64 if an input is). It works on blocks of rows and computes the gradient of
    the small logits in the same pass, so the full-size logits never exist; this takes a fraction of the time and memory
    of upsampling first. The plain form is used where that is impossible: for `reduction="none"`, the gradient of
    weights, second derivatives, forward-mode derivatives, the transforms of `torch.func`, and DTensors. On a GPU the
    interpolation is a matrix product, in TF32 if `torch.backends.cuda.matmul.allow_tf32` is set.

    Args:
        logits: (N, C, h, w) floating, of any size.
        labels: (N, H, W) integer.
        weights: (N, H, W) or (N,) floating; ones if not given.
        align_corners: Interpolation convention: True as in DeepLab-v2 and the released code, False as in transformers,
            mmsegmentation and DAFormer.
        ignore_index: The id of ignored pixels.
        normalizer: As in `weighted_cross_entropy`.
        label_smoothing: As in `weighted_cross_entropy`.
        reduction: As in `weighted_cross_entropy`.

    Returns:
        As `weighted_cross_entropy`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If batch sizes or devices disagree, the logits have no pixels, or an option is unknown.

    Example:
        >>> logits = torch.tensor([[[[0.0, 2.0]], [[2.0, 0.0]]]])
        >>> upsampled_cross_entropy(logits, torch.tensor([[[1, 0, 0]]]))
        tensor(0.3157)
    """
    _check_small_logits(logits, labels, weights)
    _check_loss_options(ignore_index, normalizer, label_smoothing)
    check_choice("reduction", reduction, _REDUCTIONS)
    if reduction == "none":
        full = upsample_for(logits, labels, weights, align_corners=align_corners)
        return pixel_losses(full, labels, weights, ignore_index, label_smoothing)
    total = upsampled_sum(
        logits,
        labels,
        weights,
        align_corners=align_corners,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    if reduction == "sum":
        return total
    return total / _positive(
        _divisor(labels, weights, total, logits.shape[1], ignore_index=ignore_index, normalizer=normalizer)
    )


class ConfidenceWeightedCE(nn.Module):
    """Loss on mixed images: confidence weights for target pixels, and the cross-entropy that uses them.

    Args:
        threshold: A pixel counts as confident at `confidence >= threshold`; in [0, 1].
        scope: `"image"` (the paper's lambda), `"batch"` (the released code's), `"pixel"` or `"none"`; see
            `crossmix.functional.confidence_weight`.
        ignore_index: The id of ignored pixels.
        normalizer: `"all"`, `"valid"` or `"weights"`; see `crossmix.functional.weighted_cross_entropy`.
        label_smoothing: Share of the uniform distribution in the label, in [0, 1].
        sync: Whether divisors and the batch-scope lambda are computed over the batch of all ranks. Each rank's loss is
            then scaled by the number of ranks, so that DistributedDataParallel's average of the gradients is the
            gradient of the loss of the whole batch. No effect without an initialised process group.

    Raises:
        ValueError: If an option is out of range or unknown.

    Example:
        >>> criterion = ConfidenceWeightedCE(scope="batch")
        >>> weights = criterion.weights(torch.tensor([[[0.99, 0.50]]]))
        >>> criterion(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]), weights)
        tensor(0.3466)
    """

    def __init__(
        self,
        threshold: float = 0.968,
        *,
        scope: Scope = "image",
        ignore_index: int = 255,
        normalizer: Normalizer = "all",
        label_smoothing: float = 0.0,
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_fraction("threshold", threshold)
        check_choice("scope", scope, _SCOPES)
        _check_loss_options(ignore_index, normalizer, label_smoothing)
        self.threshold = threshold
        self.scope: Scope = scope
        self.ignore_index = ignore_index
        self.normalizer: Normalizer = normalizer
        self.label_smoothing = label_smoothing
        self.sync = sync

    def weights(self, confidence: Tensor) -> Tensor:
        """Compute the weights of target pixels from the teacher's confidence.

        Args:
            confidence: (N, H, W) floating in [0, 1].

        Returns:
            (N, H, W) float32, or float64 for float64 confidence.

        Raises:
            TypeError: If `confidence` is not floating.
            ValueError: If its shape is wrong.
        """
        _check_confidence(confidence)
        return _confidence_weight(confidence, self.threshold, self.scope, sync=self.sync)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean weighted cross-entropy.

        Args:
            logits: (N, C, H, W) floating.
            labels: (N, H, W) integer.
            weights: (N, H, W) or (N,) floating; ones if not given.

        Returns:
            Scalar float32, or float64 where an input is float64.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree.
        """
        _check_loss_inputs(logits, labels, weights)
        check_same_shape("labels", labels.shape, "logits", (logits.shape[0], *logits.shape[2:]))
        total = pixel_losses(logits, labels, weights, self.ignore_index, self.label_smoothing).sum()
        return self._mean(total, labels, weights, logits.shape[1])

    def upsampled(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, align_corners: bool = True
    ) -> Tensor:
        """Return the same loss on logits of a smaller size; see `crossmix.functional.upsampled_cross_entropy`.

        Args:
            logits: (N, C, h, w) floating.
            labels: (N, H, W) integer.
            weights: (N, H, W) or (N,) floating; ones if not given.
            align_corners: As in `crossmix.functional.upsampled_cross_entropy`.

        Returns:
            Scalar float32, or float64 where an input is float64.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If batch sizes or devices disagree, or the logits have no pixels.
        """
        _check_small_logits(logits, labels, weights)
        if type(self).forward is not ConfidenceWeightedCE.forward:  # a subclass with its own loss
            loss: Tensor = self(upsample_for(logits, labels, weights, align_corners=align_corners), labels, weights)
            return loss
        total = upsampled_sum(
            logits,
            labels,
            weights,
            align_corners=align_corners,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return self._mean(total, labels, weights, logits.shape[1])

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return (
            f"threshold={self.threshold}, scope={self.scope!r}, ignore_index={self.ignore_index}, "
            f"normalizer={self.normalizer!r}, label_smoothing={self.label_smoothing}, sync={self.sync}"
        )

    def _mean(self, total: Tensor, labels: Tensor, weights: Tensor | None, num_classes: int) -> Tensor:
        divisor = _divisor(
            labels, weights, total, num_classes, ignore_index=self.ignore_index, normalizer=self.normalizer
        )
        if self.sync:
            return total / _positive(all_reduce_sum(divisor)) * world_size()
        return total / _positive(divisor)


def _confidence_weight(confidence: Tensor, threshold: float, scope: Scope, *, sync: bool) -> Tensor:
    confidence = at_least_float32(confidence.detach())
    if scope == "none":
        return torch.ones_like(confidence)
    confident = (confidence >= threshold).to(confidence.dtype)
    if scope == "pixel":
        return confident
    if scope == "image":
        share = confident.sum((1, 2), keepdim=True) / max(confidence.shape[1] * confidence.shape[2], 1)
        return share.expand_as(confidence).contiguous()
    kept, total = confident.sum(), torch.full((), confidence.numel(), dtype=confidence.dtype, device=confidence.device)
    if sync:
        kept, total = all_reduce_sum(torch.stack([kept, total])).unbind()
    return (kept / _positive(total)).expand_as(confidence).contiguous()


def _divisor(
    labels: Tensor,
    weights: Tensor | None,
    total: Tensor,
    num_classes: int,
    *,
    ignore_index: int,
    normalizer: Normalizer,
) -> Tensor:
    """The divisor of the mean."""
    if normalizer == "all":
        return torch.full((), labels.numel(), dtype=total.dtype, device=total.device)
    _, valid = valid_pixels(labels, num_classes, ignore_index)
    if normalizer == "valid" or weights is None:
        return valid.sum().to(total.dtype)
    return torch.where(valid, weight_maps(weights, labels).to(total.dtype), 0.0).sum()


def _positive(divisor: Tensor) -> Tensor:
    """The divisor, or 1 if it is 0, in which case the numerator is 0 too."""
    return torch.where(divisor > 0, divisor, 1.0)


def _check_confidence(confidence: Tensor) -> None:
    check_tensor("confidence", confidence)
    if not confidence.is_floating_point():
        raise TypeError(f"`confidence` must be floating in [0, 1], got {confidence.dtype}; pass probabilities.")
    if confidence.ndim != 3:
        raise ValueError(
            f"`confidence` must have shape (N, H, W), got {tuple(confidence.shape)}; "
            "take the maximum of the probabilities over dimension 1."
        )


def _check_loss_inputs(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    check_logits("logits", logits)
    check_labels("labels", labels)
    if len(labels) != len(logits):
        raise ValueError(
            f"`logits` hold {len(logits)} images but `labels` {len(labels)}; pass the labels of this batch."
        )
    if weights is not None:
        check_weights("weights", weights, labels.shape)
    check_same_device(logits=logits, labels=labels, weights=weights)


def _check_small_logits(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    _check_loss_inputs(logits, labels, weights)
    if 0 in logits.shape[2:] and labels.numel() > 0:
        raise ValueError(
            f"`logits` must have pixels to be upsampled to {tuple(labels.shape[1:])}, got {tuple(logits.shape)}; "
            "pass larger images."
        )


def _check_loss_options(ignore_index: int, normalizer: str, label_smoothing: float) -> None:
    check_ignore_index(ignore_index)
    check_choice("normalizer", normalizer, _NORMALIZERS)
    check_fraction("label_smoothing", label_smoothing)
