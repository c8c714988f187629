"""Networks by name: DeepLab-v2 on two backbones, or what a function of your own returns."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmix.integrations import semantic_logits
from crossmix.models import DeepLabV2, deeplab_v2_resnet101, deeplab_v2_tiny

__all__ = [
    "AUTOCAST", "EXPECTED", "NETWORKS", "PRECISIONS", "NetworkError", "is_name", "is_ours", "new_network",
    "set_float32_products", "small_logits", "tried",
]  # fmt: skip

NETWORKS = {"resnet101": deeplab_v2_resnet101, "tiny": deeplab_v2_tiny}
EXPECTED = f"one of {', '.join(NETWORKS)}, or MODULE:FUNCTION"
CLASSES = ("num_classes", "classes", "num_labels")  # names of the argument that takes the number of classes
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types for autocast by precision; with other precisions there is none."""


class NetworkError(ValueError):
    """A network that cannot be trained; the message names it and gives the reason."""


def is_ours(name: str) -> bool:
    """Whether this names a DeepLab-v2 of crossmix."""
    return name in NETWORKS


def is_name(name: str) -> bool:
    """Whether the text has the form of a network's name."""
    return is_ours(name) or re.fullmatch(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*", name) is not None


def new_network(name: str, num_classes: int, *, aspp_branches: int = 2, upsample: bool = False) -> nn.Module:
    """Build a network that takes (N, 3, H, W) images in [0, 1] and returns a tensor of logits, possibly smaller.

    `name` is one of `NETWORKS`, to which the last two arguments apply, or `"module:function"`, with the module on
    Python's path or in the current folder. The function is called with the number of classes, as `num_classes`,
    `classes` or `num_labels` if it has such an argument, and returns a module whose output `semantic_logits` takes: a
    tensor, an object or dict with `logits` or `out`, or the queries of Mask2Former and its like. If it fails, returns
    something else or is not there, that is a `NetworkError`.
    """
    if is_ours(name):
        return NETWORKS[name](num_classes, aspp_branches=aspp_branches, upsample=upsample)
    function = _function(name)
    keyword = next((one for one in CLASSES if one in _arguments(function)), None)
    try:
        network = function(num_classes) if keyword is None else function(**{keyword: num_classes})
    except Exception as error:  # anything that somebody else's function may raise
        call = f"{num_classes}" if keyword is None else f"{keyword}={num_classes}"
        raise NetworkError(f"--network {name}: {name.rpartition(':')[2]}({call}) failed: {_told(error)}.") from error
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"--network {name}: must return a torch.nn.Module, got {type(network).__name__}; name a function that does."
        )
    network.register_forward_hook(lambda _module, _images, out: _logits(out, name))
    return network


def set_float32_products(precision: str) -> None:
    """Set whether GPUs round what float32 convolutions and matrix products multiply, which cuDNN does by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


@torch.no_grad()
def tried(network: nn.Module, name: str, num_classes: int, shape: tuple[int, int], device: str, *, train: bool) -> None:
    """Raise `NetworkError` unless a network takes images of a shape and returns logits of the right shape."""
    images = torch.zeros(2 if train else 1, 3, *shape, device=device)
    try:
        logits = network.to(device).train(train)(images)
    except NetworkError:
        raise
    except Exception as error:  # anything that somebody else's network may raise
        raise NetworkError(f"--network {name}: fails on images of {shape[0]}x{shape[1]}: {_told(error)}.") from error
    if logits.ndim != 4 or tuple(logits.shape[:2]) != (len(images), num_classes):
        raise NetworkError(
            f"--network {name}: must return logits (N, C, H, W), here ({len(images)}, {num_classes}, ...), got "
            f"{tuple(logits.shape)}; check the number of classes."
        )


def small_logits(network: nn.Module) -> Any:  # noqa: ANN401 - a method or a module
    """Return the forward pass that leaves DeepLab-v2's logits small; for other networks, the network itself."""
    return network.forward_features if isinstance(network, DeepLabV2) else network


def _function(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, to shadow nothing
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise NetworkError(f"--network {name}: {module} cannot be imported: {_told(error)}.") from error
    for part in path.split("."):
        if not hasattr(found, part):
            where = getattr(sys.modules[module], "__file__", None) or module
            raise NetworkError(f"--network {name}: {where} has no {path}; name a function that is there.")
        found = getattr(found, part)
    if not callable(found):
        raise NetworkError(f"--network {name}: {path} must be a function, got {type(found).__name__}.")
    function: Callable[..., Any] = found
    return function


def _arguments(function: Callable[..., Any]) -> Mapping[str, object]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C
        return {}


def _logits(out: object, name: str) -> Tensor:
    """Take the logits out of a network's output."""
    try:
        return semantic_logits(out)
    except TypeError as error:
        keys = f" with {', '.join(map(repr, out))}" if isinstance(out, Mapping) else ""
        raise NetworkError(
            f"--network {name}: returned a {type(out).__name__}{keys}; return logits as a tensor, as `logits` or as "
            "`out`, or the masks and classes of queries as Mask2Former does."
        ) from error


def _told(error: Exception) -> str:
    """Format an error in one line, with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}{where}"
