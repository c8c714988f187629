"""What the parts of `SelfTraining` accept and return, and whether they fit together."""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, TypeGuard, TypeVar

from torch import Tensor, nn

from crossmix._checks import (
    check_images,
    check_range,
    check_same_device,
    check_tensor,
    check_weights,
    kind_of,
    logits_in,
)
from crossmix._tensors import valid_pixels
from crossmix.augment import StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.masking import MaskedImages
from crossmix.mixing import Mixed

Part = TypeVar("Part", bound=nn.Module)
_KEYWORDS = ("scores", "generator", "")


class MixCall(NamedTuple):
    """How to call a mix: with five arguments or three, and the keywords that can pass randomness to it."""

    onto_target: bool
    keywords: tuple[str, ...]


def how_to_call(mix: Any) -> MixCall:  # noqa: ANN401 - any callable
    """Inspect the signature of a mix; one that accepts five arguments is called with source and target."""
    mix = getattr(mix, "_orig_mod", mix)  # a compiled module hides its signature
    signature = inspect.signature(mix.forward if isinstance(mix, nn.Module) else mix)
    for keyword, count in itertools.product(_KEYWORDS, (5, 3)):  # keyword first: `scores` could be a 4th positional
        if _takes(signature, count, keyword):
            return MixCall(count == 5, tuple(other for other in _KEYWORDS if _takes(signature, count, other)))
    raise TypeError(
        "`mix` must take (source_images, source_labels, target_images, target_labels, target_weights) or (images, "
        f"labels, weights), and may take `scores` or `generator` by keyword, got {signature}; see `SourceOntoTarget`."
    )


def is_drawn(augment: Any) -> bool:  # noqa: ANN401 - any callable, or None
    """Whether an augmentation is a `DrawnAugment`: it has `sample`, and can be called with `draw`."""
    augment = getattr(augment, "_orig_mod", augment)  # a compiled module hides its signature
    if not callable(getattr(augment, "sample", None)):
        return False
    return _takes(inspect.signature(augment.forward if isinstance(augment, nn.Module) else augment), 1, "draw")


def is_a(part: object, kind: type[Part]) -> TypeGuard[Part]:
    """Whether a part is one of our modules, compiled or not."""
    return isinstance(getattr(part, "_orig_mod", part), kind)


def check_part(name: str, part: object, like: str, *methods: str) -> None:
    """Refuse a part that is not callable, or has none of the given methods."""
    if part is None:
        return
    if isinstance(part, type) or not callable(part):
        got = f"the class {part.__name__}" if isinstance(part, type) else type(part).__name__
        raise TypeError(f"`{name}` must be callable, got {got}; build a module such as {like}, or pass a function.")
    if methods and not any(callable(getattr(part, method.partition("(")[0], None)) for method in methods):
        wanted, got = " or ".join(f"`.{method}`" for method in methods), type(part).__name__
        raise TypeError(f"`{name}` must have a method {wanted}, got {got} without one; pass a {like}, or add it.")


def agreed_num_classes(num_classes: int | None, parts: Mapping[str, object]) -> int | None:
    """The `num_classes` that is given and that all parts agree on; None if there is none."""
    classes = {name: getattr(part, "num_classes", None) for name, part in parts.items()}
    return _agreed("num_classes", {"SelfTraining": num_classes, **classes})


def agreed_ignore_index(parts: Mapping[str, object]) -> int:
    """The `ignore_index` that all parts agree on; 255 if none of them has one."""
    ids = {name: getattr(part, "ignore_index", None) for name, part in parts.items() if not _translated(name, part)}
    ignore_index = _agreed("ignore_index", ids)
    return 255 if ignore_index is None else ignore_index


def same_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, **parts: object
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Refuse augmentations of ours for images normalised otherwise than `mean` and `std`, or than each other."""
    own = StrongAugment(mean=mean, std=std)  # checks both
    owners = {"SelfTraining": own} if mean is not None else {}
    owners |= {f"`{name}`": part for name, part in parts.items() if is_a(part, StrongAugment)}
    for name, part in owners.items():
        first, known = next(iter(owners.items()))
        if not (_alike(part.mean, known.mean) and _alike(part.std, known.std)):
            want, got = f"mean={known.mean} and std={known.std}", f"{part.mean} and {part.std}"
            raise ValueError(f"{name} must have the {want} of {first}, got {got}; use the same for both.")
    return own.mean, own.std


def check_fill(consistency: object, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse the default colour of hidden blocks, one of images in [0, 1], in images that are normalised."""
    if mean is None or std is None or not is_a(consistency, MaskedImages):
        return
    default = MaskedImages().fill
    normalised = tuple((value - m) / s for value, m, s in zip(default, mean, std, strict=True))
    if consistency.fill == default and not _alike(default, normalised):
        raise ValueError(
            f"`consistency` must hide blocks with a colour that is normalised as the images are, got {default}; pass "
            f"`fill={tuple(round(value, 3) for value in normalised)}`."
        )


def labels_for(criterion: object, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels for a foreign criterion: int64, with ignored pixels and unknown ids set to its `ignore_index`."""
    index, valid = valid_pixels(labels, num_classes, ignore_index)
    ignored = getattr(criterion, "ignore_index", None)
    return index.where(valid, int(ignored)) if _is_integer(ignored) else index


def checked_logits(name: str, logits: object, images: Tensor, *, num_classes: int | None, upsample: bool) -> Tensor:
    """Check that a network returned logits of images; they may be smaller than these if they are to be upsampled."""
    if not isinstance(logits, Tensor):
        hint = f"pass `logits=lambda out: {logits_in(logits, 'out') or 'out.logits'}` to SelfTraining"
        raise TypeError(f"`{name}` must return logits as a tensor, got {kind_of(logits)}; {hint}.")
    if logits.ndim != 4 or len(logits) != len(images):
        want = f"(N, C, H, W) with N = {len(images)}"
        raise ValueError(f"`{name}` must return logits of shape {want}, got {tuple(logits.shape)}.")
    if not logits.is_floating_point():
        raise TypeError(f"`{name}` must return floating logits, got {logits.dtype}; return them before argmax.")
    if logits.shape[-2:] != images.shape[-2:] and not upsample:
        raise ValueError(
            f"`{name}` returned logits of size {tuple(logits.shape[-2:])} for images of size "
            f"{tuple(images.shape[-2:])}; pass `upsample=True` to SelfTraining, or upsample in the network."
        )
    if num_classes is not None and logits.shape[1] != num_classes:
        built = f"SelfTraining was built with num_classes={num_classes}"
        raise ValueError(f"`{name}` returned {logits.shape[1]} classes but {built}; use the same number for both.")
    return logits


def checked_mixed(
    mixed: object, target_images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Mixed:
    """Check what a mix returned, and convert its images to the dtype of the target's."""
    if not isinstance(mixed, Sequence) or len(mixed) != len(Mixed._fields):
        raise TypeError(f"`mix` must return Mixed(images, labels, weights, mask), got {type(mixed).__name__}.")
    n, _, height, width = target_images.shape
    for name, value in zip(Mixed._fields, mixed, strict=True):
        check_tensor(f"mixed.{name}", value)
        shape = tuple(target_images.shape) if name == "images" else (n, height, width)
        if tuple(value.shape) != shape:
            raise ValueError(f"`mix` must return `{name}` of shape {shape}, got {tuple(value.shape)}.")
    mixed = Mixed(*mixed)
    check_same_device(
        target_images=target_images, **{f"mixed.{name}": value for name, value in mixed._asdict().items()}
    )
    check_images("mixed.images", mixed.images)
    check_range("mixed.images", mixed.images, mean=mean, std=std)
    return mixed._replace(images=mixed.images.to(target_images.dtype))


def checked_images(
    name: str, changed: Tensor, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """Check the images that the part `name` returned, and convert them to the dtype of those it got."""
    check_images(f"{name}(images)", changed)
    if changed.shape != images.shape:
        raise ValueError(
            f"`{name}` must keep the shape of images, {tuple(images.shape)}, got {tuple(changed.shape)}; labels "
            "and weights are not transformed, so change only colours here."
        )
    check_same_device(images=images, **{f"{name}(images)": changed})
    check_range(f"{name}(images)", changed, mean=mean, std=std)
    return changed.to(images.dtype)


def checked_weights(weights: Tensor, confidence: Tensor) -> Tensor:
    """Check the criterion's weights of target pixels."""
    check_tensor("criterion.weights(confidence)", weights)
    if weights.ndim > 0:  # a scalar is one weight for all pixels
        check_weights("criterion.weights(confidence)", weights, confidence.shape)
    return weights


def checked_loss(name: str, loss: Tensor) -> Tensor:
    """Check that the criterion `name` returned a scalar."""
    check_tensor(f"{name}(logits, labels)", loss)
    if loss.ndim != 0:
        raise ValueError(f"`{name}` must return a scalar, got shape {tuple(loss.shape)}; average over pixels.")
    return loss


def _takes(signature: inspect.Signature, count: int, keyword: str) -> bool:
    try:
        signature.bind(*range(count), **({keyword: None} if keyword else {}))
    except TypeError:
        return False
    return True


def _agreed(what: str, parts: Mapping[str, object]) -> int | None:
    """The number that all parts agree on, among those that have one; None if none has."""
    said = {name: int(number) for name, number in parts.items() if _is_integer(number)}
    first = next(iter(said), None)
    for name, number in said.items():
        if first is not None and number != said[first]:
            raise ValueError(f"`{first}` has {what}={said[first]} but `{name}` {number}; use the same for both.")
    return None if first is None else said[first]


def _translated(name: str, part: object) -> bool:
    """Whether a part is a foreign criterion with a negative `ignore_index`, to which labels are translated."""
    ignored = getattr(part, "ignore_index", None)
    foreign = name in {"criterion", "source_criterion"} and not isinstance(part, ConfidenceWeightedCE)
    return foreign and _is_integer(ignored) and ignored < 0


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an int, one of NumPy among them."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _alike(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Whether two means, or two standard deviations, are equal up to float32."""
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(map(partial(math.isclose, rel_tol=1e-6), a, b))
