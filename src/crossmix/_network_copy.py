"""Make the teacher's network: a deep copy of the student without wrappers, or a second network with its weights.

A network that cannot be copied is refused, with the part of it that is the reason.
"""

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from crossmix._averaging import average_, widened
from crossmix._network_state import State, is_a, matched, places, state_of, take_over
from crossmix._wrappers import named_parts, unwrapped

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_TORCHS_OWN = {*vars(nn.Module()), "_compiled_call_impl"} - _HOOKS.keys()  # attributes that hold nothing of the user's


def copied(student: nn.Module) -> nn.Module:
    """Deep-copy a network without its wrappers."""
    if any(is_a(part, "torch.distributed.fsdp", "FSDPModule") for part in student.modules()):
        raise ValueError(
            "`student` must not be sharded yet, since modules of `fully_shard` cannot be deep-copied; make the teacher "
            "first, then shard both alike, or shard a second network and pass it as `network=`."
        )
    if any(is_a(part, _FSDP1, "FullyShardedDataParallel") and _is_split(part) for part in student.modules()):
        raise ValueError(
            "`student` must not be sharded yet by FullyShardedDataParallel, whose shards a copy would keep; make the "
            "teacher first, and use `fully_shard` for both."
        )
    _refuse_captured(student)
    memo: dict[int, Any] = {}  # maps each wrapper to a copy of the module inside it
    try:
        for part in reversed(list(student.modules())):
            inner = unwrapped(part)
            if inner is not part:
                memo[id(part)] = copy.deepcopy(inner, memo)
        return _unexpanded(copy.deepcopy(student, memo))
    except Exception as error:
        where = _uncopyable(student)
        raise ValueError(
            f"`student` cannot be deep-copied, because of {where} ({error}); make the teacher before the first forward "
            "pass, or build a second network and pass it as `network=`."
        ) from error


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


def _refuse_captured(student: nn.Module) -> None:
    """Refuse functions that hold the student, as attributes or forward hooks: a copy would have the same ones."""
    owned = {id(part) for part in student.modules()}
    owned |= {
        id(value) for part in student.modules() for own in (part._parameters, part._buffers) for value in own.values()
    }
    owned -= {id(None)}
    for name, part in named_parts(student):  # without wrappers, which are not copied
        for key in part.__dict__.keys() - _TORCHS_OWN:
            if any(_holds(function, owned, set()) for function in _functions_in(part.__dict__[key])):
                what, of = _HOOKS.get(key, f"`{key}`"), f"its module {name!r}" if name else "it"
                raise ValueError(
                    f"`student` cannot be deep-copied: {what} of {of} is a function that holds the student itself, or "
                    "contains one, and the teacher would call it. Make the teacher first, compile in place by "
                    "`student.compile()`, or build a second network and pass it as `network=`."
                )


def _functions_in(value: object) -> list[FunctionType]:
    """A function or method, or those in a list, tuple or dict."""
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    functions = [one.__func__ if isinstance(one, MethodType) else one for one in several]
    return [one for one in functions if isinstance(one, FunctionType)]


def _holds(function: FunctionType, owned: set[int], seen: set[int]) -> bool:
    """Whether a function's closure or defaults hold a module or tensor of the student, itself or in a list or dict."""
    seen.add(id(function))
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # some are empty
    held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [one for value in held if isinstance(value, list | tuple) for one in value]
    held += [one for value in held if isinstance(value, dict) for one in value.values()]
    for value in held:
        bound = value.__self__ if isinstance(value, MethodType) else value
        inner = value.__func__ if isinstance(value, MethodType) else value
        if id(bound) in owned:
            return True
        if isinstance(inner, FunctionType) and id(inner) not in seen and _holds(inner, owned, seen):
            return True
    return False


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
