"""Look through the wrappers of DistributedDataParallel, DataParallel, FSDP, torch.compile and the like.

A wrapper adds a component (`module.`, `_orig_mod.`) to every name inside it, at any depth of a network. A network may
have an attribute of the same name, so wrappers are recognised by the type of the module, not by name.
"""

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# (module, class, attribute that holds the wrapped network). None of these is imported here: a network can contain one
# only if its module has been imported already, and importing the compiler takes a second.
_ELSEWHERE = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # base class of CheckpointWrapper and OffloadWrapper
        "_checkpoint_wrapped_module",
    ),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside any nesting of wrappers; a module without wrappers is returned as is."""
    return _inside(module, _attributes())


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List all submodules except wrappers, with the names they would have without any wrapper.

    The order is that of `named_modules`, but a shared module is listed once for each of its names.
    """
    attributes = _attributes()
    found = []

    def walk(part: nn.Module, name: str) -> None:
        part = _inside(part, attributes)
        found.append((name, part))
        for key, child in part._modules.items():
            if child is not None:
                walk(child, f"{name}.{key}" if name else key)

    walk(module, "")
    return found


def plain_name(module: nn.Module, name: str) -> str:
    """Strip the components added by wrappers from a name of `state_dict()` or `named_parameters()`.

    `"module.backbone._orig_mod.0.weight"`, of a DistributedDataParallel with a compiled backbone, becomes
    `"backbone.0.weight"`; the network's own attributes are kept, whatever their names. Some wrappers leave their
    component out of a state_dict; such names work as well.
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


def communicates(module: nn.Module) -> bool:
    """Whether a forward pass of a network, or of a part of it, waits for those of the other ranks."""
    places = (("torch.distributed.fsdp", "FSDPModule"), _ELSEWHERE[-1][:2])
    kinds = (DistributedDataParallel, *(getattr(sys.modules.get(place), kind, None) for place, kind in places))
    known = tuple(kind for kind in kinds if kind is not None)
    return any(isinstance(part, known) for part in module.modules())


def _attributes() -> dict[type[nn.Module], str]:
    """The wrapper types imported so far, each with the attribute that holds the wrapped network."""
    found: dict[type[nn.Module], str] = {DistributedDataParallel: "module", DataParallel: "module"}
    for place, kind, attribute in _ELSEWHERE:
        loaded = getattr(sys.modules.get(place), kind, None)
        if loaded is not None:
            found[loaded] = attribute
    return found


def _inside(module: nn.Module, attributes: dict[type[nn.Module], str]) -> nn.Module:
    """The network inside any nesting of wrappers."""
    while (attribute := _attribute(module, attributes)) is not None:
        module = module._modules[attribute]  # type: ignore[assignment]  # never None in a wrapper
    return module


def _attribute(module: nn.Module, attributes: dict[type[nn.Module], str]) -> str | None:
    """The attribute that holds the wrapped network; None if `module` is not a wrapper."""
    if not isinstance(module, tuple(attributes)):
        return None
    return next(attribute for kind, attribute in attributes.items() if isinstance(module, kind))


def averaged(model: nn.Module) -> nn.Module | None:
    """The network inside an averaged model, recognised by `update_parameters` and `module`; None for others.

    These are the names of `torch.optim.swa_utils.AveragedModel`, whose counters are not weights.
    """
    model = unwrapped(model)
    network = getattr(model, "module", None)
    is_average = callable(getattr(model, "update_parameters", None)) and isinstance(network, nn.Module)
    return network if is_average else None
