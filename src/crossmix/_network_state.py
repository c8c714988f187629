"""Collect a network's tensors by name, and pair them with those of another network.

Names are without the components that wrappers add. Of sharded tensors, a pair holds this rank's shards.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from crossmix._averaging import Pairs, can_average, is_low, widened
from crossmix._wrappers import named_parts

_Difference: TypeAlias = tuple[str, object, object]


class State(NamedTuple):
    """A network's modules and tensors, by names without wrappers. Shared tensors are listed once."""

    parts: dict[str, nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def every_name(self) -> list[tuple[str, Tensor]]:
        """All tensors, shared ones under each of their names."""
        return [
            pair
            for name, part in self.parts.items()
            for own in (part.named_parameters, part.named_buffers)
            for pair in own(name, recurse=False, remove_duplicate=False)
        ]


def state_of(module: nn.Module) -> State:
    """Collect the modules, parameters and buffers of a network."""
    state = State(dict(named_parts(module)), {}, {})
    for part in state.parts.values():
        if is_of_type(part, "torch.distributed.fsdp", "FSDPModule"):
            part.reshard()  # type: ignore[operator]  # after a forward pass the root still holds unsharded tensors
    seen = set()
    for name, part in state.parts.items():
        for own, found in (part.named_parameters, state.parameters), (part.named_buffers, state.buffers):
            for key, value in own(name, recurse=False):
                if id(value) not in seen:
                    seen.add(id(value))
                    found[key] = value
    return state


def matched(
    mine: State, theirs: State, advice: str = "pass the network that the teacher was made from"
) -> tuple[Pairs, Pairs, list[str]]:
    """Pair the teacher's and the student's parameters and buffers; also name the buffers to take over.

    Buffers to take over are non-persistent in both networks, and exist in only one of them, differ in shape, or were
    created by the teacher's network in `torch.inference_mode`, so that they cannot be modified in place.
    """
    different = _differences(mine.parameters, theirs.parameters)
    _refuse("parameter", different, advice)
    parameters = local_pairs(mine.parameters, theirs.parameters)
    different = _differences(mine.buffers, theirs.buffers)
    fixed = [name for name, value in mine.buffers.items() if value.is_inference() and name not in different]
    caches = [name for name in (*different, *fixed) if _is_cache(name, mine) and _is_cache(name, theirs)]
    _refuse("buffer", {name: what for name, what in different.items() if name not in caches}, advice)
    buffers = {name: value for name, value in mine.buffers.items() if name not in caches} if caches else mine.buffers
    return parameters, local_pairs(buffers, theirs.buffers), caches


def take_over(name: str, mine: State, theirs: State) -> None:
    """Copy a cache of the student to the teacher, or remove one that the student no longer has."""
    prefix, _, key = name.rpartition(".")
    part, value = mine.parts[prefix], theirs.buffers.get(name)
    if value is not None:
        if key not in part._buffers:
            part.__dict__.pop(key, None)  # None, say, before the student made it a buffer
        part.register_buffer(key, widened(value.detach().clone()), persistent=False)
    elif key in theirs.parts[prefix]._buffers:
        part._buffers[key] = None
    else:
        delattr(part, key)


def places(state: State) -> set[int]:
    """Where the strided tensors of a network are in memory; empty ones and those on the meta device are nowhere."""
    values = dict(enumerate(value for _, value in state.every_name() if not value.is_meta))
    local = [value for value, _ in local_pairs(values, values) if value.layout == torch.strided]
    return {value.untyped_storage().data_ptr() for value in local} - {0}


def low_dtypes(state: State) -> dict[str, torch.dtype]:
    """The tensors with dtypes below float32, by name."""
    dtypes = {value.dtype for tensors in state[1:] for value in tensors.values()}
    if not any(map(is_low, dtypes)):
        return {}
    return {name: value.dtype for name, value in state.every_name() if is_low(value.dtype)}


def local_pairs(averaged: Mapping[Any, Tensor], current: Mapping[Any, Tensor]) -> Pairs:
    """Pairs of plain tensors; for a sharded average, this rank's shard and the matching part of the current value."""
    pairs = [(value, current[name]) for name, value in averaged.items()]
    if not any(map(is_sharded, {type(value): value for pair in pairs for value in pair}.values())):
        return pairs
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415 - loaded already, or there were no DTensors

    def local(old: Any, new: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - either may be a DTensor
        if not isinstance(old, DTensor):
            return old, new.full_tensor() if isinstance(new, DTensor) else new
        if not isinstance(new, DTensor):
            everywhere = [Replicate()] * old.device_mesh.ndim
            new = DTensor.from_local(new.detach(), old.device_mesh, everywhere, run_check=False)
        return old.to_local(), new.redistribute(old.device_mesh, old.placements).to_local()

    return [local(old, new) for old, new in pairs]


def first_difference(old: Tensor, new: Tensor) -> _Difference | None:
    """The first property in which two tensors do not match, with both values; None if they match."""
    if old.shape != new.shape:
        return "shape", tuple(old.shape), tuple(new.shape)
    if old.dtype != new.dtype and (can_average(old), old.is_complex()) != (can_average(new), new.is_complex()):
        return "dtype", old.dtype, new.dtype
    if old.is_meta != new.is_meta:
        return "device", old.device, new.device
    if old.layout != new.layout:
        return "layout", old.layout, new.layout
    return None


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return is_of_type(value, "torch.distributed.tensor", "DTensor")


def is_of_type(value: object, module: str, name: str) -> bool:
    """Whether a value is of a torch type; not if its module is not imported, as no instance can then exist."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _differences(averaged: dict[str, Tensor], current: dict[str, Tensor]) -> dict[str, _Difference | None]:
    """Mismatches by name: the result of `first_difference`, or None if one side lacks the tensor."""
    found: dict[str, _Difference | None] = dict.fromkeys(sorted(averaged.keys() ^ current.keys()))
    for name, value in averaged.items():
        if name not in found and (difference := first_difference(value, current[name])):
            found[name] = difference
    return found


def _refuse(kind: str, different: dict[str, _Difference | None], advice: str) -> None:
    """Raise if anything does not match. Missing names come first, as they suggest another network."""
    missing = [name for name, difference in different.items() if difference is None]
    names = f"{len(missing)} names differ, starting with {missing[0]!r}" if missing else ""
    found = names and f"s must be those of the teacher, but {names}"
    for name, difference in different.items():
        if difference is not None and not found:
            what, mine, theirs = difference
            found = f" {name!r} has {what} {theirs} but the teacher's {mine}"
    if found:
        raise ValueError(f"The student's {kind}{found}; {advice}.")


def _is_cache(name: str, state: State) -> bool:
    """Whether a buffer is non-persistent, or missing from a module that exists."""
    prefix, _, key = name.rpartition(".")
    part = state.parts.get(prefix)
    return part is not None and (name not in state.buffers or key in part._non_persistent_buffers_set)
