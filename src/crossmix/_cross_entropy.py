"""Cross-entropy per pixel, and its sum over upsampled logits without materialising these.

Upsampling first creates several (N, C, H, W) maps in the forward and the backward pass, more than a CPU's cache or a
small GPU holds. The sum needs none: it interpolates a block of rows, adds up its losses, and adds the block's gradient
to that of the small logits, the only tensor kept for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crossmix._tensors import arithmetic, no_autocast, upsample, valid_pixels, weight_maps


def pixel_losses(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Weighted losses (N, H, W). Ignored pixels and weights of 0 have loss and gradient 0, whatever their logits."""
    logits = logits.to(arithmetic(logits, weights))
    index, counted = valid_pixels(labels, logits.shape[1], ignore_index)
    if weights is not None:
        weights = weight_maps(weights, labels).to(logits.dtype)
        # A weight of 0 hides a loss that is not finite. A finite one stays, for it is the weight's gradient.
        counted = counted & ((weights != 0) | _has_finite_loss(logits.detach()))
    losses = functional.cross_entropy(
        logits.where(counted.unsqueeze(1), 0),  # the gradient of NaN is NaN even if multiplied by 0
        index.masked_fill(~counted, -100),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses if weights is None else losses * weights.where(counted, 0)


def upsample_for(logits: Tensor, labels: Tensor, weights: Tensor | None, *, align_corners: bool) -> Tensor:
    """Logits at the labels' size, in the dtype that the loss is computed in."""
    logits = logits.to(arithmetic(logits, weights))
    if 0 in labels.shape[-2:]:  # torch cannot upsample to an empty size; the empty sum keeps the graph
        return logits[..., :0, :0].sum().expand(*logits.shape[:2], *labels.shape[-2:])
    return upsample(logits, labels.shape[-2:], align_corners=align_corners)


def upsampled_sum(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The sum of `pixel_losses` of the upsampled logits, as a scalar."""
    if logits.shape[-2:] == labels.shape[-2:] or _needs_plain_form(logits, weights):
        full = upsample_for(logits, labels, weights, align_corners=align_corners)
        return pixel_losses(full, labels, weights, ignore_index, label_smoothing).sum()
    logits = logits.to(arithmetic(logits, weights))
    total: Tensor
    total, _ = _operator(
        logits,
        labels,
        weights,
        align_corners=align_corners,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        with_gradient=torch.is_grad_enabled() and logits.requires_grad,
    )
    return total


def sum_by_blocks(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The sum, and its gradient by the logits, (N, C, h, w), where asked (else an empty tensor).

    Powers are of 2: exp2 takes a third of the time of exp. Rows come first, so that a block is one product of matrices.
    """
    n, num_classes, small_height, small_width = logits.shape
    height, width = labels.shape[-2:]
    # Rows of a block: what a CPU's cache holds; elsewhere 16 megabytes, since each block costs as many launches.
    rows = 16 if logits.device.type == "cpu" else max(1, (1 << 22) // max(1, n * num_classes * width))
    down = _Axis.between(height, small_height, logits, align_corners=align_corners)
    across = _Axis.between(width, small_width, logits, align_corners=align_corners)
    uniform = label_smoothing / num_classes
    index, valid = valid_pixels(labels.transpose(0, 1), num_classes, ignore_index)
    index = index.where(valid, 0).unsqueeze(2)
    scale = valid if weights is None else weight_maps(weights, labels).transpose(0, 1).where(valid, 0)
    scale = scale.to(logits.dtype).unsqueeze(2)
    silent = scale == 0
    # A matrix product spreads NaN and infinity to pixels that do not depend on them, so they are replaced: -inf by a
    # very low number, which makes a loss above `limit`; the others by 0, and their pixels are marked in `broken`.
    largest = torch.finfo(logits.dtype).max
    limit = largest * 1e-12
    small = logits.nan_to_num(0.0, posinf=0.0, neginf=-largest / 4)  # TF32 rounds the very lowest number to -inf
    small = small.permute(2, 0, 1, 3)
    with no_autocast(logits.device):
        wide = across.widen(small)
        marks = [~(logits.amax(1).abs() < math.inf), logits.amin(1) == -math.inf]
        broken, ruled_out = _reached(torch.stack(marks, 1), down, across, logits.dtype).chunk(2, 2)
        scale = scale.masked_fill(broken & ~silent, math.nan)
        ceiling = torch.full_like(scale, math.inf).masked_fill(ruled_out, limit)
        slope = torch.zeros_like(wide) if with_gradient else None
        buffer = wide.new_empty(min(rows, height), n, num_classes, width)
        total = logits.new_zeros(())
        for block, near, mixing in down.blocks(rows):
            z = buffer[: len(mixing)]
            torch.mm(mixing, wide[near].flatten(1), out=z.flatten(1))
            z -= z.amax(2, keepdim=True)
            losses = (label_smoothing - 1) * z.gather(2, index[block])
            if label_smoothing:
                losses -= uniform * z.sum(2, keepdim=True)
            z *= 1 / math.log(2)  # not before subtracting the maximum: large logits would overflow
            p = z.exp2_()
            partition = p.sum(2, keepdim=True)
            losses += partition.log()
            losses.masked_fill_(losses > ceiling[block], math.inf)
            total += losses.mul_(scale[block]).masked_fill_(silent[block], 0).sum()
            if slope is not None:  # (p - label) * scale
                p *= scale[block] / partition
                if label_smoothing:
                    p -= uniform * scale[block]
                p.scatter_add_(2, index[block], (label_smoothing - 1) * scale[block])
                slope[near].flatten(1).addmm_(mixing.mT, p.flatten(1))
        if slope is None:
            return total, logits.new_empty(0)
        gradient = torch.zeros_like(small)
        for block, near, mixing in across.blocks():
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
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "with_gradient"}
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
    logits, labels, weights, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the plain form has a gradient that has one itself
        full = upsample_for(logits, labels, weights, align_corners=ctx.options["align_corners"])
        losses = pixel_losses(full, labels, weights, ctx.options["ignore_index"], ctx.options["label_smoothing"])
        (gradient,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    return grad * gradient, None, None


# A custom operator, so that `torch.compile` calls it as it is instead of unrolling the blocks.
_operator = torch.library.custom_op("crossmix::upsampled_cross_entropy_sum", sum_by_blocks, mutates_args=())
_operator.register_fake(_shapes)
_operator.register_autograd(_backward, setup_context=_save)


def _needs_plain_form(logits: Tensor, weights: Tensor | None) -> bool:
    """Whether a derivative or a tensor type is asked for that the operator does not support."""
    if torch._C._are_functorch_transforms_active():  # what `autograd.Function` asks about torch.func
        return True
    given = [logits] if weights is None else [logits, weights]
    return (
        (torch.is_grad_enabled() and weights is not None and weights.requires_grad)
        or any(forward_ad.unpack_dual(value).tangent is not None for value in given)  # type: ignore[no-untyped-call]
        or any(is_traceable_wrapper_subclass(value) for value in given)  # a DTensor
    )


def _has_finite_loss(logits: Tensor) -> Tensor:
    """Where the loss is finite for every label, smoothed or not: (N, H, W) bool."""
    return (logits.amax(1) - logits.amin(1)) * logits.shape[1] < math.inf


class _Axis(NamedTuple):
    """Linear interpolation along one axis: output i lies at input (i * stride + offset) / unit."""

    matrix: Tensor  # (outputs, inputs)
    stride: int
    offset: int
    unit: int

    @classmethod
    def between(cls, size: int, small: int, like: Tensor, *, align_corners: bool) -> "_Axis":
        """Interpolate `small` inputs to `size` outputs. Positions are integers over a unit, and so exact."""
        stride, offset, unit = (
            (small - 1, 0, max(size - 1, 1)) if align_corners else (2 * small, small - size, 2 * size)
        )
        at = (torch.arange(size, device=like.device)[:, None] * stride + offset).clamp(0, unit * (small - 1))
        distance = (at - unit * torch.arange(small, device=like.device)).abs()
        return cls((1 - distance.to(like.dtype) / unit).clamp(min=0), stride, offset, unit)

    def blocks(self, step: int | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks of outputs, the inputs they depend on, and their matrix: 128 outputs on a CPU, elsewhere all."""
        size = len(self.matrix)
        step = step or (128 if self.matrix.device.type == "cpu" else size)
        for first in range(0, size, step):
            last = min(first + step, size)
            low, high = (max(at * self.stride + self.offset, 0) // self.unit for at in (first, last - 1))
            near = slice(low, high + 2)
            yield slice(first, last), near, self.matrix[first:last, near]

    def widen(self, small: Tensor) -> Tensor:
        """Interpolate along the last axis."""
        wide = small.new_empty(*small.shape[:-1], len(self.matrix))
        for block, near, mixing in self.blocks():
            wide[..., block] = small[..., near] @ mixing.mT
        return wide


def _reached(marks: Tensor, down: _Axis, across: _Axis, dtype: torch.dtype) -> Tensor:
    """The pixels (H, N, K, W) that depend on a marked small pixel; marks are (N, K, h, w) bool."""
    wide = across.widen(marks.to(dtype).permute(2, 0, 1, 3))
    reached = marks.new_empty(len(down.matrix), *wide.shape[1:])
    for block, near, mixing in down.blocks():
        reached[block] = (mixing @ wide[near].flatten(1)).view_as(reached[block]) > 0
    return reached
