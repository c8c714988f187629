"""The mean teacher."""

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn

from checks import assert_equal_states, sharded, sharded_in_place
from crossmix import MeanTeacher
from crossmix import functional as F
from crossmix.models import load_weights
from oracles import SlowNetwork, seeded, with_batch_statistics

IMAGES = torch.rand(2, 3, 8, 8, generator=seeded(0))
LOW = (torch.float16, torch.bfloat16)


def student(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).to(dtype)


@torch.no_grad()
def shake(module: nn.Module, seed: int) -> None:
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=seeded(seed)).to(p))


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("warmup", "start"), [(True, 0), (True, 1), (False, 0)])
def test_update__follows_the_ramp(decay: float, warmup: bool, start: int) -> None:
    network = student(torch.float64)
    teacher = MeanTeacher(network, decay=decay, warmup=warmup, start=start)
    want = {name: p.detach().clone() for name, p in network.named_parameters()}
    for t in range(start, 110):
        shake(network, t)
        teacher.update(network)
        d = min(1 - 1 / (t + 1), decay) if warmup else decay
        for name, p in network.named_parameters():
            want[name] = d * want[name] + (1 - d) * p.detach()
    torch.testing.assert_close(dict(teacher.module.named_parameters()), want, rtol=1e-12, atol=1e-12)
    assert teacher.num_updates == 110


def test_start__is_a_count() -> None:
    for start, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`start` must"):
            MeanTeacher(student(), start=start)
    teacher = MeanTeacher(student(), start=7)
    with torch.device("meta"):
        state = teacher.state_dict()
    assert int(state["_extra_state"]) == 7  # on no device but the CPU


def test_update__the_first_one_copies_bit_by_bit() -> None:
    network = student()
    teacher = MeanTeacher(network)
    shake(network, 1)
    with torch.no_grad():
        next(network.parameters()).fill_(math.inf)  # a copy, not 0 * old + 1 * new
    teacher.update_parameters(network)
    assert_equal_states(teacher.module.state_dict(), network.state_dict())


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_update__buffers(buffers: str) -> None:
    network = student().train()
    teacher = MeanTeacher(network, decay=0.5, warmup=False, buffers=buffers)
    old = {name: b.clone() for name, b in teacher.module.named_buffers()}
    for _ in range(3):
        network(IMAGES)
    teacher.update(network)
    new = dict(network.named_buffers())
    for name, b in teacher.module.named_buffers():
        average = buffers == "average" and b.is_floating_point()
        torch.testing.assert_close(b, 0.5 * old[name] + 0.5 * new[name] if average else new[name])
    assert int(teacher.module[1].num_batches_tracked) == 3


def test_update__averages_shared_tensors_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.again = self.first
            self.nothing = None
            self.register_parameter("none", None)
            self.register_buffer("scale", torch.ones(2))
            self.second.register_buffer("scale", self.scale)

    network = Tied()
    teacher = MeanTeacher(network, decay=0.5, warmup=False, buffers="average")
    want = {name: value + 1.0 for name, value in teacher.module.state_dict().items()}
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.add_(2.0)
    teacher.update(network)
    torch.testing.assert_close(dict(teacher.module.state_dict()), want)


def test_ema_update__mixed_dtypes_and_integers() -> None:
    averaged = [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.tensor([1, 2]), torch.tensor([True])]
    current = [torch.ones(3), torch.ones(2), torch.tensor([5, 6]), torch.tensor([False])]
    F.ema_update_(averaged, current, 0.75)
    quarters = [torch.full((3,), 0.25), torch.full((2,), 0.25, dtype=torch.float64)]
    torch.testing.assert_close(averaged, [*quarters, *current[2:]])
    F.ema_update_(averaged, [torch.full((3,), math.inf), torch.full((2,), math.nan), *current[2:]], 1.0)
    torch.testing.assert_close(averaged[:2], quarters)  # a decay of 1 changes no float
    assert current[0].tolist() == [1, 1, 1]
    F.ema_update_([], [], 0.5)


@pytest.mark.parametrize("dtype", LOW)
def test_ema_update__rounds_a_low_precision_average_once(dtype: torch.dtype) -> None:
    old, new = torch.rand(2, 50, generator=seeded(0))
    averaged = [old.to(dtype), old.clone()]
    F.ema_update_(averaged, [new, new.to(dtype)], 0.75)
    torch.testing.assert_close(averaged[0], (0.75 * old.to(dtype).float() + 0.25 * new).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(averaged[1], 0.75 * old + 0.25 * new.to(dtype).float())


def test_ema_update__refuses_before_it_changes_anything() -> None:
    for bad, error, message in (
        (torch.zeros(3), ValueError, r"`averaged\[1\]` has shape \(2,\) but `current\[1\]` \(3,\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, r"`averaged\[1\]` has dtype torch.float32 but .* torch.int64"),
        (torch.zeros(2, device="meta"), ValueError, r"`averaged\[1\]` has device cpu but `current\[1\]` meta"),
        ([0.0, 0.0], TypeError, r"`current\[1\]` must be a torch.Tensor, got list"),
    ):
        averaged = [torch.ones(2), torch.ones(2)]
        with pytest.raises(error, match=message):
            F.ema_update_(averaged, [torch.zeros(2), bad], 0.5)
        assert [value.tolist() for value in averaged] == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="holds 2 tensors but `current` 1"):
        F.ema_update_(averaged, averaged[:1], 0.5)


def test_forward__has_batch_statistics_by_default() -> None:
    torch.manual_seed(0)
    network, images = SlowNetwork(4).double(), 7 * IMAGES.double()
    network.norm.running_mean.fill_(3.0)
    teacher = MeanTeacher(network)
    assert teacher.mode == "train"
    want = with_batch_statistics(dict(network.named_parameters()), images)
    running = copy.deepcopy(network).eval()(images)
    torch.testing.assert_close(teacher(images), want)
    torch.testing.assert_close(teacher.module(images), running)  # evaluating it as usual
    torch.testing.assert_close(teacher(images), want)  # and its own mode is back
    torch.testing.assert_close(MeanTeacher(network, mode="eval")(images), running)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward__has_its_own_mode_and_leaves_the_modules_theirs(mode: str) -> None:
    network = student()
    teacher = MeanTeacher(network, mode=mode)
    assert not any(part.training for part in teacher.module.modules())  # an ordinary network, ready to be evaluated
    reference = copy.deepcopy(network).eval()
    reference[1].train(mode == "train")
    want = reference(IMAGES)
    parent = nn.ModuleList([teacher])
    for set_mode in (parent.train, parent.eval, teacher.train, teacher.module.train, teacher.module[1].eval):
        set_mode()
        flags = [part.training for part in teacher.module.modules()]
        torch.testing.assert_close(teacher(IMAGES), want, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="expected input"):
            teacher(IMAGES[:, :2])
        assert [part.training for part in teacher.module.modules()] == flags
    parent.train()
    assert parent.training
    assert teacher.training


class Norms(nn.Module):
    """Every kind of layer with running statistics, the last one used by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch = nn.BatchNorm2d(3)
        self.cumulative = nn.BatchNorm2d(3, momentum=None)
        self.sync = nn.SyncBatchNorm(3)
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.by_hand = nn.BatchNorm2d(3)
        for part in self.children():
            if part.running_mean is not None:
                nn.init.normal_(part.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.batch, self.cumulative, self.sync, self.instance, self.plain):
            x = part(x).sigmoid()
        last = self.by_hand
        return nn.functional.batch_norm(x, last.running_mean, last.running_var, training=last.training)


class ByOneself(nn.BatchNorm2d):
    """Does everything itself, and has statistics of its own."""

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("smallest", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, square = x.mean((0, 2, 3)), (x**2).mean((0, 2, 3))
        if self.training:
            self.running_mean += 0.1 * (mean.detach() - self.running_mean)
            self.running_var.mul_(0.9).add_(0.1 * (square - mean**2).detach())
            self.smallest.copy_(x.detach().amin((0, 2, 3)))
        else:
            mean, square = self.running_mean, self.running_var + self.running_mean**2
        return (x - mean[:, None, None]) / (square - mean**2 + self.eps).sqrt()[:, None, None]


class InFloat32(nn.BatchNorm2d):
    """Casts everything, then does as torch does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.running_mean.float(), self.running_var.float(), self.weight.float(), self.bias.float())
        return nn.functional.batch_norm(x.float(), *parts, self.training, self.momentum, self.eps).to(x.dtype)


OWN_NORMS = (ByOneself, partial(InFloat32, 3))


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [(Norms, torch.float32), *((norm, dtype) for norm in OWN_NORMS for dtype in (torch.float32, torch.bfloat16))],
)
def test_forward__moves_no_statistics_of_any_layer(norm: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    images = IMAGES.to(dtype)
    for network in (norm().to(dtype), nn.Sequential(nn.Conv2d(3, 3, 1), norm()).to(dtype)):
        teacher = MeanTeacher(network)
        before = copy.deepcopy(teacher.state_dict())
        want = copy.deepcopy(network).train()(images)
        for train in (False, True):
            teacher.module.train(train)
            torch.testing.assert_close(teacher(images), want)
            teacher(images * math.nan)
        assert_equal_states(teacher.state_dict(), before)


def test_module__taken_out_is_an_ordinary_network() -> None:
    network = Norms()
    teacher = MeanTeacher(network)
    teacher(IMAGES)
    taken = copy.deepcopy(teacher.module).train().requires_grad_()
    before = copy.deepcopy(taken.state_dict())
    torch.testing.assert_close(taken(IMAGES), network.train()(IMAGES))
    torch.testing.assert_close(dict(taken.named_buffers()), dict(network.named_buffers()))
    optimizer = torch.optim.SGD(taken.parameters(), lr=0.1)
    (taken(IMAGES) * IMAGES).sum().backward()
    optimizer.step()
    still = {name for name, value in taken.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"by_hand.weight", "by_hand.bias", "by_hand.num_batches_tracked", "instance.num_batches_tracked"}
    assert_equal_states(teacher.module.state_dict(), before)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_update_bn__does_what_it_does_to_an_averaged_model(mode: str) -> None:
    batches = [torch.rand(4, 3, 8, 8, generator=seeded(k)) for k in range(3)]
    network = student()
    teacher, reference = MeanTeacher(network, mode=mode), AveragedModel(network)
    before = teacher(IMAGES)
    for model in (teacher, reference):
        torch.manual_seed(1)  # dropout is on, as in training
        update_bn([(batch, None) for batch in batches], model)
    assert not torch.equal(teacher.module[1].running_mean, network[1].running_mean)
    assert_equal_states(teacher.module.state_dict(), reference.module.state_dict())
    assert teacher.module[1].momentum == 0.1
    after = copy.deepcopy(teacher.state_dict())
    assert torch.equal(teacher(IMAGES), before) is (mode == "train")  # it does not read what was refreshed
    assert_equal_states(teacher.state_dict(), after)
    assert not any(part.training for part in teacher.module.modules())


def test_update_bn__of_a_low_precision_network_refreshes_what_is_kept() -> None:
    batches = [torch.rand(4, 3, 8, 8, generator=seeded(k)).bfloat16() for k in range(3)]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).bfloat16()
    teacher = MeanTeacher(network)
    update_bn(batches, teacher)
    hidden = torch.stack([network[0](batch).float().mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(teacher.module[1].running_mean, hidden.detach(), rtol=1e-2, atol=1e-3)


def test_teacher__has_no_gradients() -> None:
    network = student()
    network(IMAGES).sum().backward()
    teacher = MeanTeacher(network)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert not teacher(IMAGES.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("cast", ["student", "parent", "module", "student afterwards"])
def test_average__moves_where_it_would_stand_still_in_low_precision(dtype: torch.dtype, cast: str) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.ones_(network[0].weight)
    if cast == "student":
        network.to(dtype)
    teacher = MeanTeacher(network, warmup=False, buffers="average", mode="eval")
    if cast == "parent":
        nn.ModuleList([teacher]).to(dtype)
    elif cast == "module":
        teacher.module.to(dtype)
    network.to(dtype)
    nn.init.constant_(network[0].weight, 1.0625)
    network[1].running_mean.fill_(0.0625)
    for _ in range(1000):
        teacher.update(network)
    assert dtypes(teacher) == {torch.float32, torch.int64}
    torch.testing.assert_close(teacher.module[0].weight, torch.full((2, 2), 1.0625), rtol=1e-4, atol=0)
    torch.testing.assert_close(teacher.module[1].running_mean, torch.full((2,), 0.0625), rtol=1e-4, atol=0)
    x = torch.rand(3, 2, generator=seeded(0)).to(dtype)
    torch.testing.assert_close(teacher(x), network.eval()(x), rtol=1e-2, atol=1e-2)  # in its dtype


@pytest.mark.parametrize("dtype", LOW)
def test_cast__is_for_the_forward_pass_alone(dtype: torch.dtype) -> None:
    network = student()
    teacher = MeanTeacher(network)
    exact = copy.deepcopy(teacher.state_dict())
    parent, images = nn.ModuleList([network, teacher]).to(dtype), IMAGES.to(dtype)
    assert_equal_states(teacher.state_dict(), exact)  # not even rounded
    reference = copy.deepcopy(network).eval()
    reference[1].train()
    want = reference(images)
    for one in (teacher, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        torch.testing.assert_close(one(images), want, rtol=0, atol=0)
    assert_equal_states(teacher.state_dict(), exact)
    parent.float()
    assert torch.equal(teacher(IMAGES), MeanTeacher(student())(IMAGES))
    parent.to(dtype).double()
    assert teacher(IMAGES.double()).dtype == torch.float64
    assert_equal_states(teacher.float().state_dict(), exact)


def test_cast__other_conversions_are_those_of_any_module() -> None:
    teacher = MeanTeacher(student().bfloat16())
    teacher.share_memory()
    assert all(p.is_shared() for p in teacher.parameters())
    teacher.to(memory_format=torch.channels_last)
    assert teacher.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    teacher.to("meta").to_empty(device="cpu")
    assert dtypes(teacher) == {torch.float32, torch.int64}
    assert teacher(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert teacher.float()(IMAGES).dtype == torch.float32
    teacher = MeanTeacher(student())
    teacher.module.bfloat16()  # by hand, which stays so in the forward pass
    teacher.update(student())
    assert dtypes(teacher) == {torch.float32, torch.int64}
    assert teacher(IMAGES.bfloat16()).dtype == torch.bfloat16


class MixedDtypes(nn.Module):
    """Convolutions in bfloat16 around a norm in float32, and one table for two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 1).bfloat16(), nn.Conv2d(4, 4, 1).bfloat16()
        self.norm, self.again = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1).bfloat16()
        self.again.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.last(self.norm(self.first(x).float()).bfloat16()))


def test_forward__runs_each_parameter_in_the_students_dtype() -> None:
    network, images = MixedDtypes(), IMAGES.bfloat16()
    teacher = MeanTeacher(network)
    assert dtypes(teacher) == {torch.float32, torch.int64}
    want = network(images)
    assert torch.equal(teacher(images), want)
    assert teacher.module.again.weight is teacher.module.last.weight
    state = teacher.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    again = MeanTeacher(MixedDtypes())
    for assign in (False, True):
        again.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(again(images), want)
    again.load_state_dict(state | {f"module.{k}": v for k, v in network.state_dict().items()})
    assert dtypes(again) == {torch.float32, torch.int64}


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load__of_half_precision_weights_changes_no_dtype_of_a_forward_pass(dtype: torch.dtype, parent: bool) -> None:
    network = student(dtype)
    teacher = MeanTeacher(network)
    state = {f"{'0.' * parent}module.{name}": value for name, value in student(torch.float16).state_dict().items()}
    (nn.Sequential(teacher) if parent else teacher).load_state_dict(state, strict=False, assign=True)
    for _ in range(2):
        assert teacher(IMAGES.to(dtype)).dtype == dtype
        assert dtypes(teacher) == {torch.float32, torch.int64}
        teacher.update(network)


def from_file(into: Callable[[MeanTeacher], nn.Module]) -> Callable[[MeanTeacher, dict[str, Tensor], Path], object]:
    def load(teacher: MeanTeacher, state: dict[str, Tensor], path: Path) -> None:
        torch.save({"student": {}, "teacher": state}, path)
        load_weights(into(teacher), path, entry="teacher")

    return load


LOADS: dict[str, Callable[[MeanTeacher, dict[str, Tensor], Path], object]] = {
    "load_weights into the module": from_file(lambda teacher: teacher.module),
    "load_weights into the teacher": from_file(lambda teacher: teacher),
    "the module's state": lambda teacher, state, _: teacher.module.load_state_dict(state),
    "the module's, assigned": lambda teacher, state, _: teacher.module.load_state_dict(state, assign=True),
    "each part's": lambda teacher, state, _: [
        part.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith(f"{name}.")})
        for name, part in teacher.module.named_children()
    ],
    "the teacher's without a count": lambda teacher, state, _: teacher.load_state_dict(
        {f"module.{name}": value for name, value in state.items()}, strict=False
    ),
    "a parent's without a count": lambda teacher, state, _: nn.ModuleDict({"teacher": teacher}).load_state_dict(
        {f"teacher.module.{name}": value for name, value in state.items()}, strict=False
    ),
}


@pytest.mark.parametrize(("decay", "saved"), [(0.99, False), (0.99, True), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("way", LOADS)
def test_loaded_weights__are_averaged_on_and_not_copied_over(
    way: str, decay: float, saved: bool, tmp_path: Path
) -> None:
    network, other = student(), student()
    teacher = MeanTeacher(network, decay=decay)
    shake(other, 5)
    LOADS[way](teacher, copy.deepcopy(other.state_dict()), tmp_path / "weights.pt")
    if saved:
        state = copy.deepcopy(teacher.state_dict())
        teacher = MeanTeacher(network, decay=decay)
        teacher.load_state_dict(state)
    want = {name: p.detach().clone() for name, p in other.named_parameters()}
    for step in range(3):
        shake(network, step)
        teacher.update(network)
        for name, p in network.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * p.detach()
    torch.testing.assert_close(dict(teacher.module.named_parameters()), want)


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_count__goes_on_in_copies_and_loaded_states(updates: int) -> None:
    network = student()
    teacher, loaded = MeanTeacher(network), MeanTeacher(student())
    for step in range(updates):
        shake(network, step)
        teacher.update(network)
    state = copy.deepcopy(nn.ModuleDict({"teacher": teacher}).state_dict())
    nn.ModuleDict({"teacher": loaded}).load_state_dict(state)
    others = (loaded, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher)))
    for step in range(3):
        shake(network, 9 + step)
        for one in (teacher, *others):
            one.update(network)
    for other in others:
        assert other.num_updates == updates + 3
        assert_equal_states(other.state_dict(), teacher.state_dict())


def test_loaded_weights__of_another_network_are_no_concern() -> None:
    network = student()
    teacher = MeanTeacher(network)
    copy.deepcopy(teacher.module).load_state_dict(network.state_dict())
    teacher.module.load_state_dict({"other": torch.ones(1)}, strict=False)  # nothing of it fits
    network.load_state_dict(network.state_dict())
    shake(network, 1)
    teacher.update(network)
    assert_equal_states(teacher.module.state_dict(), network.state_dict())
    assert teacher.num_updates == 1


class Cache(nn.Module):
    """Keeps a grid of the last input's size in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 1)
        self.register_buffer("grid", torch.zeros(2, 2), persistent=False)
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("saved", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        if self.grid.shape != images.shape[-2:]:
            self.grid = torch.ones(images.shape[-2:])
            self.late = torch.arange(3.0)
            if "further" not in self._buffers:
                self.register_buffer("further", torch.arange(2), persistent=False)
        return self.convolution(images) + self.grid


# What is done to the student, or what is given instead of it.
BREAKS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "another shape": (lambda network: network.register_buffer("saved", torch.zeros(3)), r"has shape \(3,\) but the te"),
    "integers": (lambda network: network.register_buffer("saved", torch.zeros(2, dtype=torch.int64)), "has dtype"),
    "complex": (lambda network: network.register_buffer("saved", torch.zeros(2, dtype=torch.cfloat)), "has dtype"),
    "sparse": (lambda network: network.register_buffer("saved", torch.zeros(2).to_sparse()), "has layout"),
    "another device": (lambda network: network.register_buffer("saved", torch.zeros(2, device="meta")), "has device"),
    "a buffer more": (lambda network: network.register_buffer("more", torch.zeros(1)), "starting with 'more'"),
    "a parameter more": (lambda network: network.add_module("more", nn.Conv2d(1, 1, 1)), "2 names differ"),
    "another network": (lambda _: nn.Conv2d(3, 2, 1), "parameters must be those of the teacher, but 4 names differ"),
}


@pytest.mark.parametrize("change", BREAKS)
def test_update__refused_changes_nothing(change: str) -> None:
    network, (do, message) = Cache(), BREAKS[change]
    teacher = MeanTeacher(network, decay=0.5)
    network(IMAGES)
    shake(network, 1)
    given = do(network) or network
    before = copy.deepcopy(dict(teacher.state_dict()) | dict(teacher.named_buffers()))
    with pytest.raises(ValueError, match=f"{message}.*pass the network that the teacher was made from"):
        teacher.update(given)
    assert_equal_states(dict(teacher.state_dict()) | dict(teacher.named_buffers()), before)
    assert teacher.num_updates == 0


def test_update__in_inference_mode_or_of_caches_made_there() -> None:
    network, images = Cache(), torch.rand(1, 3, 4, 5, generator=seeded(0))
    teacher = MeanTeacher(network)
    with torch.inference_mode():
        teacher(images)  # the network makes buffers here, which no other mode may change
        network(images)
        shake(network, 1)
        teacher.update(network)
    assert not any(tensor.is_inference() for tensor in teacher.module.buffers())
    for step in (2, 3):
        network(torch.rand(1, 3, 3, step))
        shake(network, step)
        teacher.update(network)
        with torch.inference_mode():
            teacher(torch.rand(1, 3, 6, step))
    teacher.update(network)
    assert teacher.num_updates == 4
    assert_equal_states(dict(teacher.module.named_buffers()), dict(network.named_buffers()))


def test_update__takes_over_caches_that_do_not_match() -> None:
    network = Cache()
    teacher = MeanTeacher(network, decay=0.5, warmup=False, buffers="average")
    names = set(teacher.state_dict())
    for size in (4, 5):
        images = torch.rand(1, 3, size, size, generator=seeded(size))
        network(images)
        teacher.update(network)
        assert {name for name, _ in teacher.module.named_buffers()} == {"grid", "late", "further", "saved"}
        for name in ("grid", "late", "further"):
            assert torch.equal(getattr(teacher.module, name), getattr(network, name))
            assert getattr(teacher.module, name) is not getattr(network, name)
        torch.testing.assert_close(teacher(images), network(images))
    network.grid.fill_(5.0)  # of the teacher's shape: averaged like any other buffer
    teacher.update(network)
    assert teacher.module.grid.eq(3.0).all()
    network.late = None
    del network.further
    teacher.update(network)
    assert {name for name, _ in teacher.module.named_buffers()} == {"grid", "saved"}
    assert set(teacher.state_dict()) == names
    network.bfloat16()
    network(torch.rand(1, 3, 2, 2).bfloat16())
    teacher.update(network)
    assert dtypes(teacher) == {torch.float32, torch.int64}


def parts() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return nn.Sequential(OrderedDict(module=inner, head=nn.Conv2d(4, 2, 1)))  # DataParallel uses the first name too


def wrap_parts(network: nn.Module) -> nn.Module:
    network.module[0] = torch.compile(network.module[0], backend="eager")
    network.module = nn.DataParallel(network.module)
    network.head = nn.DataParallel(torch.compile(network.head, backend="eager"))
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("when", ["before", "after", "the teacher's too", "in place"])
def test_update__looks_through_wrappers_at_any_depth(when: str) -> None:
    network = parts()
    names = list(network.state_dict())
    if when == "in place":
        network.compile(backend="eager")
    wrapped = wrap_parts(network) if when == "before" else network
    teacher = MeanTeacher(wrapped, decay=0.5)
    assert list(teacher.module.state_dict()) == names
    assert type(teacher.module) is nn.Sequential
    if when in {"after", "the teacher's too"}:
        wrapped = wrap_parts(network)
    if when == "the teacher's too":
        wrap_parts(teacher.module)
    plain, reference = MeanTeacher(parts(), decay=0.5), parts()
    for step, given in enumerate((wrapped, network)):
        for average, of in ((teacher, given), (plain, reference)):
            shake(of, step)
            average.update(of)
    assert torch.equal(teacher(IMAGES), plain(IMAGES))
    network.bfloat16()
    teacher.update(wrapped)
    assert teacher(IMAGES.bfloat16()).dtype == torch.bfloat16


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"conv": nn.Conv2d(3, 2, 1), "norm": nn.BatchNorm2d(2)})
        self.body.last = None

    def forward(self, images: Tensor) -> Tensor:
        self.body.last = self.body["norm"](self.body["conv"](images))
        return self.body.last


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(module)


def test_student__that_cannot_be_copied_is_named_with_the_remedy() -> None:
    network = Remembers()
    MeanTeacher(network)
    network(IMAGES)
    with pytest.raises(ValueError, match=r"`last` of its module 'body' \(ModuleDict\).*first forward pass.*`network=`"):
        MeanTeacher(network)
    with pytest.raises(ValueError, match=r"because of `weight` of its module '1' \(Conv2d\)"):
        MeanTeacher(nn.Sequential(nn.ReLU(), old_weight_norm(nn.Conv2d(3, 2, 1))))
    network.body.last = None
    network.group = (value for value in (1, 2))  # as little to be copied as a process group
    with pytest.raises(ValueError, match=r"`group` of the Remembers itself \(cannot pickle"):
        MeanTeacher(network)


def around(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def call(*inputs: Tensor, scale: float = 1.0) -> Tensor:
        return scale * function(*inputs)

    return call


# What is done to a student so that a part of it is a function, and whether a deep copy would keep calling the student.
REPLACED: dict[str, tuple[Callable[[Any], object], bool]] = {
    "compiled": (lambda net: setattr(net, "forward", torch.compile(net.forward, backend="eager")), True),
    "a compiled part": (lambda net: setattr(net[0], "forward", torch.compile(net[0].forward, backend="eager")), True),
    "autocast": (lambda net: setattr(net, "forward", torch.autocast("cpu", torch.bfloat16)(net.forward)), True),
    "wrapped": (lambda net: setattr(net, "forward", around(net.forward)), True),
    "twice": (lambda net: setattr(net[0], "forward", around(around(net[0].forward))), True),
    "a lambda": (lambda net: setattr(net, "forward", lambda images: net[1](net[0](images))), True),
    "a weight": (lambda net: setattr(net, "scaled", lambda weight=net[0].weight: 2 * weight), True),
    "a list": (lambda net: setattr(net, "forward", through([*net])), True),
    "a dict in a keyword": (lambda net: setattr(net, "forward", through(whole=net)), True),
    "a method": (lambda net: setattr(net, "forward", MethodType(lambda self, images: net[0](images), net)), True),
    "a buffer": (lambda net: setattr(net, "shifted", lambda shift=net[0].shift: 2 * shift), True),
    "a partial of a lambda": (
        lambda net: setattr(net, "forward", partial(lambda k, x: k * net[1](net[0](x)), 2)),
        True,
    ),
    "a partial that is given a layer": (lambda net: setattr(net, "second", partial(torch.add, net[1].weight)), False),
    "in a dict": (lambda net: setattr(net, "steps", {"second": lambda images: 2 * net[1](images)}), True),
    "in a list": (lambda net: setattr(net, "steps", [lambda images: 2 * net[1](images)]), True),
    "a hook": (lambda net: net[0].register_forward_hook(lambda *_: net[1].weight.mean() and None), True),
    "a hook before": (lambda net: net.register_forward_pre_hook(lambda *_: setattr(net, "calls", 1)), True),
    "a hook of a method": (lambda net: net[0].register_forward_hook(MethodType(shifted, net[0])), False),
    "a hook that holds nothing": (lambda net: net[0].register_forward_hook(partial(shifted, None)), False),
    "a hook of a function": (lambda net: net[0].register_forward_hook(lambda part, _, out: out + part.shift), False),
    "compiled in place": (lambda net: net.compile(backend="eager"), False),
    "a partial": (lambda net: setattr(net, "forward", partial(net.forward)), False),
    "a bound method": (lambda net: setattr(net, "before", net.forward), False),
    "of the class": (lambda net: setattr(net, "forward", MethodType(around(nn.Sequential.forward), net)), False),
    "another one's": (lambda net: setattr(net, "loss", around(nn.CrossEntropyLoss())), False),
    "of torch": (lambda net: setattr(net, "up", nn.functional.interpolate), False),
    "a method that names what it wraps": (
        lambda net: setattr(net, "forward", MethodType(wraps(net.forward)(lambda self, x: self[1](self[0](x))), net)),
        False,
    ),
}


def shifted(self: nn.Module | None, part: nn.Module, _: object, output: Tensor) -> Tensor:
    return output + (part if self is None else self).shift


def through(layers: Any = (), **kept: Any) -> Callable[[Tensor], Tensor]:
    def forward(images: Tensor, *, layers: Any = layers, kept: Any = kept) -> Tensor:
        for layer in layers:
            images = layer(images)
        return kept["whole"](images) if kept else images

    return forward


@pytest.mark.parametrize("how", REPLACED)
def test_student__functions_that_hold_it_are_refused_and_others_follow_the_copy(how: str) -> None:
    network, (replace, holds) = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False)), REPLACED[how]
    network[0].register_buffer("shift", torch.ones(1))
    replace(network)
    if holds:
        with pytest.raises(ValueError, match=r"refers to modules or tensors of the student.*`network=`"):
            MeanTeacher(network)
        return
    teacher = MeanTeacher(network)
    before = teacher(IMAGES)
    shake(network, 1)
    assert torch.equal(teacher(IMAGES), before)


class CopiesItself(nn.Conv2d):
    """A network with a hook that holds it, and copies with hooks of their own."""

    def __init__(self) -> None:
        super().__init__(3, 2, 1)
        self.register_forward_hook(lambda *_: self.weight.mean() * 0 + _[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiesItself":
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied


def test_student__may_copy_itself() -> None:
    network = CopiesItself()
    teacher = MeanTeacher(network)
    before = teacher(IMAGES)
    shake(network, 1)
    assert torch.equal(teacher(IMAGES), before)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.usefixtures("process_group")
def test_student__in_shards_of_several_ranks_is_refused() -> None:
    network = sharded(student())
    network.sharding_strategy = ShardingStrategy.FULL_SHARD  # one rank has no shards
    with pytest.raises(ValueError, match="must not be sharded yet by FullyShardedDataParallel"):
        MeanTeacher(nn.Sequential(network))


def test_update__takes_over_a_cache_that_was_a_plain_attribute() -> None:
    network = nn.Conv2d(3, 2, 1)
    network.cache = None
    teacher = MeanTeacher(network, decay=0.5)
    del network.cache
    network.register_buffer("cache", torch.arange(3.0), persistent=False)
    teacher.update(network)
    assert torch.equal(teacher.module.cache, network.cache)
    assert teacher.num_updates == 1


def test_network__may_have_sparse_buffers() -> None:
    network, second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
    for part, value in (network, 2.0), (second, 1.0):
        part.register_buffer("sparse", torch.tensor([0.0, value]).to_sparse())
    teacher = MeanTeacher(network, network=second)
    assert torch.equal(teacher.module.sparse.to_dense(), torch.tensor([0.0, 2.0]))


def test_network__takes_the_place_of_the_copy() -> None:
    network, second = Remembers(), Remembers()
    network(IMAGES)
    shake(second, 3)
    teacher = MeanTeacher(network, network=nn.DataParallel(second.half()), decay=0.5)
    assert teacher.module is second
    assert not any(p.requires_grad for p in second.parameters())
    assert_equal_states(second.state_dict(), network.state_dict())  # unrounded
    torch.testing.assert_close(teacher(IMAGES), network(IMAGES))
    shake(network, 4)
    teacher.update(network)
    assert_equal_states(second.state_dict(), network.state_dict())
    normed = [old_weight_norm(nn.Conv2d(3, 2, 1)) for _ in range(2)]
    assert torch.equal(MeanTeacher(normed[0], network=normed[1])(IMAGES), normed[0](IMAGES))


def test_network__is_refused_unless_it_is_a_second_one() -> None:
    network = student()
    for second, error, message in (
        (network, ValueError, "`network` must be a second network, but shares"),
        (nn.Sequential(network[0], *copy.deepcopy(network)[1:]), ValueError, "but shares 2 tensors"),
        (nn.Conv2d(3, 2, 1), ValueError, "names differ, .*; build `network` like the student"),
        (lambda x: x, TypeError, "`network` must be an nn.Module, got function"),
    ):
        with pytest.raises(error, match=message):
            MeanTeacher(network, network=second)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match=r"`student` has an uninitialised parameter '0.weight'; run a batch"):
        MeanTeacher(nn.Sequential(nn.LazyConv2d(2, 1)))


def test_parametrized_student__is_averaged_by_what_is_trained() -> None:
    network = nn.Sequential(weight_norm(nn.Conv2d(3, 2, 1)))
    teacher = MeanTeacher(network, decay=0.5)
    shake(network, 0)
    teacher.update(network)
    torch.testing.assert_close(dict(teacher.module.named_parameters()), dict(network.named_parameters()))
    torch.testing.assert_close(teacher(IMAGES), network(IMAGES))
    with pytest.raises(ValueError, match="names differ"):
        MeanTeacher(nn.Sequential(nn.Conv2d(3, 2, 1))).update(network)
    nn.ModuleList([network, teacher]).bfloat16()
    assert teacher(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_forward__passes_on_what_it_gets() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 2, 1)

        def forward(self, pixel_values: Tensor, metas: object = None, *, scale: float = 1.0) -> Any:
            logits = self.convolution(pixel_values) * scale
            return logits if metas is None else {"logits": logits, "metas": metas}

    network = Network()
    teacher, want = MeanTeacher(network), network(IMAGES)
    torch.testing.assert_close(teacher(pixel_values=IMAGES), want)
    torch.testing.assert_close(teacher(IMAGES, scale=2.0), 2 * want)
    assert teacher(IMAGES, ["name"])["metas"] == ["name"]
    torch.testing.assert_close(teacher.pseudo_label(pixel_values=IMAGES), F.pseudo_label(want))
    with pytest.raises(TypeError, match=r"got dict; .*pseudo_label\(output\['logits'\]\)"):
        teacher.pseudo_label(IMAGES, ["name"])


def test_pseudo_label__says_how_to_take_the_logits_out() -> None:
    logits = torch.rand(1, 2, 3, 3)
    for output, way in (
        (SimpleNamespace(logits=logits), r"output\.logits"),
        ({"aux": logits, "out": logits}, r"output\['out'\]"),
        ({"semantic": logits}, r"output\['semantic'\]"),
        ([logits, logits], r"output\[0\]"),
    ):
        with pytest.raises(TypeError, match=rf"got {type(output).__name__}; .*functional\.pseudo_label\({way}\)"):
            F.pseudo_label(output)
    with pytest.raises(TypeError, match=r"got list; convert it with torch.as_tensor"):
        F.pseudo_label([1.0, 2.0])


def loss(network: nn.Module, step: int) -> Tensor:
    return network(IMAGES + step).square().mean()


def test_follow__updates_after_each_step_until_it_is_removed() -> None:
    network = student().eval()
    teacher, reference = MeanTeacher(network), MeanTeacher(network)
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    handle = teacher.follow(optimizer, network)
    for step in range(6):
        loss(network, step).backward()  # two batches a step
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
            reference.update(network)
    assert teacher.num_updates == 3
    assert_equal_states(teacher.state_dict(), reference.state_dict())
    handle.remove()
    optimizer.step()
    assert teacher.num_updates == 3
    for other in (SimpleNamespace(), torch.optim.lr_scheduler.StepLR(optimizer, 1)):
        with pytest.raises(TypeError, match=rf"must be a torch\.optim\.Optimizer, got {type(other).__name__}; unwrap"):
            teacher.follow(other, network)


@pytest.mark.parametrize("fused", [False, True])
def test_follow__does_not_count_steps_that_a_scaler_skips(fused: bool) -> None:
    network = student().eval()
    teacher = MeanTeacher(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    teacher.follow(optimizer, network)
    made = 0
    for step in range(6):
        before = copy.deepcopy(teacher.state_dict())
        scaler.scale(loss(network, step) * (math.inf if step in {0, 3} else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step in {0, 3}:
            assert_equal_states(teacher.state_dict(), before)
        else:
            made += 1
        assert teacher.num_updates == made


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise RuntimeError("as torch's own of a tensor with a graph")


def test_student__a_module_that_refuses_copies_is_named() -> None:
    with pytest.raises(ValueError, match=r"because of its module '1\.0' \(Uncopied\) \(as torch's own"):
        MeanTeacher(nn.Sequential(nn.ReLU(), nn.Sequential(Uncopied(1, 1))))


def test_network__takes_over_caches() -> None:
    def network(*, cached: bool) -> nn.Module:
        made = student()
        if cached:
            made.register_buffer("grid", torch.arange(3.0), persistent=False)
        return made

    teacher = MeanTeacher(network(cached=True), network=network(cached=False))
    assert torch.equal(teacher.module.grid, torch.arange(3.0))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("sharded", ["student", "teacher", "both"])
def test_update__of_a_sharded_network_is_that_of_a_plain_one(sharded: str) -> None:
    """On one rank, where a shard is the whole; such a student can be followed, but not copied."""
    plain, one = student(), student()
    want, teacher = MeanTeacher(plain), MeanTeacher(one)
    for network in (plain, one):
        shake(network, 3)
    if sharded != "teacher":
        sharded_in_place(one)
        with pytest.raises(ValueError, match="`student` must not be sharded yet"):
            MeanTeacher(one)
    if sharded != "student":
        sharded_in_place(teacher.module)
    for _ in range(2):
        want.update(plain)
        teacher.update(one)
    got = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state_of(teacher)}
    assert_equal_states(got, dict(state_of(want)))


def state_of(teacher: MeanTeacher) -> list[tuple[str, Tensor]]:
    return [*teacher.module.named_parameters(), *teacher.module.named_buffers()]


def test_network__with_the_students_memory_is_refused() -> None:
    theirs = student()
    with torch.device("meta"):
        network = student()
    network.load_state_dict(theirs.state_dict(), assign=True)  # other tensors in the same memory
    with pytest.raises(ValueError, match="shares 9 tensors"):
        MeanTeacher(theirs, network=network)


@pytest.mark.parametrize("given", [False, True])
def test_update__takes_an_expanded_buffer(given: bool) -> None:
    def network(scale: Tensor) -> nn.Module:
        made = nn.Linear(2, 2)
        made.register_buffer("scale", scale)
        return made

    averages = []
    for start in (lambda: torch.zeros(1).expand(3), lambda: torch.zeros(3)):
        theirs = network(start())
        teacher = MeanTeacher(theirs, network=network(start()) if given else None, decay=0.5, warmup=False)
        for k in (1.0, 2.0):
            theirs.scale = torch.arange(3) * k
            teacher.update(theirs)
        averages.append(teacher.module.scale)
    assert torch.equal(*averages)
    assert averages[0].unique().numel() == 3
