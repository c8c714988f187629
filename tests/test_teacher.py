"""The mean teacher."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from crossmix import MeanTeacher
from crossmix import functional as F
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


def test_forward__eval_mode_holds_and_dropout_is_off() -> None:
    network = student()
    for mode in ("eval", "train"):
        teacher = MeanTeacher(network, mode=mode)
        for set_mode in (nn.ModuleList([teacher]).train, nn.ModuleList([teacher]).eval):
            set_mode()
            flags = {type(m): m.training for m in teacher.module.modules()}
            assert flags[nn.BatchNorm2d] is (mode == "train")
            assert not flags[nn.Dropout]
            assert not flags[nn.Sequential]
        teacher.train()
        images = torch.rand(2, 3, 8, 8, generator=seeded(0))
        assert torch.equal(teacher(images), teacher(images))
    evaluated = copy.deepcopy(network).eval()(images)
    torch.testing.assert_close(MeanTeacher(network).train()(images), evaluated)


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
    torch.testing.assert_close(teacher(images), copy.deepcopy(network).eval()(images))


def test_update__refuses_another_network() -> None:
    teacher = MeanTeacher(student())
    with pytest.raises(ValueError, match=r"names differ, first .*; pass the network that the teacher was made from"):
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
