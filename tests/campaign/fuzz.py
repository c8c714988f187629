"""Random calls of every public function and module: only TypeError and ValueError may come out.

A call starts from valid arguments. Up to three of them are then replaced: by a tensor of another shape, dtype, layout
or content, by a value out of range, or by something that is no argument at all. Valid arguments must be accepted.
"""

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import crossmix
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.evaluation import resize_labels
from crossmix.metrics import ConfusionMatrix
from crossmix.optim import parameter_groups, poly_lr
from crossmix.visualize import colorize, gallery

TRIES = {"short": 20, "ci": 60, "nightly": 10_000}
Arguments = dict[str, Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.int8, torch.bool, torch.complex64)
SCALARS = (0, 1, -1, 2, 0.5, -0.5, 1.5, 255, 256, -100, 1000, math.nan, math.inf, -math.inf, True, 1e-320)
STRANGE = (None, "image", "all", b"x", (), [], (1, 2), {}, object(), np.float32(0.5), np.zeros((2, 2)), torch, 2 + 1j)


class Case:
    """Random valid arguments, from one generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311
        self.torch = torch.Generator().manual_seed(seed)
        self.n, self.height, self.width = (self.rng.randint(*range_) for range_ in ((0, 3), (1, 6), (1, 6)))
        self.classes = self.rng.choice((1, 2, 3, 19, 33))
        self.dtype = self.rng.choice((torch.float32, torch.float32, *FLOATS))

    def images(self, n: int | None = None) -> Tensor:
        shape = (self.n if n is None else n, 3, self.height, self.width)
        return torch.rand(shape, generator=self.torch).to(self.dtype)

    def labels(self, n: int | None = None) -> Tensor:
        shape = (self.n if n is None else n, self.height, self.width)
        labels = torch.randint(0, self.classes, shape, generator=self.torch)
        self.torch.manual_seed(self.rng.randrange(2**31))
        ignored = torch.rand(shape, generator=self.torch) < 0.2
        return labels.masked_fill(ignored, 255).to(self.rng.choice(INTEGERS))

    def logits(self) -> Tensor:
        return torch.randn(self.n, self.classes, self.height, self.width, generator=self.torch).to(self.dtype)

    def probs(self) -> Tensor:
        return self.logits().float().softmax(1)

    def weights(self) -> Tensor | None:
        shape = self.rng.choice(((self.n,), (self.n, self.height, self.width), None))
        return None if shape is None else torch.rand(shape, generator=self.torch)

    def mask(self) -> Tensor:
        return torch.rand(self.n, self.height, self.width, generator=self.torch) < 0.5

    def scores(self, *sizes: int) -> Tensor:
        return torch.rand(self.n, *sizes, generator=self.torch)

    def prior(self) -> Tensor:
        return torch.rand(self.classes, generator=self.torch).add(0.1).softmax(0)


def changed(case: Case, value: object) -> object:
    """Another value in place of an argument."""
    rng = case.rng
    if isinstance(value, Tensor) and rng.random() < 0.8:
        return rng.choice((retyped, reshaped, resized, transposed, spoiled, no_longer_dense))(case, value)
    return rng.choice(rng.choice((SCALARS, STRANGE)))


def retyped(case: Case, value: Tensor) -> Tensor:
    return value.to(case.rng.choice(DTYPES))


def reshaped(case: Case, value: Tensor) -> Tensor:
    shape = [case.rng.randint(0, 5) for _ in range(case.rng.randint(0, 5))]
    return torch.rand(shape, generator=case.torch).mul(4).to(value.dtype)


def resized(case: Case, value: Tensor) -> Tensor:
    dim = case.rng.randrange(value.ndim)
    return case.rng.choice((value.narrow(dim, 0, max(0, value.shape[dim] - 1)), value.unsqueeze(dim)))


def transposed(case: Case, value: Tensor) -> Tensor:
    return value.transpose(*case.rng.choices(range(value.ndim), k=2))


def spoiled(case: Case, value: Tensor) -> Tensor:
    """One element out of range, another one not a number."""
    value = value.clone().contiguous()
    if value.numel():
        value.view(-1)[0] = torch.tensor(case.rng.choice((-1, 7, 127, 1e4))).to(value.dtype)
        if value.is_floating_point():
            value.view(-1)[-1] = case.rng.choice((math.nan, math.inf, -math.inf))
    return value


def no_longer_dense(case: Case, value: Tensor) -> object:
    plain = value.float().numpy()
    return case.rng.choice((value.to_sparse(), value.to("meta"), value.expand(2, *value.shape), plain, plain.tolist()))


def options(case: Case, **choices: tuple[Any, ...]) -> Arguments:
    """Some of the keyword arguments, each with one of its values."""
    return {name: case.rng.choice(values) for name, values in choices.items() if case.rng.random() < 0.5}


RATIOS, SCOPES, NORMALIZERS = (0.0, 0.3, 0.5, 1.0), ("image", "batch", "pixel", "none"), ("all", "valid", "weights")
LOSS: dict[str, tuple[Any, ...]] = {
    "normalizer": NORMALIZERS, "label_smoothing": (0.0, 0.1), "reduction": ("mean", "sum", "none"),
}  # fmt: skip


class Network(nn.Module):
    """A network that takes any images, so that no error is its own."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, classes)[:, None, None])
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = images.sum(1, keepdim=True).to(self.weight.dtype) * self.weight
        out: Tensor = self.norm(logits) if logits.numel() > logits.shape[1] else logits
        return out


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return Network(case.classes).to(case.dtype)


def training(case: Case) -> Callable[..., object]:
    """A whole step of a method, with its gradients and its update."""
    student = network(case)
    method = case.rng.choice(("source", "pseudo-label", "classmix", "dacs", "alignment"))
    prior = case.prior() if method == "alignment" else None
    module = crossmix.recipes.self_training(student, case.classes, method=method, prior=prior).train()

    def step(**arguments: Any) -> object:
        output = module(**arguments)
        output.loss.backward()
        module.update()
        return output.loss

    return step


def then(module: Any, method: str, *after: str) -> Callable[..., object]:
    """Call a method with the arguments, then others without any."""

    def call(**arguments: Any) -> object:
        found = getattr(module, method)(**arguments)
        for name in after:
            found = getattr(module, name)()
        return found

    return call


def built(make: Callable[..., Any], forward: Arguments) -> Callable[..., object]:
    """Build a module from the arguments, then call it with valid inputs."""
    return lambda **arguments: make(**arguments)(**forward)


def pair(case: Case) -> Arguments:
    return {
        "source_images": case.images(), "source_labels": case.labels(), "target_images": case.images(),
        "target_labels": case.labels(), "target_weights": case.weights(),
    }  # fmt: skip


def single(case: Case) -> Arguments:
    return {"images": case.images(), "labels": case.labels(), "weights": case.weights()}


Made = tuple[Callable[..., object], Arguments]
CALLS: dict[str, Callable[[Case], Made]] = {
    "F.sample_classes": lambda c: (F.sample_classes, {
        "labels": c.labels(), "num_classes": c.classes,
        **options(c, ratio=RATIOS, include_ignored=(True, False), scores=(c.scores(c.classes + 1),),
                  class_weights=(c.prior(),), rounding=("ceil", "floor"), ignore_index=(255, 0)),
    }),
    "F.class_mask": lambda c: (F.class_mask, {"labels": c.labels(), "classes": c.scores(c.classes + 1) < 0.5}),
    "F.mix": lambda c: (F.mix, {"pasted": c.images(), "base": c.images(), "mask": c.mask()}),
    "F.box_mask": lambda c: (F.box_mask, {
        "scores": c.scores(4), "size": (c.height, c.width), **options(c, area=((0.1, 0.5),), aspect=((0.5, 2.0),)),
    }),
    "F.cow_mask": lambda c: (F.cow_mask, {
        "noise": torch.randn(c.n, c.height, c.width, generator=c.torch),
        "sigma": c.rng.choice((0.5, 3.0, c.scores() + 0.5)),
        **options(c, ratio=RATIOS),
    }),
    "F.block_mask": lambda c: (F.block_mask, {
        "scores": c.scores(math.ceil(c.height / 2), math.ceil(c.width / 2)), "size": (c.height, c.width), "block": 2,
        **options(c, ratio=RATIOS),
    }),
    "F.pseudo_label": lambda c: (F.pseudo_label, {"logits": c.logits()}),
    "F.pseudo_label_from_probs": lambda c: (F.pseudo_label_from_probs, {"probs": c.probs()}),
    "F.confidence_weight": lambda c: (F.confidence_weight, {
        "confidence": c.scores(c.height, c.width), **options(c, threshold=(0.0, 0.5, 0.968, 1.0), scope=SCOPES),
    }),
    "F.weighted_cross_entropy": lambda c: (F.weighted_cross_entropy, {
        "logits": c.logits(), "labels": c.labels(), "weights": c.weights(), **options(c, **LOSS),
    }),
    "F.upsampled_cross_entropy": lambda c: (F.upsampled_cross_entropy, {
        "logits": c.logits()[..., : max(1, c.height // 2), : max(1, c.width // 2)], "labels": c.labels(),
        "weights": c.weights(), **options(c, align_corners=(True, False), **LOSS),
    }),
    "F.align_distribution": lambda c: (F.align_distribution, {
        "probs": c.probs(), "prior": c.prior(), "running": c.prior(), **options(c, eps=(1e-6,)),
    }),
    "F.ema_update_": lambda c: (F.ema_update_, {
        "averaged": [c.images(), c.weights()][: c.rng.randint(1, 1)], "current": [c.images()], "decay": 0.9,
    }),
    "ClassMix": lambda c: (built(crossmix.ClassMix, single(c)), {
        "num_classes": c.classes, **options(c, ratio=RATIOS, ignore_index=(255,), include_ignored=(True, False)),
    }),
    "ClassMix.forward": lambda c: (crossmix.ClassMix(c.classes), {
        **single(c), **c.rng.choice(({"scores": c.scores(c.classes + 1)}, {"mask": c.mask()}, {})),
    }),
    "ClassMix.sample": lambda c: (crossmix.ClassMix(c.classes).sample, {"labels": c.labels()}),
    "CrossDomainMix": lambda c: (built(crossmix.CrossDomainMix, pair(c)), {
        "num_classes": c.classes,
        **(options(c, ratio=RATIOS, class_weights=(c.prior(),)) if c.rng.random() < 0.5 else
           options(c, masks=(crossmix.BoxMasks(), crossmix.CowMasks(sigma=2.0)))),
    }),
    "CrossDomainMix.forward": lambda c: (crossmix.CrossDomainMix(c.classes), {
        **pair(c), **options(c, classes=(c.scores(c.classes + 1) < 0.5,)),
    }),
    "BoxMasks": lambda c: (lambda **a: crossmix.CrossDomainMix(c.classes, masks=crossmix.BoxMasks(**a))(**pair(c)),
                           options(c, area=((0.1, 0.5),), aspect=((0.5, 2.0),))),
    "CowMasks": lambda c: (lambda **a: crossmix.CrossDomainMix(c.classes, masks=crossmix.CowMasks(**a))(**pair(c)),
                           {"sigma": 2.0, **options(c, ratio=RATIOS)}),
    "MaskedImages": lambda c: (built(crossmix.MaskedImages, {"images": c.images()}), {
        "block": 1, **options(c, ratio=RATIOS, fill=((0.5, 0.5, 0.5),)),
    }),
    "MaskedImages.forward": lambda c: (crossmix.MaskedImages(block=1), {"images": c.images()}),
    "StrongAugment": lambda c: (built(crossmix.StrongAugment, {"images": c.images()}), options(
        c, brightness=(0.2,), contrast=(0.2,), saturation=(0.2,), hue=(0.1,), jitter_p=(1.0,), blur_p=(1.0,),
        blur_sigma=((0.2, 1.0),), flavor=("torchvision", "additive"), same_on_batch=(True,),
    )),
    "StrongAugment.forward": lambda c: (crossmix.StrongAugment(), {"images": c.images()}),
    "MeanTeacher": lambda c: (lambda **a: crossmix.MeanTeacher(**a)(c.images(2)), {
        "student": network(c), **options(c, decay=(0.0, 0.99), warmup=(True, False), buffers=("copy", "average"),
                                         mode=("train", "eval"), start=(0, 1)),
    }),
    "MeanTeacher.update": lambda c: (crossmix.MeanTeacher(network(c)).update, {"student": network(c)}),
    "ConfidenceWeightedCE": lambda c: (
        built(crossmix.ConfidenceWeightedCE, {"logits": c.logits(), "labels": c.labels(), "weights": c.weights()}),
        options(c, threshold=(0.5,), scope=SCOPES, normalizer=NORMALIZERS, label_smoothing=(0.1,), ignore_index=(255,)),
    ),
    "ConfidenceWeightedCE.forward": lambda c: (crossmix.ConfidenceWeightedCE(), {
        "logits": c.logits(), "labels": c.labels(), "weights": c.weights(),
    }),
    "ConfidenceWeightedCE.weights": lambda c: (crossmix.ConfidenceWeightedCE().weights, {
        "confidence": c.scores(c.height, c.width),
    }),
    "DistributionAlignment": lambda c: (built(crossmix.DistributionAlignment, {"probs": c.probs()}), {
        "num_classes": c.classes, **options(c, prior=(c.prior(),), momentum=(0.9,)),
    }),
    "DistributionAlignment.forward": lambda c: (crossmix.DistributionAlignment(c.classes), {"probs": c.probs()}),
    "DistributionAlignment.update": lambda c: (crossmix.DistributionAlignment(c.classes).update, {"probs": c.probs()}),
    "DistributionAlignment.update_prior": lambda c: (crossmix.DistributionAlignment(c.classes).update_prior, {
        "labels": c.labels(),
    }),
    "SelfTraining": lambda c: (training(c), {
        "source_images": c.images(2), "source_labels": c.labels(2), "target_images": c.images(2),
        **options(c, target_weights=(torch.rand(2, c.height, c.width, generator=c.torch),)),
    }),
    "recipes.self_training": lambda c: (crossmix.recipes.self_training, {
        "student": network(c), "num_classes": c.classes, "method": c.rng.choice(("dacs", "classmix")),
        **options(c, recipe=("paper", "released", "mic"), decay=(0.9,), threshold=(0.5,), scope=SCOPES,
                  ratio=RATIOS, weigh=("mixed", "target"), upsample=(True,)),
    }),
    "ConfusionMatrix.update": lambda c: (then(ConfusionMatrix(c.classes), "update", "compute"), {
        "predictions": c.labels() % c.classes, "labels": c.labels(),
    }),
    "ConfusionMatrix": lambda c: (ConfusionMatrix, {"num_classes": c.classes, **options(c, ignore_index=(255, 0))}),
    "PseudoLabelMonitor.update": lambda c: (then(PseudoLabelMonitor(c.classes), "update", "compute"), {
        "labels": c.logits().argmax(1), "confidence": c.scores(c.height, c.width), **options(c, truth=(c.labels(),)),
    }),
    "UnsupervisedScores.update": lambda c: (then(UnsupervisedScores(c.classes), "update", "compute"), {
        "logits": c.logits(),
    }),
    "parameter_groups": lambda c: (parameter_groups, {
        "network": network(c), "lr": 0.1, "head": "norm", **options(c, head_factor=(10.0,), repeated=(False,)),
    }),
    "poly_lr": lambda c: (poly_lr, {"step": c.n, "steps": 10, "lr": 0.1, **options(c, power=(0.9,), warmup=(2,))}),
    "resize_labels": lambda c: (resize_labels, {"labels": c.labels(1)[0], "size": (c.height + 1, c.width)}),
    "colorize": lambda c: (colorize, {"labels": c.labels(1)[0]}),
    "gallery": lambda c: (gallery, {"rows": [list(c.images(2).float())], **options(c, gap=(0, 3))}),
}  # fmt: skip


def attempt(name: str, seed: int) -> tuple[str, str]:
    """Make one call: its outcome (a kind of error, or "accepted"), and what it was."""
    case = Case(seed)
    function, arguments = CALLS[name](case)
    replaced = case.rng.sample(sorted(arguments), min(len(arguments), case.rng.choice((0, 1, 1, 1, 2, 3))))
    arguments |= {argument: changed(case, arguments[argument]) for argument in replaced}
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        return (kind if replaced else f"{kind} for valid arguments"), str(error)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}", f"{replaced}: {error}"
    return "accepted", ""


def fuzz(name: str, tries: int) -> dict[str, Any]:
    """Outcomes of calls with the seeds from 0 on, and the first of each that should not be."""
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for seed in range(tries):
        outcome, what = attempt(name, seed)
        outcomes[outcome] += 1
        if outcome not in {"accepted", "TypeError", "ValueError"}:
            wrong.setdefault(outcome, f"seed {seed}: {what}"[:400])
    return {"calls": tries, "outcomes": dict(outcomes), "wrong": wrong}


def run(profile: str) -> dict[str, Any]:
    """All names."""
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about odd inputs
        for name in CALLS:
            found = fuzz(name, TRIES[profile])
            outcomes.update(found["outcomes"])
            wrong |= {f"{name}: {outcome}": first for outcome, first in found["wrong"].items()}
    named = {outcome: outcomes.pop(outcome) for outcome in ("accepted", "TypeError", "ValueError")}
    return {
        "names": len(CALLS),
        "calls of each": TRIES[profile],
        **named,
        "other errors": outcomes.total(),
        "wrong": wrong,
    }
