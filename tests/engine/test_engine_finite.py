"""A bad step is as if it had never been made, for every optimizer, whether the host learns of it at once or late."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import refusal, sharded_in_place
from crossmix import DistributionAlignment, MeanTeacher
from crossmix.engine import FiniteGuard, NonFiniteError
from crossmix.optim import RepeatedSGD
from oracles import seeded

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


class Others(torch.optim.Optimizer):
    """What optimizers outside torch do: a count that is a Python number, tensors replaced, a list of them."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, _: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.full_like(p, 0.5), last=[])
                state["step"] += 1
                state["mean"] = state["mean"] * 0.9 + p.grad
                state["last"].append(p.grad.clone())
                del state["last"][:-2]
                p.sub_(group["lr"] * (state["mean"] / state["step"] + sum(state["last"])))


o = torch.optim
OF_TORCH: list[tuple[type[torch.optim.Optimizer], float, list[dict[str, Any]]]] = [
    (o.Adadelta, 1.0, [{}, {"foreach": True, "weight_decay": 0.1}]),
    (o.Adagrad, 0.1, [{"lr_decay": 0.1, "initial_accumulator_value": 0.5}, {"foreach": True, "maximize": True},
                      {"fused": True, "initial_accumulator_value": 0.5}]),
    (o.Adam, 0.1, [{}, {"amsgrad": True, "weight_decay": 0.1}, {"foreach": True, "maximize": True},
                   {"fused": True, "amsgrad": True}, {"lr": torch.tensor(0.1), "foreach": False}]),
    (o.AdamW, 0.1, [{}, {"amsgrad": True, "foreach": True}, {"fused": True}]),
    (o.Adamax, 0.1, [{}, {"foreach": True}]),
    (o.ASGD, 0.1, [{"t0": 1.0}, {"t0": 1.0, "foreach": True}]),
    (o.NAdam, 0.1, [{}, {"foreach": True, "decoupled_weight_decay": True, "weight_decay": 0.1}]),
    (o.RAdam, 0.1, [{}, {"foreach": True}]),
    (o.RMSprop, 0.1, [{}, {"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9, "foreach": True}]),
    (o.Rprop, 0.1, [{}, {"foreach": True}]),
    (o.SGD, 0.1, [{}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
                  {"momentum": 0.9, "nesterov": True, "foreach": True},
                  {"momentum": 0.9, "fused": True, "maximize": True},
                  {"lr": torch.tensor(0.1), "momentum": 0.9, "foreach": False}]),
    (o.Adafactor, 0.1, [{}, {"foreach": True}]),
    (o.LBFGS, 0.1, [{"max_iter": 3, "history_size": 2}, {"max_iter": 3, "line_search_fn": "strong_wolfe"}]),
    (o.SparseAdam, 0.1, [{}]),
    *([(o.Muon, 0.1, [{}])] if hasattr(o, "Muon") else []),
]  # fmt: skip
OPTIMIZERS: dict[str, Build] = {
    " ".join([kind.__name__, *map(str, options)]): lambda p, kind=kind, lr=lr, options=options: kind(
        p, **{"lr": lr, **options}
    )
    for kind, lr, every in OF_TORCH
    for options in every
}
OPTIMIZERS |= {
    "RepeatedSGD": lambda p: RepeatedSGD([*p, *p[:2]], 0.1, momentum=0.9, weight_decay=0.1),
    "groups": lambda p: o.Adam([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "betas": (0.5, 0.9)}], 0.1),
    "of others": Others,
}
MOMENTUM = "SGD momentum dampening weight_decay"


class Late(FiniteGuard):
    """A GPU as a CPU can be one: the host learns of a step at the next one, and counts are the host's."""

    def _is_known(self, _: Tensor) -> bool:
        return False

    def _moving(self) -> list[Tensor]:
        states = [state.values() for one in self.optimizers for state in one.state.values()]
        counts = {id(value) for values in states for value in values if isinstance(value, Tensor) and not value.ndim}
        return [tensor for tensor in super()._moving() if id(tensor) not in counts]


class Plain(nn.Module):
    """Convolutions with BatchNorm, or matrices for those who take nothing else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.sparse = kind == "SparseAdam"
        if self.sparse:
            self.layers = nn.Sequential(nn.Embedding(8, 2, sparse=True))
        elif kind == "Muon":
            matrices = nn.Linear(192, 8, bias=False), nn.Linear(8, 2, bias=False)
            self.layers = nn.Sequential(nn.Flatten(), matrices[0], nn.BatchNorm1d(8, affine=False), matrices[1])
        else:
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.sparse:
            images = images.flatten(1)[:, :4].nan_to_num(0.3).mul(8).long().clamp(0, 7)
        return self.layers(images)


class Parts:
    def __init__(
        self, name: str, guard: type[FiniteGuard] | None = FiniteGuard, *, skip: int = 9, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.student = Plain(name).to(device)
        self.teacher = MeanTeacher(self.student, decay=0.9)
        self.align = DistributionAlignment(2).to(device)
        self.optimizer = OPTIMIZERS[name](list(self.student.parameters()))
        watched = [self.student, self.teacher, self.align]
        self.guard: Any = None if guard is None else guard(watched, self.optimizer, skip=skip)

    def step(self, number: int, *, bad: str = "", images: Tensor | None = None) -> None:
        if images is None:
            images = torch.rand(4, 3, 8, 8, generator=seeded(number))
        if bad == "image":
            images[0, 0, 0, 0] = math.nan

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = self.student(images)
            loss = logits.square().mean() * (math.inf if bad == "loss" else 1.0)
            loss.backward()
            if bad == "gradient":
                gradient = next(self.student.parameters()).grad
                assert gradient is not None
                (gradient._values() if gradient.is_sparse else gradient).view(-1)[-1] = math.inf
            return loss

        loss = closure()
        self.align.update(torch.stack([images[:, 0], 1 - images[:, 0]], 1))
        if self.guard is not None:
            self.guard.check(loss, number)
        self.optimizer.step(closure) if isinstance(self.optimizer, o.LBFGS) else self.optimizer.step()
        self.teacher.update(self.student)
        if self.guard is not None:
            self.guard.restore()

    def state(self) -> dict[str, Any]:
        if self.guard is not None:
            self.guard.settle()
        parts = (self.student, self.teacher, self.align, self.optimizer)
        return copy.deepcopy({type(part).__name__: part.state_dict() for part in parts})


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


EITHER = pytest.mark.parametrize("guard", [FiniteGuard, Late])


@EITHER
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_guard__a_bad_step_is_as_if_it_had_never_been(name: str, guard: type[FiniteGuard]) -> None:
    plain = Parts(name, None)
    for number in range(4):
        plain.step(number)
    want = plain.state()
    assert all(value.isfinite().all() for value in plain.student.state_dict().values())
    kinds = ["loss", "gradient"] if plain.student.sparse else ["image", "loss", "gradient"]
    often = [(kind, (0, 0, 1, 3, 3, 4)) for kind in kinds]
    for bad, places in [("loss", ()), ("loss", (0,)), ("gradient", (1,)), *often]:
        guarded = Parts(name, guard)
        for number in range(5):
            for _ in range(places.count(number)):
                guarded.step(100 + number, bad=bad)
            if number < 4:
                guarded.step(number)
        got = guarded.state()
        for key, value in want.items():
            assert same(got[key], value), (bad, places, key)


def guarded_step(
    guard: FiniteGuard, optimizers: list[torch.optim.Optimizer], forward: Callable[[], Tensor], factor: float
) -> None:
    for one in optimizers:
        one.zero_grad()
    loss = forward().sum() * factor
    loss.backward()
    guard.check(loss, 0)
    for one in optimizers:
        one.step()
    guard.restore()


@EITHER
def test_guard__state_that_a_later_bad_step_makes_goes_too(guard: type[FiniteGuard]) -> None:
    def run(*, bad: bool) -> list[Any]:
        torch.manual_seed(0)
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = torch.optim.Adam(first.parameters(), 0.1)
        watch = guard([first, second], optimizer, skip=9)

        def step(network: nn.Module, factor: float = 1.0) -> None:
            guarded_step(watch, [optimizer], lambda: network(torch.ones(1, 2)), factor)

        step(first)
        optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.2})
        if bad:
            step(second, math.nan)  # the first gradients of these
            step(nn.Sequential(first, second), math.nan)
        step(nn.Sequential(first, second))
        step(second)
        return [first.state_dict(), second.state_dict(), optimizer.state_dict()]

    assert same(run(bad=True), run(bad=False))


@EITHER
def test_guard__of_several_optimizers_and_of_parameters_in_no_module(guard: type[FiniteGuard]) -> None:
    def run(*factors: float) -> list[Any]:
        torch.manual_seed(0)
        network, weight = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
        optimizers = [torch.optim.AdamW(network.parameters(), 0.1), torch.optim.SGD([weight], 0.1, momentum=0.9)]
        watch = guard([network], optimizers, skip=9)
        for factor in factors:
            guarded_step(watch, optimizers, lambda: network(torch.ones(1, 2)) * weight, factor)
        return [network.state_dict(), weight.detach().clone(), *(one.state_dict() for one in optimizers)]

    assert same(run(math.nan, 1.0, 2.0, math.inf, 3.0), run(1.0, 2.0, 3.0))


def test_guard__reading_the_optimizer_s_state_settles_it() -> None:
    parts = Parts("Adam", Late)
    parts.step(0)
    want = copy.deepcopy(parts.optimizer.state_dict())
    parts.step(1, bad="loss")
    assert same(parts.optimizer.state_dict(), want)
    copy.deepcopy(parts.optimizer)  # goes without the guard


def test_guard__keep_forgets_a_step_that_is_not_settled() -> None:
    parts, other = Parts("Adam", Late), Parts("Adam", None)
    for number in range(3):
        other.step(number)
    parts.step(0, bad="loss")
    parts.optimizer.load_state_dict(other.optimizer.state_dict())
    parts.student.load_state_dict(other.student.state_dict())
    parts.teacher.load_state_dict(other.teacher.state_dict())
    parts.align.load_state_dict(other.align.state_dict())
    parts.guard.keep()
    parts.step(7, bad="loss")
    assert same(parts.state(), other.state())


def add_a_layer(parts: Parts) -> None:
    parts.student.layers.append(nn.Conv2d(2, 2, 1))
    parts.optimizer.add_param_group({"params": list(parts.student.layers[-1].parameters())})
    replace_the_teacher(parts)


def replace_the_parameters(parts: Parts) -> None:
    copies = {name: parameter.detach().clone() for name, parameter in parts.student.named_parameters()}
    parts.student.load_state_dict(copies, strict=False, assign=True)
    parts.optimizer.param_groups[0]["params"] = list(parts.student.parameters())
    parts.optimizer.state.clear()


def replace_the_teacher(parts: Parts) -> None:
    parts.teacher = MeanTeacher(parts.student, decay=0.9)
    parts.guard.modules[1] = parts.teacher


@EITHER
@pytest.mark.parametrize("change", [add_a_layer, replace_the_parameters, replace_the_teacher])
def test_guard__follows_what_is_added_or_replaced(change: Callable[[Parts], None], guard: type[FiniteGuard]) -> None:
    parts = Parts(MOMENTUM, guard)
    parts.step(0)
    parts.state()  # settles the step
    change(parts)
    for number, bad in ((1, "loss"), (2, ""), (3, "gradient")):
        before = parts.state()
        parts.step(number, bad=bad)
        assert same(parts.state(), before) == bool(bad)


def test_guard__finite_half_gradients_whose_norm_is_not_are_good() -> None:
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], 1.0)
    guard = FiniteGuard([], optimizer)
    weight.grad = torch.full_like(weight, 60000.0)
    guard.check(torch.zeros(()), 0)
    optimizer.step()
    guard.restore()
    assert (weight == -60000.0).all()


@pytest.mark.parametrize("name", [MOMENTUM, "SGD momentum fused maximize", "Adam"])
def test_guard__keeps_the_memory_format(name: str) -> None:
    plain, guarded = Parts(name, None), Parts(name)
    for parts in (plain, guarded):
        parts.student.to(memory_format=torch.channels_last)
        for number in range(4):
            parts.step(number)
    assert same(plain.state(), guarded.state())
    assert guarded.student.layers[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_guard__ends_training_after_so_many_bad_steps_and_good_ones_move_on() -> None:
    parts = Parts(MOMENTUM, skip=2)
    parts.step(0)
    before = parts.state()
    parts.step(1, bad="image")
    parts.step(2, bad="loss")
    assert parts.guard.skipped == 2
    message = r"step 3: the loss or a gradient is not finite, 3 such steps so far and 2"
    refusal(lambda: parts.step(3, bad="gradient"), message, NonFiniteError)
    assert same(parts.state(), before)
    parts.step(4)
    assert not same(parts.state(), before)
    assert all(value.isfinite().all() for value in parts.student.state_dict().values())


def test_guard__gradients_may_be_left_to_a_scaler() -> None:
    parts = Parts("SGD", skip=0)
    loss = parts.student(torch.rand(2, 3, 8, 8)).square().mean()
    loss.backward()
    parts.student.layers[0].weight.grad.fill_(torch.inf)
    parts.guard.check(loss, 0, gradients=False)
    with pytest.raises(NonFiniteError) as caught:
        parts.guard.check(loss, 5)
    assert caught.value.step == 5


@EITHER
def test_guard__restores_an_expanded_buffer(guard: type[FiniteGuard]) -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("scale", torch.ones(1, 1).expand(4, 3))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    watch = guard([network], optimizer, skip=3)

    def forward() -> Tensor:
        network.scale[0, 0] += 1
        return network(torch.ones(1, 2))

    for good, scale in ((False, 1.0), (True, 2.0), (False, 2.0), (False, 2.0), (True, 3.0)):  # the second makes state
        before = copy.deepcopy(network.state_dict())
        guarded_step(watch, [optimizer], forward, 1.0 if good else math.nan)
        assert good or same(network.state_dict(), before)
        assert network.scale.tolist() == [[scale] * 3] * 4


@pytest.mark.usefixtures("process_group")
def test_guard__refuses_shards() -> None:
    network = sharded_in_place(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    refusal(lambda: FiniteGuard([network], optimizer), "must not be sharded, got the DTensor 'weight'", TypeError)


def test_guard__refuses() -> None:
    refusal(lambda: Parts("SGD", skip=-1), "`skip` must be at least 0, got -1; 0 makes every", ValueError)
    refusal(lambda: Parts("SGD", skip=1.5), "`skip` must be an int, got float", TypeError)
    refusal(Parts("SGD").guard.restore, "needs a `check` before it", RuntimeError)
    wrong = r"must be a torch\.optim\.Optimizer, or several, got Linear"
    refusal(lambda: FiniteGuard([], [nn.Linear(1, 1)]), wrong, TypeError)  # type: ignore[list-item]


@EITHER
def test_guard__counts_good_steps_where_no_module_has_extra_state(guard: type[FiniteGuard]) -> None:
    layer = nn.Linear(2, 1)
    optimizer = o.Adam(layer.parameters(), 0.1)
    watch = guard([layer], optimizer, skip=9)
    for step, factor in enumerate([1.0, math.nan, math.nan, 1.0]):
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2)).sum() * factor
        loss.backward()
        watch.check(loss, step)
        optimizer.step()
        watch.restore()
    watch.settle()
    assert [int(state["step"]) for state in optimizer.state.values()] == [2, 2]


@pytest.mark.usefixtures("process_group")
def test_guard__of_a_group_undoes_a_bad_step_alone() -> None:
    parts = Parts(MOMENTUM)
    parts.step(0)
    before = parts.state()
    parts.step(1, bad="loss")
    assert same(parts.state(), before)
    parts.step(2)
    assert not same(parts.state(), before)


@pytest.mark.gpu
def test_guard__on_a_gpu_without_waiting() -> None:
    parts = Parts(MOMENTUM, skip=0, device="cuda")
    good = torch.rand(4, 3, 8, 8, device="cuda")
    parts.step(0, images=good)
    modules = nn.ModuleList([parts.student, parts.teacher.module, parts.align])
    before = copy.deepcopy(dict(modules.state_dict()))
    bad = good * torch.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts.step(1, images=bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(dict(modules.state_dict()), before)

    with pytest.raises(NonFiniteError, match="step 1"):  # once the flag has arrived  # noqa: PT012
        for number in range(2, 5):
            parts.step(number, images=good)
            torch.cuda.synchronize()
