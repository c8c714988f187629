"""Make the teacher's network: a deep copy of the student without wrappers, or a second network with its weights.

A network that cannot be copied is refused, with the part of it that is the reason.
"""

import copy
from collections.abc import Iterable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from crossmix._averaging import average_, widened
from crossmix._network_state import State, is_of_type, matched, places, state_of, take_over
from crossmix._wrappers import named_parts, unwrapped

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_TORCHS_OWN = {*vars(nn.Module()), "_compiled_call_impl"} - _HOOKS.keys()  # attributes that hold nothing of the user's


def copied(student: nn.Module) -> nn.Module:
    """Deep-copy a network without its wrappers."""
    if any(is_of_type(part, "torch.distributed.fsdp", "FSDPModule") for part in student.modules()):
        raise ValueError(
            "`student` must not be sharded yet, since modules of `fully_shard` cannot be deep-copied; make the teacher "
            "first, then shard both alike, or shard a second network and pass it as `network=`."
        )
    if any(is_of_type(part, _FSDP1, "FullyShardedDataParallel") and _is_split(part) for part in student.modules()):
        raise ValueError(
            "`student` must not be sharded yet by FullyShardedDataParallel, whose shards a copy would keep; make the "
            "teacher first, and use `fully_shard` for both."
        )
    memo: dict[int, Any] = {}  # maps each wrapper to a copy of the module inside it
    try:
        for part in reversed(list(student.modules())):
            inner = unwrapped(part)
            if inner is not part:
                memo[id(part)] = copy.deepcopy(inner, memo)
        made = copy.deepcopy(student, memo)
    except Exception as error:
        where = _uncopyable(student)
        raise ValueError(
            f"`student` cannot be deep-copied, because of {where} ({error}); make the teacher before the first forward "
            "pass, or build a second network and pass it as `network=`."
        ) from error
    _refuse_captured(made, student)
    return _unexpanded(made)


def filled(network: nn.Module, student: State) -> nn.Module:
    """Copy the student's weights and buffers into a second network given by the user."""
    network = unwrapped(network)
    mine = state_of(network)
    shared = places(student) & places(mine)
    if shared:
        raise ValueError(f"`network` must be a second network, but shares {len(shared)} tensors with `student`.")
    matched(mine, student, "build `network` like the student")  # raise before anything is changed
    _unexpanded(network)._apply(widened)  # type: ignore[no-untyped-call]
    mine = state_of(network)
    parameters, buffers, caches = matched(mine, student)
    with torch.no_grad():
        average_([*parameters, *buffers], 0.0)
        for name in caches:
            take_over(name, mine, student)
    return network


def _is_split(part: Any) -> bool:  # noqa: ANN401 - a FullyShardedDataParallel
    return bool(part.sharding_strategy.name != "NO_SHARD")


def _refuse_captured(made: nn.Module, student: nn.Module) -> None:
    """Refuse a copy with functions that refer to the student, as attributes or forward hooks: it shares them."""
    tensors = [
        value for part in student.modules() for own in (part._parameters, part._buffers) for value in own.values()
    ]
    owned = {id(one) for one in (*student.modules(), *tensors) if one is not None}
    for name, part in named_parts(made):
        for key in part.__dict__.keys() - _TORCHS_OWN:
            if any(_refers(function, owned, set()) for function in _functions_in(part.__dict__[key])):
                what, of = _HOOKS.get(key, f"`{key}`"), f" of its module {name!r}" if name else ""
                raise ValueError(
                    f"`student` cannot be copied for the teacher: {what}{of} refers to modules or tensors of the "
                    "student, and the teacher would use those. Make the teacher first, use a method of the network "
                    "instead, compile in place by `student.compile()`, or build a second network and pass it as "
                    "`network=`."
                )


def _functions_in(value: object) -> list[object]:
    """A function, or those in a list, tuple or dict."""
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [one for one in several if isinstance(one, FunctionType | MethodType | partial)]


def _refers(value: object, owned: set[int], seen: set[int]) -> bool:
    """Whether a value is one of those owned, or a function or collection that holds one."""
    if id(value) in owned:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_refers(one, owned, seen) for one in _held(value))


def _held(value: object) -> Iterable[object]:
    """What a function holds by closure, defaults or binding, or a collection by its elements."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # some are empty
        return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _uncopyable(module: nn.Module, name: str = "") -> str:
    """Describe the smallest part of a network that cannot be deep-copied."""
    for key, child in module._modules.items():
        if child is not None and not _can_be_copied(child):
            return _uncopyable(child, f"{name}.{key}" if name else key)
    of = f"its module {name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    for key, value in {**module.__dict__, **module._parameters, **module._buffers}.items():
        if key not in {"_parameters", "_buffers", "_modules"} and not _can_be_copied(value):
            return f"`{key}` of {of}"
    return of


def _can_be_copied(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - whatever the reason
        return False
    return True


def _unexpanded(network: nn.Module) -> nn.Module:
    """Give every element of a buffer its own memory; an expanded buffer could not be updated."""
    for part in network.modules():
        for key, value in part._buffers.items():
            if value is not None and value.layout == torch.strided and 0 in value.stride():
                part._buffers[key] = value.clone(memory_format=torch.contiguous_format)
    return network
