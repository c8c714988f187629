"""The mean teacher."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn

from crossmix import MeanTeacher
from crossmix import functional as F
from crossmix.models import load_weights
from oracles import SlowNetwork, seeded, with_batch_statistics


def student(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).to(dtype)


def shake(module: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(seed)).to(p))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9995, 1.0])
@pytest.mark.parametrize("warmup", [True, False])
def test_update__follows_the_ramp(decay: float, warmup: bool) -> None:
    network = student(torch.float64)
    teacher = MeanTeacher(network, decay=decay, warmup=warmup)
    want = {name: p.detach().clone() for name, p in network.named_parameters()}
    for t in range(130):
        shake(network, t)
        teacher.update(network)
        d = min(1 - 1 / (t + 1), decay) if warmup else decay
        for name, p in network.named_parameters():
            want[name] = d * want[name] + (1 - d) * p.detach()
    for name, p in teacher.module.named_parameters():
        torch.testing.assert_close(p, want[name], rtol=1e-12, atol=1e-12)
    assert teacher.num_updates == 130


def test_update__the_first_one_copies_bit_by_bit() -> None:
    network = student()
    teacher = MeanTeacher(network)
    shake(network, 1)
    with torch.no_grad():
        next(network.parameters()).fill_(math.inf)  # a copy, not 0 * old + 1 * new
    teacher.update_parameters(network)
    for a, b in zip(teacher.module.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_update__buffers(buffers: str) -> None:
    network = student().train()
    teacher = MeanTeacher(network, decay=0.5, warmup=False, buffers=buffers)
    old = {name: b.clone() for name, b in teacher.module.named_buffers()}
    for _ in range(3):
        network(torch.rand(2, 3, 8, 8, generator=seeded(1)))
    teacher.update(network)
    new = dict(network.named_buffers())
    for name, b in teacher.module.named_buffers():
        average = buffers == "average" and b.is_floating_point()
        torch.testing.assert_close(b, 0.5 * old[name] + 0.5 * new[name] if average else new[name])
    assert int(dict(teacher.module.named_buffers())["1.num_batches_tracked"]) == 3


def test_ema_update__mixed_dtypes_and_integers() -> None:
    averaged = [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.tensor([1, 2]), torch.tensor([True])]
    current = [torch.ones(3), torch.ones(2), torch.tensor([5, 6]), torch.tensor([False])]
    F.ema_update_(averaged, current, 0.75)
    torch.testing.assert_close(averaged[0], torch.full((3,), 0.25))
    torch.testing.assert_close(averaged[1], torch.full((2,), 0.25, dtype=torch.float64))
    assert averaged[2].tolist() == [5, 6]
    assert averaged[3].tolist() == [False]
    assert current[0].tolist() == [1, 1, 1]
    F.ema_update_([], [], 0.5)


def test_ema_update__decay_one_changes_no_float() -> None:
    averaged = [torch.tensor([1.0, 2.0]), torch.tensor([3])]
    F.ema_update_(averaged, [torch.tensor([math.inf, math.nan]), torch.tensor([4])], 1.0)
    assert averaged[0].tolist() == [1, 2]
    assert averaged[1].tolist() == [4]


def test_update__count_is_in_the_state_dict() -> None:
    network = student()
    teacher = MeanTeacher(network)
    for t in range(5):
        shake(network, t)
        teacher.update(network)
    state = copy.deepcopy(teacher.state_dict())
    again = MeanTeacher(student())
    again.load_state_dict(state)
    assert again.num_updates == 5
    shake(network, 9)
    for one in (teacher, again):
        one.update(network)
    for a, b in zip(teacher.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for clone in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert clone.num_updates == 6
        assert repr(clone) == repr(teacher)


def test_forward__batch_statistics_without_a_trace() -> None:
    torch.manual_seed(0)
    network = SlowNetwork(4).double()
    network.norm.running_mean.fill_(3.0)
    teacher = MeanTeacher(network, mode="train")
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=seeded(1)) * 7
    before = copy.deepcopy(teacher.state_dict())
    want = with_batch_statistics(dict(network.named_parameters()), images)
    parent = nn.ModuleList([teacher])
    for set_mode in (parent.train, parent.eval, teacher.module.eval, teacher.module.train):
        set_mode()
        torch.testing.assert_close(teacher(images), want, rtol=1e-10, atol=1e-10)
    teacher(images * math.inf)  # not even what is not finite leaves a trace
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    teacher.module.eval()
    on_running = copy.deepcopy(network).eval()(images)
    torch.testing.assert_close(teacher.module(images), on_running)  # evaluating it as usual
    torch.testing.assert_close(teacher(images), want)  # and its own mode is back


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward__has_its_own_mode_and_leaves_the_modules_theirs(mode: str) -> None:
    network = student()
    teacher = MeanTeacher(network, mode=mode)
    assert not any(part.training for part in teacher.module.modules())  # an ordinary network, ready to be evaluated
    images = torch.rand(2, 3, 8, 8, generator=seeded(0))
    want = copy.deepcopy(network).eval()
    want[1].train(mode == "train")
    want = want(images)
    parent = nn.ModuleList([teacher])
    for set_mode in (parent.train, parent.eval, teacher.train, teacher.module.train, teacher.module[1].eval):
        set_mode()
        flags = [part.training for part in teacher.module.modules()]
        torch.testing.assert_close(teacher(images), want, rtol=0, atol=0)
        assert [part.training for part in teacher.module.modules()] == flags
        with pytest.raises(RuntimeError, match="expected input"):
            teacher(images[:, :2])
        assert [part.training for part in teacher.module.modules()] == flags
    parent.train()
    assert parent.training
    assert teacher.training


def test_forward__has_batch_statistics_by_default() -> None:
    network, images = student(), torch.rand(2, 3, 8, 8, generator=seeded(0))
    assert MeanTeacher(network).mode == "train"
    assert torch.equal(MeanTeacher(network)(images), MeanTeacher(network, mode="train")(images))
    assert not torch.equal(MeanTeacher(network)(images), MeanTeacher(network, mode="eval")(images))


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

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("smallest", torch.zeros(channels))

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [ByOneself, InFloat32])
def test_forward__lets_layers_of_ones_own_move_copies(norm: type[nn.Module], dtype: torch.dtype) -> None:
    for network in (norm(3).to(dtype), nn.Sequential(nn.Conv2d(3, 3, 1), norm(3)).to(dtype)):
        teacher, images = MeanTeacher(network), torch.rand(2, 3, 5, 5, generator=seeded(0)).to(dtype)
        before = copy.deepcopy(dict(teacher.state_dict()))
        torch.testing.assert_close(teacher(images), copy.deepcopy(network).train()(images))
        torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)


def test_forward__moves_no_statistics_of_any_layer() -> None:
    network, images = Norms(), torch.rand(2, 3, 5, 5, generator=seeded(0))
    teacher = MeanTeacher(network)
    before = copy.deepcopy(teacher.state_dict())
    want = copy.deepcopy(network).train()(images)
    teacher.module.train()
    for _ in range(2):
        torch.testing.assert_close(teacher(images), want)
        teacher(images * math.nan)
    torch.testing.assert_close(dict(teacher.state_dict()), dict(before), rtol=0, atol=0)


def test_module__taken_out_is_an_ordinary_network() -> None:
    network, images = Norms(), torch.rand(2, 3, 5, 5, generator=seeded(0))
    teacher = MeanTeacher(network, mode="train")
    teacher(images)
    taken = copy.deepcopy(teacher.module).train().requires_grad_()
    before = copy.deepcopy(dict(taken.state_dict()))
    torch.testing.assert_close(taken(images), network.train()(images))
    torch.testing.assert_close(dict(taken.named_buffers()), dict(network.named_buffers()))
    optimizer = torch.optim.SGD(taken.parameters(), lr=0.1)
    (taken(images) * images).sum().backward()
    optimizer.step()
    still = {name for name, value in taken.state_dict().items() if torch.equal(value, before[name])}
    assert still == {"by_hand.weight", "by_hand.bias", "by_hand.num_batches_tracked", "instance.num_batches_tracked"}
    torch.testing.assert_close(dict(teacher.module.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(teacher.module(images), MeanTeacher(Norms(), mode="eval")(images))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_update_bn__does_what_it_does_to_an_averaged_model(mode: str) -> None:
    batches = [torch.rand(4, 3, 8, 8, generator=seeded(k)) for k in range(3)]
    network = student()
    teacher, reference = MeanTeacher(network, mode=mode), AveragedModel(network)
    before = teacher(batches[0])
    for model in (teacher, reference):
        torch.manual_seed(1)  # dropout is on, as in training
        update_bn([(batch, None) for batch in batches], model)
    assert not torch.equal(teacher.module[1].running_mean, network[1].running_mean)
    torch.testing.assert_close(dict(teacher.module.state_dict()), dict(reference.module.state_dict()), rtol=0, atol=0)
    assert teacher.module[1].momentum == 0.1
    after = copy.deepcopy(teacher.state_dict())
    assert torch.equal(teacher(batches[0]), before) is (mode == "train")  # it does not read what was refreshed
    torch.testing.assert_close(dict(teacher.state_dict()), dict(after), rtol=0, atol=0)
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
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    teacher = MeanTeacher(network)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert not teacher(torch.rand(2, 3, 8, 8, requires_grad=True)).requires_grad


def test_pseudo_label__is_the_function_of_the_logits() -> None:
    teacher = MeanTeacher(student())
    images = torch.rand(2, 3, 8, 8)
    got, want = teacher.pseudo_label(images), F.pseudo_label(teacher(images))
    assert torch.equal(got.labels, want.labels)
    assert torch.equal(got.confidence, want.confidence)


def test_update__looks_through_wrappers() -> None:
    network = student()
    wrapped = nn.DataParallel(torch.compile(network, backend="eager"))
    teacher = MeanTeacher(wrapped)
    assert set(dict(teacher.module.named_parameters())) == set(dict(network.named_parameters()))
    shake(network, 3)
    teacher.update(wrapped)
    teacher.update(network)
    torch.testing.assert_close(next(teacher.module.parameters()), next(network.parameters()))


def test_update__follows_a_network_compiled_in_place() -> None:
    network = student()
    network.compile(backend="eager")
    teacher = MeanTeacher(network)
    shake(network, 3)
    teacher.update(network)
    torch.testing.assert_close(list(teacher.module.parameters()), list(network.parameters()))
    images = torch.rand(2, 3, 8, 8, generator=seeded(0))
    torch.testing.assert_close(teacher.module(images), copy.deepcopy(network).eval()(images))


def test_update__refuses_another_network() -> None:
    teacher = MeanTeacher(student())
    with pytest.raises(ValueError, match=r"names differ, starting with .*; pass the network that the teacher was"):
        teacher.update(nn.Conv2d(3, 2, 1))
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' has shape \(4, 3, 1, 1\) but the teacher's \(4, 3, 3, 3\)"
    ):
        teacher.update(other)
    assert teacher.num_updates == 0


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

    student = Tied()
    teacher = MeanTeacher(student, decay=0.5, warmup=False, buffers="average")
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    with torch.no_grad():
        for value in (*student.parameters(), *student.buffers()):
            value.add_(2.0)
    teacher.update(student)
    for name, value in teacher.module.state_dict().items():
        torch.testing.assert_close(value, before[name] + 1.0)


LOW = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("cast", ["student", "parent", "module", "student afterwards"])
def test_average__moves_where_it_would_stand_still_in_low_precision(dtype: torch.dtype, cast: str) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.ones_(network[0].weight)
    if cast == "student":
        network.to(dtype)
    teacher = MeanTeacher(network, warmup=False, buffers="average", mode="eval")
    if cast == "parent":
        nn.ModuleList([network, teacher]).to(dtype)
    elif cast == "module":
        teacher.module.to(dtype)
        network.to(dtype)
    elif cast == "student afterwards":
        network.to(dtype)
    nn.init.constant_(network[0].weight, 1.0625)
    network[1].running_mean.fill_(0.0625)
    for _ in range(3000):
        teacher.update(network)
    assert {value.dtype for value in (*teacher.parameters(), *teacher.buffers())} == {torch.float32, torch.int64}
    torch.testing.assert_close(teacher.module[0].weight, torch.full((2, 2), 1.0625), rtol=1e-4, atol=0)
    torch.testing.assert_close(teacher.module[1].running_mean, torch.full((2,), 0.0625), rtol=1e-4, atol=0)
    x = torch.rand(3, 2, generator=seeded(0)).to(dtype)
    torch.testing.assert_close(teacher(x), network.eval()(x), rtol=1e-2, atol=1e-2)
    assert teacher(x).dtype == dtype


@pytest.mark.parametrize("dtype", LOW)
def test_cast__is_for_the_forward_pass_alone(dtype: torch.dtype) -> None:
    network = student()
    teacher = MeanTeacher(network)
    exact = copy.deepcopy(dict(teacher.state_dict()))
    images = torch.rand(2, 3, 8, 8, generator=seeded(0))
    parent = nn.ModuleList([network, teacher]).to(dtype)
    torch.testing.assert_close(dict(teacher.state_dict()), exact, rtol=0, atol=0)  # not even rounded
    assert (
        teacher(images.to(dtype)).dtype == teacher.pseudo_label(images.to(dtype)).labels.new_empty(0, dtype=dtype).dtype
    )
    want = copy.deepcopy(network).eval()
    want[1].train()
    assert torch.equal(teacher(images.to(dtype)), want(images.to(dtype)))
    torch.testing.assert_close(dict(teacher.state_dict()), exact, rtol=0, atol=0)
    for again in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(again(images.to(dtype)), teacher(images.to(dtype)))
    parent.float()
    assert torch.equal(teacher(images), MeanTeacher(student())(images))
    parent.to(dtype).double()
    assert teacher(images.double()).dtype == torch.float64
    torch.testing.assert_close(dict(teacher.float().state_dict()), exact, rtol=0, atol=0)


def test_cast__other_conversions_are_those_of_any_module() -> None:
    teacher = MeanTeacher(student().bfloat16())
    teacher.share_memory()
    assert all(p.is_shared() for p in teacher.parameters())
    teacher.to(memory_format=torch.channels_last)
    assert teacher.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    teacher.to("meta").to_empty(device="cpu")
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert teacher(torch.rand(2, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    teacher.float()
    assert teacher(torch.rand(2, 3, 8, 8)).dtype == torch.float32


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
    network, images = MixedDtypes(), torch.rand(2, 3, 5, 5, generator=seeded(0)).bfloat16()
    teacher = MeanTeacher(network)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert torch.equal(teacher(images), network(images))
    assert teacher.module.again.weight is teacher.module.last.weight
    state = teacher.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    for assign in (False, True):
        again = MeanTeacher(MixedDtypes())
        again.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(again(images), teacher(images))
    again.load_state_dict(
        MeanTeacher(network).state_dict() | {f"module.{k}": v for k, v in network.state_dict().items()}
    )
    assert {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("students", [torch.float32, torch.bfloat16])
def test_load__of_half_precision_weights_does_not_change_what_the_teacher_runs_in(
    students: torch.dtype, parent: bool
) -> None:
    network, images = student().to(students), torch.rand(2, 3, 8, 8, generator=seeded(0)).to(students)
    teacher = MeanTeacher(network)
    state = {f"module.{name}": value for name, value in student().half().state_dict().items()}
    if parent:
        nn.Sequential(teacher).load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=False, assign=True)
    else:
        teacher.load_state_dict(state, strict=False, assign=True)
    for _ in range(2):
        assert teacher(images).dtype == students
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}
        teacher.update(network)


def test_network__in_half_precision_takes_over_the_weights_unrounded() -> None:
    network = student()
    teacher = MeanTeacher(network, network=student().half())
    torch.testing.assert_close(dict(teacher.module.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    assert teacher(torch.rand(2, 3, 8, 8)).dtype == torch.float32


def test_float64__stays() -> None:
    network = student(torch.float64)
    teacher = MeanTeacher(network)
    assert {value.dtype for value in teacher.parameters()} == {torch.float64}
    assert teacher(torch.rand(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


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


def load_by_load_weights(teacher: MeanTeacher, state: dict[str, Tensor], path: Path) -> None:
    torch.save({"student": {}, "teacher": state}, path)
    load_weights(teacher.module, path, entry="teacher")


def load_into_the_teacher_by_load_weights(teacher: MeanTeacher, state: dict[str, Tensor], path: Path) -> None:
    torch.save({"teacher": state}, path)
    load_weights(teacher, path, entry="teacher")


def load_a_teachers_state_without_a_count(teacher: MeanTeacher, state: dict[str, Tensor], _: Path) -> None:
    teacher.load_state_dict({f"module.{name}": value for name, value in state.items()}, strict=False)


LOADS: dict[str, Callable[[MeanTeacher, dict[str, Tensor], Path], object]] = {
    "load_weights into the module": load_by_load_weights,
    "load_weights into the teacher": load_into_the_teacher_by_load_weights,
    "the module's state": lambda teacher, state, _: teacher.module.load_state_dict(state),
    "the module's, assigned": lambda teacher, state, _: teacher.module.load_state_dict(state, assign=True),
    "the teacher's without a count": load_a_teachers_state_without_a_count,
    "each part's": lambda teacher, state, _: [
        part.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith(f"{name}.")})
        for name, part in teacher.module.named_children()
    ],
    "a parent's without a count": lambda teacher, state, _: nn.ModuleDict({"teacher": teacher}).load_state_dict(
        {f"teacher.module.{name}": value for name, value in state.items()}, strict=False
    ),
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("decay", [0.99, 0.0, 1.0])
@pytest.mark.parametrize("way", LOADS)
def test_loaded_weights__are_averaged_on_and_not_copied_over(
    way: str, decay: float, saved: bool, tmp_path: Path
) -> None:
    network = student()
    teacher = MeanTeacher(network, decay=decay)
    other = student()
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


def test_loaded_weights__with_a_count_go_on_where_they_were() -> None:
    network = student()
    for updates in (0, 1, 3):
        teacher = MeanTeacher(network)
        for step in range(updates):
            shake(network, step)
            teacher.update(network)
        again = MeanTeacher(student())
        parent = nn.ModuleDict({"teacher": again})
        parent.load_state_dict(copy.deepcopy(nn.ModuleDict({"teacher": teacher}).state_dict()))
        for one in (teacher, again):
            for step in range(3):
                shake(network, 9 + step)
                one.update(network)
            for step in range(3):
                with torch.no_grad():
                    for p in network.parameters():
                        p.sub_(torch.randn(p.shape, generator=seeded(9 + step)))
        assert again.num_updates == updates + 3
        torch.testing.assert_close(dict(again.module.state_dict()), dict(teacher.module.state_dict()))


def test_loaded_weights__of_another_network_are_no_concern() -> None:
    network = student()
    teacher = MeanTeacher(network)
    copy.deepcopy(teacher.module).load_state_dict(network.state_dict())
    teacher.module.load_state_dict({"other": torch.ones(1)}, strict=False)  # nothing of it fits
    network.load_state_dict(network.state_dict())
    shake(network, 1)
    teacher.update(network)
    torch.testing.assert_close(dict(teacher.module.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    assert teacher.num_updates == 1


def test_start__is_where_the_count_begins() -> None:
    network = student(torch.float64)
    teacher = MeanTeacher(network, start=1)
    want = {name: p.detach().clone() for name, p in network.named_parameters()}
    for t in range(1, 4):
        shake(network, t)
        teacher.update(network)
        for name, p in network.named_parameters():
            want[name] = (1 - 1 / (t + 1)) * want[name] + 1 / (t + 1) * p.detach()
    torch.testing.assert_close(dict(teacher.module.named_parameters()), want)
    assert teacher.num_updates == 4
    for start, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`start` must"):
            MeanTeacher(network, start=start)


def test_count__does_not_follow_the_default_device() -> None:
    teacher = MeanTeacher(student(), start=7)
    with torch.device("meta"):
        state = teacher.state_dict()
    assert int(state["_extra_state"]) == 7


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


BREAKS: dict[str, Callable[[nn.Module], object]] = {
    "another shape": lambda network: network.register_buffer("saved", torch.zeros(3)),
    "integers": lambda network: network.register_buffer("saved", torch.zeros(2, dtype=torch.int64)),
    "complex numbers": lambda network: network.register_buffer("saved", torch.zeros(2, dtype=torch.complex64)),
    "sparse": lambda network: network.register_buffer("saved", torch.zeros(2).to_sparse()),
    "another device": lambda network: network.register_buffer("saved", torch.zeros(2, device="meta")),
    "a buffer more": lambda network: network.register_buffer("more", torch.zeros(1)),
    "a parameter more": lambda network: network.add_module("more", nn.Conv2d(1, 1, 1)),
}


@pytest.mark.parametrize("change", BREAKS)
def test_update__refused_changes_nothing(change: str) -> None:
    network = Cache()
    teacher = MeanTeacher(network, decay=0.5)
    network(torch.rand(1, 3, 4, 4))
    shake(network, 1)
    BREAKS[change](network)
    before = copy.deepcopy(dict(teacher.state_dict()) | dict(teacher.named_buffers()))
    with pytest.raises(ValueError, match="pass the network that the teacher was made from"):
        teacher.update(network)
    torch.testing.assert_close(dict(teacher.state_dict()) | dict(teacher.named_buffers()), before, rtol=0, atol=0)
    assert teacher.num_updates == 0


def test_update__in_inference_mode_or_of_caches_made_there() -> None:
    network, images = Cache(), torch.rand(1, 3, 4, 5, generator=seeded(0))
    teacher = MeanTeacher(network)
    with torch.inference_mode():
        teacher(images)  # the network makes buffers here, which no other mode may change
        network(images)
        shake(network, 1)
        teacher.update(network)
    for step in (2, 3):
        network(torch.rand(1, 3, 3, step))
        shake(network, step)
        teacher.update(network)
        with torch.inference_mode():
            teacher(torch.rand(1, 3, 6, step))
    teacher.update(network)
    assert teacher.num_updates == 4
    torch.testing.assert_close(dict(teacher.module.named_buffers()), dict(network.named_buffers()), rtol=0, atol=0)


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
    network.late = None
    del network.further
    teacher.update(network)
    assert {name for name, _ in teacher.module.named_buffers()} == {"grid", "saved"}
    assert set(teacher.state_dict()) == names
    network.bfloat16()
    network(torch.rand(1, 3, 2, 2).bfloat16())
    teacher.update(network)
    assert {b.dtype for b in teacher.module.buffers()} == {torch.float32, torch.int64}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))  # the name that DataParallel uses
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.module(images))


def wrap_parts(network: nn.Module) -> nn.Module:
    network.module[0] = torch.compile(network.module[0], backend="eager")
    network.module = nn.DataParallel(network.module)
    network.head = nn.DataParallel(torch.compile(network.head, backend="eager"))
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("when", ["before", "after", "the teacher's too"])
def test_update__looks_through_wrappers_at_any_depth(when: str) -> None:
    network, images = Parts(), torch.rand(2, 3, 4, 4, generator=seeded(0))
    names = list(network.state_dict())
    wrapped = wrap_parts(network) if when == "before" else network
    teacher = MeanTeacher(wrapped, decay=0.5)
    assert list(teacher.module.state_dict()) == names
    assert type(teacher.module) is Parts
    if when != "before":
        wrapped = wrap_parts(network)
    if when == "the teacher's too":
        wrap_parts(teacher.module)
    for step in range(2):
        shake(network, step)
        teacher.update(wrapped)
    plain, reference = MeanTeacher(Parts(), decay=0.5), Parts()
    for step in range(2):
        shake(reference, step)
        plain.update(reference)
    assert torch.equal(teacher(images), plain(images))
    network.bfloat16()
    teacher.update(wrapped)
    assert teacher(images.bfloat16()).dtype == torch.bfloat16


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
    network, images = Remembers(), torch.rand(2, 3, 4, 4, generator=seeded(0))
    MeanTeacher(network)
    network(images)
    with pytest.raises(ValueError, match=r"`last` of its module 'body' \(ModuleDict\).*first forward pass.*`network=`"):
        MeanTeacher(network)
    with pytest.raises(ValueError, match=r"because of `weight` of its module '1' \(Conv2d\)"):
        MeanTeacher(nn.Sequential(nn.ReLU(), old_weight_norm(nn.Conv2d(3, 2, 1))))
    network.body.last = None
    network.group = (value for value in (1, 2))  # as little to be copied as a process group
    with pytest.raises(ValueError, match=r"`group` of the Remembers itself \(cannot pickle"):
        MeanTeacher(network)


def test_network__takes_the_place_of_the_copy() -> None:
    network, images = Remembers(), torch.rand(2, 3, 4, 4, generator=seeded(0))
    network(images)
    second = Remembers()
    shake(second, 3)
    teacher = MeanTeacher(network, network=nn.DataParallel(second), decay=0.5)
    assert teacher.module is second
    assert not any(p.requires_grad for p in second.parameters())
    torch.testing.assert_close(dict(second.state_dict()), dict(network.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(teacher(images), network(images))
    shake(network, 4)
    teacher.update(network)
    torch.testing.assert_close(dict(second.named_parameters()), dict(network.named_parameters()), rtol=0, atol=0)
    normed = [old_weight_norm(nn.Conv2d(3, 2, 1)) for _ in range(2)]
    assert torch.equal(MeanTeacher(normed[0], network=normed[1])(images), normed[0](images))


def test_network__is_refused_unless_it_is_a_second_one() -> None:
    network = student()
    for second, error, message in (
        (network, ValueError, "`network` must be a second network, but shares"),
        (nn.Sequential(network[0], *copy.deepcopy(network)[1:]), ValueError, "but shares 2 tensors"),
        (nn.Conv2d(3, 2, 1), ValueError, "names differ"),
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
    for step in range(2):
        shake(network, step)
        teacher.update(network)
    images = torch.rand(2, 3, 4, 4, generator=seeded(0))
    assert set(dict(teacher.module.named_parameters())) == set(dict(network.named_parameters()))
    assert teacher(images).shape == (2, 2, 4, 4)
    plain = MeanTeacher(nn.Sequential(nn.Conv2d(3, 2, 1)))
    with pytest.raises(ValueError, match="names differ"):
        plain.update(network)
    nn.ModuleList([network, teacher]).bfloat16()
    assert teacher(images.bfloat16()).dtype == torch.bfloat16


def test_forward__passes_on_what_it_gets() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 2, 1)

        def forward(self, pixel_values: Tensor, metas: object = None, *, scale: float = 1.0) -> Any:
            logits = self.convolution(pixel_values) * scale
            return logits if metas is None else {"logits": logits, "metas": metas}

    network, images = Network(), torch.rand(2, 3, 4, 4, generator=seeded(0))
    teacher = MeanTeacher(network)
    want = network(images)
    torch.testing.assert_close(teacher(pixel_values=images), want)
    torch.testing.assert_close(teacher(images, scale=2.0), 2 * want)
    assert teacher(images, ["name"])["metas"] == ["name"]
    assert torch.equal(teacher.pseudo_label(pixel_values=images).labels, F.pseudo_label(want).labels)
    with pytest.raises(TypeError, match=r"got dict; .*pseudo_label\(output\['logits'\]\)"):
        teacher.pseudo_label(images, ["name"])


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


def test_forward__takes_images_of_any_size() -> None:
    teacher = MeanTeacher(student())
    for n, height, width in ((1, 5, 9), (3, 8, 4)):
        assert teacher(torch.rand(n, 3, height, width)).shape == (n, 2, height - 2, width - 2)


def loss(network: nn.Module, step: int) -> Tensor:
    images = torch.rand(2, 3, 8, 8, generator=seeded(step))
    return network(images).square().mean()


def test_follow__updates_after_each_step_until_it_is_removed() -> None:
    networks = [student().eval() for _ in range(2)]
    teachers = [MeanTeacher(network) for network in networks]
    optimizers = [torch.optim.AdamW(network.parameters(), 0.1) for network in networks]
    handle = teachers[0].follow(optimizers[0], networks[0])
    for step in range(7):
        for network, optimizer in zip(networks, optimizers, strict=True):
            loss(network, step).backward()  # two batches a step
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        if step % 2:
            teachers[1].update(networks[1])
    assert teachers[0].num_updates == teachers[1].num_updates == 3
    torch.testing.assert_close(dict(teachers[0].state_dict()), dict(teachers[1].state_dict()), rtol=0, atol=0)
    handle.remove()
    optimizers[0].step()
    assert teachers[0].num_updates == 3
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer, got SimpleNamespace"):
        teachers[0].follow(SimpleNamespace(), networks[0])


@pytest.mark.parametrize("fused", [False, True])
def test_follow__does_not_count_steps_that_a_scaler_skips(fused: bool) -> None:
    network = student().eval()
    teacher = MeanTeacher(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    teacher.follow(optimizer, network)
    made = 0
    for step in range(6):
        before = copy.deepcopy(dict(teacher.state_dict()))
        scaler.scale(loss(network, step) * (math.inf if step in {0, 3} else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step in {0, 3}:
            torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
        else:
            made += 1
        assert teacher.num_updates == made
