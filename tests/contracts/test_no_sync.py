"""Nothing in a training step makes the host wait for the device."""

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from checks import waiting_is_an_error
from crossmix import (
    BoxMasks,
    ClassMix,
    CowMasks,
    CrossDomainMix,
    MaskedImages,
    SelfTraining,
    SelfTrainingOutput,
    recipes,
)
from crossmix import functional as F
from crossmix._cross_entropy import sum_by_blocks
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.engine import FiniteGuard
from crossmix.engine import finite as guards
from crossmix.optim import RepeatedSGD, poly_lr
from oracles import seeded, small_network

WAITING = (
    "local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "equal", "is_nonzero", "item",
    "repeat_interleave",  # by a tensor: its sum is the size of the output
)  # fmt: skip
C = 7
pytestmark = pytest.mark.usefixtures("no_look")


class NoSync(TorchDispatchMode):
    """Fail on operations that a GPU would have to finish before the host goes on, and on copies between devices."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        name = func.name().removeprefix("aten::").partition(".")[0].lstrip("_")
        assert not any(name.startswith(word) for word in WAITING), f"{name} waits for the device"
        if name in {"index", "index_put", "index_put_"}:
            indices = args[1]
            boolean = any(i is not None and i.dtype in {torch.bool, torch.uint8} for i in indices)
            assert not boolean, "boolean indexing waits"
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{name} waits for a copy between devices"
        return out


def test_the_guard_itself() -> None:
    waits: list[Callable[[Tensor], object]] = [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: float(x[0]),
        lambda x: x.repeat_interleave(torch.arange(5)),
        lambda x: torch.tensor([1.0, 2.0]).to("meta"),
        lambda x: torch.empty(5, device="meta").copy_(x),
    ]
    for wait in waits:
        with pytest.raises(AssertionError, match="waits"), NoSync():
            wait(torch.rand(5))


Optimizers = dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.SGD]]
OPTIMIZERS: Optimizers = {
    "foreach": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, foreach=True),
    "fused": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, fused=True),
    "repeated": lambda parameters: RepeatedSGD([p for p in parameters for _ in range(3)], momentum=0.9),
}


class Stepper:
    """A whole step, as a trainer makes it: learning rate, losses, gradients, guard, optimizer and averages."""

    def __init__(self, training: SelfTraining, optimizer: str) -> None:
        self.training = training
        self.optimizer = OPTIMIZERS[optimizer](training.student.parameters())
        self.guard = FiniteGuard(training.children(), self.optimizer, skip=1)
        self.images, self.allowed = torch.rand(2, 3, 12, 16), torch.ones(2, 12, 16)
        self.labels = torch.randint(0, C, (2, 12, 16), dtype=torch.uint8)
        self.done = 0

    def __call__(self) -> SelfTrainingOutput:
        for group in self.optimizer.param_groups:
            group["lr"] = poly_lr(self.done, 10, 0.01)
        align = self.training.align
        if align is not None and not align.fixed_prior:
            align.update_prior(self.labels)
        output: SelfTrainingOutput = self.training(
            self.images, self.labels, self.images.flip(0), target_weights=self.allowed
        )
        self.optimizer.zero_grad()
        output.loss.backward()
        self.guard.check(output.loss, self.done)
        self.optimizer.step()
        self.training.update()
        self.guard.restore()
        self.done += 1
        return output


@pytest.fixture
def unseen_reports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that `_Report.tell` was told of, out of the guard's sight.

    The report is the one part of a step that knows its device. Off CUDA nothing is under way when a step ends, so it
    reads its flag at once and the error comes with the step itself. On CUDA it reads a copy in pinned memory once that
    has arrived, which `test_cuda__sync_debug_mode` watches.
    """
    told: list[int] = []
    tell = guards._Report.tell

    def unseen(self: guards._Report, good: Tensor, step: int) -> tuple[int, int] | None:
        told.append(step)
        with _disable_current_modes():
            return tell(self, torch.ones((), dtype=torch.bool) if good.is_meta else good, step)

    monkeypatch.setattr(guards._Report, "tell", unseen)
    return told


def prepared(
    method: str = "dacs", recipe: str = "released", optimizer: str = "foreach", *, upsample: bool = False
) -> Stepper:
    student = small_network(C, stride=2 if upsample else 1)
    training = recipes.self_training(student, C, method=method, recipe=recipe, upsample=upsample)
    return Stepper(training.train(), optimizer)


@pytest.mark.parametrize(("recipe", "upsample"), [("released", True), ("paper", False), ("mic", False), ("mic", True)])
@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: as far from the host's memory as a GPU
def test_self_training__a_whole_step(
    method: str, recipe: str, upsample: bool, device: str, unseen_reports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "meta":  # has no autocast that could be turned off
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device(device):
        step = prepared(method, recipe, upsample=upsample)
    with NoSync():
        outputs = [step() for _ in range(2)]
    assert unseen_reports == [0, 1]
    assert all(output.loss.device.type == device and output.loss.shape == () for output in outputs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers__a_whole_step(optimizer: str, unseen_reports: list[int]) -> None:
    step = prepared(optimizer=optimizer)
    with NoSync():
        for _ in range(3):
            step()
    assert unseen_reports == [0, 1, 2]


@pytest.mark.parametrize("num_classes", [C, 40])
def test_functional(num_classes: int) -> None:
    labels = torch.randint(0, num_classes, (2, 9, 9))
    logits, images = torch.randn(2, num_classes, 9, 9), torch.rand(2, 3, 9, 9)
    prior = torch.full((num_classes,), 1 / num_classes)
    soft = logits.softmax(1)
    averaged, current = [torch.rand(3), torch.tensor(1)], [torch.rand(3), torch.tensor(2)]
    box, blocks = torch.rand(2, 4), torch.rand(2, 3, 3)
    with NoSync():
        classes = F.sample_classes(labels, num_classes, include_ignored=True)
        mask = F.class_mask(labels, classes)
        F.mix(images, images.flip(0), mask)
        F.sample_classes(labels, num_classes, class_weights=prior, rounding="floor", whole_batch=True)
        for options in ({"class_weights": prior}, {"masks": BoxMasks()}, {"masks": CowMasks(sigma=(1.0, 3.0))}):
            CrossDomainMix(num_classes, **options)(images, labels, images.flip(0), labels.flip(0))
        ClassMix(num_classes)(images, labels, mask=mask)
        pseudo = F.pseudo_label_from_probs(F.align_distribution(logits.softmax(1), prior, prior))
        for scope in ("image", "batch", "pixel", "none"):
            weights = F.confidence_weight(F.pseudo_label(logits).confidence, scope=scope)
        for normalizer, odds, truth, smoothing in itertools.product(
            ("all", "valid", "weights"), (None, prior), (labels, pseudo.labels, soft), (0.0, 0.1)
        ):
            options = {"normalizer": normalizer, "class_weights": odds, "label_smoothing": smoothing}
            F.weighted_cross_entropy(logits, truth, weights, **options)
            F.upsampled_cross_entropy(logits[..., :3, :3], truth, weights, **options)
        F.ema_update_(averaged, current, 0.9)
        F.box_mask(box, (9, 9))
        F.block_mask(blocks, (9, 9), 4)
        F.cow_mask(logits[:, 0], sigma=2.0)
        MaskedImages(4)(images)
        MaskedImages(4)(images, scores=blocks)
        for smoothing in (0.0, 0.1):  # the guard does not see into the operator
            options = {"align_corners": True, "ignore_index": 255, "label_smoothing": smoothing, "with_gradient": True}
            sum_by_blocks(logits[..., :3, :3], labels, labels / num_classes, **options)


def test_monitors() -> None:
    labels = torch.randint(0, C + 2, (2, 9, 9))
    pseudo = F.pseudo_label(torch.randn(2, C, 9, 9))
    monitor, scores = PseudoLabelMonitor(C), UnsupervisedScores(C, pixels=50)
    batches = torch.randn(2, C, 9, 9), torch.randn(2, C, 9, 9).half(), torch.randn(1, C, 3, 3)
    with NoSync():
        monitor.update(*pseudo)
        monitor.update(*pseudo, truth=labels.to(torch.uint8), student=labels)
        monitor.reset()
        for logits in batches:
            scores.update(logits)
        scores.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", ["released", "mic"])
@pytest.mark.parametrize("method", recipes.METHODS)
def test_cuda__sync_debug_mode(method: str, recipe: str, optimizer: str, upsample: bool) -> None:
    with torch.device("cuda"):
        step = prepared(method, recipe, optimizer, upsample=upsample)
        monitor, scores = PseudoLabelMonitor(C), UnsupervisedScores(C, pixels=50)
        logits = torch.randn(2, C, 9, 9)
    for attempt in range(4):
        with waiting_is_an_error(on=attempt > 0):  # the first step may allocate and tune
            output = step()
            scores.update(logits)
            if output.mixed is not None and output.confidence is not None:
                monitor.update(output.mixed.labels, output.confidence, truth=step.labels, student=step.labels)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_cuda__a_draw_by_a_generator_of_the_cpu_comes_from_pinned_memory() -> None:
    training = recipes.self_training(small_network(C), C, recipe="mic")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        training.sample(2, (12, 16), generator=seeded(0), device="cuda")
        torch.cuda.synchronize()
    copies = [event.name for event in profiled.events() if event.name.startswith("Memcpy HtoD")]
    assert copies
    # The debug mode does not see that copies from pageable memory wait.
    assert [name for name in copies if "Pinned -> Device" not in name] == []


@pytest.mark.gpu
def test_cuda__a_draw_for_the_cpu_has_arrived() -> None:
    training = recipes.self_training(small_network(C), C)
    draws = [
        training.sample(100_000, generator=torch.Generator("cuda").manual_seed(0), device=device)
        for device in ("cpu", "cuda")
    ]
    here, there = ([value for value in tree_leaves(draw) if value is not None] for draw in draws)
    torch.testing.assert_close([value.cpu() for value in there], here)
