"""Evaluation as the published numbers have it: one image at a time, one confusion matrix for the data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossmix._distributed import rank, world_size
from crossmix._tensors import nearest
from crossmix._workers import QuietLoader
from crossmix.metrics import ConfusionMatrix

__all__ = ["evaluate"]

Size = tuple[int, int]


class Labelled(Protocol):
    """An image with its label map, as the readers of `crossmix.datasets` return it."""

    @property
    def image(self) -> Tensor:
        """(3, H, W) uint8."""

    @property
    def label(self) -> Tensor | None:
        """(H, W) integer train ids."""

    @property
    def name(self) -> str:
        """What errors call it."""


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Labelled:
        """The one at an index."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples | Iterable[Labelled],
    *,
    num_classes: int = 19,
    image_size: Size | None = None,
    label_sizes: Sequence[Size | None] = (None,),
    forward: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 0,
    sync: bool = False,
    ignore_index: int = 255,
) -> dict[str, ConfusionMatrix]:
    """Score a model on a labelled data set, at one or several label sizes in one pass.

    The released code scores at 512 x 1024, on labels resized to that; the older protocol, and the paper's references,
    at 1024 x 2048. With `image_size=(512, 1024)`, `label_sizes=[(512, 1024), (1024, 2048)]` and
    `forward=model.forward_features` the 1/8 logits of DeepLab-v2 are upsampled straight to each of them.

    Args:
        model: The network; evaluated in eval mode, every submodule's mode is put back afterwards.
        samples: A map-style data set, or any iterable, of items with `image` (3, H, W) uint8, `label` (H, W) and
            `name`, of any sizes.
        num_classes: The number of classes C.
        image_size: (height, width) that images are resized to, bilinear and antialiased; None leaves them.
        label_sizes: Sizes to score at, each (height, width), or None for the label's own. Labels are resized to the
            nearest pixel, logits bilinearly with align_corners=True.
        forward: What turns images into logits of any size; the model itself by default.
        device: Where to run; where the model's first parameter is, by default.
        dtype: Run the model under autocast to this dtype; logits are upsampled in float32 in any case.
        workers: Processes that read samples of a map-style data set ahead.
        sync: Share a map-style data set out over the ranks of torch.distributed, each sample to one rank, and add up
            the counts, which are then those of one process. Every rank has to call.
        ignore_index: The id of ignored pixels.

    Returns:
        A `ConfusionMatrix` on the device for each label size, by "HxW", or "native" for None.

    Raises:
        TypeError: If `samples` has no length and `workers` or `sync` need one.
        ValueError: If there are no samples, a sample has no label, or the logits have another number of classes.

    Example:
        >>> from crossmix.datasets import StreetScenes
        >>> matrices = evaluate(nn.Conv2d(3, 19, 1), StreetScenes(2), label_sizes=[None, (32, 64)])
        >>> sorted(matrices)
        ['32x64', 'native']
    """
    if device is None:
        first = next(model.parameters(), None)
        device = "cpu" if first is None else first.device
    matrices = {
        "native" if size is None else f"{size[0]}x{size[1]}": ConfusionMatrix(
            num_classes, ignore_index=ignore_index
        ).to(device)
        for size in label_sizes
    }
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        seen = 0
        for sample in _each(samples, workers, sync=sync):
            if sample.label is None:
                raise ValueError(f"{sample.name}: has no label to score against; read the data set with its labels.")
            images = _resized(sample.image[None].to(device), image_size).float() / 255
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
                logits = (model if forward is None else forward)(images)
            if logits.shape[1] != num_classes:
                raise ValueError(
                    f"`model` returned {logits.shape[1]} classes but `num_classes` is {num_classes}; make both one."
                )
            for size, matrix in zip(label_sizes, matrices.values(), strict=True):
                labels = sample.label.cpu() if size is None else nearest(sample.label.cpu(), size)
                labels = labels[None].to(device)
                matrix.update(_predict(logits, labels), labels)
            seen += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not (len(samples) if sync and isinstance(samples, Sized) else seen):
        raise ValueError("`samples` must not be empty; check the folder that they are read from.")
    if sync:
        for matrix in matrices.values():
            matrix.merge()
    return matrices


def _each(samples: Samples | Iterable[Labelled], workers: int, *, sync: bool) -> Iterator[Labelled]:
    """Items in order; a data set is indexed up to its length, since it need not stop by itself."""
    if not (hasattr(samples, "__getitem__") and isinstance(samples, Sized)):
        if workers or sync:
            raise TypeError(f"`workers` and `sync` need a data set with a length, got {type(samples).__name__}.")
        yield from samples
        return
    share = range(rank(), len(samples), world_size()) if sync else range(len(samples))
    if workers:
        yield from QuietLoader(
            samples,  # type: ignore[arg-type]
            batch_size=None,
            sampler=share,
            num_workers=workers,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
    else:
        for i in share:
            yield samples[i]


def _predict(logits: Tensor, labels: Tensor) -> Tensor:
    """Class ids at the labels' size."""
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = functional.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=True)
    return logits.argmax(1)


def _resized(images: Tensor, size: Size | None) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    if images.device.type == "cpu":
        return functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    # Only CPUs resize bytes; rounding gives the bytes that they would give.
    return functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True).round()
