"""Class-wise mixing of image batches, without a loop over images and without host syncs.

ClassMix: Olsson et al., WACV 2021, https://arxiv.org/abs/2007.07936
CrossDomainMix: Tranheden et al. (DACS), WACV 2021, https://arxiv.org/abs/2007.08702
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from crossmix._checks import (
    check_choice,
    check_class_weights,
    check_fraction,
    check_ignore_index,
    check_images,
    check_labels,
    check_num_classes,
    check_same_device,
    check_same_shape,
    check_tensor,
    check_weights,
    wrong_shape,
)
from crossmix._class_codes import Indices, Words, class_codes
from crossmix._class_weights import buffer_of, numbers_of, refill, shown
from crossmix._compiled import stored, where
from crossmix._tensors import Device, KeepsFloat32, arithmetic, at_least_float32, uniform

__all__ = ["ClassMix", "CrossDomainMix", "MaskSource", "Mixed", "class_mask", "mix", "sample_classes"]

FIXED_BITS = 40  # 2**40 times a count of up to 2**22 classes fits an int64
FIXED = 1 << FIXED_BITS
Rounding = Literal["ceil", "floor"]
Size = tuple[int, int]


class Mixed(NamedTuple):
    """A mixed batch, in which each pixel, its label and its weight come from the same image.

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


class _DrawOptions(NamedTuple):
    """The options of a draw of classes."""

    ratio: float
    include_ignored: bool
    rounding: Rounding
    whole_batch: bool
    class_weights: Tensor | None


class MaskSource(Protocol):
    """A source of masks other than classes: `BoxMasks`, `CowMasks`, or any object with these two methods."""

    def sample(
        self, n: int, size: Size | None, /, *, generator: Generator | None = None, device: Device = None
    ) -> Tensor:
        """Draw all randomness of n masks of size (H, W) as one tensor with a row per mask.

        `generator` draws on its own device; None is the global one. `device` is that of the result, by default the
        generator's, or torch's default one.
        """

    def __call__(self, scores: Tensor, size: Size, /) -> Tensor:
        """Turn such rows into (N, H, W) bool masks, each from its own row only and without a host sync."""


def sample_classes(
    labels: Tensor,
    num_classes: int,
    *,
    ratio: float = 0.5,
    ignore_index: int = 255,
    include_ignored: bool = False,
    rounding: Rounding = "ceil",
    whole_batch: bool = False,
    class_weights: Tensor | None = None,
    scores: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draw ceil(ratio * n) of the n classes present in each label map, uniformly without replacement.

    The paper draws half of the classes (section 3.1). The released code rounds up and counts ignored pixels as one more
    class (`include_ignored=True`). ClassMix rounds down (`rounding="floor"`); DAFormer and MIC draw from the classes of
    the whole batch (`whole_batch=True`).

    With `class_weights`, the classes with the lowest -log(1 - scores) / class_weights are drawn: each draw picks one of
    the remaining classes with probability proportional to its weight.

    Args:
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..num_classes-1 count as ignored.
        num_classes: The number of classes C.
        ratio: Share of the present classes to draw, in [0, 1].
        ignore_index: The id of ignored pixels.
        include_ignored: Whether ignored pixels count as one more class; otherwise they are never drawn.
        rounding: `"ceil"` rounds the number of drawn classes up, `"floor"` down: of a single class, never half.
        whole_batch: Whether each image draws, independently, from the classes present anywhere in the batch (of its
            rank). A drawn class that an image lacks marks nothing.
        class_weights: (C,) floating, positive: relative odds of the classes; equal odds if not given. Ignored pixels,
            where they count as a class, get the mean weight.
        scores: (N, C + 1) uniform numbers, drawn if not given. The present classes with the lowest scores are drawn;
            ties go to the lower id.
        generator: Generator of the scores, used on its own device; None uses the global one. `torch.compile` cannot
            trace it: pass `scores` there.

    Returns:
        (N, C + 1) bool on the device of `labels`; the last column stands for ignored pixels. No host sync.

    Raises:
        TypeError: If `labels` is not an accepted integer tensor, `scores` are complex or bool, `class_weights` is not
            floating, or `ratio` is not a number.
        ValueError: If a shape, a device, the ratio or the rounding is wrong, or a weight on the CPU is not positive.

    Example:
        >>> labels = torch.tensor([[[0, 0, 2], [2, 3, 255]]])
        >>> sample_classes(labels, 4, scores=torch.tensor([[0.9, 0.1, 0.2, 0.4, 0.0]]))
        tensor([[False, False,  True,  True, False]])
    """
    check_labels("labels", labels)
    check_num_classes(num_classes)
    check_fraction("ratio", ratio)
    check_ignore_index(ignore_index)
    check_choice("rounding", rounding, ("ceil", "floor"))
    if class_weights is not None:
        check_class_weights(class_weights, num_classes)
    codes, scores = class_codes(labels, num_classes, ignore_index), _scores(labels, num_classes, scores, generator)
    return _draw(codes, scores, _DrawOptions(ratio, include_ignored, rounding, whole_batch, class_weights))


def class_mask(labels: Tensor, classes: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mark the pixels whose class was drawn: the binary mask M of the paper's Eq. (1).

    Args:
        labels: (N, H, W) uint8, int16, int32 or int64. Ids outside 0..C-1 count as ignored.
        classes: (N, C + 1) bool, from `sample_classes`; the last column stands for ignored pixels.
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
    check_ignore_index(ignore_index)
    _check_classes(classes, labels)
    return class_codes(labels, classes.shape[1] - 1, ignore_index).mask(classes)


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
    check_tensor("pasted", pasted)
    check_tensor("base", base)
    _check_bool("mask", mask)
    if mask.ndim != 3:
        raise wrong_shape("mask", "(N, H, W)", mask, "drop the channel dimension")
    check_same_device(pasted=pasted, base=base, mask=mask)
    for name, value in (("pasted", pasted), ("base", base)):
        per_image = value.ndim == 1 and value.shape == mask.shape[:1]
        if not per_image and (value.ndim < 3 or _pixels(value) != tuple(mask.shape)):
            want = f"(N, ..., H, W) or (N,) to match `mask` {tuple(mask.shape)}"
            raise wrong_shape(name, want, value, "crop or resize it to the mask")
    if pasted.ndim >= 3 and base.ndim >= 3 and pasted.shape != base.shape:
        shapes = f"`pasted` {tuple(pasted.shape)} and `base` {tuple(base.shape)}"
        raise ValueError(f"{shapes} must have the same shape; check their channels.")
    dims = max(pasted.ndim, base.ndim, 3)
    pasted, base = _broadcast(pasted, dims), _broadcast(base, dims)
    if torch.compiler.is_compiling() and mask.device.type == "cpu":
        return where(mask, pasted, base)
    shape = (mask.shape[0], *[1] * (dims - 3), *mask.shape[1:])
    return torch.where(mask.reshape(shape), pasted, base)


class _Mix(KeepsFloat32):
    """Options and masks shared by `ClassMix` and `CrossDomainMix`."""

    class_weights: Tensor | None
    masks: Any  # a MaskSource; Any keeps the attributes of the given object accessible

    def __init__(
        self,
        num_classes: int,
        *,
        ratio: float = 0.5,
        ignore_index: int = 255,
        include_ignored: bool = False,
        rounding: Rounding = "ceil",
        whole_batch: bool = False,
        class_weights: Tensor | Sequence[float] | None = None,
        masks: MaskSource | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_fraction("ratio", ratio)
        check_ignore_index(ignore_index)
        check_choice("rounding", rounding, ("ceil", "floor"))
        _check_masks(masks)
        if masks is not None and class_weights is not None:
            raise ValueError("`class_weights` and `masks` must not both be given; `masks` replace the drawn classes.")
        self.num_classes = num_classes
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.include_ignored = include_ignored
        self.rounding = rounding
        self.whole_batch = whole_batch
        self._class_weights = numbers_of(class_weights, num_classes)
        self.register_buffer("class_weights", buffer_of(self._class_weights, class_weights), persistent=False)
        self.masks = masks

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restore the class weights; needed after `to_empty` on a module created on the meta device."""
        refill(self.class_weights, self._class_weights)

    def sample_scores(
        self, n: int, size: Size | None = None, *, generator: Generator | None = None, device: Device = None
    ) -> Tensor:
        """Draw all randomness of `forward` as one tensor, independently of images and labels; see `MaskSource.sample`.

        Returns:
            (n, C + 1) uniform numbers for `forward(scores=...)`, or the result of `masks.sample`, which has n rows and
            may need the `size` (H, W) of the images.
        """
        if self.masks is None:
            return uniform((n, self.num_classes + 1), generator=generator, device=device)
        scores: Tensor = self.masks.sample(n, size, generator=generator, device=device)
        return scores

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        return (
            f"num_classes={self.num_classes}, ratio={self.ratio}, ignore_index={self.ignore_index}, "
            f"include_ignored={self.include_ignored}, rounding={self.rounding!r}, whole_batch={self.whole_batch}, "
            f"class_weights={shown(self.class_weights)}"
        )

    def _sample(self, labels: Tensor, generator: Generator | None) -> Tensor:
        """Draw the classes to paste."""
        check_labels("labels", labels)
        if self.masks is not None:
            raise ValueError("`sample` draws classes, but this mix uses `masks` instead; use `sample_scores` for them.")
        codes = class_codes(labels, self.num_classes, self.ignore_index)
        return self._draw(codes, _scores(labels, self.num_classes, None, generator))

    def _draw(self, codes: Words | Indices, scores: Tensor) -> Tensor:
        options = _DrawOptions(self.ratio, self.include_ignored, self.rounding, self.whole_batch, self.class_weights)
        return _draw(codes, scores, options)

    def _mask(
        self,
        labels: Tensor,
        classes: Tensor | None,
        scores: Tensor | None,
        mask: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """The mask to paste with, given or drawn. With classes, the label maps are read only once."""
        given = [f"`{k}`" for k, v in {"classes": classes, "scores": scores, "mask": mask}.items() if v is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} must not both be given, as each defines the mask; keep one.")
        if mask is not None:
            return _checked_mask("mask", mask, labels)
        if self.masks is not None:
            if classes is not None:
                raise ValueError("`classes` must be None, since this mix uses `masks` instead; pass `scores`.")
            size = (labels.shape[1], labels.shape[2])
            if scores is None:
                scores = self.masks.sample(len(labels), size, generator=generator, device=labels.device)
            return _checked_mask("masks(scores, size)", self.masks(scores, size), labels)
        codes = class_codes(labels, self.num_classes, self.ignore_index)
        if classes is None:
            classes = self._draw(codes, _scores(labels, self.num_classes, scores, generator))
        else:
            _check_classes(classes, labels, self.num_classes)
        return codes.mask(classes)


class ClassMix(_Mix):
    """Paste half of each image's classes onto the next image of the same batch (naive ClassMix in the DACS paper).

    Image i is pasted onto image (i + 1) mod N; labels and weights are mixed under the same mask. The arguments are
    those of `CrossDomainMix`. The authors of ClassMix round the number of classes down: `rounding="floor"`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

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

    def sample(self, labels: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Draw the classes to paste from each label map; see `crossmix.functional.sample_classes`.

        Raises:
            ValueError: If this mix uses `masks` instead of classes.
        """
        return self._sample(labels, generator)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        *,
        classes: Tensor | None = None,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Mixed:
        """Mix a batch with itself; image i of the result is image i pasted onto image (i + 1) mod N.

        `images` are (N, C, H, W) floating, any N, `labels` (N, H, W) integer pseudo-labels or ground truth, `weights`
        (N, H, W) or (N,) floating, ones if not given. For the other arguments and errors see `CrossDomainMix.forward`.
        """
        check_images("images", images)
        check_labels("labels", labels)
        check_same_shape("labels", labels.shape, "images", _pixels(images))
        weights = _weights("weights", weights, images, labels)
        check_same_device(images=images, labels=labels, weights=weights)
        mask = self._mask(labels, classes, scores, mask, generator)
        batch = (images, labels, weights)
        return _mixed(batch, [value.roll(-1, 0) for value in batch], mask)


class CrossDomainMix(_Mix):
    """Paste half of each source image's classes onto a target image (DACS, section 3.3).

    Source image i is pasted onto target image i, ground truth onto pseudo-labels, weight 1 onto the target's weights.

    Args:
        num_classes: The number of classes C.
        ratio: Share of the present classes to paste, in [0, 1].
        ignore_index: The id of ignored pixels.
        include_ignored: Whether ignored pixels count as one more class, as in the released code: ignored source pixels
            can then be pasted (and carry no loss). The paper's text never draws them.
        rounding: Whether to round the number of pasted classes up, `"ceil"`, or down, `"floor"`.
        whole_batch: Whether to draw from the classes of the whole batch instead of the image's own (DAFormer, MIC).
        class_weights: (C,) positive relative odds of the classes, for example larger ones for rare classes; equal if
            not given. Ignored pixels, where they count as a class, get the mean weight. Held in a non-persistent buffer
            that stays in float32 when the module is cast to a lower precision.
        masks: A source of masks other than classes: `BoxMasks`, `CowMasks`, or any `MaskSource`. The options that
            choose classes then have no effect, and ignored pixels are pasted like all others.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> source, target = torch.ones(1, 3, 1, 3), torch.zeros(1, 3, 1, 3)
        >>> labels, pseudo_labels = torch.tensor([[[0, 1, 255]]]), torch.tensor([[[1, 1, 1]]])
        >>> mixed = CrossDomainMix(2)(
        ...     source, labels, target, pseudo_labels, torch.tensor([0.25]), scores=torch.tensor([[0.1, 0.5, 0.9]])
        ... )
        >>> mixed.images[0, 0], mixed.labels[0], mixed.weights[0]
        (tensor([[1., 0., 0.]]), tensor([[0, 1, 1]]), tensor([[1.0000, 0.2500, 0.2500]]))
    """

    def sample(self, source_labels: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Draw the classes to paste from each source label map; see `crossmix.functional.sample_classes`.

        Raises:
            ValueError: If this mix uses `masks` instead of classes.
        """
        return self._sample(source_labels, generator)

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
        mask: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Mixed:
        """Paste a source batch onto a target batch of the same size. Pass at most one of `classes`, `scores`, `mask`.

        Args:
            source_images: (N, C, H, W) floating, any N.
            source_labels: (N, H, W) integer ground truth.
            target_images: (N, C, H, W) floating.
            target_labels: (N, H, W) integer pseudo-labels; different integer dtypes promote.
            target_weights: (N, H, W) or (N,) floating loss weights of the target pixels; ones if not given.
            classes: (N, num_classes + 1) bool, the source classes to paste; drawn if not given.
            scores: The random numbers to draw with, from `sample_scores`.
            mask: (N, H, W) bool, a ready-made mask: True where the source is pasted.
            generator: Source of randomness; None uses the global one.

        Returns:
            The mixed batch; source pixels have weight 1. It has the types of the source, if these are torchvision's
            `tv_tensors`; weights and mask then have that of the labels.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices disagree, or two of `classes`, `scores` and `mask` are given.
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
        mask = self._mask(source_labels, classes, scores, mask, generator)
        ones = weights.new_ones(len(weights))
        return _mixed((source_images, source_labels, ones), (target_images, target_labels, weights), mask)


def _mixed(pasted: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> Mixed:
    """Mix images, labels and weights under one mask."""
    images, labels, weights = (mix(a, b, mask) for a, b in zip(pasted, base, strict=True))
    return _typed_as(pasted[0], pasted[1], Mixed(images, labels, weights, stored(mask)))


def _draw(codes: Words | Indices, scores: Tensor, options: _DrawOptions) -> Tensor:
    """The present classes with the lowest scores, (N, C + 1) bool; ties go to the lower id."""
    present = codes.present()
    columns = present.shape[1]
    if not options.include_ignored:
        present = present & (torch.arange(columns, device=present.device) < columns - 1)
    if options.whole_batch:
        present = present.any(0, keepdim=True).expand_as(present)
    if options.class_weights is not None:
        check_same_device(labels=present, class_weights=options.class_weights)
        weights = at_least_float32(options.class_weights)
        # Exponential race: of independent exponential times, the smallest belongs to i with odds equal to its rate.
        scores = -torch.log1p(-at_least_float32(scores)) / torch.cat([weights, weights.mean()[None]])
    count = _share(present.sum(1, keepdim=True), options.ratio, columns, options.rounding)
    order = scores.argsort(dim=1, stable=True)
    ordered = present.gather(1, order)
    return torch.zeros_like(present).scatter(1, order, ordered & (ordered.cumsum(1) <= count))


def _share(n: Tensor, ratio: float, most: int, rounding: Rounding) -> Tensor:
    """math.ceil or math.floor of ratio * n, exact for n = 0..most, without float64 (which MPS lacks).

    Computed in fixed point, which can be off by one where the double-precision product is a whole number or next to
    one. The host corrects these n; for most ratios there are none.
    """
    exact, almost_one = (math.ceil, FIXED - 1) if rounding == "ceil" else (math.floor, 0)
    share = int(ratio * FIXED)
    count = (n * share + almost_one) >> FIXED_BITS
    for k in range(most + 1):
        off = exact(ratio * k) - ((k * share + almost_one) >> FIXED_BITS)
        if off:
            count = count + off * (n == k)
    return count


def _scores(labels: Tensor, num_classes: int, scores: Tensor | None, generator: Generator | None) -> Tensor:
    shape = (len(labels), num_classes + 1)
    if scores is None:
        return uniform(shape, generator=generator, device=labels.device)
    check_tensor("scores", scores)
    if scores.is_complex() or scores.dtype == torch.bool:  # bool, of the same shape, are most likely drawn classes
        raise TypeError(f"`scores` must be real, got {scores.dtype}; draw uniform numbers, or pass drawn `classes`.")
    if tuple(scores.shape) != shape:
        hint = "draw one number per image and class, plus one for ignored pixels"
        raise wrong_shape("scores", f"(N, num_classes + 1) = {shape}", scores, hint)
    check_same_device(labels=labels, scores=scores)
    return scores


def _check_classes(classes: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    check_tensor("classes", classes)
    if classes.dtype != torch.bool:
        raise TypeError(f"`classes` must be bool, got {classes.dtype}; use `sample_classes`.")
    columns = None if num_classes is None else num_classes + 1
    fits = classes.ndim == 2 and len(classes) == len(labels) and classes.shape[1] >= 2
    if not fits or columns not in (None, classes.shape[1]):  # not a set, which hashes: torch.compile would specialise
        want = f"(N, num_classes + 1) = ({len(labels)}, {columns or 'C + 1'})"
        raise wrong_shape("classes", want, classes, "use `sample_classes`")
    check_same_device(labels=labels, classes=classes)


def _check_bool(name: str, mask: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"`{name}` must be bool, got {mask.dtype}; compare first, e.g. `mask > 0`.")


def _checked_mask(name: str, mask: Tensor, labels: Tensor) -> Tensor:
    """Check that a given mask fits the label maps, and return it."""
    _check_bool(name, mask)
    if tuple(mask.shape) != tuple(labels.shape):
        want = f"(N, H, W) = {tuple(labels.shape)}"
        raise wrong_shape(name, want, mask, "pass one mask per image, without a channel dimension")
    check_same_device(labels=labels, **{name: mask})
    return mask


def _check_masks(masks: object) -> None:
    if masks is None:
        return
    if isinstance(masks, type) or not callable(masks) or not callable(getattr(masks, "sample", None)):
        got = f"the class {masks.__name__}" if isinstance(masks, type) else type(masks).__name__
        raise TypeError(
            f"`masks` must have `sample(n, size)` and be callable on (scores, size), got {got}; build `BoxMasks()` or "
            "`CowMasks()`, see `MaskSource`, or pass a ready-made mask to `forward(mask=...)`."
        )


def _weights(name: str, weights: Tensor | None, images: Tensor, labels: Tensor) -> Tensor:
    """Loss weights as (N, H, W) or (N,), in float32 or float64; ones, in float64 for float64 images, if not given."""
    if weights is None:
        return images.new_ones(len(images), dtype=arithmetic(images))
    check_weights(name, weights, labels.shape)
    return at_least_float32(weights)


def _typed_as(images: Tensor, labels: Tensor, mixed: Mixed) -> Mixed:
    """Give a mixed batch the types of torchvision's `tv_tensors`, so that its transforms move all parts alike."""
    tv_tensors = None if type(images) is type(labels) is Tensor else sys.modules.get("torchvision.tv_tensors")
    if tv_tensors is None:
        return mixed
    likes = (images, labels, labels, labels)
    typed = (
        tv_tensors.wrap(part, like=like) if isinstance(like, tv_tensors.TVTensor) else part
        for part, like in zip(mixed, likes, strict=True)
    )
    return Mixed(*typed)


def _pixels(value: Tensor) -> tuple[int, int, int]:
    """The (N, H, W) of a tensor (N, ..., H, W)."""
    return value.shape[0], value.shape[-2], value.shape[-1]


def _broadcast(value: Tensor, dims: int) -> Tensor:
    """Reshape one value per image, (N,), to (N, 1, ..., 1); return other tensors as they are."""
    return value.reshape(-1, *[1] * (dims - 1)) if value.ndim == 1 else value
