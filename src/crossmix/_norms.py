"""Run a network with some attributes of its modules replaced, such as the running statistics of its norms."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from crossmix._wrappers import named_parts

Change: TypeAlias = tuple[dict[str, Any], str, Any]  # a dictionary of a module, a key, and its value for the time being
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def run_changed(changes: Sequence[Change], network: nn.Module, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401
    """Run a network while some attributes of its modules have other values."""
    kept = []
    try:
        for own, key, value in changes:
            kept.append((own, key, own[key]))
            own[key] = value
        return network(*inputs, **named)
    finally:
        for own, key, value in reversed(kept):
            own[key] = value


def run_keeping_statistics(network: nn.Module, images: Tensor) -> Any:  # noqa: ANN401 - what the network returns
    """Run a network; norms in training mode use batch statistics, as always, but leave the running ones unchanged."""
    norms = [part for _, part in named_parts(network) if isinstance(part, _NormBase) and part.training]
    return run_changed([change for part in norms for change in on_copies(part, {})], network, images)


def without_statistics(part: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[Change]:
    """Let torch's own norms run without running statistics, which is faster than on copies, and others on copies."""
    if type(part).forward.__module__.startswith("torch.nn."):
        there = [key for key in _RUNNING if part._buffers.get(key) is not None]
        return [(part.__dict__, "track_running_stats", False), *((part._buffers, key, None) for key in there)]
    return on_copies(part, dtypes)


def on_copies(part: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[Change]:
    """Let a norm update copies of its buffers; `dtypes` are those of copies that differ from theirs, by name."""
    return [
        (part._buffers, key, value.to(dtypes.get(key, value.dtype), copy=True))
        for key, value in part._buffers.items()
        if value is not None
    ]
