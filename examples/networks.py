"""The networks that can be trained: DeepLab-v2 on two backbones, or whatever a function returns, by its name."""

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

from crossmix.models import deeplab_v2_resnet101, deeplab_v2_tiny

__all__ = ["EXPECTED", "NETWORKS", "NetworkError", "is_name", "is_ours", "new_network", "tried"]

NETWORKS = {"resnet101": deeplab_v2_resnet101, "tiny": deeplab_v2_tiny}
EXPECTED = f"one of {', '.join(NETWORKS)}, or MODULE:FUNCTION"
CLASSES = ("num_classes", "classes", "num_labels")
"""What the argument is called that says how many there are."""


class NetworkError(ValueError):
    """A network that cannot be trained; the message names it and says why."""


def is_ours(name: str) -> bool:
    """Whether it is a DeepLab-v2 of this package."""
    return name in NETWORKS


def is_name(name: str) -> bool:
    """Whether a text can name a network."""
    return is_ours(name) or re.fullmatch(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*", name) is not None


def new_network(name: str, num_classes: int, *, aspp_branches: int = 2, upsample: bool = False) -> nn.Module:
    """A network that takes (N, 3, H, W) images in [0, 1] and returns logits as a tensor, perhaps smaller ones.

    Args:
        name: One of `NETWORKS`, or `"module:function"`. The module is found as Python finds it, or in the current
            folder. The function gets the number of classes, as `num_classes`, `classes` or `num_labels` where it has
            such an argument, and returns a module whose output is logits, or holds them as `logits` or `"out"`.
        num_classes: How many there are.
        aspp_branches: Of a DeepLab-v2.
        upsample: Of a DeepLab-v2: whether its logits have the size of the images.

    Raises:
        NetworkError: If there is no such function, it fails, or it returns something else.
    """
    if is_ours(name):
        return NETWORKS[name](num_classes, aspp_branches=aspp_branches, upsample=upsample)
    function = _function(name)
    keyword = next((one for one in CLASSES if one in _arguments(function)), None)
    try:
        network = function(num_classes) if keyword is None else function(**{keyword: num_classes})
    except Exception as error:  # whatever it is, it is told
        call = f"{num_classes}" if keyword is None else f"{keyword}={num_classes}"
        raise NetworkError(f"--network {name}: {name.rpartition(':')[2]}({call}) failed: {_told(error)}.") from error
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"--network {name}: must return a torch.nn.Module, got {type(network).__name__}; name a function that does."
        )
    network.register_forward_hook(lambda _module, _images, out: _logits(out, name))
    return network


@torch.no_grad()
def tried(network: nn.Module, name: str, num_classes: int, shape: tuple[int, int], device: str, *, train: bool) -> None:
    """See whether a network takes images of a shape, and returns logits of so many classes.

    Raises:
        NetworkError: If not.
    """
    images = torch.zeros(2 if train else 1, 3, *shape, device=device)
    try:
        logits = network.to(device).train(train)(images)
    except NetworkError:
        raise
    except Exception as error:  # whatever it is, it is told
        raise NetworkError(f"--network {name}: fails on images of {shape[0]}x{shape[1]}: {_told(error)}.") from error
    if logits.ndim != 4 or tuple(logits.shape[:2]) != (len(images), num_classes):
        raise NetworkError(
            f"--network {name}: must return logits (N, C, H, W), here ({len(images)}, {num_classes}, ...), got "
            f"{tuple(logits.shape)}; check the number of classes."
        )


def _function(name: str) -> Callable[..., Any]:
    """What a name names."""
    module, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that it hides nothing
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
        raise NetworkError(f"--network {name}: {path} is a {type(found).__name__}, and no function.")
    function: Callable[..., Any] = found
    return function


def _arguments(function: Callable[..., Any]) -> Mapping[str, object]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some that are written in C
        return {}


def _logits(out: object, name: str) -> Tensor:
    """The logits in what a network returned."""
    if isinstance(out, Mapping):
        out = next((out[key] for key in ("logits", "out") if key in out), out)
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        keys = f" with {', '.join(map(repr, out))}" if isinstance(out, Mapping) else ""
        raise NetworkError(
            f"--network {name}: returned a {type(out).__name__}{keys}; return logits as a tensor, as `logits` or as "
            '"out".'
        )
    return out


def _told(error: Exception) -> str:
    """What an error says, and the last line of code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {str(error).strip().rstrip('.')}{where}"
