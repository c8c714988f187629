"""Small tensor operations shared by several modules: arithmetic dtypes, weight maps, resizing, random numbers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Device: TypeAlias = torch.device | str | None


def arithmetic(*values: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 if any input is float64, otherwise float32."""
    double = any(value is not None and value.dtype == torch.float64 for value in values)
    return torch.float64 if double else torch.float32


def at_least_float32(value: Tensor) -> Tensor:
    """A floating tensor as float32, or unchanged if it is float64."""
    return value.to(arithmetic(value))


class KeepsFloat32(nn.Module):
    """A module whose floating buffers stay in float32 when it is cast to a lower precision, which would round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype.itemsize < 4:
                self._buffers[name] = value.to(moved.device)
        return self


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off, on any device, including those without autocast, such as meta."""
    # Before torch 2.12 the compiler cannot trace whether a device has autocast. All devices that it compiles for have
    # it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known and device.type != "meta" else nullcontext()


def valid_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The labels as int64, and where they hold a class that is not ignored."""
    index = labels.long()
    return index, (index >= 0) & (index < num_classes) & (index != ignore_index)


def weight_maps(weights: Tensor, like: Tensor) -> Tensor:
    """Expand weights (N,) or (N, H, W) to (N, H, W), the shape of `like`."""
    return (weights[:, None, None] if weights.ndim == 1 else weights).expand(like.shape)


def upsample(logits: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Resize logits (N, C, h, w) bilinearly to (H, W), in float32 or float64."""
    logits = at_least_float32(logits)
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def most_probable(scores: Tensor) -> Tensor:
    """The class with the highest score, (N, H, W) int64, of (N, C, H, W); -1, which is no class, where one is NaN."""
    highest, classes = scores.max(1)  # a NaN counts as the highest
    return classes.masked_fill_(highest.isnan(), -1)


def nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Resize label maps (..., H, W) to (H', W'): each new pixel takes the old pixel under its centre.

    Readers, evaluation and pictures all use this. It matches Pillow's NEAREST, which the released code uses, exactly:
    halving keeps pixels 1, 3, 5, ...
    """
    for axis, new in zip((-2, -1), size, strict=True):
        if labels.shape[axis] != new:
            labels = labels.index_select(axis, _centres(labels.shape[axis], new).to(labels.device))
    return labels


def _centres(old: int, new: int) -> Tensor:
    """The old pixel under each new centre; accumulated in double precision as Pillow does, which decides ties."""
    steps = torch.full((new,), old / new, dtype=torch.float64, device="cpu")
    steps[:1] *= 0.5
    return steps.cumsum(0).long().clamp(max=old - 1)


def uniform(shape: Sequence[int], *, generator: torch.Generator | None, device: Device = None) -> Tensor:
    """Uniform float32 numbers in [0, 1), drawn on the generator's device and moved to `device` if given."""
    if not torch.compiler.is_compiling() and min(shape) < 0:
        raise ValueError(f"`n` must be at least 0, got {min(shape)}; pass the number of images of a batch.")
    if generator is None:
        return torch.rand(shape, dtype=torch.float32, device=device)
    if torch.compiler.is_compiling():  # without fullgraph=True this is a graph break, and the draw is made eagerly
        raise TypeError(
            "`generator` must be None inside a compiled function, since torch.compile cannot trace a torch.Generator; "
            "draw outside with `sample` and pass the result in, or pass `scores`."
        )
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {type(generator).__name__}; for a seed pass "
            "torch.Generator().manual_seed(seed)."
        )
    target = generator.device if device is None else torch.device(device)
    # Only pinned memory is copied to a GPU asynchronously. Copies to the CPU must not be: nothing would wait for them.
    pinned = generator.device.type == "cpu" and target.type == "cuda"
    numbers = torch.rand(shape, dtype=torch.float32, generator=generator, device=generator.device, pin_memory=pinned)
    return numbers.to(target, non_blocking=pinned)
