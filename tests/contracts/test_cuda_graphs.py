"""A step can be captured once and replayed: whatever varies from step to step enters through tensors.

Every test runs on a GPU with `torch.cuda.graph`, and on a CPU with `Recording`, which has the same rules.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checks import waiting_is_an_error
from crossmix import (
    BoxMasks,
    CowMasks,
    CrossDomainMix,
    MeanTeacher,
    Mixed,
    SelfTraining,
    SelfTrainingOutput,
    recipes,
)
from crossmix._cross_entropy import sum_by_blocks
from crossmix.engine import FiniteGuard
from crossmix.optim import RepeatedSGD, poly_lr
from oracles import seeded, small_network

C = 7
pytestmark = pytest.mark.usefixtures("no_look")
N, HEIGHT, WIDTH = 2, 12, 16
REPLAYS = 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of a block, to be run again on the same memory.

    A replay runs nothing of the block's Python: its numbers, its branches and its tensors stay those of the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], object]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.crossmix.upsampled_cross_entropy_sum.default:  # a graph holds the kernels inside
            with self:
                return sum_by_blocks(*args, **kwargs)
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for a number"
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def captured(device: str, block: Callable[[], object]) -> Callable[[], None]:
    """Capture a block and run it once; return what runs it again."""
    if device == "cpu":
        with Recording() as recording:
            block()
        return recording.replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block()
    graph.replay()  # capturing has run nothing
    return graph.replay


def warmed_up(device: str, block: Callable[[], object], times: int) -> None:
    """Run a block eagerly, on a GPU beside the main stream, as capturing asks for."""
    if device == "cpu":
        for _ in range(times):
            block()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            block()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.fixture(autouse=True)
def same_arithmetic() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def assert_same(device: str, got: object, want: object) -> None:
    """Bit for bit on a CPU."""
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_recording__keeps_numbers_and_follows_tensors(device: str) -> None:
    number, value, out = 2.0, torch.ones(3, device=device), torch.zeros(3, device=device)
    replay = captured(device, lambda: out.copy_(value * number))
    assert_same(device, out, torch.full_like(out, 2.0))
    number = 3.0  # read by nobody
    value.fill_(5.0)
    replay()
    assert_same(device, out, torch.full_like(out, 10.0))
    if device == "cpu":
        with pytest.raises(AssertionError, match="cannot wait"):
            captured(device, lambda: value + 1 if value.sum() > 0 else value)


class Inputs:
    """Static tensors that hold the data and the draw of the step at hand, and the learning rate."""

    def __init__(self, training: SelfTraining, device: str) -> None:
        self.training = training
        self.device = device
        self.source_images, self.target_images = torch.empty(2, N, 3, HEIGHT, WIDTH, device=device)
        self.labels = torch.empty(N, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
        self.draw = training.sample(N, (HEIGHT, WIDTH), device=device)

    def load(self, step: int) -> None:
        """Everything of a step, on the device, into the static tensors."""
        generator = torch.Generator(self.device).manual_seed(step)
        for images in (self.source_images, self.target_images):
            images.copy_(torch.rand(images.shape, generator=generator, device=self.device))
        self.labels.copy_(torch.randint(0, C, self.labels.shape, generator=generator, device=self.device))
        fresh = self.training.sample(N, (HEIGHT, WIDTH), generator=generator, device=self.device)
        for old, new in zip(tree_leaves(self.draw), tree_leaves(fresh), strict=True):
            if old is not None:
                old.copy_(new)


MIXES: dict[str, dict[str, Any]] = {
    "odds": {"class_weights": range(1, C + 1), "include_ignored": True},
    "down, whole batch": {"rounding": "floor", "whole_batch": True},
    "boxes": {"masks": BoxMasks()},
    "blobs": {"masks": CowMasks(sigma=(1.0, 3.0))},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MIXES)
def test_mixes__replayed_equal_eager(name: str, device: str) -> None:
    mix = CrossDomainMix(C, **MIXES[name]).to(device)
    size = (HEIGHT, WIDTH)
    images, other = torch.rand(2, N, 3, *size, generator=seeded(0)).to(device)
    labels, pseudo = torch.randint(0, C, (2, N, *size), generator=seeded(1)).to(device)
    scores = mix.sample_scores(N, size, generator=seeded(2), device=device)
    out: list[Mixed] = []
    warmed_up(device, lambda: mix(images, labels, other, pseudo, scores=scores), 1)
    replay = captured(device, lambda: out.append(mix(images, labels, other, pseudo, scores=scores)))
    for step in range(3, 6):
        scores.copy_(mix.sample_scores(N, size, generator=seeded(step), device=device))
        labels.copy_(labels.roll(1, 1))
        replay()
        assert_same(device, out[0], mix(images, labels, other, pseudo, scores=scores))


class Training:
    """The algorithm and its optimizer, whose learning rates are tensors."""

    def __init__(self, training: SelfTraining, device: str, *, repeated: bool) -> None:
        self.training = training
        parameters = list(training.student.parameters())
        head = {"params": parameters[4:], "lr": 0.1}
        self.optimizer = (
            RepeatedSGD([{"params": parameters[:4] * 3}, head], 0.01, momentum=0.9, weight_decay=5e-4)
            if repeated
            else torch.optim.SGD([{"params": parameters[:4]}, head], 0.01, momentum=0.9, nesterov=True, fused=True)
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["lr"] = group["lr"], torch.tensor(group["lr"], device=device)

    def set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(poly_lr(step, 2 * REPLAYS, group["initial_lr"]))

    def losses(self, inputs: Inputs, *, draw: bool = True) -> SelfTrainingOutput:
        align = self.training.align
        if align is not None:
            align.update_prior(inputs.labels)
        output: SelfTrainingOutput = self.training(
            inputs.source_images, inputs.labels, inputs.target_images, draw=inputs.draw if draw else None
        )
        output.loss.backward()
        return output

    def move(self) -> None:
        self.optimizer.step()
        self.training.update()

    def state(self) -> list[Tensor]:
        """Student, teacher, averages and momentum."""
        moving = [*self.training.parameters(), *self.training.buffers(), *tree_leaves(self.optimizer.state_dict())]
        return [value for value in moving if isinstance(value, Tensor)]


def whole_step(training: Training, inputs: Inputs, *, draw: bool = True, fresh: bool = False) -> SelfTrainingOutput:
    if fresh:
        training.optimizer.zero_grad()
    output = training.losses(inputs, draw=draw)
    training.move()
    return output


def twins(training: SelfTraining, device: str, *, repeated: bool = True) -> tuple[Training, Training, Inputs]:
    """Two of the same that have made two steps, so that momentum is there, past the ramp of the teacher's decay."""
    inputs = Inputs(training, device)
    made = []
    for one in (training, copy.deepcopy(training)):
        if one.teacher is not None:
            one.teacher.num_updates = 999
        made.append(Training(one.train(), device, repeated=repeated))
        inputs.load(0)
        warmed_up(device, partial(whole_step, made[-1], inputs, fresh=True), 2)
        made[-1].optimizer.zero_grad()
    return made[0], made[1], inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("recipe", "upsample"), [("released", True), ("paper", False), ("mic", False), ("mic", True)])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_whole_step__replayed_equals_eager(method: str, recipe: str, upsample: bool, device: str) -> None:
    student = small_network(C, stride=2 if upsample else 1).to(device)
    training = recipes.self_training(student, C, method=method, recipe=recipe, upsample=upsample, threshold=0.2)
    graph, eager, inputs = twins(training.to(device), device, repeated=recipe == "released")
    outputs: list[SelfTrainingOutput] = []
    inputs.load(1)
    replay = captured(device, lambda: outputs.append(whole_step(graph, inputs)))
    for step in range(2, 2 + REPLAYS):
        assert_same(device, tree_leaves(outputs[0]), tree_leaves(whole_step(eager, inputs)))
        eager.optimizer.zero_grad()
        with waiting_is_an_error(on=device == "cuda"):
            inputs.load(step)
            graph.set_rate(step)
            replay()
        eager.set_rate(step)
    assert_same(device, tree_leaves(outputs[0]), tree_leaves(whole_step(eager, inputs)))
    assert_same(device, graph.state(), eager.state())


@pytest.mark.parametrize("device", DEVICES)
def test_whole_step__draws_anew_from_the_global_generator_on_each_replay(device: str) -> None:
    training = recipes.self_training(small_network(C).to(device), C)
    graph, eager, inputs = twins(training.to(device), device)
    outputs: list[SelfTrainingOutput] = []
    torch.manual_seed(1)
    replay = captured(device, lambda: outputs.append(whole_step(graph, inputs, draw=False)))
    masks = [mask_of(outputs[0]).clone()]
    for _ in range(REPLAYS):
        replay()
        masks.append(mask_of(outputs[0]).clone())
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
    torch.manual_seed(1)
    for mask in masks:
        assert_same(device, mask_of(whole_step(eager, inputs, draw=False, fresh=True)), mask)


def mask_of(output: SelfTrainingOutput) -> Tensor:
    assert output.mixed is not None
    return output.mixed.mask


@pytest.mark.parametrize("device", DEVICES)
def test_finite_guard__stands_between_two_graphs(device: str) -> None:
    training = recipes.self_training(small_network(C).to(device), C)
    graph, eager, inputs = twins(training.to(device), device)
    guard = FiniteGuard(graph.training.children(), graph.optimizer, skip=1)
    outputs: list[SelfTrainingOutput] = []
    inputs.load(1)
    gradients = captured(device, lambda: outputs.append(graph.losses(inputs)))
    guard.check(outputs[0].loss, 1)
    move = captured(device, graph.move)
    guard.restore()
    whole_step(eager, inputs)
    for step in range(2, 2 + REPLAYS):
        inputs.load(step)
        if step == 3:
            inputs.source_images[0, 0, 0, 0] = torch.nan
        gradients()
        guard.check(outputs[0].loss, step)
        move()
        guard.restore()
        if step != 3:
            whole_step(eager, inputs, fresh=True)
    assert_same(device, graph.state(), eager.state())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # the refused one
def test_cuda__an_update_of_the_ramp_is_not_captured() -> None:
    student = small_network(C).cuda()
    teacher = MeanTeacher(student)
    warmed_up("cuda", lambda: teacher.update(student), 98)
    with pytest.raises(RuntimeError, match=r"got 0\.9899 on the way to 0\.99 after 98 updates"):
        captured("cuda", lambda: teacher.update(student))
    teacher.update(student)
    captured("cuda", lambda: teacher.update(student))


def test_teacher__an_update_of_the_ramp_refuses_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    student = small_network(C)
    teacher, constant = MeanTeacher(student), MeanTeacher(student, warmup=False)
    for _ in range(98):
        teacher.update(student)
    before = copy.deepcopy(teacher.state_dict())
    monkeypatch.setattr("crossmix.teacher._capturing", lambda: True)
    constant.update(student)
    MeanTeacher(student, decay=0.0, mode="train").update(student)  # no ramp either: it copies
    with pytest.raises(RuntimeError, match=r"got 0\.9899 on the way to 0\.99 after 98 updates"):
        teacher.update(student)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    teacher.num_updates = 99
    teacher.update(student)
