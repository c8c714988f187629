"""The arithmetic of the cross-entropy: pixel by pixel, and summed over smaller logits by blocks of rows.

Upsampling the logits first makes several maps of all classes at full size, forward and backward, which neither a cache
nor a small GPU holds. The sum needs none of them: each block of rows is interpolated, its losses are added up, and its
gradient is added to that of the small logits at once, which is all that is kept for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["pixel_losses", "sum_by_blocks", "upsample", "upsampled_sum", "valid_pixels", "weight_maps"]


def valid_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The labels as int64, and where they are classes that count."""
    index = labels.long()
    return index, (index >= 0) & (index < num_classes) & (index != ignore_index)


def weight_maps(weights: Tensor, labels: Tensor) -> Tensor:
    """Weights (N,) or (N, H, W) as (N, H, W)."""
    return (weights[:, None, None] if weights.ndim == 1 else weights).expand_as(labels)


def pixel_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Weighted losses (N, H, W), 0 where ignored."""
    logits = logits.to(_arithmetic(logits, weights))
    index, valid = valid_pixels(labels, logits.shape[1], ignore_index)
    losses = functional.cross_entropy(
        logits, index.masked_fill(~valid, -100), ignore_index=-100, label_smoothing=label_smoothing, reduction="none"
    )
    return losses if weights is None else losses * weight_maps(weights, labels).to(losses.dtype)


def upsample(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Logits at the labels' size, in the dtype that the loss is computed in."""
    logits = logits.to(_arithmetic(logits, weights))
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits
    return functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)


def upsampled_sum(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The sum of `pixel_losses` of the upsampled logits, as a scalar."""
    learning = torch.is_grad_enabled()
    if logits.shape[-2:] == labels.shape[-2:] or (learning and weights is not None and weights.requires_grad):
        full = upsample(logits, labels, weights)
        return pixel_losses(full, labels, weights, ignore_index, label_smoothing).sum()
    logits = logits.to(_arithmetic(logits, weights))
    total: Tensor
    total, _ = _operator(
        logits,
        labels,
        weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        with_gradient=learning and logits.requires_grad,
    )
    return total


def sum_by_blocks(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The sum, and its gradient by the logits, (N, C, h, w), where asked (else an empty tensor).

    In base 2: exp2 takes a third of the time of exp. Rows come first, so that a block is one product of matrices.
    """
    n, num_classes, small_height, small_width = logits.shape
    height, width = labels.shape[-2:]
    rows = 16 if logits.device.type == "cpu" else 128  # of a block: what a CPU's cache holds, else few launches
    uniform = label_smoothing / num_classes
    index, valid = valid_pixels(labels.transpose(0, 1), num_classes, ignore_index)
    index = index.where(valid, 0).unsqueeze(2)
    scale = valid if weights is None else weight_maps(weights, labels).transpose(0, 1).where(valid, 0)
    scale = scale.to(logits.dtype).unsqueeze(2)
    small = logits.permute(2, 0, 1, 3) / math.log(2)
    with torch.autocast(logits.device.type, enabled=False):
        wide = small.new_empty(small_height, n, num_classes, width)
        for block, near, mixing in _bands(width, small_width, 128, logits):
            wide[..., block] = small[..., near] @ mixing.mT
        slope = torch.zeros_like(wide) if with_gradient else None
        buffer = wide.new_empty(min(rows, height), n, num_classes, width)
        total = logits.new_zeros(())
        for block, near, mixing in _bands(height, small_height, rows, logits):
            z = buffer[: len(mixing)]
            torch.mm(mixing, wide[near].flatten(1), out=z.flatten(1))
            z -= z.amax(2, keepdim=True)
            losses = (label_smoothing - 1) * z.gather(2, index[block])
            if label_smoothing:
                losses -= uniform * z.sum(2, keepdim=True)
            p = z.exp2_()
            partition = p.sum(2, keepdim=True)
            losses += partition.log2()
            total += losses.mul_(scale[block]).sum()
            if slope is not None:  # (p - label) * weight
                p *= scale[block] / partition
                if label_smoothing:
                    p -= uniform * scale[block]
                p.scatter_add_(2, index[block], (label_smoothing - 1) * scale[block])
                slope[near].flatten(1).addmm_(mixing.mT, p.flatten(1))
        total *= math.log(2)
        if slope is None:
            return total, logits.new_empty(0)
        gradient = torch.zeros_like(small)
        for block, near, mixing in _bands(width, small_width, 128, logits):
            gradient[..., near] += slope[..., block] @ mixing
        return total, gradient.permute(1, 2, 0, 3).contiguous()


def _shapes(logits: Tensor, *_: object, with_gradient: bool, **__: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty(logits.shape if with_gradient else 0)


def _save(
    ctx: Any,  # noqa: ANN401 - torch's
    inputs: tuple[Tensor, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.ignore_index, ctx.label_smoothing = keyword_only_inputs["ignore_index"], keyword_only_inputs["label_smoothing"]
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
    logits, labels, weights, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the plain form has a gradient that has one itself
        full = upsample(logits, labels, weights)
        losses = pixel_losses(full, labels, weights, ctx.ignore_index, ctx.label_smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    return grad * gradient, None, None


# An operator of its own: `torch.compile` calls it as it is, where it would unroll the blocks and undo their economy.
_operator = torch.library.custom_op("crossmix::upsampled_cross_entropy_sum", sum_by_blocks, mutates_args=())
_operator.register_fake(_shapes)
_operator.register_autograd(_backward, setup_context=_save)


def _bands(size: int, small: int, step: int, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Linear interpolation with align_corners=True by blocks: which places, of which small ones, by which matrix."""
    steps = max(size - 1, 1)
    at = torch.arange(size, device=like.device)[:, None] * (small - 1)
    distance = (at - steps * torch.arange(small, device=like.device)).abs()  # in integers: exact
    matrix = (1 - distance.to(like.dtype) / steps).clamp(min=0)
    for first in range(0, size, step):
        last = min(first + step, size)
        near = slice(first * (small - 1) // steps, (last - 1) * (small - 1) // steps + 2)
        yield slice(first, last), near, matrix[first:last, near]


def _arithmetic(*values: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 where an input is, float32 otherwise."""
    double = any(value is not None and value.dtype == torch.float64 for value in values)
    return torch.float64 if double else torch.float32
