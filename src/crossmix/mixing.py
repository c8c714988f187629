"""Class-wise mixing of image batches, without a loop over images and without waiting for the GPU.

ClassMix: Olsson et al., WACV 2021, https://arxiv.org/abs/2007.07936
CrossDomainMix: Tranheden et al. (DACS), WACV 2021, https://arxiv.org/abs/2007.08702
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from crossmix._checks import (
    check_fraction,
    check_images,
    check_labels,
    check_num_classes,
    check_same_device,
    check_same_shape,
    check_tensor,
)
from crossmix._tensors import uniform

__all__ = ["ClassMix", "CrossDomainMix", "Mixed", "class_mask", "mix", "sample_classes"]

PART = 1 << 18  # pixels: a megabyte of words
FIXED_BITS = 40  # 2**40 times a count of up to 2**22 classes fits an int64
FIXED = 1 << FIXED_BITS


class Mixed(NamedTuple):
    """A mixed batch: every pixel, its label and its weight come from one side together.

    Attributes:
        images: (N, C, H, W) floating.
        labels: (N, H, W) integer.
        weights: (N, H, W) float32 or float64, the loss weight of each pixel.
        mask: (N, H, W) bool, True where the pixel comes from the pasted image.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    mask: Tensor


def sample_classes(
    labels: Tensor,
    num_classes: int,
    *,
    ratio: float = 0.5,
    ignore_index: int = 255,
    include_ignored: bool = False,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw ceil(ratio * n) of the n classes present in each label map, uniformly without replacement.

    The paper draws half of the classes (section 3.1); the released code rounds up and lets the ignored pixels count as
    one more class, which `include_ignored=True` does.

    Args:
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..num_classes-1 count as ignored.
        num_classes: The number of classes C.
        ratio: Share of the present classes to draw, in [0, 1].
        ignore_index: The id of ignored pixels.
        include_ignored: Whether ignored pixels count as one more class; otherwise they are never drawn.
        scores: (N, C + 1) uniform numbers; the present classes with the lowest ones are taken, the lower id first among
            equals. Drawn when not given.
        generator: Source of the scores, drawn on its own device; None uses the global one. Cannot be traced by
            `torch.compile`: hand in `scores` there.

    Returns:
        (N, C + 1) bool on the device of `labels`; the last column stands for ignored pixels. No host sync.

    Raises:
        TypeError: If `labels` is not an accepted integer tensor.
        ValueError: If a shape, a device or the ratio is wrong.

    Example:
        >>> labels = torch.tensor([[[0, 0, 2], [2, 3, 255]]])
        >>> sample_classes(labels, 4, scores=torch.tensor([[0.9, 0.1, 0.2, 0.4, 0.0]]))
        tensor([[False, False,  True,  True, False]])
    """
    check_labels("labels", labels)
    check_num_classes(num_classes)
    check_fraction("ratio", ratio)
    scores = _scores(labels, num_classes, scores, generator)
    return _draw(_pixel_classes(labels, num_classes, ignore_index), scores, ratio, include_ignored=include_ignored)


def class_mask(labels: Tensor, classes: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mark the pixels whose class is chosen: the binary mask M of the paper's Eq. (1).

    Args:
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..C-1 count as ignored.
        classes: (N, C + 1) bool as `sample_classes` draws it; the last column stands for ignored pixels.
        ignore_index: The id of ignored pixels.

    Returns:
        (N, H, W) bool.

    Raises:
        TypeError: If `labels` is not an accepted integer tensor or `classes` is not bool.
        ValueError: If shapes or devices disagree.

    Example:
        >>> labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
        >>> class_mask(labels, torch.tensor([[False, True, False]]))
        tensor([[[False,  True],
                 [ True, False]]])
    """
    check_labels("labels", labels)
    _check_classes(classes, labels)
    return _pixel_classes(labels, classes.shape[1] - 1, ignore_index).mask(classes)


def mix(pasted: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Take `pasted` where `mask` is true and `base` elsewhere: the paper's Eq. (1) and (2).

    X_M = M * A + (1 - M) * B

    Args:
        pasted: (N, ..., H, W) of any dtype: images, labels, weights, soft labels; or (N,), one value per image.
        base: The same shape, or (N,). Two dtypes promote.
        mask: (N, H, W) bool.

    Returns:
        (N, ..., H, W).

    Raises:
        TypeError: If `mask` is not bool.
        ValueError: If shapes or devices disagree.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> mix(torch.tensor([1.0]), torch.tensor([0.5]), mask)
        tensor([[[1.0000, 0.5000]]])
    """
    for name, value in (("pasted", pasted), ("base", base), ("mask", mask)):
        check_tensor(name, value)
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, got {mask.dtype}; compare first, e.g. `mask > 0`.")
    if mask.ndim != 3:
        raise ValueError(f"`mask` must have shape (N, H, W), got {tuple(mask.shape)}; drop the channel dimension.")
    check_same_device(pasted=pasted, base=base, mask=mask)
    for name, value in (("pasted", pasted), ("base", base)):
        per_image = value.ndim == 1 and value.shape == mask.shape[:1]
        if not per_image and (value.ndim < 3 or _pixels(value) != tuple(mask.shape)):
            raise ValueError(
                f"`{name}` must have shape (N, ..., H, W) or (N,) to go with `mask` {tuple(mask.shape)}, "
                f"got {tuple(value.shape)}; crop or resize it to the mask."
            )
    if pasted.ndim >= 3 and base.ndim >= 3 and pasted.shape != base.shape:
        raise ValueError(
            f"`pasted` {tuple(pasted.shape)} and `base` {tuple(base.shape)} must have one shape; "
            "give both the same channels."
        )
    dims = max(pasted.ndim, base.ndim, 3)
    pasted, base = _broadcast(pasted, dims), _broadcast(base, dims)
    if torch.compiler.is_compiling() and mask.device.type == "cpu":
        return _mix_compiled(pasted, base, mask)
    shape = (mask.shape[0], *[1] * (dims - 3), *mask.shape[1:])
    return torch.where(mask.reshape(shape), pasted, base)


def _mix_compiled(pasted: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """The same, in a form of which the compiler makes one pass of vector code over images, labels and weights.

    The channels of an image are kept apart: with a dimension for them the pass would be one of its own, and read the
    mask back. Small integers are widened, since the compiler's masks over bytes are a loop.
    """
    contiguous = pasted.is_contiguous() and base.is_contiguous()
    if pasted.shape == base.shape and pasted.ndim == 4 and 1 <= pasted.shape[1] <= 4 and contiguous:
        channels = zip(pasted.unbind(1), base.unbind(1), strict=True)
        return torch.stack([torch.where(mask, a, b) for a, b in channels], 1)
    mask = mask.reshape(mask.shape[0], *[1] * (base.ndim - 3), *mask.shape[1:])
    dtype = torch.promote_types(pasted.dtype, base.dtype)
    if dtype in {torch.uint8, torch.int8, torch.int16}:
        return torch.where(mask, pasted.to(torch.int32), base.to(torch.int32)).to(dtype)
    return torch.where(mask, pasted, base)


def _stored(mask: Tensor) -> Tensor:
    """The mask as a result. The compiler stores bools of a CPU one by one, and what it stores it also reads back."""
    if not torch.compiler.is_compiling() or mask.device.type != "cpu":
        return mask
    one = torch.ones((), dtype=torch.int32, device=mask.device)
    return torch.where(mask, one, torch.zeros_like(one)).to(torch.uint8).view(torch.bool)


class ClassMix(nn.Module):
    """Paste half of each image's classes onto the next image of the same batch (naive ClassMix in the DACS paper).

    Image i is pasted onto image (i + 1) mod N; labels and weights are mixed under the same mask.

    Args:
        num_classes: The number of classes C.
        ratio: Share of the present classes to paste, rounded up, in [0, 1].
        ignore_index: The id of ignored pixels.
        include_ignored: Whether ignored pixels count as one more class.

    Raises:
        ValueError: If `ratio` or `num_classes` is out of range.

    Example:
        >>> images = torch.tensor([0.2, 0.8])[:, None, None, None].expand(2, 3, 1, 2)
        >>> labels = torch.tensor([[[0, 1]], [[1, 1]]])
        >>> mixed = ClassMix(2)(images, labels, scores=torch.tensor([[0.1, 0.5, 0.9], [0.5, 0.1, 0.9]]))
        >>> mixed.images[:, 0], mixed.labels
        (tensor([[[0.2000, 0.8000]],
        <BLANKLINE>
                [[0.8000, 0.8000]]]), tensor([[[0, 1]],
        <BLANKLINE>
                [[1, 1]]]))
    """

    def __init__(
        self, num_classes: int, *, ratio: float = 0.5, ignore_index: int = 255, include_ignored: bool = False
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_fraction("ratio", ratio)
        self.num_classes = num_classes
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.include_ignored = include_ignored

    def sample(self, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the classes to paste from each label map; see `crossmix.functional.sample_classes`.

        Args:
            labels: (N, H, W) integer label maps of the images that are pasted.
            generator: Source of randomness; None uses the global one.

        Returns:
            (N, C + 1) bool.
        """
        return sample_classes(
            labels,
            self.num_classes,
            ratio=self.ratio,
            ignore_index=self.ignore_index,
            include_ignored=self.include_ignored,
            generator=generator,
        )

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        scores: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mixed:
        """Mix a batch with itself.

        Args:
            images: (N, C, H, W) floating, any N.
            labels: (N, H, W) integer: pseudo-labels, or ground truth.
            weights: (N, H, W) or (N,) floating loss weights; ones when not given.
            classes: (N, num_classes + 1) bool, the classes to paste; drawn when not given.
            scores: (N, num_classes + 1) uniform numbers to draw with; see `crossmix.functional.sample_classes`.
            generator: Source of randomness; None uses the global one.

        Returns:
            The mixed batch; image i holds what is pasted from image i onto image (i + 1) mod N.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or both `classes` and `scores` are given.
        """
        check_images("images", images)
        check_labels("labels", labels)
        check_same_shape("labels", labels.shape, "images", _pixels(images))
        weights = _weights("weights", weights, images, labels)
        check_same_device(images=images, labels=labels, weights=weights)
        mask = _sample_mask(self, labels, classes, scores, generator)
        return Mixed(
            labels=mix(labels, labels.roll(-1, 0), mask),  # first, while the cache holds them
            images=mix(images, images.roll(-1, 0), mask),
            weights=mix(weights, weights.roll(-1, 0), mask),
            mask=_stored(mask),
        )

    @override
    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return _settings(self)


class CrossDomainMix(nn.Module):
    """Paste half of each source image's classes onto a target image (DACS, section 3.3).

    Source image i is pasted onto target image i, ground truth onto pseudo-labels, weight 1 onto the target's weights.

    Args:
        num_classes: The number of classes C.
        ratio: Share of the present classes to paste, rounded up, in [0, 1].
        ignore_index: The id of ignored pixels.
        include_ignored: Whether ignored source pixels count as one more class, as in the released code, where the void
            of the source can be pasted (and then carries no loss). The paper's text never draws them.

    Raises:
        ValueError: If `ratio` or `num_classes` is out of range.

    Example:
        >>> source, target = torch.ones(1, 3, 1, 3), torch.zeros(1, 3, 1, 3)
        >>> labels, pseudo_labels = torch.tensor([[[0, 1, 255]]]), torch.tensor([[[1, 1, 1]]])
        >>> mixed = CrossDomainMix(2)(
        ...     source, labels, target, pseudo_labels, torch.tensor([0.25]), scores=torch.tensor([[0.1, 0.5, 0.9]])
        ... )
        >>> mixed.images[0, 0], mixed.labels[0], mixed.weights[0]
        (tensor([[1., 0., 0.]]), tensor([[0, 1, 1]]), tensor([[1.0000, 0.2500, 0.2500]]))
    """

    def __init__(
        self, num_classes: int, *, ratio: float = 0.5, ignore_index: int = 255, include_ignored: bool = False
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_fraction("ratio", ratio)
        self.num_classes = num_classes
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.include_ignored = include_ignored

    def sample(self, source_labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the classes to paste from each source label map; see `crossmix.functional.sample_classes`.

        Args:
            source_labels: (N, H, W) integer label maps.
            generator: Source of randomness; None uses the global one.

        Returns:
            (N, C + 1) bool.
        """
        return sample_classes(
            source_labels,
            self.num_classes,
            ratio=self.ratio,
            ignore_index=self.ignore_index,
            include_ignored=self.include_ignored,
            generator=generator,
        )

    def forward(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        target_labels: Tensor,
        target_weights: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        scores: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Mixed:
        """Mix a source batch onto a target batch of the same size.

        Args:
            source_images: (N, C, H, W) floating, any N.
            source_labels: (N, H, W) integer ground truth.
            target_images: (N, C, H, W) floating.
            target_labels: (N, H, W) integer pseudo-labels; another integer dtype than the source's promotes.
            target_weights: (N, H, W) or (N,) floating loss weights of the target pixels; ones when not given.
            classes: (N, num_classes + 1) bool, the source classes to paste; drawn when not given.
            scores: (N, num_classes + 1) uniform numbers to draw with; see `crossmix.functional.sample_classes`.
            generator: Source of randomness; None uses the global one.

        Returns:
            The mixed batch; source pixels weigh 1.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or both `classes` and `scores` are given.
        """
        check_images("source_images", source_images)
        check_images("target_images", target_images)
        check_labels("source_labels", source_labels)
        check_labels("target_labels", target_labels)
        check_same_shape("target_images", target_images.shape, "source_images", source_images.shape)
        check_same_shape("source_labels", source_labels.shape, "source_images", _pixels(source_images))
        check_same_shape("target_labels", target_labels.shape, "target_images", _pixels(target_images))
        weights = _weights("target_weights", target_weights, target_images, target_labels)
        check_same_device(
            source_images=source_images,
            source_labels=source_labels,
            target_images=target_images,
            target_labels=target_labels,
            target_weights=weights,
        )
        mask = _sample_mask(self, source_labels, classes, scores, generator)
        return Mixed(
            labels=mix(source_labels, target_labels, mask),  # first, while the cache holds them
            images=mix(source_images, target_images, mask),
            weights=mix(weights.new_ones(len(weights)), weights, mask),
            mask=_stored(mask),
        )

    @override
    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return _settings(self)


class _Words:
    """Label maps as one bit per pixel in an int32: which classes occur is an OR, which pixels are chosen an AND.

    Bit c stands for class c; an ignored pixel carries a bit outside `known`. Holds up to 31 classes, and reads the maps
    in fewer passes than a scatter into a table and a gather out of it. On a CPU the pixels are taken in parts, so that
    what lies between the labels and their words stays in its cache; a compiler fuses it away. `mask` uses the words up.
    """

    def __init__(self, labels: Tensor, num_classes: int, ignore_index: int) -> None:
        pixels = labels.flatten(1)
        parts = 1 if torch.compiler.is_compiling() or labels.device.type != "cpu" else -(-pixels.numel() // PART) or 1
        self.parts = [_words(part, num_classes) for part in pixels.chunk(parts, 1)]
        known = (1 << num_classes) - 1
        if 0 <= ignore_index < num_classes:
            known &= ~(1 << ignore_index)
        self.shape = labels.shape
        self.num_classes = num_classes
        self.known = known
        self.ignored = ~known  # a negative Python int: all bits of the word that are no class

    def present(self) -> Tensor:
        """Which classes occur, (N, C + 1) bool."""
        folded, *others = self.parts
        folded = folded.clone() if others else folded
        for part in others:
            folded[:, : part.shape[1]] |= part
        # OR the map onto itself, half by half; the halves of an odd length overlap by one, which OR does not mind.
        while folded.shape[1] > 32:
            half = (folded.shape[1] + 1) // 2
            folded = folded[:, :half] | folded[:, -half:]
        return ((folded[:, None] & self._columns()[:, None]) != 0).any(2)

    def mask(self, classes: Tensor) -> Tensor:
        """Where a chosen class is, (N, H, W) bool."""
        chosen = (classes * self._columns()).sum(1).to(torch.int32)[:, None]  # bits are disjoint: the sum is an OR
        if torch.compiler.is_compiling():
            return ((self.parts[0] & chosen) != 0).reshape(self.shape)
        masks = [part.bitwise_and_(chosen).bool() for part in self.parts]  # a sixth of the time of `!= 0`
        return (torch.cat(masks, 1) if len(masks) > 1 else masks[0]).reshape(self.shape)

    def _columns(self) -> Tensor:
        """The bits of each column of a (N, C + 1) table of classes."""
        column = torch.arange(self.num_classes + 1, device=self.parts[0].device, dtype=torch.int32)
        bits = torch.bitwise_left_shift(1, column.clamp(max=31)) & self.known
        return torch.where(column == self.num_classes, self.ignored, bits)


def _words(labels: Tensor, num_classes: int) -> Tensor:
    """The bit of each label in an int32: ids beyond the classes become bit `num_classes`, negative ones bit 31."""
    if labels.dtype == torch.uint8:
        columns = labels.clamp(max=num_classes).to(torch.int32)
    else:
        columns = labels.clamp(-1, num_classes).to(torch.int32).bitwise_and_(31)  # in place on a copy; -1 & 31 is 31
    return torch.bitwise_left_shift(1, columns)


class _Indices:
    """Label maps as indices into a table of classes, for any number of classes.

    Class c has column c + 1; the first column stands for negative ids and the last one for those beyond the classes.
    """

    def __init__(self, labels: Tensor, num_classes: int, ignore_index: int) -> None:
        kind = torch.iinfo(labels.dtype)
        self.index = labels.flatten(1).clamp(max(-1, kind.min), min(num_classes, kind.max)).long() + 1
        self.labelled = torch.arange(num_classes, device=labels.device) != ignore_index
        self.shape = labels.shape
        self.num_classes = num_classes

    def present(self) -> Tensor:
        """Which classes occur, (N, C + 1) bool."""
        table = self.index.new_zeros(len(self.index), self.num_classes + 2, dtype=torch.bool)
        table = table.scatter(1, self.index, value=True)
        known = table[:, 1:-1]
        ignored = table[:, 0] | table[:, -1] | (known & ~self.labelled).any(1)
        return torch.cat([known & self.labelled, ignored[:, None]], 1)

    def mask(self, classes: Tensor) -> Tensor:
        """Where a chosen class is, (N, H, W) bool."""
        known, ignored = classes[:, :-1], classes[:, -1:]
        table = torch.cat([ignored, torch.where(self.labelled, known, ignored), ignored], 1)
        return table.gather(1, self.index).reshape(self.shape)


def _pixel_classes(labels: Tensor, num_classes: int, ignore_index: int) -> _Words | _Indices:
    form = _Words if num_classes <= 31 else _Indices
    return form(labels, num_classes, ignore_index)


def _draw(pixels: _Words | _Indices, scores: Tensor, ratio: float, *, include_ignored: bool) -> Tensor:
    """The ceil(ratio * n) present classes with the lowest scores, the lower id first among equals."""
    present = pixels.present()
    if not include_ignored:
        present = present & (torch.arange(present.shape[1], device=present.device) < pixels.num_classes)
    count = _share(present.sum(1, keepdim=True), ratio, pixels.num_classes + 1)
    order = scores.argsort(dim=1, stable=True)
    ordered = present.gather(1, order)
    return torch.zeros_like(present).scatter(1, order, ordered & (ordered.cumsum(1) <= count))


def _share(n: Tensor, ratio: float, most: int) -> Tensor:
    """math.ceil(ratio * n) for n = 0..most exactly, without double precision, which not every device has.

    Computed in fixed point. That is off where a product of doubles lies barely above a whole number; the host knows
    those n, and for most ratios there are none.
    """
    share, almost_one = int(ratio * FIXED), FIXED - 1
    count = (n * share + almost_one) >> FIXED_BITS
    for k in range(most + 1):
        off = math.ceil(ratio * k) - ((k * share + almost_one) >> FIXED_BITS)
        if off:
            count = count + off * (n == k)
    return count


def _sample_mask(
    mixer: ClassMix | CrossDomainMix,
    labels: Tensor,
    classes: Tensor | None,
    scores: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw the classes unless they are given, and mark their pixels, reading the label maps once."""
    pixels = _pixel_classes(labels, mixer.num_classes, mixer.ignore_index)
    if classes is None:
        scores = _scores(labels, mixer.num_classes, scores, generator)
        classes = _draw(pixels, scores, mixer.ratio, include_ignored=mixer.include_ignored)
    else:
        if scores is not None:
            raise ValueError("`classes` and `scores` must not both be given; `scores` draw the classes, so keep one.")
        _check_classes(classes, labels, mixer.num_classes)
    return pixels.mask(classes)


def _scores(labels: Tensor, num_classes: int, scores: Tensor | None, generator: torch.Generator | None) -> Tensor:
    shape = (len(labels), num_classes + 1)
    if scores is None:
        return uniform(shape, generator=generator, device=labels.device)
    check_tensor("scores", scores)
    if tuple(scores.shape) != shape:
        raise ValueError(
            f"`scores` must have shape (N, num_classes + 1) = {shape}, got {tuple(scores.shape)}; "
            "draw one number per image and class, and one for the ignored pixels."
        )
    check_same_device(labels=labels, scores=scores)
    return scores


def _check_classes(classes: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    check_tensor("classes", classes)
    if classes.dtype != torch.bool:
        raise TypeError(f"`classes` must be bool, got {classes.dtype}; `sample_classes` draws such a tensor.")
    columns = None if num_classes is None else num_classes + 1
    if (
        classes.ndim != 2
        or len(classes) != len(labels)
        or classes.shape[1] < 2
        or (columns is not None and classes.shape[1] != columns)
    ):
        raise ValueError(
            f"`classes` must have shape (N, num_classes + 1) = ({len(labels)}, {columns or 'C + 1'}), "
            f"got {tuple(classes.shape)}; `sample_classes` draws such a tensor."
        )
    check_same_device(labels=labels, classes=classes)


def _weights(name: str, weights: Tensor | None, images: Tensor, labels: Tensor) -> Tensor:
    """Loss weights as (N, H, W) or (N,) in float32, or in float64 where weights or, without any, images are float64."""
    if weights is None:
        return images.new_ones(len(images), dtype=torch.promote_types(torch.float32, _double(images.dtype)))
    check_tensor(name, weights)
    if not weights.is_floating_point():
        raise TypeError(f"`{name}` must be floating, got {weights.dtype}; convert with `.float()`.")
    if tuple(weights.shape) not in (tuple(labels.shape), tuple(labels.shape[:1])):  # no set: sizes may be symbolic
        raise ValueError(
            f"`{name}` must have shape (N, H, W) = {tuple(labels.shape)} or (N,), got {tuple(weights.shape)}; "
            "squeeze the channel dimension or crop it to the images."
        )
    return weights.to(torch.promote_types(torch.float32, weights.dtype))


def _double(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _pixels(value: Tensor) -> tuple[int, int, int]:
    """(N, H, W) of a tensor of shape (N, ..., H, W)."""
    return value.shape[0], value.shape[-2], value.shape[-1]


def _broadcast(value: Tensor, dims: int) -> Tensor:
    """One value per image as (N, 1, ..., 1)."""
    return value.reshape(-1, *[1] * (dims - 1)) if value.ndim == 1 else value


def _settings(mixer: ClassMix | CrossDomainMix) -> str:
    return (
        f"num_classes={mixer.num_classes}, ratio={mixer.ratio}, ignore_index={mixer.ignore_index}, "
        f"include_ignored={mixer.include_ignored}"
    )
