"""A GPU computes what a CPU does, for every function and module, and trains as it does."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from checks import waiting_is_an_error
from crossmix import (
    BoxMasks,
    ClassMix,
    ConfidenceWeightedCE,
    CowMasks,
    CrossDomainMix,
    DistributionAlignment,
    MaskedImages,
    MeanTeacher,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.engine import FiniteGuard
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.models import deeplab_v2_tiny
from oracles import seeded
from runs import TRAINER, log_of

pytestmark = pytest.mark.gpu

C, N, SIZE = 7, 3, (37, 50)
FLOATING = [torch.float32, torch.float64]
Values = dict[str, Tensor]


def values(dtype: torch.dtype, device: str) -> Values:
    """A batch, drawn on the CPU."""
    labels = torch.randint(0, C + 1, (N, *SIZE), generator=seeded(0))
    found = {
        "images": torch.rand(N, 3, *SIZE, generator=seeded(1), dtype=dtype),
        "labels": labels.masked_fill(labels == C, 255),
        "others": torch.randint(0, C, (N, *SIZE), generator=seeded(2), dtype=torch.uint8),
        "logits": torch.randn(N, C, *SIZE, generator=seeded(3), dtype=dtype),
        "small": torch.randn(N, C, 6, 8, generator=seeded(4), dtype=dtype),
        "weights": torch.rand(N, *SIZE, generator=seeded(5), dtype=dtype),
        "scores": torch.rand(N, C + 1, generator=seeded(6)),
    }
    found["probs"] = found["logits"].softmax(1)
    return {name: value.to(device) for name, value in found.items()}


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    out = loss(leaf)
    return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]


def drawn(module: nn.Module, v: Values, size: tuple[int, ...] = SIZE) -> Tensor:
    """Scores of masks, from the CPU."""
    return module.sample(N, size, generator=seeded(7)).to(v["images"].device)


def mixed(v: Values, **options: object) -> object:
    mix = CrossDomainMix(C, **options).to(v["images"].device)
    scores = mix.sample_scores(N, SIZE, generator=seeded(8), device=v["images"].device)
    return tuple(mix(v["images"], v["labels"], v["images"].flip(0), v["others"], v["weights"], scores=scores))


def augmented(v: Values, flavor: str) -> Tensor:
    augment = StrongAugment(flavor=flavor, jitter_p=1.0, blur_p=1.0)
    draw = augment.sample(N, generator=seeded(9))
    return augment(v["images"], draw=tree_map_only(Tensor, lambda value: value.to(v["images"].device), draw))


def aligned(v: Values) -> tuple[Tensor, Tensor]:
    align = DistributionAlignment(C).to(v["images"].device)
    align.update(v["probs"])
    align.update_prior(v["labels"])
    return align(v["probs"]), align(v["probs"].flip(0))


def averaged(v: Values) -> list[Tensor]:
    torch.manual_seed(0)
    student = deeplab_v2_tiny(C).to(v["images"].device, v["images"].dtype)
    teacher = MeanTeacher(student)
    for factor in (1.5, 0.5, 2.0):
        with torch.no_grad():
            torch._foreach_mul_(list(student.parameters()), factor)
        teacher.update(student)
    return list(teacher.module.state_dict().values())


def confused(v: Values) -> tuple[Tensor, ...]:
    matrix = ConfusionMatrix(C).to(v["images"].device)
    matrix.update(v["others"], v["labels"])
    return tuple(torch.as_tensor(value) for value in matrix.compute())


def scored(v: Values) -> tuple[Tensor, ...]:
    scores = UnsupervisedScores(C, pixels=N * SIZE[0] * SIZE[1]).to(v["images"].device)  # all pixels: nothing is drawn
    scores.update(v["logits"])
    return tuple(torch.tensor(value) for value in scores.compute())


def watched(v: Values) -> list[Tensor]:
    monitor = PseudoLabelMonitor(C).to(v["images"].device)
    monitor.update(v["others"], v["weights"], truth=v["labels"])
    return list(monitor.state_dict().values())


CALLS: dict[str, Callable[[Values], object]] = {
    "sample_classes": lambda v: F.sample_classes(v["labels"], C, scores=v["scores"]),
    "sample_classes, ignored": lambda v: F.sample_classes(v["labels"], C, scores=v["scores"], include_ignored=True),
    "sample_classes, many": lambda v: F.sample_classes(
        v["labels"], 150, scores=torch.rand(N, 151, generator=seeded(1)).to(v["scores"].device)
    ),
    "class_mask": lambda v: F.class_mask(v["labels"], F.sample_classes(v["labels"], C, scores=v["scores"])),
    "mix": lambda v: F.mix(v["images"], v["images"].flip(0), v["labels"] < 3),
    "pseudo_label": lambda v: tuple(F.pseudo_label(v["logits"])),
    "pseudo_label_from_probs": lambda v: tuple(F.pseudo_label_from_probs(v["probs"])),
    "align_distribution": lambda v: F.align_distribution(
        v["probs"], v["probs"].mean((0, 2, 3)), v["probs"][0].mean((1, 2))
    ),
    **{
        f"confidence_weight {scope}": lambda v, scope=scope: F.confidence_weight(v["weights"], 0.4, scope=scope)
        for scope in ("image", "batch", "pixel", "none")
    },
    **{
        f"weighted_cross_entropy {normalizer}": lambda v, normalizer=normalizer: gradient(
            lambda logits: F.weighted_cross_entropy(
                logits, v["labels"], v["weights"], normalizer=normalizer, label_smoothing=0.1
            ),
            v["logits"],
        )
        for normalizer in ("all", "valid", "weights")
    },
    **{
        f"upsampled_cross_entropy {corners}": lambda v, corners=corners: gradient(
            lambda logits: F.upsampled_cross_entropy(logits, v["labels"], v["weights"], align_corners=corners),
            v["small"],
        )
        for corners in (True, False)
    },
    "ConfidenceWeightedCE": lambda v: gradient(
        lambda logits: ConfidenceWeightedCE()(logits, v["labels"], v["weights"]), v["logits"]
    ),
    "DistributionAlignment": aligned,
    "MeanTeacher": averaged,
    "ClassMix": lambda v: tuple(ClassMix(C)(v["images"], v["labels"], scores=v["scores"])),
    "CrossDomainMix": lambda v: mixed(v, include_ignored=True),
    "CrossDomainMix, boxes": lambda v: mixed(v, masks=BoxMasks()),
    "CrossDomainMix, blobs": lambda v: mixed(v, masks=CowMasks(sigma=3.0)),
    "CrossDomainMix, class weights": lambda v: mixed(v, class_weights=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    "MaskedImages": lambda v: MaskedImages(8)(v["images"], scores=drawn(MaskedImages(8), v)),
    "StrongAugment additive": lambda v: augmented(v, "additive"),
    "StrongAugment torchvision": lambda v: augmented(v, "torchvision"),
    "ConfusionMatrix": confused,
    "UnsupervisedScores": scored,
    "PseudoLabelMonitor": watched,
}


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_cpu(name: str, dtype: torch.dtype) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want, got = (CALLS[name](values(dtype, device)) for device in ("cpu", "cuda"))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(
        tree_map_only(Tensor, Tensor.cpu, got), want, rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize(("recipe", "upsample"), [("released", True), ("paper", False), ("mic", False), ("mic", True)])
def test_trains_as_the_cpu_does(method: str, recipe: str, upsample: bool) -> None:
    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        student = deeplab_v2_tiny(C, upsample=not upsample).double()
        training = recipes.self_training(student, C, method=method, recipe=recipe, upsample=upsample, threshold=0.15)
        training = training.to(device).train()
        optimizer = torch.optim.SGD(training.student.parameters(), 0.05, momentum=0.9)
        v, found = values(torch.float64, device), []
        for step in range(4):
            draw = training.sample(N, SIZE, generator=seeded(step), device=device)
            out = training(v["images"], v["labels"], v["images"].flip(0), draw=draw)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            training.update()
            found.append(float(out.loss.detach()))
        return found

    torch.testing.assert_close(losses("cuda"), losses("cpu"), rtol=1e-8, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_finite_guard__two_optimizers_without_waiting(fused: bool) -> None:
    def run(*, bad: bool) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, C, 1)).cuda()
        teacher = MeanTeacher(network)
        optimizers = [
            torch.optim.AdamW(network[0].parameters(), 0.01, fused=fused),
            torch.optim.SGD(network[1:].parameters(), 0.1, momentum=0.9),
        ]
        guard = FiniteGuard([network, teacher], optimizers, skip=9)
        images = torch.rand(2, 3, 9, 9, generator=seeded(0)).cuda()
        factors = torch.tensor([1.0, torch.nan, 2.0, torch.inf, torch.nan, 3.0, 1.0], device="cuda")
        for step, factor in enumerate(factors if bad else factors[[0, 2, 5, 6]]):
            with waiting_is_an_error(on=step == 3 and fused):
                for one in optimizers:
                    one.zero_grad()
                loss = network(images).square().mean() * factor
                loss.backward()
                guard.check(loss, step)
                for one in optimizers:
                    one.step()
                teacher.update(network)
                guard.restore()
        guard.settle()
        return [value.cpu() for value in (*network.state_dict().values(), *teacher.module.state_dict().values())]

    torch.testing.assert_close(run(bad=True), run(bad=False), rtol=0, atol=0)


def test_evaluate_equals_the_cpu() -> None:
    torch.manual_seed(0)
    network = deeplab_v2_tiny(C).double().eval()
    pairs = [
        (torch.rand(3, *SIZE, generator=seeded(i), dtype=torch.float64), torch.randint(0, C, SIZE, generator=seeded(i)))
        for i in range(3)
    ]
    for options in ({}, {"window": (24, 32), "stride": (12, 16), "flip": True}):
        want = evaluate(copy.deepcopy(network), pairs, num_classes=C, **options)
        got = evaluate(copy.deepcopy(network).cuda(), pairs, num_classes=C, device="cuda", **options)
        assert got.keys() == want.keys()
        for size, matrix in want.items():
            assert matrix.compute().per_class.nansum() > 0
            torch.testing.assert_close([*got[size].cpu().buffers()], [*matrix.buffers()], rtol=0, atol=0)


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--precision", "fp16"], ["--channels-last"]])
def test_trainer(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(TRAINER), "--demo", "--method", "dacs", "--steps", "6", "--device", "cuda"]
    subprocess.run([*command, "--log-every", "1", "--out", str(tmp_path), *flags], check=True)
    losses = {line["step"]: line["loss"] for line in log_of(tmp_path) if "loss" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert (tmp_path / "report" / "index.html").exists()
