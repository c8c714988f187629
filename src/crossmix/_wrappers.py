"""Look through what wraps a network, whole or in parts: told by type, since a network's own part may have any name."""

import sys
from collections.abc import Iterator

from torch import nn

__all__ = ["bare_modules", "bare_name", "inner_name", "unwrap"]

WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)
"""Where a type of wrapper is defined, its name, and what it calls the module inside."""


def inner_name(module: nn.Module | None) -> str | None:
    """What a wrapper calls the module inside; None where `module` is no wrapper."""
    for place, kind, name in WRAPPERS:
        if isinstance(module, getattr(sys.modules.get(place), kind, ())):  # not imported: there are none of it
            return name
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside any nesting of wrappers."""
    while (name := inner_name(module)) is not None:
        module = module.get_submodule(name)
    return module


def bare_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `named_modules` gives on the same network without any wrapper."""
    seen = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if module not in seen:
            seen.add(module)
            yield prefix, module
            for name, child in module.named_children():
                yield from walk(child, f"{prefix}.{name}" if prefix else name)

    yield from walk(network, "")


def bare_name(network: nn.Module, name: str) -> str:
    """A name in a network's state_dict, as it is on the same network without any wrapper."""
    module: nn.Module | None = network
    kept = []
    for part in name.split("."):
        while (inner := inner_name(module)) not in {None, part}:  # a wrapper that leaves itself out of names
            module = module._modules[inner]
        if inner is None:
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)
