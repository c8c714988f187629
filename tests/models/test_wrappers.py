"""Wrappers around a network, or parts of it, are told by their type and not by their name."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from crossmix._wrappers import named_parts, plain_name, unwrapped

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "CheckpointWrapper": checkpoint_wrapper,
    "two": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),
}


class Awkward(nn.Module):
    """A network whose own attributes have the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self._orig_mod = nn.Linear(3, 2)
        self.nothing = None
        self.register_module("none", None)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(self.module(x)) * self.scale


@pytest.mark.parametrize("outer", [None, *WRAPPERS])
@pytest.mark.parametrize("inner", [None, *WRAPPERS])
def test_names__are_those_of_the_bare_network(outer: str | None, inner: str | None) -> None:
    bare = Awkward()
    names, parameters = list(bare.state_dict()), [name for name, _ in bare.named_parameters()]
    parts = dict(bare.named_modules())
    network: nn.Module = bare
    if inner is not None:
        bare.module[0] = WRAPPERS[inner](bare.module[0])
        bare._orig_mod = WRAPPERS[inner](bare._orig_mod)
    if outer is not None:
        network = WRAPPERS[outer](network)
    assert unwrapped(network) is bare
    assert [plain_name(network, name) for name in network.state_dict()] == names
    assert [plain_name(network, name) for name, _ in network.named_parameters()] == parameters
    assert dict(named_parts(network)) == parts


def test_unwrapped__where_no_wrapper_of_a_kind_was_ever_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in [name for name in sys.modules if name.startswith(("torch.distributed.fsdp", "torch._dynamo.eval"))]:
        monkeypatch.delitem(sys.modules, place)
    bare = nn.Linear(1, 1)
    assert unwrapped(nn.DataParallel(bare)) is bare


def test_plain_name__keeps_what_is_no_module() -> None:
    network = nn.DataParallel(Awkward())
    assert plain_name(network, "module._extra_state") == "_extra_state"
    assert plain_name(network, "module.module.0.made.by.a.hook") == "module.0.made.by.a.hook"


def test_imports__no_compiler_and_no_extra() -> None:
    code = "import sys, torch, crossmix._files, crossmix.models; from crossmix._wrappers import unwrapped; "
    code += "unwrapped(torch.nn.ReLU()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "crossmix.models.weights" in loaded
    assert not {"torch._dynamo", "safetensors", "filelock"} & {*loaded}
