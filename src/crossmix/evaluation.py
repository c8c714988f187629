"""Evaluation with one confusion matrix over the whole data set, as for the published numbers."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from crossmix._checks import check_labels, check_module, check_size, check_tensor, kind_of, logits_in, wrong_shape
from crossmix._distributed import rank, world_size
from crossmix._progress import shown
from crossmix._tensors import arithmetic, most_probable, nearest, upsample
from crossmix._workers import QuietLoader
from crossmix._wrappers import averaged, communicates
from crossmix.metrics import ConfusionMatrix

__all__ = ["evaluate", "resize_labels"]

LOG = logging.getLogger(__name__)
Size = tuple[int, int]
Tiles = tuple[Size, Size]  # window and stride, each (height, width)
IMAGE_KEYS = ("image", "images", "pixel_values")
LABEL_KEYS = ("label", "labels", "mask", "masks")


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> object:
        """Sample at an index."""


class Batch(NamedTuple):
    """Images of one size with their label maps."""

    images: Tensor  # (N, C, H, W) uint8, or floating in [0, 1]
    labels: Tensor  # (N, H', W')
    name: str  # used in error messages


@torch.no_grad()
def evaluate(
    network: nn.Module,
    data: Samples | Iterable[object],
    *,
    num_classes: int = 19,
    image_size: Size | None = None,
    label_sizes: Sequence[Size | None] = (None,),
    window: Size | int | None = None,
    stride: Size | int | None = None,
    flip: bool = False,
    align_corners: bool = True,
    forward: Callable[[Tensor], object] | None = None,
    logits: Callable[..., Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 0,
    sync: bool = False,
    ignore_index: int = 255,
    progress: bool = False,
) -> dict[str, ConfusionMatrix]:
    """Score a network on labelled data, at one or several label sizes in one pass.

    The released code scores at 512 x 1024, on resized labels; the older protocol, and the paper's references, score at
    1024 x 2048. With `image_size=(512, 1024)`, `label_sizes=[(512, 1024), (1024, 2048)]` and
    `forward=network.forward_features`, the 1/8 logits of DeepLab-v2 are upsampled straight to each size.

    Args:
        network: The network, or a `MeanTeacher` or other averaged model, whose `module` is then scored. It runs in eval
            mode; the mode of every submodule is restored afterwards.
        data: A map-style data set or any iterable, of single images or of batches, as from a `DataLoader`. Items have
            `image`, `label` and optionally `name` attributes, or are (image, label, ...) sequences, or dicts with
            "image", "images" or "pixel_values" and "label", "labels", "mask" or "masks".
            Images are (C, H, W) or (N, C, H, W), uint8, or floating as the network expects them; labels are (H, W) or
            (N, H, W), of any size.
        num_classes: The number of classes C.
        image_size: (height, width) to resize images to, bilinear and antialiased; None keeps their size.
        label_sizes: Sizes to score at, each (height, width), or None for the label's own. Labels are resized by nearest
            neighbour, logits bilinearly.
        window: (height, width), or one number for both: run the network on sliding windows of this size and average
            the probabilities where they overlap. With None, or if the window covers the image, it sees whole images.
        stride: Likewise, between windows; the last ones end with the image. Two thirds of the window by default.
        flip: Whether to average the probabilities with those of the mirrored image.
        align_corners: Convention for upsampling logits: True as in DeepLab, False as in transformers and
            mmsegmentation.
        forward: Called instead of the network, if given.
        logits: Extracts the logits from the network's output if that is not a tensor: `lambda out: out["out"]`.
        device: Device to run on; by default that of the network's first parameter.
        dtype: Run the network under autocast to this dtype; logits are upsampled in float32 in any case.
        workers: Number of processes that read samples of a map-style data set in advance.
        sync: Split a map-style data set over the ranks of torch.distributed and sum the counts, so that the result
            equals that of one process. Every rank has to call. If the network communicates (DDP, FSDP), all ranks make
            equally many forward passes: `forward` may be called once more, for a result that is not used, and with
            `window` the images must have one size.
        ignore_index: The id of ignored pixels.
        progress: Whether the first rank shows progress on stderr: a bar on a terminal with tqdm, otherwise lines.

    Returns:
        One `ConfusionMatrix` on the device per label size, keyed by "HxW", or "native" for None. If no pixel has a
        label, its scores are NaN, and a warning is logged.

    Raises:
        TypeError: If the network does not return a tensor, an item or a size has another form, or `workers` or `sync`
            is given but `data` is not map-style.
        ValueError: If there is no data, an image or the whole folder has no labels, a label on the CPU is neither a
            class nor `ignore_index`, the logits have another number of classes, or they are NaN at a labelled pixel (on
            a GPU, the matrix's `compute` raises this).

    Example:
        >>> from crossmix.datasets import StreetScenes
        >>> matrices = evaluate(nn.Conv2d(3, 19, 1), StreetScenes(2), label_sizes=[None, (32, 64)])
        >>> sorted(matrices)
        ['32x64', 'native']
    """
    check_module("network", network)
    sizes = _named(label_sizes)
    tiles = _tiles(window, stride)
    image_size = None if image_size is None else check_size("image_size", image_size)
    _refuse_unlabelled(data)
    inner = averaged(network)  # a teacher's forward has modes of its own
    network = network if inner is None else inner
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
    device = like.device if device is None else device
    with torch.inference_mode(mode=False):  # so that they can be updated outside of it as well
        matrices = {name: ConfusionMatrix(num_classes, ignore_index=ignore_index).to(device) for name in sizes}

    def run(images: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            out = (network if forward is None else forward)(images)
        return _logits(out if logits is None else logits(out), len(images), num_classes)

    def views(images: Tensor) -> tuple[list[Tensor], bool]:
        """Scores of the images and, turned back, of the mirrored ones; and whether these are probabilities."""
        images = _unit(_resized(images.to(device), image_size)).to(like.dtype)
        parts = _parts(tiles, images)
        found = [_view(run, images, parts, num_classes, align_corners=align_corners)]
        if flip:
            found.append(_view(run, images.flip(-1), parts, num_classes, align_corners=align_corners).flip(-1))
        return found, parts is not None

    seen = items = 0
    with _eval_mode(network):
        for item in _each(data, workers, sync=sync, progress=progress):
            batch = _batch(item, rank() + items * world_size() if sync else seen)
            _check_ids(batch, num_classes, ignore_index)
            found, soft = views(batch.images)
            for name, size in sizes.items():
                labels = (batch.labels if size is None else nearest(batch.labels, size)).to(device)
                scores = [upsample(view, labels.shape[-2:], align_corners=align_corners) for view in found]
                matrices[name].update(_classes(scores, soft=soft), labels)
            seen += len(batch.images)
            items += 1
        if sync and _is_map_style(data) and items < -(-len(data) // world_size()) and communicates(network):
            # The other ranks wait for this one's share of their last forward pass.
            views(_batch(data[0], 0).images)
    if not (_length(data) if sync else seen):
        raise ValueError("`data` must not be empty; check the folder that it is read from.")
    _conclude(matrices, seen, sync=sync)
    return matrices


def _conclude(matrices: dict[str, ConfusionMatrix], seen: int, *, sync: bool) -> None:
    """Sum the counts of all ranks, or warn if there are none."""
    if sync:
        for matrix in matrices.values():
            matrix.merge()
    elif not any(matrix.counts.any() for matrix in matrices.values()):  # with `sync`, one rank's share may have none
        LOG.warning("no pixel of the %d images has a label, so all scores are NaN; check the label maps.", seen)


def resize_labels(labels: Tensor, size: Size) -> Tensor:
    """Resize label maps by nearest neighbour, as the readers and `evaluate` do.

    Each new pixel takes the old pixel under its centre. This matches Pillow's NEAREST exactly, unlike PyTorch's
    "nearest", which picks other pixels.

    Args:
        labels: (..., H, W) of any dtype.
        size: (height, width).

    Returns:
        (..., height, width).

    Raises:
        TypeError: If `labels` is not a tensor, or `size` not two ints.
        ValueError: If `labels` has no pixels or fewer than two dimensions, or a size is not positive.

    Example:
        >>> resize_labels(torch.arange(6)[None], (1, 3))
        tensor([[1, 3, 5]])
    """
    check_tensor("labels", labels)
    size = check_size("size", size)
    if labels.ndim < 2 or 0 in labels.shape[-2:]:
        raise wrong_shape("labels", "(..., H, W)", labels, "pass maps with at least one pixel")
    return nearest(labels, size)


def _named(sizes: Sequence[Size | None]) -> dict[str, Size | None]:
    """Label sizes by name, without duplicates."""
    if not sizes:
        raise ValueError("`label_sizes` must not be empty; [None] scores at the labels' own size.")
    if any(isinstance(size, int) for size in sizes):
        raise TypeError(f"`label_sizes` must be a list of (height, width) or None, got {sizes!r}.")
    pairs = [None if size is None else check_size("label_sizes", size) for size in sizes]
    return {"native" if size is None else f"{size[0]}x{size[1]}": size for size in pairs}


@contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and restore the mode of every submodule afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_unlabelled(data: object) -> None:
    """Refuse a folder read without label maps, also inside a `Subset` or a `DataLoader`."""
    while hasattr(data, "dataset"):
        data = data.dataset
    if getattr(data, "labelled", True) is False:
        kind = type(data).__name__
        raise ValueError(f"`data` has no label maps to score against, got a {kind} of images only; read its labels.")


def _each(data: Samples | Iterable[object], workers: int, *, sync: bool, progress: bool) -> Iterator[object]:
    """The items of this rank, with progress shown if asked for."""
    items: Iterable[object] = data  # type: ignore[assignment]
    total = _length(data)
    if _is_map_style(data):
        share = range(rank(), len(data), world_size()) if sync else range(len(data))
        items, total = _indexed(data, share, workers), len(share)
    elif workers or sync:
        hint = "; pass its `dataset`" if isinstance(data, DataLoader) else ""
        raise TypeError(f"`workers` and `sync` need a map-style data set, got {type(data).__name__}{hint}.")
    yield from shown(items, total, "evaluating", "item") if progress and rank() == 0 else items


def _length(data: object) -> int | None:
    """The number of items; None if unknown, as for a `DataLoader` of an `IterableDataset` without a length."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_map_style(data: Samples | Iterable[object]) -> TypeGuard[Samples]:
    """Whether items have indices. An `IterableDataset` inherits `__getitem__` but does not implement it."""
    return hasattr(data, "__getitem__") and _length(data) is not None and not isinstance(data, IterableDataset)


def _indexed(data: Samples, share: range, workers: int) -> Iterator[object]:
    """Items of a data set in order, up to its length; plain iteration need not stop there."""
    if workers:
        yield from QuietLoader(
            data,  # type: ignore[arg-type]
            batch_size=None,
            sampler=share,
            num_workers=workers,
            collate_fn=nn.Identity(),
            generator=torch.Generator(),  # otherwise the loader draws from the global one
        )
    else:
        for i in share:
            yield data[i]


def _batch(item: object, index: int) -> Batch:
    """Convert an item of any supported form, single or batched, to a batch."""
    name = f"item {index}"
    if isinstance(item, Mapping):
        image, label = (next((item[key] for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
        found = f"a dict with keys {', '.join(map(repr, item))}"
    elif hasattr(item, "image") and hasattr(item, "label"):
        image, label, found = item.image, item.label, type(item).__name__
        given = getattr(item, "name", name)
        name = given if isinstance(given, str) else f"the batch starting at {name}"
    elif isinstance(item, Sequence) and len(item) > 1:
        image, label, found = item[0], item[1], type(item).__name__
    else:
        image, label, found = None, None, type(item).__name__
    if image is None:
        kinds = "items with `image` and `label` attributes, (image, label), or dicts with these keys"
        raise TypeError(f"`data` must hold {kinds}, got {found}; convert the items.")
    if label is None:
        raise ValueError(f"{name}: has no label to score against; read the data set with its labels.")
    check_tensor("image", image)
    check_tensor("label", label)
    images = image[None] if image.ndim == 3 else image
    labels = label[None] if label.ndim == 2 else label
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = f"{tuple(image.shape)} {image.dtype}"
        raise ValueError(f"{name}: an image must be (C, H, W), a batch (N, C, H, W), uint8 or floating, got {got}.")
    check_labels("label", labels)
    if images.shape[-1] == 3 and images.shape[1:3] == labels.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"{name}: an image must be (C, H, W), a batch (N, C, H, W), got {tuple(image.shape)}; move the channels to "
            "the front, with `.movedim(-1, -3)`."
        )
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images and {len(labels)} label maps must be equally many.")
    return Batch(images, labels, name)


def _check_ids(batch: Batch, num_classes: int, ignore_index: int) -> None:
    """Refuse ids that would silently be ignored. Skipped on a GPU, where it would sync."""
    if batch.labels.device.type != "cpu" or not batch.labels.numel():
        return
    ignored = batch.labels.long() == ignore_index  # uint8 compares modulo 256: 156 would equal -100
    low, high = map(int, batch.labels.masked_fill(ignored, 0).aminmax())
    if low < 0 or high >= num_classes:
        ids = f"0..{num_classes - 1} or be {ignore_index}, got {low if low < 0 else high}"
        hint = "map them, or pass another `num_classes` or `ignore_index`"
        raise ValueError(f"{batch.name}: label ids must lie in {ids}; {hint}.")


def _logits(out: object, n: int, num_classes: int) -> Tensor:
    """Check that a network's output is logits, and return it."""
    if not isinstance(out, Tensor):
        access = (logits_in(out, "out") or "out.logits").replace("'", '"')
        raise TypeError(
            f"`network` must return logits as a tensor, got {kind_of(out)}; "
            f"extract them: `logits=lambda out: {access}`."
        )
    if out.ndim != 4 or len(out) != n:
        raise ValueError(f"`network` must return logits of shape (N, C, H, W) with N = {n}, got {tuple(out.shape)}.")
    if out.shape[1] != num_classes:
        raise ValueError(f"`network` returned {out.shape[1]} classes but `num_classes` is {num_classes}.")
    return out


def _view(
    run: Callable[[Tensor], Tensor], images: Tensor, tiles: Tiles | None, num_classes: int, *, align_corners: bool
) -> Tensor:
    """Logits of whole images, of any size; or with tiles, mean probabilities over windows, of the images' size."""
    if tiles is None:
        return run(images)
    (height, width), (down, across) = tiles
    size = images.shape[-2:]
    total = images.new_zeros(len(images), num_classes, *size, dtype=arithmetic(images))
    count = images.new_zeros(size, dtype=total.dtype)
    for rows in _spans(size[0], height, down):
        for columns in _spans(size[1], width, across):
            part = images[..., rows, columns]
            total[..., rows, columns] += upsample(run(part), part.shape[-2:], align_corners=align_corners).softmax(1)
            count[rows, columns] += 1
    return total.div_(count)


def _classes(scores: list[Tensor], *, soft: bool) -> Tensor:
    """The most probable class by one set of scores, or by the mean probabilities of two; -1 for NaN."""
    if len(scores) == 1:
        return most_probable(scores[0])
    probs = scores if soft else [one.softmax(1) for one in scores]
    return most_probable(torch.add(*probs))


def _spans(length: int, window: int, stride: int) -> Iterator[slice]:
    """Windows along one side; the last one is moved back to end with the image."""
    last = max(length - window, 0)
    for start in (*range(0, last, stride), last):
        yield slice(start, start + window)


def _tiles(window: Size | int | None, stride: Size | int | None) -> Tiles | None:
    """Check window and stride."""
    if window is None:
        if stride is not None:
            raise ValueError(f"`stride` belongs to a `window`, got {stride} without one; pass both.")
        return None
    height, width = check_size("window", (window, window) if hasattr(window, "__index__") else window)
    if stride is None:
        stride = (max(1, 2 * height // 3), max(1, 2 * width // 3))
    down, across = check_size("stride", (stride, stride) if hasattr(stride, "__index__") else stride)
    if down > height or across > width:
        hint = "pixels between windows would get no prediction"
        raise ValueError(f"`stride` must not exceed `window`, got {stride} and {window}; {hint}.")
    return (height, width), (down, across)


def _parts(tiles: Tiles | None, images: Tensor) -> Tiles | None:
    """Window and stride for these images; None if one window covers them."""
    if tiles is not None and tiles[0][0] >= images.shape[-2] and tiles[0][1] >= images.shape[-1]:
        return None
    return tiles


def _unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float in [0, 1]; return floating ones as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _resized(images: Tensor, size: Size | None) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    if images.device.type != "cpu" and not images.is_floating_point():
        # Only the CPU resizes uint8; elsewhere resize in float and round, which gives the same values.
        resized = functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return resized.round().to(torch.uint8)
    return functional.interpolate(images, size=size, mode="bilinear", antialias=True)
