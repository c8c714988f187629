"""Cross-entropy with soft labels, and with class weights and label smoothing.

Here each class of each pixel has its own factor, whereas `_cross_entropy` handles one label per pixel.
"""

import math

import torch
from torch import Tensor

from crossmix._tensors import arithmetic, valid_pixels, weight_maps


def mass(labels: Tensor, num_classes: int, class_weights: Tensor | None, ignore_index: int) -> Tensor:
    """The sum over classes of each pixel's soft label times the class weights, (N, H, W)."""
    dtype = arithmetic(labels, class_weights)
    total = factors(labels, num_classes, class_weights, ignore_index, dtype=dtype).sum(1)
    return total.where(total.isfinite(), 0)  # otherwise the loss is NaN anyway, unless the pixel has weight 0


def class_factors(labels: Tensor, num_classes: int, class_weights: Tensor, ignore_index: int) -> Tensor:
    """The class weight of each pixel's label, (N, H, W), 0 if ignored."""
    index, valid = valid_pixels(labels, num_classes, ignore_index)
    return class_weights.to(arithmetic(class_weights))[index.where(valid, 0)].where(valid, 0)


def factors(
    labels: Tensor,
    num_classes: int,
    class_weights: Tensor | None,
    ignore_index: int,
    *,
    dtype: torch.dtype,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The factors of -log p per class, (N, C, H, W): the smoothed label times the class weight.

    For ignored pixels of integer labels they are 0 before smoothing.
    """
    if labels.is_floating_point():
        target = labels.to(dtype)
    else:
        index, valid = valid_pixels(labels, num_classes, ignore_index)
        classes = torch.arange(num_classes, device=labels.device)[:, None, None]
        target = ((index.unsqueeze(1) == classes) & valid.unsqueeze(1)).to(dtype)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / num_classes
    return target if class_weights is None else target * class_weights.to(dtype)[:, None, None]


def dense_losses(logits: Tensor, target: Tensor, weights: Tensor | None, valid: Tensor | None = None) -> Tensor:
    """Weighted losses (N, H, W) for factors (N, C, H, W), like `pixel_losses` for labels.

    Loss and gradient are exactly 0 for pixels that are not valid or have weight 0, even with NaN or infinite logits.
    """
    dtype = arithmetic(logits, target, weights)
    logits, target, counted = logits.to(dtype), target.to(dtype), valid
    if weights is not None:
        weights = weight_maps(weights, target[:, 0]).to(dtype)
        # A weight of 0 hides a loss that is not finite. A finite one stays, for it is the weight's gradient.
        most = (logits.detach().amax(1) - logits.detach().amin(1) + logits.shape[1]) * target.detach().abs().sum(1)
        heard = (weights != 0) | (most < math.inf)
        counted = heard if valid is None else valid & heard
        weights = weights.where(counted, 0)
    if counted is not None:
        logits, target = (value.where(counted.unsqueeze(1), 0) for value in (logits, target))
    log_probs = logits.log_softmax(1)
    # A class with probability 0 and factor 0 contributes nothing; 0 * inf would be NaN.
    log_probs = log_probs.masked_fill((log_probs == -math.inf) & (target == 0), 0)
    losses = -(target * log_probs).sum(1)
    return losses if weights is None else losses * weights
