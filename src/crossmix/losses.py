"""Confidence weights and the weighted cross-entropy of self-training.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 3.4.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crossmix._checks import (
    check_bool,
    check_choice,
    check_class_weights,
    check_confidence,
    check_fraction,
    check_ignore_index,
    check_labels,
    check_logits,
    check_same_device,
    check_same_shape,
    check_tensor,
    check_weights,
)
from crossmix._class_weights import buffer_of, numbers_of, refill, shown
from crossmix._cross_entropy import pixel_losses, upsample_for, upsampled_sum
from crossmix._distributed import all_reduce_sum, world_size
from crossmix._soft_labels import class_factors, dense_losses, factors, mass
from crossmix._tensors import KeepsFloat32, arithmetic, at_least_float32, valid_pixels, weight_maps

__all__ = ["ConfidenceWeightedCE", "confidence_weight", "upsampled_cross_entropy", "weighted_cross_entropy"]

Scope = Literal["image", "batch", "pixel", "none"]
Normalizer = Literal["all", "valid", "weights"]
Reduction = Literal["mean", "sum", "none"]

_SCOPES = ("image", "batch", "pixel", "none")
_NORMALIZERS = ("all", "valid", "weights")
_REDUCTIONS = ("mean", "sum", "none")


class _Options(NamedTuple):
    """The options of a loss."""

    ignore_index: int
    normalizer: Normalizer
    label_smoothing: float
    class_weights: Tensor | None


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
        TypeError: If `confidence` is not floating, or `threshold` is not a number.
        ValueError: If a shape, the threshold or the scope is wrong.

    Example:
        >>> confidence_weight(torch.tensor([[[0.99, 0.50]], [[0.97, 0.98]]]))
        tensor([[[0.5000, 0.5000]],
        <BLANKLINE>
                [[1.0000, 1.0000]]])
    """
    check_confidence(confidence)
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
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with a weight per pixel and a named divisor: the H of the paper's Eq. (3).

    loss = sum_p w_p * CE(logits_p, label_p) / divisor, over the pixels p that are not ignored

    Labels are class ids or soft labels: a probability for each class, such as a teacher's softmax. For these,
    CE(logits_p, y_p) = -sum_c y_pc log p_pc, as in torch, and no pixel is ignored; to leave one out, give it weight 0.

    Finite and differentiable for every degenerate batch: if no pixel counts, the loss and its gradient are 0, never
    NaN. A pixel that is ignored or has weight 0 adds exactly 0 to the loss and to the gradient of the logits, even if
    its logits are NaN or infinite; an ignored one does so whatever its weight.

    Args:
        logits: (N, C, H, W) floating; computed in float32, or in float64 where an input is float64.
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..C-1 count as ignored. Or (N, C, H, W) floating,
            probabilities that sum to 1; values are not checked.
        weights: (N, H, W) or (N,) floating, >= 0; ones if not given.
        ignore_index: The id of ignored pixels; no effect on soft labels.
        normalizer: The divisor of the mean: the number of `"all"` pixels including ignored ones (the paper, and the
            released mixed loss), of the `"valid"` ones (the released source loss, and torch), or the sum of the
            `"weights"` of the valid ones, each times the class weight of its label. With soft labels all pixels are
            valid, and the class weight of a label is sum_c y_c class_weights_c.
        label_smoothing: Share of the uniform distribution in the label, in [0, 1].
        class_weights: (C,) floating, >= 0: each class's part of the loss is multiplied by its weight, as torch's
            `weight=` does it. `normalizer="weights"` gives torch's mean of class ids, `"valid"` that of soft labels.
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
    _check_full_logits(logits, labels, weights, class_weights)
    options = _options(ignore_index, normalizer, label_smoothing, class_weights)
    check_choice("reduction", reduction, _REDUCTIONS)
    losses = _losses(logits, labels, weights, options)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else _mean(total, labels, weights, logits.shape[1], options)


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    align_corners: bool = True,
    ignore_index: int = 255,
    normalizer: Normalizer = "all",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute `weighted_cross_entropy` of smaller logits, upsampled to the size of the labels.

    Upsampling is bilinear, in float32 (float64 if an input is). It works on blocks of rows and computes the gradient of
    the small logits in the same pass, so the full-size logits never exist; on a CPU this takes a fraction of the time
    and memory of upsampling first, on a GPU a third of the memory and more time. The plain form is used where blocks
    are impossible: for `reduction="none"`, soft labels, class weights with label smoothing, the gradient of weights,
    second derivatives, forward-mode derivatives, the transforms of `torch.func`, and DTensors. On a GPU the
    interpolation is a matrix product, in TF32 if `torch.backends.cuda.matmul.allow_tf32` is set.

    Args:
        logits: (N, C, h, w) floating, of any size.
        labels: As in `weighted_cross_entropy`.
        weights: As there.
        align_corners: Interpolation convention: True as in DeepLab-v2 and the released code, False as in transformers,
            mmsegmentation and DAFormer.
        ignore_index: As there.
        normalizer: As there.
        label_smoothing: As there.
        class_weights: As there.
        reduction: As there.

    Returns:
        A scalar, or (N, H, W) at the size of the labels with `reduction="none"`; float32 or float64.

    Raises:
        TypeError: If a dtype is wrong, or `align_corners` is not a bool.
        ValueError: If batch sizes or devices disagree, the logits have no pixels, or an option is unknown.

    Example:
        >>> logits = torch.tensor([[[[0.0, 2.0]], [[2.0, 0.0]]]])
        >>> upsampled_cross_entropy(logits, torch.tensor([[[1, 0, 0]]]))
        tensor(0.3157)
    """
    _check_small_logits(logits, labels, weights, class_weights)
    options = _options(ignore_index, normalizer, label_smoothing, class_weights)
    check_choice("reduction", reduction, _REDUCTIONS)
    check_bool("align_corners", align_corners)
    if reduction == "none":
        full = _upsampled(logits, labels, weights, options, align_corners=align_corners)
        return _losses(full, labels, weights, options)
    total = _upsampled_sum(logits, labels, weights, options, align_corners=align_corners)
    return total if reduction == "sum" else _mean(total, labels, weights, logits.shape[1], options)


class ConfidenceWeightedCE(KeepsFloat32):
    """Loss on mixed images: confidence weights for target pixels, and the cross-entropy that uses them.

    Args:
        threshold: A pixel counts as confident at `confidence >= threshold`; in [0, 1].
        scope: `"image"` (the paper's lambda), `"batch"` (the released code's), `"pixel"` or `"none"`; see
            `crossmix.functional.confidence_weight`.
        ignore_index: The id of ignored pixels.
        normalizer: `"all"`, `"valid"` or `"weights"`; see `crossmix.functional.weighted_cross_entropy`.
        label_smoothing: Share of the uniform distribution in the label, in [0, 1].
        class_weights: (C,) numbers >= 0, the weights of the classes; see `crossmix.functional.weighted_cross_entropy`.
            A non-persistent buffer that stays in float32 when the module is cast to a lower precision.
        sync: Whether divisors and the batch-scope lambda are computed over the batch of all ranks. Each rank's loss is
            then scaled by the number of ranks, so that DistributedDataParallel's average of the gradients is the
            gradient of the loss of the whole batch. No effect without an initialised process group.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range or unknown.

    Example:
        >>> criterion = ConfidenceWeightedCE(scope="batch")
        >>> weights = criterion.weights(torch.tensor([[[0.99, 0.50]]]))
        >>> criterion(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]), weights)
        tensor(0.3466)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        threshold: float = 0.968,
        *,
        scope: Scope = "image",
        ignore_index: int = 255,
        normalizer: Normalizer = "all",
        label_smoothing: float = 0.0,
        class_weights: Tensor | Sequence[float] | None = None,
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_fraction("threshold", threshold)
        check_choice("scope", scope, _SCOPES)
        _options(ignore_index, normalizer, label_smoothing, None)  # checks them
        self.threshold = threshold
        self.scope: Scope = scope
        self.ignore_index = ignore_index
        self.normalizer: Normalizer = normalizer
        self.label_smoothing = label_smoothing
        check_bool("sync", sync)
        self._class_weights = numbers_of(class_weights, None, may_be_zero=True)
        self.register_buffer("class_weights", buffer_of(self._class_weights, class_weights), persistent=False)
        self.sync = sync

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restore the class weights; needed after `to_empty` on a module created on the meta device."""
        refill(self.class_weights, self._class_weights)

    def weights(self, confidence: Tensor) -> Tensor:
        """Compute (N, H, W) weights from the teacher's confidence; see `crossmix.functional.confidence_weight`."""
        check_confidence(confidence)
        return _confidence_weight(confidence, self.threshold, self.scope, sync=self.sync)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean, a scalar; arguments and errors are those of `crossmix.functional.weighted_cross_entropy`."""
        _check_full_logits(logits, labels, weights, self.class_weights)
        options = self._options()
        total = _losses(logits, labels, weights, options).sum()
        return _mean(total, labels, weights, logits.shape[1], options, sync=self.sync)

    def upsampled(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, align_corners: bool = True
    ) -> Tensor:
        """Return the same loss of smaller logits (N, C, h, w); see `crossmix.functional.upsampled_cross_entropy`."""
        options = self._options()
        _check_small_logits(logits, labels, weights, self.class_weights)
        check_bool("align_corners", align_corners)
        if type(self).forward is not ConfidenceWeightedCE.forward:  # a subclass with its own loss
            full = _upsampled(logits, labels, weights, options, align_corners=align_corners)
            loss: Tensor = self(full, labels, weights)
            return loss
        total = _upsampled_sum(logits, labels, weights, options, align_corners=align_corners)
        return _mean(total, labels, weights, logits.shape[1], options, sync=self.sync)

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return (
            f"threshold={self.threshold}, scope={self.scope!r}, ignore_index={self.ignore_index}, "
            f"normalizer={self.normalizer!r}, label_smoothing={self.label_smoothing}, "
            f"class_weights={shown(self.class_weights)}, sync={self.sync}"
        )

    def _options(self) -> _Options:
        return _Options(self.ignore_index, self.normalizer, self.label_smoothing, self.class_weights)


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


def _losses(logits: Tensor, labels: Tensor, weights: Tensor | None, options: _Options) -> Tensor:
    """Weighted losses (N, H, W) of full-size logits, for labels of either kind."""
    num_classes = logits.shape[1]
    if not _needs_factors(labels, options):
        weights = _by_class(labels, weights, num_classes, options)
        return pixel_losses(logits, labels, weights, options.ignore_index, options.label_smoothing)
    dtype = _dtype(logits, labels, weights, options)
    target = factors(
        labels,
        num_classes,
        options.class_weights,
        options.ignore_index,
        dtype=dtype,
        label_smoothing=options.label_smoothing,
    )
    valid = None if labels.is_floating_point() else valid_pixels(labels, num_classes, options.ignore_index)[1]
    return dense_losses(logits, target, weights, valid)


def _dtype(logits: Tensor, labels: Tensor, weights: Tensor | None, options: _Options) -> torch.dtype:
    return arithmetic(logits, weights, options.class_weights, labels if labels.is_floating_point() else None)


def _upsampled(
    logits: Tensor, labels: Tensor, weights: Tensor | None, options: _Options, *, align_corners: bool
) -> Tensor:
    """Upsample logits to the size of the labels, in the dtype of the loss."""
    logits = logits.to(_dtype(logits, labels, weights, options))
    return upsample_for(logits, labels, weights, align_corners=align_corners)


def _upsampled_sum(
    logits: Tensor, labels: Tensor, weights: Tensor | None, options: _Options, *, align_corners: bool
) -> Tensor:
    """The sum of the losses of smaller logits."""
    if _needs_factors(labels, options):
        full = _upsampled(logits, labels, weights, options, align_corners=align_corners)
        return _losses(full, labels, weights, options).sum()
    return upsampled_sum(
        logits,
        labels,
        _by_class(labels, weights, logits.shape[1], options),
        align_corners=align_corners,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
    )


def _needs_factors(labels: Tensor, options: _Options) -> bool:
    """Whether several classes of a pixel enter the loss with different weights."""
    return labels.is_floating_point() or (options.class_weights is not None and options.label_smoothing > 0)


def _by_class(labels: Tensor, weights: Tensor | None, num_classes: int, options: _Options) -> Tensor | None:
    """Pixel weights times the class weights of their labels."""
    if labels.is_floating_point():
        each = mass(labels, num_classes, options.class_weights, options.ignore_index)
    elif options.class_weights is None:
        return weights
    else:
        each = class_factors(labels, num_classes, options.class_weights, options.ignore_index)
    return each if weights is None else each * weight_maps(weights, each)


def _mean(
    total: Tensor, labels: Tensor, weights: Tensor | None, num_classes: int, options: _Options, *, sync: bool = False
) -> Tensor:
    divisor = _divisor(labels, weights, total, num_classes, options)
    if sync:
        return total / _positive(all_reduce_sum(divisor)) * world_size()
    return total / _positive(divisor)


def _divisor(labels: Tensor, weights: Tensor | None, total: Tensor, num_classes: int, options: _Options) -> Tensor:
    """The divisor of the mean."""
    soft = labels.is_floating_point()
    if options.normalizer == "all" or (options.normalizer == "valid" and soft):
        pixels = labels.numel() // num_classes if soft else labels.numel()
        return torch.full((), pixels, dtype=total.dtype, device=total.device)
    each = _by_class(labels, weights, num_classes, options) if options.normalizer == "weights" else None
    if soft and each is not None:
        return each.to(total.dtype).sum()
    _, valid = valid_pixels(labels, num_classes, options.ignore_index)
    if each is None:
        return valid.sum().to(total.dtype)
    return torch.where(valid, weight_maps(each, labels).to(total.dtype), 0.0).sum()


def _positive(divisor: Tensor) -> Tensor:
    """The divisor, or 1 if it is 0, in which case the numerator is 0 too."""
    return torch.where(divisor > 0, divisor, 1.0)


def _check_loss_inputs(logits: Tensor, labels: Tensor, weights: Tensor | None, class_weights: Tensor | None) -> None:
    check_logits("logits", logits)
    check_tensor("labels", labels)
    soft = labels.is_floating_point() and labels.ndim == 4
    if not soft:
        check_labels("labels", labels)
    elif labels.shape[1] != logits.shape[1]:
        want = f"(N, C, H, W) with C = {logits.shape[1]} like `logits`"
        got = tuple(labels.shape)
        raise ValueError(f"soft `labels` must have shape {want}, got {got}; pass one probability per class.")
    if len(labels) != len(logits):
        raise ValueError(f"`logits` hold {len(logits)} images but `labels` {len(labels)}; pass those of one batch.")
    if weights is not None:
        check_weights("weights", weights, (len(labels), *labels.shape[-2:]))
    if class_weights is not None:
        check_class_weights(class_weights, logits.shape[1], may_be_zero=True)
    check_same_device(logits=logits, labels=labels, weights=weights, class_weights=class_weights)


def _check_full_logits(logits: Tensor, labels: Tensor, weights: Tensor | None, class_weights: Tensor | None) -> None:
    _check_loss_inputs(logits, labels, weights, class_weights)
    size = (len(labels), *labels.shape[-2:])
    check_same_shape("labels", size, "logits", (logits.shape[0], *logits.shape[2:]))


def _check_small_logits(logits: Tensor, labels: Tensor, weights: Tensor | None, class_weights: Tensor | None) -> None:
    _check_loss_inputs(logits, labels, weights, class_weights)
    if 0 in logits.shape[2:] and 0 not in labels.shape[1:]:
        size = tuple(labels.shape[-2:])
        raise ValueError(f"`logits` must have pixels to be upsampled to {size}, got {tuple(logits.shape)}.")


def _options(
    ignore_index: int, normalizer: Normalizer, label_smoothing: float, class_weights: Tensor | None
) -> _Options:
    """The options of a loss, checked."""
    check_ignore_index(ignore_index)
    check_choice("normalizer", normalizer, _NORMALIZERS)
    check_fraction("label_smoothing", label_smoothing)
    return _Options(ignore_index, normalizer, label_smoothing, class_weights)
