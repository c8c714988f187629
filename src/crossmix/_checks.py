"""Argument checks: shape, dtype and device always, values only where that needs no GPU sync.

Every error says what was expected, what was given, and what to do.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
SLACK = 0.5  # bicubic resizing overshoots [0, 1] by up to 0.45; normalised images and bytes by far more


def check_tensor(name: str, value: object) -> None:
    """Refuse anything that is not a dense tensor."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be a torch.Tensor, got {kind}; convert it with torch.as_tensor.")
    if value.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor, got {value.layout}; convert it with `.to_dense()`.")


def check_values(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without values, where the host has to read them."""
    if tensor.is_meta:
        raise ValueError(f"`{name}` must have values, got a meta tensor; create it outside of `torch.device('meta')`.")


def check_bool(name: str, value: object) -> None:
    """Refuse anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def wrong_shape(name: str, want: object, value: Tensor, hint: str) -> ValueError:
    """The error about a tensor that must have another shape."""
    return ValueError(f"`{name}` must have shape {want}, got {tuple(value.shape)}; {hint}.")


def check_floating(name: str, value: Tensor, hint: str) -> None:
    """Refuse anything but a floating tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be floating, got {value.dtype}; {hint}.")


def check_module(name: str, value: object) -> None:
    """Refuse anything that is not a network."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` must be an nn.Module, got {type(value).__name__}; pass the network itself.")


def check_images(name: str, images: Tensor, *, channels: int | None = None) -> None:
    """Refuse anything but floating (N, C, H, W), with exactly `channels` channels if given."""
    check_tensor(name, images)
    want = "C" if channels is None else channels
    if images.ndim != 4 or (channels is not None and images.shape[1] != channels):
        hint = "add the batch dimension with `[None]`" if images.ndim == 3 else "stack the images along dimension 0"
        if images.ndim == 4:
            hint = f"convert them to {channels} channels"
        raise wrong_shape(name, f"(N, {want}, H, W)", images, hint)
    if not images.is_floating_point():
        raise TypeError(f"`{name}` must be floating in [0, 1], got {images.dtype}; convert bytes by `.float() / 255`.")


def check_labels(name: str, labels: Tensor) -> None:
    """Refuse anything but (N, H, W) label maps of an accepted integer dtype."""
    check_tensor(name, labels)
    if labels.dtype not in LABEL_DTYPES:
        hint = "convert with `.long()`, or take the argmax of probabilities first"
        raise TypeError(f"`{name}` must be uint8, int16, int32 or int64, got {labels.dtype}; {hint}.")
    if labels.ndim != 3:
        hint = "squeeze the channel dimension" if labels.ndim == 4 else "add the batch dimension with `[None]`"
        if labels.ndim == 4 and labels.shape[1] > 1:
            hint = "they hold ids, not colours or a map per class"
        raise wrong_shape(name, "(N, H, W)", labels, hint)


def check_logits(name: str, logits: Tensor) -> None:
    """Refuse anything but a floating (N, C, H, W) tensor with at least one class."""
    check_floating(name, logits, hint := "pass the class scores before any argmax")
    if logits.ndim != 4 or logits.shape[1] < 1:
        raise wrong_shape(name, "(N, C, H, W) with C >= 1", logits, hint)


def logits_in(output: object, name: str) -> str | None:
    """The expression that takes the logits out of a network's output `name`; None without a guess, or for a tensor."""
    if isinstance(output, Tensor):
        return None
    if isinstance(getattr(output, "logits", None), Tensor):
        return f"{name}.logits"
    if hasattr(output, "masks_queries_logits"):
        return f"crossmix.integrations.semantic_logits({name})"
    if isinstance(output, Mapping) and output:
        return f"{name}[{next((key for key in ('logits', 'out') if key in output), next(iter(output)))!r}]"
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return f"{name}[0]"
    return None


def kind_of(output: object) -> str:
    """What a network's output is, for error messages: its type and, of a mapping, the keys."""
    keys = f" with keys {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{keys}"


def check_confidence(confidence: Tensor) -> None:
    """Refuse anything but a floating (N, H, W) tensor."""
    check_floating("confidence", confidence, "pass probabilities in [0, 1]")
    if confidence.ndim != 3:
        hint = "take the maximum of the probabilities over dimension 1"
        raise wrong_shape("confidence", "(N, H, W)", confidence, hint)


def check_weights(name: str, weights: Tensor, labels_shape: Sequence[int]) -> None:
    """Refuse anything but floating weights per pixel, (N, H, W) like the labels, or per image, (N,)."""
    check_floating(name, weights, "convert with `.float()`")
    shape = tuple(labels_shape)
    if tuple(weights.shape) not in (shape, shape[:1]):  # not a set: hashing a size makes torch.compile specialise on it
        hint = "squeeze the channel dimension or crop them to the labels"
        raise wrong_shape(name, f"(N, H, W) = {shape} or (N,)", weights, hint)


def check_class_weights(weights: Tensor, num_classes: int | None, *, may_be_zero: bool = False) -> None:
    """Refuse anything but (C,) floating numbers, finite and positive (or >= 0); values are checked on the CPU only."""
    check_floating("class_weights", weights, "convert with `.float()`")
    if weights.ndim != 1 or len(weights) == 0 or (num_classes is not None and len(weights) != num_classes):
        want = "(C,)" if num_classes is None else f"(C,) = ({num_classes},)"
        raise wrong_shape("class_weights", want, weights, "pass one per class, none for ignored pixels")
    if not can_look(weights):
        return
    fits = weights >= 0 if may_be_zero else weights > 0
    if not bool((fits & weights.isfinite()).all()):
        want = "finite and at least 0" if may_be_zero else "positive and finite"
        hint = "0 leaves a class out" if may_be_zero else "use a small weight for a class that should rarely be drawn"
        raise ValueError(f"`class_weights` must be {want}, got {weights.tolist()}; {hint}.")


def check_same_shape(name: str, shape: Sequence[int], other_name: str, other_shape: Sequence[int]) -> None:
    """Refuse two shapes that differ, naming both."""
    if tuple(shape) != tuple(other_shape):
        both = f"`{name}` {tuple(shape)} and `{other_name}` {tuple(other_shape)}"
        last = other_shape[-1] == 3 != shape[-1] and shape[0] == other_shape[0]
        hint = "move channels that are last with `.permute(0, 3, 1, 2)`" if last else "crop or resize them to one size"
        if tuple(shape[1:]) == tuple(other_shape[1:]):
            hint = "load equally many, in loaders with `drop_last=True`"
        raise ValueError(f"{both} must agree in batch size, height and width; {hint}.")


def check_same_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on different devices, naming the first two that differ."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(devices))
    for name, device in devices.items():
        if device != devices[first]:
            there = devices[first]
            raise ValueError(f"`{name}` is on {device} but `{first}` is on {there}; move one by `.to({str(there)!r})`.")


def check_int(name: str, value: int, *, least: int | None = None, hint: str = "") -> None:
    """Refuse anything but an int of at least `least`. A bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}{hint}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}{hint}.")


def check_num_classes(num_classes: int) -> None:
    """Refuse anything but a positive int."""
    check_int("num_classes", num_classes, least=1, hint="; count the classes without the ignored one")


def check_ignore_index(ignore_index: int) -> None:
    """Refuse anything but an int, which would silently ignore nothing."""
    check_int("ignore_index", ignore_index, hint="; to ignore no pixel, pass an id that no label has, such as -100")


def check_float(name: str, value: float) -> None:
    """Refuse anything but an int or a float. A bool is neither here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a float, got {type(value).__name__}.")


def check_fraction(name: str, value: float) -> None:
    """Refuse anything but a number in [0, 1], NaN included."""
    check_float(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")


def check_nonnegative(name: str, value: float) -> None:
    """Refuse anything but a finite number >= 0."""
    check_float(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")


def check_temperature(value: float) -> None:
    """Refuse anything but a positive number."""
    check_float("temperature", value)
    if not value > 0:
        raise ValueError(f"`temperature` must be positive, got {value}; start from the default.")


def check_size(name: str, size: object, *, least: int = 1) -> tuple[int, int]:
    """Refuse anything but (height, width), integers of any type of at least `least`; return them as ints."""
    sides: Sequence[Any] = size if isinstance(size, Sequence) and len(size) == 2 else [None]
    # The compiler traces a size that changes as an int without `__index__`.
    if not all(type(side) is int or (hasattr(side, "__index__") and not isinstance(side, bool)) for side in sides):
        raise TypeError(f"`{name}` must be (height, width), ints in pixels, got {size!r}; pass both sides.")
    height, width = (side if type(side) is int else operator.index(side) for side in sides)
    if min(height, width) < least:
        want = "positive" if least == 1 else f"at least {least} pixels"
        raise ValueError(f"`{name}` must be {want}, got {(height, width)}; pass (height, width) in pixels.")
    return height, width


def check_pixels(name: str, value: int) -> None:
    """Refuse anything but a length in pixels, a positive int."""
    check_int(name, value, least=1, hint="; it is in pixels")


def check_ignored_rows(top: int, bottom: int) -> None:
    """Refuse numbers of ignored rows (of 512) that are not ints, are negative, or leave no row."""
    for name, rows in (("ignore_top", top), ("ignore_bottom", bottom)):
        check_int(name, rows, least=0, hint="; count rows of an image of 512 rows")
    if top + bottom >= 512:
        raise ValueError(f"`ignore_top` and `ignore_bottom` must leave some of 512 rows, got {top} and {bottom}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a string that is not one of `choices`, and list them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def class_shares(prior: Tensor | Sequence[float], num_classes: int, ignore_index: int = -1) -> Tensor:
    """Class frequencies or counts as (C,) float64 on the CPU, with sum 1, and 0 for an ignored class.

    This reads the values of a tensor, and so syncs.
    """
    if isinstance(prior, Tensor):
        check_tensor("prior", prior)
        check_values("prior", prior)
    try:
        given = prior.detach().cpu() if isinstance(prior, Tensor) else prior  # its device may lack float64
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`prior` must be a sequence of numbers, got {type(prior).__name__} ({error}).") from error
    if tuple(values.shape) != (num_classes,):
        want = f"one number per class, shape ({num_classes},)"
        raise ValueError(f"`prior` must hold {want}, got {tuple(values.shape)}; count the pixels of each class.")
    values = values.where(torch.arange(num_classes, device="cpu") != ignore_index, 0)
    if not bool(values.isfinite().all()) or bool((values < 0).any()) or not bool((values > 0).any()):
        raise ValueError(
            f"`prior` must be finite, not negative and not all zero, got {values.tolist()}; check the counts."
        )
    values = values / values.max()  # keeps the sum finite
    return values / values.sum()


def can_look(tensor: Tensor) -> bool:
    """Whether values can be read without a GPU sync and without a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_positive(name: str, values: Tensor, hint: str) -> None:
    """Refuse values that are not positive and finite, where `can_look` allows reading them."""
    if can_look(values) and not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"`{name}` must be positive and finite, got {values.tolist()}; {hint}.")


def check_range(
    name: str, images: Tensor, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> None:
    """On the CPU, refuse images far outside [0, 1], or outside that range normalised by `mean` and `std`.

    NaN passes: it shows in the loss on every device, and `FiniteGuard` handles it.
    """
    if not can_look(images) or images.numel() == 0:
        return
    least, greatest = (float(value) for value in images.detach().aminmax())
    shifts, scales = mean or (0.0,), std or (1.0,)
    low = min((-SLACK - shift) / scale for shift, scale in zip(shifts, scales, strict=True))
    high = max((1 + SLACK - shift) / scale for shift, scale in zip(shifts, scales, strict=True))
    if least < low or greatest > high:
        normalised = "" if mean is None else f" before they are normalised by mean={mean} and std={std}"
        raise ValueError(
            f"`{name}` must lie in [0, 1]{normalised}, got values from {least:.4g} to {greatest:.4g}; divide bytes by "
            "255 and normalise inside the network, or pass the `mean` and `std` that your loader uses."
        )
