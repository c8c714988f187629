"""What every function and every module of the library has in common, as two lists of checks."""

import copy
import importlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossmix.datasets import DataError


@contextmanager
def waiting_is_an_error(*, on: bool = True) -> Iterator[None]:
    """While a GPU works."""
    if not on:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def examples(usual: int) -> int:
    """How many examples of a property are tried: more in the campaign."""
    return int(os.environ.get("CROSSMIX_EXAMPLES", usual))


Inputs = Mapping[str, Tensor]
Op = Callable[..., Any]
Wrap = Callable[[nn.Module], nn.Module]


def leaves(output: object) -> list[Tensor]:
    """The tensors of an output: a tensor, or a tuple of them."""
    if isinstance(output, Tensor):
        return [output]
    assert isinstance(output, tuple)
    return [tensor for part in output for tensor in leaves(part)]


def refusal(call: Callable[[], object], message: str, error: type[Exception] = DataError) -> str:
    """What the error says, which matches the message."""
    with pytest.raises(error, match=message) as caught:
        call()
    return str(caught.value)


def assert_same(got: object, want: object, **tolerance: float) -> None:
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def check_op(op: Op, inputs: Inputs, *, per_image: bool = True, whole: tuple[str, ...] = ()) -> None:
    """Inputs as they were, no gradient of its own, any strides, a batch is its images, and none is no error.

    `per_image` says that image i of the output comes from image i of the inputs alone; `whole` names the inputs that
    have no batch dimension.
    """
    versions = {name: value._version for name, value in inputs.items()}
    copies = {name: value.clone() for name, value in inputs.items()}
    want = op(**inputs)
    for name, value in inputs.items():
        assert value._version == versions[name], f"{name} was written to"
        assert torch.equal(value, copies[name])
    for tensor in leaves(want):
        assert not tensor.requires_grad
        assert tensor.device == next(iter(inputs.values())).device
        for value in inputs.values():
            assert value.numel() == 0 or tensor.data_ptr() != value.data_ptr(), "an output shares an input's memory"

    for layout in (transposed, strided, channels_last):
        assert_same(op(**{name: layout(value) for name, value in inputs.items()}), want)
    once = {name: value if name in whole else value[:1].expand_as(value) for name, value in inputs.items()}
    assert_same(op(**once), op(**{name: value.contiguous() for name, value in once.items()}))

    n = len(next(value for name, value in inputs.items() if name not in whole))
    empty = op(**{name: value if name in whole else value[:0] for name, value in inputs.items()})
    for tensor, full in zip(leaves(empty), leaves(want), strict=True):
        assert tensor.dtype == full.dtype
        assert tensor.shape == (full.shape if full.ndim == 0 else (0, *full.shape[1:]))
        assert not tensor.isnan().any()
    if per_image:
        order = torch.arange(n - 1, -1, -1)
        for rows in (*(torch.tensor([i]) for i in range(n)), order):
            part = op(**{name: value if name in whole else value[rows] for name, value in inputs.items()})
            assert_same(part, tuple(tensor[rows] for tensor in leaves(want)))


def transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.ndim > 1 else value


def strided(value: Tensor) -> Tensor:
    return torch.stack([value, value], -1).flatten(-2)[..., ::2]


def channels_last(value: Tensor) -> Tensor:
    return value.to(memory_format=torch.channels_last) if value.ndim == 4 else value


def check_module(module: nn.Module, call: Callable[[nn.Module], object], shown: Mapping[str, object]) -> None:
    """Forward leaves the state alone; copies, pickles and loaded states do what the module does; `repr` shows it."""
    before = copy.deepcopy(module.state_dict())
    want = call(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"forward changed {name}"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert_same(call(other), want, rtol=0, atol=0)
        other.load_state_dict(before, strict=True)
        assert_same(call(other), want, rtol=0, atol=0)
    for argument, value in shown.items():
        assert f"{argument}={value!r}" in repr(module)
    for tensor in (*module.double().parameters(), *module.buffers()):
        assert tensor.dtype in {torch.float64, torch.int64}
    for mode in (True, False):
        assert module.train(mode).training is mode


def needed(name: str) -> ModuleType:
    """A package that is not always there; skips where it is missing, or of another build than torch (torchvision)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it finds in others
        try:
            return importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"needs {name}: {error}", allow_module_level=True)


compiled = partial(torch.compile, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def sharded(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def sharded_in_place(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))


def parts(wrap: Wrap, network: nn.Module) -> nn.Module:
    """A DeepLab with a stage, a bottleneck of another one and the head wrapped."""
    network.layer1, network.layer2[0], network.layer5 = map(wrap, (network.layer1, network.layer2[0], network.layer5))
    return network


# Ways to wrap a DeepLab; the sharded ones want a process group.
WRAPS: dict[str, Wrap] = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "FSDP": sharded,
    "FSDP2": sharded_in_place,
    "nested": lambda network: nn.DataParallel(compiled(DistributedDataParallel(compiled(network)))),
    "compiled parts": partial(parts, compiled),
    "DataParallel parts": partial(parts, nn.DataParallel),
    "checkpointed parts": partial(parts, checkpoint_wrapper),
    "FSDP parts": lambda network: sharded(parts(sharded, network)),
    "FSDP2 parts": lambda network: sharded_in_place(parts(sharded_in_place, network)),
    "all of it": lambda network: DistributedDataParallel(
        parts(lambda part: nn.DataParallel(checkpoint_wrapper(compiled(part))), network)
    ),
}


class Watch(TorchDispatchMode):
    """Remember the dtypes of all tensors that come about, and the size of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.dtypes.add(tensor.dtype)
                self.largest = max(self.largest, tensor.numel())
        return out


def assert_equal_states(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Bit by bit."""
    torch.testing.assert_close(dict(got), dict(want), rtol=0, atol=0)
