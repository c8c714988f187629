"""What DistributedDataParallel, DataParallel, torch.compile and their like put around a network, recognised by type.

A wrapper adds a component to every name inside it (`module.`, `_orig_mod.`), at the top of a network or deep within.
A network may have an attribute of that name itself; only the type of the module that holds it tells the two apart.
"""

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["named_parts", "plain_name", "unwrapped"]

# Where the other wrappers live, and under which attribute they hold what they wrap. None of these is imported here:
# a network can hold one only if somebody else has imported it, and the compiler alone takes a second to import.
_ELSEWHERE = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # of CheckpointWrapper and OffloadWrapper
        "_checkpoint_wrapped_module",
    ),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside the wrappers around a module, in any nesting; a module without any comes back itself."""
    attributes = _attributes()
    while (attribute := _attribute(module, attributes)) is not None:
        module = module._modules[attribute]  # type: ignore[assignment]  # a wrapper always holds one
    return module


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a network that is no wrapper, with the name that it has without wrappers at any depth.

    The order is that of `named_modules`; a module that is held twice comes twice.

    Args:
        module: The network, wrapped or not, as a whole or in parts.

    Returns:
        Names such as `""` and `"backbone.0"`, and modules.
    """
    attributes = _attributes()
    found = []
    bare: set[type] = set()  # the teacher walks at every step, and looking up a few types once saves half of that

    def walk(part: nn.Module, prefix: str, key: str) -> None:
        while type(part) not in bare:
            attribute = _attribute(part, attributes)
            if attribute is None:
                bare.add(type(part))
            else:
                part = part._modules[attribute]  # type: ignore[assignment]  # as in `unwrapped`
        name = prefix + key
        found.append((name, part))
        if part._modules:
            prefix = f"{name}." if name else ""
            for attribute, child in part._modules.items():
                if child is not None:
                    walk(child, prefix, attribute)

    walk(module, "", "")
    return found


def plain_name(module: nn.Module, name: str) -> str:
    """A name from `module.state_dict()` or `module.named_parameters()` without what wrappers have added to it.

    Components that wrappers leave out of a state_dict by themselves need not be there.

    Args:
        module: The network that the name belongs to, wrapped or not.
        name: E.g. `"module.backbone._orig_mod.0.weight"` of a DistributedDataParallel whose backbone is compiled.

    Returns:
        E.g. `"backbone.0.weight"`. Every component that is an attribute of the network's own is kept.
    """
    attributes = _attributes()
    kept = []
    part: nn.Module | None = module
    for component in name.split("."):
        added = False
        while part is not None and not added and (attribute := _attribute(part, attributes)) is not None:
            added = component == attribute
            part = part._modules[attribute]
        if not added:
            kept.append(component)
            part = None if part is None else part._modules.get(component)
    return ".".join(kept)


def _attributes() -> dict[type[nn.Module], str]:
    """The types of wrappers that are known by now, and the attribute under which each holds the network."""
    found: dict[type[nn.Module], str] = {DistributedDataParallel: "module", DataParallel: "module"}
    for place, kind, attribute in _ELSEWHERE:
        loaded = getattr(sys.modules.get(place), kind, None)
        if loaded is not None:
            found[loaded] = attribute
    return found


def _attribute(module: nn.Module, attributes: dict[type[nn.Module], str]) -> str | None:
    """The attribute that holds what `module` wraps; None where it wraps nothing."""
    if not isinstance(module, tuple(attributes)):
        return None
    return next(attribute for kind, attribute in attributes.items() if isinstance(module, kind))
